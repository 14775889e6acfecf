"""The counter-based generator against published vectors and the statistics module's normal quantile."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit._ext.hash import hash_bytes, hash_ints
from hbkit._ext.random import initialize, permutation, philox
from hbkit.errors import InvalidArgument

# Random123's kat_vectors, philox4x32 10.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEED = st.integers(0, 2**64 - 1)
KEY = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(("counter", "key", "want"), VECTORS)
def test_philox_equals_published_vectors(counter, key, want):
    assert philox(counter, key) == want


def naive(kind, a, b, seed, key, column):
    key %= 2**64
    words = philox((column // 4, 0, key % 2**32, key >> 32), (seed % 2**32, seed >> 32))
    u = (words[column % 4] // 2**9 + 0.5) / 2**23
    pair = column % 2
    radius = math.sqrt(-2 * math.log((words[pair] // 2 + 0.5) / 2**31))
    angle = 2 * math.pi * words[pair + 2] / 2**32
    normal = NormalDist()
    low, high = normal.cdf(-2), normal.cdf(2)
    return {
        "uniform": a + (b - a) * u,
        "normal": a + b * radius * (math.cos(angle) if column % 4 < 2 else math.sin(angle)),
        "truncated_normal": a + b * normal.inv_cdf(low + (high - low) * u),
        "constant": a,
    }[kind]


@given(
    SEED, st.lists(KEY, min_size=1, max_size=20), st.sampled_from(["uniform", "normal", "truncated_normal", "constant"])
)
def test_initialize_equals_naive(seed, keys, kind):
    got = initialize(kind, 0.25, 1.5, seed, np.array(keys, np.int64), 9)
    want = [[naive(kind, 0.25, 1.5, seed, k, j) for j in range(9)] for k in keys]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=3e-6)


@given(SEED, st.lists(KEY, min_size=2, max_size=30, unique=True), st.randoms())
def test_initialize_does_not_depend_on_order(seed, keys, shuffle):
    first = dict(zip(keys, initialize("normal", 0, 1, seed, np.array(keys, np.int64), 5).tolist(), strict=True))
    shuffle.shuffle(keys)
    again = dict(zip(keys, initialize("normal", 0, 1, seed, np.array(keys, np.int64), 5).tolist(), strict=True))
    assert first == again


def test_initialize_has_the_named_distribution():
    x = initialize("normal", 1.0, 2.0, 7, np.arange(100_000), 8).astype(np.float64)
    assert abs(x.mean() - 1) < 0.01 and abs(x.std() - 2) < 0.01
    assert abs(((x - 1) ** 4).mean() / 16 - 3) < 0.05
    assert abs(np.corrcoef(x.T) - np.eye(8)).max() < 0.02
    share = [(abs(x - 1) > 2 * k).mean() for k in (1, 2, 3)]
    np.testing.assert_allclose(share, [0.3173, 0.0455, 0.0027], rtol=0.05)
    t = initialize("truncated_normal", 0.0, 1.0, 7, np.arange(100_000), 8)
    assert abs(t).max() <= 2 and abs(t.std() - 0.8796) < 0.01
    u = initialize("uniform", -1.0, 3.0, 7, np.arange(100_000), 8)
    assert u.min() >= -1 and u.max() <= 3 and abs(u.mean() - 1) < 0.01


def test_initialize_refuses_an_unknown_kind():
    with pytest.raises(InvalidArgument, match="normal"):
        initialize("gamma", 0, 1, 0, np.arange(3), 2)


@given(st.lists(st.binary(max_size=100), max_size=20), SEED)
def test_hash_bytes_equals_xxh64(strings, seed):
    xxhash = pytest.importorskip("xxhash")
    splits = np.concatenate([[0], np.cumsum([len(s) for s in strings])]).astype(np.int64)
    got = hash_bytes(np.frombuffer(b"".join(strings), np.uint8), splits, seed)
    assert got.view(np.uint64).tolist() == [xxhash.xxh64_intdigest(s, seed) for s in strings]


@given(st.lists(KEY, max_size=20), SEED)
def test_hash_ints_equals_xxh64_of_their_bytes(values, seed):
    xxhash = pytest.importorskip("xxhash")
    got = hash_ints(np.array(values, np.int64), seed)
    assert got.view(np.uint64).tolist() == [
        xxhash.xxh64_intdigest((v % 2**64).to_bytes(8, "little"), seed) for v in values
    ]


@pytest.mark.parametrize("splits", [[0, 5, 3], [-1, 2], [0, 11], []])
def test_hash_bytes_refuses_splits_outside_the_bytes(splits):
    with pytest.raises(InvalidArgument):
        hash_bytes(np.zeros(10, np.uint8), np.array(splits, np.int64))


def test_permutation_is_one_and_depends_on_the_draws():
    draws = np.random.Philox(7).random_raw(1000)
    order = permutation(draws)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == naive_permutation(draws)
    assert permutation(draws[:0]).tolist() == []


def naive_permutation(draws):
    order = list(range(len(draws)))
    for i in range(len(draws) - 1, 0, -1):
        j = (int(draws[i]) >> 32) * (i + 1) >> 32
        order[i], order[j] = order[j], order[i]
    return order
