"""Partition and the loopback exchange."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hbkit.errors import InvalidArgument, TransportError
from hbkit.shuffle import Loopback, dedupe, owner, partition, vshard

KEYS = hnp.arrays(np.int64, st.integers(0, 200))


@given(KEYS, st.integers(1, 9))
def test_partition_groups_by_owner_and_keeps_order(keys, n_ranks):
    order, counts = partition(keys, n_ranks)
    ranks = owner(keys, n_ranks)
    assert sorted(order.tolist()) == list(range(len(keys))) and counts.sum() == len(keys)
    for r, part in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        assert (ranks[part] == r).all() and (np.diff(part) > 0).all()


@given(KEYS)
def test_owner_takes_contiguous_runs_of_virtual_shards(keys):
    assert (owner(keys, 1) == 0).all()
    assert np.array_equal(owner(keys, 1024), vshard(keys))
    assert np.array_equal(owner(keys, 4), vshard(keys) // 256)


def test_owner_spreads_keys_evenly():
    counts = np.bincount(owner(np.arange(100_000), 7))
    assert len(counts) == 7 and counts.max() / counts.min() < 1.1
    for n in (0, 1025):
        with pytest.raises(InvalidArgument):
            owner(np.arange(3), n)


@given(KEYS)
def test_dedupe_restores_keys(keys):
    unique, inverse, counts = dedupe(keys)
    assert np.array_equal(unique[inverse], keys) and len(set(unique.tolist())) == len(unique)
    assert np.array_equal(np.bincount(inverse, minlength=len(unique)), counts)


@given(st.integers(1, 4), st.integers(0, 2**32))
def test_loopback_delivers_every_byte_in_rank_order(size, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, (size, size))
    data = [rng.integers(0, 256, c.sum()).astype(np.uint8) for c in counts]
    got = [None] * size

    def run(t):
        for _ in range(3):
            got[t.rank] = t.all_to_all(data[t.rank], counts[t.rank])

    threads = [threading.Thread(target=run, args=(t,)) for t in Loopback.group(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    parts = [np.split(d, np.cumsum(c)[:-1]) for d, c in zip(data, counts, strict=True)]
    for r in range(size):
        out, n = got[r]
        assert n.tolist() == counts[:, r].tolist()
        assert out.tolist() == np.concatenate([parts[s][r] for s in range(size)]).tolist()


def test_loopback_abort_ends_everyone_with_the_reason():
    a, b = Loopback.group(2)
    errors = []

    def wait():
        try:
            a.all_to_all(np.zeros(0, np.uint8), np.zeros(2, np.int64))
        except TransportError as e:
            errors.append(str(e))

    t = threading.Thread(target=wait)
    t.start()
    b.abort("out of disk")
    t.join()
    assert "rank 1: out of disk" in errors[0]
    with pytest.raises(TransportError, match="out of disk"):
        b.all_to_all(np.zeros(0, np.uint8), np.zeros(2, np.int64))


def test_loopback_lost_rank_times_out_and_bad_counts_are_refused():
    a, _ = Loopback.group(2, timeout=0.05)
    with pytest.raises(TransportError, match="did not come in time"):
        a.all_to_all(np.zeros(0, np.uint8), np.zeros(2, np.int64))
    with pytest.raises(InvalidArgument):
        a.all_to_all(np.zeros(3, np.uint8), np.array([1, 1]))
