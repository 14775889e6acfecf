"""Kernels on software devices at sizes that the simulator does not reach: 10^5 keys and lines, many blocks."""

import numpy as np
import pytest

from hbkit._ext.segment import segment_sum as c_segment_sum
from hbkit._ext.slabs import Slabs, n_state

N = 100_000


@pytest.mark.slow  # more than 20 s where kernels are compiled first
def test_sizes_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture
def soft_device(lane, device):
    """A software device; other lanes have sizes of their own."""
    if lane not in ("soft", "cuda"):
        pytest.skip(f"lane {lane}: these are the sizes of devices")
    return device


@pytest.mark.parametrize(("code", "dtype"), [(3, "bfloat16"), (4, "float16"), (5, "float32")])
def test_rules_update_many_lines_as_slabs_do(soft_device, code, dtype):
    """Adam, row-wise Adam and FTRL, with stochastic rounding."""
    from hbkit.cuda.lines import DeviceLines

    rng = np.random.default_rng(code)
    n, dim = N // 4, 8
    width = dim + n_state(code, dim, False)
    hyper = np.zeros(12, np.float32)
    hyper[:7] = [0.01, 0.1, 0.999, 0.001, 0.03, 1e-8, 0.99]
    start = np.abs(rng.standard_normal((n, width))).astype(np.float32)
    both = Slabs(width, dim=dim, row_dtype=dtype), DeviceLines(soft_device, n, width, n, dim, dtype)
    both[0].reserve(n)
    for lines in both:
        lines.scatter(np.arange(n), start)
    slots = rng.permutation(n)
    slots[rng.random(n) < 0.1] = -1
    keys = rng.integers(-(2**63), 2**63 - 1, n)
    for step in (1, 2):
        grads = rng.standard_normal((n, dim)).astype(np.float32)
        for lines in both:
            lines.apply(code, slots, grads, hyper, keys, 77, step)
    index = rng.integers(0, n, N)
    found = [np.empty((N, width), np.float32) for _ in both]
    for lines, out in zip(both, found, strict=True):
        lines.gather(slots, out, index)
    assert (found[0].view(np.uint32) == found[1].view(np.uint32)).all()


def test_sums_of_many_segments(soft_device):
    from hbkit.cuda.lines import segment_sum

    rng = np.random.default_rng(0)
    values = rng.standard_normal((N, 12)).astype(np.float32)
    segment = np.minimum(rng.zipf(1.3, N), 30_000) - 1
    got, want = segment_sum(soft_device, values, segment, 30_000), c_segment_sum(values, segment, 30_000)
    assert (got.view(np.uint32) == want.view(np.uint32)).all()


def test_an_index_of_many_keys_is_the_twins(soft_device):
    from hbkit.cuda import batch, twin
    from hbkit.cuda.index import DeviceIndex

    rng = np.random.default_rng(1)
    n, n_slots = N // 5, N // 2
    both = DeviceIndex(soft_device, n_slots, n, 1000), twin.HostIndex(twin.HostDevice(), n_slots, n, 1000)
    universe = rng.integers(-(2**63), 2**63 - 1, N)
    for _ in range(4):
        keys = rng.choice(universe, n, replace=False)
        scores = rng.integers(0, 9, n)
        results = []
        for index, device in zip(both, (soft_device, twin.HostDevice()), strict=True):
            got = index.hold(keys, scores)
            missing = batch.missing(device, got)
            placed = index.insert(missing.keys, scores[missing.at], evict=True)
            slots = device.fetch(got.slots).copy()
            slots[missing.at] = device.fetch(placed.slots)
            index.settle(slots)
            results.append([missing.at, slots, device.fetch(placed.status), device.fetch(index.find(universe))])
        for ours, theirs in zip(*results, strict=True):
            assert np.asarray(ours).tolist() == np.asarray(theirs).tolist()
    both[0].validate()
