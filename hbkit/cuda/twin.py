"""The parts of the device tier in host memory: what the kernels do, one key after the other.

`HostIndex` is the readable definition of `hbkit.cuda.index`: it gives the same slots, victims and order. The others
stand on the C kernels, which give the same bits as those of a device. So the store above them runs without a GPU, to be
tried or tested, and does the same as with one.

What is in "device memory" here is NumPy's, or shares its memory with an array of NumPy's, as a CPU tensor does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from hbkit._ext.batch import mixed
from hbkit._ext.index import dedupe
from hbkit._ext.segment import Gradients, Segments, pool, retained
from hbkit._ext.slabs import Slabs
from hbkit.cuda.batch import (
    DIRTY,
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
    Distinct,
    Held,
    Placement,
    Room,
    Victims,
)
from hbkit.cuda.device import BAD_HOLD, BAD_RELEASE, ERRORS
from hbkit.errors import InvalidArgument

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]

FREE = -1  # the word of a slot that nobody has
VICTIM_FREQ, VICTIM_LAST = 3, 4  # rows of `placed`, after those of a `Placement`
CHUNK_NBYTES = 1 << 22

MIX1, MIX2, S32, LOW32 = map(np.uint64, (0x9FB2_1C65_1E98_DF25, 0xD6E8_FEB8_6659_FD93, 32, 0xFFFF_FFFF))
SCORES = MAX_SCORE << 1  # the bits of a word that hold its score
SOONS = MOST_SOON * SOON


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function of plain loops; it lets other threads run."""
    compiled: Callable[..., Any] = njit(function, nogil=True)
    return compiled


