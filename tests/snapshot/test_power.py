"""Power lost at any call of a save leaves the commits that there were, and the new one or not."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from powerless import Replay, Tape, seeded

from hbkit import errors
from hbkit.embedding import SGD, CountAdmission, Table
from hbkit.snapshot import directory, load, prune, save, squash, verify
from hbkit.snapshot.places import place_of


def table():
    return Table("t", 3, optimizer=SGD(momentum=0.9), admission=CountAdmission(1))


def train(t, keys, seed=0):
    keys = np.array(list(keys))
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


def lines(t):
    return [tuple(column.tobytes() for column in chunk) for chunk in t.store.scan()]


def first(path):
    t = train(table(), range(200))
    return t, lambda: save(path, [t], 1, state={"dense": b"weights" * 2000, "cursor": 1})


def full(path):
    t, go = first(path)
    go()
    train(t, range(100, 300), seed=1)
    return t, lambda: save(path, [t], 2, state={"dense": b"weightz" * 2000})


def delta(path):
    t, go = first(path)
    go()
    t.store.erase(np.arange(5))
    train(t, range(50, 80), seed=1)
    return t, lambda: save(path, [t], 2, base="latest", state={"dense": b"weightz" * 2000})


def after_a_kill(path):
    """What a writer left that was killed before its manifest was there is removed."""
    t, go = delta(path)
    shutil.copytree(path / "c00000001", path / "c00000002")
    shutil.copytree(path / "c00000001", path / ".hbkit-draft" / "c00000002")
    return t, go


def tape(tmp_path, monkeypatch, begin):
    """What a save does to the disk, the bytes before it, and the table as it was saved before and now."""
    path = tmp_path / "before" / "model" / "today"
    path.parent.parent.mkdir()
    t, go = begin(path)
    old = None
    if path.exists():
        old = table()
        load(path, [old])
    shutil.copytree(tmp_path / "before", tmp_path / "copy")
    tapes = []
    monkeypatch.setattr(directory, "Disk", lambda **kwargs: tapes.append(Tape()) or tapes[-1])
    go()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "before")
    shutil.move(tmp_path / "copy", tmp_path / "before")
    return [call for one in tapes for call in one.calls], old, t


def left(tmp_path, calls, rng):
    """A directory after `calls` and the loss of power."""
    disk = Replay(tmp_path / "before")
    for call in calls:
        disk.do(*call)
    to = tmp_path / "after"
    shutil.rmtree(to, ignore_errors=True)
    disk.lose_power(rng, to)
    return to / "model" / "today"


def holds(path, old, new):
    """Whether the new commit is there; raises unless it or the old one is, and whole."""
    u = table()
    try:
        last = verify(path)[-1]
        assert load(path, [u]).commit == last.id
    except errors.NotFound:
        assert old is None
        return False
    if last.step == new.step:
        assert lines(u) == lines(new)
        return True
    assert lines(u) == lines(old) and u.step == old.step
    return False


@pytest.mark.parametrize("begin", [first, full, delta, after_a_kill])
def test_power_lost_at_any_call_leaves_the_old_or_the_new_commit(tmp_path, monkeypatch, begin):
    calls, old, new = tape(tmp_path, monkeypatch, begin)
    kinds = {kind for kind, *_ in calls}
    assert kinds >= {"make_directory", "open", "write", "sync", "sync_directory", "rename"} and len(calls) > 25
    found = set()
    for n in range(len(calls) + 1):
        for seed in range(2):
            path = left(tmp_path, calls[:n], seeded(begin.__name__, n, seed))
            there = holds(path, old, new)
            found.add(there)
            assert there or n < len(calls)  # the save has returned
            if seed == 0 and n % 5 == 0:  # life goes on
                save(path, [new], 9)
                assert verify(path)[-1].step == 9
                assert {p.name for p in path.iterdir()} == {"LOCK"} | {
                    name for c in place_of(path).commits() for name in (c, f"{c}.json")
                }
    assert found == {False, True}


@pytest.mark.parametrize("omitted", ["sync", "sync_directory"])
def test_each_sync_is_needed(tmp_path, monkeypatch, omitted):
    """Leave any of them out, and there is a loss of power that loses a commit: or the test above would say nothing."""
    calls, old, new = tape(tmp_path, monkeypatch, first)
    for skip in [i for i, (kind, *_) in enumerate(calls) if kind == omitted]:
        fewer = calls[:skip] + calls[skip + 1 :]

        def survives(n, seed, fewer=fewer, skip=skip):
            try:
                return holds(left(tmp_path, fewer[:n], seeded(omitted, skip, n, seed)), old, new) or n < len(fewer)
            except errors.Corrupt:
                return False

        assert not all(survives(n, seed) for seed in range(40) for n in range(len(fewer) - 4, len(fewer) + 1)), calls[
            skip
        ]


def test_power_lost_at_any_call_of_a_prune_leaves_whole_commits(tmp_path, monkeypatch):
    def begin(path):
        t, go = delta(path)
        go()
        squash(path)
        save(path, [train(t, range(9), seed=2)], 3, base="latest")
        return t, lambda: prune(path, keep=2)

    calls, _, new = tape(tmp_path, monkeypatch, begin)
    assert sum(kind == "unlink" for kind, *_ in calls) > 10
    found = set()
    for n in range(len(calls) + 1):
        for seed in range(2):
            path = left(tmp_path, calls[:n], seeded("prune", n, seed))
            commits = [c.id for c in verify(path)]
            u = table()
            assert load(path, [u]).step == 3 and lines(u) == lines(new)
            prune(path, keep=2)
            assert [c.id for c in verify(path)] == ["c00000003", "c00000004"]
            assert {p.name for p in path.iterdir()} == {"LOCK"} | {
                name for c in ("c00000003", "c00000004") for name in (c, f"{c}.json")
            }
            found.add(tuple(commits))
    assert len(found) > 1 and all(commits[-2:] == ("c00000003", "c00000004") for commits in found)


KILLED = """
import hashlib, os, random, signal, sys, time
import numpy as np
from hbkit.embedding import SGD, CountAdmission, Table
from hbkit.snapshot import load, prune, save, verify
path, rng, n_leftovers, n_deltas = sys.argv[1], random.Random(0), 0, 0
took = 0.03  # seconds of a save, as the last one took

