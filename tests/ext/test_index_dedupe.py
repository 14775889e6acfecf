"""dedupe against a dict and against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit._ext import isa
from hbkit._ext.index import dedupe
from hbkit._ext.pool import fail_allocation
from hbkit.errors import InvalidArgument

KEYS = st.one_of(st.integers(-8, 8), st.sampled_from([-(2**63), 2**63 - 1]), st.integers(-(2**63), 2**63 - 1))
BATCH = st.lists(KEYS, max_size=300).map(lambda k: np.array(k, np.int64))


@pytest.fixture(scope="module", params=isa.available(), autouse=True)
def each_isa(request):
    before = isa.name()
    isa.use(request.param)
    yield request.param
    isa.use(before)


def naive_dedupe(keys):
    place, inverse = {}, []
    for key in keys.tolist():
        inverse.append(place.setdefault(key, len(place)))
    counts = [inverse.count(i) for i in range(len(place))]
    return list(place), inverse, counts


@given(BATCH, st.sampled_from(["int64", "int32"]))
def test_dedupe_equals_naive(keys, inverse):
    unique, where, counts = dedupe(keys, inverse)
    assert (unique.tolist(), where.tolist(), counts.tolist()) == naive_dedupe(keys)
    assert where.dtype == inverse
    assert dedupe(keys, inverse, False)[2] is None


RNG = np.random.default_rng(0)
LAWS = {
    "zipf": RNG.zipf(1.1, 200_000) % 50_000,
    "distinct": RNG.permutation(200_000) << 40,
    "equal": np.zeros(70_000, np.int64),
    "distinct, then mixed": np.concatenate([np.arange(1000), RNG.integers(0, 2000, 60_000)]),  # both loops
}


@pytest.mark.parametrize("keys", LAWS.values(), ids=LAWS.keys())
def test_dedupe_equals_numpy_at_size(keys):
    want, first, n = np.unique(keys, return_index=True, return_counts=True)
    order = np.argsort(first)
    for inverse in ("int64", "int32"):
        unique, where, counts = dedupe(keys, inverse)
        assert np.array_equal(unique, want[order]) and np.array_equal(counts, n[order])
        assert np.array_equal(unique[where], keys)


def test_dedupe_without_memory_or_of_an_unknown_type_raises():
    keys = np.arange(100)
    for nth in (1, 2, 3, 4):
        fail_allocation(nth)
        with pytest.raises(MemoryError):
            dedupe(keys)
    with pytest.raises(InvalidArgument):
        dedupe(keys, "uint8")
