"""A follower's tables are those of the newest commit, read as deltas, and stay whole when a commit cannot be read."""

import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.embedding import SGD, Adagrad, Adam, Constant, CountAdmission, Table
from hbkit.snapshot import follow, load, prune, save, squash, verify
from hbkit.snapshot import history as history_module
from hbkit.store import cached_ssd
from hbkit.store.line import Chunk


def train(t, keys, seed=0):
    keys = np.array(list(keys))
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


def rows(t):
    return [column.tobytes() for column in map(np.concatenate, zip(*t.store.scan(), strict=True))] if len(t) else []


@pytest.fixture
def read_files(monkeypatch):
    """Paths of the files whose rows were read."""
    paths, read = [], history_module.rows.read_rows
    monkeypatch.setattr(
        history_module.rows, "read_rows", lambda place, entry, t: paths.append(entry.path) or read(place, entry, t)
    )
    return paths


EVENTS = st.lists(
    st.tuples(st.sampled_from(["train", "erase", "save", "full", "poll", "branch"]), st.sets(st.integers(0, 12))),
    min_size=1,
    max_size=25,
)


@settings(max_examples=15, deadline=None)
@given(events=EVENTS, on_ssd=st.booleans())
def test_follower_is_at_the_newest_commit_whatever_came_before(tmp_path_factory, events, on_ssd):
    path = tmp_path_factory.mktemp("followed")
    t, u = Table("t", 3, admission=CountAdmission(2)), Table("u", 2, optimizer=SGD())
    store = cached_ssd(path / "tier", host_budget="1MiB") if on_ssd else None
    mine = Table("t", 3, admission=CountAdmission(2), store=store), Table("u", 2, optimizer=SGD())
    follower, first, saved = follow(path / "s", mine), None, None
    for n, (event, keys) in enumerate(events):
        if event == "train" and keys:
            train(t, keys, n)
            train(u, list(keys)[:2], n)
        elif event == "erase":
            t.store.erase(np.array(sorted(keys), np.int64))
        elif event == "branch" and first:  # train anew from an older commit: its deltas do not build on what was last
            load(path / "s", [t, u], first)
        elif event == "poll":
            loaded = follower.poll()
            assert (loaded and loaded.commit) == (saved if saved != getattr(follower, "seen", None) else None)
            follower.seen = saved
        elif event in ("save", "full"):
            saved = save(path / "s", [t, u], n, base="latest" if event == "save" and saved else None)
            first = first or saved
            want = [(rows(x), x.step) for x in (t, u)]
    if saved:
        follower.poll()
        assert [(rows(x), x.step) for x in mine] == want and follower.commit == saved
        save(path / "s", mine, 99, base="latest")  # descends from what it follows
        assert verify(path / "s")[-1].parent == saved
        assert follower.poll().step == 99 and [(rows(x), x.step) for x in mine] == want
    mine[0].close()
    shutil.rmtree(path)


def test_poll_reads_the_new_deltas_alone(tmp_path, read_files):
    t, mine = train(Table("t", 4), range(1000)), Table("t", 4)
    follower = follow(tmp_path, [mine])
    assert follower.poll() is None and follower.commit is None  # nothing is there yet
    save(tmp_path, [t], 1)
    assert follower.poll().step == 1
    read_files.clear()
    for n in range(3):
        save(tmp_path, [train(t, range(n, n + 5), n)], 2 + n, base="latest", state={"dense": b"%d" % n, "n": n})
        loaded = follower.poll()
        assert loaded.state == {"dense": b"%d" % n, "n": n} and loaded.commit == follower.commit
        assert follower.poll() is None
    for n in range(2):
        save(tmp_path, [train(t, range(n, n + 5), n)], 2 + n, base="latest")
    assert follower.poll().commit == "c00000006"
    assert [p[:9] for p in read_files] == [f"c0000000{n}" for n in (2, 3, 4, 5, 6)]
    assert rows(mine) == rows(t)
    squashed = squash(tmp_path)  # has the same rows
    read_files.clear()
    assert follower.poll().commit == squashed and not read_files and rows(mine) == rows(t)
    last = save(tmp_path, [train(t, [3, 5000])], 9, base="latest")
    prune(tmp_path, keep=1)
    assert follower.poll().commit == last and [p[:9] for p in read_files] == [last] and rows(mine) == rows(t)


def test_a_renamed_table_is_followed(tmp_path):
    t, mine = train(Table("t", 4), range(9)), Table("mine", 4)
    follower = follow(tmp_path, {"t": mine})
    for n in range(3):
        save(tmp_path, [train(t, [n, n + 20])], n, base="latest" if n else None)
        assert follower.poll().step == n and rows(mine) == rows(t)
    assert save(tmp_path / "other", [mine], 1) == "c00000001"


