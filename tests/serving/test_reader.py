"""Lookups in a snapshot are the table's own, before and after a hot swap, from any thread."""

import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.embedding import SGD, Adagrad, Constant, Table
from hbkit.serving import Reader
from hbkit.snapshot import save
from hbkit.store.base import Chunk


def train(t, keys, seed=0):
    keys = np.array(list(keys), t.key_dtype)
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


KEYS = {
    "int64": st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5),
    "uint64": st.integers(0, 2**64 - 1) | st.integers(0, 5),
    "int32": st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 5),
}


@settings(max_examples=15)
@given(data=st.data(), key_dtype=st.sampled_from(list(KEYS)), dim=st.integers(1, 9))
def test_lookup_is_the_tables_own(tmp_path_factory, data, key_dtype, dim):
    path = tmp_path_factory.mktemp("served")
    t = Table("t", dim, key_dtype=key_dtype)
    batches = data.draw(st.lists(st.lists(KEYS[key_dtype], min_size=1, max_size=20), min_size=1, max_size=4))
    asked = data.draw(st.lists(KEYS[key_dtype], max_size=20)) + [key for batch in batches for key in batch]
    for n, batch in enumerate(batches):
        train(t, batch, seed=n)
        t.store.erase(t.keys(np.array(batch[: n % 3], key_dtype)))
        save(path, [t], n, base="latest" if n else None)
    keys = np.array(asked, key_dtype)
    with Reader(path) as reader:
        rows = reader.lookup("t", keys)
        assert rows.dtype == np.float32 and rows.shape == (len(keys), dim)
        assert rows.tobytes() == t.lookup(keys).tobytes()
        assert (reader.tables, reader.step, reader.commit) == (("t",), len(batches) - 1, f"c{len(batches):08d}")
    shutil.rmtree(path)


def test_lookup_returns_the_callers_own(tmp_path):
    save(tmp_path, [train(Table("t", 2), [1])], 0)
    reader = Reader(tmp_path)
    first = reader.lookup("t", [1, 2])
    want = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(reader.lookup("t", [1, 2]), want)
    assert not want[1].any() and want[0].any()


BAD_KEYS = [[1.5], ["a"], [[1, 2]], 3, [True], np.zeros(2, np.float32), None]


@pytest.mark.parametrize("keys", BAD_KEYS, ids=repr)
def test_bad_keys_raise_as_the_table_does(tmp_path, keys):
    t = train(Table("t", 2), [1])
    save(tmp_path, [t], 0)
    said = []
    for where in (lambda: t.lookup(keys), lambda: Reader(tmp_path).lookup("t", keys)):
        with pytest.raises(errors.InvalidArgument) as caught:
            where()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert Reader(tmp_path).lookup("t", []).shape == (0, 2)


@pytest.mark.parametrize("key", [2**31, -(2**31) - 1])
def test_key_that_does_not_fit_raises(tmp_path, key):
    save(tmp_path, [train(Table("t", 2, key_dtype="int32"), [1])], 0)
    with pytest.raises(errors.InvalidArgument, match="int32"):
        Reader(tmp_path).lookup("t", [key])


def test_unknown_table_names_those_there_are(tmp_path):
    save(tmp_path, [Table("user", 2), Table("item", 2)], 0)
    with pytest.raises(errors.UnknownColumn, match=r"no table 'usr'.*tables are item, user"):
        Reader(tmp_path).lookup("usr", [1])


def test_closed_reader_raises(tmp_path):
    save(tmp_path, [Table("t", 2)], 0)
    with Reader(tmp_path) as reader:
        pass
    reader.close()
    for use in (lambda: reader.lookup("t", [1]), lambda: reader.tables, lambda: reader.step, reader.refresh):
        with pytest.raises(errors.Closed):
            use()


def test_no_snapshot_raises(tmp_path):
    with pytest.raises(errors.NotFound, match="there is no snapshot"):
        Reader(tmp_path / "no")


def test_refresh_takes_the_newest_commit_and_its_tables(tmp_path):
    t = train(Table("t", 2), [1])
    save(tmp_path, [t], 1)
    reader = Reader(tmp_path)
    assert not reader.refresh()
    train(t, [1, 2])
    other = train(Table("other", 3, optimizer=SGD()), [5])
    save(tmp_path, [t, other], 2, base="latest")
    assert reader.tables == ("t",) and not reader.lookup("t", [2]).any()
    assert reader.refresh() and not reader.refresh()
    assert (reader.tables, reader.step) == (("other", "t"), 2)
    np.testing.assert_array_equal(reader.lookup("t", [1, 2]), t.lookup([1, 2]))
    np.testing.assert_array_equal(reader.lookup("other", [5]), other.lookup([5]))


def test_refresh_that_fails_keeps_the_commit(tmp_path):
    t = train(Table("t", 2), [1])
    save(tmp_path, [t], 1)
    reader, want = Reader(tmp_path), t.lookup([1])
    commit = save(tmp_path, [train(t, [1])], 2)
    path = tmp_path / commit / "tables" / "t" / "rows-00000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(errors.Corrupt, match="checksum"):
        reader.refresh()
    np.testing.assert_array_equal(reader.lookup("t", [1]), want)
    assert reader.step == 1
    with pytest.raises(errors.Corrupt, match="checksum"):
        Reader(tmp_path)
    path.write_bytes(data)
    assert reader.refresh() and reader.step == 2


def test_lookups_during_refresh_read_one_commit_each(tmp_path):
    """Every row of commit n holds n: a lookup that mixed commits would show two numbers."""
    keys = np.arange(20_000)

    def commit(n):
        t = Table("t", 4, optimizer=Adagrad(), initializer=Constant(0))
        full = np.full((len(keys), 4), n, np.float32)
        t.store.put(Chunk(keys, keys, keys, full, full))
        save(tmp_path, [t], n)

    commit(1)
    reader, seen, failed, done = Reader(tmp_path), set(), [], threading.Event()

    def look():
        last = 0.0
        try:
            while not done.is_set():
                rows = reader.lookup("t", keys)
                assert (rows == rows[0, 0]).all() and rows[0, 0] >= last
                last = rows[0, 0]
                seen.add(float(last))
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(2, 8):
        commit(n)
        assert reader.refresh()
    np.testing.assert_array_equal(reader.lookup("t", [3]), [[7] * 4])
    done.set()
    for thread in threads:
        thread.join()
    assert not failed and len(seen) > 1
