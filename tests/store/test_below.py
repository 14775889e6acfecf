"""Lines that a store gives a tier above and takes back from it: `read` and `write`, of every store."""

import threading
from contextlib import closing

import numpy as np
import pytest
from homes import DictPlace, contents

from hbkit import errors
from hbkit._ext import segment
from hbkit._ext.pool import fail_allocation
from hbkit.embedding import Adam, Table
from hbkit.store import cached_ssd, device_cached, host_memory
from hbkit.store.line import Chunk

DIM = 4
WIDTH = 3 * DIM


def place(name, tmp_path):
    return {
        "host": host_memory,
        "tiny": lambda: DictPlace(5),
        "half": lambda: DictPlace(60, scratch_lines=16),
        "ssd": lambda: cached_ssd(tmp_path, host_budget="1MiB"),
        "device": lambda: device_cached(host_memory(), "8KiB", "cpu"),
    }[name]()


@pytest.fixture(params=["host", "tiny", "half", "ssd", "device"])
def table(request, tmp_path):
    return Table("t", DIM, optimizer=Adam(), store=place(request.param, tmp_path))


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def any_table(request, table, tmp_path):
    table.store.close()
    name = request.node.callspec.params["table"]
    return Table("u", DIM, optimizer=Adam(), dtype=request.param, store=place(name, tmp_path))


def data(rng, n):
    """Lines, frequencies and last steps that every dtype holds."""
    return rng.integers(-8, 8, (n, WIDTH)).astype(np.float32), rng.integers(0, 99, n), rng.integers(0, 9, n)


def read(store, keys, at=None):
    lease = store.reserve(keys, np.zeros(len(keys), np.int64))
    store.fetch(lease)
    try:
        at = np.arange(len(keys)) if at is None else at
        out = np.full((len(at), WIDTH), np.nan, np.float32), np.full(len(at), -1), np.full(len(at), -1)
        store.read(lease, at, *out)
        return out
    finally:
        store.release(lease)


def same(found, want):
    return all(np.array_equal(f, w) for f, w in zip(found, want, strict=True))


