"""The parts in host memory: against models and NumPy, and the parts of a device against them, call for call."""

import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hbkit._ext import batch as _ext
from hbkit.cuda.batch import (
    DIRTY,
    EVICTED_CLEAN,
    FOUND,
    MAX_SCORE,
    MOST_PINS,
    MOST_STAMP,
    NEW,
    PIN,
    REFUSED,
    SOON,
    Room,
    missing,
)
from hbkit.cuda.parts import open_parts
from hbkit.errors import DeviceUnavailable, InvalidArgument

pytest.importorskip("numba")
from hbkit.cuda.twin import HostDevice, HostIndex  # it needs Numba

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
ALL64 = 2**64 - 1
MIXES = 0x9FB2_1C65_1E98_DF25, 0xD6E8_FEB8_6659_FD93

here = pytest.mark.skipif(SIMULATED, reason="the simulator has nothing to do with it")


@here
def test_twin_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_twin_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@here
@pytest.mark.slow
@pytest.mark.parametrize("room", ["store", "embedding"])
def test_rooms_above_do_nothing_that_device_arrays_cannot(room, tmp_path):
    tests = pathlib.Path(__file__).parents[1]
    options = "-q", "-p", "narrow", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not simulator"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests / room / "test_device.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(tests / "cuda")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def int64s(values):
    return np.array(values, np.int64)


# --- the index against a model ------------------------------------------------------------------------------------


class Model:
    """Slots as a dictionary of entries; each call goes through the keys one by one, as its docstring has it."""

    def __init__(self, n_buckets, width, n_side):
        self.n_buckets, self.width, self.n_slots, self.n_side = n_buckets, width, n_buckets * width, n_side
        self.entries = {}

    def buckets(self, key):
        """The slots of the bucket that a key tries first, and those of the other."""
        x = (key & ALL64) * MIXES[0] & ALL64
        x = (x ^ x >> 32) * MIXES[1] & ALL64
        x ^= x >> 32
        both = [half * self.n_buckets >> 32 for half in (x & 0xFFFF_FFFF, x >> 32)]
        both = [range(b * self.width, (b + 1) * self.width) for b in both]
        one, two = (sum(slot not in self.entries for slot in slots) for slots in both)
        return both if one > self.width // 4 or one >= two else both[::-1]

    def side(self):
        return range(self.n_slots, self.n_slots + self.n_side)

    def find(self, key):
        return next((slot for slot, e in self.entries.items() if e.key == key), -1)

    def hold(self, key, score, add):
        slot = self.find(key)
        if slot >= 0:
            e = self.entries[slot]
            e.pins, e.soon, e.score = e.pins + 1, 0, min(max(score, 0) + add * e.score, MAX_SCORE)
        return slot

    def rank(self, slot):
        e = self.entries[slot]
        return e.soon, e.score, e.dirty, slot

    def give(self, key, score, slots, evict):
        """Slot, status and victim of a key that is new."""
        free = [slot for slot in slots if slot not in self.entries]
        victims = [slot for slot in slots if slot in self.entries and not self.entries[slot].pins]
        if not free and not (evict and victims):
            return -1, REFUSED, None
        slot = free[0] if free else min(victims, key=self.rank)
        victim = self.entries.pop(slot, None)
        score = min(max(score, 0), MAX_SCORE)
        self.entries[slot] = SimpleNamespace(key=key, pins=1, soon=0, score=score, dirty=0, freq=0, last_step=0)
        return slot, NEW if victim is None else EVICTED_CLEAN + victim.dirty, victim

    def place(self, placed, keys, scores, tries):
        """Give those slots that were refused so far: `tries` says where, and whether to evict."""
        for where, evict in tries:
            for i, key in enumerate(keys):
                if placed[i][0] < 0:
                    placed[i] = self.give(key, scores[i], where[i], evict)
        return placed

    def insert(self, keys, scores, evict, add):
        placed = [(self.hold(key, score, add), FOUND, None) for key, score in zip(keys, scores, strict=True)]
        firsts, seconds = zip(*map(self.buckets, keys), strict=True) if keys else ((), ())
        return self.place(placed, keys, scores, [(firsts, evict), (seconds, evict), ([self.side()] * len(keys), False)])

    def drain(self):
        old = [slot for slot in self.side() if slot in self.entries and not self.entries[slot].pins]
        moving = [self.entries[slot] for slot in old]
        keys, zeros = [e.key for e in moving], [0] * len(old)
        firsts, seconds = zip(*map(self.buckets, keys), strict=True) if keys else ((), ())
        placed = self.place([(-1, REFUSED, None)] * len(old), keys, zeros, [(firsts, True), (seconds, True)])
        for slot, e, (new, _, _) in zip(old, moving, placed, strict=True):
            if new >= 0:
                del self.entries[slot]
                self.entries[new] = e
        return old, placed


