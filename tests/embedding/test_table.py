"""Table: creation, reads, updates, admission, eviction, and the keys it takes."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit import snapshot
from hbkit.embedding import (
    SGD,
    Adagrad,
    Collection,
    Column,
    Constant,
    CountAdmission,
    IdleSteps,
    L2Below,
    MaxRows,
    Normal,
    Table,
)
from hbkit.errors import InvalidArgument, Unsupported
from hbkit.ragged import Dictionary
from hbkit.store import cached_ssd, host_memory

KEY = st.one_of(st.integers(-4, 4), st.integers(-(2**63), 2**63 - 1))


def table(**kw):
    return Table("t", 4, **{"optimizer": SGD(lr=1.0), **kw})


@given(st.lists(KEY, max_size=60))
def test_table_reads_create_nothing_and_training_reads_do(keys):
    t, k = table(), np.array(keys, np.int64)
    assert not t.lookup(k).any() and len(t) == 0
    rows = t.lookup(k, train=True)
    assert len(t) == len(set(keys)) and rows.shape == (len(keys), 4)
    assert np.array_equal(t.lookup(k), rows)
    for key in set(keys):
        assert len(np.unique(rows[k == key], axis=0)) == 1


@given(st.lists(KEY, min_size=1, max_size=60), st.integers(0, 2**32))
def test_table_update_sums_duplicates(keys, seed):
    t, k = table(), np.array(keys, np.int64)
    before = t.lookup(k, train=True)
    grads = np.random.default_rng(seed).integers(-9, 9, (len(k), 4)).astype(np.float32)
    t.update(k, grads)
    want = np.array([before[i] - grads[k == key].sum(0) for i, key in enumerate(k)])
    np.testing.assert_allclose(t.lookup(k), want, rtol=1e-6, atol=1e-6)
    assert t.step == 1


@given(st.lists(KEY, min_size=1, max_size=40, unique=True), st.randoms())
def test_table_rows_do_not_depend_on_the_order_of_arrival(keys, shuffle):
    a, b = table(), table()
    for key in keys:
        a.lookup(np.array([key]), train=True)
    shuffled = list(keys)
    shuffle.shuffle(shuffled)
    b.lookup(np.array(shuffled), train=True)
    assert np.array_equal(a.lookup(np.array(keys)), b.lookup(np.array(keys)))


def test_tables_of_equal_seed_differ_by_name():
    k = np.arange(10)
    a, b = (Table(n, 4, initializer=Normal(seed=3)).lookup(k, train=True) for n in "ab")
    assert not np.isclose(a, b).any()


def test_table_update_of_absent_keys_is_ignored_and_counted():
    t = table()
    t.lookup(np.array([1]), train=True)
    t.update(np.array([1, 2, 3, 3]), np.ones((4, 4)))
    assert len(t) == 1 and t.stats()["ignored_updates"] == 2


def test_table_padding_key_reads_zeros_and_takes_no_gradient():
    t, k = table(padding_key=0), np.array([0, 5, 0, 7])
    rows = t.lookup(k, train=True)
    assert len(t) == 2 and not rows[[0, 2]].any() and rows[[1, 3]].all()
    t.update(k, np.ones((4, 4)))
    assert np.allclose(t.lookup(k), rows - np.array([0, 1, 0, 1])[:, None])


def test_table_takes_unsigned_keys_by_their_bits():
    t = table(key_dtype="uint64")
    k = np.array([2**63 + 1, 2**64 - 1, 5], np.uint64)
    rows = t.lookup(k, train=True)
    assert len(t) == 3 and np.array_equal(t.lookup(k[::-1]), rows[::-1])
    assert np.array_equal(t.lookup(k.view(np.int64)), rows)


@pytest.mark.parametrize(
    "keys", [np.zeros(3), np.zeros((2, 2), np.int64), np.array(["a"]), np.array([True]), np.array(5)]
)
def test_table_refuses_keys_that_are_none(keys):
    with pytest.raises(InvalidArgument, match="table t"):
        table().lookup(keys)


def test_table_takes_keys_that_are_not_contiguous_and_empty_ones():
    t, k = table(), np.arange(20)[::2]
    assert np.array_equal(t.lookup(k, train=True), t.lookup(k.copy()))
    assert t.lookup([], train=True).shape == (0, 4)
    t.update([], np.zeros((0, 4)))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (2,), (2, 4, 1)])
def test_table_update_refuses_grads_of_another_shape(shape):
    t = table()
    with pytest.raises(InvalidArgument, match="grads of shape"):
        t.update(np.arange(2), np.zeros(shape))
    assert t.step == 0


@pytest.mark.parametrize(
    ("kw", "error"),
    [
        ({"name": "a/b"}, InvalidArgument),
        ({"name": ""}, InvalidArgument),
        ({"dim": 0}, InvalidArgument),
        ({"dim": 2.5}, InvalidArgument),
        ({"dtype": "float64"}, Unsupported),
        ({"key_dtype": "string"}, InvalidArgument),
        ({"nonfinite": "ignore"}, InvalidArgument),
        ({"evict_every": 5}, InvalidArgument),
        ({"evict_every": 0, "eviction": [IdleSteps(1)]}, InvalidArgument),
        ({"default": [1.0, 2.0]}, InvalidArgument),
        ({"default": "zeros"}, InvalidArgument),
        ({"default": np.nan}, InvalidArgument),
        ({"padding_key": 2**31, "key_dtype": "int32"}, InvalidArgument),
    ],
)
def test_table_refuses_what_it_cannot_be(kw, error):
    with pytest.raises(error):
        Table(**{"name": "t", "dim": 4, **kw})


def test_table_int32_keys_do_not_wrap():
    t = table(key_dtype="int32")
    t.lookup(np.array([2**31 - 1]), train=True)
    for dtype in (np.int64, np.uint32, np.uint64):
        with pytest.raises(InvalidArgument, match="int32"):
            t.lookup(np.array([2**31], dtype))


def test_table_survives_readers_beside_a_writer():
    t, errors, done = table(eviction=[IdleSteps(3)], evict_every=4), [], threading.Event()
    fixed = np.arange(10_000, 10_500)  # never trained on again, but kept by the lookups of the writer
    before = t.lookup(fixed, train=True)

    def read():
        try:
            while not done.is_set():
                assert np.array_equal(t.lookup(fixed), before)
                rows = t.lookup(np.arange(4000))
                assert np.isfinite(rows).all()
        except BaseException as e:  # an assertion in a thread would be lost
            errors.append(e)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for r in readers:
        r.start()
    for step in range(60):
        k = np.arange(step * 50, step * 50 + 500)
        t.lookup(np.concatenate([k, fixed]), train=True)
        t.update(k, np.ones((500, 4)))
    done.set()
    for r in readers:
        r.join()
    assert not errors
    # A window moves on by 50 keys a step; what it left is evicted 4 to 7 steps later.
    assert 500 + 500 + 4 * 50 <= len(t) <= 500 + 500 + 7 * 50
    assert np.array_equal(t.lookup(fixed), before)
    t.store.validate()


def test_table_updates_of_two_threads_are_all_counted():
    t, keys = table(), np.arange(200)
    before = t.lookup(keys, train=True)

    def train():
        for _ in range(50):
            t.lookup(keys, train=True)
            t.update(keys, np.ones((200, 4)))

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(t.lookup(keys), before - 100, rtol=1e-5)
    (chunk,) = t.store.scan()
    assert (chunk.freq == 101).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_table_update_refuses_nonfinite_gradients_and_changes_nothing(bad):
    t, k = table(), np.arange(40)
    before = t.lookup(k, train=True)
    grads = np.ones((40, 4), np.float32)
    grads[17, 2] = bad
    with pytest.raises(InvalidArgument, match=r"gradient of 1 of 40 keys.*table t, key 17"):
        t.update(k, grads)
    assert np.array_equal(t.lookup(k), before) and t.step == 0 and t.stats()["skipped_updates"] == 0


def test_table_skips_nonfinite_gradients_and_counts_them():
    t, k = table(nonfinite="skip", padding_key=3), np.array([0, 1, 2, 3, 1])
    before = t.lookup(k, train=True)
    grads = np.ones((5, 4), np.float32)
    grads[4, 0] = np.nan  # of key 1, which also has a good one
    grads[3] = np.inf  # of the padding key, which takes none
    t.update(k, grads)
    np.testing.assert_allclose(t.lookup(k), before - np.array([1, 0, 1, 0, 0])[:, None], rtol=1e-6)
    assert t.step == 1 and t.stats()["skipped_updates"] == 1 and t.stats()["ignored_updates"] == 0
    grads[4] = 1  # padding alone is no error
    table(padding_key=3).update(k, grads)


def test_table_takes_a_batch_larger_than_itself():
    t = table()
    keys = np.random.default_rng(0).integers(0, 3, 100_000)
    t.update(keys, np.zeros((100_000, 4)))
    assert len(t) == 0
    t.lookup(keys, train=True)
    t.update(keys, np.zeros((100_000, 4)))
    assert len(t) == 3 and t.lookup(keys).shape == (100_000, 4)


@pytest.mark.parametrize(
    "default", [0.25, [1.0, 2.0, 3.0, 4.0], Normal(0, 1, seed=9)], ids=["number", "vector", "initializer"]
)
def test_table_absent_keys_read_the_default(default):
    t, k = table(default=default, padding_key=0), np.array([5, 0, 6, 5])
    row = default("t", k, 4) if isinstance(default, Normal) else np.broadcast_to(np.float32(default), (4, 4))
    want = np.where(k[:, None] == 0, 0, row)
    assert np.array_equal(t.lookup(k), want) and len(t) == 0
    t.update(k, np.ones((4, 4)))
    assert np.array_equal(t.lookup(k), want)
    assert not np.isclose(t.lookup(k, train=True), want)[[0, 2, 3]].all(axis=1).any()


def test_table_padding_key_may_be_above_the_signed_keys():
    t = table(key_dtype="uint64", padding_key=2**64 - 1)
    assert not t.lookup(np.array([2**64 - 1], np.uint64), train=True).any() and len(t) == 0


@given(st.lists(KEY, min_size=1, max_size=9), st.data())
def test_table_by_dictionary_equals_by_value(entries, data):
    codes = np.array(data.draw(st.lists(st.integers(0, len(entries) - 1), max_size=30)), np.uint32)
    column = Dictionary(np.array(entries, np.int64), codes)
    a, b = table(admission=CountAdmission(2), padding_key=0), table(admission=CountAdmission(2), padding_key=0)
    grads = np.random.default_rng(len(codes)).normal(size=(len(codes), 4)).astype(np.float32)
    for _ in range(2):
        assert np.array_equal(a.lookup(column, train=True), b.lookup(column.decode(), train=True))
        a.update(column, grads)
        b.update(column.decode(), grads)
    for x, y in zip(a.store.scan(), b.store.scan(), strict=True):
        for mine, theirs in zip(x, y, strict=True):
            assert np.array_equal(mine, theirs)


def test_table_refuses_dictionaries_that_are_none():
    for dictionary, codes in [(np.arange(3), [3, 0, 0]), (np.arange(3.0), [0, 0, 0]), (np.arange(9), [9])]:
        with pytest.raises(InvalidArgument):
            table().lookup(Dictionary(dictionary, np.array(codes, np.uint32)))


def test_table_counts_its_memory():
    t = table(admission=CountAdmission(2), optimizer=Adagrad())
    t.lookup(np.arange(100_000), train=True)
    s = t.stats()
    assert s["rows"] == 0 and s["metadata_nbytes"] == 0 and s["lines_nbytes"] == 0
    assert s["admission_nbytes"] == t.admission.nbytes > 100_000 * 12
    t.lookup(np.repeat(np.arange(100_000), 2), train=True)
    s = t.stats()
    assert s["rows"] == 100_000 and 8 * 100_000 <= s["metadata_nbytes"] <= 9.1 * 100_000
    assert s["lines_nbytes"] >= 100_000 * 8 * 4


def test_table_without_metadata_keeps_none_and_says_so():
    t, k = table(metadata=False, eviction=[L2Below(0.01)]), np.arange(5000)
    for _ in range(3):
        t.lookup(k, train=True)
        t.update(k[:2], np.ones((2, 4)))
    assert t.stats()["metadata_nbytes"] == 0
    (chunk,) = t.store.scan()
    assert not chunk.freq.any() and (chunk.last_step == 3).all()
    assert sum(len(c.key) for c in t.store.scan(since=2)) == 5000 and list(t.store.scan(since=3)) == []
    for rule in (IdleSteps(1), MaxRows(1)):
        with pytest.raises(InvalidArgument, match="metadata=False"):
            table(metadata=False, eviction=[rule])


COLUMNS = {
    "embedding": Column(3, optimizer=Adagrad(lr=0.5)),
    "linear": Column(1, initializer=Constant(0.25), optimizer=SGD(lr=2.0, momentum=0.5)),
    "rest": Column(2),
}


@pytest.mark.parametrize("place", ["host", "ssd"])
def test_table_of_columns_equals_a_table_a_column(place, tmp_path):
    def store(name):
        return host_memory() if place == "host" else cached_ssd(tmp_path / name, "256KiB")

    def one(column, name):
        return Table(
            name,
            column.dim,
            initializer=lambda table, keys, dim: (column.initializer or Normal(0, 1))(f"t/{name}", keys, dim),
            optimizer=column.optimizer or SGD(lr=1.0),
        )

    t = Table(
        "t", columns=COLUMNS, initializer=Normal(0, 1), optimizer=SGD(lr=1.0), store=store("whole"), padding_key=0
    )
    assert t.dim == 6 and t.optimizer.n_state(6) == 3 + 1
    apart, rng = {name: one(c, name) for name, c in COLUMNS.items()}, np.random.default_rng(0)
    for _ in range(5):
        keys = rng.integers(1, 30, 20)
        got = t.split(t.lookup(keys, train=True))
        grads = {name: rng.normal(size=(20, c.dim)).astype(np.float32) for name, c in COLUMNS.items()}
        for name, single in apart.items():
            assert np.array_equal(got[name], single.lookup(keys, train=True))
            single.update(keys, grads[name])
        t.update(keys, grads)
    snapshot.save(tmp_path / "model", [t], t.step)
    again = Table("t", columns=COLUMNS, initializer=Normal(0, 1), optimizer=SGD(lr=1.0))
    assert snapshot.load(tmp_path / "model", [again]).notes == []
    for mine, theirs in zip(t.store.scan(), again.store.scan(), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    other = Table("t", columns={**COLUMNS, "linear": Column(1)}, optimizer=SGD(lr=1.0, momentum=0.5))
    assert "state" in snapshot.load(tmp_path / "model", [other]).notes[0]
    t.close()


def test_collection_takes_gradients_of_columns():
    t = Table("t", columns=COLUMNS, optimizer=SGD(lr=1.0))
    c = Collection([t], pooling="sum")
    staged = c.stage({"t": np.array([1, 2, 1])})
    before = t.split(staged.outputs()["t"].copy())
    staged.apply({"t": {name: np.ones((3, column.dim), np.float32) for name, column in COLUMNS.items()}})
    after = t.split(t.lookup([1, 2, 1]))
    assert np.allclose(after["rest"], before["rest"] - [[2], [1], [2]])
    assert np.allclose(after["linear"], 0.25 - np.array([[4], [2], [4]]))


def test_table_refuses_columns_that_do_not_fit():
    for kw in ({"columns": {}}, {"columns": COLUMNS, "dim": 5}, {"dim": None}):
        with pytest.raises(InvalidArgument, match="table t"):
            Table("t", **kw)
    with pytest.raises(InvalidArgument):
        Column(0)
    t = Table("t", columns=COLUMNS)
    for grads in ({"embedding": np.ones((1, 3))}, {n: np.ones((1, 2)) for n in COLUMNS}):
        with pytest.raises(InvalidArgument, match="table t"):
            t.update([1], grads)
    assert table().split(np.ones((2, 4))) == {}
