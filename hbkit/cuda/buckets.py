"""Buckets: the kernels of `hbkit.cuda.index`; a bucket has a warp's width, and is owned by one warp in a launch.

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

from typing import Any

import numpy as np

from hbkit.cuda.arith import cuda, sign
from hbkit.cuda.batch import (
    EVICTED_CLEAN,
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
)
from hbkit.cuda.device import BAD_HOLD, BAD_RELEASE, BAD_SLOT
from hbkit.cuda.tiles import TILES, sum_before, tile_length
from hbkit.cuda.warp import ALL64, WARP, ballot, first, inline, lane, ones, shuffle, up, word, word_of, xor

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

sign(SIGNATURES)
