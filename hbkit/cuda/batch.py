"""What calls of the device tier take and give, on a CUDA device as in host memory. Nothing here imports Numba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# A slot's word: pins << 48 | soon << 40 | score << 1 | dirty. The least word of a bucket is its victim's.
PIN, SOON, DIRTY = 1 << 48, 1 << 40, 1
MAX_SCORE = (1 << 39) - 1
MOST_PINS, MOST_SOON = 32767, 255
MOST_STAMP = 2**32 - 1  # frequencies and last steps are held there
FOUND, NEW, EVICTED_CLEAN, EVICTED_DIRTY, REFUSED = range(5)  # what became of a key
PINNED = -2  # in the place of a slot: the key was to be erased, and is pinned
SLOT, STATUS, VICTIM = range(3)  # rows of a placement's memory


class Held(NamedTuple):
    """What `hold` found of a batch's keys.

    Attributes
    ----------
    slots : int64[n]
        The key's slot, pinned; -1 where there is none.
    n_missing : int
    missing : int64[n_missing]
        Positions of the keys that are not there, ascending; without those of the key to be skipped.
    """

    slots: Any
    n_missing: int
    missing: Any


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

    _placed: Any  # int64[3 * max_keys]
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

    def _row(self, row: int) -> Any:
        first_of_row = row * (self._placed.shape[0] // 3)
        return self._placed[first_of_row : first_of_row + self.n]


class Victims(NamedTuple):
    """Keys that lost their slots while their lines were dirty, by the positions of those that took them.

    Attributes
    ----------
    keys, slots, freq, last_step : int64[d]
    """

    keys: Any
    slots: Any
    freq: Any
    last_step: Any


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
        The caller's, for the lines of the keys.
    """

    def __init__(self, device: Any, max_ids: int) -> None:
        self.max_ids = max_ids
        self.keys, self.counts, self.inverse, self.slots, self.order = (
            device.empty((max_ids,), np.int64) for _ in range(5)
        )
        self.starts = device.empty((max_ids + 1,), np.int64)

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return 8 * (6 * self.max_ids + 1)


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