def words_of(index):
    keys, slots = index.contents()
    return dict(zip(slots.tolist(), zip(keys.tolist(), index._words[slots].tolist(), strict=True), strict=True))


def word(e):
    return e.pins * PIN + e.soon * SOON + 2 * e.score + e.dirty


def same_placement(index, placement, want):
    """A placement, its counts, and the victims that were dirty."""
    slots, status, victims = zip(*want, strict=True) if want else ((), (), ())
    assert placement.slots.tolist() == list(slots) and placement.status.tolist() == list(status)
    assert [placement.victims[i] for i, e in enumerate(victims) if e] == [e.key for e in victims if e]
    counts = (placement.n_new, placement.n_evicted, placement.n_refused, placement.n_dirty)
    dirty = [(e.key, e.freq, e.last_step, slot) for e, slot in zip(victims, slots, strict=True) if e and e.dirty]
    assert counts == (status.count(NEW), len([e for e in victims if e]), status.count(REFUSED), len(dirty))
    found = index.dirty_victims(placement)
    assert list(zip(*found.noted.reshape(3, -1).tolist(), found.slots.tolist(), strict=True)) == dirty


KEY = st.integers(-12, 12) | st.sampled_from([-(2**63), 2**63 - 1])
KEYS, MANY = st.lists(KEY, unique=True, max_size=14), st.lists(KEY, unique=True, min_size=9, max_size=14)
SCORES = st.integers(-1, 4) | st.sampled_from([MAX_SCORE - 1, MAX_SCORE, 2**45])


