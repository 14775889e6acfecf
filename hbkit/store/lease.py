"""DeviceLease: a batch's keys on their way through the device tier.

The slots of all its keys are in device memory alone (`far`). What the host knows of are the keys that had no line
(`rest`), so what a batch costs it grows with those that miss, not with those that are there.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from hbkit._ext.batch import find_key
from hbkit.cuda.batch import Held, Room
from hbkit.store.base import Lease
from hbkit.store.line import Int64s
from hbkit.store.tier import AWAY


class DeviceLease(Lease):
    """A batch's distinct keys on their way through a `DeviceStore`.

    Attributes
    ----------
    n_keys : int
    inverse : int64[n] in device memory, or None
        The key number of each position of the batch, where the store has deduped it (`DeviceStore.reserve_batch`).
    keys, counts, slots : int64[n_keys]
        As of `Lease`, in host memory: copied when they are asked for.
    """

    __eq__ = object.__eq__  # leases are told apart by identity, as a weak set does
    __hash__ = object.__hash__
    inverse: Any = None
    _ended = True  # until it is made

    def __init__(self, store: Any, n_keys: int, far_keys: Any, far_counts: Any, skip: int | None) -> None:
        self.n_keys = n_keys
        self.mutex = threading.Lock()  # held while its rows are fetched
        self.far_keys, self.far_counts = far_keys, far_counts
        self.skip = skip  # the padding key
        self.near_keys: Int64s | None = None
        self.near_counts: Int64s | None = None
        self.held: Held | None = None  # what is launched to find its lines
        self.far: Any = None  # its lines in device memory, -1 where there is none; once that is launched
        self.near: Int64s | None = None  # the same in host memory, where that was asked for
        self.rest = Rest()
        self.room: Room | None = None
        self.n = 0  # positions of the batch
        self.ordered = False  # whether the room's order is that of the batch
        self.batch: int | None = None  # its number among the announced that are not fetched
        self.begun = -1  # the store's version when its lines were looked for
        self.seen = -1  # the store's version when the keys without a line were looked for
        self.n_absent = self.n_away = 0
        self.fetched = self.released = self.asked = False
        self.n_brought, self.done, self.tried = 0, 0.0, -1
        self.n_skipped = 0  # whether the padding key is among its keys
        self.store = store  # a `hbkit.store.resident.Resident`
        self._padding: int | None = None if skip is not None else -1
        self._ended = False

    def __del__(self) -> None:
        if not self._ended:
            self.store._abandoned.append(self.hold())

    def hold(self) -> tuple[Any, Any, Room | None, int | None, int]:
        """What it has of the store, which ends with that: lines, keys, room, number, bytes."""
        self._ended = True
        return self.far, self.far_keys, self.room, self.batch, self.nbytes

    def cut(self, n_keys: int) -> None:
        """It has so many keys, as the device has found."""
        if n_keys < self.n_keys:
            self.n_keys, self.far_keys, self.far_counts = n_keys, self.far_keys[:n_keys], self.far_counts[:n_keys]
            self.far = None if self.far is None else self.far[:n_keys]

    def recount(self) -> None:
        """Slots have changed."""
        self.near, self.stamped = None, _NEVER
        self.n_absent = int(np.count_nonzero(self.rest.slots == -1))
        self.n_away = int(np.count_nonzero(self.rest.slots == AWAY))

    @property
    def nbytes(self) -> int:
        """Device memory that is its own."""
        return 0 if self.room is not None else 40 * self.n_keys

    def _copy(self) -> None:
        """Have keys and counts in host memory."""
        if self.near_keys is None or self.near_counts is None:
            with self.store._lock:
                self.store._know(self)

    @property
    def keys(self) -> Int64s:  # type: ignore[override]  # an attribute of `Lease`; here a copy, made when asked for
        self._copy()
        assert self.near_keys is not None
        return self.near_keys

    @property
    def counts(self) -> Int64s:  # type: ignore[override]  # an attribute of `Lease`; here a copy, made when asked for
        self._copy()
        assert self.near_counts is not None
        return self.near_counts

    @property
    def slots(self) -> Int64s:  # type: ignore[override]  # an attribute of `Lease`; here a copy, made when asked for
        slots = np.zeros(self.n_keys, np.int64)
        slots[self.rest.at] = self.rest.slots
        if self.padding >= 0:
            slots[self.padding] = -1
        return slots

    @property
    def padding(self) -> int:  # type: ignore[override]  # an attribute of `Lease`; here looked for when asked for
        if self._padding is None:
            self._padding = find_key(self.keys, self.skip)
        return self._padding


class Rest:
    """Keys of a lease that had no line when it was fetched, or have lost it since; none is ever taken away.

    Attributes
    ----------
    at : int64[m]
        Which of the lease's keys they are, in no order.
    keys, counts : int64[m]
    slots : int64[m]
        The line that a key has got since; `AWAY` where the row is below, -1 where the key is absent.
    """

    def __init__(self) -> None:
        self.at = self.keys = self.counts = self.slots = _NONE

    def add(self, at: Int64s, keys: Int64s, counts: Int64s) -> None:
        """Keys have no line."""
        self.slots[np.isin(self.at, at)] = -1
        new = ~np.isin(at, self.at)
        more = at[new], keys[new], counts[new], np.full(np.count_nonzero(new), -1)
        self.at, self.keys, self.counts, self.slots = (
            np.concatenate(both) for both in zip((self.at, self.keys, self.counts, self.slots), more, strict=True)
        )


_NONE = np.zeros(0, np.int64)
_NEVER = (-1, (-1, -1))
