"""What the caching tiers share: an index over all rows, a cache of lines near by, and a home for the rest far away.

Every row's metadata (frequency, last step, where its line is) is in host memory. Its line is in the near cache, or in
its far home, or in both; a line that changed near by is dirty and is written home when it is evicted or committed.

Promise 1 holds because residence decides nothing: what is not resident is read from its home when the step asks for
it, updated in a small scratch by the same kernels, and written home at once. So a batch larger than the cache streams
through, and `reserve` may do as much or as little as there is room for. Pins are the same kind of hint: the lines of
all living leases are left alone while a victim is sought.

A write that fails in the middle of a step leaves rows of which some are updated and some are not. Then the store still
reads, but refuses to commit: the last commit stays what it was.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import absent, all_finite, finite_rows
from hbkit._ext.index import Index
from hbkit._ext.metadata import Metadata
from hbkit._ext.segment import Gradients, expand, pool, retained
from hbkit._ext.slabs import Slabs
from hbkit.errors import (
    BudgetExceeded,
    Closed,
    Corrupt,
    DeviceUnavailable,
    HbkitError,
    SchemaMismatch,
    StorageError,
    Unsupported,
)
from hbkit.store.base import CHUNK_ROWS, Chunk, Filter, Float32s, Int64s, Layout, Lease, Part, Rule, admitted
from hbkit.store.cache import Cache
from hbkit.store.policy import Metas, Policy


class Lines(Protocol):
    """Memory of a near tier: float32[n_lines, width] by slot. As `hbkit._ext.slabs.Slabs`."""

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        ...

    def gather(self, slots: Int64s, out: Float32s) -> None:
        """First ``out.shape[1]`` floats of lines; zeros where the slot is -1."""
        ...

    def scatter(self, slots: Int64s, lines: Float32s) -> None:
        """Write whole lines; slots are >= 0."""
        ...

    def apply(self, rule: Any, slots: Int64s, grads: Float32s, hyper: Float32s) -> None:
        """One optimizer step on distinct slots; -1 is skipped."""
        ...


@dataclass(eq=False)
class TierLease(Lease):
    """A lease whose slots are the store's row numbers; it pins its resident rows for as long as it lives."""

    __eq__ = object.__eq__  # leases are told apart by identity, as a weak set does
    __hash__ = object.__hash__


def room_for(n_rows: int) -> int:
    """Rows to make room for where there are `n_rows`: the next of a doubling sequence."""
    room = 48
    while room < n_rows:
        room *= 2
    return room


def index_nbytes(n_rows: int) -> int:
    """Bytes that an `Index` of `n_rows` takes at the most."""
    return 24 * n_rows + 8192


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, n, size))


