"""CUDA kernels of rows against NumPy oracles and the C kernels, bit for bit; and what they compile to."""

import importlib.util
import os

import numpy as np
import pytest

from hbkit._ext.segment import segment_sum as c_segment_sum
from hbkit._ext.slabs import Slabs, n_state
from hbkit.errors import DeviceUnavailable, InvalidArgument, Unsupported
from hbkit.ragged import Ragged
from hbkit.shuffle import pack, unpack

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
NUMBA_CUDA = importlib.util.find_spec("numba_cuda") is not None
DTYPES = ("float32", "float16", "bfloat16")
RULES = ("sgd", "momentum", "nesterov", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam", "ftrl", "adagrad_decay",
         "row_step_adam")  # fmt: skip
COUNTING = ("adagrad_decay", "row_step_adam")  # their lines end with a count; they have kernels of others
KERNELS = [
    *(f"{kind}_{dtype}" for kind in ("gather", "scatter", "pool") for dtype in DTYPES),
    *(f"{rule}_{dtype}" for rule in RULES if rule not in ("nesterov", *COUNTING) for dtype in DTYPES),
    "block_sums", "segment_sum", "look", "leave_out", "quantize", "dequantize",
]  # fmt: skip
COMPILED = ("gather_float32_fours", "pool_bfloat16_fours", "adam_float32_fours", "rowwise_adam_float16_fours",
            "own", "block_sums_fours", "segment_sum_fours", "look_fours", "quantize_fours")  # fmt: skip
KERNELS += ["padded", "own", "change", *(f"{name}_fours" for name in KERNELS)]


@pytest.mark.slow  # more than 20 s
def test_kernels_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_kernels_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