def lines(t):
    return hashlib.sha256(b"".join(c.tobytes() for chunk in t.store.scan() for c in chunk)).hexdigest()

def made():
    t = Table("t", 8, optimizer=SGD(momentum=0.9), admission=CountAdmission(1))
    return t, load(path, [t])

def write(said):
    t, found = made()
    n = found.step
    os.write(said, b"r")
    while True:
        n += 1
        t.lookup(np.arange(n % 50, 3000), train=True)
        t.update(np.arange(3000), np.full((3000, 8), n))
        t.store.erase(np.array([n % 3000]))
        background = bool(n % 2)
        saving = save(path, [t], n, base="latest" if n % 5 else None, background=background,
                      state={"lines": lines(t), "dense": bytes(1000)})
        if background:
            saving.wait()
        os.write(said, b"%d " % n)

def check(acknowledged):
    last = verify(path)[-1]
    t, found = made()
    assert found.commit == last.id and found.step == last.step >= acknowledged, (found, acknowledged)
    assert found.state["lines"] == lines(t) and len(t) == last.tables["t"]
    names = set(os.listdir(path)) - {"LOCK"}
    commits = {c.id for c in verify(path)}
    left = bool(names - commits - {f"{c}.json" for c in commits})
    prune(path, keep=2)
    verify(path)
    return left + 2 * (last.parent is not None)

def fork(act):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(act() or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(99)
    return pid

t = Table("t", 8, optimizer=SGD(momentum=0.9), admission=CountAdmission(1))
save(path, [t], 0, state={"lines": lines(t)})
for _ in range(int(sys.argv[2])):
    hear, say = os.pipe()
    child = fork(lambda: write(say))
    os.close(say)
    assert os.read(hear, 1) == b"r"
    said, since = b"", time.monotonic()
    for _ in range(rng.randrange(3)):
        said += os.read(hear, 1 << 16)
        took, since = time.monotonic() - since, time.monotonic()
    time.sleep(rng.uniform(0, 1.2 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(hear, 1 << 16):
        said += part
    os.close(hear)
    status = os.waitstatus_to_exitcode(os.waitpid(fork(lambda: check(int((said.split() or [0])[-1]))), 0)[1])
    assert status < 4, status
    n_leftovers += status & 1
    n_deltas += status >> 1
print(n_leftovers, n_deltas)
"""


@pytest.mark.parametrize("n", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_last_commit_is_whole(tmp_path, n):
    """SIGKILL at `n` random moments of saves, one after the other, full ones, deltas and in the background."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(n)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    n_leftovers, n_deltas = map(int, done.stdout.split())
    assert n_leftovers > n // 10 and n_deltas > n // 10
