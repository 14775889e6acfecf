"""The SSD tier against host memory, bit for bit, and its budget. What disks can do to it is in test_home and
test_faults."""

import contextlib
import errno
import gc
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from homes import ACTS, OPTIMIZERS, any_table, contents, looking_ahead, step
from hypothesis import given, settings
from hypothesis import strategies as st
from powerless import MemoryDisk, PowerLoss, seeded

from hbkit import errors
from hbkit.embedding import SGD, Adagrad, BloomAdmission, CountAdmission, Table
from hbkit.store import cached_ssd, host_memory, log
from hbkit.store.line import Chunk
from hbkit.store.policy import make_policy
from hbkit.store.ssd import SsdStore


class Tiny:
    """A store with a cache of a few lines and segments of a few rows."""

    def __init__(self, path, lines, policy="lfu", segment_nbytes=20_000, budget=2**20):
        self.path, self.budget, self.policy = Path(path), budget, make_policy(policy)
        self.how = {"cache_lines": lines, "segment_nbytes": segment_nbytes}

    def open(self, layout):
        return SsdStore(layout, self.path / layout.table, self.budget, self.policy, **self.how)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    acts=st.lists(st.sampled_from([*ACTS, "reopen", "crash"]), min_size=1, max_size=12),
    lines=st.sampled_from([1, 2, 5, 16, 64, None]),
    policy=st.sampled_from(["lru", "lfu", "tinylfu"]),
    optimizer=st.sampled_from(OPTIMIZERS),
    dim=st.sampled_from([1, 4, 17]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    metadata=st.booleans(),
    min_count=st.sampled_from([None, 2]),
)
def test_ssd_equals_host(tmp_path_factory, seed, acts, lines, policy, optimizer, dim, dtype, metadata, min_count):
    path = tmp_path_factory.mktemp("rows")

    def table(store):
        return any_table(store, optimizer, dim, dtype, metadata, min_count)

    ours, theirs = table(Tiny(path, lines, policy)), table(host_memory())
    mine, other = np.random.default_rng(seed), np.random.default_rng(seed)
    for act in acts:
        if act in ("reopen", "crash"):
            ours.commit()
            if act == "crash":  # what comes after a commit leaves no trace
                step(ours, np.random.default_rng(0))
            ours.close()
            ours = table(Tiny(path, lines, policy))
            assert ours.step == theirs.store.latest_step()
            ours.step = theirs.step
        else:
            assert ACTS[act](ours, mine) == ACTS[act](theirs, other)
        ours.store.validate()
    for act in ("lookup", "commit"):
        assert contents(ours.store) == contents(theirs.store) and len(ours) == len(theirs)
        assert contents(ours.store, since=2) == contents(theirs.store, since=2)
        if min_count:
            states = [{k: v.tolist() for k, v in t.admission.state().items()} for t in (ours, theirs)]
            assert states[0] == states[1]
        ACTS[act](ours, mine)
    assert ours.store.verify() == len(theirs)
    ours.close()


@pytest.mark.parametrize("window", [0, 1, 5])
def test_ssd_lookahead_equals_host(tmp_path, window):
    assert looking_ahead(Tiny(tmp_path, 40), window) == looking_ahead(host_memory(), 0)


def table_of(store, name="t", dim=4, optimizer=None):
    return Table(name, dim, optimizer=optimizer or Adagrad(), store=store)


def trained(store, steps=5, **how):
    t = table_of(store, **how)
    rng = np.random.default_rng(1)
    for _ in range(steps):
        step(t, rng)
    return t


def test_ssd_cached_ssd_reopens_by_its_public_name(tmp_path):
    t = trained(cached_ssd(tmp_path, host_budget="1MiB", policy="tinylfu"))
    assert t.commit() == "1"
    want = contents(t.store)
    t.store.close()
    again = table_of(cached_ssd(str(tmp_path), host_budget=2**20))
    assert contents(again.store) == want == contents(trained(host_memory()).store)
    assert again.stats()["rows"] == len(again) and again.commit() == "2"
    again.store.close()


