"""DeviceIndex: which line of device memory holds a key; buckets of a warp's width, each owned by one warp in a launch.

A key may be in two buckets of `BUCKET` slots, and a slot is the number of its line. Of a slot there is a digest (a
byte; 0 where it is free) and an entry of 16 bytes: the key, and its word

    pins << 48 | soon << 40 | score << 1 | dirty

so that one comparison finds a bucket's victim: the least word is an unpinned one if there is any; of those one that no
announced batch wants (`soon` is 0, or says how soon one does), of the least score, clean before dirty where scores are
equal. The caller chooses the policy by the scores it gives: the step (LRU), or a count that is added (LFU). A free
slot's word is 0. Beside the entries there are, where they are asked for, 8 bytes a slot of metadata: how often the key
was updated, and in which step last.

A step that finds all its keys is one launch of `hold`, a thread a key: each reads its bucket's digests (32 bytes, one
sector) and the entry of each match, and pins and scores the entry. Keys are distinct, so only its own thread touches an
entry. How many keys there are it reads in device memory, where `Dedupe` counted them, so the host waits once for both
numbers, those that are there and those that miss. The latter are listed as warps come by; the host puts them in order.

New keys are inserted in two launches, in both of which no two threads write one place:

- `probe`: a thread a key, as `hold`. A key that is not there goes to its first bucket, or to the second if the first is
  `CROWDED` and the second has more free slots; so nearly all keys are in their first bucket, where they are found at
  once, and buckets fill evenly even so. It is pushed on its bucket's list by an atomic exchange, and whoever pushes
  first puts the bucket on the list of work. Free slots are what they were before the call: nobody takes any meanwhile.
- `place`: a warp a bucket of that list. It reads the list of new keys, whose order came of the threads' race, and keeps
  the `BUCKET` least positions in order, one a lane: so the race leaves no trace. One after the other they take the free
  slots from the lowest lane on, then the slots of least words. The batch's own keys are pinned, so none evicts another.
  Nobody else reads or writes the bucket in this launch.

What found all of its bucket pinned tries the other one: `again` lists it there, and `place` runs once more.

All other calls are given distinct slots, or distinct keys, whose threads change their own entries alone; or they change
each entry by its own thread (`age`); or they list by a scan over tiles, which keeps the order.

So slots, victims and their order are a function of the calls alone. What finds both buckets pinned goes to the
side list, whose lines come after those of the buckets: every search goes through it after the buckets, `drain` empties
it when pins are gone, and what finds it full too gets the slot -1 and is counted. No key is dropped unseen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.cuda.arith import cuda
from hbkit.cuda.batch import (
    EVICTED_CLEAN,
    EVICTED_DIRTY,
    FOUND,
    MAX_SCORE,
    MOST_LISTED,
    MOST_PINS,
    MOST_SOON,
    MOST_STAMP,
    N_KEYS,
    N_MISSING,
    N_SKIPPED,
    NEW,
    PIN,
    PINNED,
    REFUSED,
    SLOT,
    SOON,
    STATUS,
    VICTIM,
    Held,
    Placement,
    Victims,
)
from hbkit.cuda.device import BAD_HOLD, BAD_RELEASE, BAD_SLOT, Device, simulated
from hbkit.cuda.warp import ALL64, WARP, ballot, first, inline, lane, ones, shuffle, up, word, word_of, xor
from hbkit.errors import InvalidArgument

Int64s = npt.NDArray[np.int64]

BUCKET = WARP  # slots a bucket
CROWDED = BUCKET // 4  # as few free slots
OTHER = -2  # a slot that says that the first bucket is still to be tried
KEY, WORD = 0, 1  # of an entry
MOST_PINNED = MOST_PINS * PIN
SOONS, SCORED = MOST_SOON * SOON, 2 * MAX_SCORE  # bits of a word
HOLE = -1  # the word of a free place of the side list
VICTIM_NOTE = 3  # a row of `placed`, after those of a `Placement`
KEY_AT, FREQ_AT, LAST_AT, AT, POSITION = range(5)  # rows of `listed`
N_WORK, N_NEW, N_EVICTED, N_DIRTY, N_REFUSED = range(5)  # counters; there are two sets, which calls take in turns
COUNTERS = 16
PLACERS = 8192  # warps of `place` at the most: about as many as a device runs at once, since each adds to the counters
NO_POSITION = 2**31 - 1
TILES = 8 if simulated() else 4096  # warps that share a scan

BYTES, LOWS = word_of(0x0101_0101_0101_0101), word_of(0x7F7F_7F7F_7F7F_7F7F)
TO_TOP_BYTE = word_of(0x0102_0408_1020_4080)
MIX1, MIX2 = word_of(0x9FB2_1C65_1E98_DF25), word_of(0xD6E8_FEB8_6659_FD93)
S32, S7, S56, LOW32, LOW8 = map(word_of, (32, 7, 56, 0xFFFF_FFFF, 0xFF))
SPLIT1, SPLIT2 = word_of(0xBF58_476D_1CE4_E5B9), word_of(0x94D0_49BB_1331_11EB)
S30, S27, S31 = map(word_of, (30, 27, 31))


@inline
def mix(key: Any) -> Any:
    """64 bits of a key, unlike those of `shared_mix`: keys of one rank would crowd in few buckets."""
    x = (word(key) * MIX1) & ALL64
    x ^= x >> S32
    x = (x * MIX2) & ALL64
    return x ^ (x >> S32)


@inline
def shared_mix(key: Any) -> Any:
    """64 bits of a key that ranks and tiers share: `hbkit._ext.batch.mixed`."""
    x = word(key)
    x = ((x ^ (x >> S30)) * SPLIT1) & ALL64
    x = ((x ^ (x >> S27)) * SPLIT2) & ALL64
    return x ^ (x >> S31)


@inline
def bucket_of(mixed: Any, n_buckets: Any) -> Any:
    """First bucket of a mixed key, from its low 32 bits."""
    return np.int64(((mixed & LOW32) * word(n_buckets)) >> S32)


@inline
def second_of(mixed: Any, n_buckets: Any) -> Any:
    """Second bucket of a mixed key, from its high 32 bits; it may be the first."""
    return np.int64(((mixed >> S32) * word(n_buckets)) >> S32)


@inline
def digest_of(mixed: Any) -> Any:
    """Digest of a mixed key: 1 to 255."""
    return max(np.int64((mixed >> S32) & LOW8), np.int64(1))


@inline
def zeros(x: Any) -> Any:
    """The high bit of each byte that is 0."""
    return ALL64 ^ (((x & LOWS) + LOWS) | x | LOWS)


@inline
def matches(digests: Any, bucket: Any, digest: Any) -> Any:
    """A bit for each slot of a bucket whose digest is this."""
    pattern = word(digest) * BYTES
    found = np.int64(0)
    for i in range(BUCKET // 8):
        zero = zeros(word(digests[bucket * (BUCKET // 8) + i]) ^ pattern)
        found |= np.int64((((zero >> S7) * TO_TOP_BYTE) & ALL64) >> S56) << (8 * i)
    return found


@inline
def n_free(digests: Any, bucket: Any) -> Any:
    """Free slots of a bucket."""
    n = np.int64(0)
    for i in range(BUCKET // 8):
        n += ones(zeros(word(digests[bucket * (BUCKET // 8) + i])))
    return n


@inline
def slot_in(digests: Any, entries: Any, key: Any, bucket: Any, digest: Any) -> Any:
    """Slot of a key in a bucket, or -1."""
    found = matches(digests, bucket, digest)
    while found != 0:
        slot = bucket * BUCKET + first(found)
        if entries[slot, KEY] == key:
            return slot
        found &= found - 1
    return np.int64(-1)


@inline
def look(digests: Any, entries: Any, key: Any) -> Any:
    """Slot of a key, or -1."""
    mixed = mix(key)
    n_slots = digests.shape[0] * 8
    n_buckets = n_slots // BUCKET
    slot = slot_in(digests, entries, key, bucket_of(mixed, n_buckets), digest_of(mixed))
    if slot < 0:
        slot = slot_in(digests, entries, key, second_of(mixed, n_buckets), digest_of(mixed))
    if slot < 0:
        for side in range(n_slots, entries.shape[0]):
            if entries[side, KEY] == key and entries[side, WORD] != HOLE:
                slot = np.int64(side)
    return slot


@inline
def push(pushed: Any, bucket: Any, i: Any, n: Any, n_buckets: Any, lists: Any, turn: Any) -> None:
    """Put the key at i of n on a bucket's list; all lanes of a warp come, those with a key to push.

    ``lists``: int32, `COUNTERS` of them, of which this call's begin at `turn`; a head for each bucket, a link for each
    key, then the buckets that have work, as many as keys. Heads are -1 before the call, and after `place`.
    """
    links = COUNTERS + n_buckets
    begins = False
    if pushed:
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


@inline
def given_score(scores: Any, score: Any, i: Any) -> Any:
    """Score of the key at i: of one for each, or one for all, which is `score` where there are no `scores`."""
    if scores.shape[0] > 0:
        score = scores[min(i, scores.shape[0] - 1)]
    return max(min(score, MAX_SCORE), 0)


@inline
def pin(entries: Any, slot: Any, score: Any, add: Any, error: Any) -> Any:
    """Pin an entry and score it; nobody waits for it any more. Its slot, or -1 where there are too many pins."""
    old = entries[slot, WORD]
    if old >= MOST_PINNED:
        error[0] = BAD_HOLD
        return np.int64(-1)
    score = min(score + add * ((old & SCORED) >> 1), MAX_SCORE)
    entries[slot, WORD] = (old & ~(PIN - 2)) + PIN + (score << 1)
    return slot


@inline
def note_of(freq: Any, last_step: Any) -> Any:
    """A slot's metadata as one number, of 32 bits each."""
    return np.int64(last_step) << 32 | np.int64(freq)


