"""Ragged, Strings and Sparse against nested Python lists, and against Arrow."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit import Ragged, Strings
from hbkit.errors import InvalidArgument
from hbkit.ragged import concat, slice_rows, take

INTS = st.integers(-(2**63), 2**63 - 1)
LISTS1 = st.lists(st.lists(INTS, max_size=5), max_size=12)
LISTS2 = st.lists(st.lists(st.lists(INTS, max_size=4), max_size=4), max_size=8)
WORDS = st.lists(st.lists(st.binary(max_size=6), max_size=4), max_size=8)
DTYPES = st.sampled_from(["int8", "uint16", "int32", "int64", "float32", "float64"])


def ragged(lists, depth):
    """Through flat parts, so that empty lists keep their depth."""
    splits = []
    for _ in range(depth):
        splits.append(np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64))
        lists = [y for x in lists for y in x]
    strings = bool(lists) and isinstance(lists[0], bytes)
    return Ragged(Strings.from_list(lists) if strings else np.array(lists, np.int64), tuple(splits))


CASES = st.one_of(LISTS1.map(lambda x: (x, 1)), LISTS2.map(lambda x: (x, 2)), WORDS.map(lambda x: (x, 1)))


@given(CASES)
def test_ragged_round_trips_through_lists(case):
    lists, depth = case
    r = ragged(lists, depth)
    assert r.tolist() == lists and len(r) == len(lists) and r.ragged_rank == depth
    assert r.lengths().tolist() == [len(x) for x in lists]


@given(CASES, st.data())
def test_ragged_take_slice_and_concat_equal_lists(case, data):
    lists, depth = case
    r = ragged(lists, depth)
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10)) if lists else []
    assert r.take(rows).tolist() == [lists[i] for i in rows]
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(lists)), st.integers(0, len(lists)))))
    part = r[a:b]
    assert part.tolist() == lists[a:b] and all(s[0] == 0 for s in part.row_splits)
    assert concat([r[:a], r[a:b], r[b:]]).tolist() == lists
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists))), np.bool_)
    assert r.take(mask).tolist() == [x for x, keep in zip(lists, mask, strict=True) if keep]


@given(CASES)
def test_ragged_round_trips_through_arrow(case):
    lists, depth = case
    r = ragged(lists, depth)
    assert Ragged.from_arrow(r.to_arrow()) == r
    assert r.to_arrow().to_pylist() == lists


@given(LISTS2, st.integers(0, 5), st.integers(0, 5), st.sampled_from(["list", "large_list"]))
def test_ragged_from_arrow_equals_pylist_with_offsets_and_null_lists(lists, skip, drop, kind):
    lists = [None if len(x) == 3 else x for x in lists]
    make = pa.list_ if kind == "list" else pa.large_list
    array = pa.array(lists, make(make(pa.int64())))
    array = array.slice(min(skip, len(array)), max(0, len(array) - skip - drop))
    assert Ragged.from_arrow(array).tolist() == [x or [] for x in array.to_pylist()]


@given(st.lists(st.one_of(st.none(), st.lists(INTS, min_size=3, max_size=3)), max_size=8), st.integers(0, 8))
def test_ragged_from_arrow_fixed_size_list(lists, skip):
    array = pa.array(lists, pa.list_(pa.int64(), 3)).slice(min(skip, len(lists)))
    assert Ragged.from_arrow(array).tolist() == [x or [] for x in array.to_pylist()]


@given(st.lists(st.lists(st.integers(0, 100), max_size=6), max_size=10), DTYPES, st.integers(0, 7), st.booleans())
def test_ragged_to_padded_equals_naive(lists, dtype, length, tail):
    r = ragged(lists, 1)
    r = Ragged(r.values.astype(dtype), r.row_splits)
    got = r.to_padded(length, pad=101, truncate="tail" if tail else "head")
    want = [(x[:length] if tail else x[max(0, len(x) - length) :]) for x in lists]
    assert got.shape == (len(lists), length) and got.dtype == dtype
    assert got.tolist() == [x + [101] * (length - len(x)) for x in want]
    assert r.to_padded().shape == (len(lists), max(map(len, lists), default=0))


@given(LISTS2)
def test_ragged_to_padded_and_to_sparse_of_two_levels(lists):
    r = ragged(lists, 2)
    outer = max((len(x) for x in lists), default=0)
    inner = max((len(y) for x in lists for y in x), default=0)
    padded = r.to_padded()
    assert padded.shape == (len(lists), outer, inner)
    indices, values, shape = r.to_sparse()
    assert shape.tolist() == [len(lists), outer, inner] and len(indices) == len(values)
    dense = np.zeros(padded.shape, np.int64)
    dense[tuple(indices.T)] = values
    assert np.array_equal(dense, padded)
    assert [(i, j, k) for i, x in enumerate(lists) for j, y in enumerate(x) for k, _ in enumerate(y)] == [
        tuple(i) for i in indices.tolist()
    ]


@given(st.lists(st.one_of(st.binary(max_size=10)), max_size=10), st.integers(0, 10))
def test_strings_round_trip(words, skip):
    s = Strings.from_list(words)
    assert s.tolist() == words and s.lengths().tolist() == [len(w) for w in words]
    assert s[skip:].tolist() == words[skip:]
    assert s.take(np.arange(len(words))[::-1]).tolist() == words[::-1]
    for kind in (pa.binary(), pa.large_binary()):
        assert Strings.from_arrow(pa.array(words, kind).slice(min(skip, len(words)))).tolist() == words[skip:]
    assert s.to_arrow().to_pylist() == words


def test_strings_from_arrow_text_and_fixed_size():
    assert Strings.from_arrow(pa.array(["é", "", "ab"])).tolist() == ["é".encode(), b"", b"ab"]
    assert Strings.from_arrow(pa.array([b"ab", b"cd", b"ef"], pa.binary(2))[1:]).tolist() == [b"cd", b"ef"]


def test_ragged_shares_the_values_it_is_given():
    values = np.arange(5)
    r = Ragged(values, np.array([0, 2, 5]))
    assert r.values is values
    assert np.shares_memory(r[1:].values, values)
    a = pa.array([[1, 2], [3]], pa.large_list(pa.int64()))
    assert Ragged.from_arrow(a).values.ctypes.data == a.values.buffers()[1].address


@pytest.mark.parametrize("splits", [[], [1, 5], [0, 3, 2, 5], [0, 4], [0, 6], [0.0, 5.0], [[0, 5]], [0, 2**62, 5]])
def test_ragged_refuses_splits_that_do_not_fit(splits):
    with pytest.raises(InvalidArgument):
        Ragged(np.arange(5), np.array(splits))


@pytest.mark.parametrize("rows", [[-1], [3], [[0]], [0.5], [True]])
def test_ragged_take_refuses_rows_out_of_range(rows):
    for column in (Ragged(np.arange(5), np.array([0, 1, 2, 5])), Strings.from_list(["a", "b", "c"]), np.arange(3)):
        with pytest.raises(InvalidArgument):
            take(column, np.array(rows))


def test_columns_of_different_kinds_do_not_concatenate():
    r = Ragged(np.arange(2), np.array([0, 2]))
    with pytest.raises(InvalidArgument):
        concat([r, np.arange(2)])
    with pytest.raises(InvalidArgument):
        concat([r, Ragged(np.arange(2), (np.array([0, 1]), np.array([0, 2])))])
    assert slice_rows(np.arange(5), 1, 3).tolist() == [1, 2]