class HostDevice:
    """Host memory in the place of a device; as `hbkit.cuda.device.Device`."""

    name = "cpu"

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An uninitialised array."""
        return np.empty(shape, dtype)

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Uninitialised memory: uint8[nbytes]."""
        return np.empty(nbytes, np.uint8)

    def send(self, array: npt.NDArray[Any]) -> Any:
        """A contiguous copy."""
        return array.copy()

    def array(self, array: Any, dtype: Any = None) -> Any:
        """The same memory as an array of NumPy's.

        Raises
        ------
        InvalidArgument
            It is not of `dtype`, or is no array of NumPy's and not contiguous.
        """
        near = np.asarray(array)
        if not ((near is array or near.flags.c_contiguous) and dtype in (None, near.dtype)):
            raise InvalidArgument(
                f"an array of {near.dtype} with strides of {near.strides} bytes for a shape of {near.shape}",
                device=self.name,
                remedy=f"give a contiguous one{'' if dtype is None else f' of {np.dtype(dtype)}'}",
            )
        return near

    def none(self, dtype: Any, n_dim: int = 1) -> Any:
        """An argument that is left out: an array without elements."""
        return np.empty((0,) * n_dim, dtype)

    def fetch(self, array: Any, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """A copy, in `out` if it is given."""
        if out is None:
            return self.send(self.array(array))
        out[...] = array
        return out

    def join(self, arrays: Sequence[Any], out: Any = None) -> Any:
        """Arrays end to end, in `out` if it is given."""
        return np.concatenate([self.array(a) for a in arrays], out=None if out is None else self.array(out))

    def sync(self) -> None:
        """Nothing is under way."""

    def refuse(self, error: int) -> None:
        """Raise what a kernel would report."""
        raise InvalidArgument(ERRORS[error], device=self.name, remedy="this is a precondition")


# --- the index --------------------------------------------------------------------------------------------------


@loop
def buckets_of(key: Any, n_buckets: int) -> Any:
    """The two buckets of a key, from the low and the high 32 bits of its mix."""
    x = np.uint64(key) * MIX1
    x ^= x >> S32
    x *= MIX2
    x ^= x >> S32
    n = np.uint64(n_buckets)
    return np.int64(((x & LOW32) * n) >> S32), np.int64(((x >> S32) * n) >> S32)


@loop
def look(resident: Int64s, words: Int64s, n_slots: int, width: int, key: int) -> int:
    """Slot of a key, or -1: in its first bucket, its second, then in the side list."""
    for bucket in buckets_of(key, n_slots // width):
        for slot in range(bucket * width, (bucket + 1) * width):
            if resident[slot] == key and words[slot] != FREE:
                return slot
    for slot in range(n_slots, len(words)):
        if resident[slot] == key and words[slot] != FREE:
            return slot
    return -1


@loop
def look_all(resident: Int64s, words: Int64s, n_slots: int, width: int, keys: Int64s, slots: Int64s) -> None:
    """``slots[i]`` = slot of ``keys[i]``, or -1."""
    for i in range(len(keys)):
        slots[i] = look(resident, words, n_slots, width, keys[i])


@loop
def pin(words: Int64s, slots: Int64s, scores: Int64s, add: bool) -> None:
    """Pin and score what was found, which nobody waits for any more; one score may be for all."""
    for i in range(len(slots)):
        if slots[i] >= 0:
            word = words[slots[i]]
            score = scores[i if len(scores) > 1 else 0]
            if add:
                score += (word & SCORES) >> 1
            words[slots[i]] = (word & ~(SOONS | SCORES)) + PIN + (min(score, MAX_SCORE) << 1)


@loop
def n_free(words: Int64s, bucket: int, width: int) -> int:
    """Free slots of a bucket."""
    n = 0
    for slot in range(bucket * width, (bucket + 1) * width):
        n += words[slot] == FREE
    return n


@loop
def place(
    resident: Int64s, words: Int64s, n_slots: int, width: int, keys: Int64s, scores: Int64s, evict: bool, placed: Any
) -> None:
    """Give the keys that have no slot one of a bucket: a free one, or that of the least word that nobody pins.

    All of them try their first bucket, or the second where that one is crowded and this one less so; then those that
    were refused try the other. How many slots are free is counted before any key takes one.
    """
    tries = np.empty((2, len(keys)), np.int64)
    for i in range(len(keys)):
        placed[STATUS, i] = FOUND if placed[SLOT, i] >= 0 else REFUSED
        first, second = buckets_of(keys[i], n_slots // width)
        free = n_free(words, first, width)
        if free <= width // 4 and n_free(words, second, width) > free:
            first, second = second, first
        tries[0, i], tries[1, i] = first, second
    for turn in range(2):
        for i in range(len(keys)):
            if placed[STATUS, i] != REFUSED:
                continue
            chosen = tries[turn, i] * width
            for slot in range(chosen, chosen + width):  # FREE is less than every word
                if words[slot] < words[chosen]:
                    chosen = slot
            if words[chosen] == FREE:
                placed[STATUS, i] = NEW
            elif evict and words[chosen] < PIN:
                placed[STATUS, i] = EVICTED_CLEAN + (words[chosen] & DIRTY)
                placed[VICTIM, i] = resident[chosen]
            else:
                continue
            resident[chosen] = keys[i]
            words[chosen] = PIN + (scores[i if len(scores) > 1 else 0] << 1)
            placed[SLOT, i] = chosen


class HostIndex:
    """Slots of keys in host memory; as `hbkit.cuda.index.DeviceIndex`, which says what the methods do.

    Parameters
    ----------
    device : HostDevice
    n_slots : int
        Rounded down to whole buckets.
    max_keys : int
        Keys of an insertion at the most.
    n_side : int
        Lines of the side list, whose slots are ``n_slots .. n_slots + n_side - 1``.
    metadata : bool
        Whether frequency and last step of each slot are kept.

    Notes
    -----
    Calls come one at a time.
    """

    bucket = 32  # slots

    def __init__(
        self, device: HostDevice, n_slots: int, max_keys: int, n_side: int = 1024, metadata: bool = True
    ) -> None:
        n_buckets = n_slots // self.bucket
        if n_buckets < 1 or n_buckets >= 2**31 or not 0 < max_keys < 2**31 - 1:
            raise InvalidArgument(
                f"an index of {n_slots} slots for {max_keys} keys a call",
                device=device.name,
                remedy=f"give at least {self.bucket} slots and 1 key, and less than 2**31 buckets and keys",
            )
        self.n_slots, self.max_keys, self.max_side = n_buckets * self.bucket, max_keys, n_side
        self._device = device
        n = self.n_slots + n_side
        self._keys, self._words = np.zeros(n, np.int64), np.full(n, FREE, np.int64)
        self._freq, self._last_step = (np.zeros(n if metadata else 0, np.uint32) for _ in range(2))
        self._placed = np.empty((5, max_keys), np.int64)
        self._n_evicted = self._n_refused = self._n_spilled = 0

    def __len__(self) -> int:
        return int(np.count_nonzero(self._words != FREE))

    @staticmethod
    def nbytes_of(n_slots: int, max_keys: int, n_side: int = 1024, metadata: bool = True) -> int:
        """Bytes that an index takes."""
        slots = n_slots // HostIndex.bucket * HostIndex.bucket + n_side
        return slots * (24 if metadata else 16) + max_keys * 40

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.nbytes_of(self.n_slots, self.max_keys, self.max_side, len(self._freq) > 0)

    @property
    def n_side(self) -> int:
        """Keys in the side list."""
        return int(np.count_nonzero(self._words[self.n_slots :] != FREE))

    def stats(self) -> dict[str, int]:
        """Keys now; keys evicted, sent to the side list, and refused since the beginning."""
        return {
            "n_keys": len(self),
            "n_side": self.n_side,
            "n_evicted": self._n_evicted,
            "n_spilled": self._n_spilled,
            "n_refused": self._n_refused,
        }

    def find(self, keys: Any, out: Any = None) -> Any:
        """Slots of keys, which may repeat: int64[n] (`out`), -1 where there is none."""
        keys = self._given(keys)
        slots = np.empty(len(keys), np.int64) if out is None else self._device.array(out)
        side = np.flatnonzero(self._words[self.n_slots :] != FREE)
        searched = self._words[: self.n_slots + (side[-1] + 1 if len(side) else 0)]  # no further than it is used
        look_all(self._keys, searched, self.n_slots, self.bucket, keys, slots)
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
        """Pin and score the keys that are there; list the others."""
        keys, here = self._given(keys), self._device.array
        n = len(keys)
        slots = np.empty(n, np.int64) if slots is None else here(slots)[:n]
        found = np.array([n, 0, 0], np.int32) if found is None else found
        listed = np.empty(2 * n, np.int64) if listed is None else listed
        keys, scores, slots[found[N_KEYS] :] = keys[: found[N_KEYS]], self._scores(keys, scores), -1
        some = self.find(keys, slots[: len(keys)])
        absent = some < 0
        if skip is not None:
            skipped = keys == skip
            some[skipped], absent[skipped], found[N_SKIPPED] = -1, False, skipped.any()
        self._pin(some, scores, add)
        at = np.flatnonzero(absent)
        found[N_MISSING] = len(at)
        listed[: 2 * len(at) : 2] = keys[at]
        listed[1 : 2 * len(at) : 2] = at << 32 | (0 if counts is None else np.clip(here(counts)[at], 0, MOST_LISTED))
        return Held(slots, found, listed)

    def put(self, slots: Any, at: Any, new: Any) -> None:
        """``slots[at[i]] = new[i]``."""
        slots[self._device.array(at)] = self._device.array(new)

    def insert(self, keys: Any, scores: Any, *, evict: bool = False, add: bool = False) -> Placement:
        """Find distinct keys or give them slots, each pinned once more."""
        keys, scores = self._given(keys, self.max_keys), self._scores(keys, scores)
        self._pin(self.find(keys, self._placed[SLOT, : len(keys)]), scores, add)
        self._place(keys, scores, evict)
        refused = np.flatnonzero(self._placed[STATUS, : len(keys)] == REFUSED)
        side = self.n_slots + np.flatnonzero(self._words[self.n_slots :] == FREE)[: len(refused)]
        spilled = refused[: len(side)]
        self._keys[side] = keys[spilled]
        self._words[side] = PIN + (np.broadcast_to(scores, keys.shape)[spilled] << 1)
        self._placed[SLOT, spilled], self._placed[STATUS, spilled] = side, NEW
        self.put_metadata(side, 0 * side, 0 * side)
        self._n_spilled += len(side)
        return self._counted(len(keys))

    def dirty_victims(self, placement: Placement) -> Victims:
        """The victims that were dirty."""
        at = np.flatnonzero(placement.status == EVICTED_DIRTY)
        noted = np.concatenate([self._placed[row, at] for row in (VICTIM, VICTIM_FREQ, VICTIM_LAST)])
        return Victims(noted, self._placed[SLOT, at])

    def mark(self, keys: Any, soon: int) -> None:
        """Announced batches want distinct keys, 255 the soonest and 1 the latest; the more stays. 0 takes it away."""
        if soon < 0:
            raise InvalidArgument(f"soon={soon}", remedy=f"give from 0 to {MOST_SOON}")
        slots = self._there(self.find(keys))
        words = self._words[slots]
        wanted = np.maximum(words & SOONS, min(soon, MOST_SOON) * SOON) if soon else 0
        self._words[slots] = (words & ~SOONS) | wanted

    def age(self) -> None:
        """Halve every score."""
        used = self._words != FREE
        words = self._words[used]
        self._words[used] = (words & ~SCORES) | ((words & SCORES) >> 1 & SCORES)

    def settle(self, slots: Any) -> None:
        """Take one pin from distinct slots, -1 left out."""
        slots = self._there(slots)
        if (self._words[slots] < PIN).any():
            self._device.refuse(BAD_RELEASE)
        self._words[slots] -= PIN

    def clean(self, slots: Any) -> None:
        """Slots whose lines were written are not dirty any more, -1 left out."""
        self._words[self._there(slots)] &= ~DIRTY

    def stamp(self, slots: Any, step: int, counts: Any = None) -> None:
        """Distinct slots were updated in `step`, by so many uses; -1 is left out."""
        slots = self._device.array(slots)
        there = slots[slots >= 0]
        self._words[there] |= DIRTY
        if len(self._freq):
            if counts is not None:
                more = self._freq[there] + self._device.array(counts)[slots >= 0]
                self._freq[there] = np.minimum(more, MOST_STAMP)
            self._last_step[there] = min(max(step, 0), MOST_STAMP)

    def metadata(self, slots: Any) -> Int64s:
        """Frequencies and last steps: int64[2, n]; 0 where the slot is -1 or none are kept."""
        slots = self._device.array(slots)
        if len(self._freq) == 0:
            return np.zeros((2, len(slots)), np.int64)
        at = np.maximum(slots, 0)
        return np.where(slots >= 0, np.stack([self._freq[at], self._last_step[at]]).astype(np.int64), 0)

    def put_metadata(self, slots: Any, freq: Any, last_step: Any) -> None:
        """Write frequencies and last steps, int64[n] each; -1 is left out."""
        slots = self._device.array(slots)
        if len(self._freq):
            for to, given in ((self._freq, freq), (self._last_step, last_step)):
                to[slots[slots >= 0]] = np.minimum(self._device.array(given)[slots >= 0], MOST_STAMP)

    def dirty(self, first: int = 0, last: int = 2**64) -> Int64s:
        """Keys of dirty lines, their frequencies and last steps, by slot; those whose mix is in ``[first, last)``."""
        slots = np.flatnonzero((self._words != FREE) & (self._words & DIRTY == 1) & (first < last))
        mix = mixed(self._keys[slots])
        slots = slots[(mix >= np.uint64(first % 2**64)) & (mix <= np.uint64((last - 1) % 2**64))]
        return np.concatenate([self._keys[slots], *self.metadata(slots)])

    def contents(self) -> tuple[Int64s, Int64s]:
        """All keys and their slots, by slot."""
        slots = np.flatnonzero(self._words != FREE)
        return self._keys[slots], slots

    def erase(self, keys: Any) -> Int64s:
        """Forget distinct keys: the slots where they were; -1 where there was none, `PINNED` where it stays."""
        slots: Int64s = self.find(keys)
        slots[(slots >= 0) & (self._words[slots] >= PIN)] = PINNED
        self._words[self._there(slots)] = FREE
        return slots

    def drain(self) -> tuple[Int64s, Placement]:
        """Move what nobody pins from the side list into the buckets, evicting: old slots, and the placement of them."""
        words = self._words[self.n_slots :]
        old = self.n_slots + np.flatnonzero((words != FREE) & (words < PIN))[: self.max_keys]
        self._placed[SLOT, : len(old)] = -1
        self._place(self._keys[old], np.zeros(1, np.int64), True)
        placed = self._counted(len(old))
        moved = placed.slots >= 0
        new = placed.slots[moved]
        self._words[new] = self._words[old[moved]]
        self.put_metadata(new, *self.metadata(old[moved]))
        self._words[old[moved]] = FREE
        return old, placed

    def validate(self) -> None:
        """Recount everything; AssertionError where it contradicts itself."""
        keys, slots = self.contents()
        assert len(np.unique(keys)) == len(keys) == len(self)
        assert np.array_equal(self.find(keys), slots)

    def _given(self, keys: Any, most: int = 2**31) -> Int64s:
        keys = self._device.array(keys)
        if keys.dtype != np.int64 or keys.ndim != 1 or len(keys) > most:
            raise InvalidArgument(
                f"{keys.dtype}{tuple(keys.shape)} given to an index of {self.max_keys} keys a call",
                device=self._device.name,
                remedy="give int64[n], and fewer of them or a larger index",
            )
        return keys

    def _scores(self, keys: Any, scores: Any) -> Int64s:
        scores = self._device.array(scores)
        if scores.shape not in ((len(keys),), (1,)):
            raise InvalidArgument(
                f"{len(scores)} scores for {len(keys)} keys", remedy="give each key its score, or one"
            )
        return np.clip(scores, 0, MAX_SCORE)

    def _there(self, slots: Any) -> Int64s:
        slots = self._device.array(slots)
        return slots[slots >= 0]

    def _pin(self, slots: Int64s, scores: Int64s, add: bool) -> None:
        if (self._words[self._there(slots)] >= MOST_PINS * PIN).any():
            self._device.refuse(BAD_HOLD)
        pin(self._words, slots, scores, add)

    def _place(self, keys: Int64s, scores: Int64s, evict: bool) -> None:
        """Give slots to the keys of a placement that have none, and clear their metadata; that of victims is kept."""
        found = self._placed[SLOT, : len(keys)] >= 0
        place(self._keys, self._words, self.n_slots, self.bucket, keys, scores, evict, self._placed)
        slots = np.where(found, -1, self._placed[SLOT, : len(keys)])
        self._placed[[VICTIM_FREQ, VICTIM_LAST], : len(keys)] = self.metadata(slots)
        self.put_metadata(slots, 0 * slots, 0 * slots)

    def _counted(self, n: int) -> Placement:
        """The placement of n keys."""
        count = np.bincount(self._placed[STATUS, :n], minlength=REFUSED + 1).tolist()
        n_evicted = count[EVICTED_CLEAN] + count[EVICTED_DIRTY]
        self._n_evicted += n_evicted
        self._n_refused += count[REFUSED]
        return Placement(
            self._placed[:3, :n].reshape(-1), n, count[NEW], n_evicted, count[REFUSED], count[EVICTED_DIRTY]
        )


# --- lines ------------------------------------------------------------------------------------------------------


class HostLines:
    """Lines ``[row | state]`` in host memory, addressed by slot; as `hbkit.cuda.lines.DeviceLines`.

    Parameters
    ----------
    device : HostDevice
    n_lines, width : int
    batch_lines : int
        Lines that `fill` and `drain` get at once.
    dim : int, optional
    row_dtype : "float32", "float16" or "bfloat16"
    """

    def __init__(
        self,
        device: HostDevice,
        n_lines: int,
        width: int,
        batch_lines: int,
        dim: int | None = None,
        row_dtype: str = "float32",
    ) -> None:
        self._device, self._batch, self._dim = device, batch_lines, width if dim is None else dim
        self._slabs = Slabs(width, CHUNK_NBYTES, dim=self._dim, row_dtype=row_dtype)
        self._slabs.reserve(n_lines)
        self._coming, self._came, self._leaving, self._left = (retained((batch_lines, width)) for _ in range(4))
        self.nbytes = int(self._slabs.nbytes)

    @staticmethod
    def nbytes_of(n_lines: int, width: int, batch_lines: int, dim: int, row_dtype: str) -> int:
        """Bytes of so many lines, and of the buffers of those on their way."""
        return n_lines * int(Slabs(width, 1, dim=dim, row_dtype=row_dtype).line_nbytes) + 4 * batch_lines * width * 4

    def gather(self, slots: Any, out: Any, index: Any = None) -> None:
        """``out[i]`` = the first ``out.shape[1]`` floats of line ``slots[i]``, or ``slots[index[i]]``; 0 where -1."""
        here = self._device.array
        self._slabs.gather(here(slots), here(out), None if index is None else here(index))

    def scatter(self, slots: Any, lines: Any) -> None:
        """Write whole lines into distinct slots; narrow rows round to the nearest value."""
        self._slabs.scatter(self._device.array(slots), self._device.array(lines))

    def pool(self, slots: Any, index: Any, splits: Any, out: Any, weight: Any = None, row_scale: Any = None) -> None:
        """``out[b]`` = ``row_scale[b]`` * sum of ``weight[p]`` * row ``slots[index[p]]`` over p of list b, in order."""
        self._slabs.pool(*map(self._device.array, (slots, index, splits, out)), self._if(weight), self._if(row_scale))

    def gather_from(self, source: Any, slots: Any, out: Any, index: Any = None) -> None:
        """`gather` of the rows of an array."""
        source, slots = self._device.array(source), self._device.array(slots)
        slots = slots if index is None else slots[self._device.array(index)]
        self._device.array(out)[...] = np.where(slots[:, None] >= 0, source[slots], np.float32(0))

    def scatter_into(self, target: Any, positions: Any, values: Any) -> None:
        """Write rows of an array at distinct positions; those of -1 go nowhere."""
        positions = self._device.array(positions)
        self._device.array(target)[positions[positions >= 0]] = self._device.array(values)[positions >= 0]

    def pool_from(
        self, source: Any, index: Any, splits: Any, out: Any, weight: Any = None, row_scale: Any = None
    ) -> None:
        """`pool` of the rows of an array: ``source[index[p]]``."""
        pool(*map(self._device.array, (source, index, splits, out)), self._if(weight), self._if(row_scale))

    def incoming(self, n: int) -> Float32s:
        """float32[n, width] for lines that `land` is to write: one of two buffers in turn."""
        self._coming, self._came = self._came, self._coming
        return self._coming[:n]

    def land(self, slots: Any) -> None:
        """The lines that were written where `incoming` said last go to these slots; those of -1 are left out."""
        slots = self._device.array(slots)
        self._slabs.write(slots, self._coming[: len(slots)])

    def depart(self, slots: Any) -> Callable[[], Float32s]:
        """What gives whole lines: float32[n, width], in one of two buffers in turn."""
        self._leaving, self._left = self._left, self._leaving
        near = self._leaving[: len(slots)]
        self._slabs.read(self._device.array(slots), near)
        return lambda: near

    def leave(self, slots: Any) -> Float32s:
        """`depart`, and wait."""
        return self.depart(slots)()

    def move(self, old: Any, new: Any) -> None:
        """Lines at slots `old` to slots `new`; no slot is in both."""
        self._slabs.unpack(self._device.array(new), self._slabs.pack(self._device.array(old)))

    def apply(
        self,
        rule: Any,
        slots: Any,
        grads: Any,
        hyper: Float32s,
        keys: Any = None,
        seed: int = 0,
        step: int = 0,
        bad: str = "apply",
    ) -> int:
        """One optimizer step on distinct slots; -1 is skipped. Gives how many lines "skip" left out."""
        slots = self._device.array(slots)
        grads = grads if isinstance(grads, Gradients) else self._device.array(grads)
        keys = slots if keys is None else self._device.array(keys)
        return int(self._slabs.apply(rule, slots, grads, hyper, keys, seed, step, bad))

    def apply_segments(
        self,
        rule: Any,
        slots: Any,
        values: Any,
        order: Any,
        starts: Any,
        hyper: Float32s,
        keys: Any = None,
        seed: int = 0,
        step: int = 0,
        picked: Any = None,
        scale: Any = None,
    ) -> None:
        """One optimizer step by gradients that are summed on the way."""
        slots = self._device.array(slots)
        keys = slots if keys is None else self._device.array(keys)
        self._slabs.apply(rule, slots, self._summands(values, order, starts, picked, scale), hyper, keys, seed, step)

    def sums(self, values: Any, order: Any, starts: Any, out: Any, picked: Any = None, scale: Any = None) -> None:
        """``out[s]`` = sum of ``scale[p] * values[picked[p]]`` over p in ``order[starts[s]:starts[s + 1]]``."""
        self._summands(values, order, starts, picked, scale).sum(self._device.array(out))

    def look(self, values: Any, scale: Any = None) -> Any:
        """int32[1]: 0 where all values, and scales, are finite."""
        fine = all(bool(np.isfinite(self._device.array(a)).all()) for a in (values, scale) if a is not None)
        return np.array([not fine], np.int32)

    def skip_bad(self, slots: Any, sums: Any) -> tuple[Int64s, int]:
        """Slots with -1 where the sums are not finite, and how many of them were lines."""
        slots = self._device.array(slots)
        bad = (slots >= 0) & ~np.isfinite(self._device.array(sums)).all(axis=1)
        return np.where(bad, -1, slots), int(np.count_nonzero(bad))

    def _if(self, array: Any) -> Any:
        return None if array is None else self._device.array(array)

    def _summands(self, values: Any, order: Any, starts: Any, picked: Any, scale: Any) -> Any:
        """Gradients of the C kernels, by positions that are in order already."""
        values, order, starts = map(self._device.array, (values, order, starts))
        if len(order) == 0:
            raise InvalidArgument("sums of no positions", remedy="give at least one gradient")
        segment = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        rows = order if picked is None else self._device.array(picked)[order]
        return Segments(segment, len(starts) - 1).of(
            values, rows, None if scale is None else self._device.array(scale)[order]
        )


# --- batches ----------------------------------------------------------------------------------------------------


class HostDedupe:
    """Distinct keys of batches; as `hbkit.cuda.dedupe.Dedupe`."""

    nbytes = 0  # it keeps no memory between batches

    def __init__(self, device: HostDevice, max_keys: int) -> None:
        if not 0 < max_keys < 2**30:
            raise InvalidArgument(f"batches of {max_keys} keys", device=device.name, remedy="give from 1 to 2**30 - 1")
        self._device, self.max_keys = device, max_keys

    def __call__(self, keys: Any, room: Room) -> Distinct:
        """The distinct keys of int64[n], in a room."""
        n = self.begin(keys, room)
        return Distinct(room, n, int(room.found[N_KEYS]))

    def begin(self, keys: Any, room: Room) -> int:
        """Have their number in `room.found`; how many keys were given."""
        keys = self._device.array(keys)
        if keys.dtype != np.int64 or keys.ndim != 1 or len(keys) > min(self.max_keys, room.max_ids):
            raise InvalidArgument(
                f"{keys.dtype}{tuple(keys.shape)} given to a dedupe of {min(self.max_keys, room.max_ids)} keys",
                device=self._device.name,
                remedy="give int64[n], and fewer of them or a larger one",
            )
        distinct, inverse, counts = dedupe(np.ascontiguousarray(keys), "int64")
        room.keys[: len(distinct)], room.counts[: len(counts)], room.inverse[: len(keys)] = distinct, counts, inverse
        room.found[:] = len(distinct), 0, 0
        return len(keys)


class HostOrder:
    """Positions of a batch by the number of their key; as `hbkit.cuda.order.Order`."""

    nbytes = 0  # it keeps no memory between batches

    def __init__(self, device: HostDevice, max_ids: int) -> None:
        self._device, self.max_ids = device, max_ids

    def __call__(self, room: Room, n: int, n_distinct: int) -> None:
        """Fill `room.order` and `room.starts` from `room.inverse` and `room.counts`."""
        room.order[:n] = np.argsort(room.inverse[:n], kind="stable")
        room.starts[0] = 0
        np.cumsum(room.counts[:n_distinct], out=room.starts[1 : n_distinct + 1])
