"""What calls of the device tier take and give, on a CUDA device as in host memory. Nothing here imports Numba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

# A slot's word: pins << 48 | soon << 40 | score << 1 | dirty. The least word of a bucket is its victim's.
PIN, SOON, DIRTY = 1 << 48, 1 << 40, 1
MAX_SCORE = (1 << 39) - 1
MOST_PINS, MOST_SOON = 32767, 255
MOST_STAMP = 2**32 - 1  # frequencies and last steps are held there
FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY, REFUSED = range(5)  # what became of a key
PINNED = -2  # in the place of a slot: the key was to be erased, and is pinned
N_KEYS, N_MISSING, N_SKIPPED = range(3)  # what `hold` counts
MOST_LISTED = 2**32 - 1  # counts of keys that are missing are held there
SLOT, STATUS, VICTIM = range(3)  # rows of a placement's memory


class Held(NamedTuple):
    """What `hold` finds of a batch's keys, in device memory; `missing` waits for it.

    Attributes
    ----------
    slots : int64[n]
        The key's slot, pinned; -1 where there is none.
    found : int32[3]
        `N_KEYS`, how many of the keys there are; how many of them are `N_MISSING` and `N_SKIPPED`.
    listed : int64[2 * n]
        For each key that is missing, in no order that matters: the key, then ``position << 32 | count``.
    """

    slots: Any
    found: Any
    listed: Any


class Missing(NamedTuple):
    """Which of a batch's keys are not there, in host memory.

    Attributes
    ----------
    n_keys, n_skipped : int
        Keys of the batch, and whether one of them was to be skipped.
    at, keys, counts : int64[m]
        By position, ascending; without the one to be skipped.
    """

    n_keys: int
    n_skipped: int
    at: Int64s
    keys: Int64s
    counts: Int64s


def missing(device: Any, held: Held) -> Missing:
    """Wait for what `hold` found: once, and once more where keys are missing.

    Raises
    ------
    InvalidArgument
        A kernel met an error; what was found is pinned even so.
    """
    n_keys, n_missing, n_skipped = device.fetch(held.found).tolist()
    if n_missing == 0:
        return Missing(n_keys, n_skipped, _NONE, _NONE, _NONE)
    listed = device.fetch(held.listed[: 2 * n_missing])
    keys, both = listed[::2], listed[1::2]
    order = np.argsort(both >> 32)
    return Missing(n_keys, n_skipped, both[order] >> 32, keys[order], both[order] & MOST_LISTED)


@dataclass(frozen=True)
class Placement:
    """What became of a batch's keys; the arrays are the device's, by the keys' positions, until the next insertion.

    Attributes
    ----------
    n : int
        Keys of the batch.
    n_new, n_evicted, n_refused : int
        Keys that took a free slot, took a victim's, and have none. The others were found.
    n_dirty : int
        Victims that were dirty.
    """

    _placed: Any  # int64[>=3 * n]
    n: int
    n_new: int
    n_evicted: int
    n_refused: int
    n_dirty: int

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

    @property
    def both(self) -> Any:
        """int64[2 * n]: `slots`, then `status`."""
        return self._placed[: 2 * self.n]

    def _row(self, row: int) -> Any:
        return self._placed[row * self.n : (row + 1) * self.n]


class Victims(NamedTuple):
    """Keys that lost their slots while their lines were dirty, by the positions of those that took them.

    Attributes
    ----------
    noted : int64[3 * d]
        The keys, their frequencies and their last steps.
    slots : int64[d]
    """

    noted: Any
    slots: Any


class Room:
    """Where a batch's arrays lie in device memory, as long as its owner likes; a new batch may be written over them.

    Parameters
    ----------
    device : Device or HostDevice
    max_ids : int
        Ids of a batch at the most.

    Attributes
    ----------
    keys, counts, inverse : int64[max_ids]
        Of `Dedupe`: the distinct keys by first occurrence, how often each occurs, and each position's key number.
    order : int64[max_ids]
    starts : int64[max_ids + 1]
        Of `Order`: positions by key number, and where those of a key begin.
    slots : int64[max_ids]
    found : int32[3]
    listed : int64[2 * max_ids + 1]
        For `hold`: see `Held`. `Dedupe` says in `found` how many keys there are. `Order` writes over `listed`.
    """

    def __init__(self, device: Any, max_ids: int) -> None:
        self.max_ids = max_ids
        self.keys, self.counts, self.inverse, self.slots = (device.empty((max_ids,), np.int64) for _ in range(4))
        self.listed = device.empty((2 * max_ids + 1,), np.int64)
        self.order, self.starts = self.listed[:max_ids], self.listed[max_ids:]
        self.found = device.empty((3,), np.int32)

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return 8 * (6 * self.max_ids + 1) + 12


@dataclass(frozen=True)
class Distinct:
    """A batch's distinct keys, in the room that it was given."""

    room: Room
    n: int
    n_distinct: int

    @property
    def keys(self) -> Any:
        """int64[n_distinct], in the order of first occurrence."""
        return self.room.keys[: self.n_distinct]

    @property
    def counts(self) -> Any:
        """int64[n_distinct]: how often each occurs."""
        return self.room.counts[: self.n_distinct]

    @property
    def inverse(self) -> Any:
        """int64[n]: ``keys[inverse]`` is the batch."""
        return self.room.inverse[: self.n]


_NONE = np.zeros(0, np.int64)