class TieredStore(ABC):
    """Base of the tiers that cache: a `Store` but for where the lines are.

    Parameters
    ----------
    layout : Layout
    policy : callable
        Makes the `Policy` of a cache of so many lines.
    scratch_lines : int
        Lines that may be on their way between near and far at once.

    Notes
    -----
    One lock orders all operations: look-ahead may reserve while a step runs.
    """

    tier: ClassVar[str]
    row_nbytes: ClassVar[int] = 16  # of metadata: frequency and last step, the line in the cache

    def __init__(self, layout: Layout, policy: Callable[[int], Policy], scratch_lines: int) -> None:
        if layout.dtype != "float32":
            raise Unsupported(
                f"rows of {layout.dtype} in the {self.tier} tier",
                table=layout.table,
                remedy="use store=host_memory(), or dtype='float32'",
            )
        self.layout = layout
        self._policy, self._scratch_lines = policy, scratch_lines
        self._index = Index()
        self._room = 0  # rows that the metadata has room for
        self._metadata = Metadata(layout.metadata)
        self._slot = np.zeros(0, np.int64)  # line in the cache, -1 where it is only at home
        self._cache: Cache | None = None
        self._near: Lines | None = None
        self._scratch = Slabs(layout.width, 4 * layout.width)
        self._leases: weakref.WeakSet[TierLease] = weakref.WeakSet()
        self._erasures = self._creations = 0
        self._failed: BaseException | None = None
        self._closed = False
        self._n_hits = self._n_misses = self._n_evictions = self._n_streamed = self._n_commits = 0
        self._n_ignored = self._n_skipped = 0
        self._lock = threading.RLock()

    # --- what a tier is ---------------------------------------------------------------------------------------

    @abstractmethod
    def _capacity(self, n_rows: int) -> int:
        """Lines that the cache may have beside an index of `n_rows`; BudgetExceeded where that is none."""

    @abstractmethod
    def _new_lines(self, n_lines: int) -> Lines:
        """Memory for the cache's lines."""

    @abstractmethod
    def _read_home(self, rows: Int64s, keys: Int64s) -> Float32s:
        """Lines at home: float32[n, width]."""

    @abstractmethod
    def _write_home(self, rows: Int64s, keys: Int64s, lines: Float32s) -> None:
        """Bring lines home, in place of those that may be there; all or none."""

    @abstractmethod
    def _erase_home(self, rows: Int64s, keys: Int64s) -> None:
        """Forget the lines at home, where there are any."""

    @abstractmethod
    def _commit_home(self, keep: Mapping[str, npt.NDArray[Any]]) -> str:
        """Make what is at home durable, with all metadata and `keep`; the commit's id."""

    @abstractmethod
    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """See `Store.kept`."""

    @abstractmethod
    def _home_stats(self) -> dict[str, Any]:
        """What the home adds to `stats`."""

    @abstractmethod
    def _metadata_changed(self, rows: Int64s) -> None:
        """Frequency or last step of rows changed; -1 is none."""

    def _grow(self, room: int) -> None:
        """Make room for metadata of `room` rows."""
        self._metadata.reserve(room)
        self._slot = grown(self._slot, room)
        self._room = room

    # --- the cache --------------------------------------------------------------------------------------------

    def _use(self) -> tuple[Cache, Lines]:
        if self._closed:
            raise Closed("the store is closed", table=self.layout.table, remedy="open the table again")
        if self._cache is None or self._near is None:
            self._resize(self._capacity(self._room))
            assert self._cache is not None and self._near is not None
        return self._cache, self._near

    def _resize(self, n_lines: int) -> None:
        """Begin with an empty cache of `n_lines`."""
        if self._cache is not None:
            self._write_back(np.flatnonzero(self._cache.dirty))
            self._slot[self._cache.owner[self._cache.owner >= 0]] = -1
        self._cache = self._near = None  # let go of the old memory first
        cache = Cache(n_lines, self._policy)
        self._near = self._new_lines(cache.n_lines)
        self._cache = cache

    def _make_room(self, n_new: int) -> None:
        """Room for new rows in index and metadata, out of the cache where the budget is one for both.

        The index doubles, so the cache is emptied for it only now and then.
        """
        n_rows = self._index.n_slots + n_new
        if n_rows > self._room:
            n_lines = self._capacity(n_rows)
            if n_lines < self._use()[0].n_lines:
                self._resize(n_lines)
            self._grow(room_for(n_rows))

    def _slots(self, rows: Int64s) -> Int64s:
        """Lines of rows, -1 where a row is absent (-1) or only at home."""
        slots = np.full(len(rows), -1, np.int64)
        held = rows >= 0
        slots[held] = self._slot[rows[held]]
        return slots

    def _pinned(self, n_lines: int) -> npt.NDArray[np.bool_]:
        pinned = np.zeros(n_lines, np.bool_)
        for lease in list(self._leases):
            slots = self._slots(lease.slots)
            pinned[slots[slots >= 0]] = True
        return pinned

    def _plan(self, keys: Int64s) -> tuple[Metas, Int64s]:
        """Metas of keys that are not resident, and lines for them (-1: none); those lines are clean now."""
        cache, _ = self._use()
        newcomers = cache.newcomers(keys)
        slots = cache.plan(newcomers, self._pinned(cache.n_lines))
        taken = slots[slots >= 0]
        self._write_back(taken[cache.dirty[taken]])
        return newcomers, slots

    def _take(self, slots: Int64s, newcomers: Metas, rows: Int64s, lines: Float32s, dirty: bool) -> None:
        """Put lines of rows into the slots that `_plan` gave; who was there leaves."""
        cache, near = self._use()
        evicted = cache.owner[slots]
        evicted = evicted[evicted >= 0]
        near.scatter(slots, lines)
        self._slot[evicted] = -1
        self._n_evictions += len(evicted)
        cache.take(slots, newcomers, rows, dirty)
        self._slot[rows] = slots

    def _write_back(self, slots: Int64s) -> None:
        cache, near = self._use()
        for part in _parts(len(slots), self._scratch_lines):
            some = slots[part]
            lines = np.empty((len(some), self.layout.width), np.float32)
            near.gather(some, lines)
            self._write_home(cache.owner[some], cache.metas["key"][some], lines)
            cache.dirty[some] = False

    def _bring(self, rows: Int64s, keys: Int64s) -> None:
        """Make rows resident, as many as find a line."""
        cache, _ = self._use()
        slots = self._slot[rows]
        hit = slots >= 0
        cache.touch(slots[hit])
        missed = np.flatnonzero(~hit)
        self._n_hits += len(rows) - len(missed)
        self._n_misses += len(missed)
        for part in _parts(len(missed), self._scratch_lines):
            some = missed[part]
            newcomers, slots = self._plan(keys[some])
            found = slots >= 0
            some, slots = some[found], slots[found]
            lines = self._read_home(rows[some], keys[some])
            self._take(slots, newcomers[found], rows[some], lines, dirty=False)

    # --- Store ------------------------------------------------------------------------------------------------

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A change that leaves the store unfit to commit if it fails half-way."""
        with self._lock:
            self._use()
            try:
                yield
            except (StorageError, Corrupt, DeviceUnavailable) as e:
                self._failed = e
                raise

    def __len__(self) -> int:
        return len(self._index)

    @property
    def _version(self) -> tuple[int, int]:
        return self._erasures, self._creations

    def reserve(self, keys: Int64s, counts: Int64s, padding: int = -1) -> Lease:
        """Find the rows of distinct keys, bring them near and pin them, as far as there is room. Creates nothing."""
        with self._lock:
            self._use()
            lease = TierLease(keys, np.zeros(0, np.int64), counts, padding)
            self._refresh(lease)
            self._leases.add(lease)
            held = lease.slots >= 0
            self._bring(lease.slots[held], keys[held])
            return lease

    def _refresh(self, lease: Lease) -> None:
        lease.refresh(self._index, self._version)

    def _insert(self, keys: Int64s) -> Int64s:
        """Rows of new keys, for which there is room."""
        rows, _ = self._index.find_or_insert(keys)
        self._creations += 1
        self._metadata.clear(rows)
        self._slot[rows] = -1
        return rows

    def create(self, lease: Lease, step: int, admission: Filter | None = None) -> int:
        """Make the lease's absent rows that are admitted, count its keys, stamp them with `step`; rows made."""
        with self._whole():
            self._refresh(lease)
            new = absent(lease.slots, lease.padding)
            if len(new):
                with admitted(admission, lease.keys[new], lease.counts[new]) as some:
                    new = new[some]
                    self._make(lease, new)
            self._metadata.stamp(lease.slots, step, lease.counts)
            self._metadata_changed(lease.slots)
            return len(new)

    def _make(self, lease: Lease, new: Int64s) -> None:
        """Rows for the lease's keys at positions `new`; they go home at once where the cache has no line for them."""
        self._make_room(len(new))
        for part in _parts(len(new), self._scratch_lines):
            some = new[part]
            keys = lease.keys[some]
            lines = self.layout.new_lines(keys)
            newcomers, slots = self._plan(keys)
            rows = self._insert(keys)
            found = slots >= 0
            try:
                self._write_home(rows[~found], keys[~found], lines[~found])
            except HbkitError:
                self._index.erase(keys)
                self._erasures += 1
                raise
            self._take(slots[found], newcomers[found], rows[found], lines[found], dirty=True)
            lease.slots[some], lease.version = rows, self._version

    def _away(self, rows: Int64s, slots: Int64s) -> Iterator[Int64s]:
        """Positions of rows that are only at home, in parts that fit the scratch."""
        away = np.flatnonzero((rows >= 0) & (slots < 0))
        self._n_streamed += len(away)
        return (away[part] for part in _parts(len(away), self._scratch_lines))

    def _gather(self, rows: Int64s, keys: Int64s, out: Float32s) -> None:
        slots = self._slots(rows)
        self._use()[1].gather(slots, out)
        for some in self._away(rows, slots):
            out[some] = self._read_home(rows[some], keys[some])[:, : out.shape[1]]

    def gather(self, lease: Lease, out: Float32s, index: Int64s | None = None) -> None:
        """Copy rows (or whole lines, as wide as `out`) to ``out[u, dim]``, or those of the keys number `index`; zeros
        where a key is absent."""
        rows = out if index is None else retained((len(lease.keys), out.shape[1]))
        with self._lock:
            self._use()
            self._refresh(lease)
            self._gather(lease.slots, lease.keys, rows)
        if index is not None:
            expand(rows, index, out)

    def pool(
        self,
        lease: Lease,
        index: Int64s,
        splits: Int64s,
        out: Float32s,
        weight: Float32s | None = None,
        row_scale: Float32s | None = None,
    ) -> None:
        """Weighted sums of rows, which may be far apart: they are brought together first."""
        rows = retained((len(lease.keys), out.shape[1]))
        self.gather(lease, rows)
        pool(rows, index, splits, out, weight, row_scale)

    def apply(
        self, lease: Lease, grads: Float32s | Gradients, rule: Rule, hyper: Float32s, step: int, skip: bool = False
    ) -> int:
        """One optimizer step in place; how many of the keys were absent and ignored."""
        sums = grads.sum() if isinstance(grads, Gradients) else grads
        with self._whole():
            cache, near = self._use()
            self._refresh(lease)
            rows = lease.slots
            if skip and not all_finite(sums):
                rows = np.where(finite_rows(sums), rows, -1)
                self._n_skipped += int(np.count_nonzero(rows != lease.slots))
            slots = self._slots(rows)
            near.apply(rule.code, slots, sums, hyper)
            cache.dirty[slots[slots >= 0]] = True
            for some in self._away(rows, slots):
                held, keys, n = rows[some], lease.keys[some], len(some)
                lines = self._read_home(held, keys)
                self._scratch.reserve(n)
                self._scratch.scatter(np.arange(n), lines)
                self._scratch.apply(rule.code, np.arange(n), sums[some], hyper)
                self._scratch.gather(np.arange(n), lines)
                self._write_home(held, keys, lines)
            ignored = self._metadata.stamp(lease.slots, step) - (lease.padding >= 0)
            self._metadata_changed(lease.slots)
            self._n_ignored += ignored
            return ignored

    def release(self, lease: Lease) -> None:
        """Unpin the lease's rows. Idempotent."""
        with self._lock:
            if isinstance(lease, TierLease):
                self._leases.discard(lease)

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        with self._whole():
            cache, _ = self._use()
            rows = self._index.erase(keys)
            gone = rows >= 0
            rows = rows[gone]
            slots = self._slot[rows]
            cache.drop(slots[slots >= 0])
            self._slot[rows] = -1
            self._erasures += len(rows) > 0
            self._erase_home(rows, np.ascontiguousarray(keys)[gone])
            return len(rows)

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order.

        The keys are those of the moment the scan begins; a row changed or erased meanwhile is read as it is then.
        """
        with self._lock:
            self._use()
            keys, rows = self._index.items()
            if since is not None:
                keys = keys[self._metadata.get(rows)[1] > since]
        return self._chunks(np.sort(keys), lines=True)

    def part(self, part: Part, rows: bool = True) -> Iterator[Chunk]:
        """Lines of the keys of `part`, in the order of their mix; without `rows`, row and state are [n, 0]."""
        with self._lock:
            self._use()
            keys = part.of(self._index)
        return self._chunks(keys, lines=rows)

    def _chunks(self, keys: Int64s, lines: bool) -> Iterator[Chunk]:
        dim = self.layout.dim
        for part in _parts(len(keys), CHUNK_ROWS):
            some = keys[part]
            with self._lock:
                rows = self._index.find(some)
                held = rows >= 0
                some, rows = some[held], rows[held]
                out = np.empty((len(some), self.layout.width if lines else 0), np.float32)
                if lines:
                    self._gather(rows, some, out)
                freq, last_step = self._metadata.get(rows)
            yield Chunk(some, freq, last_step, out[:, :dim], out[:, dim:])

    def put(self, chunk: Chunk) -> None:
        """Insert or overwrite lines; those that are not resident go straight home."""
        n_state = self.layout.width - self.layout.dim
        if chunk.row.shape[1] != self.layout.dim or chunk.state.shape[1] != n_state:
            raise SchemaMismatch(
                f"lines of {chunk.row.shape[1]} + {chunk.state.shape[1]} floats do not fit "
                f"{self.layout.dim} + {n_state}",
                table=self.layout.table,
                remedy="give the table the dim and optimizer that the lines were written with",
            )
        all_keys, freq, last_step = (np.ascontiguousarray(column, np.int64) for column in chunk[:3])
        with self._whole():
            for part in _parts(len(all_keys), self._scratch_lines):
                keys = all_keys[part]
                lines = np.concatenate([chunk.row[part], chunk.state[part]], axis=1, dtype=np.float32)
                new = self._index.find(keys) < 0
                self._make_room(int(np.count_nonzero(new)))
                cache, near = self._use()
                self._insert(keys[new])
                rows = self._index.find(keys)
                slots = self._slot[rows]
                away = slots < 0
                self._metadata.put(rows, freq[part], last_step[part])
                self._metadata_changed(rows)
                try:
                    self._write_home(rows[away], keys[away], lines[away])
                except HbkitError:
                    self._index.erase(keys[new])
                    self._erasures += 1
                    raise
                near.scatter(slots[~away], lines[~away])
                cache.dirty[slots[~away]] = True

    def commit(self, keep: Mapping[str, npt.NDArray[Any]] | None = None) -> str:
        """Make everything up to now durable, and the columns of `keep` beside it; its id.

        Raises
        ------
        StorageError
            The disk is full or failed, now or in an earlier update; the last commit stays. A commit that met a full
            disk may be tried again.
        """
        with self._lock:
            self._use()
            if self._failed is not None:
                raise StorageError(
                    "an update was written only in part and cannot be committed",
                    table=self.layout.table,
                    remedy="open the table again: it begins at its last commit",
                ) from self._failed
            self._write_back(np.flatnonzero(self._use()[0].dirty))
            self._n_commits += 1
            return self._commit_home(keep or {})

    def latest_step(self) -> int:
        """Largest step that a row was stamped with, 0 for none."""
        return self._metadata.latest

    def stats(self) -> dict[str, Any]:
        """Rows, bytes held, hits and misses of `reserve`, rows that streamed past the cache, keys ignored."""
        with self._lock:
            cache, near = self._use()
            asked = self._n_hits + self._n_misses
            return {
                "tier": self.tier,
                "rows": len(self._index),
                "index_nbytes": self._index.nbytes,
                "lines_nbytes": near.nbytes,
                "metadata_nbytes": self._room * self.row_nbytes + cache.nbytes,
                "cache_lines": cache.n_lines,
                "hits": self._n_hits,
                "misses": self._n_misses,
                "hit_rate": self._n_hits / asked if asked else 0.0,
                "evictions": self._n_evictions,
                "streamed_rows": self._n_streamed,
                "ignored_updates": self._n_ignored,
                "skipped_updates": self._n_skipped,
                **self._home_stats(),
            }

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        with self._lock:
            cache, _ = self._use()
            self._index.validate()
            cache.validate()
            keys, rows = self._index.items()
            assert self._index.n_slots <= self._room == self._metadata.room == len(self._slot)
            slots = self._slot[rows]
            near = slots >= 0
            assert np.count_nonzero(near) == np.count_nonzero(cache.owner >= 0), "a line's owner is gone"
            assert np.array_equal(cache.owner[slots[near]], rows[near]), "a line has another owner"
            assert np.array_equal(cache.metas["key"][slots[near]], keys[near]), "a line has another key"

    def close(self) -> None:
        """Let go of memory, files and locks; what was not committed is discarded. Idempotent."""
        with self._lock:
            self._closed = True
            self._cache = self._near = None


def grown(array: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    """A copy of `array` with room for more, zeros."""
    out = np.zeros((room, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


def budget_exceeded(name: str, budget: int, n_rows: int, least: int, table: str) -> BudgetExceeded:
    """The named error for a budget that leaves no room for a cache."""
    return BudgetExceeded(
        f"{name} of {budget} bytes has no room for a cache beside an index of {n_rows} rows",
        table=table,
        remedy=f"give at least {least} bytes",
    )
