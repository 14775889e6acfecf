"""Many writers on one path: one history, nothing acknowledged lost; and ranks that write one commit together."""

import itertools
import multiprocessing
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from services import s3

from hbkit import errors
from hbkit.embedding import SGD, BloomAdmission, CountAdmission, Table
from hbkit.snapshot import load, log, save, verify
from hbkit.store.line import Part

WRITER = """
import random, sys, time
import numpy as np
from hbkit import errors
from hbkit.embedding import SGD, Table
from hbkit.snapshot import load, save
path, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
t = Table("t", 2, optimizer=SGD(momentum=0.9))
base = None
print("ready", flush=True)
sys.stdin.readline()
n = n_made = 0
while n_made < int(sys.argv[3]):
    n += 1
    t.lookup(np.arange(rng.randrange(20, 60)), train=True)
    t.update(np.arange(60), np.full((60, 2), n))
    step = seed * 100_000 + n
    try:
        base = save(path, [t], step, base=base if rng.random() < 0.7 else None, state={"dense": b"x" * seed})
        print("made", base, step, flush=True)
        n_made += 1
    except errors.Locked:
        print("lost", flush=True)
    time.sleep(rng.uniform(0, 0.05))
"""


def place(request, kind, tmp_path):
    return tmp_path / "model" if kind == "directory" else s3(request.getfixturevalue("proxy"), f"writers/{kind}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_sixteen_writers_some_killed_leave_one_history(request, tmp_path, kind):
    path = place(request, kind, tmp_path)
    n = 4  # commits that each makes
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(i + 1), str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(16)
    ]
    assert all(w.stdout.readline() == "ready\n" for w in writers)
    for w in writers:
        w.stdin.write("\n")
        w.stdin.flush()
    rng = random.Random(0)
    for w in writers[:6]:
        time.sleep(rng.uniform(0.05, 0.5))
        w.kill()
    said = [w.communicate(timeout=300)[0].splitlines() for w in writers]
    assert all(w.returncode == 0 for w in writers[6:])
    made = [line.split()[1:] for lines in said for line in lines if line.startswith("made")]
    assert len({commit for commit, _ in made}) == len(made)  # no two were told that they had made the same
    history = {c.id: c.step for c in verify(path)}
    assert list(history) == [f"c{i + 1:08d}" for i in range(len(history))]
    assert all(history[commit] == int(step) for commit, step in made)
    # what was not acknowledged is the work of writers that were killed
    assert set(history) - {commit for commit, _ in made} <= {c for c, step in history.items() if step < 700_000}
    assert any("lost" in lines for lines in said) and len(made) >= 10 * n
    t = Table("t", 2, optimizer=SGD(momentum=0.9))
    load(path, [t])
    assert save(path, [t], 0, base="latest") == f"c{len(history) + 1:08d}"  # nobody holds a lock