@inline
def freq_of(note: Any) -> Any:
    """How often a slot's line was updated."""
    return note & MOST_STAMP


@inline
def last_step_of(note: Any) -> Any:
    """In which step it was last."""
    return note >> 32 & MOST_STAMP


@inline
def within(slot: Any, entries: Any, error: Any) -> Any:
    """Whether a slot is one, and not left out."""
    if slot >= entries.shape[0]:
        error[0] = BAD_SLOT
    return 0 <= slot < entries.shape[0]


def find(digests: Any, entries: Any, keys: Any, slots: Any, error: Any) -> None:
    """``slots[i]`` = slot of ``keys[i]``, or -1. Nothing is written but that; keys may repeat."""
    for i in range(cuda.grid(1), keys.shape[0], cuda.gridsize(1)):
        slots[i] = look(digests, entries, keys[i])


def hold(
    digests: Any,
    entries: Any,
    keys: Any,
    scores: Any,
    score: Any,
    counts: Any,
    add: Any,
    skip: Any,
    skips: Any,
    slots: Any,
    found: Any,
    listed: Any,
    error: Any,
) -> None:
    """Pin and score the keys that are there: ``slots[i]`` as `find` has it, and list the others. Keys are distinct.

    ``found[N_KEYS]`` of the keys count, which only the device may know; the others' slots are -1. The key `skip` is not
    looked for where `skips` is not 0. What else is `found` is 0 before the call.
    """
    n_keys = found[N_KEYS]
    for base in range(cuda.grid(1) - lane(), keys.shape[0], cuda.gridsize(1)):
        i = base + lane()
        missed = False
        slot = np.int64(-1)
        if i < n_keys:
            if skips == 0 or keys[i] != skip:
                slot = look(digests, entries, keys[i])
                missed = slot < 0
                if slot >= 0:
                    slot = pin(entries, slot, given_score(scores, score, i), add, error)
            else:
                found[N_SKIPPED] = 1
        if i < keys.shape[0]:
            slots[i] = slot
        missing = ballot(missed)
        if missing != 0:
            at = np.int32(0)
            if lane() == first(missing):
                at = cuda.atomic.add(found, N_MISSING, ones(missing))
            at = shuffle(at, first(missing))
            if missed:
                to = 2 * (at + ones(missing & ((1 << lane()) - 1)))
                count = np.int64(0)
                if counts.shape[0] > 0:
                    count = np.int64(min(max(counts[i], 0), MOST_LISTED))
                listed[to] = keys[i]
                listed[to + 1] = np.int64(i) << 32 | count


