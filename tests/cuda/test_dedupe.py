"""Distinct keys on the device against NumPy, in whatever order threads run."""

import numpy as np
import pytest

from hbkit.errors import InvalidArgument


def test_dedupe_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_dedupe_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


def oracle(keys):
    """Distinct keys by first occurrence, counts, inverse."""
    ascending, firsts, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(firsts)
    rank = np.argsort(order)
    return ascending[order], counts[order], rank[inverse]


def batches(lane):
    """Batches of every kind, small ones in the simulator."""
    rng = np.random.default_rng(0)
    n = 90 if lane == "cudasim" else 100_000
    ends = np.array([0, -1, 1, 2**63 - 1, -(2**63)])
    yield ends[rng.integers(0, 5, 40)]
    yield np.zeros(n, np.int64)  # one key
    yield rng.permutation(n).astype(np.int64)  # all distinct
    yield rng.zipf(1.3, n).astype(np.int64)
    yield rng.integers(-(2**63), 2**63 - 1, 1)


def test_oracle_gives_the_batch_back(lane):
    for keys in batches(lane):
        distinct, counts, inverse = oracle(keys)
        assert (distinct[inverse] == keys).all() and (np.bincount(inverse) == counts).all()
        assert (np.diff([np.flatnonzero(keys == k)[0] for k in distinct[:50]]) > 0).all()


def test_distinct_keys_match_oracle_in_any_order(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda.batch import Room
    from hbkit.cuda.dedupe import Dedupe

    most = 90 if lane == "cudasim" else 100_000
    dedupe, rooms = Dedupe(device, most), [Room(device, most) for _ in range(2)]
    before = None
    for keys in batches(lane):  # one after the other: each leaves the table free
        rooms.reverse()
        got = dedupe(keys, rooms[0]), oracle(keys)
        for found, wanted in (got, before or got):  # a room is left alone until it is given again
            assert (found.n, found.n_distinct) == (len(wanted[2]), len(wanted[0]))
            for a, want in zip((found.keys, found.counts, found.inverse), wanted, strict=True):
                assert device.fetch(a).tolist() == want.tolist()
        before = got
    assert (device.fetch(dedupe._table) == -1).all()
    assert dedupe(keys[:0], rooms[0]).keys.shape == (0,)


def test_keys_of_one_cell_find_others(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda import dedupe

    # A table as full as it gets: 31 keys in 32 cells, so most of them walk.
    n = 31
    keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, n)
    keys = keys[np.random.default_rng(2).integers(0, n, 3 * n)]
    table, cells = device.send(np.full(32, -1, np.int32)), device.empty((3 * n,), np.int32)
    device.launch(dedupe.claim, 3 * n, device.send(keys), table, cells)
    table, cells = device.fetch(table), device.fetch(cells)
    distinct, _, inverse = oracle(keys)
    firsts = np.array([np.flatnonzero(keys == k)[0] for k in distinct])
    assert (table[cells] == firsts[inverse]).all()


def test_dedupe_refuses_what_does_not_fit(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda.batch import Room
    from hbkit.cuda.dedupe import Dedupe

    for keys in (np.zeros(5, np.int64), np.zeros(4, np.int32), np.zeros((2, 2), np.int64)):
        for most in ((4, 9), (9, 4)) if len(keys) == 5 else ((4, 4),):
            with pytest.raises(InvalidArgument, match="dedupe of 4 keys"):
                Dedupe(device, most[0])(keys, Room(device, most[1]))
    with pytest.raises(InvalidArgument):
        Dedupe(device, 0)
