"""Table: creation, reads, updates, admission, eviction, and the keys it takes."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit.embedding import SGD, BloomAdmission, CountAdmission, IdleSteps, L2Below, Normal, Table
from hbkit.errors import InvalidArgument, SchemaMismatch, Unsupported

KEY = st.one_of(st.integers(-4, 4), st.integers(-(2**63), 2**63 - 1))


def table(**kw):
    return Table("t", 4, optimizer=SGD(lr=1.0), **kw)


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
        ({"dtype": "float16"}, Unsupported),
        ({"key_dtype": "string"}, InvalidArgument),
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


@given(st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=8), st.integers(1, 4))
def test_count_admission_admits_at_the_count(batches, min_count):
    t, seen = table(admission=CountAdmission(min_count)), {}
    for batch in batches:
        rows = t.lookup(np.array(batch, np.int64), train=True)
        for key in batch:
            seen[key] = seen.get(key, 0) + 1
        assert rows.any(axis=1).tolist() == [seen[k] >= min_count for k in batch]
        assert len(t) == sum(n >= min_count for n in seen.values())
    waiting = t.admission.state()
    assert dict(zip(waiting["key"].tolist(), waiting["count"].tolist(), strict=True)) == {
        k: n for k, n in seen.items() if n < min_count
    }
    again = CountAdmission(min_count).open()
    again.load_state(waiting)
    assert {k: v.tolist() for k, v in again.state().items()} == {k: v.tolist() for k, v in waiting.items()}


def test_bloom_admission_never_late_and_early_at_about_its_rate():
    n, rate = 20_000, 0.02
    t = table(admission=BloomAdmission(2, n, rate))
    keys = np.random.default_rng(0).permutation(10 * n)[:n]
    for part in np.array_split(keys, 10):
        t.lookup(part, train=True)
    early = len(t) / n
    assert early < rate * 1.5
    for part in np.array_split(keys, 10):
        t.lookup(part, train=True)
    assert len(t) == n
    with pytest.raises(SchemaMismatch):
        CountAdmission(2).open().load_state(t.admission.state())


def test_eviction_by_idleness_and_by_norm():
    t = table(eviction=[IdleSteps(2)])
    for keys in ([1, 2], [2, 3], [2], [2]):
        t.lookup(np.array(keys), train=True)
        t.update(np.array(keys), np.zeros((len(keys), 4)))
    assert t.evict() == 1 and len(t) == 2
    assert not t.lookup(np.array([1])).any() and t.lookup(np.array([3])).any()
    t = table(eviction=[L2Below(10.0)])
    t.lookup(np.array([1, 2]), train=True)
    t.update(np.array([1]), np.full((1, 4), 100.0))
    assert t.evict() == 1 and t.lookup(np.array([1])).any() and not t.lookup(np.array([2])).any()


def test_table_survives_readers_beside_a_writer():
    t, errors = table(), []

    def read():
        try:
            for _ in range(60):
                rows = t.lookup(np.arange(500))
                assert np.isfinite(rows).all()
        except BaseException as e:  # an assertion in a thread would be lost
            errors.append(e)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for r in readers:
        r.start()
    for step in range(60):
        k = np.arange(step * 50, step * 50 + 500)
        t.lookup(k, train=True)
        t.update(k, np.ones((500, 4)))
    for r in readers:
        r.join()
    assert not errors and len(t) == 60 * 50 + 450
    t.store.validate()
