"""The seam every tier implements: a store holds one table's lines, `[row | optimizer state]`, by key.

A batch goes through a store as a lease: ``reserve`` finds (and, in tiers that move rows, fetches and pins) the rows of
its distinct keys ahead of time and creates nothing; at the step ``create`` makes the missing ones, ``gather`` copies
rows out, ``apply`` runs the optimizer in place, ``release`` lets go. Results never depend on the tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import absent
from hbkit._ext.index import Index
from hbkit._ext.segment import Gradients
from hbkit.store.changes import Changes
from hbkit.store.line import Chunk, Float32s, Int64s, Layout, Part, Rule
from hbkit.store.point import Point


class Filter(Protocol):
    """Admission as a store sees it: counts of keys that have no row. See `hbkit.embedding.admission`."""

    def admit(self, keys: Int64s, counts: Int64s) -> npt.NDArray[np.bool_]:
        """Add `counts` to absent, distinct `keys`; which of them have come to the named count: bool[n].

        `keep` or `undo` follows. Where this raises, nothing was counted.
        """
        ...

    def keep(self) -> None:
        """Those admitted have rows now: let go of their counts, where that is possible. Never fails."""
        ...

    def undo(self) -> None:
        """Take back what `admit` has added, since the rows could not be made. Never fails."""
        ...


@contextmanager
def admitted(admission: Filter | None, keys: Int64s, counts: Int64s) -> Iterator[npt.NDArray[np.bool_] | slice]:
    """Which of absent keys are to have rows; within, the caller makes them. If that fails, nothing was counted."""
    if admission is None:
        yield slice(None)
        return
    some = admission.admit(keys, counts)
    try:
        yield some
    except BaseException:
        admission.undo()
        raise
    admission.keep()


@dataclass
class Lease:
    """A batch's distinct keys on their way through a store.

    Attributes
    ----------
    keys : int64[u], distinct
    slots : int64[u]
        Below 0 exactly where a key is absent or `padding`; else where the row is, for the store that made the lease to
        know.
    counts : int64[u]
        Occurrences in the batch, added to the rows' frequencies by ``create``.
    padding : int
        Position of the key that has no row and never gets one, -1 where there is none.
    version : (int, int)
        Erasures and creations that the store had seen when `slots` were right.
    stamped : (int, (int, int))
        The step that ``create`` stamped the slots with, and their version then.
    """

    keys: Int64s
    slots: Int64s
    counts: Int64s
    padding: int = -1
    version: tuple[int, int] = (-1, -1)
    stamped: tuple[int, tuple[int, int]] = (-1, (-1, -1))

    def refresh(self, index: Index, version: tuple[int, int]) -> None:
        """Bring `slots` up to date. What was found stays where it is until some key is erased."""
        if self.version[0] != version[0]:
            self.slots = index.find(self.keys)
            if self.padding >= 0:
                self.slots[self.padding] = -1
        elif self.version != version:
            missing = absent(self.slots, self.padding)
            if len(missing):
                self.slots[missing] = index.find(self.keys[missing])
        self.version = version


class Store(Protocol):
    """Lines of one table by key, in one or several tiers. Methods may be called from several threads."""

    layout: Layout
    changes: Changes

    def reserve(self, keys: Int64s, counts: Int64s, padding: int = -1, ahead: bool = False) -> Lease:
        """Announce a batch's distinct keys. Never creates.

        ``keys[padding]`` is left out of everything: it reads zeros, and is neither created, counted nor updated.
        With `ahead`, batches are announced in the order of their steps, some before they are fetched; a tier may then
        keep what is used sooner.
        """
        ...

    def fetch(self, lease: Lease) -> None:
        """Bring the lease's rows near and pin them, as far as there is room; what needs that calls it.

        May run in another thread than the step before.
        """
        ...

    def wait(self, lease: Lease, since: float | None = None) -> None:
        """`fetch` what was not, and return once it is near. The step begins.

        What was not near when it could have begun, at `since` of `time.monotonic`, counts as late; now when left out.
        """
        ...

    def create(self, lease: Lease, step: int, admission: Filter | None = None) -> int:
        """Make the lease's absent rows that are admitted, count its keys, stamp them with `step`; rows made.

        Where it raises MemoryError, no row was made and nothing was counted.
        """
        ...

    def gather(self, lease: Lease, out: Float32s, index: Int64s | None = None) -> None:
        """Copy the first columns of lines to ``out[u, w]``, w <= dim + n_state; zeros where a key is absent.

        With `index`, ``out[i]`` is the line of the lease's key number ``index[i]``.
        """
        ...

    def pool(
        self,
        lease: Lease,
        index: Int64s,
        splits: Int64s,
        out: Float32s,
        weight: Float32s | None = None,
        row_scale: Float32s | None = None,
    ) -> None:
        """`hbkit._ext.segment.pool` of the rows of the lease's keys number `index`, into ``out[b, dim]``."""
        ...

    def apply(
        self, lease: Lease, grads: Float32s | Gradients, rule: Rule, hyper: Float32s, step: int, skip: bool = False
    ) -> int:
        """One optimizer step with gradients ``[u, dim]`` summed per key, or to be summed.

        Absent keys are ignored and counted, which is returned; with `skip`, keys whose gradient is NaN or infinite keep
        their rows and are counted as skipped.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Unpin the lease's rows. Idempotent."""
        ...

    def read(self, lease: Lease, at: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Whole lines and metadata of the lease's keys number ``at[m]``, all of which have rows, for a tier above.

        They are written to ``lines[m, dim + n_state]``, ``freq[m]`` and ``last_step[m]``, which may be pinned memory:
        there is no copy beside.
        """
        ...

    def write(self, keys: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Take back whole lines, ``lines[n, dim + n_state]``, and metadata of distinct rows that a tier above had.

        Rows that there are not yet are made. As `put`, but that rows whose `last_step` shows that they changed are not
        noted beside (`changes`). Where it fails, some rows may have been written and the others are as they were: it
        may be tried again.
        """
        ...

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        ...

    def has(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each key has a row: bool[n]."""
        ...

    def metadata(self, keys: Int64s) -> tuple[Int64s, Int64s]:
        """Frequency and last step of each key, all of which have rows: (int64[n], int64[n])."""
        ...

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order, in chunks of at most `CHUNK_ROWS`."""
        ...

    def point(self, base: str | None = None, keep: Callable[[], Any] | None = None, spill: Path | None = None) -> Point:
        """Take a point: the rows as they are now, to be read while the store goes on. To be closed.

        Parameters
        ----------
        base : str, optional
            Name of a mark of `changes`: only rows changed or erased since belong to it. All, where that is not known.
        keep : callable, optional
            Called at the same instant, while nothing changes; `Point.kept` is what it returns.
        spill : Path, optional
            Directory for the temporary file of lines set aside, where there are many.

        Notes
        -----
        One at a time: waits until an earlier one is closed.
        """
        ...

    def part(self, part: Part, rows: bool = True) -> Iterator[Chunk]:
        """Lines of the keys of `part`, in the order of their mix; without `rows`, row and state are [n, 0]."""
        ...

    def put(self, chunk: Chunk) -> None:
        """Insert or overwrite lines."""
        ...

    def commit(self, keep: Mapping[str, npt.NDArray[Any]] | None = None) -> str:
        """Make everything up to now durable where the tier can, and beside it columns of int64 or uint16; its id."""
        ...

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """The columns that were kept by the commit that this store was opened from."""
        ...

    def latest_step(self) -> int:
        """Largest step that a row here was stamped with, 0 for none: where an opened store goes on."""
        ...

    def __len__(self) -> int: ...

    def stats(self) -> dict[str, Any]:
        """Counts and sizes: rows, ``*_nbytes`` of index, lines and metadata, and what the tier adds."""
        ...

    def close(self) -> None:
        """Let go of memory, files and locks. Idempotent."""
        ...


class Pending(Protocol):
    """Something that goes on with a table in the background."""

    def check(self) -> None:
        """Raise what made it fail, if it has and nobody was told yet."""
        ...

    def settle(self) -> None:
        """Return once it is over; raises as `check`."""
        ...


class StoreSpec(Protocol):
    """What ``host_memory()`` and its siblings return: a place for tables, opened once for each table."""

    def open(self, layout: Layout) -> Store:
        """A store for one table of this layout."""
        ...
