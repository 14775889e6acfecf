"""CUDA kernels against NumPy oracles and the C kernels, bit for bit; and what they compile to.

They run in Numba's simulator (this file runs itself once more in a process of its own, since the simulator is chosen
before Numba is imported), and on a real device where there is one.
"""

import importlib.util
import os

import numpy as np
import pytest

from hbkit._ext.segment import segment_sum as c_segment_sum
from hbkit._ext.slabs import Slabs
from hbkit.errors import DeviceUnavailable, InvalidArgument, Unsupported

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
NUMBA_CUDA = importlib.util.find_spec("numba_cuda") is not None


def has_device() -> bool:
    if SIMULATED:
        return True
    if not NUMBA_CUDA:
        return False
    from numba import cuda

    return cuda.is_available()


on_device = pytest.mark.skipif(not has_device(), reason="no CUDA device: see test_kernels_in_the_simulator")
compiles = pytest.mark.skipif(SIMULATED or not NUMBA_CUDA, reason="numba-cuda is not installed: no PTX")
KERNELS = ("gather", "scatter", "segment_sum", "sgd", "momentum", "adagrad", "rowwise_adagrad")


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_kernels_in_the_simulator(in_simulator):
    in_simulator(__file__)


def values(rng, *shape):
    """Floats of very different size, denormals and zeros among them."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 4, shape)
    x[rng.random(shape) < 0.1] = 1e-40
    x[rng.random(shape) < 0.1] = 0
    return x.astype(np.float32)


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


def oracle_apply(kernel, line, g, h):
    dim = len(g)
    row, state = line[:dim], line[dim:]
    if kernel == "sgd":
        row -= h[0] * g
    elif kernel == "momentum":
        state[:] = h[1] * state + g
        row -= h[0] * state
    elif kernel == "adagrad":
        state += g * g
        row -= h[0] * (g / (np.sqrt(state) + h[1]))
    else:
        p = np.zeros(16, np.float32)
        for j, x in enumerate(g):
            p[j % 16] += x * x
        while len(p) > 1:
            p = p[: len(p) // 2] + p[len(p) // 2 :]
        state[0] += p[0] / np.float32(dim)
        row -= (h[0] / (np.sqrt(state[0]) + h[1])) * g


def bits(a):
    return np.ascontiguousarray(a).view(np.uint32).tolist()


@pytest.fixture(scope="module")
def device():
    from hbkit.cuda.device import Device

    return Device()


@on_device
@pytest.mark.parametrize("batch_lines", [3, 100])
def test_lines_scatter_then_gather(device, batch_lines):
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(0)
    lines = DeviceLines(device, 20, 5, batch_lines)
    data, slots = values(rng, 20, 5), rng.permutation(20)
    lines.scatter(slots, data)
    want = np.zeros((20, 5), np.float32)
    want[slots] = data
    asked = np.array([3, -1, 7, 7, 0])
    out = np.empty((5, 2), np.float32)
    lines.gather(asked, out)
    assert bits(out) == bits(np.where(asked[:, None] >= 0, want[asked, :2], np.float32(0)))
    lines.gather(asked[:0], out[:0])


@on_device
@pytest.mark.parametrize("kernel", ["sgd", "momentum", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("dim", [1, 7, 37])
def test_apply_matches_oracle_and_c(device, kernel, dim):
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(dim)
    code, n_state = {"sgd": (0, 0), "momentum": (0, dim), "adagrad": (1, dim), "rowwise_adagrad": (2, 1)}[kernel]
    hyper = np.zeros(8, np.float32)
    hyper[:2] = 0.1, {"sgd": 0, "momentum": 0.9}.get(kernel, 1e-8)
    width = dim + n_state
    start = values(rng, 6, width)
    start[:, dim:] = np.abs(start[:, dim:])
    on_gpu, on_cpu, want = DeviceLines(device, 6, width, 4), Slabs(width), start.copy()
    on_cpu.reserve(6)
    on_cpu.scatter(np.arange(6), start)
    on_gpu.scatter(np.arange(6), start)
    for _ in range(2):
        slots, grads = np.array([4, -1, 0, 5, 2]), values(rng, 5, dim)
        on_gpu.apply(code, slots, grads, hyper)
        on_cpu.apply(code, slots, grads, hyper)
        for slot, g in zip(slots, grads, strict=True):
            if slot >= 0:
                oracle_apply(kernel, want[slot], g, hyper)
    a, b = np.empty_like(start), np.empty_like(start)
    on_gpu.gather(np.arange(6), a)
    on_cpu.gather(np.arange(6), b)
    assert bits(a) == bits(want) == bits(b)


@on_device
@pytest.mark.parametrize("n", [0, 1, 64, 65, 300])
def test_segment_sum_matches_oracle_and_c(device, n):
    from hbkit.cuda.lines import segment_sum

    rng = np.random.default_rng(n)
    v, segment, rows = values(rng, 9, 3), rng.zipf(1.5, n) % 4, rng.integers(0, 9, n)
    scale = rng.standard_normal(n).astype(np.float32)
    got = segment_sum(device, v, segment, 5, rows, scale)
    assert bits(got) == bits(oracle_sum(v, segment, 5, rows, scale)) == bits(c_segment_sum(v, segment, 5, rows, scale))


@on_device
def test_segment_sum_without_rows_or_scale(device):
    from hbkit.cuda.lines import segment_sum

    rng = np.random.default_rng(0)
    v, segment = values(rng, 70, 2), np.zeros(70, np.int64)
    assert bits(segment_sum(device, v, segment, 1)) == bits(c_segment_sum(v, segment, 1))


@on_device
def test_error_word_raises_at_sync_once(device):
    from hbkit.cuda import kernels
    from hbkit.cuda.lines import DeviceLines, segment_sum

    lines = DeviceLines(device, 4, 2, 10)
    lines.scatter(np.arange(4), np.ones((4, 2), np.float32))
    for slots in ([0, 4], [-2, 1]):
        with pytest.raises(InvalidArgument, match="slot is outside"):
            lines.gather(np.array(slots), np.empty((2, 2), np.float32))
    for code in (0, 1):
        with pytest.raises(InvalidArgument, match="slot is outside"):
            lines.apply(code, np.array([9]), np.ones((1, 1), np.float32), np.zeros(8, np.float32))
    with pytest.raises(InvalidArgument, match="slot is outside"):
        lines.scatter(np.array([-1]), np.ones((1, 2), np.float32))
    with pytest.raises(InvalidArgument, match="reaches outside"):
        segment_sum(device, np.ones((2, 1), np.float32), np.zeros(1, np.int64), 1, np.array([2]))
    device.sync()  # each was reported once
    out = np.empty((4, 2), np.float32)
    lines.gather(np.arange(4), out)
    assert (out == 1).all()  # and nothing was written
    assert len(kernels.SIGNATURES) == len(KERNELS)


@on_device
def test_apply_refuses_what_has_no_kernel_or_does_not_fit(device):
    from hbkit.cuda.lines import DeviceLines

    lines, hyper = DeviceLines(device, 4, 6, 10), np.ones(8, np.float32)
    for rule, name in ((3, "Adam"), (4, "RowWiseAdam"), (5, "Ftrl")):
        with pytest.raises(Unsupported, match=name):
            lines.apply(rule, np.arange(2), np.ones((2, 2), np.float32), hyper)
    for grads in (np.ones((2, 6), np.float32), np.ones((1, 2), np.float32)):
        with pytest.raises(InvalidArgument):
            lines.apply(1, np.arange(2), grads, hyper)


@pytest.mark.skipif(has_device(), reason="there is a CUDA device")
def test_device_unavailable_names_the_remedy():
    from hbkit.cuda.device import Device

    with pytest.raises(DeviceUnavailable, match=r"hbkit\[cuda\]"):
        Device()


@compiles
@pytest.mark.parametrize("cc", [(8, 0), (9, 0), (10, 0)], ids=["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_to_ptx_that_rounds_each_operation(name, cc):
    from numba import cuda

    from hbkit.cuda import kernels

    kernel = getattr(kernels, name)
    ptx, _ = cuda.compile_ptx(kernel, kernels.SIGNATURES[kernel], cc=cc)
    assert ".visible .entry" in ptx
    assert "fma." not in ptx and ".ftz" not in ptx and ".approx" not in ptx
