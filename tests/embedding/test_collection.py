"""Collection and look-ahead: pooling and its gradient against naive loops, order of steps, misuse."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import Ragged, Strings
from hbkit.embedding import SGD, Adagrad, Adam, Collection, CountAdmission, SequenceOutput, Table, lookahead
from hbkit.errors import Closed, InvalidArgument, UnknownColumn
from hbkit.ragged import Dictionary

LISTS = st.lists(st.lists(st.integers(-3, 9), max_size=5), min_size=1, max_size=8)


def ragged(lists):
    splits = np.concatenate([[0], np.cumsum([len(x) for x in lists])])
    return Ragged(np.array([y for x in lists for y in x], np.int64), splits)


def scale(how, n):
    return {"sum": 1.0, "mean": 1 / max(n, 1), "sqrtn": 1 / max(n, 1) ** 0.5}[how]


@settings(max_examples=60)
@given(LISTS, st.sampled_from(["sum", "mean", "sqrtn"]), st.integers(0, 3), st.booleans(), st.integers(0, 2**32))
def test_collection_pools_and_updates_as_naive(lists, how, extra, weighted, seed):
    rng = np.random.default_rng(seed)
    table = Table("t", 3, optimizer=SGD(lr=1.0))
    c = Collection([table], {"list": "t", "one": "t"}, {"list": how})
    one = rng.integers(-3, 9, len(lists))
    weights = [rng.integers(1, 4, len(x)).astype(np.float32) for x in lists]
    kw = {"weights": {"list": np.concatenate(weights)}} if weighted else {}
    staged = c.stage({"list": ragged(lists), "one": one}, size=len(lists) + extra, **kw)
    out = staged.outputs()
    row = {k: table.lookup(np.array([k]))[0].astype(np.float64) for k in range(-3, 10)}
    if not weighted:
        weights = [np.ones(len(x)) for x in lists]
    want = np.zeros((len(lists) + extra, 3))
    for i, (x, w) in enumerate(zip(lists, weights, strict=True)):
        want[i] = scale(how, len(x)) * sum((wi * row[k] for k, wi in zip(x, w, strict=True)), np.zeros(3))
    np.testing.assert_allclose(out["list"], want, rtol=1e-5, atol=1e-6)
    assert np.array_equal(out["one"][: len(one)], table.lookup(one)) and not out["one"][len(one) :].any()
    grads = {f: rng.normal(size=out[f].shape).astype(np.float32) for f in out}
    staged.apply(grads)
    total = {k: np.zeros(3) for k in row}
    for i, (x, w) in enumerate(zip(lists, weights, strict=True)):
        for k, wi in zip(x, w, strict=True):
            total[k] += scale(how, len(x)) * wi * grads["list"][i]
        total[one[i]] += grads["one"][i]
    for k in set(one.tolist()) | {k for x in lists for k in x}:
        np.testing.assert_allclose(table.lookup(np.array([k]))[0], row[k] - total[k], rtol=1e-4, atol=1e-5)
    assert len(table) == len(set(one.tolist()) | {k for x in lists for k in x}) and c.step == 1


@given(LISTS, st.integers(0, 2))
def test_collection_sequence_holds_rows_in_place(lists, extra):
    table = Table("t", 3, optimizer=SGD(lr=1.0))
    c = Collection([table], {"list": "t"}, None)
    staged = c.stage({"list": ragged(lists)}, size=len(lists) + extra)
    out = staged.outputs()["list"]
    assert isinstance(out, SequenceOutput)
    longest = max(map(len, lists))
    assert out.values.shape[1] >= longest and out.values.shape[1] & (out.values.shape[1] - 1) == 0
    for i, x in enumerate(lists):
        assert out.mask[i].tolist() == [j < len(x) for j in range(out.mask.shape[1])]
        assert np.array_equal(out.values[i, : len(x)], table.lookup(x))
    assert not out.values[~out.mask].any()
    before = {k: table.lookup([k])[0] for x in lists for k in x}
    staged.apply({"list": np.ones_like(out.values)})
    for k, row in before.items():
        n = sum(x.count(k) for x in lists)
        np.testing.assert_allclose(table.lookup([k])[0], row - n, rtol=1e-5, atol=1e-5)


def test_collection_dense_lists_keep_their_length_and_padding_key():
    table = Table("t", 3, padding_key=0)
    c = Collection([table], {"list": "t"}, None)
    out = c.stage({"list": np.array([[1, 2, 0], [0, 0, 0]])}).outputs()["list"]
    assert out.values.shape == (2, 3, 3) and len(table) == 2 and not out.values[1].any()


def batches(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "a": rng.integers(0, 30, 16),
            "b": ragged([rng.integers(0, 30, rng.integers(0, 4)).tolist() for _ in range(16)]),
        }
        for _ in range(n)
    ]


def train(depth):
    tables = [Table("a", 4, optimizer=Adagrad(lr=0.1)), Table("b", 4, optimizer=Adagrad(lr=0.1))]
    c = Collection(tables)
    for batch, staged in lookahead(batches(), c, depth):
        out = staged.outputs()
        staged.apply({f: np.sin(v + len(batch["a"])).astype(np.float32) for f, v in out.items()})
    return [
        [(x.key.tolist(), x.row.tobytes(), x.state.tobytes(), x.freq.tolist()) for x in t.store.scan()] for t in tables
    ]


@pytest.mark.parametrize("depth", [1, 3, 50])
def test_lookahead_of_any_depth_equals_none(depth):
    assert train(depth) == train(0)


def test_lookahead_creates_and_counts_nothing_ahead():
    c = Collection([Table("a", 4), Table("b", 4)])
    steps = lookahead(batches(), c, 8)
    _, staged = next(steps)
    assert len(c.tables["a"]) == 0
    staged.outputs()
    assert 0 < len(c.tables["a"]) <= 16
    steps.close()


def test_lookahead_surfaces_errors_and_ends_its_thread():
    def broken():
        yield batches()[0]
        raise OSError("disk on fire")

    c, before = Collection([Table("a", 4), Table("b", 4)]), threading.active_count()
    with pytest.raises(OSError, match="disk on fire"):
        for _, staged in lookahead(broken(), c, 4):
            staged.close()
    for _, staged in lookahead(batches(), c, 4):
        staged.close()
        break
    assert threading.active_count() == before
    with lookahead(batches(), c, 4) as steps:
        _, staged = next(steps)
        staged.outputs()
        staged.close()
    assert threading.active_count() == before
    c.stage(batches()[0]).outputs()


def test_collection_reads_create_nothing():
    c = Collection([Table("a", 4), Table("b", 4)])
    assert not c.lookup(batches()[0])["a"].any()
    assert len(c.tables["a"]) == 0 and c.step == 0


def test_staged_out_of_order_is_refused():
    c, (one, two, *_) = Collection([Table("a", 4), Table("b", 4)]), batches()
    s1, s2 = c.stage(one), c.stage(two)
    with pytest.raises(Closed):
        s1.apply({})
    s1.outputs()
    with pytest.raises(Closed, match="previous batch"):
        s2.outputs()
    s1.apply({"a": np.ones((16, 4), np.float32)})
    s2.outputs()
    with pytest.raises(Closed):
        s1.apply({})
    s2.close()
    s2.close()
    with pytest.raises(Closed):
        s2.outputs()
    reading = c.stage(one, train=False)
    reading.outputs()
    with pytest.raises(Closed, match="reading"):
        reading.apply({})


def test_collection_names_the_feature_in_its_errors():
    c = Collection([Table("a", 4)], {"x": "a"})
    for batch, error in [
        ({}, UnknownColumn),
        ({"x": np.zeros(3)}, InvalidArgument),
        ({"x": np.zeros((2, 2, 2), np.int64)}, InvalidArgument),
        ({"x": ["a"]}, InvalidArgument),
    ]:
        with pytest.raises(error, match="feature x"):
            c.stage(batch)
    staged = c.stage({"x": np.arange(3)})
    staged.outputs()
    for grad in (np.zeros((2, 4), np.float32), np.zeros((3, 4), np.int64)):
        with pytest.raises(InvalidArgument, match="feature x"):
            staged.apply({"x": grad})
    with pytest.raises(UnknownColumn):
        staged.apply({"y": np.zeros((3, 4), np.float32)})
    with pytest.raises(UnknownColumn, match="no table 'b'"):
        Collection([Table("a", 4)], {"x": "b"})
    with pytest.raises(InvalidArgument, match="feature x"):
        Collection([Table("a", 4)], {"x": "a"}, "max")
    with pytest.raises(InvalidArgument):
        Collection([Table("a", 4), Table("a", 4)])


def test_collection_leaves_padding_rows_of_a_batch_alone():
    class Padded(dict):
        n_rows = 2

    c = Collection([Table("a", 4)])
    out = c.stage(Padded(a=np.array([5, 6, 0, 0])), size=4).outputs()["a"]
    assert len(c.tables["a"]) == 2 and not out[2:].any() and out[:2].all()


def test_collection_empty_batch():
    c = Collection([Table("a", 4)])
    staged = c.stage({"a": np.zeros(0, np.int64)})
    assert staged.outputs()["a"].shape == (0, 4)
    staged.apply({"a": np.zeros((0, 4), np.float32)})
    assert c.step == 1


def test_collection_leaves_rows_of_left_out_features_alone():
    table = Table("t", 4, optimizer=Adam(lr=0.1))  # which would move a row by a gradient of zeros too
    c = Collection([table], {"used": "t", "left": "t"})
    for grads in ({"used": 1, "left": 1}, {"used": 1}):
        before = table.lookup([1, 2, 3])
        staged = c.stage({"used": np.array([1, 2]), "left": np.array([2, 3])})
        staged.outputs()
        staged.apply({f: np.full((2, 4), g, np.float32) for f, g in grads.items()})
    after = table.lookup([1, 2, 3])
    assert (before[:2] != after[:2]).all() and np.array_equal(before[2], after[2])


def test_collection_goes_on_at_the_step_of_its_tables():
    tables = [Table("a", 4), Table("b", 4)]
    tables[0].step = tables[1].step = 7  # as loading a snapshot sets them
    c = Collection(tables)
    staged = c.stage(batches()[0])
    staged.outputs()
    staged.apply({"a": np.ones((16, 4), np.float32)})
    assert c.step == tables[0].step == tables[1].step == 8
    assert {s for chunk in tables[0].store.scan() for s in chunk.last_step.tolist()} == {8}


@settings(max_examples=40)
@given(LISTS, st.sampled_from(["sum", "mean", None]), st.integers(1, 12), st.integers(0, 2**32))
def test_collection_by_dictionary_equals_by_value(lists, how, n_entries, seed):
    rng = np.random.default_rng(seed)
    codes = ragged([[abs(x) % n_entries for x in row] for row in lists])
    column = Dictionary(rng.integers(0, 6, n_entries), Ragged(codes.values.astype(np.uint32), codes.row_splits))
    one = Dictionary(rng.integers(0, 6, 3), rng.integers(0, 3, len(lists)).astype(np.uint32))
    plain = rng.integers(0, 6, len(lists))
    found = []
    for decode in (False, True):
        table = Table("t", 3, optimizer=Adagrad(), admission=CountAdmission(2), default=0.5, padding_key=1)
        c = Collection([table], {"list": "t", "one": "t", "plain": "t"}, {"list": how})
        for _ in range(2):
            staged = c.stage(
                {
                    "list": column.decode() if decode else column,
                    "one": one.decode() if decode else one,
                    "plain": plain,
                },
                size=len(lists) + 1,
            )
            out = {f: o.values if isinstance(o, SequenceOutput) else o for f, o in staged.outputs().items()}
            staged.apply({f: np.cos(o) for f, o in out.items()})
        found.append(
            [[a.tobytes() for a in out.values()], [[x.tobytes() for x in chunk] for chunk in table.store.scan()]]
        )
    assert found[0] == found[1]


def test_collection_names_the_feature_of_a_dictionary_that_is_none():
    c = Collection([Table("a", 4)], {"x": "a"})
    for dictionary, codes in [
        (np.array([1.0, 2.0]), np.zeros(3, np.uint32)),
        (Strings(np.zeros(0, np.uint8), np.zeros(2, np.int64)), np.zeros(3, np.uint32)),
        (np.arange(2), np.zeros(3)),
    ]:
        with pytest.raises(InvalidArgument, match="feature x"):
            c.stage({"x": Dictionary(dictionary, codes)})
    with pytest.raises(InvalidArgument, match="codes are outside"):
        c.stage({"x": Dictionary(np.arange(2), np.array([0, 2, 1], np.uint32))})


def test_collection_updates_no_table_where_one_gradient_is_not_finite():
    tables = [Table("a", 4), Table("b", 4), Table("c", 4, nonfinite="skip")]
    c = Collection(tables)
    batch = {f: np.arange(3) for f in "abc"}
    staged = c.stage(batch)
    before = {f: v.copy() for f, v in staged.outputs().items()}
    grads = {f: np.ones((3, 4), np.float32) for f in "abc"}
    grads["b"][1, 2] = np.nan
    with pytest.raises(InvalidArgument, match="feature b"):
        staged.apply(grads)
    after = c.lookup(batch)
    assert all(np.array_equal(before[f], after[f]) for f in "abc") and c.step == 0
    grads["b"][1, 2] = 1
    grads["c"][1] = np.inf
    staged.apply(grads)  # the batch is still open
    after = c.lookup(batch)
    assert (after["a"] != before["a"]).all() and np.array_equal(after["c"][1], before["c"][1])
    assert tables[2].stats()["skipped_updates"] == 1 and c.step == 1
