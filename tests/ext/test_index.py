"""The key index against a dict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hbkit._ext.index import Index, dedupe, vshard
from hbkit._ext.random import mix64

KEYS = st.one_of(st.integers(-8, 8), st.integers(-(2**63), 2**63 - 1))
BATCH = st.lists(KEYS, max_size=200).map(lambda k: np.array(k, np.int64))


def naive_dedupe(keys):
    place, inverse = {}, []
    for key in keys.tolist():
        inverse.append(place.setdefault(key, len(place)))
    counts = [inverse.count(i) for i in range(len(place))]
    return list(place), inverse, counts


class IndexAgainstDict(RuleBasedStateMachine):
    """Random batches of find, insert and erase; everything is recounted after each."""

    def __init__(self):
        super().__init__()
        self.index, self.oracle = Index(), {}

    @rule(keys=BATCH)
    def find(self, keys):
        assert self.index.find(keys).tolist() == [self.oracle.get(k, -1) for k in keys.tolist()]

    @rule(keys=BATCH)
    def insert(self, keys):
        slots, is_new = self.index.find_or_insert(keys)
        for key, slot, new in zip(keys.tolist(), slots.tolist(), is_new.tolist(), strict=True):
            assert new == (key not in self.oracle)
            assert new or self.oracle[key] == slot
            assert not new or slot not in self.oracle.values()
            self.oracle[key] = slot

    @rule(keys=BATCH)
    def erase(self, keys):
        assert self.index.erase(keys).tolist() == [self.oracle.pop(k, -1) for k in keys.tolist()]

    @invariant()
    def validate(self):
        self.index.validate()
        assert len(self.index) == len(self.oracle)
        keys, slots = self.index.items()
        assert dict(zip(keys.tolist(), slots.tolist(), strict=True)) == self.oracle


IndexAgainstDict.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestIndexAgainstDict = IndexAgainstDict.TestCase


@pytest.mark.parametrize("stride", [1, 1 << 40, -(1 << 33)])
def test_index_grows_without_losing_keys(stride):
    index, keys = Index(), np.arange(300_000, dtype=np.int64) * stride
    for part in np.array_split(keys, 37):
        index.find_or_insert(part)
    assert len(index) == index.n_slots == len(keys)
    assert np.array_equal(index.find(keys), np.arange(len(keys)))
    assert (index.find(keys + 1 if abs(stride) > 1 else keys - len(keys)) == -1).all()


def test_index_batch_of_old_keys_does_not_grow():
    index = Index(48)
    keys = np.arange(48, dtype=np.int64)
    index.find_or_insert(keys)
    before = index.nbytes
    index.find_or_insert(np.tile(keys, 1000))
    assert index.nbytes == before


def test_index_reuses_slots_of_erased_keys():
    index = Index()
    slots, _ = index.find_or_insert(np.arange(100))
    assert index.erase(np.arange(50, 100)).tolist() == slots[50:].tolist()
    again, _ = index.find_or_insert(np.arange(1000, 1050))
    assert sorted(again.tolist()) == sorted(slots[50:].tolist())
    assert index.n_slots == 100


def test_index_without_memory_stays_as_it_was():
    with pytest.raises(MemoryError):
        Index(1 << 60)


@given(BATCH)
def test_dedupe_equals_naive(keys):
    unique, inverse, counts = dedupe(keys)
    assert (unique.tolist(), inverse.tolist(), counts.tolist()) == naive_dedupe(keys)


def test_dedupe_equals_numpy_at_size():
    keys = np.random.default_rng(0).zipf(1.1, 200_000) % 50_000
    unique, inverse, counts = dedupe(keys)
    assert np.array_equal(unique[inverse], keys)
    want, n = np.unique(keys, return_counts=True)
    order = np.argsort(unique)
    assert np.array_equal(unique[order], want) and np.array_equal(counts[order], n)


@given(BATCH)
def test_vshard_is_the_top_of_mix64(keys):
    assert vshard(keys).tolist() == [mix64(k % 2**64) >> 54 for k in keys.tolist()]