def put(slots: Any, at: Any, new: Any, error: Any) -> None:
    """``slots[at[i]] = new[i]``, at distinct positions."""
    for i in range(cuda.grid(1), at.shape[0], cuda.gridsize(1)):
        slots[at[i]] = new[i]


def probe(
    digests: Any,
    entries: Any,
    keys: Any,
    scores: Any,
    score: Any,
    add: Any,
    placed: Any,
    lists: Any,
    turn: Any,
    error: Any,
) -> None:
    """Pin and score the keys that are there, and list the others by bucket. Keys are distinct.

    A score is set, or added where `add` is not 0.
    """
    n = keys.shape[0]
    n_buckets = digests.shape[0] * 8 // BUCKET
    for base in range(cuda.grid(1) - lane(), n, cuda.gridsize(1)):
        i = base + lane()
        bucket = np.int64(0)
        missed = False
        if i < n:
            slot = look(digests, entries, keys[i])
            missed = slot < 0
            if missed:
                mixed = mix(keys[i])
                bucket = bucket_of(mixed, n_buckets)
                free = n_free(digests, bucket)
                if free <= CROWDED and n_free(digests, second_of(mixed, n_buckets)) > free:
                    bucket = second_of(mixed, n_buckets)
                    slot = np.int64(OTHER)
                placed[STATUS, i] = REFUSED
            else:
                slot = pin(entries, slot, given_score(scores, score, i), add, error)
                placed[STATUS, i] = FOUND
            placed[SLOT, i] = slot
        push(missed, bucket, i, n, n_buckets, lists, turn)


def again(keys: Any, n_buckets: Any, placed: Any, lists: Any, turn: Any, error: Any) -> None:
    """List the keys that `place` refused by their other bucket."""
    n = keys.shape[0]
    for base in range(cuda.grid(1) - lane(), n, cuda.gridsize(1)):
        i = base + lane()
        bucket = np.int64(0)
        refused = i < n and placed[STATUS, min(i, n - 1)] == REFUSED
        if refused:
            mixed = mix(keys[i])
            bucket = bucket_of(mixed, n_buckets) if placed[SLOT, i] == OTHER else second_of(mixed, n_buckets)
            placed[SLOT, i] = -1
        push(refused, bucket, i, n, n_buckets, lists, turn)


def place(
    digests: Any,
    entries: Any,
    notes: Any,
    keys: Any,
    scores: Any,
    score: Any,
    evict: Any,
    placed: Any,
    lists: Any,
    turn: Any,
    error: Any,
) -> None:
    """Give the keys that are listed a slot of their bucket, the first ones first; evict where `evict` is not 0.

    Here ``digests`` is the same memory by bytes. A victim's key, metadata and whether it was dirty are noted at the
    position of the key that took its slot; its line is still as it was. The next call's counters are set to 0.
    """
    n = keys.shape[0]
    n_buckets = digests.shape[0] // BUCKET
    links = COUNTERS + n_buckets
    n_new = np.int64(0)
    n_evicted = np.int64(0)
    n_dirty = np.int64(0)
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
                n_dirty += (least >> 5) & 1
            if me == chosen:
                status = np.int64(NEW)
                if digest != 0:
                    placed[VICTIM, i] = entries[mine, KEY]
                    status = EVICTED_CLEAN + (value & 1)
                placed[VICTIM_NOTE, i] = 0
                if notes.shape[0] > 0:
                    placed[VICTIM_NOTE, i] = notes[mine]
                    notes[mine] = 0
                value = PIN + (given_score(scores, score, i) << 1)
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
        if n_dirty > 0:
            cuda.atomic.add(lists, turn + N_DIRTY, n_dirty)
        if n_refused > 0:
            cuda.atomic.add(lists, turn + N_REFUSED, n_refused)


def mark(digests: Any, entries: Any, keys: Any, soon: Any, error: Any) -> None:
    """Raise how soon a key comes to `soon`, or take it away where that is 0. Keys are distinct."""
    for i in range(cuda.grid(1), keys.shape[0], cuda.gridsize(1)):
        slot = look(digests, entries, keys[i])
        if slot >= 0:
            old = entries[slot, WORD]
            rest = old & ~SOONS
            if soon > 0:
                soonest = max(soon * SOON, old & SOONS)
                entries[slot, WORD] = rest | soonest
            else:
                entries[slot, WORD] = rest


