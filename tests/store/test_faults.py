"""What survives when the power goes or a call fails, at every call to the disk that a run makes."""

import contextlib
import errno
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from powerless import MemoryDisk, PowerLoss, seeded

from hbkit import errors
from hbkit.store import home as module
from hbkit.store import log
from hbkit.store.home import Home
from hbkit.store.line import Layout

LAYOUT = Layout("t", 100, np.zeros(100, np.float32), lambda keys: np.zeros((len(keys), 100)))
SIZE = 800
N_KEYS = 60


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything happens in a short run: segments of two blocks, checkpoints, compaction."""
    monkeypatch.setattr(module, "LEAST_TAIL_NBYTES", 40_000)
    monkeypatch.setattr(module, "TAIL", 0)
    monkeypatch.setattr(module, "PART_ROWS", 20)
    monkeypatch.setattr(log, "SPARE_NBYTES", 0)


def opened(disk):
    return Home(LAYOUT, Path("/t"), buffer_nbytes=8192, segment_nbytes=12_288, disk=disk)


def state(home):
    """All that a home holds, as bytes."""
    keys = np.sort(home.keys())
    return keys.tobytes(), *(x.tobytes() for x in home.read(keys)), home.latest_step()


def act(home, i):
    """Part i of a run; what it does depends on i alone."""
    rng = np.random.default_rng(i)
    keys = rng.permutation(N_KEYS)[:16]
    if i % 5 == 3:
        home.erase(keys[:9])
    else:
        if i % 3 == 0:
            home.add(keys[~home.find(keys)])
        home.write(keys, rng.integers(0, 256, (16, SIZE), np.uint8), *rng.integers(0, 99, (2, 16), np.uint32))


def run(disk, first, n, committed):
    """Open, then act and commit in turn; after each commit, `committed` gets the number of acts and the state."""
    home = opened(disk)
    try:
        for i in range(first, first + n):
            act(home, i)
            if i % 2:
                committed.append([i + 1, state(home), False])
                home.commit({"i": np.array([i + 1])})
                committed[-1][2] = True
        return home.stats()
    finally:
        home.close()


def states_of(n):
    """Number of acts and state after each commit of a run that nothing disturbs; its disk."""
    disk, committed = MemoryDisk(), [[0, None, True]]
    run(disk, 0, n, committed)
    return {i: s for i, s, _ in committed}, disk


def check(disk, states, at_least, at_most):
    """Open after a fault: the last state that was committed is there, or the one that was being committed."""
    home = opened(disk)
    home.validate()
    home.verify()
    i = int(home.kept()["i"][0]) if home.n_commits else 0
    assert at_least <= i <= at_most, "a commit was lost"
    if i:
        assert state(home) == states[i]
    else:
        assert len(home) == 0
    home.close()
    return i


N = 34


def test_faults_run_does_everything():
    states, disk = states_of(N)
    assert len(states) == N // 2 + 1 and disk.calls > 200
    assert any(name.startswith("index") for name in disk.names) and "manifest.json" in disk.names
    committed = []
    assert run(MemoryDisk(), 0, N, committed)["compacted_segments"] > 3


def crash(n, states, disk, first, n_acts, seed):
    """Run until the n-th call, where the power goes; whether it went."""

    def off(call, name):
        if call == n:
            raise PowerLoss

    disk.calls, disk.fault, committed = 0, off, [[first, None, True]]
    try:
        run(disk, first, n_acts, committed)
        went = False
    except PowerLoss:
        went = True
    disk.lose_power(seeded(n, seed))
    done = max(i for i, _, whole in committed if whole)
    return went, check(disk, states, done, committed[-1][0])


@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 3), marks=pytest.mark.slow)], ids=["some", "all"])
def test_faults_power_loss_at_every_call(seed):
    states, _ = states_of(N + 8)
    for s in [seed] if seed == 0 else seed:
        n, went = 0, True
        while went:
            n += 1 if s else 4 + n % 3
            disk = MemoryDisk()
            went, at = crash(n, states, disk, 0, N, s)
            if n % 3 == 0:  # go on from there, and lose power again, in the recovery or after it
                _, at = crash(1 + n // 3 % 60, states, disk, at, 4, s)
            run(disk, at, 4, committed := [])
            check(disk, states, committed[-1][0], committed[-1][0])
        assert n > 200


def failing(n, code, for_ever):
    def fault(call, name):
        if name != "close" and (call >= n if for_ever else call == n):
            raise OSError(code, os.strerror(code))

    return fault


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["eio", "full"])
@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 3), marks=pytest.mark.slow)], ids=["some", "all"])
def test_faults_a_failing_call_costs_no_commit(code, for_ever, seed):
    states, _ = states_of(N + 8)
    for s in [seed] if seed == 0 else seed:
        n, failed, n_failed = 0, True, 0
        while failed or n < 100:
            n += 1 if s else (13 if for_ever else 5) + n % 3
            disk, committed, failed = MemoryDisk(), [[0, None, True]], False
            disk.fault = failing(n, code, for_ever)
            try:
                run(disk, 0, N, committed)
            except errors.StorageError as e:
                failed = True
                assert os.strerror(code) in str(e) and e.place.get("file") is not None
            n_failed += failed
            failed |= disk.calls >= n and n < 400  # some calls may fail: what cannot be deleted stays
            disk.fault = None
            if for_ever or n % 3 == 0:
                disk.lose_power(seeded(n, s))
            done = max(i for i, _, whole in committed if whole)
            at = check(disk, states, done, committed[-1][0])
            run(disk, at, 4, again := [])
            check(disk, states, again[-1][0], again[-1][0])
        assert n_failed > (200 if s else 20)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["eio", "full"])
def test_faults_while_opening_cost_nothing(code):
    states, _ = states_of(N)
    n, n_failed = 0, 0
    while n_failed == n:
        n += 1
        _, disk = states_of(N)
        disk.calls, disk.fault = 0, failing(n, code, False)
        with contextlib.suppress(errors.StorageError):
            opened(disk).close()
            n_failed -= 1
        n_failed += 1
        disk.fault = None
        check(disk, states, N, N)
    assert n > 10


@pytest.mark.parametrize("failing_call", ["write", "open", "free", "read"])
def test_faults_a_write_that_failed_is_as_if_it_had_not_been(failing_call):
    """The home reads on, and later commits hold nothing of it, whatever of it has reached the disk."""
    for n in range(1, 12):
        disk = MemoryDisk()
        home = opened(disk)
        for i in range(20):
            act(home, i)
        before, count = state(home), [0]

        def fault(call, name, count=count, n=n):
            count[0] += name == failing_call
            if name == failing_call and count[0] >= n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        disk.fault = fault
        rng = np.random.default_rng(0)
        keys, lines = np.arange(40, 90), rng.integers(0, 256, (50, SIZE), np.uint8)
        try:
            home.write(keys, lines, *np.zeros((2, 50), np.uint32))
            failed = False
        except errors.StorageError:
            failed = True
        try:
            home.erase(np.arange(10))
            erased = True
        except errors.StorageError:
            erased = False
        disk.fault = None
        home.validate()
        now = state(home)
        if failed and not erased:
            assert now == before
        home.commit()
        home.close()
        home = opened(disk)
        assert state(home) == now
        home.validate()
        home.close()


def test_faults_rows_that_could_not_be_synced_are_never_committed():
    disk = MemoryDisk()
    home = opened(disk)
    act(home, 0)
    home.commit()
    want = state(home)
    act(home, 1)

    def fault(call, name):
        if name == "sync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.fault = fault
    for _ in range(2):
        with pytest.raises(errors.StorageError, match="sync rows"):
            home.commit()
        disk.fault = None  # it seems to be well again
    now = state(home)
    assert now != want
    home.close()
    disk.lose_power(seeded(0))
    home = opened(disk)
    assert state(home) == want
    home.close()


def test_faults_in_the_last_sync_of_a_commit_keep_both(monkeypatch):
    """Whether the manifest's new name is durable is not known then: what either commit needs must stay."""
    monkeypatch.setattr(module, "LEAST_TAIL_NBYTES", 1)
    for n in range(60):
        disk = MemoryDisk()
        home, states = opened(disk), []
        for i in range(10):
            act(home, i)
        home.commit()
        states.append(state(home))
        for i in range(10, 20):
            act(home, i)
        states.append(state(home))
        syncs = [0]

        def fault(call, name, syncs=syncs):
            syncs[0] += name == "sync_directory"
            if name == "sync_directory" and syncs[0] == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        disk.fault = fault
        with pytest.raises(errors.StorageError, match="sync the directory"):
            home.commit()
        for i in range(20, 40):
            act(home, i)
        states.append(state(home))
        disk.calls = 0

        def off(call, name, n=n):
            if call >= n:
                raise PowerLoss

        disk.fault = off
        with contextlib.suppress(PowerLoss):
            home.commit()
        disk.lose_power(seeded(n))
        home = opened(disk)
        home.verify()
        assert state(home) in states
        home.close()


def test_faults_last_commit_survives_fifty_kills(tmp_path):
    path = Path(__file__).parents[2] / "bench" / "crash.py"  # which does a thousand
    spec = importlib.util.spec_from_file_location("crash", path)
    crash = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crash)
    assert crash.kills(tmp_path, 50, seed=0, seconds=0.05) > 30
