"""DeviceIndex: which line of device memory holds a key. Its memory and its kernels: `hbkit.cuda.buckets`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.cuda import buckets
from hbkit.cuda.batch import EVICTED_DIRTY, MOST_SOON, MOST_STAMP, PIN, REFUSED, Held, Placement, Victims
from hbkit.cuda.buckets import (
    AT,
    BUCKET,
    COUNTERS,
    HOLE,
    KEY,
    N_DIRTY,
    N_EVICTED,
    N_NEW,
    N_REFUSED,
    PLACERS,
    POSITION,
    SCORED,
    WORD,
)
from hbkit.cuda.device import Device
from hbkit.cuda.tiles import TILES
from hbkit.cuda.warp import WARP
from hbkit.errors import InvalidArgument

Int64s = npt.NDArray[np.int64]


class DeviceIndex:
    """Slots of keys in device memory; see `hbkit.cuda.buckets`.

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
        self._device.launch(buckets.find, keys.shape[0], self._digests, self._searched, keys, slots)
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
        device.launch(buckets.hold, n, self._digests, self._searched, *some)
        return Held(slots, found, listed)

    def put(self, slots: Any, at: Any, new: Any) -> None:
        """``slots[at[i]] = new[i]`` of int64s in device memory, at distinct positions."""
        at, new = self._given(at), self._given(new)
        self._device.launch(buckets.put, at.shape[0], slots, at, new)

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
            device.launch(buckets.count, TILES * WARP, *some, self._totals)
            device.launch(buckets.select, TILES * WARP, *some, self._totals, listed)
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
        self._device.launch(buckets.mark, keys.shape[0], self._digests, self._searched, keys, min(soon, MOST_SOON))

    def age(self) -> None:
        """Halve every score."""
        self._device.launch(buckets.age, self._searched.shape[0], self._searched)

    def settle(self, slots: Any) -> None:
        """Take one pin from distinct slots, -1 left out."""
        slots = self._given(slots)
        self._device.launch(buckets.settle, slots.shape[0], self._entries, slots)

    def clean(self, slots: Any) -> None:
        """Say that the store below has the lines at distinct slots, -1 left out."""
        slots = self._given(slots)
        self._device.launch(buckets.clean, slots.shape[0], self._entries, slots)

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
            buckets.stamp, slots.shape[0], self._entries, self._notes, slots, counts, min(max(step, 0), MOST_STAMP)
        )

    def metadata(self, slots: Any) -> Any:
        """freq and last_step of slots: int64[2, n] in device memory; 0 of -1, and where none is kept."""
        slots, device = self._given(slots), self._device
        metadata = device.empty((2, slots.shape[0]), np.int64)
        device.launch(buckets.recall, slots.shape[0], self._entries, self._notes, slots, metadata)
        return metadata

    def put_metadata(self, slots: Any, freq: Any, last_step: Any) -> None:
        """Set freq and last_step, int64[n] each, of distinct slots, -1 left out; these stay clean or dirty."""
        if self._notes.shape[0]:
            slots, freq, last_step = map(self._given, (slots, freq, last_step))
            self._device.launch(buckets.note, slots.shape[0], self._entries, self._notes, slots, freq, last_step)

    def dirty(self, first: int = 0, last: int = 2**64) -> Any:
        """Keys whose lines are newer than those of the store below, their freqs and their last_steps, by slot.

        int64[3 * n] in device memory that nobody else uses; one wait. Of keys whose `hbkit._ext.batch.mixed` lies in
        ``[first, last)``, within [0, 2**64).
        """
        device = self._device
        if first >= last:
            return device.none(np.int64)
        ends = [end - 2**64 if end >= 2**63 else end for end in (first, last - 1)]  # the same bits as int64
        device.launch(buckets.count_dirty, TILES * WARP, self._searched, *ends, self._totals)
        n = int(device.fetch(self._totals).sum())
        listed = device.empty((3 * n,), np.int64)
        if n:
            some = (*ends, self._totals, listed.reshape((3, n)))
            device.launch(buckets.list_dirty, TILES * WARP, self._searched, self._notes, *some)
        return listed

    def erase(self, keys: Any) -> Int64s:
        """Forget distinct keys: int64[n], the slots where they were; -1 where there was none, and `PINNED` where one
        is pinned and stays. Waits.
        """
        keys, device = self._given(keys), self._device
        device.sync()  # what other launches reported must not keep the caller from what is gone
        slots = device.empty(keys.shape, np.int64)
        device.launch(buckets.erase, keys.shape[0], self._digests, self._searched, keys, slots)
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
        far = device.send(old)  # before anything changes, as the others: there may be no memory
        searched, self._searched = self._searched, self._entries[: self.n_slots]
        try:
            placed = self._place(keys, scores, True, False)
        finally:
            self._searched = searched
        if len(old) == 0:
            return old, placed
        new = device.fetch(placed.slots)
        device.launch(buckets.rehouse, len(old), self._entries, self._notes, far, placed.slots)
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
        launch(buckets.probe, n, self._digests, self._searched, keys, *scores, int(add), *rest, turn)
        n_new, n_evicted, n_dirty, n_refused = self._fill(keys, scores, evict, rest)
        if n_refused:
            launch(buckets.again, n, keys, self.n_slots // BUCKET, *rest, self._turn * (COUNTERS // 2))
            more_new, more_evicted, more_dirty, n_refused = self._fill(keys, scores, evict, rest)
            n_new, n_evicted, n_dirty = n_new + more_new, n_evicted + more_evicted, n_dirty + more_dirty
        return Placement(self._placed, n, n_new, n_evicted, n_refused, n_dirty)

    def _fill(self, keys: Any, scores: tuple[Any, int], evict: bool, rest: tuple[Any, Any]) -> list[int]:
        """Give slots to the keys that are listed; how many are new, evicted another, a dirty one, and are refused."""
        device, turn = self._device, self._turn * (COUNTERS // 2)
        data = (self._bytes, self._entries, self._notes)
        device.launch(buckets.place, min(keys.shape[0], PLACERS) * WARP, *data, keys, *scores, int(evict), *rest, turn)
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
        places = (device.send(refused), device.send(sides))  # before anything changes: there may be no memory
        del self._holes[len(self._holes) - min(len(sides), len(self._holes)) :]
        self._searched = self._entries[: end + n_grown]
        n = len(sides)
        device.launch(buckets.spill, n, self._entries, self._notes, keys, *scores, *places, self._rows_of(placed.n))
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