def values(rng, *shape):
    """Floats of very different size, denormals and zeros among them."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 4, shape)
    x[rng.random(shape) < 0.1] = 1e-40
    x[rng.random(shape) < 0.1] = 0
    return x.astype(np.float32)


def bits(a):
    return np.ascontiguousarray(a).view(np.uint32).tolist()


def hyper_of(rule):
    """Code of the rule in C, and hyper-parameters that use all of it."""
    code, own = {
        "sgd": (0, [0.1]),
        "momentum": (0, [0.1, 0.9]),
        "nesterov": (0, [0.1, 0.9, 1]),
        "adagrad": (1, [0.1, 1e-8, 1e-7]),
        "rowwise_adagrad": (2, [0.1, 1e-8]),
        "adam": (3, [0.01, 0.1, 0.999, 0.001, 0.03, 1e-8, 0.99]),
        "rowwise_adam": (4, [0.01, 0.1, 0.999, 0.001, 0.03, 1e-8, 0.99]),
        "ftrl": (5, [0.1, 0.01, 0.5]),
        "adagrad_decay": (6, [0.1, 3, 0.9, 1e-3]),
        "row_step_adam": (7, [0.01, 0.1, 0.999, 0.001, 0, 1e-8, 0.99]),
    }[rule]
    hyper = np.zeros(12, np.float32)
    hyper[: len(own)] = own
    return code, hyper


def state_of(rule, dim):
    """Floats of state beside `dim` columns."""
    return n_state(hyper_of(rule)[0], dim, rule in ("momentum", "nesterov"))


def same_lines(device, n, width, dim, dtype="float32", batch_lines=4, seed=0, counts=()):
    """Slabs, and lines on the device where there is one, with the same contents; `counts` are columns of counts."""
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(seed)
    start = values(rng, n, width)
    start[:, dim:] = np.abs(start[:, dim:])
    for at in counts:
        start[:, at] = np.resize([0, 1, 3, 2**24, 2.5, 2**24 + 2, 2**24 - 1, 5], n)
    both = [Slabs(width, dim=dim, row_dtype=dtype)]
    both[0].reserve(n)
    if device is not None:
        both.append(DeviceLines(device, n, width, batch_lines, dim, dtype))
    for lines in both:
        lines.scatter(np.arange(n), start)
    return both


def gathered(lines, slots, width, index=None):
    out = np.full((len(slots if index is None else index), width), np.nan, np.float32)
    lines.gather(np.asarray(slots), out, index)
    return bits(out)


# --- oracles: one float at a time, every operation rounded to float32 ---------------------------------------------


def oracle_sum(v, segment, n_segments, rows, scale):
    out = np.zeros((n_segments, v.shape[1]), np.float32)
    for s in range(n_segments):
        at = np.flatnonzero(segment == s)
        blocks = [at[i : i + 64] for i in range(0, len(at), 64)]
        for i, block in enumerate(blocks):
            total = scale[block[0]] * v[rows[block[0]]]
            for p in block[1:]:
                total = total + scale[p] * v[rows[p]]
            out[s] = total if i == 0 else out[s] + total
    return out


def sum_of_squares(g):
    p = np.zeros(16, np.float32)
    for j, x in enumerate(g):
        p[j % 16] += x * x
    while len(p) > 1:
        p = p[: len(p) // 2] + p[len(p) // 2 :]
    return p[0]


def power(x, n):
    out = np.float64(1)
    while n:
        if n & 1:
            out *= x
        n, x = n >> 1, x * x
    return out


def oracle_gradient(row, g, h):
    """Clipped by value, then by the norm, then with weight decay."""
    decay, most, norm = h[8:11]
    g = g.copy()
    if most > 0:
        g[g > most], g[g < -most] = most, -most
    if norm > 0 and (length := np.sqrt(sum_of_squares(g))) > norm:
        g *= norm / length
    return g + decay * row if decay else g


def oracle_step(rule, row, state, g, h):
    dim, g = len(g), oracle_gradient(row, g, h)
    if rule == "sgd":
        row -= h[0] * g
    elif rule in ("momentum", "nesterov"):
        state[:] = h[1] * state + g
        row -= h[0] * (g + h[1] * state if rule == "nesterov" else state)
    elif rule == "adagrad":
        state += g * g
        row -= h[0] * (g / (np.sqrt(state + h[2]) + h[1]))
    elif rule == "adagrad_decay":
        kept = state[:dim]
        if h[1] > state[dim]:
            kept = np.maximum(kept * h[2], h[3])
            state[dim] += 1
        state[:dim] = kept + g * g
        row -= h[0] * (g / np.sqrt(state[:dim]))
    elif rule in ("adam", "row_step_adam"):
        m, v, lr, root, eps = state[:dim], state[dim : 2 * dim], h[0], h[4], h[5]
        if rule == "row_step_adam":
            state[2 * dim] += state[2 * dim] < 2**24
            n = int(min(state[2 * dim], 2**24))
            lr = np.float32(np.float64(lr) / (1 - power(1 - np.float64(h[1]), n)))
            root = np.float32(np.sqrt(1 - power(1 - np.float64(h[3]), n)))
            eps = eps / root if h[4] else eps
        m += (g - m) * h[1]
        v[:] = h[2] * v + (h[3] * g) * g
        row[:] = row * h[6] - lr * (m / (np.sqrt(v) / root + eps))
    elif rule == "ftrl":
        z, n = state[:dim], state[dim:]
        total = n + g * g
        z += g - (np.sqrt(total) - np.sqrt(n)) / h[0] * row
        n[:] = total
        row[:] = (np.clip(z, -h[1], h[1]) - z) / (np.sqrt(total) / h[0] + h[2])
    else:
        mean = sum_of_squares(g) / np.float32(dim)
        if rule == "rowwise_adagrad":
            state[0] += mean
            row -= (h[0] / (np.sqrt(state[0]) + h[1])) * g
        else:
            state[dim] = h[2] * state[dim] + h[3] * mean
            state[:dim] += (g - state[:dim]) * h[1]
            row[:] = row * h[6] - h[0] * (state[:dim] / (np.sqrt(state[dim]) / h[4] + h[5]))


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "n_state"), [(1, 0), (5, 5), (8, 1), (36, 8)])
def test_gather_and_scatter_as_slabs_do(device, any_order, dtype, dim, n_state):
    width = dim + n_state
    both = same_lines(device, 9, width, dim, dtype)
    asked, index = np.array([3, -1, 7, 7, 0, 8]), np.array([5, 0, 0, 1, 4, 2, 3, 5])
    for w in {1, dim, width}:
        whole = gathered(both[0], np.arange(9), w)
        picked = [whole[s] if s >= 0 else [0] * w for s in asked]
        for lines in both:
            assert gathered(lines, asked, w) == picked
            assert gathered(lines, asked, w, index) == gathered(lines, asked, w, index[:4]) + [
                picked[i] for i in index[4:]
            ]
            assert gathered(lines, asked[:0], w) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_lines_go_and_come_as_those_of_slabs(device, dtype):
    slabs, *others = same_lines(device, 9, 20, 12, dtype, batch_lines=9)
    want = gathered(slabs, np.arange(9), 20)
    for lines in others:
        near = lines.leave(np.arange(9))
        assert bits(near) == want
        lines.incoming(9)[:] = near[::-1]
        lines.land(np.arange(9))
        assert gathered(lines, np.arange(9), 20) == want[::-1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_rows_round_as_slabs_do(device, dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2**32, (40, 4), dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 1e-8, 6e-8, 3e-5, 6.2e-5, 3.4e38, 1e-40, 0.1, -1]
    raw = np.concatenate([raw, np.array(special, np.float32).reshape(4, 4)])
    both = same_lines(device, len(raw), 4, 4, dtype)
    with np.errstate(all="ignore"):  # the simulator's NumPy says where a random float is not a number
        for lines in both:
            lines.scatter(np.arange(len(raw)), raw)
        found = [gathered(lines, np.arange(len(raw)), 4) for lines in both]
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 32])
def test_pool_as_slabs_do(device, any_order, dtype, dim):
    rng = np.random.default_rng(dim)
    both = same_lines(device, 9, dim, dim, dtype)
    slots, index = np.array([3, -1, 8, 0]), rng.integers(0, 4, 21)
    splits = np.array([0, 0, 2, 13, 20, 21])
    weight, scale = values(rng, 21), values(rng, 5)
    for extra in ({}, {"weight": weight}, {"row_scale": scale}, {"weight": weight, "row_scale": scale}):
        found = []
        for lines in both:
            out = np.full((5, dim), np.nan, np.float32)
            lines.pool(slots, index, splits, out, **extra)
            found.append(bits(out))
        assert all(f == found[0] for f in found)


# --- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dim"), [(0, 3), (1, 4), (64, 3), (65, 4), (300, 3), (700, 4)])
def test_segment_sum_as_oracle_and_c(device, any_order, n, dim):
    rng = np.random.default_rng(n)
    v, segment, rows = values(rng, 9, dim), rng.zipf(1.5, n) % 4, rng.integers(0, 9, n)
    scale = rng.standard_normal(n).astype(np.float32)
    want = bits(oracle_sum(v, segment, 5, rows, scale))
    assert bits(c_segment_sum(v, segment, 5, rows, scale)) == want
    if device is not None:
        from hbkit.cuda.lines import segment_sum

        assert bits(segment_sum(device, v, segment, 5, rows, scale)) == want
        v = values(rng, n, dim)
        assert bits(segment_sum(device, v, segment, 5)) == bits(c_segment_sum(v, segment, 5))


# --- optimizers ---------------------------------------------------------------------------------------------------


def agree(device, parts, dtype, rng, segments=False, bad=0):
    """Two steps of (rule, columns, hyper) side by side: on the device as by Slabs, and of float32 as the oracle.

    With `segments` gradients are summed on the way, and `bad` of them are not finite.
    """
    dim, n, n_lines = sum(count for _, count, _ in parts), 6, 8
    slices, counts, column, state = [], [], 0, 0
    for rule, count, _ in parts:
        slices.append((hyper_of(rule)[0], column, count, state))
        column, state = column + count, state + state_of(rule, count)
        if rule in COUNTING:
            counts.append(dim + state - 1)
    code, hyper = slices, np.stack([h for _, _, h in parts])
    if len(parts) == 1:
        code, hyper = slices[0][0], hyper[0]
    width = dim + state
    both = same_lines(device, n_lines, width, dim, dtype, seed=int(rng.integers(99)), counts=counts)
    want = np.empty((n_lines, width), np.float32)
    both[0].gather(np.arange(n_lines), want)
    for step in (1, 2):
        slots, keys = rng.permutation(n_lines)[:n], rng.integers(-(2**63), 2**63 - 1, n)
        slots[rng.random(n) < 0.2] = -1
        segment = rng.permutation(np.concatenate([np.arange(n), np.repeat(rng.integers(0, n, 2), 70)]))
        v, picked = values(rng, 20, dim), rng.integers(0, 20, len(segment))
        scale = rng.standard_normal(len(segment)).astype(np.float32)
        v.ravel()[rng.integers(0, v.size, bad)] = rng.choice([np.nan, np.inf, -np.inf, 3e38], bad)
        grads = c_segment_sum(v, segment, n, picked, scale) if segments else v[:n].copy()
        both[0].apply(code, slots, grads, hyper, keys, 2**64 - 77, step)
        if device is not None and segments:
            send = device.send
            order = np.argsort(segment, kind="stable")
            starts = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=n))])
            given = send(slots), send(v), send(order), send(starts)
            both[1].apply_segments(code, *given, hyper, send(keys), 2**64 - 77, step, send(picked), send(scale))
        elif device is not None:
            both[1].apply(code, slots, grads, hyper, keys, 2**64 - 77, step)
        for slot, g in zip(slots, grads, strict=True):
            for (rule, count, h), (_, column, _, state) in zip(parts, slices, strict=True):
                if slot >= 0:
                    line, at = want[slot], dim + state
                    row, own = line[column : column + count], line[at : at + state_of(rule, count)]
                    with np.errstate(all="ignore"):  # sums of no squares, and gradients that are not finite
                        oracle_step(rule, row, own, g[column : column + count], h)
    found = [np.empty_like(want) for _ in both]
    for lines, out in zip(both, found, strict=True):
        lines.gather(np.arange(n_lines), out)
    if dtype == "float32":
        found.append(want)
    for out in found[1:]:  # what is no number has no bits of its own
        assert np.isnan(out).tolist() == np.isnan(found[0]).tolist()
        assert bits(np.nan_to_num(out, nan=7)) == bits(np.nan_to_num(found[0], nan=7))


def some_of(rng, rule, extra):
    """Hyper-parameters of a rule; `extra` are weight decay, clipping by value and by norm."""
    _, hyper = hyper_of(rule)
    hyper[8:11] = extra
    if rule == "row_step_adam":
        hyper[4] = rng.integers(2)
    return hyper


EXTRAS = [(0, 0, 0), (0.01, 0.5, 0), (0, 0, 0.7), (0.01, 2, 0.7)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 37])
def test_apply_as_oracle_and_slabs(device, rule, dtype, dim):
    if SIMULATED and dim == 37 and dtype == "float16":
        pytest.skip("the simulator is slow: the other dims and dtypes take the same way")
    rng = np.random.default_rng(dim)
    agree(device, [(rule, dim, some_of(rng, rule, EXTRAS[0]))], dtype, rng)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("extra", EXTRAS[1:3])
def test_clipping_and_weight_decay_as_oracle_and_slabs(device, rule, extra):
    rng = np.random.default_rng(RULES.index(rule) + int(100 * sum(extra)))
    dim, dtype = int(rng.choice([3, 8, 20, 21])), str(rng.choice(DTYPES))
    agree(device, [(rule, dim, some_of(rng, rule, extra))], dtype, rng)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("extra", [EXTRAS[0], EXTRAS[-1]])
def test_apply_of_segments_sums_on_the_way(device, any_order, rule, extra):
    rng = np.random.default_rng(RULES.index(rule))
    agree(device, [(rule, int(rng.choice([7, 8])), some_of(rng, rule, extra))], str(rng.choice(DTYPES)), rng, True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:.*encountered")  # as the simulator's NumPy says of what is not finite
def test_gradients_that_are_not_finite_go_where_those_of_slabs_go(device, rule):
    rng = np.random.default_rng(RULES.index(rule))
    for extra in (EXTRAS[0], EXTRAS[-1]):
        agree(device, [(rule, 6, some_of(rng, rule, extra))], str(rng.choice(DTYPES)), rng, bad=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_named_columns_as_oracle_and_slabs(device, any_order, dtype, seed):
    rng = np.random.default_rng(seed)
    # Odd ones, whose neighbours share a word of narrow rows and a number of the rounding's, and multiples of four.
    parts = []
    for k in range(1 + seed):  # all rules come after another somewhere
        rule = RULES[(k + 4 * seed + 3 * DTYPES.index(dtype)) % len(RULES)]
        count = 4 * int(rng.integers(1, 4)) if seed % 2 else int(rng.integers(1, 12))
        parts.append((rule, count, some_of(rng, rule, EXTRAS[rng.integers(len(EXTRAS))])))
    agree(device, parts, dtype, rng, segments=seed > 1)


def test_bad_gradients_are_skipped_as_slabs_do(device):
    both, (code, hyper) = same_lines(device, 6, 8, 4), hyper_of("adagrad")
    grads = np.ones((4, 4), np.float32)
    grads[1, 2], grads[3, 0] = np.nan, np.inf
    assert {lines.apply(code, np.array([0, 1, 2, -1]), grads, hyper, bad="skip") for lines in both} == {1}
    found = [gathered(lines, np.arange(6), 8) for lines in both]
    assert all(f == found[0] for f in found)


def test_any_order_shows_a_planted_conflict(lane, device, any_order):
    if lane != "cudasim":
        pytest.skip(f"lane {lane}: the order of threads is not chosen")
    from hbkit.cuda.lines import DeviceLines

    # Slots that are not distinct, of one block and of two: who writes last is left to chance, and that is seen.
    lines, n, found = DeviceLines(device, 40, 1, 40), 40, set()
    for _ in range(30):
        slots = np.arange(n)
        slots[3], slots[39] = 1, 0
        lines.scatter(slots, np.arange(n, dtype=np.float32)[:, None])
        out = np.empty((2, 1), np.float32)
        lines.gather(np.arange(2), out)
        found.add(tuple(out.ravel().tolist()))
    assert {a for a, _ in found} == {0, 39} and {b for _, b in found} == {1, 3}


# --- the wire, and padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 20])
def test_int8_as_on_the_wire(device, any_order, dim):
    rng = np.random.default_rng(dim)
    rows = values(rng, 14, dim)
    rows[3], rows[4, 0], rows[5, -1], rows[6, 0], rows[7, 0] = 0, 1.7e38, np.nan, -np.inf, -1.8e38
    block = pack(rows, "int8")
    if device is None:
        assert np.isnan(unpack(block, dim, "int8")[5:8]).all()
        return
    from hbkit.cuda import wire
    from hbkit.cuda.device import COOPERATING

    q, scales = device.empty(rows.shape, np.int8), device.empty((len(rows),), np.uint16)
    out = device.empty(rows.shape, np.float32)
    device.launch(wire.QUANTIZE[dim % 4 == 0], len(rows) * COOPERATING, device.send(rows), q, scales)
    device.launch(wire.DEQUANTIZE[dim % 4 == 0], len(rows) * COOPERATING, q, scales, out)
    assert device.fetch(q).tobytes() + device.fetch(scales).tobytes() == block.tobytes()
    got, want = device.fetch(out), unpack(block, dim, "int8")
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("truncate", ["tail", "head"])
def test_padding_as_ragged_does(device, any_order, truncate):
    splits = np.array([0, 3, 3, 10, 11])
    want = Ragged(np.arange(11), (splits,)).to_padded(4, -1, truncate)
    assert want[0, 3] == -1
    if device is not None:
        from hbkit.cuda import rows

        out = device.empty((4, 4), np.int64)
        device.launch(rows.padded, 16, device.send(splits), int(truncate == "tail"), out)
        assert np.array_equal(device.fetch(out), want)


# --- what must not be, and what it compiles to --------------------------------------------------------------------


def test_error_word_raises_at_sync_once(device):
    if device is None:
        pytest.skip("lane cpu: there is no error word")
    from hbkit.cuda.lines import DeviceLines, segment_sum

    lines = DeviceLines(device, 4, 2, 10)
    lines.scatter(np.arange(4), np.ones((4, 2), np.float32))
    for slots in ([0, 4], [-2, 1]):
        with pytest.raises(InvalidArgument, match="slot is outside"):
            lines.gather(np.array(slots), np.empty((2, 2), np.float32))
    for code in (0, 2):
        with pytest.raises(InvalidArgument, match="slot is outside"):
            lines.apply(code, np.array([9]), np.ones((1, 1), np.float32), np.zeros(8, np.float32))
    with pytest.raises(InvalidArgument, match="slot is outside"):
        lines.scatter(np.array([4]), np.ones((1, 2), np.float32))
    with pytest.raises(InvalidArgument, match="reaches outside"):
        segment_sum(device, np.ones((2, 1), np.float32), np.zeros(1, np.int64), 1, np.array([2]))
    out = device.empty((1, 2), np.float32)
    lines.gather(device.send(np.arange(4)), out, device.send(np.array([4])))
    with pytest.raises(InvalidArgument, match="index reaches outside"):
        device.sync()
    device.sync()  # each was reported once
    out = np.empty((4, 2), np.float32)
    lines.gather(np.arange(4), out)
    assert (out == 1).all()  # and nothing was written


def test_apply_refuses_what_does_not_fit(device):
    if device is None:
        pytest.skip("lane cpu: it has all rules")
    from hbkit.cuda.lines import DeviceLines

    lines, hyper, g = DeviceLines(device, 4, 6, 10), np.zeros(12, np.float32), np.ones((2, 2), np.float32)
    for grads in (np.ones((2, 6), np.float32), np.ones((1, 2), np.float32), np.ones((2, 9), np.float32)):
        with pytest.raises(InvalidArgument, match="do not fit"):
            lines.apply(1, np.arange(2), grads, hyper)
    for parts in ([(1, 1, 2, 0)], [(1, 0, 2, 3)], [(0, 0, 1, 0)] * 2, [(1, -1, 1, 0)], [(1, 0, 0, 0)], []):
        with pytest.raises(InvalidArgument, match="do not fit"):
            lines.apply(parts, np.arange(2), g, hyper)
    with pytest.raises(InvalidArgument, match="unknown optimizer rule 8"):
        lines.apply(8, np.arange(2), g, hyper)
    for grads in (g.astype(np.float64), device.send(g.astype(np.float16))):
        with pytest.raises(InvalidArgument, match="an array of"):
            lines.apply(1, device.send(np.arange(2)) if grads.dtype != np.float64 else np.arange(2), grads, hyper)
    with pytest.raises(Unsupported, match="in device memory"):
        lines.apply(1, device.send(np.arange(2)), device.send(g), hyper, bad="skip")


def test_device_unavailable_names_the_remedy(lane):
    if lane != "cpu":
        pytest.skip(f"lane {lane}: there is a device")
    if NUMBA_CUDA:
        from numba import cuda

        if cuda.is_available():
            pytest.skip("there is a CUDA device")
    from hbkit.cuda.device import Device

    with pytest.raises(DeviceUnavailable, match=r"hbkit\[cuda\]"):
        Device()


@pytest.mark.skipif(SIMULATED or not NUMBA_CUDA, reason="numba-cuda is not installed, or is simulated: no PTX")
def test_kernels_compile_to_ptx_that_rounds_each_operation(cc=(9, 0)):
    from hbkit.cuda import kernels

    assert {kernel.__name__ for kernel in kernels.SIGNATURES} >= set(KERNELS)
    for kernel in kernels.SIGNATURES:
        if kernel.__name__ in COMPILED:
            ptx = kernels.ptx(kernel, cc)
            assert ".visible .entry" in ptx and f".target sm_{cc[0]}{cc[1]}" in ptx
            wrong = [word for word in ("fma.", ".ftz", ".approx", ".local") if word in ptx]
            assert not wrong, f"{kernel.__name__}: {wrong}"
            assert ".v4." in ptx or ".v2.b64" in ptx, f"{kernel.__name__} moves single floats"
