"""The index in device memory against an oracle of dictionaries, bit for bit, in whatever order threads run."""

import os

import numpy as np
import pytest

from hbkit.errors import InvalidArgument

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
M = 2**64 - 1
PIN = 1 << 48
FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY, REFUSED = range(5)


@pytest.mark.skipif(SIMULATED, reason="this is the simulator")
def test_index_in_the_simulator(in_simulator):
    in_simulator(__file__)


class Oracle:
    """Buckets as lists of [key, word] or None, one key after the other; and the side list."""

    def __init__(self, n_buckets, width, n_side):
        self.buckets, self.width = [[None] * width for _ in range(n_buckets)], width
        self.side, self.n_slots = [None] * n_side, n_buckets * width

    def bucket(self, key):
        x = (int(key) & M) * 0x9FB21C651E98DF25 & M
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 & M
        x ^= x >> 32
        return (x & 0xFFFFFFFF) * len(self.buckets) >> 32

    def entry(self, key):
        """Slot and entry of a key."""
        b = self.bucket(key)
        for first, entries in ((b * self.width, self.buckets[b]), (self.n_slots, self.side)):
            for i, e in enumerate(entries):
                if e and e[0] == key:
                    return first + i, e
        return -1, None

    def find(self, keys):
        return [self.entry(k)[0] for k in keys.tolist()]

    def insert(self, keys, scores, evict, add, side=True):
        slots, status, victims = [-1] * len(keys), [REFUSED] * len(keys), [None] * len(keys)
        keys, scores = keys.tolist(), scores.tolist()
        for i, k in enumerate(keys):
            slots[i], e = self.entry(k) if side else (-1, None)
            if e:
                score = min(scores[i] + (add and (e[1] % PIN) >> 1), 2**47 - 1)
                e[1], status[i] = (e[1] // PIN + 1) * PIN + 2 * score + e[1] % 2, FOUND
        for i, k in enumerate(keys):
            if status[i] == FOUND:
                continue
            b = self.bucket(k)
            entries, at = self.buckets[b], None
            if None in entries:
                at, status[i] = entries.index(None), NEW
            else:
                least = min(range(self.width), key=lambda j: (entries[j][1], j))
                if evict and entries[least][1] < PIN:
                    at, victims[i] = least, entries[least][0]
                    status[i] = EVICTED_CLEAN + entries[least][1] % 2
            if at is not None:
                slots[i] = b * self.width + at
                entries[at] = [k, PIN + 2 * min(scores[i], 2**47 - 1)]
        for i, k in enumerate(keys):
            if status[i] == REFUSED and side and None in self.side:
                at = self.side.index(None)
                self.side[at] = [k, PIN + 2 * min(scores[i], 2**47 - 1)]
                slots[i], status[i] = self.n_slots + at, NEW
        return slots, status, victims

    def settle(self, slots, dirty):
        for slot in slots:
            if slot >= 0:
                e = self.at(slot)
                e[1] = (e[1] - PIN) | dirty

    def at(self, slot):
        return (
            self.side[slot - self.n_slots]
            if slot >= self.n_slots
            else self.buckets[slot // self.width][slot % self.width]
        )

    def drop(self, slot):
        if slot >= self.n_slots:
            self.side[slot - self.n_slots] = None
        else:
            self.buckets[slot // self.width][slot % self.width] = None

    def drain(self):
        old = [i for i, e in enumerate(self.side) if e and e[1] < PIN]
        moving = [self.side[i] for i in old]
        keys, scores = (np.array([f(e) for e in moving], np.int64) for f in (lambda e: e[0], lambda e: e[1] >> 1))
        placed = self.insert(keys, scores, True, False, side=False)
        for i, slot, e in zip(old, placed[0], moving, strict=True):
            if slot >= 0:
                self.side[i] = None
                self.settle([slot], e[1] % 2)
        return [self.n_slots + i for i in old], placed

    def contents(self):
        every = [e for b in self.buckets for e in b] + self.side
        return [(e[0], i, e[1]) for i, e in enumerate(every) if e]


def index_and_oracle(device, n_buckets, max_keys, n_side):
    from hbkit.cuda.index import BUCKET, DeviceIndex

    index = DeviceIndex(device, n_buckets * BUCKET + 3, max_keys, n_side)
    assert index.n_slots == n_buckets * BUCKET
    return index, Oracle(n_buckets, BUCKET, n_side)


def check(device, index, oracle):
    """Contents and words."""
    keys, slots = index.contents()
    words = device.fetch(index._entries)[slots, 1]
    assert list(zip(keys.tolist(), slots.tolist(), words.tolist(), strict=True)) == oracle.contents()


def same(device, got, want):
    """A placement and the oracle's; how many the counts say."""
    slots, status, victims = (device.fetch(a).tolist() for a in (got.slots, got.status, got.victims))
    assert slots == want[0] and status == want[1]
    assert [v for v, w in zip(victims, want[2], strict=True) if w is not None] == [w for w in want[2] if w is not None]
    assert got.n_new == want[1].count(NEW) and got.n_refused == want[1].count(REFUSED)
    assert got.n_evicted == sum(w is not None for w in want[2])


def test_oracle_finds_what_it_inserted(lane):
    oracle = Oracle(3, 4, 2)
    keys = np.arange(40)
    slots, status, _ = oracle.insert(keys, keys, False, False)
    assert oracle.find(keys) == slots and status.count(NEW) == 14 and status.count(REFUSED) == 26
    oracle.settle(slots, 0)
    slots, status, victims = oracle.insert(keys[::-1][:5], keys[:5], True, False)
    assert min(slots) >= 0 and oracle.find(np.array([v for v in victims if v is not None])) == [-1] * status.count(2)


def test_random_calls_match_oracle_in_any_order(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    rng = np.random.default_rng(5)
    n_buckets, n, n_calls = (3, 60, 12) if lane == "cudasim" else (300, 6000, 40)
    index, oracle = index_and_oracle(device, n_buckets, n, 8)
    universe = rng.integers(-(2**63), 2**63 - 1, 4 * oracle.n_slots)
    held = []  # slots of batches that nobody released yet
    for call in range(n_calls):
        keys = rng.choice(universe, rng.integers(1, n), replace=False)
        scores = rng.integers(0, 9, len(keys))
        evict, add = call % 3 != 0, call % 2 == 0
        got = index.insert(keys, scores, evict=evict, add=add)
        want = oracle.insert(keys, scores, evict, add)
        same(device, got, want)
        held.append((want[0], call % 4 == 0))
        while len(held) > call % 3:
            slots, dirty = held.pop(0)
            index.settle(np.array(slots), dirty=dirty)
            oracle.settle(slots, dirty)
        asked = rng.choice(universe, n)
        assert device.fetch(index.find(asked)).tolist() == oracle.find(asked)
        if call % 4 == 3:
            for slots, dirty in held:
                index.settle(np.array(slots), dirty=dirty)
                oracle.settle(slots, dirty)
            held = []
            gone = rng.choice(universe, n // 4, replace=False)
            want_slots = oracle.find(gone)
            assert index.erase(gone).tolist() == want_slots
            for slot in want_slots:
                if slot >= 0:
                    oracle.drop(slot)
            old, placed = index.drain()
            want_old, want = oracle.drain()
            assert old.tolist() == want_old
            same(device, placed, want)
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
        same(device, got, want)
        index.settle(got.slots)
        oracle.settle(want[0], 0)
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
    index.settle(resident[::2], dirty=True)
    index.settle(resident[1::2])
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
    from hbkit.cuda.index import MAX_SCORE

    index, oracle = index_and_oracle(device, 1, 4, 0)
    keys, scores = np.arange(3), np.array([MAX_SCORE, MAX_SCORE - 1, 5])
    for _ in range(3):
        same(device, index.insert(keys, scores, add=True), oracle.insert(keys, scores, False, True))
    check(device, index, oracle)


def test_index_refuses_what_does_not_fit(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    from hbkit.cuda.index import BUCKET, DeviceIndex

    index = DeviceIndex(device, BUCKET, 4)
    one = np.ones(1, np.int64)
    for keys in (np.zeros(5, np.int64), np.zeros(4, np.int32), np.zeros((2, 2), np.int64)):
        with pytest.raises(InvalidArgument, match="int64"):
            index.find(keys)
    with pytest.raises(InvalidArgument, match="scores"):
        index.insert(one, np.ones(2, np.int64))
    index.insert(one, one)
    with pytest.raises(InvalidArgument, match="pinned"):
        index.erase(one)
    assert len(index) == 1 and device.fetch(index.find(one)).tolist() >= [0]
    for n_slots, max_keys in ((BUCKET - 1, 4), (BUCKET, 0)):
        with pytest.raises(InvalidArgument):
            DeviceIndex(device, n_slots, max_keys)
    empty = index.insert(one[:0], one[:0])
    assert empty.n_new == 0 and index.erase(one[:0]).tolist() == [] and index.find(one[:0]).shape == (0,)
    assert index.drain()[0].tolist() == [] and index.nbytes > 17 * BUCKET
