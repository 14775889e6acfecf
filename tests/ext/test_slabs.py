"""Slabs against arrays: every row type, every layout of a line, slices, fused sums, and what is refused."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hbkit._ext import isa, segment
from hbkit._ext.index import Index
from hbkit._ext.random import initialize
from hbkit._ext.slabs import ROW_DTYPES, Slabs, n_state
from hbkit.errors import InvalidArgument

DIMS = st.sampled_from([1, 2, 3, 7, 16, 17, 32, 64, 100, 128, 129])
DTYPES = st.sampled_from(list(ROW_DTYPES))
SEED = st.integers(0, 2**32)
HYPER = np.array([0.05, 0.5, 0.9, 0.1, 0.7, 1e-8, 0.99], np.float32)


def stored(rows, dtype):
    """The nearest values that rows of a type hold, as float32."""
    if dtype == "float16":
        return np.clip(rows, -65504, 65504).astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = rows.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return rows


def steps(rows, dtype):
    """Distance between neighbours of a narrow type at each value."""
    least, digits = {"float16": (-24, 10), "bfloat16": (-133, 7)}[dtype]
    return np.exp2(np.maximum(np.floor(np.log2(np.maximum(abs(rows.astype(np.float64)), 1e-300))) - digits, least))


def filled(lines, dim, dtype="float32", chunk=1 << 12):
    slabs = Slabs(lines.shape[1], chunk, dim=dim, row_dtype=dtype)
    slabs.reserve(len(lines))
    slabs.scatter(np.arange(len(lines)), lines)
    return slabs


def full(n):
    index = Index()
    index.find_or_insert(np.arange(n))
    return index


def held(slabs, n, width=None):
    out = np.full((n, width or slabs.width), np.nan, np.float32)
    slabs.gather(np.arange(n), out)
    return out


@settings(max_examples=80)
@given(SEED, st.integers(0, 60), DIMS, st.sampled_from([0, 1, 16, 64, 256]), DTYPES, st.booleans(), st.booleans())
def test_whole_lines_past_the_cache_are_those_through_it(seed, n, dim, state, dtype, aligned, with_absent):
    rng, name = np.random.default_rng(seed), isa.name()
    bits = rng.integers(0, 2**32, (n, dim + state), np.uint32)  # any floats, among them NaN
    slots = rng.permutation(80)[:n] - with_absent * (80 - n)
    slots[slots < 0] = -1
    memory = segment.retained((2, n * (dim + state) + 1))  # begins with a cache line
    out, lines = (m[1 - aligned :][: bits.size].reshape(bits.shape) for m in (memory[0], memory[0].copy()))
    lines[:] = bits.view(np.float32)
    try:
        for other in isa.available():
            isa.use(other)
            want, slabs = (filled(np.zeros((80, dim + state), np.float32), dim, dtype) for _ in range(2))
            want.scatter(slots[slots >= 0], lines[slots >= 0])
            slabs.write(slots, lines)
            assert held(slabs, 80).tobytes() == held(want, 80).tobytes()
            out[:] = np.nan
            slabs.read(slots, out)
            found = np.empty_like(bits, np.float32)
            want.gather(slots, found)
            assert out.tobytes() == found.tobytes()
    finally:
        isa.use(name)


@settings(max_examples=60)
@given(SEED, st.integers(1, 300), DIMS, st.sampled_from([0, 1, 2, 5, 40]), DTYPES, st.booleans())
def test_scatter_then_gather_gives_lines_back(seed, n, dim, state, dtype, huge):
    rng = np.random.default_rng(seed)
    lines = (rng.normal(size=(n, dim + state)) * 10.0 ** rng.integers(-9, 6, (n, dim + state))).astype(np.float32)
    slabs = filled(lines, dim, dtype, 1 << 22 if huge else 1 << 10)
    want = lines.copy()
    want[:, :dim] = stored(want[:, :dim].copy(), dtype)
    assert held(slabs, n).tobytes() == want.tobytes()
    for width in {1, dim, dim + state // 2, dim + state}:
        assert held(slabs, n, width).tobytes() == want[:, :width].tobytes()
    slots, column = rng.permutation(n)[: n // 2 + 1], int(rng.integers(0, dim + state))
    part = rng.normal(size=(len(slots), int(rng.integers(1, dim + state - column + 1)))).astype(np.float32)
    slabs.scatter(slots, part, column)
    want[slots, column : column + part.shape[1]] = part
    want[:, :dim] = stored(want[:, :dim].copy(), dtype)
    assert held(slabs, n).tobytes() == want.tobytes()
    absent = np.empty((1, dim), np.float32)
    slabs.gather(np.array([-1]), absent)
    assert not absent.any()
    bytes_of_a_row = 4 * dim if dtype == "float32" else (2 * dim + 3) // 4 * 4
    assert slabs.line_nbytes == bytes_of_a_row + 4 * state
    assert 0 <= slabs.nbytes - slabs.capacity * slabs.line_nbytes <= 8 * n  # and a pointer a chunk


@settings(max_examples=60)
@given(SEED, st.integers(0, 300), st.integers(1, 60), DIMS, st.booleans(), st.booleans(), st.integers(0, 7), DTYPES)
def test_apply_to_gradients_equals_apply_to_their_sums(seed, n, u, dim, with_rows, with_scale, rule, dtype):
    rng = np.random.default_rng(seed)
    seg = rng.permutation(u) if rng.random() < 0.2 else np.arange(u) if rng.random() < 0.2 else rng.integers(0, u, n)
    n, m = len(seg), 9 if with_rows else len(seg)
    values = rng.normal(size=(m, dim)).astype(np.float32)
    rows = rng.integers(0, m, n) if with_rows else None
    scale = rng.normal(size=n).astype(np.float32) if with_scale else None
    lines = abs(rng.normal(size=(u, dim + n_state(rule, dim, True)))).astype(np.float32)
    slots, keys = np.where(rng.random(u) < 0.9, rng.permutation(u), -1), rng.integers(-(2**63), 2**63 - 1, u)
    a, b = filled(lines, dim, dtype), filled(lines, dim, dtype)
    a.apply(rule, slots, segment.Segments(seg, u).of(values, rows, scale), HYPER, keys, seed, 5)
    b.apply(rule, slots, segment.segment_sum(values, seg, u, rows, scale), HYPER, keys, seed, 5)
    assert held(a, u).tobytes() == held(b, u).tobytes()
    c, cut = filled(lines, dim, dtype), int(rng.integers(0, u + 1))
    whole = segment.Segments(seg, u).of(values, rows, scale)
    for part in (slice(cut, u), slice(0, cut)):  # as two threads might
        g = whole.part(part.start, part.stop)
        assert g.sum().tobytes() == whole.sum()[part].tobytes()
        c.apply(rule, slots[part], g, HYPER, keys[part], seed, 5)
    assert held(c, u).tobytes() == held(b, u).tobytes()


@settings(max_examples=60)
@given(SEED, st.lists(st.integers(0, 9), max_size=20), DIMS, DTYPES, st.booleans(), st.booleans())
def test_rows_of_a_batch_are_those_of_its_distinct_keys(seed, lengths, dim, dtype, with_weight, with_scale):
    rng = np.random.default_rng(seed)
    slabs = filled(rng.normal(size=(9, dim + 1)).astype(np.float32), dim, dtype)
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    slots, inverse = np.array([4, -1, 8, 0, 2]), rng.integers(0, 5, splits[-1])
    rows, each = np.empty((5, dim), np.float32), np.empty((len(inverse), dim), np.float32)
    slabs.gather(slots, rows)
    slabs.gather(slots, each, inverse)
    assert each.tobytes() == rows[inverse].tobytes()
    weight = rng.normal(size=len(inverse)).astype(np.float32) if with_weight else None
    scale = rng.normal(size=len(lengths)).astype(np.float32) if with_scale else None
    got, want = (np.full((len(lengths), dim), np.nan, np.float32) for _ in range(2))
    slabs.pool(slots, inverse, splits, got, weight, scale)
    segment.pool(rows, inverse, splits, want, weight, scale)
    assert got.tobytes() == want.tobytes()


@settings(max_examples=60)
@given(SEED, st.lists(st.sampled_from([0, 1, 3, 90, 700]), max_size=20), DIMS, DTYPES, st.booleans(), st.booleans())
def test_rows_of_keys_are_those_of_their_slots(seed, lengths, dim, dtype, with_weight, with_scale):
    rng = np.random.default_rng(seed)
    index, splits = Index(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    slabs = filled(rng.normal(size=(500, dim + 1)).astype(np.float32), dim, dtype)
    index.find_or_insert(rng.permutation(700)[:500])
    keys = rng.integers(0, 700, splits[-1])
    got, want = (np.full((len(keys), dim), np.nan, np.float32) for _ in range(2))
    slabs.lookup(index, keys, got)
    slabs.gather(index.find(keys), want)
    assert got.tobytes() == want.tobytes()
    weight = rng.normal(size=len(keys)).astype(np.float32) if with_weight else None
    scale = rng.normal(size=len(lengths)).astype(np.float32) if with_scale else None
    got, want = (np.full((len(lengths), dim), np.nan, np.float32) for _ in range(2))
    slabs.lookup_pooled(index, keys, splits, got, weight, scale)
    slabs.pool(index.find(keys), np.arange(len(keys)), splits, want, weight, scale)
    assert got.tobytes() == want.tobytes()


def test_chunks_cut_from_regions_hold_their_lines():
    slabs = filled(np.arange(7 << 15, dtype=np.float32)[:, None] * np.ones((1, 17), np.float32), 16, chunk=1 << 22)
    assert slabs.capacity == 7 << 15 and slabs.nbytes < slabs.capacity * 17 * 4 + 100
    assert np.array_equal(held(slabs, 7 << 15)[:, [0, 15, 16]], np.arange(7 << 15)[:, None] * [1, 1, 1])


@settings(max_examples=30)
@given(SEED, DIMS, st.integers(0, 7))
def test_apply_to_a_divided_line_equals_apply_to_one_that_is_not(seed, dim, rule):
    rng = np.random.default_rng(seed)
    lines = abs(rng.normal(size=(20, dim + n_state(rule, dim, True)))).astype(np.float32)
    a, b = filled(lines, dim), filled(lines, None)
    g = rng.normal(size=(20, dim)).astype(np.float32)
    for slabs in (a, b):
        slabs.apply(rule, np.arange(20), g, HYPER)
    assert held(a, 20).tobytes() == held(b, 20).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(SEED, DIMS)
@settings(max_examples=20)
def test_narrow_rows_round_to_a_neighbour_by_key_and_step_alone(dtype, seed, dim):
    rng = np.random.default_rng(seed)
    n, keys = 40, rng.integers(-(2**63), 2**63 - 1, 40)
    start = stored((rng.normal(size=(n, dim)) * 10.0 ** rng.integers(-8, 3, (n, 1))).astype(np.float32), dtype)
    g = (start * rng.normal(size=(n, dim)) * 0.01).astype(np.float32)
    exact = start - np.float32(1) * g

    def after(order, step, column=0):
        slabs = filled(start[order], dim, dtype)
        slabs.apply(0, np.arange(len(order)), g[order], [1.0], keys[order], seed, step)
        out = np.empty_like(start[order])
        out[np.arange(len(order))] = held(slabs, len(order), dim)
        return out

    everyone, some = np.arange(n), rng.permutation(n)[:17]
    first = after(everyone, 3)
    assert (abs(first - exact) <= 1.001 * steps(exact, dtype)).all()
    assert np.array_equal(stored(first, dtype), first)
    assert np.array_equal(after(some, 3), first[some])
    assert dim < 16 or not np.array_equal(after(everyone, 4), first)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [1.0, -3.3e-4, 1e-6])
def test_narrow_rows_are_right_on_average(dtype, value):
    n = 20_000
    start = stored(np.full((n, 4), value, np.float32), dtype)
    step = steps(start[:1, :1], dtype).item()
    slabs = filled(start, 4, dtype)
    slabs.apply(0, np.arange(n), np.full((n, 4), -0.3 * step, np.float32), [1.0], np.arange(n), 1, 1)
    after = held(slabs, n, 4)
    up = (after > start).mean()
    assert set(np.unique((after - start) / step).tolist()) == {0.0, 1.0} and abs(up - 0.3) < 0.01
    columns = (after > start).astype(np.float64)
    assert abs(np.corrcoef(columns.T) - np.eye(4)).max() < 0.05


@pytest.mark.parametrize(("dtype", "most"), [("float16", 65504.0), ("bfloat16", 3.3895314e38)])
def test_narrow_rows_keep_what_is_finite_finite(dtype, most):
    values = np.array([[most, np.float32(3.4e38), -np.float32(3.4e38), np.inf, -np.inf, np.nan, 0.0, -0.0]], np.float32)
    slabs = filled(values, 8, dtype)
    m = np.float32(most)
    np.testing.assert_array_equal(held(slabs, 1), [[m, m, -m, np.inf, -np.inf, np.nan, 0, 0]])
    slabs.apply(0, np.array([0]), np.zeros((1, 8), np.float32), [1.0], np.array([5]))
    np.testing.assert_array_equal(held(slabs, 1), [[m, m, -m, np.inf, -np.inf, np.nan, 0, 0]])
    assert np.signbit(held(slabs, 1)[0, 7])


@settings(max_examples=30)
@given(SEED, st.integers(0, 7), st.integers(0, 7), DTYPES)
def test_slices_have_their_own_rule_rate_and_state(seed, first, second, dtype):
    rng = np.random.default_rng(seed)
    n, a, b = 30, 1, 16
    sa, sb = n_state(first, a, True), n_state(second, b, True)
    lines = abs(rng.normal(size=(n, a + b + sa + sb))).astype(np.float32)
    g, keys = rng.normal(size=(n, a + b)).astype(np.float32), np.arange(n)
    other = HYPER * np.float32(0.5)
    both = filled(lines, a + b)
    both.apply([(first, 0, a, 0), (second, a, b, sa)], keys, g, [HYPER, other])
    one = filled(np.hstack([lines[:, :a], lines[:, a + b : a + b + sa]]), a)
    two = filled(np.hstack([lines[:, a : a + b], lines[:, a + b + sa :]]), b)
    one.apply(first, keys, np.ascontiguousarray(g[:, :a]), HYPER)
    two.apply(second, keys, np.ascontiguousarray(g[:, a:]), other)
    x, y = held(one, n), held(two, n)
    assert held(both, n).tobytes() == np.hstack([x[:, :a], y[:, :b], x[:, a:], y[:, b:]]).tobytes()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", list(ROW_DTYPES))
def test_gradients_that_are_not_finite(fused, dtype):
    rng, n = np.random.default_rng(0), 50
    lines, g = np.ones((n, 17), np.float32), rng.normal(size=(n, 16)).astype(np.float32)
    g[3, 5], g[7, 0], g[9, 15] = np.nan, np.inf, -np.inf
    slots = np.arange(n)
    slots[9] = -1  # not counted: nothing is updated
    given_ = segment.Segments(np.arange(n), n).of(g) if fused else g
    slabs = filled(lines, 16, dtype)
    with pytest.raises(InvalidArgument, match="2 of 50"):
        slabs.apply(2, slots, given_, [0.1, 1e-8], slots, bad="raise")
    assert held(slabs, n).tobytes() == lines.tobytes()
    assert slabs.apply(2, slots, given_, [0.1, 1e-8], slots, bad="skip") == 2
    after = held(slabs, n)
    assert np.isfinite(after).all() and (after[[3, 7, 9]] == lines[[3, 7, 9]]).all()
    want = filled(lines, 16, dtype)
    fine = np.delete(slots, [3, 7, 9])
    want.apply(2, fine, g[fine], [0.1, 1e-8], fine)
    assert held(want, n).tobytes() == after.tobytes()
    assert slabs.apply(2, slots, given_, [0.1, 1e-8], slots) == 0
    assert np.isnan(held(slabs, n)[3, 5])


def test_clipping_and_weight_decay_come_before_the_rule():
    g = np.array([[3.0, -4.0, 0.5]], np.float32)
    for extra, want in (
        ([0.1, 0, 0], g + 0.1),
        ([0, 1.0, 0], np.clip(g, -1, 1)),
        ([0, 0, 1.0], g / np.linalg.norm(g)),
        ([0.1, 3.5, 2.0], np.clip(g, -3.5, 3.5) / np.linalg.norm(np.clip(g, -3.5, 3.5)) * 2 + 0.1),
        ([0, 0, 100.0], g),
    ):
        slabs = filled(np.ones((1, 3), np.float32), 3)
        slabs.apply(0, np.array([0]), g, [1.0, *[0] * 7, *extra])
        np.testing.assert_allclose(held(slabs, 1), 1 - want, rtol=1e-6, atol=1e-7)


@settings(max_examples=30)
@given(SEED, st.integers(0, 200), DTYPES)
def test_fill_draws_each_slice_by_key(seed, n, dtype):
    rng = np.random.default_rng(seed)
    keys, slots = rng.integers(-(2**63), 2**63 - 1, n), rng.permutation(n + 5)[:n]
    slabs = Slabs(22, 1 << 10, dim=19, row_dtype=dtype)
    slabs.reserve(n + 5)
    state = np.array([1, 2, 3], np.float32)
    slabs.fill(slots, keys, [("constant", 7.0, 0, 0, 0, 1), ("normal", 0, 0.05, seed, 1, 17)], state)
    out = np.empty((n, 22), np.float32)
    slabs.gather(slots, out)
    assert (out[:, 0] == 7).all() and (out[:, 18] == 0).all() and (out[:, 19:] == state).all()
    assert out[:, 1:18].tobytes() == stored(initialize("normal", 0, 0.05, seed, keys, 17), dtype).tobytes()


@settings(max_examples=40)
@given(SEED, st.lists(st.integers(0, 12), max_size=40), st.integers(13, 20))
def test_expand_and_segments_equal_numpy(seed, index, u):
    rows, index = np.random.default_rng(seed).normal(size=(u, 5)).astype(np.float32), np.array(index, np.int64)
    assert segment.expand(rows, index).tobytes() == rows[index].tobytes()
    assume(len(index))
    sums = segment.Segments(index, u).of(rows[index])
    assert sums.shape == (u, 5)
    assert sums.sum().tobytes() == segment.segment_sum(rows[index], index, u).tobytes()


@pytest.mark.parametrize(
    "call",
    [
        lambda s: Slabs(0),
        lambda s: Slabs(5, dim=6),
        lambda s: Slabs(5, dim=0),
        lambda s: Slabs(5, row_dtype="float16"),
        lambda s: Slabs(5, dim=5, row_dtype="int8"),
        lambda s: s.gather(np.array([-2]), np.zeros((1, 3), np.float32)),
        lambda s: s.gather(np.array([1 << 40]), np.zeros((1, 3), np.float32)),
        lambda s: s.gather(np.array([0]), np.zeros((1, 6), np.float32)),
        lambda s: s.gather(np.array([0]), np.zeros((1, 3), np.float32), np.array([1])),
        lambda s: s.pool(np.array([0]), np.array([1]), np.array([0, 1]), np.zeros((1, 3), np.float32)),
        lambda s: s.pool(np.array([0]), np.array([0]), np.array([0, 2]), np.zeros((1, 3), np.float32)),
        lambda s: s.lookup(Index(), np.array([1]), np.zeros((1, 2), np.float32)),
        lambda s: s.lookup(full(s.capacity + 1), np.array([s.capacity]), np.zeros((1, 3), np.float32)),
        lambda s: s.lookup_pooled(
            full(s.capacity + 1), np.array([s.capacity]), np.array([0, 1]), np.zeros((1, 3), np.float32)
        ),
        lambda s: s.lookup_pooled(Index(), np.array([1]), np.array([0, 2]), np.zeros((1, 3), np.float32)),
        lambda s: s.scatter(np.array([-1]), np.zeros((1, 3), np.float32)),
        lambda s: s.scatter(np.array([0]), np.zeros((1, 3), np.float32), 3),
        lambda s: s.read(np.array([-2]), np.zeros((1, 5), np.float32)),
        lambda s: s.read(np.array([0]), np.zeros((1, 3), np.float32)),
        lambda s: s.write(np.array([1 << 40]), np.zeros((1, 5), np.float32)),
        lambda s: s.write(np.array([0, 0]), np.zeros((1, 5), np.float32)),
        lambda s: s.apply(0, np.array([0]), np.zeros((1, 2), np.float32), [1.0]),
        lambda s: s.apply(0, np.array([0, 1]), np.zeros((1, 3), np.float32), [1.0]),
        lambda s: s.apply(3, np.array([0]), np.zeros((1, 3), np.float32), [1.0]),
        lambda s: s.apply(8, np.array([0]), np.zeros((1, 3), np.float32), [1.0]),
        lambda s: s.apply(0, np.array([0]), np.zeros((1, 3), np.float32), [1.0] * 13),
        lambda s: s.apply(0, np.array([0]), np.zeros((1, 3), np.float32), [1.0], bad="ignore"),
        lambda s: s.apply([(2, 0, 3, 0), (2, 3, 1, 1)], np.array([0]), np.zeros((1, 3), np.float32), [[1.0], [1.0]]),
        lambda s: s.apply([(2, 0, 3, 2)], np.array([0]), np.zeros((1, 3), np.float32), [1.0]),
        lambda s: s.fill(np.array([0]), np.array([1]), [("gamma", 0, 0, 0, 0, 3)], np.zeros(2, np.float32)),
        lambda s: s.fill(np.array([0]), np.array([1]), [("normal", 0, 1, 0, 1, 3)], np.zeros(2, np.float32)),
        lambda s: s.fill(np.array([0]), np.array([1]), [], np.zeros(1, np.float32)),
        lambda s: segment.expand(np.zeros((3, 2), np.float32), np.array([3])),
        lambda s: segment.Segments(np.arange(3), 3).of(np.zeros((3, 2), np.float32)).part(1, 4),
        lambda s: segment.Segments(np.arange(3), 3).of(np.zeros((3, 2), np.float32)).sum(np.zeros((2, 2), np.float32)),
        lambda s: segment.Segments(np.array([0, -1]), 3),
        lambda s: segment.expand(np.zeros((3, 2), np.float32), np.array([0]), np.zeros((1, 3), np.float32)),
    ],
)
def test_what_does_not_fit_is_refused(call):
    slabs = Slabs(5, dim=3)
    slabs.reserve(1)
    with pytest.raises(InvalidArgument):
        call(slabs)


def test_narrow_rows_need_keys_to_round():
    with pytest.raises(InvalidArgument, match="keys"):
        filled(np.ones((1, 3), np.float32), 3, "bfloat16").apply(0, np.array([0]), np.ones((1, 3), np.float32), [1.0])