def test_ssd_batch_larger_than_the_cache_streams(tmp_path):
    t, h = table_of(Tiny(tmp_path, 4)), table_of(host_memory())
    for table in (t, h):
        rng = np.random.default_rng(0)
        for _ in range(3):
            step(table, rng, 5000, 4000)
    assert t.stats()["streamed_rows"] > 1000 and t.stats()["cache_lines"] == 4
    assert contents(t.store) == contents(h.store)
    t.store.close()


def test_ssd_everything_pinned_streams(tmp_path):
    t, h = table_of(Tiny(tmp_path, 16)), table_of(host_memory())
    held = []
    for table in (t, h):
        rng = np.random.default_rng(5)
        for _ in range(10):
            step(table, rng)
            held.append(table.request(rng.integers(0, 200, 50)))
    t.store.validate()
    assert contents(t.store) == contents(h.store)
    t.store.close()


def test_ssd_second_writer_is_locked_out(tmp_path):
    t = trained(cached_ssd(tmp_path, "1MiB"))
    with pytest.raises(errors.Locked, match="LOCK"):
        table_of(cached_ssd(tmp_path, "1MiB"))
    other = table_of(cached_ssd(tmp_path, "1MiB"), name="other")  # a table of its own
    other.store.close()
    t.store.close()
    table_of(cached_ssd(tmp_path, "1MiB")).store.close()


def test_ssd_closed_store_says_so(tmp_path):
    t = trained(cached_ssd(tmp_path, "1MiB"))
    t.store.close()
    t.store.close()
    for use in (t.commit, t.stats, lambda: t.lookup([1]), lambda: list(t.store.scan())):
        with pytest.raises(errors.Closed):
            use()


def test_ssd_other_dim_or_state_is_a_schema_mismatch(tmp_path):
    t = trained(cached_ssd(tmp_path, "1MiB"))
    t.commit()
    t.store.close()
    for how in ({"dim": 5}, {"optimizer": SGD()}):
        with pytest.raises(errors.SchemaMismatch, match="table t"):
            table_of(cached_ssd(tmp_path, "1MiB"), **how)
    table_of(cached_ssd(tmp_path, "1MiB")).store.close()  # the failures left no lock


def test_ssd_put_of_other_width_is_a_schema_mismatch(tmp_path):
    t = table_of(cached_ssd(tmp_path, "1MiB"))
    zeros = np.zeros(1, np.int64)
    with pytest.raises(errors.SchemaMismatch):
        t.store.put(Chunk(zeros, zeros, zeros, np.zeros((1, 5), np.float32), np.zeros((1, 4), np.float32)))
    t.store.close()


def test_ssd_budget_too_small_says_what_would_do(tmp_path):
    with pytest.raises(errors.BudgetExceeded, match="give at least"):
        table_of(cached_ssd(tmp_path, 1000))
    t = table_of(cached_ssd(tmp_path, "400KiB"))
    keys = np.arange(100_000)
    t.lookup(keys[:500], train=True)
    t.commit()
    with pytest.raises(errors.BudgetExceeded) as caught:
        t.lookup(keys, train=True)
    assert len(t) == 500
    t.lookup(keys[:600], train=True)  # the store goes on
    t.store.validate()
    assert t.commit() == "2"
    t.store.close()
    enough = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    t = table_of(cached_ssd(tmp_path, enough))
    t.lookup(keys, train=True)
    t.store.validate()
    assert len(t) == len(keys)
    t.store.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "tinylfu"])