class IndexMachine(RuleBasedStateMachine):
    """Any calls, against the model after each."""

    @initialize(n_buckets=st.integers(1, 3), n_side=st.integers(0, 3))
    def open(self, n_buckets, n_side):
        class Narrow(HostIndex):
            bucket = 4

        self.index = Narrow(HostDevice(), 4 * n_buckets + 3, 14, n_side)
        self.model = Model(n_buckets, 4, n_side)
        self.held = []
        self.put_in(range(n_buckets * 4 + n_side - 1), range(14), False, False)

    @rule(keys=KEYS, score=SCORES, add=st.booleans(), skip=st.none() | st.integers(-12, 12))
    def hold(self, keys, score, add, skip):
        got = self.index.hold(int64s(keys), int64s([score]), add=add, skip=skip)
        want = [-1 if key == skip else self.model.hold(key, score, add) for key in keys]
        assert got.slots.tolist() == want
        listed = missing(self.index._device, got)
        assert listed.at.tolist() == [i for i, slot in enumerate(want) if slot < 0 and keys[i] != skip]
        assert listed.keys.tolist() == [keys[i] for i in listed.at] and listed.n_skipped == (skip in keys)
        self.held.append(want)

    @rule(keys=KEYS | MANY, data=st.data(), evict=st.booleans(), add=st.booleans())
    def insert(self, keys, data, evict, add):
        self.put_in(keys, data.draw(st.lists(SCORES, min_size=len(keys), max_size=len(keys))), evict, add)

    def put_in(self, keys, scores, evict, add):
        keys, scores = list(keys)[:14], list(scores)[: len(keys)]
        want = self.model.insert(keys, scores, evict, add)
        same_placement(self.index, self.index.insert(int64s(keys), int64s(scores), evict=evict, add=add), want)
        self.held.append([slot for slot, _, _ in want])

    @rule(data=st.data(), step=st.none() | st.integers(0, 9) | st.just(2**40), counts=st.booleans())
    def settle(self, data, step, counts):
        if not self.held:
            return
        self.settle_one(data.draw(st.integers(0, len(self.held) - 1)), step, counts)

    def settle_one(self, which, step, counts):
        slots = self.held.pop(which)
        there = [self.model.entries[slot] for slot in slots if slot >= 0]
        if step is not None:
            more = np.arange(len(slots)) * (2**31 if step > 9 else 1)
            self.index.stamp(int64s(slots), step, more if counts else None)
            for e, uses in zip(there, more[int64s(slots) >= 0].tolist(), strict=True):
                e.dirty, e.last_step = 1, min(step, MOST_STAMP)
                e.freq = min(e.freq + counts * uses, MOST_STAMP)
        self.index.settle(int64s(slots))
        for e in there:
            e.pins -= 1

    @rule(keys=KEYS, soon=st.integers(0, 3) | st.just(300))
    def mark(self, keys, soon):
        self.index.mark(int64s(keys), soon)
        for slot in filter(lambda slot: slot >= 0, map(self.model.find, keys)):
            e = self.model.entries[slot]
            e.soon = max(e.soon, min(soon, 255)) if soon else 0

    @rule()
    def age(self):
        self.index.age()
        for e in self.model.entries.values():
            e.score //= 2

    @rule(first=st.integers(0, 2**64) | st.just(0), last=st.integers(0, 2**64) | st.just(2**64))
    def clean(self, first, last):
        want = [(slot, e.key, e.freq, e.last_step) for slot, e in self.model.entries.items() if e.dirty]
        want = sorted(row for row in want if first <= int(_ext.mixed(int64s([row[1]]))[0]) < last)
        dirty = self.index.dirty(first, last)
        assert list(zip(*dirty.reshape(3, -1).tolist(), strict=True)) == [row[1:] for row in want]
        slots = [row[0] for row in want]
        self.index.clean(int64s([*slots, -1]))
        for slot in slots:
            self.model.entries[slot].dirty = 0

    @rule(keys=KEYS, freq=st.integers(0, 2**33), last_step=st.integers(0, 2**33))
    def put_metadata(self, keys, freq, last_step):
        slots = self.index.find(int64s(keys))
        n = np.ones(len(slots), np.int64)
        self.index.put_metadata(slots, freq * n, last_step * n)
        for slot in slots[slots >= 0].tolist():
            self.model.entries[slot].freq = min(freq, MOST_STAMP)
            self.model.entries[slot].last_step = min(last_step, MOST_STAMP)

    @rule(keys=KEYS)
    def erase(self, keys):
        pinned = {e.key for e in self.model.entries.values() if e.pins}
        want = [-2 if key in pinned else self.model.find(key) for key in keys]
        assert self.index.erase(int64s(keys)).tolist() == want
        for slot in want:
            self.model.entries.pop(slot, None)

    @rule(release=st.booleans(), step=st.none() | st.integers(0, 9))
    def drain(self, release, step):
        while release and self.held:
            self.settle_one(0, step, True)
        want_old, want = self.model.drain()
        old, placement = self.index.drain()
        assert old.tolist() == want_old
        same_placement(self.index, placement, want)

    @invariant()
    def is_the_model(self):
        entries = self.model.entries
        assert words_of(self.index) == {slot: (e.key, word(e)) for slot, e in entries.items()}
        slots = int64s([-1, *entries])
        freq, last_step = self.index.metadata(slots)
        assert freq.tolist() == [0, *(e.freq for e in entries.values())]
        assert last_step.tolist() == [0, *(e.last_step for e in entries.values())]
        asked = range(-13, 14)
        assert self.index.find(int64s(asked)).tolist() == [self.model.find(key) for key in asked]
        stats = self.index.stats()
        assert stats["n_keys"] == len(self.index) == len(entries)
        assert stats["n_side"] == self.index.n_side == sum(slot >= self.model.n_slots for slot in entries)
        self.index.validate()


TestIndexMachine = here(IndexMachine.TestCase)
TestIndexMachine.settings = settings(max_examples=100, stateful_step_count=40)


# --- the index at its full size ------------------------------------------------------------------------------------


