"""The index in device memory against an oracle of dictionaries, bit for bit, in whatever order threads run."""

import os
from types import FunctionType

import numpy as np
import pytest

from hbkit._ext import batch as _ext
from hbkit.cuda import batch
from hbkit.errors import InvalidArgument

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
M = 2**64 - 1
PIN, SOON = 1 << 48, 1 << 40
MAX_SCORE = 2**39 - 1
FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY, REFUSED = range(5)
KEY, WORD, FREQ, LAST = range(4)  # of the oracle's entries


def test_index_in_the_simulator(in_simulator):
    in_simulator(__file__)


def test_index_on_soft_devices(on_soft_devices):
    on_soft_devices(__file__)


@pytest.mark.slow
def test_index_in_the_simulator_for_long(in_simulator):
    in_simulator(__file__, "slow")


@pytest.mark.slow
def test_index_on_soft_devices_for_long(on_soft_devices):
    on_soft_devices(__file__, "slow")


def mixed(key):
    x = (int(key) & M) * 0x9FB21C651E98DF25 & M
    x ^= x >> 32
    x = x * 0xD6E8FEB86659FD93 & M
    return x ^ x >> 32


def shared_mix(key):
    return int(_ext.mixed(np.array([key]))[0])


class Oracle:
    """Buckets as lists of [key, word, freq, last_step] or None, one key after the other; and the side list."""

    def __init__(self, n_buckets, width, n_side, metadata=True):
        self.buckets, self.width = [[None] * width for _ in range(n_buckets)], width
        self.side, self.n_slots = [None] * n_side, n_buckets * width
        self.most = 2**32 - 1 if metadata else 0

    def two(self, key):
        """The two buckets of a key."""
        return [half * len(self.buckets) >> 32 for half in (mixed(key) & 0xFFFFFFFF, mixed(key) >> 32)]

    def entry(self, key):
        """Slot and entry of a key."""
        for first, entries in (*((b * self.width, self.buckets[b]) for b in self.two(key)), (self.n_slots, self.side)):
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
        free = [b.count(None) for b in self.buckets]
        firsts = []  # whether a key goes to its first bucket first
        for k in keys:
            one, other = (free[b] for b in self.two(k))
            firsts.append(one > self.width // 4 or one >= other)
        for i, b in [(i, self.two(k)[firsts[i] == again]) for again in (False, True) for i, k in enumerate(keys)]:
            if status[i] != REFUSED:
                continue
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
    scores = scores if isinstance(scores, np.ndarray) else scores.copy_to_host()
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
    notes = device.fetch(index.metadata(slots))
    assert list(zip(*(a.tolist() for a in (keys, slots, words, *notes)), strict=True)) == oracle.contents()


def same(device, index, got, want):
    """A placement and the oracle's; how many the counts say; the dirty victims."""
    slots, status, victims = (device.fetch(a).tolist() for a in (got.slots, got.status, got.victims))
    assert slots == want[0] and status == want[1]
    assert [v for v, w in zip(victims, want[2], strict=True) if w] == [w[0] for w in want[2] if w]
    assert got.n_new == want[1].count(NEW) and got.n_refused == want[1].count(REFUSED)
    assert got.n_evicted == sum(w is not None for w in want[2]) and got.n_dirty == want[1].count(EVICTED_DIRTY)
    at = [i for i, s in enumerate(want[1]) if s == EVICTED_DIRTY]
    victims = index.dirty_victims(got)
    listed = [*device.fetch(victims.noted).reshape(3, -1).tolist(), device.fetch(victims.slots).tolist()]
    assert list(zip(*listed, strict=True)) == [(*want[2][i], want[0][i]) for i in at]


def test_oracle_finds_what_it_inserted(lane):
    oracle = Oracle(3, 4, 2)
    keys = np.arange(40)
    slots, status, _ = oracle.insert(keys, keys, False, False)
    assert oracle.find(keys) == slots and status.count(NEW) == 14 and status.count(REFUSED) == 26
    oracle.settle(slots)
    slots, status, victims = oracle.insert(keys[::-1][:5], keys[:5], True, False)
    assert min(slots) >= 0 and oracle.find(np.array([v[0] for v in victims if v])) == [-1] * status.count(2)


def test_buckets_of_the_oracle_fill_evenly(lane):
    # With one bucket a key, buckets of 32 slots would refuse 3% of the keys of 0.9 a slot.
    oracle, rng = Oracle(100, 32, 0), np.random.default_rng(0)
    for _ in range(72):
        _, status, _ = oracle.insert(rng.integers(-(2**63), 2**63 - 1, 40), np.zeros(1, np.int64), False, False)
        assert status == [NEW] * 40
    assert sum(oracle.two(k)[0] == slot // 32 for k, slot, *_ in oracle.contents()) > 0.85 * 2880


def test_words_typed_as_on_a_device(lane):
    """The simulator computes in Python's integers; here the same functions are compiled for the host."""
    if lane != "cpu":
        pytest.skip("lane cpu is enough")
    numba = pytest.importorskip("numba")
    pytest.importorskip("numba_cuda", reason="the functions of kernels are there for the device with it alone")
    from hbkit.cuda import buckets

    n_ones = numba.njit(lambda x: sum([(x >> np.uint64(i)) & np.uint64(1) != 0 for i in range(64)]))
    typed = {**vars(buckets), "word": numba.njit(lambda value: np.uint64(value)), "ones": n_ones}
    helpers = (
        "mix shared_mix bucket_of second_of digest_of zeros matches n_free given_score note_of freq_of last_step_of"
    )
    for name in helpers.split():
        function = vars(buckets)[name].py_func
        typed[name] = numba.njit(FunctionType(function.__code__, typed, name))
    rng = np.random.default_rng(0)
    keys = np.append(rng.integers(-(2**63), 2**63 - 1, 200), [0, 1, -1, 2**63 - 1, -(2**63)])
    for key in keys:
        x, n_buckets = mixed(key), int(rng.choice([1, 3, 2**22, 2**31 - 1]))
        got = np.uint64(typed["mix"](key))
        assert typed["shared_mix"](key) == shared_mix(key)
        assert got == x and typed["digest_of"](got) == max(x >> 32 & 0xFF, 1)
        assert typed["bucket_of"](got, n_buckets) == (x & 0xFFFFFFFF) * n_buckets >> 32
        assert typed["second_of"](got, n_buckets) == (x >> 32) * n_buckets >> 32
        # Bytes of which many are neighbours in value, as a search by subtraction would take for each other.
        bucket = rng.choice([0, 1, 2, 127, 128, 129, 254, 255], 64).astype(np.uint8)
        digests, here = bucket.view(np.int64), bucket[32:].tolist()
        assert typed["n_free"](digests, 1) == here.count(0)
        for digest in (1, 2, 128, 129, 255):
            assert typed["matches"](digests, 1, digest) == sum(1 << i for i in range(32) if here[i] == digest)
    for freq in (0, 1, 2**31, 2**32 - 1):
        for last_step in (0, 1, 2**31, 2**32 - 1):
            note = typed["note_of"](freq, last_step)
            assert (typed["freq_of"](note), typed["last_step_of"](note)) == (freq, last_step)
    for scores, score, want in (([], -3, 0), ([], 2**62, MAX_SCORE), ([7], 0, 7), ([4, 5], 0, 5)):
        assert typed["given_score"](np.array(scores, np.int64), score, 1) == want


class Pair:
    """Calls of an index and of the oracle, which must agree; keys are drawn from a universe."""

    def __init__(self, device, seed, n_buckets, n, n_side=8):
        self.device, self.rng, self.n = device, np.random.default_rng(seed), n
        self.index, self.oracle = index_and_oracle(device, n_buckets, n, n_side)
        self.universe = self.rng.integers(-(2**63), 2**63 - 1, 4 * self.oracle.n_slots)
        self.held = []  # slots of batches that nobody released yet, and counts where they were updated
        self.step = 0

    def some(self, most):
        return self.rng.choice(self.universe, self.rng.integers(1, min(most, len(self.universe))), replace=False)

    def batch(self):
        """Keys with scores, for each or for all."""
        keys = self.some(self.n)
        counts = self.rng.integers(0, 9, len(keys))
        one = counts[:1] if self.rng.random() < 0.5 else self.device.send(counts[:1])
        return keys, counts, one if self.rng.random() < 0.3 else counts

    def insert(self):
        """Without `hold` before."""
        keys, _, scores = self.batch()
        evict, add = bool(self.rng.random() < 0.6), bool(self.rng.random() < 0.5)
        got = self.index.insert(keys, scores, evict=evict, add=add)
        want = self.oracle.insert(keys, scores, evict, add)
        same(self.device, self.index, got, want)
        self.held.append((want[0], None))

    def hold(self):
        """As a step does: what is missing is inserted, and all of it is updated before its release."""
        index, fetch = self.index, self.device.fetch
        keys, counts, scores = self.batch()
        evict, add = bool(self.rng.random() < 0.8), bool(self.rng.random() < 0.5)
        skip = int(keys[0]) if self.rng.random() < 0.5 else None
        n = self.rng.integers(0, len(keys) + 1) if self.rng.random() < 0.5 else len(keys)  # which only the device knows
        given = counts if self.rng.random() < 0.5 else None
        found = self.device.send(np.array([n, 0, 0], np.int32))
        got = index.hold(keys, scores, given, add=add, skip=skip, found=None if n == len(keys) else found)
        last = keys[n:]
        keys = keys[:n]
        slots, missing = self.oracle.hold(keys, scores if len(scores) == 1 else counts[:n], add, skip)
        listed = batch.missing(self.device, got)
        assert fetch(got.slots).tolist() == slots + [-1] * len(last)
        assert (listed.n_keys, listed.n_skipped, listed.at.tolist()) == (n, skip in keys, missing)
        assert listed.keys.tolist() == keys[missing].tolist()
        assert listed.counts.tolist() == [0 if given is None else c for c in counts[missing].tolist()]
        counts = counts[:n]
        scores = scores if len(scores) == 1 else counts
        given = counts[missing] if scores is counts else scores
        placed = index.insert(keys[missing], given, evict=evict, add=add)
        want = self.oracle.insert(keys[missing], given, evict, add)
        same(self.device, index, placed, want)
        slots = np.array(slots, np.int64)
        slots[missing] = want[0]
        self.held.append((slots.tolist(), counts))

    def release(self, left=0):
        while len(self.held) > left:
            slots, counts = self.held.pop(self.rng.integers(len(self.held)))
            self.step += 1
            if counts is not None:
                self.index.stamp(np.array(slots, np.int64), self.step, counts)
                self.oracle.stamp(slots, self.step, counts.tolist())
            self.index.settle(np.array(slots, np.int64))
            self.oracle.settle(slots)

    def mark(self):
        soon = int(self.rng.choice([0, 1, 2, 7, 255, 256, 10**6]))
        keys = self.some(2 * self.n)  # more than an insertion may have
        self.index.mark(keys, soon)
        self.oracle.mark(keys, soon)

    def age(self):
        self.index.age()
        self.oracle.age()

    def find(self):
        asked = self.rng.choice(self.universe, 2 * self.n)
        assert self.device.fetch(self.index.find(asked)).tolist() == self.oracle.find(asked)

    def clean(self):
        dirty = self.oracle.dirty()
        cut = int(self.rng.integers(0, 2**64, dtype=np.uint64))
        for first, last in ((0, 2**64), (0, cut), (cut, 2**64), (cut, cut), (0, 0), (2**64, 2**64)):
            want = [(k, *self.oracle.at(slot)[FREQ:]) for k, slot in dirty if first <= shared_mix(k) < last]
            listed = self.device.fetch(self.index.dirty(first, last)).reshape(3, -1)
            assert list(zip(*listed.tolist(), strict=True)) == want
        saved = [slot for _, slot in dirty[:: self.rng.integers(1, 4)]]
        self.index.clean(np.array([-1, *saved]))
        self.oracle.clean(saved)

    def metadata(self):
        slots = [*self.oracle.find(self.some(self.n)), -1]
        freq, last_step = self.rng.integers(0, 2**33, (2, len(slots)))
        self.index.put_metadata(np.array(slots, np.int64), freq, last_step)
        self.oracle.put_metadata(slots, freq.tolist(), last_step.tolist())
        got = self.device.fetch(self.index.metadata(np.array(slots, np.int64)))
        assert list(zip(*got.tolist(), strict=True)) == self.oracle.metadata(slots)

    def erase(self):
        self.release()
        gone = self.some(self.n // 2)
        want = self.oracle.find(gone)
        assert self.index.erase(gone).tolist() == want
        for slot in want:
            if slot >= 0:
                self.oracle.drop(slot)

    def drain(self):
        old, placed = self.index.drain()
        want_old, want = self.oracle.drain()
        assert old.tolist() == want_old
        same(self.device, self.index, placed, want)

    def check(self):
        check(self.device, self.index, self.oracle)
        self.index.validate()


def test_random_calls_match_oracle_in_any_order(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    n_buckets, n, n_calls = {"cudasim": (3, 60, 8), "soft": (100, 2000, 24)}.get(lane, (300, 6000, 40))
    pair = Pair(device, 6, n_buckets, n)
    for call in range(n_calls):
        (pair.hold if call % 4 else pair.insert)()
        pair.release(left=call % 3)
        pair.mark()
        if call % 2:
            pair.find()
            pair.clean()
        if call % 4 == 3:
            pair.metadata()
            pair.age()
            pair.erase()
            pair.drain()
        pair.check()
    stats = pair.index.stats()
    assert stats["n_keys"] == len(pair.index) == len(pair.oracle.contents())
    assert stats["n_evicted"] > 0 and stats["n_spilled"] > 0 and stats["n_refused"] > 0


@pytest.mark.slow
def test_long_random_calls_match_oracle(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    n_buckets, n, n_calls = {"cudasim": (2, 40, 60), "soft": (20, 500, 100)}.get(lane, (40, 1500, 200))
    pair = Pair(device, 0, n_buckets, n, n_side=n // 5)
    calls = [pair.hold] * 5 + [pair.release] * 4 + [pair.insert, pair.mark, pair.mark, pair.clean, pair.drain]
    calls += [pair.age, pair.find, pair.metadata, pair.erase]
    for _ in range(n_calls):
        calls[pair.rng.integers(len(calls))]()
        pair.check()


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


def test_keys_of_one_first_bucket_go_to_their_second(lane, device, any_order):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, oracle = index_and_oracle(device, 4, 200, 3)
    keys = np.array([k for k in range(3000) if oracle.two(k)[0] == 1 != oracle.two(k)[1]])
    n, at = oracle.width, 0
    # Until the first bucket is crowded; few at a time, which go to their second; more than a bucket has; past all.
    for size in (n - n // 4 - 1, 1, 1, 3, n + n // 2, 3, n):
        some, at = keys[at : at + size], at + size
        got = index.insert(some, np.ones(1, np.int64), evict=True)
        want = oracle.insert(some, np.ones(1, np.int64), True, False)
        same(device, index, got, want)
        if size == 3:
            index.settle(got.slots)
            oracle.settle(want[0])
        assert device.fetch(index.find(keys)).tolist() == oracle.find(keys)
    assert len({slot // n for slot in oracle.find(keys[:at])}) >= 4
    check(device, index, oracle)
    index.validate()
    gone = keys[:at:2]
    slots = oracle.find(gone)
    held = [s if s >= 0 and oracle.at(s)[WORD] >= PIN else -1 for s in slots]
    index.settle(np.array(held))
    oracle.settle(held)
    assert index.erase(gone).tolist() == slots
    assert device.fetch(index.find(keys)).tolist() == [
        -1 if k in gone else s for k, s in zip(keys, oracle.find(keys), strict=True)
    ]


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
    positions = np.flatnonzero(status == EVICTED_DIRTY)
    assert 0 < len(positions) == got.n_dirty < got.n_evicted
    assert device.fetch(index.dirty_victims(got).slots).tolist() == slots[positions].tolist()
    victims = device.fetch(got.victims)[positions]
    assert {int(s): int(k) for s, k in zip(resident, keys, strict=True) if s >= 0}.items() >= dict(
        zip(slots[positions].tolist(), victims.tolist(), strict=True)
    ).items()
    # Clean ones go before dirty ones of equal score.
    assert (np.flatnonzero(status == EVICTED_DIRTY).size == 0) or got.n_evicted > (status == EVICTED_CLEAN).sum()


def test_victims_are_those_that_nobody_wants_of_least_score_clean_first(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, oracle = index_and_oracle(device, 1, 40, 0)
    n = oracle.n_slots
    keys = np.arange(n)
    slots = device.fetch(index.insert(keys, np.full(1, 5)).slots)
    index.settle(slots)
    index.stamp(slots[:1], 1)  # dirty
    index.settle(index.hold(keys[1:2], np.full(1, 6)).slots)  # of a greater score
    for key, soon in ((2, 1), (3, 255), (4, 7)):  # wanted, the sooner the larger
        index.mark(keys[key : key + 1], soon)
    index.settle(index.hold(keys[4:5], np.full(1, 0)).slots)  # whose batch has come: only its score counts now
    order = []
    for new in range(1000, 1000 + n):
        got = index.insert(np.full(1, new), np.full(1, MAX_SCORE), evict=True)
        order += device.fetch(got.victims).tolist()
    assert order == [4, *range(5, n), 0, 1, 2, 3]


def test_a_free_slot_holds_no_key(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    # Keys of the least digest, to which a free slot's differs in one bit only; 0 is one of them.
    least = np.array([k for k in range(2000) if mixed(k) >> 32 & 0xFF < 2])
    index, _ = index_and_oracle(device, 1, 100, 0)
    assert least[0] == 0 and len(least) > 8
    below, others = least[1:2], least[2:9]
    index.settle(index.insert(below, np.zeros(1, np.int64)).slots)
    assert device.fetch(index.find(least[:1])).tolist() == [-1]
    index.settle(index.insert(others, np.zeros(1, np.int64)).slots)
    index.erase(others)
    assert device.fetch(index.find(others)).tolist() == [-1] * len(others)
    held = index.hold(others, np.zeros(1, np.int64))
    assert batch.missing(device, held).keys.tolist() == others.tolist()
    index.validate()


def test_every_key_and_score_may_be_there(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, oracle = index_and_oracle(device, 2, 10, 2)
    keys = np.array([-(2**63), 2**63 - 1, -1, 0, 1, -(2**63) + 1])
    scores = np.array([0, 2**63 - 1, MAX_SCORE, MAX_SCORE + 1, 7, -3])
    for call in (index.insert, index.hold, index.insert):
        slots = device.fetch(call(keys, scores, add=True).slots)
        assert slots.tolist() == device.fetch(index.find(keys)).tolist() and min(slots) >= 0
    words = device.fetch(index._entries)[slots, 1]
    assert words.tolist() == [3 * PIN + 2 * score for score in (0, MAX_SCORE, MAX_SCORE, MAX_SCORE, 21, 0)]
    for skip in keys.tolist():
        held = index.hold(keys, scores, skip=skip)
        found = batch.missing(device, held)
        assert len(found.at) == 0 and (found.n_keys, found.n_skipped) == (len(keys), 1)
        assert device.fetch(held.slots).tolist() == [-1 if k == skip else s for k, s in zip(keys, slots, strict=True)]
        index.settle(held.slots)
    assert (device.fetch(index._entries)[slots, 1] // PIN == 3).all()
    oracle.insert(keys, scores, False, False)
    assert index.contents()[0].tolist() == [k for k, *_ in oracle.contents()]


def test_hold_writes_where_it_is_told(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, _ = index_and_oracle(device, 2, 10, 2)
    one = np.ones(1, np.int64)
    index.insert(np.arange(5), one)
    slots, listed = (device.send(np.full(n, -7)) for n in (9, 19))
    found = device.send(np.array([7, 0, 0], np.int32))
    counts = np.array([1, 2, 3, 4, 5, 2**40, 7])
    held = index.hold(np.arange(7), one, counts, slots=slots, found=found, listed=listed, skip=6)
    got = batch.missing(device, held)
    assert (got.n_keys, got.n_skipped) == (7, 1) and held.slots.shape == (7,)
    assert [a.tolist() for a in got[2:]] == [[5], [5], [2**32 - 1]]  # counts stop at their largest
    assert device.fetch(slots)[:5].tolist() == device.fetch(index.find(np.arange(5))).tolist()
    assert device.fetch(slots)[5:].tolist() == [-1, -1, -7, -7]
    assert device.fetch(listed)[2:].tolist() == [-7] * 17 and device.fetch(found).tolist() == [7, 1, 1]
    index.put(slots, np.array([8, 0]), np.array([3, -1]))
    assert device.fetch(slots)[[0, 7, 8]].tolist() == [-1, -7, 3]
    assert index.hold(np.arange(0), one, slots=slots).slots.shape == (0,)


def test_errors_leave_what_was_there(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    index, _ = index_and_oracle(device, 2, 10, 2)
    one, keys = np.ones(1, np.int64), np.arange(4)
    slots = device.fetch(index.insert(keys, one).slots)

    def pins():
        return (device.fetch(index._entries)[slots, 1] // PIN).tolist()

    index.settle(slots[:2])
    index.settle(slots[:1])  # once too often
    with pytest.raises(InvalidArgument, match="nobody holds"):
        index.insert(np.arange(10, 15), one)
    assert len(index) == 4 and pins() == [0, 0, 1, 1]
    for call in (index.settle, index.clean, lambda slots: index.stamp(slots, 1), index.metadata):
        call(np.array([2 * index.n_slots]))
        held = index.hold(keys, one)
        with pytest.raises(InvalidArgument, match="outside"):
            batch.missing(device, held)
        index.settle(held.slots)
        assert pins() == [0, 0, 1, 1]
    entries = device.fetch(index._entries)
    entries[slots[3], 1] += 32766 * PIN
    index._entries.copy_to_device(entries)
    with pytest.raises(InvalidArgument, match="32,767"):
        index.insert(keys[3:], one)
    held = index.hold(keys, one)
    with pytest.raises(InvalidArgument, match="32,767"):
        batch.missing(device, held)
    index.settle(held.slots)
    assert pins() == [0, 0, 1, 32767]
    index.settle(slots[3:])
    index.hold(keys, one)
    assert pins() == [1, 1, 2, 32767]
    with pytest.raises(InvalidArgument, match="soon"):
        index.mark(keys, -1)
    index.validate()


def test_metadata_stop_at_their_largest_and_may_be_left_out(lane, device):
    if lane == "cpu":
        pytest.skip("lane cpu: no device")
    for metadata, most in ((True, 2**32 - 1), (False, 0)):
        index, _ = index_and_oracle(device, 1, 64, 2, metadata)
        one, keys = np.ones(1, np.int64), np.arange(3)
        slots = index.insert(keys, one).slots
        slots = device.send(device.fetch(slots))
        index.put_metadata(slots, np.array([2**40, 5, 2**32 - 2]), np.array([2**40, 2**32 - 1, 0]))
        index.stamp(slots, 2**35, np.array([1, 2, 3]))
        index.stamp(slots, 2**32 - 1)
        freq, last_step = device.fetch(index.metadata(slots)).tolist()
        assert freq == [min(f, most) for f in (2**32 - 1, 7, 2**32 - 1)] and last_step == [most] * 3
        index.settle(slots)
        victims = index.dirty_victims(index.insert(np.arange(100, 132), np.full(1, 9), evict=True))
        n = victims.slots.shape[0]
        assert device.fetch(victims.noted).reshape(3, n)[1:].tolist() == [freq[:n], last_step[:n]]
        assert device.fetch(index.metadata(victims.slots)).tolist() == [[0] * n] * 2


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
    assert index.erase(one).tolist() == [-2]  # it is pinned
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