def test_ssd_budget_holds_while_the_table_grows(tmp_path, policy):
    t = table_of(cached_ssd(tmp_path, "1200KiB", policy))
    rng, lines = np.random.default_rng(0), []
    for _ in range(30):
        t.lookup(rng.integers(0, 10**6, 200), train=True)
        t.store.validate()  # asserts the budget
        lines.append(t.stats()["cache_lines"])
    assert lines == sorted(lines, reverse=True) and lines[0] > lines[-1] > 0
    t.store.close()


def test_ssd_stats_count_what_happened(tmp_path):
    t = table_of(cached_ssd(tmp_path, "1MiB"))
    t.lookup([1, 2, 3], train=True)
    t.lookup([1, 2, 3])
    t.lookup([7])
    t.update([9], np.ones((1, 4)))
    t.commit()
    s = t.stats()
    assert (s["rows"], s["hits"], s["misses"], s["evictions"], s["ignored_updates"]) == (3, 3, 0, 0, 1)
    assert s["hit_rate"] == 1.0 and s["commits"] == 1 and s["read_nbytes"] == 0
    assert s["given_nbytes"] == 3 * (8 * 4 + 16) and s["disk_nbytes"] == 4096  # one block
    assert s["host_nbytes"] <= s["host_budget_nbytes"]
    t.store.close()


def test_ssd_leaves_no_open_files(tmp_path):
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        t = trained(Tiny(tmp_path, 16), steps=20)
        t.commit()
        t.store.close()
    assert len(os.listdir("/proc/self/fd")) == before
    t = trained(Tiny(tmp_path, 16))
    del t
    gc.collect()  # an abandoned table lets go of its lock
    table_of(Tiny(tmp_path, 16)).store.close()
    assert len(os.listdir("/proc/self/fd")) == before


CHILD = """
import sys
from pathlib import Path
import numpy as np
from hbkit.embedding import Adagrad, Table
from hbkit.store.policy import make_policy
from hbkit.store.ssd import SsdStore
class Tiny:
    def open(self, layout):
        return SsdStore(layout, Path(sys.argv[1]) / layout.table, 2**20, make_policy("lfu"), None, 64, 20_000)
t = Table("t", 4, optimizer=Adagrad(), store=Tiny())
print("ready", flush=True)
i = t.stats()["commits"]
while True:
    rng = np.random.default_rng(i)
    keys = rng.zipf(1.3, 300) % 1000
    t.step = i
    t.lookup(keys, train=True)
    t.update(keys, rng.standard_normal((300, 4)).astype(np.float32))
    t.commit()
    i += 1
"""


def test_ssd_last_commit_survives_kill(tmp_path):
    rng = random.Random(0)
    host, done = table_of(host_memory()), 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.random() / 3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        t = table_of(Tiny(tmp_path, 64))
        n = t.stats()["commits"]
        while done < n:
            r = np.random.default_rng(done)
            keys = r.zipf(1.3, 300) % 1000
            host.step = done
            host.lookup(keys, train=True)
            host.update(keys, r.standard_normal((300, 4)).astype(np.float32))
            done += 1
        t.store.validate()
        assert t.store.verify() == len(host)
        assert contents(t.store) == contents(host.store)
        t.store.close()
    assert done > 0


