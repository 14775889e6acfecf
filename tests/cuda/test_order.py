"""The order of a batch's positions by key on the device against NumPy, in whatever order threads run."""

import importlib.util
import os

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def test_order_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_order_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


def oracle(inverse):
    """Positions by key, and where each key's begin."""
    return np.lexsort((np.arange(len(inverse)), inverse)).tolist(), [0, *np.cumsum(np.bincount(inverse)).tolist()]


def batches(lane):
    """Numbers of the keys of batches, every number from 0 on among them: one pass, two and three."""
    rng = np.random.default_rng(0)
    n = 80 if lane == "cudasim" else 50_000
    yield np.zeros(1, np.int64)
    yield rng.permutation(n)
    for n_keys, n_ids in ((1, n), (4, 4 * n), (17, n)):  # as many bits as fill digits, and fewer
        rest = np.minimum(rng.geometric(0.3, n_ids - n_keys) - 1, n_keys - 1)
        yield np.concatenate([np.arange(n_keys), rest])
    inverse = np.unique(rng.zipf(1.3, n), return_inverse=True)[1]
    yield inverse.max() - inverse  # frequent keys last
    if lane == "cuda":
        yield inverse
        for n_keys in (1 << 10, (1 << 10) + 1, 1 << 20, (1 << 20) + 1):
            yield np.append(rng.integers(0, n_keys, 1_200_000), np.arange(n_keys))


def test_oracle_is_a_stable_sort(lane):
    for inverse in batches(lane):
        order, starts = oracle(inverse)
        assert order == np.argsort(inverse, kind="stable").tolist()
        assert (inverse[order] == np.repeat(np.arange(len(starts) - 1), np.diff(starts))).all()


@pytest.mark.skipif(not (SIMULATED or importlib.util.find_spec("numba_cuda")), reason="numba-cuda is not installed")
def test_plans_stay_within_their_memory():
    from hbkit.cuda import order

    rng = np.random.default_rng(0)
    for n in (1, 2, 31, 1024, 1025, 1 << 20, 2**30 - 1, *(2 ** rng.uniform(0, 30, 500)).astype(int).tolist()):
        for n_distinct in (1, 2, n, *rng.integers(1, n + 1, 5).tolist()):
            n_passes, bits, log = order.plan(n, min(n, n_distinct))
            n_tiles = -(-n >> log)
            assert (
                bits <= order.MAX_BITS and 2 ** (n_passes * bits) >= n_distinct and n_passes <= max(3, 15 * SIMULATED)
            )
            assert n_tiles <= order.MAX_TILES and 2**log >= order.WARP
            assert n_tiles << bits <= order.counts_of(n)


@pytest.mark.parametrize("many", [False, True])
def test_order_matches_oracle_in_any_order(lane, device, any_order, many, monkeypatch):
    if lane == "cpu" or (many and lane in ("soft", "cuda")):
        pytest.skip(f"lane {lane}: no device, or its kernels are compiled already")
    from hbkit.cuda import order as module
    from hbkit.cuda.batch import Room
    from hbkit.cuda.order import Order

    if many:  # more digits than a warp has lanes, and more tiles; else fewer of both
        for name, value in (("MAX_BITS", 5), ("ROOM", 32), ("MAX_TILES", 40)):
            monkeypatch.setattr(module, name, value)

    most = max(len(b) for b in batches(lane))
    run, room = Order(device, most), Room(device, most)
    for inverse in batches(lane):
        n, counts = len(inverse), np.bincount(inverse)
        for array, some in ((room.inverse, inverse), (room.counts, counts)):
            array[: len(some)].copy_to_device(some)
        run(room, n, len(counts))
        order, starts = oracle(inverse)
        assert device.fetch(room.order[:n]).tolist() == order
        assert device.fetch(room.starts[: len(counts) + 1]).tolist() == starts
    run(room, 0, 0)


def test_order_of_what_dedupe_gives(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda.batch import Room
    from hbkit.cuda.dedupe import Dedupe
    from hbkit.cuda.order import Order

    keys = np.random.default_rng(3).zipf(1.2, 200).astype(np.int64)
    dedupe, run, room = Dedupe(device, 200), Order(device, 200), Room(device, 200)
    found = dedupe(keys, room)
    run(room, found.n, found.n_distinct)
    order, starts = (device.fetch(a) for a in (room.order, room.starts[: found.n_distinct + 1]))
    for k, key in enumerate(device.fetch(found.keys)):
        assert order[starts[k] : starts[k + 1]].tolist() == np.flatnonzero(keys == key).tolist()