def test_below_what_is_written_is_read(any_table):
    store, rng = any_table.store, np.random.default_rng(0)
    any_table.lookup(np.arange(50), train=True)
    want, keys = {}, np.arange(200)
    for n in (0, 1, 30, 120):
        some, lines = rng.permutation(keys)[:n], data(rng, n)  # some that are there, some new
        store.write(some, *lines)
        want.update({int(k): [x[i] for x in lines] for i, k in enumerate(some)})
        held = np.array([*want], np.int64)
        at = rng.permutation(len(held))[: len(held) // 2 + 1]
        for found, column in zip(read(store, held, at), range(3), strict=True):
            assert all(np.array_equal(x, want[int(k)][column]) for x, k in zip(found, held[at], strict=True))
        store.validate()
    assert len(store) == len(set(range(50)) | set(want))


def test_below_reads_what_the_other_ways_read(any_table):
    store, keys = any_table.store, np.arange(150)
    any_table.lookup(keys, train=True)
    any_table.update(keys, np.ones((150, DIM), np.float32))
    lines, freq, last_step = read(store, keys)
    (chunk,) = store.scan()
    assert same((lines[:, :DIM], lines[:, DIM:]), (chunk.row, chunk.state))
    assert same((freq, last_step), (chunk.freq, chunk.last_step))
    assert same((freq, last_step), store.metadata(keys))


def test_below_writes_what_put_writes(any_table, tmp_path):
    store, other = any_table.store, Table("u", DIM, optimizer=Adam(), dtype=any_table.dtype, store=host_memory())
    rng = np.random.default_rng(0)
    for t in (any_table, other):
        t.lookup(np.arange(90), train=True)
    keys = rng.permutation(200)[:120]
    lines, freq, last_step = rng.standard_normal((120, WIDTH)).astype(np.float32), *data(rng, 120)[1:]
    store.write(keys, lines, freq, last_step)
    other.store.put(Chunk(keys, freq, last_step, lines[:, :DIM], lines[:, DIM:]))
    assert contents(store) == contents(other.store)


def test_below_a_lease_from_before_a_write_sees_it(table):
    store, keys = table.store, np.arange(20)
    early = store.reserve(keys, np.zeros(20, np.int64))
    store.fetch(early)
    want = data(np.random.default_rng(0), 20)
    store.write(keys, *want)
    out = tuple(np.empty_like(x) for x in want)
    store.read(early, keys, *out)
    assert same(out, want)
    store.release(early)


def test_below_refuses_what_does_not_fit(table):
    store, keys = table.store, np.arange(6)
    table.lookup(keys[:5], train=True)
    lines, freq, last_step = data(np.random.default_rng(0), 6)
    want = contents(store)
    for wrong in (
        (keys, lines[:, :-1], freq, last_step),
        (keys, lines[:5], freq, last_step),
        (keys, lines, freq[:5], last_step),
        (keys, lines, freq, last_step[:5]),
    ):
        with pytest.raises(errors.InvalidArgument, match="table t"):
            store.write(*wrong)
        lease = store.reserve(keys, np.zeros(6, np.int64))
        with pytest.raises(errors.InvalidArgument, match="table t"):
            store.read(lease, *wrong)
        store.release(lease)
    with pytest.raises(errors.InvalidArgument, match="no row"):
        read(store, keys)  # of the last
    assert contents(store) == want
    store.validate()


def test_below_a_point_shows_what_was_before(table):
    store, keys = table.store, np.arange(100)
    table.lookup(keys, train=True)
    want = contents(store)
    with closing(store.point()) as point:
        store.write(keys[20:] + 40, *data(np.random.default_rng(0), 80))
        chunks = list(point.scan())
    assert [b"".join(c[i].tobytes() for c in chunks) for i in range(5)] == want


def test_below_changes_are_told_by_stamps_or_noted(table):
    store, keys = table.store, np.arange(60)
    table.lookup(keys, train=True)
    table.step = 5
    table.update(keys, np.ones((60, DIM), np.float32))
    store.commit()  # a tier above has given back what it has, when a mark is made
    store.changes.name(store.changes.mark(store.latest_step()), "base")
    newest = store.latest_step()
    lines, freq, _ = data(np.random.default_rng(0), 30)
    store.write(keys[:10], lines[:10], freq[:10], np.full(10, newest + 1))
    assert len(store.changes.since("base").keys) == 0  # their stamps tell
    store.write(keys[10:30], lines[10:], freq[10:], np.full(20, newest))
    assert store.changes.since("base").keys.tolist() == list(range(10, 30))
    with closing(store.point("base")) as point:
        assert np.concatenate([chunk.key for chunk in point.scan()]).tolist() == list(range(30))


@pytest.mark.parametrize("name", ["host", "half"])
def test_below_no_memory_leaves_all_as_it_was(name, tmp_path):
    table = Table("t", DIM, optimizer=Adam(), store=place(name, tmp_path))
    store, rng = table.store, np.random.default_rng(0)
    table.lookup(np.arange(40), train=True)
    failed = 0
    for nth in range(1, 60):
        keys = np.concatenate([rng.permutation(40)[:6], 1000 * nth + np.arange(9)])  # one part of the tier's
        lines, want = data(rng, 15), contents(store)
        fail_allocation(nth)
        try:
            store.write(keys, *lines)
        except MemoryError:
            failed += 1
            assert contents(store) == want
        finally:
            fail_allocation(0)
        store.validate()
        store.write(keys, *lines)
        assert same(read(store, keys), lines)
    assert failed


def test_below_a_full_disk_may_be_tried_again(tmp_path):
    table = Table("t", DIM, optimizer=Adam(), store=DictPlace(20))
    store, keys = table.store, np.arange(100)
    table.lookup(keys, train=True)
    want, lines = contents(store), data(np.random.default_rng(0), 100)
    store.home.fail["write"] = errors.StorageError("test", remedy="none")
    with pytest.raises(errors.StorageError):
        store.write(keys, *lines)
    assert contents(store) == want
    del store.home.fail["write"]
    store.write(keys, *lines)
    assert same(read(store, keys), lines)
    table.commit()


def test_below_readers_see_whole_rows_while_some_are_written(shared_by):
    shared_by(3)
    store, done, wrong = Table("t", 16, optimizer=Adam(), store=host_memory()).store, threading.Event(), []
    keys, ones = np.arange(1000), np.ones(1000, np.int64)

    def look():
        lines, freq, last_step = segment.retained((1000, 48)), ones.copy(), ones.copy()
        while not done.is_set():
            lease = store.reserve(keys, ones)
            at = np.flatnonzero(lease.slots >= 0)
            store.read(lease, at, lines[: len(at)], freq[: len(at)], last_step[: len(at)])
            store.gather(lease, out := np.empty((1000, 16), np.float32))
            if not (lines[: len(at)] >= 1).all() or not np.isin(out[at], np.arange(1, 40)).all():
                wrong.append(lines[: len(at)])

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(1, 40):
        some = np.random.default_rng(i).permutation(1000)[: 25 * i]
        store.write(some, np.full((len(some), 48), i, np.float32), np.full(len(some), i), np.full(len(some), i))
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    store.validate()