def age(entries: Any, error: Any) -> None:
    """Halve every score."""
    for slot in range(cuda.grid(1), entries.shape[0], cuda.gridsize(1)):
        old = entries[slot, WORD]
        if old != HOLE:
            entries[slot, WORD] = (old & ~SCORED) | (((old & SCORED) >> 1) & SCORED)


def settle(entries: Any, slots: Any, error: Any) -> None:
    """Take one pin from each slot. Slots are distinct; -1 is left out."""
    for i in range(cuda.grid(1), slots.shape[0], cuda.gridsize(1)):
        slot = slots[i]
        if within(slot, entries, error):
            if entries[slot, WORD] >= PIN:
                entries[slot, WORD] -= PIN
            else:
                error[0] = BAD_RELEASE


def clean(entries: Any, slots: Any, error: Any) -> None:
    """Take the dirty bit from each slot. Slots are distinct; -1 is left out."""
    for i in range(cuda.grid(1), slots.shape[0], cuda.gridsize(1)):
        slot = slots[i]
        if within(slot, entries, error):
            entries[slot, WORD] &= ~1


def stamp(entries: Any, notes: Any, slots: Any, counts: Any, step: Any, error: Any) -> None:
    """Note that the slots' lines were changed in a step, `counts` times each where given. Distinct; -1 is left out."""
    for i in range(cuda.grid(1), slots.shape[0], cuda.gridsize(1)):
        slot = slots[i]
        if within(slot, entries, error):
            entries[slot, WORD] |= 1
            if notes.shape[0] > 0:
                freq = freq_of(notes[slot])
                if counts.shape[0] > 0:
                    freq = min(freq + counts[i], MOST_STAMP)
                notes[slot] = note_of(freq, step)


def recall(entries: Any, notes: Any, slots: Any, metadata: Any, error: Any) -> None:
    """Read slots' metadata: frequencies and last steps; 0 of -1, and where none is kept."""
    for i in range(cuda.grid(1), slots.shape[0], cuda.gridsize(1)):
        slot = slots[i]
        value = np.int64(0)
        if within(slot, entries, error) and notes.shape[0] > 0:
            value = notes[slot]
        metadata[0, i] = freq_of(value)
        metadata[1, i] = last_step_of(value)


def note(entries: Any, notes: Any, slots: Any, freq: Any, last_step: Any, error: Any) -> None:
    """Write slots' metadata. Slots are distinct; -1 is left out."""
    for i in range(cuda.grid(1), slots.shape[0], cuda.gridsize(1)):
        slot = slots[i]
        if within(slot, entries, error):
            notes[slot] = note_of(min(freq[i], MOST_STAMP), min(last_step[i], MOST_STAMP))