class Together:
    """Threads as ranks."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.given = [b""] * size

    def member(self, rank):
        return Member(self, rank)


class Member:
    def __init__(self, group, rank):
        self.group, self.rank, self.size = group, rank, group.size

    def all_gather(self, data):
        self.group.given[self.rank] = data
        self.group.barrier.wait(30)
        all_given = list(self.group.given)
        self.group.barrier.wait(30)
        return all_given


def by_ranks(size, act):
    """What ``act(member)`` returns, or raised, by each of `size` threads."""
    group, out = Together(size), [None] * size

    def run(rank):
        try:
            out[rank] = act(group.member(rank))
        except Exception as e:
            out[rank] = e

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    return out


def table(admission=None, dim=3):
    return Table("t", dim, optimizer=SGD(momentum=0.9), admission=admission)


def train(t, keys, seed=0):
    keys = np.asarray(keys, np.int64)
    t.lookup(keys, train=True)
    rng = np.random.default_rng(seed)
    t.update(
        keys, np.stack([rng.standard_normal(t.dim) * (1 + k % 7) for k in keys]) if len(keys) else np.zeros((0, t.dim))
    )
    return t


def lines(t):
    return [tuple(column.tobytes() for column in chunk) for chunk in t.store.scan()]


def rows(tables):
    """All rows of tables that share no key, by key."""
    found = {}
    for t in tables:
        for chunk in t.store.scan():
            for line in zip(*(column.tolist() for column in chunk), strict=True):
                assert line[0] not in found
                found[line[0]] = line[1:]
    return found


def sharded(n, path, admission=None):
    """The tables of n ranks, loaded from a snapshot."""
    tables = [table(admission and admission()) for _ in range(n)]
    for rank, t in enumerate(tables):
        load(path, [t], shard=(rank, n))
        own = Part.share(rank, n, bits=10)
        assert all(own.has(chunk.key).all() for chunk in t.store.scan())
    return tables


def counts(filters):
    states = [f.state() for f in filters]
    if "key" in states[0]:
        return sorted((k, *rest) for s in states for k, *rest in zip(*(s[n].tolist() for n in sorted(s)), strict=True))
    return {name: np.maximum.reduce([s[name] for s in states]).tolist() for name in states[0]}


ADMISSIONS = [None, lambda: CountAdmission(3), lambda: BloomAdmission(3, 1000)]


@pytest.mark.parametrize("admission", ADMISSIONS, ids=["none", "count", "bloom"])
def test_any_number_of_ranks_saves_and_any_other_loads(tmp_path, admission):
    whole = table(admission and admission())
    for seed in range(3):
        train(whole, range(0, 300, 1 + seed), seed)
    save(tmp_path / "1", [whole], 1)
    want, path = rows([whole]), tmp_path / "1"
    assert want
    for size, other in itertools.product((1, 2, 3, 5), (1, 2, 3, 5)):
        tables = sharded(size, path, admission)
        path = tmp_path / f"{size}-{other}"
        ids = by_ranks(size, lambda m, p=path, ts=tables: save(p, [ts[m.rank]], 7, state={"cursor": 3}, group=m))
        assert ids == ["c00000001"] * size
        verify(path)
        found = sharded(other, path, admission)
        assert rows(found) == want
        if admission:
            assert counts([t.admission for t in found]) == counts([whole.admission])
        again = table(admission and admission())
        loaded = load(path, [again])
        assert (loaded.step, loaded.state, again.step) == (7, {"cursor": 3}, whole.step)
        assert lines(again) == lines(whole)


def test_ranks_save_deltas(tmp_path):
    whole = train(table(), range(200))
    save(tmp_path, [whole], 1)
    tables = sharded(3, tmp_path)
    parts = [Part.share(r, 3, bits=10) for r in range(3)]

    def go(changed, erased, step, base="latest"):
        for t, part in zip(tables, parts, strict=True):
            t.store.erase(erased[part.has(erased)])
            train(t, changed[part.has(changed)], step)
        ids = by_ranks(3, lambda m: save(tmp_path, [tables[m.rank]], step, base=base, group=m))
        assert len(set(ids)) == 1
        return ids[0]

    go(np.arange(50, 60), np.arange(10), 2)
    assert log(tmp_path)[-1].parent == "c00000001" and log(tmp_path)[-1].nbytes < log(tmp_path)[0].nbytes
    go(np.arange(5, 300, 50), np.array([77]), 3)
    go(np.zeros(0, np.int64), np.zeros(0, np.int64), 4)
    assert [c.parent for c in verify(tmp_path)] == [None, "c00000001", "c00000002", "c00000003"]
    assert rows(sharded(2, tmp_path)) == rows(tables)
    # One table that does not know what changed: all write in full.
    tables[1] = sharded(3, tmp_path)[1]
    tables[1].store.changes.forget()
    go(np.arange(3), np.zeros(0, np.int64), 5)
    assert rows(sharded(1, tmp_path)) == rows(tables)
    last = table()
    load(tmp_path, [last], log(tmp_path)[-1].id)
    assert rows([last]) == rows(tables)


def test_part_of_a_commit_is_no_base_for_another(tmp_path):
    save(tmp_path, [train(table(), range(50))], 1)
    [first, _] = sharded(2, tmp_path)
    save(tmp_path, [first], 2, base="latest")  # by itself: what the other has is gone, so it is written in full
    u = table()
    load(tmp_path, [u])
    verify(tmp_path)
    assert lines(u) == lines(first)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_rank_that_fails_makes_all_raise_and_leaves_no_commit(tmp_path, bad):
    save(tmp_path, [train(table(), range(100))], 1)
    tables = sharded(3, tmp_path)

    def failing(kind):
        def act(m):
            t, state = tables[m.rank], {}
            if m.rank == bad:
                if kind == "argument":
                    state = {"x": float("nan")}
                elif kind == "keys":
                    t = train(table(), range(100))
                    t.step = tables[0].step
                elif kind == "dim":
                    t = table(dim=4)
            return save(tmp_path, [t], 2, state=state, group=m)

        return act

    for kind, word in (("argument", "survive JSON"), ("keys", "holds key"), ("dim", "different tables")):
        out = by_ranks(3, failing(kind))
        assert all(isinstance(e, errors.InvalidArgument) and word in str(e) for e in out), out
        assert [c.step for c in verify(tmp_path)] == [1]
        assert {p.name for p in tmp_path.iterdir()} == {"LOCK", "c00000001", "c00000001.json"}
    assert by_ranks(3, failing("")) == ["c00000002"] * 3


def test_rank_whose_disk_fails_makes_all_raise(tmp_path, monkeypatch):
    from hbkit.snapshot import writer

    save(tmp_path, [train(table(), range(100))], 1)
    tables = sharded(3, tmp_path)
    write = writer._write_table

    def fail(draft, name, entry, point, saving, ranks):
        if ranks.rank == 2:
            raise OSError(28, "No space left on device")
        return write(draft, name, entry, point, saving, ranks)

    monkeypatch.setattr(writer, "_write_table", fail)
    out = by_ranks(3, lambda m: save(tmp_path, [tables[m.rank]], 2, group=m))
    assert all("No space left" in str(e) for e in out)
    assert isinstance(out[2], errors.StorageError) and isinstance(out[0], errors.TransportError)
    assert "rank 2" in str(out[0])
    assert [c.step for c in verify(tmp_path)] == [1]


def test_locked_place_is_locked_for_all_ranks(tmp_path):
    from hbkit.snapshot.places import place_of

    save(tmp_path, [train(table(), range(10))], 1)
    tables = sharded(2, tmp_path)
    with place_of(tmp_path).draft():
        out = by_ranks(2, lambda m: save(tmp_path, [tables[m.rank]], 2, group=m))
    assert all(isinstance(e, errors.Locked) for e in out)


def test_ranks_save_to_a_bucket_in_the_background(proxy, tmp_path):
    path = s3(proxy, "ranks/background")
    whole = train(table(), range(100))
    save(path, [whole], 1)
    tables = sharded(2, path)

    def act(m):
        saving = save(
            path, [tables[m.rank]], 2, state={"dense": b"a", f"cursor-{m.rank}": m.rank}, background=True, group=m
        )
        return saving.wait()

    assert by_ranks(2, act) == ["c00000002"] * 2
    verify(path)
    u = table()
    found = load(path, [u])
    assert lines(u) == lines(whole) and found.state == {"dense": b"a", "cursor-0": 0, "cursor-1": 1}


def member_of_pipes(rank, size, pipes, path, out):
    """A rank in a process of its own; rank 0 passes on what the others send."""

    class Pipes:
        def __init__(self):
            self.rank, self.size = rank, size

        def all_gather(self, data):
            if rank:
                pipes.send_bytes(data)
                return pipes.recv()
            given = [data] + [p.recv_bytes() for p in pipes]
            for p in pipes:
                p.send(given)
            return given

    t = table(CountAdmission(1))
    load(path, [t], shard=(rank, size))
    out.put((rank, save(path, [t], 2, group=Pipes())))


def test_processes_save_together(tmp_path):
    whole = train(table(CountAdmission(1)), range(100))
    save(tmp_path, [whole], 1)
    context = multiprocessing.get_context("fork")  # a new interpreter would not find this module
    ends = [context.Pipe() for _ in range(2)]
    out = context.Queue()
    processes = [
        context.Process(
            target=member_of_pipes, args=(r, 3, [a for a, _ in ends] if r == 0 else ends[r - 1][1], tmp_path, out)
        )
        for r in range(3)
    ]
    for p in processes:
        p.start()
    said = sorted(out.get(timeout=60) for _ in processes)
    for p in processes:
        p.join(60)
    assert said == [(r, "c00000002") for r in range(3)]
    verify(tmp_path)
    u = table(CountAdmission(1))
    load(tmp_path, [u])
    assert lines(u) == lines(whole)
