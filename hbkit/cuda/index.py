"""DeviceIndex: which line of device memory holds a key; buckets of a warp's width, each owned by one warp in a launch.

A key belongs to one bucket of `BUCKET` slots, and a slot is the number of its line. Of a slot there is a digest (a
byte; 0 where it is free) and an entry of 16 bytes: the key, and its word

    pins << 48 | score << 1 | dirty

so that one comparison finds a bucket's victim: the least word is an unpinned one if there is any, of the least score,
clean before dirty where scores are equal. The caller chooses the policy by the scores it gives: the step (LRU), a
count that is added (LFU), or how soon the key comes again (look-ahead).

A batch's distinct keys are inserted in two launches, in both of which no two threads write one place:

- `probe`: a thread a key. It reads the bucket's digests (32 bytes, one sector) and the entry of each match. A key that
  is there is pinned and scored: only its own thread touches its entry. A key that is not is pushed on its bucket's list
  by an atomic exchange, and whoever pushes first puts the bucket on the list of work.
- `place`: a warp a bucket of that list. It reads the list of new keys, whose order came of the threads' race, and keeps
  the `BUCKET` least positions in order, one a lane: so the race leaves no trace. One after the other they take the free
  slots from the lowest lane on, then the slots of least words. The batch's own keys are pinned, so none evicts another.
  Nobody else reads or writes the bucket in this launch.

So slots, victims and their order are a function of the calls alone. What finds all of its bucket pinned goes to the
side list, whose lines come after those of the buckets: every search goes through it after the bucket, `drain` empties
it when pins are gone, and what finds it full too gets the slot -1 and is counted. No key is dropped unseen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.cuda.arith import cuda
from hbkit.cuda.device import BAD_ERASE, Device, simulated
from hbkit.cuda.warp import ALL64, WARP, ballot, first, inline, lane, ones, shuffle, up, word, word_of, xor
from hbkit.errors import InvalidArgument

Int64s = npt.NDArray[np.int64]

BUCKET = WARP  # slots a bucket
KEY, WORD = 0, 1  # of an entry
PIN = 1 << 48
MAX_SCORE = (1 << 47) - 1
HOLE = -1  # the word of a free place of the side list
FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY, REFUSED = range(5)  # what became of a key
SLOT, STATUS, VICTIM = range(3)  # rows of `placed`
N_WORK, N_NEW, N_EVICTED, N_REFUSED = range(4)  # counters; there are two sets, which calls take in turns
COUNTERS = 8
PLACERS = 8192  # warps of `place` at the most: about as many as a device runs at once, since each adds to the counters
NO_POSITION = 2**31 - 1
TILES = 8 if simulated() else 4096  # warps that share a scan

BYTES, HIGHS = word_of(0x0101_0101_0101_0101), word_of(0x8080_8080_8080_8080)
TO_TOP_BYTE = word_of(0x0102_0408_1020_4080)
MIX1, MIX2 = word_of(0x9FB2_1C65_1E98_DF25), word_of(0xD6E8_FEB8_6659_FD93)
S8, S32, S7, S56, LOW32, LOW8 = map(word_of, (8, 32, 7, 56, 0xFFFF_FFFF, 0xFF))


@inline
def mix(key: Any) -> Any:
    """64 bits of a key, unlike those of `hbkit._ext.mix`, which ranks share."""
    x = (word(key) * MIX1) & ALL64
    x ^= x >> S32
    x = (x * MIX2) & ALL64
    return x ^ (x >> S32)


@inline
def bucket_of(mixed: Any, n_buckets: Any) -> Any:
    """Bucket of a mixed key, from its low 32 bits."""
    return np.int64(((mixed & LOW32) * word(n_buckets)) >> S32)


@inline
def digest_of(mixed: Any) -> Any:
    """Digest of a mixed key: 1 to 255."""
    return max(np.int64((mixed >> S32) & LOW8), np.int64(1))


@inline
def matches(digests: Any, bucket: Any, digest: Any) -> Any:
    """A bit for each slot of a bucket whose digest is this; now and then one more, above a true one."""
    pattern = word(digest) * BYTES
    found = np.int64(0)
    for i in range(BUCKET // 8):
        x = word(digests[bucket * (BUCKET // 8) + i]) ^ pattern
        zero = (x - BYTES) & ~x & HIGHS  # the high bit of each byte that is 0
        found |= np.int64((((zero >> S7) * TO_TOP_BYTE) & ALL64) >> S56) << (8 * i)
    return found


@inline
def look(digests: Any, entries: Any, key: Any) -> Any:
    """Slot of a key, or -1."""
    mixed = mix(key)
    n_slots = digests.shape[0] * 8
    bucket = bucket_of(mixed, n_slots // BUCKET)
    found = matches(digests, bucket, digest_of(mixed))
    while found != 0:
        slot = bucket * BUCKET + first(found)
        if entries[slot, KEY] == key:
            return slot
        found &= found - 1
    for slot in range(n_slots, entries.shape[0]):
        if entries[slot, KEY] == key and entries[slot, WORD] != HOLE:
            return slot
    return np.int64(-1)


def find(digests: Any, entries: Any, keys: Any, slots: Any, error: Any) -> None:
    """``slots[i]`` = slot of ``keys[i]``, or -1. Nothing is written but that; keys may repeat."""
    for i in range(cuda.grid(1), keys.shape[0], cuda.gridsize(1)):
        slots[i] = look(digests, entries, keys[i])


def probe(
    digests: Any, entries: Any, keys: Any, scores: Any, add: Any, placed: Any, lists: Any, turn: Any, error: Any
) -> None:
    """Pin and score the keys that are there, and list the others by bucket. Keys are distinct.

    A score is set, or added where `add` is not 0. ``lists``: int32, `COUNTERS` of them, of which this call's begin at
    `turn`; a head for each bucket, a link for each key, then the buckets that have work, as many as keys. Heads are -1
    before and after.
    """
    n = keys.shape[0]
    n_buckets = digests.shape[0] * 8 // BUCKET
    links = COUNTERS + n_buckets
    for base in range(cuda.grid(1) - lane(), n, cuda.gridsize(1)):
        i = base + lane()
        bucket = np.int64(0)
        begins = False
        if i < n:
            slot = look(digests, entries, keys[i])
            placed[SLOT, i] = slot
            if slot >= 0:
                old = entries[slot, WORD]
                score = min(scores[i] + add * ((old & (PIN - 1)) >> 1), MAX_SCORE)
                entries[slot, WORD] = (old & ~(PIN - 2)) + PIN + (score << 1)
                placed[STATUS, i] = FOUND
            else:
                placed[STATUS, i] = REFUSED
                bucket = bucket_of(mix(keys[i]), n_buckets)
                below = cuda.atomic.exch(lists, COUNTERS + bucket, i)
                lists[links + i] = below
                begins = below < 0
        # One addition a warp: a million to one place would take longer than all the rest.
        beginners = ballot(begins)
        if beginners != 0:
            at = np.int32(0)
            if lane() == first(beginners):
                at = cuda.atomic.add(lists, turn + N_WORK, ones(beginners))
            at = shuffle(at, first(beginners))
            if begins:
                before = beginners & ((1 << lane()) - 1)
                lists[links + n + at + ones(before)] = bucket


def place(
    digests: Any, entries: Any, keys: Any, scores: Any, evict: Any, placed: Any, lists: Any, turn: Any, error: Any
) -> None:
    """Give the keys that `probe` listed a slot, the first ones first; evict where `evict` is not 0.

    Here ``digests`` is the same memory by bytes. A victim's key and whether it was dirty are noted at the position of
    the key that took its slot; its line is still as it was. The next call's counters are set to 0.
    """
    n = keys.shape[0]
    n_buckets = digests.shape[0] // BUCKET
    links = COUNTERS + n_buckets
    n_new = np.int64(0)
    n_evicted = np.int64(0)
    n_refused = np.int64(0)
    me = lane()
    work = np.int64(lists[turn + N_WORK])
    warps = cuda.gridsize(1) // WARP
    begin = cuda.grid(1) // WARP
    if me == 0:
        for i in range(begin, COUNTERS // 2, warps):
            lists[COUNTERS // 2 - turn + i] = 0
    if work == 0:
        return
    works = links + n
    following = lists[works + min(begin, work - 1)]  # read a bucket ahead, since a warp waits for each read
    for at in range(begin, work, warps):
        bucket = np.int64(following)
        following = lists[works + min(at + warps, work - 1)]
        mine = bucket * BUCKET + me
        digest = np.int64(digests[mine])
        value = entries[mine, WORD]
        i = lists[COUNTERS + bucket]
        position = np.int32(NO_POSITION)
        n_listed = np.int64(0)
        while i >= 0:  # the least positions, ascending by lane
            rank = ones(ballot(position < i))
            from_below = up(position)
            if me == rank:
                position = i
            elif me > rank:
                position = from_below
            n_listed += 1
            i = lists[links + i]
        if me == 0:
            lists[COUNTERS + bucket] = -1  # every lane has read it: there was a vote since
        n_placed = np.int64(0)
        while n_placed < n_listed and n_placed < BUCKET:
            i = shuffle(position, n_placed)
            free = ballot(digest == 0)
            chosen = np.int64(0)
            if free != 0:
                chosen = np.int64(first(free))
                n_new += 1
            else:
                if evict == 0:
                    break
                least = np.int64((min(value, PIN) << 5) | me)  # a slot's word and lane as one number
                step = BUCKET // 2
                while step > 0:
                    other = xor(least, step)
                    if other < least:
                        least = other
                    step //= 2
                if least >> 5 >= PIN:
                    break
                chosen = np.int64(least & 31)
                n_evicted += 1
            if me == chosen:
                status = np.int64(NEW)
                if digest != 0:
                    placed[VICTIM, i] = entries[mine, KEY]
                    status = EVICTED_CLEAN + (value & 1)
                value = PIN + (min(scores[i], MAX_SCORE) << 1)
                entries[mine, KEY] = keys[i]
                entries[mine, WORD] = value
                digest = digest_of(mix(keys[i]))
                digests[mine] = digest
                placed[SLOT, i] = mine
                placed[STATUS, i] = status
            n_placed += 1
        n_refused += n_listed - n_placed
    if me == 0:
        if n_new > 0:
            cuda.atomic.add(lists, turn + N_NEW, n_new)
        if n_evicted > 0:
            cuda.atomic.add(lists, turn + N_EVICTED, n_evicted)
        if n_refused > 0:
            cuda.atomic.add(lists, turn + N_REFUSED, n_refused)


def settle(entries: Any, slots: Any, dirty: Any, error: Any) -> None:
    """Take one pin from each slot, and mark it dirty where `dirty` is not 0. Slots are distinct; -1 is left out."""
    for i in range(cuda.grid(1), slots.shape[0], cuda.gridsize(1)):
        slot = slots[i]
        if slot >= 0:
            entries[slot, WORD] = (entries[slot, WORD] - PIN) | dirty


def erase(digests: Any, entries: Any, keys: Any, slots: Any, error: Any) -> None:
    """Forget keys: ``slots[i]`` is where the key was, or -1. Keys are distinct. A pinned one stays, as an error.

    Two keys of a bucket may share eight digests, so a digest goes by an atomic operation on its bits alone.
    """
    n_slots = digests.shape[0] * 8
    for i in range(cuda.grid(1), keys.shape[0], cuda.gridsize(1)):
        slot = look(digests, entries, keys[i])
        if slot >= 0 and entries[slot, WORD] >= PIN:
            error[0] = BAD_ERASE
            slot = np.int64(-1)
        elif slot >= n_slots:
            entries[slot, WORD] = HOLE
        elif slot >= 0:
            cuda.atomic.and_(digests, slot // 8, ~(np.int64(0xFF) << (8 * (slot % 8))))
        slots[i] = slot


def count(placed: Any, n: Any, least: Any, most: Any, totals: Any, error: Any) -> None:
    """``totals[t]`` = how many of the n keys, in tile t, have a status from `least` to `most`; a warp a tile."""
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        total = np.int64(0)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            i = base + lane()
            total += ones(ballot(i < n and least <= placed[STATUS, min(i, n - 1)] <= most))
        if lane() == 0:
            totals[tile] = total


def select(placed: Any, n: Any, least: Any, most: Any, totals: Any, positions: Any, error: Any) -> None:
    """List the positions that `count` counted, in order. A warp sums the totals before its tile for itself."""
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        at = sum_before(totals, tile)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            i = base + lane()
            mine = i < n and least <= placed[STATUS, min(i, n - 1)] <= most
            chosen = ballot(mine)
            if mine:
                positions[at + ones(chosen & ((1 << lane()) - 1))] = i
            at += ones(chosen)


@inline
def tile_length(n: Any) -> Any:
    """Items a tile: n over the tiles, a multiple of the warp."""
    return (n + TILES * WARP - 1) // (TILES * WARP) * WARP


@inline
def sum_before(totals: Any, tile: Any) -> Any:
    """Sum of ``totals[:tile]``, in every lane; four reads at a time are on their way."""
    total = np.int64(0)
    for i in range(lane(), tile, 4 * WARP):
        total += totals[i]
        for j in range(1, 4):
            total += totals[min(i + j * WARP, TILES - 1)] * (i + j * WARP < tile)
    step = WARP // 2
    while step > 0:
        total += xor(total, step)
        step //= 2
    return total


def spill(entries: Any, keys: Any, scores: Any, positions: Any, sides: Any, placed: Any, error: Any) -> None:
    """Write the keys at these positions to places of the side list, pinned; places are distinct."""
    for i in range(cuda.grid(1), sides.shape[0], cuda.gridsize(1)):
        p = positions[i]
        entries[sides[i], KEY] = keys[p]
        entries[sides[i], WORD] = PIN + (min(scores[p], MAX_SCORE) << 1)
        placed[SLOT, p] = sides[i]
        placed[STATUS, p] = NEW


def vacate(entries: Any, sides: Any, error: Any) -> None:
    """Make these places of the side list free."""
    for i in range(cuda.grid(1), sides.shape[0], cuda.gridsize(1)):
        entries[sides[i], WORD] = HOLE


_A64, _A32 = "int64[::1]", "int32[::1]"
_INSERT = f"int64[:,::1], {_A64}, {_A64}, int64, int64[:,::1], {_A32}, int64, {_A32}"
SIGNATURES = {
    find: f"void({_A64}, int64[:,::1], {_A64}, {_A64}, {_A32})",
    probe: f"void({_A64}, {_INSERT})",
    place: f"void(uint8[::1], {_INSERT})",
    settle: f"void(int64[:,::1], {_A64}, int64, {_A32})",
    erase: f"void({_A64}, int64[:,::1], {_A64}, {_A64}, {_A32})",
    count: f"void(int64[:,::1], int64, int64, int64, {_A32}, {_A32})",
    select: f"void(int64[:,::1], int64, int64, int64, {_A32}, {_A64}, {_A32})",
    spill: f"void(int64[:,::1], {_A64}, {_A64}, {_A64}, {_A64}, int64[:,::1], {_A32})",
    vacate: f"void(int64[:,::1], {_A64}, {_A32})",
}

for _kernel, _signature in SIGNATURES.items():
    _kernel.signature = _signature  # type: ignore[attr-defined]  # functions take attributes; `Device.launch` reads it


@dataclass(frozen=True)
class Placement:
    """What became of a batch's keys; the arrays are in device memory, by the keys' positions, until the next call.

    Attributes
    ----------
    n : int
        Keys of the batch.
    n_new, n_evicted, n_refused : int
        Keys that took a free slot, took a victim's, and have none. The others were found.
    """

    _placed: Any  # int64[3 * max_keys]
    n: int
    n_new: int
    n_evicted: int
    n_refused: int

    @property
    def slots(self) -> Any:
        """int64[n]: the key's slot, pinned; -1 where there was no room at all."""
        return self._row(SLOT)

    @property
    def status(self) -> Any:
        """int64[n]: FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY (the slot was taken from a victim) or REFUSED."""
        return self._row(STATUS)

    @property
    def victims(self) -> Any:
        """int64[n]: the victim's key where there is one. Its line is in `slots` until the caller writes there."""
        return self._row(VICTIM)

    def _row(self, row: int) -> Any:
        first_of_row = row * (self._placed.shape[0] // 3)
        return self._placed[first_of_row : first_of_row + self.n]


class DeviceIndex:
    """Slots of keys in device memory; see the page's beginning.

    Parameters
    ----------
    device : Device
    n_slots : int
        Rounded down to whole buckets.
    max_keys : int
        Keys of a call at the most.
    n_side : int
        Lines of the side list, whose slots are ``n_slots .. n_slots + n_side - 1``.

    Notes
    -----
    Keys and scores are int64[n], in host or device memory; any key may be there. Calls come one at a time. Device
    memory: 17 bytes a slot, 32 a key of a call.
    """

    def __init__(self, device: Device, n_slots: int, max_keys: int, n_side: int = 1024) -> None:
        n_buckets = n_slots // BUCKET
        if n_buckets < 1 or n_buckets >= 2**31 or not 0 < max_keys < 2**31 - 1:
            raise InvalidArgument(
                f"an index of {n_slots} slots for {max_keys} keys a call",
                device=device.name,
                remedy=f"give at least {BUCKET} slots and 1 key, and less than 2**31 buckets and keys",
            )
        self.n_slots, self.max_keys, self.max_side = n_buckets * BUCKET, max_keys, n_side
        self._device = device
        self._digests = device.send(np.zeros(self.n_slots // 8, np.int64))
        self._bytes = self._digests.view(np.uint8)
        self._entries = device.send(np.zeros((self.n_slots + n_side, 2), np.int64))
        lists = np.zeros(COUNTERS + n_buckets + 2 * max_keys, np.int32)
        lists[COUNTERS : COUNTERS + n_buckets] = -1
        self._lists = device.send(lists)
        self._counters = [self._lists[i : i + COUNTERS // 2] for i in (0, COUNTERS // 2)]
        self._turn = 0
        self._placed = device.empty((3, max_keys), np.int64)
        self._flat = self._placed.reshape(3 * max_keys)
        self._positions = device.empty((max_keys,), np.int64)
        self._totals = device.empty((TILES,), np.int32)
        self._searched = self._entries[: self.n_slots]  # the buckets' entries, and the side list as far as it is used
        self._holes: list[int] = []  # free places below the end of the side list, descending
        self._n_keys = self._n_evicted = self._n_refused = self._n_spilled = 0

    def __len__(self) -> int:
        return self._n_keys

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        arrays = (self._digests, self._entries, self._lists, self._placed, self._positions)
        return sum(int(a.size * a.dtype.itemsize) for a in arrays)

    @property
    def n_side(self) -> int:
        """Keys in the side list."""
        return int(self._searched.shape[0]) - self.n_slots - len(self._holes)

    def stats(self) -> dict[str, int]:
        """Keys now; keys evicted, sent to the side list, and refused since the beginning."""
        return {
            "n_keys": self._n_keys,
            "n_side": self.n_side,
            "n_evicted": self._n_evicted,
            "n_spilled": self._n_spilled,
            "n_refused": self._n_refused,
        }

    def find(self, keys: Any, out: Any = None) -> Any:
        """Slots of keys, which may repeat: int64[n] in device memory (`out`), -1 where there is none. Does not wait."""
        keys = self._sent(keys)
        slots = self._device.empty(keys.shape, np.int64) if out is None else out
        self._device.launch(find, keys.size, self._digests, self._searched, keys, slots)
        return slots

    def insert(self, keys: Any, scores: Any, *, evict: bool = False, add: bool = False) -> Placement:
        """Find distinct keys or give them slots, each pinned once more.

        Parameters
        ----------
        keys, scores : int64[n]
            Scores from 0 to `MAX_SCORE`; larger ones are held there.
        evict : bool
            A key that finds its bucket full takes the slot of the least score that nobody pins. Else, and where all
            are pinned, it goes to the side list.
        add : bool
            Add to the score of a key that was there, instead of setting it.
        """
        keys, scores = self._sent(keys), self._sent(scores)
        placed = self._place(keys, scores, evict, add)
        if placed.n_refused:
            placed = self._spill(placed, keys, scores)
        self._n_keys += placed.n_new
        self._n_evicted += placed.n_evicted
        self._n_refused += placed.n_refused
        return placed

    def positions(self, placement: Placement, least: int, most: int, n: int) -> Any:
        """Positions of the `n` keys of a placement with a status from `least` to `most`: int64[n], ascending."""
        device, some = self._device, (placement.n, least, most)
        device.launch(count, TILES * WARP, self._placed, *some, self._totals)
        device.launch(select, TILES * WARP, self._placed, *some, self._totals, self._positions)
        return self._positions[:n]

    def settle(self, slots: Any, *, dirty: bool = False) -> None:
        """Take one pin from distinct slots, -1 left out; mark them dirty. Does not wait."""
        slots = self._sent(slots)
        self._device.launch(settle, slots.size, self._entries, slots, int(dirty))

    def erase(self, keys: Any) -> Int64s:
        """Forget distinct keys: int64[n], the slots where they were, -1 where there was none.

        Raises
        ------
        InvalidArgument
            A key is pinned; the others are erased.
        """
        keys = self._sent(keys)
        slots = self._device.empty(keys.shape, np.int64)
        self._device.launch(erase, keys.size, self._digests, self._searched, keys, slots)
        host = slots.copy_to_host()
        self._n_keys -= int(np.count_nonzero(host >= 0))
        self._free(host[host >= self.n_slots])
        self._device.sync()
        return host

    def drain(self) -> tuple[Int64s, Placement]:
        """Move what nobody pins from the side list into the buckets, evicting: old slots, and the placement of them.

        The caller saves the victims' lines, then moves the lines at old slots to the new ones, which are not pinned. A
        placement of -1 stays where it was.
        """
        end = int(self._searched.shape[0])
        side = self._device.fetch(self._entries[self.n_slots : end]) if end > self.n_slots else np.zeros((0, 2), int)
        at = np.flatnonzero((side[:, WORD] != HOLE) & (side[:, WORD] < PIN))[: self.max_keys]
        old, dirty = at + self.n_slots, (side[at, WORD] & 1).astype(bool)
        keys, scores = self._device.send(side[at, KEY]), self._device.send(side[at, WORD] >> 1)
        searched, self._searched = self._searched, self._entries[: self.n_slots]
        placed = self._place(keys, scores, True, False)
        self._searched = searched
        new = self._device.fetch(placed.slots) if len(at) else at
        for some, mark in ((new[dirty], True), (new[~dirty], False)):
            self.settle(some, dirty=mark)
        gone = old[new >= 0]
        self._device.launch(vacate, len(gone), self._entries, self._device.send(gone))
        self._free(gone)
        self._n_keys -= placed.n_evicted
        self._n_evicted += placed.n_evicted
        return old, placed

    def validate(self) -> None:
        """Recount everything; AssertionError where it contradicts itself."""
        keys, slots = self.contents()
        assert len(keys) == self._n_keys == len(np.unique(keys))
        for at in range(0, len(keys), self.max_keys):
            some = slice(at, at + self.max_keys)
            assert np.array_equal(self._device.fetch(self.find(keys[some])), slots[some])
        lists = self._device.fetch(self._lists)
        assert (lists[COUNTERS : COUNTERS + self.n_slots // BUCKET] == -1).all()

    def contents(self) -> tuple[Int64s, Int64s]:
        """All keys and their slots, by slot: int64[n_keys] each."""
        entries = self._device.fetch(self._searched)
        used = self._device.fetch(self._bytes) != 0
        slots = np.flatnonzero(np.concatenate([used, entries[self.n_slots :, WORD] != HOLE]))
        return entries[slots, KEY], slots

    def _sent(self, keys: Any) -> Any:
        if keys.dtype != np.int64 or keys.ndim != 1 or keys.shape[0] > self.max_keys:
            raise InvalidArgument(
                f"{keys.dtype}{tuple(keys.shape)} given to an index of {self.max_keys} keys a call",
                device=self._device.name,
                remedy="give int64[n], and fewer of them or a larger index",
            )
        return self._device.send(keys) if isinstance(keys, np.ndarray) else keys

    def _place(self, keys: Any, scores: Any, evict: bool, add: bool) -> Placement:
        n = keys.shape[0]
        if scores.shape != keys.shape:
            raise InvalidArgument(f"{scores.shape[0]} scores for {n} keys", remedy="give each key its score")
        if n == 0:
            return Placement(self._flat, 0, 0, 0, 0)
        device, turn = self._device, self._turn * (COUNTERS // 2)
        rest = (self._placed, self._lists, turn)
        device.launch(probe, n, self._digests, self._searched, keys, scores, int(add), *rest)
        device.launch(place, min(n, PLACERS) * WARP, self._bytes, self._entries, keys, scores, int(evict), *rest)
        counters = self._counters[self._turn]
        self._turn ^= 1  # `place` has cleared the other ones, whatever the wait reports
        counted = device.fetch(counters)
        return Placement(self._flat, n, int(counted[N_NEW]), int(counted[N_EVICTED]), int(counted[N_REFUSED]))

    def _spill(self, placed: Placement, keys: Any, scores: Any) -> Placement:
        """Write what was refused to the side list, as far as there is room."""
        device = self._device
        refused = device.fetch(self.positions(placed, REFUSED, REFUSED, placed.n_refused))
        end = int(self._searched.shape[0])
        n_grown = min(max(len(refused) - len(self._holes), 0), self.n_slots + self.max_side - end)
        sides = np.array([*self._holes[::-1], *range(end, end + n_grown)], np.int64)[: len(refused)]
        del self._holes[len(self._holes) - min(len(sides), len(self._holes)) :]
        self._searched = self._entries[: end + n_grown]
        n = len(sides)
        places = (device.send(refused), device.send(sides))
        device.launch(spill, n, self._entries, keys, scores, *places, self._placed)
        self._n_spilled += n
        return replace(placed, n_new=placed.n_new + n, n_refused=placed.n_refused - n)

    def _free(self, sides: Int64s) -> None:
        """Places of the side list that nobody uses any more; its end comes down to the last one in use."""
        holes, end = {*self._holes, *sides.tolist()}, int(self._searched.shape[0])
        while end - 1 in holes:
            end -= 1
            holes.remove(end)
        self._holes = sorted(holes, reverse=True)
        self._searched = self._entries[:end]
