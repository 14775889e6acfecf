"""Partition and distinct keys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hbkit.errors import InvalidArgument
from hbkit.shuffle import dedupe, owner, partition, vshard
from hbkit.shuffle.residuals import Residuals

KEYS = hnp.arrays(np.int64, st.integers(0, 200))


@given(KEYS, st.integers(1, 9))
def test_partition_groups_by_owner_and_keeps_order(keys, n_ranks):
    order, place, counts = partition(keys, n_ranks)
    ranks = owner(keys, n_ranks)
    assert np.array_equal(place[order], np.arange(len(keys))) and counts.sum() == len(keys)
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
        for call in (owner, partition):
            with pytest.raises(InvalidArgument):
                call(np.arange(3), n)


@given(KEYS)
def test_dedupe_restores_keys(keys):
    unique, inverse, counts = dedupe(keys)
    assert np.array_equal(unique[inverse], keys) and len(set(unique.tolist())) == len(unique)
    assert np.array_equal(np.bincount(inverse, minlength=len(unique)), counts)


@given(st.lists(hnp.arrays(np.int64, st.integers(0, 12), elements=st.integers(0, 20), unique=True)))
def test_residuals_remember_the_keys_that_came_first(batches):
    residuals, held = Residuals(7, 2), {}
    for i, keys in enumerate(batches):
        slots, rows = residuals.take(keys)
        for k in keys.tolist():
            if k not in held and len(held) < 7:
                held[k] = np.zeros(2)
        assert rows.tolist() == [held.get(k, np.zeros(2)).tolist() for k in keys.tolist()]
        assert (slots >= 0).tolist() == [k in held for k in keys.tolist()] and len(residuals) == len(held)
        rows += np.float32(i + 1)
        residuals.put(slots, rows)
        held |= {k: row for k, row in zip(keys.tolist(), rows, strict=True) if k in held}