@pytest.mark.parametrize("rule", [CountAdmission(3), BloomAdmission(3, 100)], ids=["count", "bloom"])
def test_ssd_keeps_the_counts_of_admission(tmp_path, rule):
    def table(admission=rule):
        return Table("t", 4, store=Tiny(tmp_path, 5), admission=admission)

    def state(t):
        return {k: v.tolist() for k, v in t.admission.state().items()}

    t = table()
    t.lookup([1, 1, 2, 3, 3, 3], train=True)
    t.commit()
    want = state(t)
    t.lookup([1, 2], train=True)  # after the commit: leaves no trace
    t.close()
    t = table()
    assert state(t) == want and len(t) == 1
    t.lookup([1], train=True)
    assert len(t) == 2
    t.commit()
    t.close()
    assert len(list((tmp_path / "t").glob("kept-*"))) == 1
    with pytest.raises(errors.SchemaMismatch):
        table(BloomAdmission(3, 10_000))
    table().close()  # the lock was let go
    table(None).close()
    path = next((tmp_path / "t").glob("kept-*"))
    data = bytearray(path.read_bytes())
    for broken in (data[:-1], bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(broken)
        with pytest.raises(errors.Corrupt, match="kept"):
            table()
    path.unlink()
    with pytest.raises(errors.Corrupt, match="missing"):
        table()


@pytest.mark.parametrize("n", [40, 300, 5000, 90_000])
def test_ssd_budget_has_room_for_the_index(tmp_path, n):
    t = table_of(cached_ssd(tmp_path, host_budget=n * 100 + 300_000), dim=2)
    for keys in np.array_split(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, n), 7):
        t.lookup(keys, train=True)
        t.store.validate()  # which holds all memory against the budget
    t.store.erase(keys)
    t.store.validate()
    t.close()


class Powered:
    """A place for one table on a disk in memory."""

    def __init__(self, disk):
        self.disk = disk

    def open(self, layout):
        how = {"cache_lines": 16, "segment_nbytes": 20_000, "disk": self.disk}
        return SsdStore(layout, Path("/t"), 2**20, make_policy("lfu"), **how)


def trains_and_commits(table, n, done):
    """Steps with a commit after every second one; `done` gets the number of steps when a commit begins and ends."""
    for i in range(table.step, n):
        step(table, np.random.default_rng(i), 150, 40)
        if i % 2:
            done.append(i + 1)
            table.commit()
            done.append(i + 1)


FAULTS = {"power": 0, "eio": errno.EIO, "full": errno.ENOSPC}


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_ssd_training_goes_on_from_the_last_commit_whatever_the_disk_does(monkeypatch, fault, every):
    monkeypatch.setattr(log, "SPARE_NBYTES", 0)
    host, states = table_of(host_memory()), {0: contents(table_of(host_memory()).store)}
    for n in range(2, 13, 2):
        trains_and_commits(host, n, [])
        states[n] = contents(host.store)
    nth, went = 1, True
    while went:
        nth += every
        disk, done, went = MemoryDisk(), [0, 0], False

        def fails(call, name, nth=nth, disk=disk):
            nonlocal went
            if call >= nth and not (went and fault == "power"):
                went = True
                raise (
                    PowerLoss if fault == "power" else OSError(errno.EIO if fault == "eio" else errno.ENOSPC, "planted")
                )

        disk.fault = fails
        t = None
        with contextlib.suppress(PowerLoss, errors.StorageError):
            t = table_of(Powered(disk))
            trains_and_commits(t, 12, done)
        disk.fault = None
        if fault == "power":
            disk.lose_power(seeded(nth, 0))
        elif t is not None:
            t.store.validate()
            t.close()
        t = table_of(Powered(disk))
        t.store.validate()
        t.store.verify()
        assert contents(t.store) in (states[done[-1]], states[done[-2]]) and t.step in (done[-1], done[-2])
        trains_and_commits(t, 12, done)
        assert contents(t.store) == states[12]
        t.close()
    assert nth > 40


def test_ssd_full_file_system_leaves_the_store_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "SPARE_NBYTES", 0)  # else the end is seen long before
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        t = table_of(Tiny(tmp_path, 64, budget=2**23))
        t.lookup(np.arange(500), train=True)
        t.commit()
        want = contents(t.store)
        with pytest.raises(errors.StorageError, match=r"segment-.*free some space"):
            t.lookup(np.arange(30_000), train=True)
        t.store.validate()
        assert contents(t.store) == want
        t.lookup(np.arange(500))
        t.close()
        t = table_of(Tiny(tmp_path, 64, budget=2**23))
        assert contents(t.store) == want
        t.update(np.arange(100), np.ones((100, 4)))
        t.commit()
        t.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
