"""The seam every tier implements: a store holds one table's lines, `[row | optimizer state]`, by key.

A batch goes through a store as a lease: ``reserve`` finds (and, in tiers that move rows, fetches and pins) the rows of
its distinct keys ahead of time and creates nothing; at the step ``create`` makes the missing ones, ``gather`` copies
rows out, ``apply`` runs the optimizer in place, ``release`` lets go. Results never depend on the tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Int64s: TypeAlias = npt.NDArray[np.int64]
Float32s: TypeAlias = npt.NDArray[np.float32]


class Rule(Protocol):
    """An optimizer as a store sees it: which kernel, how much state a row needs, and how that state begins."""

    code: ClassVar[int]

    def n_state(self, dim: int) -> int:
        """Floats of state beside a row of `dim`."""
        ...

    def initial_state(self, dim: int) -> Float32s:
        """float32[n_state(dim)] of a new row."""
        ...


@dataclass(frozen=True)
class Layout:
    """What the lines of one table hold.

    Attributes
    ----------
    table : str
        Name, for messages.
    dim : int
        Floats of a row.
    initial_state : float32[n_state]
        State of a new row.
    initialize : callable
        ``initialize(keys: int64[n]) -> float32[n, dim]``, a pure function of each key.
    """

    table: str
    dim: int
    initial_state: Float32s
    initialize: Callable[[Int64s], Float32s]

    @property
    def width(self) -> int:
        """Floats of a line."""
        return self.dim + len(self.initial_state)

    def new_lines(self, keys: Int64s) -> Float32s:
        """Lines of keys that are created: float32[n, width]."""
        lines = np.empty((len(keys), self.width), np.float32)
        lines[:, : self.dim] = self.initialize(keys)
        lines[:, self.dim :] = self.initial_state
        return lines


@dataclass
class Lease:
    """A batch's distinct keys on their way through a store.

    Attributes
    ----------
    keys : int64[u], distinct
    slots : int64[u]
        Below 0 exactly where a key is absent; else where the row is, for the store that made the lease to know.
    counts : int64[u]
        Occurrences in the batch, added to the rows' frequencies by ``create``.
    admitted : bool[u] or None
        Which absent keys ``create`` may make; None: all.
    version : int
        The store's version at which `slots` were right.
    """

    keys: Int64s
    slots: Int64s
    counts: Int64s
    admitted: npt.NDArray[np.bool_] | None = None
    version: int = -1


class Chunk(NamedTuple):
    """Some lines as ``scan`` yields and ``put`` takes them, one entry a key.

    Attributes
    ----------
    key, freq, last_step : int64[n]
    row : float32[n, dim]
    state : float32[n, n_state]
    """

    key: Int64s
    freq: Int64s
    last_step: Int64s
    row: Float32s
    state: Float32s


CHUNK_ROWS = 65_536


class Store(Protocol):
    """Lines of one table by key, in one or several tiers. Methods may be called from several threads."""

    layout: Layout

    def reserve(self, keys: Int64s, counts: Int64s) -> Lease:
        """Find the rows of distinct keys, bring them near and pin them. Never creates; rows may move until then."""
        ...

    def create(self, lease: Lease, step: int) -> int:
        """Make the lease's absent, admitted rows, count its keys, stamp them with `step`; rows made."""
        ...

    def gather(self, lease: Lease, out: Float32s) -> None:
        """Copy the first columns of lines to ``out[u, w]``, w <= dim + n_state; zeros where a key is absent."""
        ...

    def apply(self, lease: Lease, grads: Float32s, rule: Rule, hyper: Float32s, step: int) -> int:
        """One optimizer step with the summed gradients ``grads[u, dim]``; absent keys are ignored and counted."""
        ...

    def release(self, lease: Lease) -> None:
        """Unpin the lease's rows. Idempotent."""
        ...

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        ...

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order, in chunks of at most `CHUNK_ROWS`."""
        ...

    def put(self, chunk: Chunk) -> None:
        """Insert or overwrite lines."""
        ...

    def commit(self) -> str:
        """Make everything up to now durable where the tier can; its id."""
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


class StoreSpec(Protocol):
    """What ``host_memory()`` and its siblings return: a place for tables, opened once for each table."""

    def open(self, layout: Layout) -> Store:
        """A store for one table of this layout."""
        ...