def by_sorting(words, bucket, width):
    """Slots of keys that come to buckets in this order, -1 where all are pinned.

    A bucket's m-th key takes its m-th slot: the free ones first, then those of least words.
    """
    in_order = np.argsort(bucket, kind="stable")
    before = np.empty(len(bucket), np.int64)  # how many keys of its bucket come before it
    before[in_order] = np.arange(len(bucket)) - np.searchsorted(bucket[in_order], bucket[in_order])
    ranked = np.lexsort((np.arange(len(words)), words, np.arange(len(words)) // width)).reshape(-1, width)
    usable = (words < PIN).reshape(-1, width).sum(axis=1)
    return np.where(before < usable[bucket], ranked[bucket, np.minimum(before, width - 1)], -1)


@here
def test_index_of_many_buckets_evicts_the_least_words_in_order():
    rng = np.random.default_rng(2)
    parts = open_parts("cpu")
    index = parts.index(parts.device, 40_000, 50_000, 500)
    n_buckets, width = index.n_slots // index.bucket, index.bucket
    held = index.insert(int64s([]), int64s([])).slots
    for call in range(6):
        keys = np.unique(rng.integers(-(2**63), 2**63 - 1, 30_000))
        rng.shuffle(keys)
        scores = rng.integers(0, 5, len(keys))
        words, resident = index._words[: index.n_slots].copy(), index._keys.copy()
        mixed = keys.view(np.uint64) * np.uint64(MIXES[0])
        mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(MIXES[1])
        mixed ^= mixed >> np.uint64(32)
        first, second = (
            (half.astype(np.int64) * n_buckets) >> 32 for half in (mixed & np.uint64(2**32 - 1), mixed >> np.uint64(32))
        )
        free = (words < 0).reshape(-1, width).sum(axis=1)
        swap = (free[first] <= width // 4) & (free[second] > free[first])
        want = by_sorting(words, np.where(swap, second, first), width)
        refused = np.flatnonzero(want < 0)
        taken = words.copy()
        taken[want[want >= 0]] = PIN
        want[refused] = by_sorting(taken, np.where(swap, first, second)[refused], width)
        status = np.where(words[want] < 0, NEW, EVICTED_CLEAN + (words[want] & DIRTY))
        victims = np.flatnonzero((want >= 0) & (status != NEW))
        refused = np.flatnonzero(want < 0)
        side = index.n_slots + np.flatnonzero(index._words[index.n_slots :] < 0)[: len(refused)]
        placement = index.insert(keys, scores, evict=True)
        assert np.array_equal(placement.victims[victims], resident[want[victims]])
        want[refused[: len(side)]] = side
        status[refused] = np.where(want[refused] < 0, REFUSED, NEW)
        assert np.array_equal(placement.slots, want) and np.array_equal(placement.status, status)
        # Every second batch stays pinned until the next one has come.
        if call % 2:
            index.settle(held)
            index.stamp(rng.permutation(placement.slots)[: len(keys) // 3], call)
            index.settle(placement.slots)
        else:
            held = placement.slots.copy()
        index.validate()
    assert index.stats()["n_refused"] > 0 and index.stats()["n_spilled"] == 500


@here
def test_index_without_metadata_keeps_dirty_bits_alone():
    device = HostDevice()
    index = HostIndex(device, 32, 8, metadata=False)
    slots = index.insert(int64s([1, 2]), int64s([0])).slots
    index.stamp(slots, 5, int64s([1, 1]))
    index.put_metadata(slots, slots, slots)
    assert [a.tolist() for a in index.metadata(slots)] == [[0, 0], [0, 0]] and len(index.dirty()) == 6
    assert index.nbytes < HostIndex(device, 32, 8).nbytes == HostIndex.nbytes_of(50, 8)


@here
def test_index_refuses_what_does_not_fit():
    device = HostDevice()
    index = HostIndex(device, 32, 4)
    one = np.ones(1, np.int64)
    for keys in (np.zeros(5, np.int64), np.zeros(4, np.int32), np.zeros((2, 2), np.int64)):
        with pytest.raises(InvalidArgument, match="int64"):
            index.insert(keys, one)
    with pytest.raises(InvalidArgument, match="scores"):
        index.hold(np.arange(3), np.ones(2, np.int64))
    slots = index.insert(one, one).slots.copy()
    assert index.erase(one).tolist() == [-2]  # it is pinned
    index.settle(slots)
    with pytest.raises(InvalidArgument, match="nobody holds"):
        index.settle(slots)
    for _ in range(MOST_PINS):
        index.hold(one, one)
    with pytest.raises(InvalidArgument, match="held once more"):
        index.hold(one, one)
    for n_slots, max_keys in ((31, 4), (32, 0)):
        with pytest.raises(InvalidArgument, match="an index of"):
            HostIndex(device, n_slots, max_keys)


# --- lines, batches and the device ---------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lines_come_and_go(dtype):
    parts = open_parts("cpu")
    lines = parts.lines(parts.device, 5000, 12, 700, 8, dtype)
    rng = np.random.default_rng(0)
    slots = rng.permutation(5000)[:2000]
    values = rng.integers(-50, 50, (2000, 12)).astype(np.float32)  # which every dtype holds
    for part in (slice(0, 700), slice(700, 1400), slice(1400, 2000)):
        lines.incoming(part.stop - part.start)[...] = values[part]
        lines.land(slots[part])
    coming = [lines.depart(slots[part])() for part in (slice(0, 700), slice(700, 1400))]
    assert np.array_equal(np.concatenate(coming), values[:1400])
    old, new = slots[:900], np.setdiff1d(np.arange(5000), slots)[:900]
    lines.move(old, new)
    index = rng.integers(0, 900, 3000)
    out = np.empty((3000, 12), np.float32)
    lines.gather(new, out, index)
    assert np.array_equal(out, values[index])
    rows = np.empty((901, 5), np.float32)
    lines.gather(np.append(new, -1), rows)
    assert np.array_equal(rows[:-1], values[:900, :5]) and not rows[-1].any()
    some = int64s([-1, 3, -1, 4])
    near, before = lines.incoming(4), lines.incoming(4)
    near[...], before[...] = 7, np.arange(4)[:, None]
    lines.land(some)
    assert lines.leave(int64s([3, 4]))[:, 11].tolist() == [1, 3] and lines.incoming(4).base is near.base
    assert lines.nbytes_of(5000, 12, 700, 8, dtype) == 5000 * (4 * 4 + 8 * (4 if dtype == "float32" else 2)) + 134_400


@here
def test_rows_of_arrays_are_gathered_scattered_and_pooled():
    parts = open_parts("cpu")
    lines = parts.lines(parts.device, 8, 4, 8)
    rng = np.random.default_rng(4)
    rows = rng.integers(-9, 9, (7, 4)).astype(np.float32)
    slots, index = int64s([6, -1, 0]), rng.integers(0, 3, 20)
    out = np.empty((20, 4), np.float32)
    lines.gather_from(rows, slots, out, index)
    assert np.array_equal(out, np.append(rows, 0 * rows[:1], 0)[slots][index])
    lines.gather_from(rows, slots, out[:3])
    assert np.array_equal(out[:3], [rows[6], 0 * rows[0], rows[0]])
    want = rows.copy()
    want[[2, 5]] = [[1], [3]]
    lines.scatter_into(rows, int64s([2, -1, 5]), np.float32([1, 2, 3])[:, None].repeat(4, 1))
    assert np.array_equal(rows, want)
    index, weight = rng.integers(0, 7, 20), rng.integers(-3, 3, 20).astype(np.float32)
    lines.pool_from(rows, index, np.arange(0, 21, 4), out[:5], weight, np.full(5, 2, np.float32))
    assert np.array_equal(out[:5], 2 * (rows[index] * weight[:, None]).reshape(5, 4, 4).sum(axis=1))


@here
def test_order_and_sums_of_a_batch_are_those_of_numpy():
    parts = open_parts("cpu")
    rng = np.random.default_rng(1)
    n = 20_000
    ids = rng.zipf(1.3, n) % 5000 - 2500
    room = Room(parts.device, n + 5)
    batch = parts.dedupe(parts.device, n + 5)(ids, room)
    parts.order(parts.device, n + 5)(room, batch.n, batch.n_distinct)
    keys, first, counts = np.unique(ids, return_index=True, return_counts=True)
    by_first = np.argsort(first)
    assert np.array_equal(batch.keys, keys[by_first]) and np.array_equal(batch.counts, counts[by_first])
    assert np.array_equal(batch.keys[batch.inverse], ids)
    order, starts = room.order[:n], room.starts[: batch.n_distinct + 1]
    assert starts[0] == 0 and np.array_equal(np.diff(starts), batch.counts)
    assert np.array_equal(order, np.argsort(batch.inverse, kind="stable"))
    # Whole numbers add up without rounding, in whatever order.
    values = rng.integers(-9, 9, (300, 6)).astype(np.float32)
    picked, scale = rng.integers(0, 300, n), rng.integers(-3, 3, n).astype(np.float32)
    want = np.zeros((batch.n_distinct, 6), np.float32)
    np.add.at(want, batch.inverse, values[picked] * scale[:, None])
    lines = parts.lines(parts.device, batch.n_distinct, 6, 100)
    out = np.empty_like(want)
    lines.sums(values, order, starts, out, picked, scale)
    assert np.array_equal(out, want)
    # One step of SGD at rate 1 on rows of zeros is the sum itself, negated; what has no slot is left out.
    slots = rng.permutation(batch.n_distinct)
    lines.scatter(slots, np.zeros_like(want))
    with_none = np.where(np.arange(len(slots)) % 7 == 0, -1, slots)
    lines.apply_segments(0, with_none, values, order, starts, np.float32([1]), None, 0, 0, picked, scale)
    lines.gather(slots, out)
    assert np.array_equal(out, np.where((with_none >= 0)[:, None], -want, 0))
    with pytest.raises(InvalidArgument, match="no positions"):
        lines.sums(values, order[:0], starts, out)
    with pytest.raises(InvalidArgument, match="dedupe of 3"):
        parts.dedupe(parts.device, 3)(ids, room)


@here
def test_what_is_not_finite_is_found_and_left_out():
    parts = open_parts("cpu")
    lines = parts.lines(parts.device, 9, 4, 9)
    sums = np.zeros((5, 4), np.float32)
    assert lines.look(sums) == lines.look(sums, np.ones(5, np.float32)) == [0]
    sums[1, 3], sums[3, 0], sums[4, 2] = np.nan, np.inf, -np.inf
    assert lines.look(sums) == lines.look(sums[:1], np.float32([np.inf])) == [1]
    slots, n_skipped = lines.skip_bad(int64s([4, 3, 2, -1, 0]), sums)
    assert slots.tolist() == [4, -1, 2, -1, -1] and n_skipped == 2


@here
def test_memory_is_shared_with_tensors():
    torch = pytest.importorskip("torch")
    parts = open_parts("cpu")
    lines = parts.lines(parts.device, 8, 4, 8)
    lines.scatter(np.arange(8), np.arange(32, dtype=np.float32).reshape(8, 4))
    out = torch.empty(3, 4)
    lines.gather(torch.tensor([1, -1, 7]), out)
    assert out[:, 0].tolist() == [4, 0, 28]
    both = torch.empty(6, 4)
    assert parts.device.join([out, np.ones((3, 4), np.float32)], both) is not None and both[3:].eq(1).all()
    for refused, dtype in ((both.T, None), (both, np.int64), (np.zeros(3), np.float32)):
        with pytest.raises(InvalidArgument, match="contiguous"):
            parts.device.array(refused, dtype)
    assert both[:3].equal(out) and parts.device.fetch(out[:1]).tolist() == [[4, 5, 6, 7]]


@here
def test_host_device_copies_where_a_device_would():
    device = HostDevice()
    a = np.arange(6).reshape(2, 3)
    assert device.array(a) is a and device.send(a) is not a and device.fetch(a) is not a
    out = np.empty_like(a)
    assert device.fetch(a, out) is out and np.array_equal(out, a)
    assert device.none(np.int64).shape == (0,) and device.none(np.float32, 2).shape == (0, 0)
    assert device.empty((2, 3), np.int64).shape == (2, 3) and device.pinned(7).nbytes == 7 and device.name == "cpu"
    assert device.sync() is None


@here
def test_twin_needs_neither_numba_cuda_nor_a_driver():
    code = """
import sys
sys.modules["numba_cuda"] = None
from hbkit.cuda.parts import open_parts
assert "numba" not in sys.modules
import numpy as np
parts = open_parts("cpu")
index = parts.index(parts.device, 64, 8)
index.insert(np.arange(8), np.zeros(1, np.int64))
assert not [name for name in sys.modules if name.startswith(("numba.cuda", "numba_cuda.", "cuda"))]
"""
    for simulator in ("0", "1"):
        env = {**os.environ, "NUMBA_ENABLE_CUDASIM": simulator}
        subprocess.run([sys.executable, "-c", code], check=True, env=env)


@here
def test_without_numba_there_is_no_twin(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailable, match="hbkit\\[cuda\\]"):
        open_parts("cpu")
    with pytest.raises(InvalidArgument, match="tpu"):
        open_parts("tpu")


# --- a device's parts do what the twin's do ------------------------------------------------------------------------


def both_sides(device):
    """The parts of the lane's device and those in host memory, whose buckets are as wide."""
    cuda, cpu = open_parts("cuda"), open_parts("cpu")
    from hbkit.cuda.index import BUCKET

    class Twin(HostIndex):
        bucket = BUCKET

    return cuda._replace(device=device), cpu._replace(index=Twin)


@pytest.fixture
def sides(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    return both_sides(device)


def same(device, *pairs):
    for far, near in pairs:
        assert device.fetch(far).tolist() == near.tolist()


def test_indexes_give_the_same_slots_victims_words_and_metadata(sides, lane):
    cuda, cpu = sides
    rng = np.random.default_rng(7)
    n_buckets, n, n_calls = {"cudasim": (2, 40, 14), "soft": (60, 1500, 30)}.get(lane, (200, 5000, 30))
    size = n_buckets * cpu.index.bucket + 5, n, 6
    far, near = cuda.index(cuda.device, *size), cpu.index(cpu.device, *size)
    send = cuda.device.send
    universe = rng.integers(-(2**63), 2**63 - 1, 3 * far.n_slots)
    universe[:3] = 0, -1, 2**63 - 1
    held = []
    for call in range(n_calls):
        keys = rng.choice(universe, rng.integers(0, n), replace=False)
        scores = rng.integers(0, 9, len(keys)) if call % 3 else int64s([call + 2**38])
        add, evict, skip = call % 2 == 0, call % 4 != 0, None if call % 3 else int(universe[call])
        a = far.hold(send(keys), send(scores), send(keys), add=add, skip=skip)
        b = near.hold(keys, scores, keys, add=add, skip=skip)
        same(cuda.device, (a.slots, b.slots), (a.found, b.found))
        found = missing(cpu.device, b)
        same(cpu.device, *zip(missing(cuda.device, a), map(np.array, found), strict=True))
        some = keys[found.at]
        if len(scores) > 1:
            scores = scores[found.at]
        p, q = (
            i.insert(k, s, evict=evict, add=add) for i, k, s in ((far, send(some), send(scores)), (near, some, scores))
        )
        same(
            cuda.device,
            (p.slots, q.slots),
            (p.status, q.status),
            *zip(far.dirty_victims(p), near.dirty_victims(q), strict=True),
        )
        evicted = (q.status == EVICTED_CLEAN) | (q.status == EVICTED_CLEAN + 1)
        assert cuda.device.fetch(p.victims)[evicted].tolist() == q.victims[evicted].tolist()
        assert [getattr(p, name) for name in COUNTS] == [getattr(q, name) for name in COUNTS]
        slots = b.slots.copy()
        slots[found.at] = q.slots
        freq = rng.integers(0, 2**33, len(slots))
        for side, at in ((far, send(slots)), (near, slots)):
            if call % 4 == 1:
                side.put_metadata(at, freq, freq // 2)
            side.stamp(at, 2**31 + call, freq // 8 if call % 2 else None)
        held.append(slots)
        for _ in range(len(held) - call % 3):
            done = held.pop(0)
            far.settle(send(done))
            near.settle(done)
        wanted, every = rng.choice(universe, n // 2, replace=False), rng.choice(universe, n)
        for side in (far, near):
            side.mark(wanted, call % 5 * 60)
            if call % 5 == 4:
                side.age()
        same(cuda.device, (far.find(every), near.find(every)))
        part = int(rng.integers(0, 2**64, dtype=np.uint64)), 2**64
        same(cuda.device, (far.dirty(), near.dirty()), (far.dirty(*part), near.dirty(*part)))
        if call % 4 == 3:
            for done in held:
                far.settle(send(done))
                near.settle(done)
            held = []
            gone = rng.choice(universe, n // 4, replace=False)
            assert far.erase(gone).tolist() == near.erase(gone).tolist()
            some = near.find(near.dirty().reshape(3, -1)[0])[::2]
            far.clean(send(some))
            near.clean(some)
            (old, p), (other, q) = far.drain(), near.drain()
            assert old.tolist() == other.tolist()
            same(cuda.device, (p.slots, q.slots), *zip(far.dirty_victims(p), near.dirty_victims(q), strict=True))
        keys, slots = far.contents()
        words = cuda.device.fetch(far._entries)[slots, 1]
        assert dict(zip(slots.tolist(), zip(keys.tolist(), words.tolist(), strict=True), strict=True)) == words_of(near)
        same(cuda.device, (far.metadata(send(slots)), near.metadata(slots)))
        assert far.stats() == near.stats()
        far.validate()
        near.validate()
    assert min(near.stats().values()) > 0, near.stats()


COUNTS = ("n", "n_new", "n_evicted", "n_refused", "n_dirty")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_lines_hold_the_same_bits(sides, lane, dtype):
    cuda, _ = sides
    rng = np.random.default_rng(8)
    n, dim = (24, 4) if lane == "cudasim" else (3000, 16)
    width = 3 * dim
    far, near = (p.lines(p.device, n, width, 10, dim, dtype) for p in sides)
    send = cuda.device.send
    both = (far, send), (near, np.asarray)

    def same_lines(slots):
        got = [
            np.concatenate([side.leave(send(slots[i : i + 10])).copy() for i in range(0, n, 10)]) for side, send in both
        ]
        assert np.array_equal(got[0].view(np.int32), got[1].view(np.int32))

    values = np.abs(rng.standard_normal((n, width)).astype(np.float32))
    every = rng.permutation(n)
    for side, to in both:
        for i in range(0, n, 10):
            side.incoming(len(every[i : i + 10]))[...] = values[i : i + 10]
            side.land(to(every[i : i + 10]))
    same_lines(every)
    half = n // 2
    far.move(send(every[:half]), send(every[half:]))
    near.move(every[:half], every[half:])
    same_lines(every)
    # A batch: gathered, pooled, and updated by sums of gradients.
    slots = np.append(every[: half - 1], -1)
    index, splits = rng.integers(0, half, 2 * half), np.arange(0, 2 * half + 1, 4)
    weight, scale = (rng.standard_normal(k).astype(np.float32) for k in (2 * half, len(splits) - 1))
    for shape, call in (
        ((2 * half, dim), lambda side, send, out: side.gather(send(slots), out, send(index))),
        (
            (len(splits) - 1, dim),
            lambda side, send, out: side.pool(send(slots), send(index), send(splits), out, send(weight), send(scale)),
        ),
    ):
        out, want = cuda.device.empty(shape, np.float32), np.empty(shape, np.float32)
        call(far, send, out)
        call(near, np.asarray, want)
        assert np.array_equal(cuda.device.fetch(out).view(np.int32), want.view(np.int32))
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(half + 1))
    grads = rng.standard_normal((5, dim)).astype(np.float32)
    picked = rng.integers(0, 5, 2 * half)
    out, want = cuda.device.empty((half, dim), np.float32), np.empty((half, dim), np.float32)
    far.sums(*map(send, (grads, order, starts)), out, send(picked), send(weight))
    near.sums(grads, order, starts, want, picked, weight)
    assert np.array_equal(cuda.device.fetch(out).view(np.int32), want.view(np.int32))
    hyper = np.float32([0.1, 0.9, 0.999, 1e-8, 0.1, 0.001, 0, 0])
    keys = rng.integers(-(2**63), 2**63 - 1, half)
    for step in (1, 2):
        rest = grads, order, starts
        far.apply_segments(3, send(slots), *map(send, rest), hyper, send(keys), 5, step, send(picked), send(weight))
        near.apply_segments(3, slots, *rest, hyper, keys, 5, step, picked, weight)
    far.apply(3, send(slots), out, hyper, send(keys), 5, 3)
    near.apply(3, slots, want, hyper, keys, 5, 3)
    same_lines(every)


def test_batches_are_deduped_and_ordered_alike(sides, lane):
    cuda, cpu = sides
    n = 90 if lane == "cudasim" else 50_000
    rng = np.random.default_rng(9)
    far, near = ((p.dedupe(p.device, n), p.order(p.device, n), Room(p.device, n)) for p in (cuda, cpu))
    for ids in (rng.zipf(1.4, n), rng.permutation(n), np.zeros(n, np.int64), rng.integers(-3, 3, 7)):
        a, b = far[0](cuda.device.send(ids), far[2]), near[0](ids, near[2])
        assert (a.n, a.n_distinct) == (b.n, b.n_distinct)
        for side, batch in ((far, a), (near, b)):
            side[1](side[2], batch.n, batch.n_distinct)
        same(cuda.device, (a.keys, b.keys), (a.counts, b.counts), (a.inverse, b.inverse))
        same(cuda.device, (far[2].order[: a.n], near[2].order[: b.n]))
        same(cuda.device, *((side[2].starts[: b.n_distinct + 1] for side in (far, near)),))


def test_what_is_not_finite_is_found_alike(sides):
    cuda, cpu = sides
    far, near = (p.lines(p.device, 9, 8, 9, 4) for p in (cuda, cpu))
    send, rng = cuda.device.send, np.random.default_rng(3)
    for bad in (None, np.nan, np.inf, -np.inf):
        sums = rng.standard_normal((20, 4)).astype(np.float32)
        scale = np.ones(20, np.float32)
        slots = np.where(np.arange(20) % 4 == 3, -1, np.arange(20))
        if bad is not None:
            sums[[2, 7, 9], [0, 3, 1]] = bad
        same(cuda.device, (far.look(send(sums)), near.look(sums)))
        (a, n), (b, m) = far.skip_bad(send(slots), send(sums)), near.skip_bad(slots, sums)
        same(cuda.device, (a, b))
        assert n == m
        if bad is not None:
            scale[4] = bad
        same(cuda.device, (far.look(send(sums[10:]), send(scale)), near.look(sums[10:], scale)))
        assert near.look(sums[10:], scale).tolist() == [bad is not None]
