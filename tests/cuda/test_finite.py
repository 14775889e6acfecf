"""NaN and infinities in device memory against NumPy."""

import numpy as np
import pytest

BAD = (np.nan, -np.nan, np.inf, -np.inf)


def test_finite_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_finite_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture
def finite(lane, device):
    """`Finite` of the lane's device."""
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda.finite import Finite

    return Finite(device)


def ends(rng, *shape):
    """Finite floats, the largest and the smallest among them."""
    finfo = np.finfo(np.float32)
    some = np.array([0, -0.0, 1e-45, finfo.max, finfo.min, finfo.tiny, 1], np.float32)
    return some[rng.integers(0, len(some), shape)]


def fine(device, finite, *arrays):
    return device.fetch(finite.look(*arrays)).tolist() == [0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 8), (67, 3)])
def test_all_finite_finds_every_bad_value(device, finite, shape):
    rng = np.random.default_rng(0)
    values, scale = ends(rng, *shape), ends(rng, 7)
    sent, sent_scale = device.send(values), device.send(scale)
    assert fine(device, finite, sent) and fine(device, finite, sent, sent_scale)
    for bad, at in zip(BAD, (0, -1, *rng.integers(0, values.size, 2)), strict=True):
        wrong = values.copy()
        wrong.flat[at] = bad
        assert not fine(device, finite, device.send(wrong), sent_scale)
        wrong = scale.copy()
        wrong[rng.integers(0, 7)] = bad
        assert not fine(device, finite, sent, device.send(wrong))
    assert fine(device, finite, sent, sent_scale)  # what was found is forgotten


def test_no_values_are_finite(device, finite):
    assert fine(device, finite, device.empty((0, 4), np.float32), device.empty((0,), np.float32))
    slots, n_skipped = finite.skip_bad(device.empty((0,), np.int64), device.empty((0, 4), np.float32))
    assert slots.shape == (0,) and n_skipped == 0


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (20, 3), (33, 8), (5, 40)])
def test_skip_bad_leaves_out_what_is_not_finite(device, finite, any_order, n, dim):
    rng = np.random.default_rng(dim)
    for n_bad in (0, 1, n):
        sums, slots = ends(rng, n, dim), rng.permutation(n + 3)[:n] - 1
        rows = rng.permutation(n)[:n_bad]
        sums[rows, rng.integers(0, dim, n_bad)] = np.array(BAD)[rng.integers(0, 4, n_bad)]
        found, n_skipped = finite.skip_bad(device.send(slots), device.send(sums))
        ok = np.isfinite(sums).all(axis=1)
        assert device.fetch(found).tolist() == np.where(ok, slots, -1).tolist()
        assert n_skipped == np.count_nonzero(~ok & (slots >= 0))