def damage(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_a_commit_that_cannot_be_read_leaves_all_tables_at_the_last_good_one(tmp_path):
    t, u = train(Table("t", 4), range(9)), train(Table("u", 2), range(9))
    mine = Table("t", 4), Table("u", 2)
    save(tmp_path, [t, u], 1)
    follower = follow(tmp_path, mine)
    follower.poll()
    before = [rows(x) for x in mine]
    for base in ("latest", None):
        commit = save(tmp_path, [train(t, range(3, 12)), train(u, [1])], 2, base=base, state={"dense": b"x"})
        for path in (f"{commit}/tables/u/rows-00000.parquet", f"{commit}/state/dense", f"{commit}.json"):
            data = damage(tmp_path / path)
            for _ in range(2):
                with pytest.raises(errors.Corrupt, match="checksum"):
                    follower.poll()
            assert [rows(x) for x in mine] == before and follower.commit != commit
            (tmp_path / path).write_bytes(data)
        assert follower.poll().commit == commit
        before = [rows(x) for x in mine]
        assert before == [rows(t), rows(u)]


def test_a_store_that_fails_midway_is_loaded_anew(tmp_path, monkeypatch):
    t, u = train(Table("t", 4), range(9)), train(Table("u", 2), range(9))
    mine = Table("t", 4), Table("u", 2)
    save(tmp_path, [t, u], 1)
    follower = follow(tmp_path, mine)
    follower.poll()
    save(tmp_path, [train(t, range(3)), train(u, range(3))], 2, base="latest")

    def full(chunk):
        raise errors.StorageError("full")

    monkeypatch.setattr(mine[1].store, "put", full)
    with pytest.raises(errors.StorageError):
        follower.poll()
    monkeypatch.undo()
    save(tmp_path, [train(t, [5]), u], 3, base="latest")
    assert follower.poll().step == 3 and [rows(x) for x in mine] == [rows(t), rows(u)]


@pytest.mark.parametrize("tier", ["host", "ssd"])
def test_a_lookup_in_host_memory_sees_all_rows_of_a_delta_or_none_and_in_a_tier_no_torn_row(tmp_path, tier):
    keys, other = np.arange(150_000), np.arange(70_000)
    store = cached_ssd(tmp_path / "tier", host_budget="24MiB") if tier == "ssd" else None
    t, mine = Table("t", 4, initializer=Constant(0)), Table("t", 4, store=store)

    def commit(n, base):
        full = np.full((len(keys), 4), n, np.float32)
        t.store.put(Chunk(keys, keys, np.full(len(keys), n), full, full))
        t.step = n
        save(tmp_path / "s", [t], n, base=base)

    commit(1, None)
    follower = follow(tmp_path / "s", [mine])
    follower.poll()
    seen, failed, stop = set(), [], threading.Event()

    def look():
        try:
            while not stop.is_set():
                found = mine.lookup(other)
                assert (found == (found[0, 0] if tier == "host" else found[:, :1])).all()
                seen.add(float(found[0, 0]))
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=look) for _ in range(2)]
    threads.append(threading.Thread(target=follower.run, args=(0.01, stop)))
    for thread in threads:
        thread.start()
    for n in range(2, 6):
        commit(n, "latest")
    while follower.commit != "c00000005" and threads[2].is_alive():
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed and len(seen) > 1 and (mine.lookup(keys) == 5).all()
    mine.close()


def test_no_row_is_missing_while_all_are_replaced(tmp_path):
    keys = np.arange(200_000)
    mine, failed, stop = Table("t", 4), [], threading.Event()
    follower = follow(tmp_path, [mine])

    def commit(n):
        t = Table("t", 4)
        full = np.full((len(keys), 4), n, np.float32)
        t.store.put(Chunk(keys + (n > 1), keys, keys, full, full))
        save(tmp_path, [t], n)

    def look():
        try:
            while not stop.is_set():
                assert (mine.lookup(keys[1:]) >= 1).all()
        except BaseException as e:
            failed.append(e)

    commit(1)
    follower.poll()
    thread = threading.Thread(target=look)
    thread.start()
    commit(2)
    follower.poll()
    stop.set()
    thread.join()
    assert not failed and not mine.lookup([0]).any() and (mine.lookup(keys + 1) == 2).all()


def test_follower_of_another_optimizer_begins_its_state_anew_and_says_so(tmp_path):
    t, mine = train(Table("t", 4), range(9)), Table("t", 4, optimizer=Adam())
    follower = follow(tmp_path, [mine])
    for n in range(2):
        save(tmp_path, [train(t, [n, 50 + n])], n, base="latest" if n else None)
        assert "state of Adagrad dropped" in follower.poll().notes[0]
        assert np.array_equal(mine.lookup(range(99)), t.lookup(range(99)))
    assert not np.concatenate([c.state for c in mine.store.scan()]).any()


def test_follower_refuses_what_it_cannot_follow(tmp_path):
    save(tmp_path, [Table("t", 4, optimizer=Adagrad())], 0)
    with pytest.raises(errors.SchemaMismatch, match="dim"):
        follow(tmp_path, [Table("t", 5)]).poll()
    with pytest.raises(errors.UnknownColumn):
        follow(tmp_path, [Table("v", 4)]).poll()
    with pytest.raises(errors.InvalidArgument):
        follow(tmp_path, [Table("t", 4), Table("t", 4)])