def erase(digests: Any, entries: Any, keys: Any, slots: Any, error: Any) -> None:
    """Forget keys: ``slots[i]`` is where the key was, or -1. Keys are distinct. One that is pinned stays.

    Two keys of a bucket may share eight digests, so a digest goes by an atomic operation on its bits alone.
    """
    n_slots = digests.shape[0] * 8
    for i in range(cuda.grid(1), keys.shape[0], cuda.gridsize(1)):
        slot = look(digests, entries, keys[i])
        if slot >= 0 and entries[slot, WORD] >= PIN:
            slot = np.int64(PINNED)
        elif slot >= n_slots:
            entries[slot, WORD] = HOLE
        elif slot >= 0:
            entries[slot, WORD] = 0
            cuda.atomic.and_(digests, slot // 8, ~(np.int64(0xFF) << (8 * (slot % 8))))
        slots[i] = slot


def count(placed: Any, status: Any, totals: Any, error: Any) -> None:
    """``totals[t]`` = how many keys of tile t have this status; a warp a tile."""
    n = placed.shape[1]
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        total = np.int64(0)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            i = base + lane()
            total += ones(ballot(i < n and placed[STATUS, min(i, n - 1)] == status))
        if lane() == 0:
            totals[tile] = total


def select(placed: Any, status: Any, totals: Any, listed: Any, error: Any) -> None:
    """List what `count` counted, in order: what `placed` has there, and the position."""
    n = placed.shape[1]
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        at = sum_before(totals, tile)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            i = base + lane()
            mine = i < n and placed[STATUS, min(i, n - 1)] == status
            chosen = ballot(mine)
            if mine:
                to = at + ones(chosen & ((1 << lane()) - 1))
                listed[KEY_AT, to] = placed[VICTIM, i]
                listed[FREQ_AT, to] = freq_of(placed[VICTIM_NOTE, i])
                listed[LAST_AT, to] = last_step_of(placed[VICTIM_NOTE, i])
                listed[AT, to] = placed[SLOT, i]
                listed[POSITION, to] = i
            at += ones(chosen)


def count_dirty(entries: Any, low: Any, high: Any, totals: Any, error: Any) -> None:
    """``totals[t]`` = how many of tile t are dirty and have a shared mix from `low` to `high`; a warp a tile."""
    n = entries.shape[0]
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        total = np.int64(0)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            slot = base + lane()
            total += ones(ballot(slot < n and is_dirty(entries, min(slot, n - 1), low, high)))
        if lane() == 0:
            totals[tile] = total


def list_dirty(entries: Any, notes: Any, low: Any, high: Any, totals: Any, listed: Any, error: Any) -> None:
    """List keys, frequencies and last steps of what `count_dirty` counted, in order of their slots."""
    n = entries.shape[0]
    length = tile_length(n)
    for tile in range(cuda.grid(1) // WARP, TILES, cuda.gridsize(1) // WARP):
        at = sum_before(totals, tile)
        for base in range(tile * length, min((tile + 1) * length, n), WARP):
            slot = base + lane()
            mine = slot < n and is_dirty(entries, min(slot, n - 1), low, high)
            chosen = ballot(mine)
            if mine:
                to = at + ones(chosen & ((1 << lane()) - 1))
                value = np.int64(0)
                if notes.shape[0] > 0:
                    value = notes[slot]
                listed[0, to] = entries[slot, KEY]
                listed[1, to] = freq_of(value)
                listed[2, to] = last_step_of(value)
            at += ones(chosen)


@inline
def is_dirty(entries: Any, slot: Any, low: Any, high: Any) -> Any:
    """Whether a slot is dirty, and its key's shared mix is from `low` to `high`."""
    value = entries[slot, WORD]
    mixed = shared_mix(entries[slot, KEY])
    return value != HOLE and value & 1 != 0 and word(low) <= mixed <= word(high)


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


def spill(
    entries: Any,
    notes: Any,
    keys: Any,
    scores: Any,
    score: Any,
    positions: Any,
    sides: Any,
    placed: Any,
    error: Any,
) -> None:
    """Write the keys at these positions to places of the side list, pinned; places are distinct."""
    for i in range(cuda.grid(1), sides.shape[0], cuda.gridsize(1)):
        p = positions[i]
        side = sides[i]
        entries[side, KEY] = keys[p]
        entries[side, WORD] = PIN + (given_score(scores, score, p) << 1)
        if notes.shape[0] > 0:
            notes[side] = 0
        placed[SLOT, p] = side
        placed[STATUS, p] = NEW


def rehouse(entries: Any, notes: Any, old: Any, new: Any, error: Any) -> None:
    """Give new slots the words and metadata of places of the side list, which are free then; -1 stays where it is."""
    for i in range(cuda.grid(1), old.shape[0], cuda.gridsize(1)):
        if new[i] >= 0:
            entries[new[i], WORD] = entries[old[i], WORD]
            entries[old[i], WORD] = HOLE
            if notes.shape[0] > 0:
                notes[new[i]] = notes[old[i]]


_A64, _A32, _E64 = "int64[::1]", "int32[::1]", "int64[:,::1]"
_SCORED = f"{_A64}, {_A64}, int64"  # keys, scores, score
SIGNATURES = {
    find: f"void({_A64}, {_E64}, {_A64}, {_A64}, {_A32})",
    hold: f"void({_A64}, {_E64}, {_SCORED}, {_A64}, int64, int64, int64, {_A64}, {_A32}, {_A64}, {_A32})",
    put: f"void({_A64}, {_A64}, {_A64}, {_A32})",
    probe: f"void({_A64}, {_E64}, {_SCORED}, int64, {_E64}, {_A32}, int64, {_A32})",
    place: f"void(uint8[::1], {_E64}, {_A64}, {_SCORED}, int64, {_E64}, {_A32}, int64, {_A32})",
    again: f"void({_A64}, int64, {_E64}, {_A32}, int64, {_A32})",
    mark: f"void({_A64}, {_E64}, {_A64}, int64, {_A32})",
    age: f"void({_E64}, {_A32})",
    settle: f"void({_E64}, {_A64}, {_A32})",
    clean: f"void({_E64}, {_A64}, {_A32})",
    stamp: f"void({_E64}, {_A64}, {_A64}, {_A64}, int64, {_A32})",
    recall: f"void({_E64}, {_A64}, {_A64}, {_E64}, {_A32})",
    note: f"void({_E64}, {_A64}, {_A64}, {_A64}, {_A64}, {_A32})",
    erase: f"void({_A64}, {_E64}, {_A64}, {_A64}, {_A32})",
    count: f"void({_E64}, int64, {_A32}, {_A32})",
    select: f"void({_E64}, int64, {_A32}, {_E64}, {_A32})",
    count_dirty: f"void({_E64}, int64, int64, {_A32}, {_A32})",
    list_dirty: f"void({_E64}, {_A64}, int64, int64, {_A32}, {_E64}, {_A32})",
    spill: f"void({_E64}, {_A64}, {_SCORED}, {_A64}, {_A64}, {_E64}, {_A32})",
    rehouse: f"void({_E64}, {_A64}, {_A64}, {_A64}, {_A32})",
}

for _kernel, _signature in SIGNATURES.items():
    _kernel.signature = _signature  # type: ignore[attr-defined]  # functions take attributes; `Device.launch` reads it


class DeviceIndex:
    """Slots of keys in device memory; see the page's beginning.

    Parameters
    ----------
    device : Device
    n_slots : int
        Rounded down to whole buckets.
    max_keys : int
        Keys of an insertion at the most.
    n_side : int
        Lines of the side list, whose slots are ``n_slots .. n_slots + n_side - 1``.
    metadata : bool
        Keep of each slot how often (`freq`) and in which step last (`last_step`) its key was updated, up to 2**32 - 1.

    Notes
    -----
    Keys, slots and scores are int64[n], in host or device memory, scores also int64[1] for all keys; any key may be
    there. Scores go from 0 to `MAX_SCORE`; others are held there. A slot may be pinned 32,767 times: once more is an
    error of the next wait, as is to release what nobody holds. Calls come one at a time, and only those wait that say
    so or give something to the host. Device memory: 17 bytes a slot, 8 more with metadata, 80 a key of an insertion.
    """

    def __init__(self, device: Device, n_slots: int, max_keys: int, n_side: int = 1024, metadata: bool = True) -> None:
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
        self._notes = device.send(np.zeros(self.n_slots + n_side if metadata else 0, np.int64))
        lists = np.zeros(COUNTERS + n_buckets + 2 * max_keys, np.int32)
        lists[COUNTERS : COUNTERS + n_buckets] = -1
        self._lists = device.send(lists)
        self._counters = [self._lists[i : i + COUNTERS // 2] for i in (0, COUNTERS // 2)]
        self._turn = 0
        self._placed, self._listed = (device.empty((rows * max_keys,), np.int64) for rows in (4, 5))  # as rows of n
        self._totals = device.empty((TILES,), np.int32)
        self._searched = self._entries[: self.n_slots]  # the buckets' entries, and the side list as far as it is used
        self._holes: list[int] = []  # free places below the end of the side list, descending
        self._n_keys = self._n_evicted = self._n_refused = self._n_spilled = 0

    def __len__(self) -> int:
        return self._n_keys

    @staticmethod
    def nbytes_of(n_slots: int, max_keys: int, n_side: int = 1024, metadata: bool = True) -> int:
        """Device memory of an index made so, in bytes."""
        n_buckets = n_slots // BUCKET
        a_slot = 24 if metadata else 16
        fixed = 4 * (COUNTERS + TILES)
        return n_buckets * (BUCKET * (1 + a_slot) + 4) + n_side * a_slot + max_keys * (4 * 8 + 5 * 8 + 2 * 4) + fixed

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        index, keys = (self._digests, self._entries, self._notes), (self._lists, self._placed, self._listed)
        return sum(int(a.size * a.dtype.itemsize) for a in (*index, *keys, self._totals))

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
        """Slots of keys, which may repeat: int64[n] in device memory (`out`), -1 where there is none."""
        keys = self._given(keys)
        slots = self._device.empty(keys.shape, np.int64) if out is None else self._device.array(out)
        self._device.launch(find, keys.shape[0], self._digests, self._searched, keys, slots)
        return slots

    def hold(
        self,
        keys: Any,
        scores: Any,
        counts: Any = None,
        *,
        add: bool = False,
        skip: int | None = None,
        slots: Any = None,
        found: Any = None,
        listed: Any = None,
    ) -> Held:
        """Pin and score those of distinct keys that are there; no batch waits for them any more (`mark`).

        Does not wait: `hbkit.cuda.batch.missing` does.

        Parameters
        ----------
        keys : int64[n]
        scores : int64[n] or int64[1]
        counts : int64[n], optional
            To be listed with the keys that are missing.
        add : bool
            Add to the scores instead of setting them.
        skip : int, optional
            A key that is neither found nor missing: what a batch is padded with.
        slots, found, listed : int64[>=n], int32[3], int64[>=2n] in device memory, optional
            Where to write what is given back. `found` says how many of the keys count, and else 0.
        """
        keys, scores, device = self._given(keys), self._scores(keys, scores), self._device
        n, none = keys.shape[0], device.none(np.int64)
        slots = device.empty((n,), np.int64) if slots is None else device.array(slots)
        found = device.send(np.array([n, 0, 0], np.int32)) if found is None else found
        listed = device.empty((2 * n,), np.int64) if listed is None else listed
        slots = slots if slots.shape[0] == n else slots[:n]
        counts, skipped = none if counts is None else self._given(counts), (0, 0) if skip is None else (skip, 1)
        some = (keys, *scores, counts, int(add), *skipped, slots, found, listed)
        device.launch(hold, n, self._digests, self._searched, *some)
        return Held(slots, found, listed)

    def put(self, slots: Any, at: Any, new: Any) -> None:
        """``slots[at[i]] = new[i]`` of int64s in device memory, at distinct positions."""
        at, new = self._given(at), self._given(new)
        self._device.launch(put, at.shape[0], slots, at, new)

    def insert(self, keys: Any, scores: Any, *, evict: bool = False, add: bool = False) -> Placement:
        """Find distinct keys or give them slots, each pinned once more. Waits.

        A new key is clean, and of its slot freq and last_step are 0.

        Parameters
        ----------
        keys : int64[n]
            `max_keys` of them at the most.
        scores : int64[n] or int64[1]
        evict : bool
            A key that finds its bucket full takes the slot of the least word that nobody pins. Else, and where all are
            pinned, it goes to the side list.
        add : bool
            Add to the score of a key that was there, instead of setting it.
        """
        keys, scores = self._given(keys, self.max_keys), self._scores(keys, scores)
        self._device.sync()  # what other launches reported must not keep the caller from this one's victims
        placed = self._place(keys, scores, evict, add)
        if placed.n_refused:
            placed = self._spill(placed, keys, scores)
        self._n_refused += placed.n_refused
        return placed

    def dirty_victims(self, placement: Placement) -> Victims:
        """The victims whose lines are newer than those of the store below, by position; until the next insertion."""
        n = placement.n_dirty
        listed = self._list(placement, EVICTED_DIRTY, n)
        return Victims(listed[: AT * n], listed[AT * n : (AT + 1) * n])

    def _list(self, placement: Placement, status: int, n: int) -> Any:
        """Rows of the `n` keys of a placement with this status, end to end: `KEY_AT` and so on."""
        if n:
            device, listed = self._device, self._listed[: 5 * n].reshape((5, n))
            some = (self._rows_of(placement.n), status)
            device.launch(count, TILES * WARP, *some, self._totals)
            device.launch(select, TILES * WARP, *some, self._totals, listed)
        return self._listed

    def _rows_of(self, n: int) -> Any:
        """`placed` as rows of n keys."""
        return self._placed[: 4 * n].reshape((4, n))

    def mark(self, keys: Any, soon: int) -> None:
        """Say how soon announced batches want distinct keys: the larger, the sooner; what is not there is left out.

        Parameters
        ----------
        keys : int64[n]
        soon : int
            From 1 to 255 (more is held there): raise what was said before to this. 0: take it away.
        """
        if soon < 0:
            raise InvalidArgument(f"soon={soon}", remedy=f"give from 0 to {MOST_SOON}")
        keys = self._given(keys)
        self._device.launch(mark, keys.shape[0], self._digests, self._searched, keys, min(soon, MOST_SOON))

    def age(self) -> None:
        """Halve every score."""
        self._device.launch(age, self._searched.shape[0], self._searched)

    def settle(self, slots: Any) -> None:
        """Take one pin from distinct slots, -1 left out."""
        slots = self._given(slots)
        self._device.launch(settle, slots.shape[0], self._entries, slots)

    def clean(self, slots: Any) -> None:
        """Say that the store below has the lines at distinct slots, -1 left out."""
        slots = self._given(slots)
        self._device.launch(clean, slots.shape[0], self._entries, slots)

    def stamp(self, slots: Any, step: int, counts: Any = None) -> None:
        """Say that the lines at distinct slots, -1 left out, changed in this step: they are dirty.

        Parameters
        ----------
        slots : int64[n]
        step : int
            Their last_step.
        counts : int64[n], optional
            Added to their freq.
        """
        slots = self._given(slots)
        counts = self._device.none(np.int64) if counts is None else self._given(counts)
        self._device.launch(
            stamp, slots.shape[0], self._entries, self._notes, slots, counts, min(max(step, 0), MOST_STAMP)
        )

    def metadata(self, slots: Any) -> Any:
        """freq and last_step of slots: int64[2, n] in device memory; 0 of -1, and where none is kept."""
        slots, device = self._given(slots), self._device
        metadata = device.empty((2, slots.shape[0]), np.int64)
        device.launch(recall, slots.shape[0], self._entries, self._notes, slots, metadata)
        return metadata

    def put_metadata(self, slots: Any, freq: Any, last_step: Any) -> None:
        """Set freq and last_step, int64[n] each, of distinct slots, -1 left out; these stay clean or dirty."""
        if self._notes.shape[0]:
            slots, freq, last_step = map(self._given, (slots, freq, last_step))
            self._device.launch(note, slots.shape[0], self._entries, self._notes, slots, freq, last_step)

    def dirty(self, first: int = 0, last: int = 2**64) -> Any:
        """Keys whose lines are newer than those of the store below, their freqs and their last_steps, by slot.

        int64[3 * n] in device memory that nobody else uses; one wait. Of keys whose `hbkit._ext.batch.mixed` lies in
        ``[first, last)``, within [0, 2**64).
        """
        device = self._device
        if first >= last:
            return device.none(np.int64)
        ends = [end - 2**64 if end >= 2**63 else end for end in (first, last - 1)]  # the same bits as int64
        device.launch(count_dirty, TILES * WARP, self._searched, *ends, self._totals)
        n = int(device.fetch(self._totals).sum())
        listed = device.empty((3 * n,), np.int64)
        if n:
            some = (*ends, self._totals, listed.reshape((3, n)))
            device.launch(list_dirty, TILES * WARP, self._searched, self._notes, *some)
        return listed

    def erase(self, keys: Any) -> Int64s:
        """Forget distinct keys: int64[n], the slots where they were; -1 where there was none, and `PINNED` where one
        is pinned and stays. Waits.
        """
        keys, device = self._given(keys), self._device
        device.sync()  # what other launches reported must not keep the caller from what is gone
        slots = device.empty(keys.shape, np.int64)
        device.launch(erase, keys.shape[0], self._digests, self._searched, keys, slots)
        host: Int64s = device.fetch(slots)
        self._n_keys -= int(np.count_nonzero(host >= 0))
        self._free(host[host >= self.n_slots])
        return host

    def drain(self) -> tuple[Int64s, Placement]:
        """Move what nobody pins from the side list into the buckets, evicting: old slots, and the placement of them.

        The caller saves the victims' lines, then moves the lines at old slots to the new ones, which are not pinned. A
        placement of -1 stays where it was. Metadata move with the keys.
        """
        end, device = int(self._searched.shape[0]), self._device
        side = device.fetch(self._entries[self.n_slots : end]) if end > self.n_slots else np.zeros((0, 2), np.int64)
        at = np.flatnonzero((side[:, WORD] != HOLE) & (side[:, WORD] < PIN))[: self.max_keys]
        old = at + self.n_slots
        keys, scores = device.send(side[at, KEY]), (device.send((side[at, WORD] & SCORED) >> 1), 0)
        searched, self._searched = self._searched, self._entries[: self.n_slots]
        try:
            placed = self._place(keys, scores, True, False)
        finally:
            self._searched = searched
        if len(old) == 0:
            return old, placed
        new = device.fetch(placed.slots)
        device.launch(rehouse, len(old), self._entries, self._notes, device.send(old), placed.slots)
        gone = old[new >= 0]
        self._free(gone)
        self._n_keys -= len(gone)
        return old, placed

    def validate(self) -> None:
        """Recount everything; AssertionError where it contradicts itself."""
        device = self._device
        keys, slots = self.contents()
        assert len(keys) == self._n_keys == len(np.unique(keys))
        assert np.array_equal(device.fetch(self.find(keys)), slots)
        words, used = device.fetch(self._entries)[:, WORD], device.fetch(self._bytes) != 0
        assert (words[: self.n_slots][~used] == 0).all() and (words[: self.n_slots] >= 0).all()
        holes = np.flatnonzero(words[self.n_slots : self._searched.shape[0]] == HOLE) + self.n_slots
        assert holes.tolist() == self._holes[::-1]
        assert device.fetch(self.dirty()).reshape(3, -1)[0].tolist() == keys[words[slots] & 1 == 1].tolist()
        lists = device.fetch(self._lists)
        assert (lists[COUNTERS : COUNTERS + self.n_slots // BUCKET] == -1).all()
        assert not device.fetch(self._counters[self._turn]).any()

    def contents(self) -> tuple[Int64s, Int64s]:
        """All keys and their slots, by slot: int64[n_keys] each."""
        entries = self._device.fetch(self._searched)
        used = self._device.fetch(self._bytes) != 0
        slots = np.flatnonzero(np.concatenate([used, entries[self.n_slots :, WORD] != HOLE]))
        return entries[slots, KEY], slots

    def _given(self, values: Any, most: int | None = None) -> Any:
        values = self._device.array(values)
        if values.dtype != np.int64 or values.ndim != 1 or (most is not None and values.shape[0] > most):
            raise InvalidArgument(
                f"{values.dtype}{tuple(values.shape)} given to an index of {self.max_keys} keys an insertion",
                device=self._device.name,
                remedy="give int64[n], and fewer of them or a larger index",
            )
        return values

    def _scores(self, keys: Any, scores: Any) -> tuple[Any, int]:
        """Scores in device memory; one of the host's for all keys goes with the launch, which costs no memory."""
        if isinstance(scores, np.ndarray) and scores.shape == (1,) and scores.dtype == np.int64:
            return self._device.none(np.int64), int(scores[0])
        scores = self._given(scores)
        if scores.shape[0] not in (1, keys.shape[0]):
            raise InvalidArgument(
                f"{scores.shape[0]} scores for {keys.shape[0]} keys", remedy="give each key its score, or one for all"
            )
        return scores, 0

    def _place(self, keys: Any, scores: tuple[Any, int], evict: bool, add: bool) -> Placement:
        """Find keys or give them slots, but for the side list."""
        n = keys.shape[0]
        if n == 0:
            return Placement(self._placed, 0, 0, 0, 0, 0)
        rest = (self._rows_of(n), self._lists)
        launch, turn = self._device.launch, self._turn * (COUNTERS // 2)
        launch(probe, n, self._digests, self._searched, keys, *scores, int(add), *rest, turn)
        n_new, n_evicted, n_dirty, n_refused = self._fill(keys, scores, evict, rest)
        if n_refused:
            launch(again, n, keys, self.n_slots // BUCKET, *rest, self._turn * (COUNTERS // 2))
            more_new, more_evicted, more_dirty, n_refused = self._fill(keys, scores, evict, rest)
            n_new, n_evicted, n_dirty = n_new + more_new, n_evicted + more_evicted, n_dirty + more_dirty
        return Placement(self._placed, n, n_new, n_evicted, n_refused, n_dirty)

    def _fill(self, keys: Any, scores: tuple[Any, int], evict: bool, rest: tuple[Any, Any]) -> list[int]:
        """Give slots to the keys that are listed; how many are new, evicted another, a dirty one, and are refused."""
        device, turn = self._device, self._turn * (COUNTERS // 2)
        data = (self._bytes, self._entries, self._notes)
        device.launch(place, min(keys.shape[0], PLACERS) * WARP, *data, keys, *scores, int(evict), *rest, turn)
        counters = self._counters[self._turn]
        self._turn ^= 1  # `place` has cleared the other ones, whatever the wait reports
        error = None
        try:
            counted = device.fetch(counters)
        except InvalidArgument as e:  # of a launch before or of these, which placed keys even so
            counted, error = device.fetch(counters), e
        self._n_keys += int(counted[N_NEW])
        self._n_evicted += int(counted[N_EVICTED])
        if error:
            raise error
        return [int(counted[i]) for i in (N_NEW, N_EVICTED, N_DIRTY, N_REFUSED)]

    def _spill(self, placed: Placement, keys: Any, scores: tuple[Any, int]) -> Placement:
        """Write what was refused to the side list, as far as there is room."""
        device = self._device
        m = placed.n_refused
        refused = device.fetch(self._list(placed, REFUSED, m)[POSITION * m : (POSITION + 1) * m])
        end = int(self._searched.shape[0])
        n_grown = min(max(len(refused) - len(self._holes), 0), self.n_slots + self.max_side - end)
        sides = np.array([*self._holes[::-1], *range(end, end + n_grown)], np.int64)[: len(refused)]
        del self._holes[len(self._holes) - min(len(sides), len(self._holes)) :]
        self._searched = self._entries[: end + n_grown]
        n = len(sides)
        places = (device.send(refused), device.send(sides))
        device.launch(spill, n, self._entries, self._notes, keys, *scores, *places, self._rows_of(placed.n))
        self._n_spilled += n
        self._n_keys += n
        return replace(placed, n_new=placed.n_new + n, n_refused=placed.n_refused - n)

    def _free(self, sides: Int64s) -> None:
        """Places of the side list that nobody uses any more; its end comes down to the last one in use."""
        holes, end = {*self._holes, *sides.tolist()}, int(self._searched.shape[0])
        while end - 1 in holes:
            end -= 1
            holes.remove(end)
        self._holes = sorted(holes, reverse=True)
        self._searched = self._entries[:end]
