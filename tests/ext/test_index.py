"""The key index against a dict."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hbkit._ext import isa
from hbkit._ext.batch import mixed
from hbkit._ext.index import Index, vshard
from hbkit._ext.pool import fail_allocation
from hbkit._ext.random import mix64
from hbkit.errors import InvalidArgument

WORD = 2**64 - 1
EXTREMES = [0, 1, 2, -1, 2**63 - 1, -(2**63)]


def unmix(y):
    """The key whose mix64 is y."""

    def unshift(y, by):
        return y ^ y >> by ^ y >> 2 * by

    y = unshift(y, 31) * pow(0x94D049BB133111EB, -1, 2**64) & WORD
    y = unshift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & WORD
    return unshift(y, 30)


def keys_of_mixes(mixes):
    return np.array([unmix(y) for y in mixes], np.uint64).view(np.int64)


# Keys of one home: the same leading and the same last bits of their mixes.
CROWD = keys_of_mixes((0xABC << 52) + (i << 32) + 7 for i in range(2000))
KEYS = st.one_of(
    st.integers(-8, 8),
    st.sampled_from(EXTREMES),
    st.sampled_from(CROWD[:300].tolist()),
    st.integers(-(2**63), 2**63 - 1),
)
BATCH = st.lists(KEYS, max_size=200).map(lambda k: np.array(k, np.int64))


@pytest.fixture(autouse=True)
def same_isa_after():
    before = isa.name()
    yield
    isa.use(before)
    fail_allocation(0)


class IndexAgainstDict(RuleBasedStateMachine):
    """Random batches of find, insert and erase; everything is recounted after each."""

    @initialize(name=st.sampled_from(isa.available()))
    def start(self, name):
        isa.use(name)
        self.index, self.oracle = Index(), {}

    @rule(name=st.sampled_from(isa.available()))
    def switch(self, name):
        isa.use(name)

    @rule(keys=BATCH)
    def find(self, keys):
        assert self.index.find(keys).tolist() == [self.oracle.get(k, -1) for k in keys.tolist()]

    @rule(keys=BATCH)
    def insert(self, keys):
        self.check_insert(keys)

    @rule(first=st.integers(-(2**40), 2**40), n=st.integers(0, 3000), stride=st.sampled_from([1, 7, 1 << 33]))
    def insert_many(self, first, n, stride):
        self.check_insert(first + stride * np.arange(n, dtype=np.int64))

    def check_insert(self, keys):
        slots, is_new = self.index.find_or_insert(keys)
        held = set(self.oracle.values())
        free = iter(s for s in itertools.count() if s not in held)  # the least slots, in batch order
        for key, slot, new in zip(keys.tolist(), slots.tolist(), is_new.tolist(), strict=True):
            assert new == (key not in self.oracle)
            assert slot == (next(free) if new else self.oracle[key])
            self.oracle[key] = slot

    @rule(keys=BATCH)
    def erase(self, keys):
        self.check_erase(keys)

    @rule(part=st.sampled_from([2, 3, 50]))
    def erase_all_but_a_part(self, part):
        self.check_erase(np.array([k for i, k in enumerate(self.oracle) if i % part], np.int64))

    def check_erase(self, keys):
        assert self.index.erase(keys).tolist() == [self.oracle.pop(k, -1) for k in keys.tolist()]

    @invariant()
    def validate(self):
        self.index.validate()
        assert len(self.index) == len(self.oracle)
        keys, slots = self.index.items()
        assert dict(zip(keys.tolist(), slots.tolist(), strict=True)) == self.oracle
        assert (np.diff(slots) > 0).all()


IndexAgainstDict.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestIndexAgainstDict = IndexAgainstDict.TestCase


@pytest.mark.parametrize("stride", [1, 1 << 40, -(1 << 33)])
def test_index_grows_without_losing_keys(stride):
    index, keys = Index(), np.arange(300_000, dtype=np.int64) * stride
    for part in np.array_split(keys, 37):
        index.find_or_insert(part)
    assert len(index) == index.n_slots == len(keys)
    assert np.array_equal(index.find(keys), np.arange(len(keys)))
    assert (index.find(keys + 1 if abs(stride) > 1 else keys - len(keys)) == -1).all()
    index.validate()


def test_index_stays_within_its_memory_at_every_moment():
    index, keys = Index(), np.random.default_rng(0).integers(-(2**63), 2**63, 3_000_000)
    batches = np.array_split(keys, 300)
    for part in batches:
        index.find_or_insert(part)
        assert len(index) < 1_000_000 or index.nbytes <= 24 * len(index)
    index.validate()
    assert np.array_equal(index.find(keys[::7].copy()), np.arange(len(keys))[::7])
    while len(index) > 1_000_000:
        index.erase(batches.pop())
        assert len(index) < 1_000_000 or index.nbytes <= 24 * len(index)
    index.validate()
    assert np.array_equal(index.find(batches[0]), np.arange(len(batches[0])))


def test_index_of_a_capacity_takes_16_bytes_a_key_at_load_8_in_10_and_does_not_grow():
    index = Index(1_000_000)
    before = index.nbytes
    assert before < 18 * 1_000_000
    index.find_or_insert(np.arange(1_000_000))
    assert index.nbytes == before
    index.validate()


@pytest.mark.parametrize(
    "keys",
    [
        CROWD,
        keys_of_mixes((0xABCDEF << 40) + i * 2654435761 % 2**32 for i in range(60_000)),  # one shard
        keys_of_mixes((i % 1024 << 54) + (0xFFFFFFFF - i // 1024) for i in range(3000)),  # the last buckets: wrap
        np.array(EXTREMES),
    ],
    ids=["one home", "one shard", "last buckets", "extremes"],
)
def test_index_takes_hostile_keys(keys):
    index = Index()
    assert index.find_or_insert(keys)[1].all()
    index.validate()
    assert np.array_equal(index.find(keys), np.arange(len(keys)))
    assert index.erase(keys[::3].copy()).tolist() == list(range(0, len(keys), 3))
    index.validate()
    assert (index.find(keys[::3].copy()) == -1).all()
    assert np.array_equal(index.find(keys[1::3].copy()), np.arange(len(keys))[1::3])


def test_index_gives_the_same_slots_on_every_isa():
    rng = np.random.default_rng(1)
    old, batch = rng.integers(-(2**63), 2**63, 100_000), rng.integers(0, 30_000, 100_000)
    seen = []
    for name in isa.available():
        isa.use(name)
        index = Index()
        index.find_or_insert(old)
        erased = index.erase(old[::5].copy())
        slots, is_new = index.find_or_insert(np.concatenate([batch, old[::10]]))
        seen.append([a.tobytes() for a in (erased, slots, is_new, index.find(batch), *index.items())])
        index.validate()
    assert all(s == seen[0] for s in seen)


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
    assert again.tolist() == slots[50:].tolist()
    assert index.n_slots == 100


def test_index_writes_to_arrays_it_is_given():
    index, keys = Index(), np.arange(5)
    slots, is_new = np.empty(5, np.int64), np.empty(5, np.bool_)
    assert index.find_or_insert(keys, slots, is_new)[0] is slots
    assert is_new.all() and slots.tolist() == keys.tolist()
    assert index.find(keys, slots) is slots and index.erase(keys, slots) is slots
    for bad in (np.empty(4, np.int64), np.empty(5, np.int32), np.empty(10, np.int64)[::2]):
        with pytest.raises(InvalidArgument):
            index.find(keys, bad)


def test_index_without_memory_stays_as_it_was():
    for capacity in (1 << 33, 1 << 60):
        with pytest.raises(MemoryError):
            Index(capacity)


OLD, MORE = np.arange(20_000), np.arange(10_000, 70_000)
CHANGES = {
    "insert": lambda index: index.find_or_insert(MORE),
    "insert into free slots": lambda index: (index.erase(OLD[::2].copy()), index.find_or_insert(MORE)),
    "erase": lambda index: index.erase(OLD),
    "find": lambda index: index.find(OLD),
    "create": lambda index: Index(100_000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_index_survives_the_failure_of_any_allocation(change):
    """Every one, in turn: MemoryError and all as it was, but for shrinking, which may be left out."""
    n_raised = 0
    for nth in itertools.count(1):
        index = Index()
        index.find_or_insert(OLD)
        index.erase(np.array([3, 1, 4]))
        fail_allocation(nth)
        before = [index]
        try:
            change(index)
        except MemoryError:
            n_raised += 1
            fail_allocation(0)
            index.validate()
            del before
            keys, slots = index.items()
            if change is CHANGES["insert into free slots"] and len(index) < 19_000:  # the erasing succeeded
                assert np.array_equal(keys, np.setdiff1d(OLD[1::2], [3, 1]))
            else:
                assert np.array_equal(keys, np.setdiff1d(OLD, [3, 1, 4])) and index.n_slots == len(OLD)
            assert np.array_equal(keys, slots)
            change(index)
            index.validate()
        if fail_allocation(0):
            break
    assert n_raised > 0


@pytest.mark.parametrize("erased", [0, 500, 4000])
def test_index_takes_an_insert_back(erased):
    index, twin, keys = Index(), Index(), np.arange(30_000)
    for i in (index, twin):
        i.find_or_insert(keys[:10_000])
        i.erase(keys[:erased])
    n_slots, batch = index.n_slots, np.concatenate([keys[5000:], keys[8000:20_000]])
    index.take_back(batch, index.find_or_insert(batch)[1], n_slots)
    index.validate()
    assert index.n_slots == n_slots and all(map(np.array_equal, index.items(), twin.items()))
    assert np.array_equal(index.find_or_insert(batch)[0], twin.find_or_insert(batch)[0])


def test_index_may_be_read_while_it_changes():
    index, keys = Index(), np.arange(200_000)
    index.find_or_insert(keys[:1000])
    wrong, done = [], threading.Event()

    def read():
        while not done.is_set():
            if not np.array_equal(index.find(keys[:1000]), keys[:1000]):
                wrong.append("a key got lost")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for r in readers:
        r.start()
    for part in np.array_split(keys[1000:], 50):
        index.find_or_insert(part)
    index.erase(keys[1000:])
    done.set()
    for r in readers:
        r.join()
    assert not wrong
    index.validate()


@given(BATCH)
def test_vshard_is_the_top_of_mix64(keys):
    assert vshard(keys).tolist() == [mix64(k % 2**64) >> 54 for k in keys.tolist()]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=20))
@settings(max_examples=20)
def test_index_part_gives_the_keys_whose_mix_is_in_the_range(ranges):
    index, keys = Index(), np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 200_000)
    for end in (0, 3, 200, 200_000):
        index.find_or_insert(keys[:end])
        mix = mixed(keys[:end])
        for a, b in [*ranges, (0, 2**64 - 1), (5, 5)]:
            first, last = min(a, b), max(a, b)
            within = (mix >= np.uint64(first)) & (mix <= np.uint64(last))
            assert sorted(index.part(first, last).tolist()) == sorted(keys[:end][within].tolist())
