"""The index in device memory against an oracle of dictionaries, bit for bit, in whatever order threads run."""

import os

import numpy as np
import pytest

from hbkit.errors import InvalidArgument

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
M = 2**64 - 1
PIN, SOON = 1 << 48, 1 << 40
MAX_SCORE = 2**39 - 1
FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY, REFUSED = range(5)
KEY, WORD, FREQ, LAST = range(4)  # of the oracle's entries


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_index_in_the_simulator(in_simulator):
    in_simulator(__file__)


def mixed(key):
    x = (int(key) & M) * 0x9FB21C651E98DF25 & M
    x ^= x >> 32
    x = x * 0xD6E8FEB86659FD93 & M
    return x ^ x >> 32


class Oracle:
    """Buckets as lists of [key, word, freq, last_step] or None, one key after the other; and the side list."""

    def __init__(self, n_buckets, width, n_side, metadata=True):
        self.buckets, self.width = [[None] * width for _ in range(n_buckets)], width
        self.side, self.n_slots = [None] * n_side, n_buckets * width
        self.most = 2**32 - 1 if metadata else 0

    def bucket(self, key):
        return (mixed(key) & 0xFFFFFFFF) * len(self.buckets) >> 32

    def entry(self, key):
        """Slot and entry of a key."""
        b = self.bucket(key)
        for first, entries in ((b * self.width, self.buckets[b]), (self.n_slots, self.side)):
            for i, e in enumerate(entries):
                if e and e[KEY] == key:
                    return first + i, e
        return -1, None

    def find(self, keys):
        return [self.entry(k)[0] for k in keys.tolist()]

    def pin(self, e, score, add):
        score = min(min(score, MAX_SCORE) + (add and (e[WORD] % SOON) >> 1), MAX_SCORE)
        e[WORD] = (e[WORD] // PIN + 1) * PIN + 2 * score + e[WORD] % 2

    def hold(self, keys, scores, add, skip):
        slots = [self.entry(k)[0] if k != skip else -1 for k in keys.tolist()]
        for slot, score in zip(slots, scores_of(keys, scores), strict=True):
            if slot >= 0:
                self.pin(self.at(slot), score, add)
        return slots, [i for i, k in enumerate(keys.tolist()) if slots[i] < 0 and k != skip]

    def insert(self, keys, scores, evict, add, side=True):
        """Slots, status and victims: (key, freq, last_step) or None."""
        slots, status, victims = [-1] * len(keys), [REFUSED] * len(keys), [None] * len(keys)
        keys, scores = keys.tolist(), scores_of(keys, scores)
        new = [[k, PIN + 2 * min(score, MAX_SCORE), 0, 0] for k, score in zip(keys, scores, strict=True)]
        for i, k in enumerate(keys):
            slots[i], e = self.entry(k) if side else (-1, None)
            if e:
                self.pin(e, scores[i], add)
                status[i] = FOUND
        for i, k in enumerate(keys):
            if status[i] == FOUND:
                continue
            b = self.bucket(k)
            entries, at = self.buckets[b], None
            if None in entries:
                at, status[i] = entries.index(None), NEW
            else:
                least = min(range(self.width), key=lambda j: (entries[j][WORD], j))
                if evict and entries[least][WORD] < PIN:
                    at, victims[i] = least, (entries[least][KEY], entries[least][FREQ], entries[least][LAST])
                    status[i] = EVICTED_CLEAN + entries[least][WORD] % 2
            if at is not None:
                slots[i] = b * self.width + at
                entries[at] = new[i]
        for i in range(len(keys)):
            if status[i] == REFUSED and side and None in self.side:
                at = self.side.index(None)
                self.side[at] = new[i]
                slots[i], status[i] = self.n_slots + at, NEW
        return slots, status, victims

    def mark(self, keys, soon):
        for slot in self.find(keys):
            if slot >= 0:
                e = self.at(slot)
                old = e[WORD] % PIN // SOON
                e[WORD] += (min(max(old, soon), 255) * (soon > 0) - old) * SOON

    def age(self):
        for e in self.entries():
            score = e[WORD] % SOON >> 1
            e[WORD] += 2 * (score // 2 - score)

    def settle(self, slots):
        for slot in slots:
            if slot >= 0:
                self.at(slot)[WORD] -= PIN

    def stamp(self, slots, step, counts):
        for slot, n in zip(slots, counts, strict=True):
            if slot >= 0:
                e = self.at(slot)
                e[WORD:] = e[WORD] | 1, min(e[FREQ] + n, self.most), min(step, self.most)

    def clean(self, slots):
        for slot in slots:
            if slot >= 0:
                self.at(slot)[WORD] &= ~1

    def put_metadata(self, slots, freq, last_step):
        for slot, f, last in zip(slots, freq, last_step, strict=True):
            if slot >= 0:
                self.at(slot)[FREQ:] = min(f, self.most), min(last, self.most)

    def metadata(self, slots):
        return [tuple(self.at(slot)[FREQ:]) if slot >= 0 else (0, 0) for slot in slots]

    def at(self, slot):
        if slot >= self.n_slots:
            return self.side[slot - self.n_slots]
        return self.buckets[slot // self.width][slot % self.width]

    def drop(self, slot):
        if slot >= self.n_slots:
            self.side[slot - self.n_slots] = None
        else:
            self.buckets[slot // self.width][slot % self.width] = None

    def drain(self):
        old = [i for i, e in enumerate(self.side) if e and e[WORD] < PIN]
        moving = [self.side[i] for i in old]
        keys, scores = (
            np.array([f(e) for e in moving], np.int64) for f in (lambda e: e[0], lambda e: e[1] % SOON // 2)
        )
        placed = self.insert(keys, scores, True, False, side=False)
        for i, slot, e in zip(old, placed[0], moving, strict=True):
            if slot >= 0:
                self.side[i] = None
                self.buckets[slot // self.width][slot % self.width] = e
        return [self.n_slots + i for i in old], placed

    def entries(self):
        return [e for e in [e for b in self.buckets for e in b] + self.side if e]

    def contents(self):
        every = [e for b in self.buckets for e in b] + self.side
        return [(e[KEY], i, *e[WORD:]) for i, e in enumerate(every) if e]

    def dirty(self):
        return [(k, slot) for k, slot, word, *_ in self.contents() if word % 2]


def scores_of(keys, scores):
    return scores.tolist() * (len(keys) if len(scores) == 1 else 1)


def index_and_oracle(device, n_buckets, max_keys, n_side, metadata=True):
    from hbkit.cuda.index import BUCKET, DeviceIndex

    index = DeviceIndex(device, n_buckets * BUCKET + 3, max_keys, n_side, metadata)
    assert index.n_slots == n_buckets * BUCKET
    return index, Oracle(n_buckets, BUCKET, n_side, metadata)


def check(device, index, oracle):
    """Contents, words and metadata."""
    keys, slots = index.contents()
    words = device.fetch(index._entries)[slots, 1]
    notes = map(device.fetch, index.metadata(slots))
    assert list(zip(*(a.tolist() for a in (keys, slots, words, *notes)), strict=True)) == oracle.contents()


def same(device, index, got, want):
    """A placement and the oracle's; how many the counts say; the dirty victims."""
    slots, status, victims = (device.fetch(a).tolist() for a in (got.slots, got.status, got.victims))
    assert slots == want[0] and status == want[1]
    assert [v for v, w in zip(victims, want[2], strict=True) if w] == [w[0] for w in want[2] if w]
    assert got.n_new == want[1].count(NEW) and got.n_refused == want[1].count(REFUSED)
    assert got.n_evicted == sum(w is not None for w in want[2]) and got.n_dirty == want[1].count(EVICTED_DIRTY)
    at = [i for i, s in enumerate(want[1]) if s == EVICTED_DIRTY]
    listed = [device.fetch(a).tolist() for a in index.dirty_victims(got)]
    assert list(zip(*listed, strict=True)) == [(want[2][i][0], want[0][i], *want[2][i][1:]) for i in at]


def test_oracle_finds_what_it_inserted(lane):
    oracle = Oracle(3, 4, 2)
    keys = np.arange(40)
    slots, status, _ = oracle.insert(keys, keys, False, False)
    assert oracle.find(keys) == slots and status.count(NEW) == 14 and status.count(REFUSED) == 26
    oracle.settle(slots)
    slots, status, victims = oracle.insert(keys[::-1][:5], keys[:5], True, False)
    assert min(slots) >= 0 and oracle.find(np.array([v[0] for v in victims if v])) == [-1] * status.count(2)


@pytest.mark.parametrize("metadata", [True, False])
def test_random_calls_match_oracle_in_any_order(lane, device, any_order, metadata):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    rng = np.random.default_rng(5)
    n_buckets, n, n_calls = (3, 60, 12) if lane == "cudasim" else (300, 6000, 40)
    index, oracle = index_and_oracle(device, n_buckets, n, 8, metadata)
    universe = rng.integers(-(2**63), 2**63 - 1, 4 * oracle.n_slots)
    held = []  # slots of batches that nobody released yet

    def release():
        slots, counts = held.pop(0)
        if counts is not None:
            index.stamp(np.array(slots), call, counts)
            oracle.stamp(slots, call, counts.tolist())
        index.settle(np.array(slots))
        oracle.settle(slots)

    for call in range(n_calls):
        keys = rng.choice(universe, rng.integers(1, n), replace=False)
        counts = rng.integers(0, 9, len(keys))
        scores = counts if call % 5 else counts[:1]
        evict, add, skip = call % 3 != 0, call % 2 == 0, int(keys[0]) if call % 2 else None
        got = index.hold(keys, scores, add=add, skip=skip)
        slots, missing = oracle.hold(keys, scores, add, skip)
        assert device.fetch(got.slots).tolist() == slots and got.n_missing == len(missing)
        assert device.fetch(got.missing).tolist() == missing
        new = keys[missing] if call % 4 else keys  # what was held is found and pinned once more
        given = scores if len(scores) == 1 else counts[missing] if call % 4 else counts
        placed = index.insert(index.take(keys, got.missing) if call % 4 else keys, given, evict=evict, add=add)
        want = oracle.insert(new, given, evict, add)
        same(device, index, placed, want)
        if call % 4 == 0:
            held.append((want[0], None))
        else:
            index.put(got.slots, got.missing, placed.slots)
            slots = np.array(slots)
            slots[missing] = want[0]
            assert device.fetch(got.slots).tolist() == slots.tolist()
        held.append((list(slots), counts if call % 4 else None))
        while len(held) > call % 3:
            release()
        asked = rng.choice(universe, n)
        assert device.fetch(index.find(asked)).tolist() == oracle.find(asked)
        wanted = rng.choice(universe, n, replace=False)
        for some, soon in ((wanted, 1 + call), (wanted[::2], 2), (wanted[::3], 0), (wanted[::4], 1000)):
            index.mark(some, soon)
            oracle.mark(some, soon)
        dirty = oracle.dirty()
        for first in (None, 3):
            listed = [device.fetch(a).tolist() for a in index.dirty(first)]
            assert list(zip(*listed, strict=True)) == dirty[:first]
        if dirty:
            saved = [slot for _, slot in dirty[::2]] + [-1]
            index.clean(np.array(saved))
            oracle.clean(saved)
        if call % 4 == 3:
            while held:
                release()
            index.age()
            oracle.age()
            gone = rng.choice(universe, n // 4, replace=False)
            want_slots = oracle.find(gone)
            assert index.erase(gone).tolist() == want_slots
            for slot in want_slots:
                if slot >= 0:
                    oracle.drop(slot)
            old, placed = index.drain()
            want_old, want = oracle.drain()
            assert old.tolist() == want_old
            same(device, index, placed, want)
        check(device, index, oracle)
        index.validate()
    stats = index.stats()
    assert stats["n_keys"] == len(index) == len(oracle.contents())
    assert stats["n_evicted"] > 0 and stats["n_spilled"] > 0 and stats["n_refused"] > 0


def test_many_keys_of_one_bucket_keep_the_order_of_positions(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    # One bucket, so all keys conflict: as many as it has slots are placed, the first ones, whoever ran first.
    index, oracle = index_and_oracle(device, 1, 200, 3)
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 80 if lane == "cudasim" else 200)
    for score in (1, 0):
        got = index.insert(keys, np.full(len(keys), score), evict=True)
        want = oracle.insert(keys, np.full(len(keys), score), True, False)
        same(device, index, got, want)
        index.settle(got.slots)
        oracle.settle(want[0])
        keys = keys[::-1].copy()
    check(device, index, oracle)


def test_victims_are_listed_with_their_dirty_slots_in_order(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, oracle = index_and_oracle(device, 2, 100, 0)
    n = oracle.n_slots
    keys = np.arange(2 * n)[:100]
    first = index.insert(keys, np.zeros(len(keys), np.int64))
    resident = device.fetch(first.slots)
    assert (resident >= 0).sum() == first.n_new and first.n_refused == len(keys) - first.n_new
    index.stamp(resident[::2], 1)
    index.settle(resident)
    got = index.insert(keys + 1000, np.ones(len(keys), np.int64), evict=True)
    status, slots = device.fetch(got.status), device.fetch(got.slots)
    n_dirty = int((status == EVICTED_DIRTY).sum())
    positions = device.fetch(index.positions(got, EVICTED_DIRTY, EVICTED_DIRTY, n_dirty))
    assert positions.tolist() == np.flatnonzero(status == EVICTED_DIRTY).tolist() and 0 < n_dirty < got.n_evicted
    victims = device.fetch(got.victims)[positions]
    assert {int(s): int(k) for s, k in zip(resident, keys, strict=True) if s >= 0}.items() >= dict(
        zip(slots[positions].tolist(), victims.tolist(), strict=True)
    ).items()
    # Clean ones go before dirty ones of equal score.
    assert (np.flatnonzero(status == EVICTED_DIRTY).size == 0) or got.n_evicted > (status == EVICTED_CLEAN).sum()


def test_scores_stop_at_their_largest(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, oracle = index_and_oracle(device, 1, 4, 0)
    keys, scores = np.arange(3), np.array([MAX_SCORE, MAX_SCORE - 1, 5])
    for _ in range(3):
        same(device, index, index.insert(keys, scores, add=True), oracle.insert(keys, scores, False, True))
    check(device, index, oracle)


def test_index_refuses_what_does_not_fit(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda.index import BUCKET, DeviceIndex

    index = DeviceIndex(device, BUCKET, 4)
    one = np.ones(1, np.int64)
    for keys in (np.zeros(5, np.int64), np.zeros(4, np.int32), np.zeros((2, 2), np.int64)):
        with pytest.raises(InvalidArgument, match="int64"):
            index.insert(keys, one)
    with pytest.raises(InvalidArgument, match="scores"):
        index.insert(np.arange(3), np.ones(2, np.int64))
    index.insert(one, one)
    with pytest.raises(InvalidArgument, match="pinned"):
        index.erase(one)
    assert len(index) == 1 and device.fetch(index.find(one)).tolist() >= [0]
    for n_slots, max_keys in ((BUCKET - 1, 4), (BUCKET, 0)):
        with pytest.raises(InvalidArgument):
            DeviceIndex(device, n_slots, max_keys)
    empty = index.insert(one[:0], one[:0])
    assert empty.n_new == 0 and index.erase(one[:0]).tolist() == [] and index.find(one[:0]).shape == (0,)
    assert index.drain()[0].tolist() == [] and index.nbytes > 25 * BUCKET
    for n_slots, max_keys, n_side, metadata in ((BUCKET, 4, 1024, True), (3 * BUCKET + 1, 50, 0, False)):
        made = DeviceIndex(device, n_slots, max_keys, n_side, metadata)
        assert made.nbytes == DeviceIndex.nbytes_of(n_slots, max_keys, n_side, metadata)
