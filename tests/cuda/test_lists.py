"""Rows and scales of pooled lists against plain formulas: in the simulator, and on a device where there is one."""

import numpy as np
import pytest

from hbkit import errors


def test_lists_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_lists_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.fixture
def device(device, lane):
    if lane == "cpu":
        pytest.skip("lane cpu: host memory makes them by NumPy, which is the oracle")
    return device


@pytest.mark.parametrize("lengths", [[0, 3, 0, 0, 1, 2, 0], [5], [1] * 9, [0, 0]])
@pytest.mark.parametrize("scaled", [(False, False), (True, False), (False, True), (True, True)])
def test_lists_spread_over_their_keys(device, lengths, scaled):
    from hbkit.cuda.lists import spread_lists

    rng = np.random.default_rng(0)
    splits, n = np.concatenate([[0], np.cumsum(lengths)]), sum(lengths)
    row_scale, weight = (
        rng.random(m).astype(np.float32) if s else None for m, s in zip((len(lengths), n), scaled, strict=True)
    )
    rows = device.empty((n,), np.int64)
    scale = device.empty((n,), np.float32) if any(scaled) else None
    spread_lists(device, splits, row_scale, weight, 4, 3, rows, scale)
    of = np.repeat(np.arange(len(lengths)), lengths)
    assert np.array_equal(device.fetch(rows), 4 + 3 * of)
    if scale is not None:
        want = np.ones(n, np.float32) if row_scale is None else row_scale[of]
        assert np.array_equal(device.fetch(scale), want if weight is None else want * weight)


def test_splits_that_do_not_hold_the_keys_are_an_error(device):
    from hbkit.cuda.lists import spread_lists

    rows = device.empty((4,), np.int64)
    spread_lists(device, np.array([0, 1, 3]), None, None, 0, 1, rows, None)
    with pytest.raises(errors.InvalidArgument, match="outside its values"):
        device.sync()
