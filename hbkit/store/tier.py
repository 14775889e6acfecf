"""What the caching tiers share: lines of some rows near by, and a home for all of them far away.

A row's line is near, or only at home. A key has at most one near line, and while it has one, that one alone is current:
it is read and updated in place, and when it makes way, or at a commit, what changed of it is written home. So nothing
that is near can be stale, whatever was fetched when.

A batch's rows are announced (`reserve`), fetched (`fetch`: each gets a line, pinned until the batch is released), and
then used. Nobody waits for a fetch but those who need its rows: the store is unlocked while the home reads, and a line
that is on its way is marked as arriving. Room is made when it is needed: the cache names the lines of least worth.

Promise 1 holds because residence decides nothing: a row that finds no line, all being pinned, is read from home when
the step asks for it, updated in a small scratch by the same kernels, and written home at once. So a batch larger than
the cache streams through.

A write that fails in the middle of a step leaves rows of which some are updated and some are not. Then the store still
reads, but refuses to commit: the last commit stays what it was.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import absent, add_at, count_at, set_at
from hbkit._ext.index import Index
from hbkit._ext.metadata import Metadata
from hbkit._ext.pool import give_back
from hbkit._ext.segment import Gradients, expand, pool, retained
from hbkit._ext.slabs import Slabs
from hbkit.errors import BudgetExceeded, Closed, Corrupt, DeviceUnavailable, SchemaMismatch, StorageError
from hbkit.store.base import Filter, Lease, admitted
from hbkit.store.cache import Cache, Window
from hbkit.store.changes import Changes, Since
from hbkit.store.line import CHUNK_ROWS, Chunk, Float32s, Int64s, Layout, Part, Rule, check_lines, check_rows
from hbkit.store.point import InPlace, Point
from hbkit.store.policy import Policy

Bytes: TypeAlias = npt.NDArray[np.uint8]
Counts: TypeAlias = npt.NDArray[Any]  # int64 or uint32
AWAY = 1 << 40  # a lease's slot for a row that is only at home
GROWTH = 1.25  # an index that outgrows its share of the budget gets room for so many times the rows there are
UNFIT = (StorageError, Corrupt, DeviceUnavailable)  # whoever meets one of them in a change does not commit any more
FIRST_LINES = 1024  # of a cache, which doubles them up to its limit


class Home(Protocol):
    """Where all of a table's rows live, by key. Calls are ordered by the store's lock, but for `read`."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        ...

    def find(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether there is a row of each key: bool[n]."""
        ...

    def add(self, keys: Int64s) -> None:
        """Distinct new rows, whose lines come later. MemoryError leaves all as it was."""
        ...

    def erase(self, keys: Int64s) -> int:
        """Forget rows; how many there were."""
        ...

    def drop(self, keys: Int64s) -> int:
        """`erase` in memory alone, for a table that will not be committed any more: the disk may be full."""
        ...

    def read(self, keys: Int64s) -> tuple[Bytes, Counts, Counts]:
        """Lines, frequencies and last steps of rows that were written; beside any other call."""
        ...

    def write(self, keys: Int64s, lines: Bytes, freq: Counts, last_step: Counts) -> None:
        """Lines of distinct rows, new or in place of what there was; all or none."""
        ...

    def metadata(self, keys: Int64s) -> tuple[Counts, Counts]:
        """Frequencies and last steps of rows that were written."""
        ...

    def keys(self, part: Part) -> Int64s:
        """Keys of a part, in the order of their mix."""
        ...

    def in_order(self) -> Iterator[Int64s]:
        """All keys, ascending, in pieces that bound the memory taken."""
        ...

    def commit(self, keep: Mapping[str, npt.NDArray[Any]], latest_step: int) -> str:
        """Make all that was written durable, and `keep` beside it; the commit's id."""
        ...

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """See `Store.kept`."""
        ...

    def latest_step(self) -> int:
        """See `Store.latest_step`."""
        ...

    def stats(self) -> dict[str, Any]:
        """What the home adds to the store's."""
        ...

    def validate(self) -> None:
        """Recount everything; AssertionError where it contradicts itself."""
        ...

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        ...


@dataclass(eq=False)
class TierLease(Lease):
    """A lease whose slots are near lines, `AWAY` or -1; it pins its lines until it is released or forgotten."""

    seen: int = -1  # the store's version when the slots were right
    batch: int | None = None  # its number in the window
    fetched: bool = False
    n_brought: int = 0  # rows that were not near when they were fetched
    done: float = math.inf  # when they were
    asked: bool = False  # by the step
    settled: bool = False  # every key but the padding has a line, and none is arriving
    abandoned: deque[tuple[Int64s, int | None]] | None = None  # where it leaves what it holds if nobody releases it

    __eq__ = object.__eq__  # leases are told apart by identity, as a weak set does
    __hash__ = object.__hash__

    def __del__(self) -> None:
        if self.abandoned is not None:
            self.abandoned.append((self.slots, self.batch))


def _near(slots: Int64s) -> npt.NDArray[np.bool_]:
    near: npt.NDArray[np.bool_] = slots.view(np.uint64) < AWAY
    return near


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, n, size))


class TieredStore(ABC):
    """Base of the tiers that cache: a `Store` but for where the lines are.

    Parameters
    ----------
    layout : Layout
    home : Home
        Of the store, which closes it.
    policy : callable
        Makes the `Policy` of a cache of so many lines.
    scratch_lines : int
        Lines that may be on their way between near and far at once.

    Notes
    -----
    One lock orders all operations, but is not held while rows are fetched: look-ahead may fetch while a step runs.
    """

    tier: ClassVar[str]

    def __init__(self, layout: Layout, home: Home, policy: Callable[[int], Policy], scratch_lines: int) -> None:
        self.layout, self._home = layout, home
        self._scratch_lines = scratch_lines
        self._window = Window()
        self._scratch = Slabs(layout.width, 4 * layout.width, dim=layout.dim, row_dtype=layout.dtype)
        self._leases: weakref.WeakSet[TierLease] = weakref.WeakSet()
        self._abandoned: deque[tuple[Int64s, int | None]] = deque()
        self._version = 0  # counts what gives keys lines or takes them
        self._failed: BaseException | None = None
        self._closed = False
        self._n_hits = self._n_misses = self._n_evictions = self._n_streamed = self._n_ready = self._n_late = 0
        self._n_ignored = self._n_skipped = 0
        self._waited = 0.0
        self.changes = Changes(layout.metadata)
        self._pointing = threading.Lock()  # held while there is a point
        self._point: _TierPoint | None = None
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._room = -1  # rows for whose index the budget has room
        self._limit = 0  # lines that the cache may have then
        self._cache = Cache(1, policy)
        self._lines = self._new_lines()
        self._metadata = Metadata(layout.metadata)
        self._arriving = np.zeros(0, np.bool_)
        self._make_room(0)
        self._grow(min(self._limit, FIRST_LINES))

    # --- what a tier is ---------------------------------------------------------------------------------------

    @abstractmethod
    def _capacity(self, n_rows: int) -> int:
        """Lines that the cache may have beside an index of `n_rows`; BudgetExceeded where that is none."""

    def _first_room(self) -> int:
        """Rows for whose index room is kept from the beginning."""
        return 0

    @abstractmethod
    def _new_lines(self) -> Slabs:
        """Memory for the cache's lines."""

    # --- the cache --------------------------------------------------------------------------------------------

    def _make_room(self, n_new: int) -> None:
        """Room for the index of new rows, out of the cache where the budget is one for both."""
        n_rows = len(self._home) + n_new
        if n_rows > self._room:
            room = max(self._first_room(), int(n_rows * GROWTH))
            try:
                self._limit = self._capacity(room)
            except BudgetExceeded:
                room, self._limit = n_rows, self._capacity(n_rows)
            if self._limit >= self._cache.n_lines or self._shrink(self._limit):
                self._room = room

    def _shrink(self, n_lines: int) -> bool:
        """Have fewer lines; whether that was possible, which it is not while some are arriving."""
        if self._arriving.any():
            return False
        cache = self._cache
        over = len(cache) - n_lines
        if over > 0:
            lines = cache.victims(over)
            if len(lines) < over:
                pinned = np.setdiff1d(cache.held(), lines)[: over - len(lines)]
                self._lost(pinned, AWAY)
                lines = np.concatenate([lines, pinned])
            self._evict(lines)
        beyond = cache.held(n_lines)
        for part in _parts(len(beyond), self._scratch_lines):
            self._move(beyond[part])
        cache.resize(n_lines)
        self._lines.trim(n_lines)
        self._metadata.trim(n_lines)
        self._arriving = self._arriving[:n_lines].copy()
        give_back()
        return True

    def _move(self, lines: Int64s) -> None:
        """Give the keys of lines others, the lowest that are free."""
        living = list(self._leases)
        self._unpin_abandoned()
        cache, moved = self._cache, np.arange(self._cache.n_lines)
        keys, packed, metadata = cache.key[lines], self._lines.pack(lines), self._metadata.get(lines)
        kept = cache.dirty[lines], cache.pins[lines], cache.next_use[lines]
        cache.remove(lines)
        to = moved[lines] = cache.insert(keys)
        self._lines.unpack(to, packed)
        self._metadata.put(to, *metadata)
        cache.dirty[to], cache.pins[to], cache.next_use[to] = kept
        for lease in living:
            near, lease.settled = _near(lease.slots), False
            lease.slots[near] = moved[lease.slots[near]]

    def _lost(self, lines: Int64s, slot: int) -> None:
        """Lines are taken from their keys: the leases that hold them have `slot` there."""
        living = list(self._leases)
        self._unpin_abandoned()
        for lease in living:
            lease.slots[np.isin(lease.slots, lines)] = slot
            lease.settled = False
        self._version += 1

    def _unpin_abandoned(self) -> None:
        while self._abandoned:
            slots, batch = self._abandoned.popleft()
            self._unpin(slots)
            if batch is not None:
                self._window.release(batch)

    def _unpin(self, slots: Int64s) -> None:
        add_at(self._cache.pins, slots, -1)

    def _free(self, n: int) -> int:
        """Make room for `n` lines; how many there is room for."""
        cache = self._cache
        self._unpin_abandoned()
        short = len(cache) + n - cache.n_lines
        if short > 0 and cache.n_lines < self._limit:
            self._grow(min(self._limit, max(2 * cache.n_lines, cache.n_lines + short)))
            short = len(cache) + n - cache.n_lines
        if short > 0:
            self._evict(cache.victims(short))
        return min(n, cache.n_lines - len(cache))

    def _grow(self, n_lines: int) -> None:
        """Have more lines: a cache takes the memory that it uses."""
        self._cache.resize(n_lines)
        self._metadata.reserve(n_lines)
        self._arriving = np.concatenate([self._arriving, np.zeros(n_lines - len(self._arriving), np.bool_)])
        give_back()

    def _evict(self, lines: Int64s) -> None:
        self._write_back(lines[self._cache.dirty[lines]])
        self._cache.remove(lines)
        self._n_evictions += len(lines)

    def _insert(self, keys: Int64s) -> Int64s:
        """Pinned lines for keys that have none, for which there is room."""
        lines = self._cache.insert(keys)
        self._lines.reserve(int(lines.max(initial=-1)) + 1)
        self._cache.pins[lines] = 1
        self._version += 1
        return lines

    def _write_back(self, lines: Int64s) -> None:
        for part in _parts(len(lines), self._scratch_lines):
            some = lines[part]
            self._write_home(self._cache.key[some], self._lines.pack(some), *self._metadata.get(some))
            self._cache.dirty[some] = False

    def _write_home(self, keys: Int64s, lines: Bytes, freq: Int64s, last_step: Int64s) -> None:
        self._home.write(keys, lines, freq.astype(np.uint32), last_step.astype(np.uint32))

    def _bring(self, lease: TierLease, wanted: Int64s) -> bool:
        """Give lines to the lease's rows at positions `wanted`, which are only at home; whether there was room for any.

        The lock is let go while the home reads.
        """
        brought = False
        for part in _parts(len(wanted), self._scratch_lines):
            self._check_open()
            self._refresh(lease)
            some = wanted[part]
            some = some[lease.slots[some] == AWAY]
            some = some[: self._free(len(some))]
            if len(some) == 0:
                continue
            keys, cache = lease.keys[some], self._cache
            lines = lease.slots[some] = self._insert(keys)
            lease.seen, brought = self._version, True
            self._arriving[lines] = True
            cache.pins[lines] += 1  # whatever becomes of the lease meanwhile
            got: Any = None
            self._lock.release()
            try:
                got = self._home.read(keys)
            finally:
                self._lock.acquire()
                self._arriving[lines] = False
                cache.pins[lines] -= 1
                self._arrived.notify_all()
                if got is None:
                    self._lost(lines, AWAY)
                    cache.remove(lines)
                else:
                    self._lines.unpack(lines, got[0])
                    self._metadata.put(lines, *(np.ascontiguousarray(column, np.int64) for column in got[1:]))
        return brought

    # --- Store ------------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the store is closed", table=self.layout.table, remedy="open the table again")

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change that leaves the store unfit to commit if it fails half-way."""
        try:
            yield
        except UNFIT as e:
            self._failed = e
            raise

    def __len__(self) -> int:
        return len(self._home)

    def reserve(self, keys: Int64s, counts: Int64s, padding: int = -1, ahead: bool = False) -> Lease:
        """Announce a batch's distinct keys; `ahead` of others that were, so that the cache may reckon with it."""
        with self._open():
            lease = TierLease(keys, np.full(len(keys), -1, np.int64), counts, padding, abandoned=self._abandoned)
            if ahead:
                lease.batch = self._window.announce(keys)
                lines = self._cache.find(keys)
                lines = lines[lines >= 0]
                use = self._cache.next_use[lines]
                self._cache.next_use[lines] = np.minimum(use, lease.batch)
            return lease

    def fetch(self, lease: Lease) -> None:
        """Give each of the lease's rows a near line and pin it, as far as there is room."""
        assert isinstance(lease, TierLease)
        with self._open():
            self._fetch(lease)

    def wait(self, lease: Lease, since: float | None = None) -> None:
        """Return once the lease's rows are near, as far as there is room. The step begins; it could have at `since`."""
        with self._open():
            self._ready(lease, since)

    def _fetch(self, lease: TierLease) -> None:
        if not lease.fetched:
            lease.fetched = True
            self._leases.add(lease)
            away = self._refresh(lease)
            near = _near(lease.slots)
            self._cache.access(lease.keys, np.where(near, lease.slots, -1))
            self._n_hits += int(np.count_nonzero(near))
            self._n_misses += len(away)
            self._bring(lease, away)
            lease.n_brought, lease.done = len(away), time.monotonic()

    def _refresh(self, lease: TierLease) -> Int64s:
        """Look for rows without a line, again where some came since; positions of those only at home."""
        slots, cache = lease.slots, self._cache
        if lease.seen != self._version:
            apart = absent(slots, lease.padding) if lease.seen < 0 else np.flatnonzero(~_near(slots))
            keys = lease.keys[apart]
            found = cache.find(keys)
            rest = np.flatnonzero(found < 0)
            if len(rest):
                found[rest] = np.where(self._home.find(keys[rest]), AWAY, -1)
            add_at(cache.pins, found, 1)
            slots[apart] = found
            if lease.padding >= 0:
                add_at(cache.pins, slots[lease.padding : lease.padding + 1], -1)
                slots[lease.padding] = -1
            lease.seen = self._version
        return np.flatnonzero(slots == AWAY)

    def _ready(self, lease: Lease, since: float | None = None) -> tuple[Int64s, Int64s]:
        """The lease's lines (-1: absent or away) and the positions of rows that find no line; nothing is arriving."""
        assert isinstance(lease, TierLease)
        if lease.settled:
            return lease.slots, _NONE
        begin = time.monotonic() if since is None else since
        self._fetch(lease)
        while True:
            away = self._refresh(lease)
            n_arriving = count_at(self._arriving.view(np.uint8), lease.slots)
            if not lease.asked:
                n_late = max(lease.n_brought if lease.done > begin else 0, len(away) + n_arriving)
                self._n_late += n_late
                self._n_ready += int(np.count_nonzero(lease.slots >= 0)) - n_late
                lease.asked = True
            if len(away) and self._bring(lease, away):
                continue
            if not n_arriving:
                self._waited += time.monotonic() - begin
                lines = lease.slots if len(away) == 0 else np.where(_near(lease.slots), lease.slots, -1)
                lease.settled = len(away) == len(absent(lines, lease.padding)) == 0
                return lines, away
            self._wait()

    def _wait(self) -> None:
        """Return once something has arrived, for whoever holds the lock."""
        self._arrived.wait()
        self._check_open()

    def _find(self, keys: Int64s) -> Int64s:
        """Lines of keys, -1 where there is none; nothing is arriving."""
        while True:
            lines = self._cache.find(keys)
            if not count_at(self._arriving.view(np.uint8), lines):
                return lines
            self._wait()

    def create(self, lease: Lease, step: int, admission: Filter | None = None) -> int:
        """Make the lease's absent rows that are admitted, count its keys, stamp them with `step`; rows made."""
        with self._open():
            lines, away = self._ready(lease)
            with self._change():
                new = absent(lease.slots, lease.padding)
                if len(new):
                    with admitted(admission, lease.keys[new], lease.counts[new]) as accepted:
                        new = new[accepted]
                        self._make(lease, new)
                    lines, away = self._ready(lease)
                self._about_to_change(lease, lines, step)
                self._metadata.stamp(lines, step, lease.counts)
                if self.layout.metadata:
                    set_at(self._cache.dirty.view(np.uint8), lines)
                for some, freq, last_step, held in self._stream(lease.keys, away):
                    freq = np.minimum(freq + lease.counts[some], 2**32 - 1)
                    last_step[:] = step
                    self._write_home(lease.keys[some], held.pack(np.arange(len(some))), freq, last_step)
                return len(new)

    def _make(self, lease: Lease, new: Int64s) -> None:
        """Rows for the lease's keys at positions `new`; those that find no line go home at once."""
        self._make_room(len(new))
        keys = lease.keys[new]
        if self._point is not None:
            self._set_aside(self._point, keys, None)
        self._home.add(keys)
        try:
            for part in _parts(len(new), self._scratch_lines):
                some = keys[part]
                n = self._free(len(some))
                values = self.layout.new_lines(some)
                lines = self._insert(some[:n])
                self._lines.scatter(lines, values[:n])
                self._metadata.clear(lines)
                self._cache.dirty[lines] = True
                lease.slots[new[part][:n]] = lines
                if n < len(some):
                    zeros = np.zeros(len(some) - n, np.int64)
                    self._home_lines(some[n:], values[n:], zeros, zeros)
                    lease.slots[new[part][n:]] = AWAY
        except BaseException as e:
            self._erase(keys, self._home.drop if isinstance(e, UNFIT) else self._home.erase)
            raise

    def _stream(self, keys: Int64s, away: Int64s) -> Iterator[tuple[Int64s, Int64s, Int64s, Slabs]]:
        """Parts of positions `away` with frequencies, last steps and, in the scratch from 0 on, the lines."""
        self._n_streamed += len(away)
        for part in _parts(len(away), self._scratch_lines):
            some = away[part]
            lines, freq, last_step = self._home.read(keys[some])
            self._scratch.reserve(len(some))
            self._scratch.unpack(np.arange(len(some)), lines)
            yield some, freq.astype(np.int64), last_step.astype(np.int64), self._scratch

    def _gather(self, lines: Int64s, away: Int64s, keys: Int64s, out: Float32s) -> None:
        self._lines.gather(lines, out)
        for some, _, _, held in self._stream(keys, away):
            rows = np.empty((len(some), out.shape[1]), np.float32)
            held.gather(np.arange(len(some)), rows)
            out[some] = rows

    def gather(self, lease: Lease, out: Float32s, index: Int64s | None = None) -> None:
        """Copy rows (or whole lines, as wide as `out`) to ``out[u, dim]``, or those of the keys number `index`; zeros
        where a key is absent."""
        with self._open():
            lines, away = self._ready(lease)
            if len(away) == 0:
                self._lines.gather(lines, out, index)
                return
            rows = out if index is None else retained((len(lines), out.shape[1]))
            self._gather(lines, away, lease.keys, rows)
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
        with self._open():
            lines, away = self._ready(lease)
            if len(away) == 0:
                self._lines.pool(lines, index, splits, out, weight, row_scale)
                return
            rows = retained((len(lines), out.shape[1]))
            self._gather(lines, away, lease.keys, rows)
        pool(rows, index, splits, out, weight, row_scale)

    def apply(
        self, lease: Lease, grads: Float32s | Gradients, rule: Rule, hyper: Float32s, step: int, skip: bool = False
    ) -> int:
        """One optimizer step in place; how many of the keys were absent and ignored."""
        bad, seed = "skip" if skip else "apply", self.layout.seed
        with self._open():
            lines, away = self._ready(lease)
            with self._change():
                self._about_to_change(lease, lines, step)
                self._n_skipped += self._lines.apply(rule.code, lines, grads, hyper, lease.keys, seed, step, bad)
                set_at(self._cache.dirty.view(np.uint8), lines)
                n_absent = self._metadata.stamp(lines, step) - len(away)
                if len(away):
                    sums = grads.sum() if isinstance(grads, Gradients) else grads
                    for some, freq, last_step, held in self._stream(lease.keys, away):
                        keys, at = lease.keys[some], np.arange(len(some))
                        self._n_skipped += held.apply(rule.code, at, sums[some], hyper, keys, seed, step, bad)
                        last_step[:] = step
                        self._write_home(keys, held.pack(at), freq, last_step)
                ignored = n_absent - (lease.padding >= 0)
                self._n_ignored += ignored
                return ignored

    def release(self, lease: Lease) -> None:
        """Unpin the lease's rows. Idempotent."""
        assert isinstance(lease, TierLease)
        with self._lock:
            if lease.fetched and lease.abandoned is not None and not self._closed:
                self._unpin(lease.slots)
            lease.abandoned = None
            self._leases.discard(lease)
            if lease.batch is not None and not self._closed:
                use = self._window.release(lease.batch)
                lines = lease.slots if lease.fetched else self._cache.find(lease.keys)
                near = _near(lines)
                self._cache.next_use[lines[near]] = use[near]
                lease.batch = None
            lease.fetched = True

    def read(self, lease: Lease, at: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Whole lines and metadata of the lease's keys number `at`, all of which have rows."""
        check_lines(self.layout, lines, at, freq, last_step)
        with self._open():
            near, _ = self._ready(lease)
            keys, near = lease.keys[at], near[at]
            check_rows(self.layout, lease.slots[at])
            self._lines.read(near, lines)
            freq[:], last_step[:] = self._metadata_of(keys, near)
            for some, _, _, held in self._stream(keys, np.flatnonzero(near < 0)):
                rows = np.empty((len(some), self.layout.width), np.float32)
                held.read(np.arange(len(some)), rows)
                lines[some] = rows

    def write(self, keys: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Take back lines and metadata of distinct rows that a tier above had; those that are not near go straight
        home."""
        check_lines(self.layout, lines, keys, freq, last_step)
        with self._open():
            self.changes.note_stamped(keys, len(self._home), last_step)  # before: some may be written when it fails
            self._write(keys, lines, freq, last_step)

    def _write(self, keys: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Lines of distinct rows, new or in place of what there was."""
        freq, last_step = np.clip(freq, 0, 2**32 - 1), np.clip(last_step, 0, 2**32 - 1)
        self._make_room(int(np.count_nonzero(~self._home.find(keys))))
        slots = self._find(keys)
        if self._point is not None:
            old = self._home.find(keys)
            self._set_aside(self._point, keys[old], slots[old])
            self._set_aside(self._point, keys[~old], None)
        self._version += 1
        away = np.flatnonzero(slots < 0)
        for part in _parts(len(away), self._scratch_lines):
            some = away[part]
            self._home_lines(keys[some], lines[some], freq[some], last_step[some])
        self._lines.write(slots, lines)
        self._metadata.put(slots, freq, last_step)
        set_at(self._cache.dirty.view(np.uint8), slots)

    def _home_lines(self, keys: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Write whole lines home, no more of them than the scratch holds."""
        at = np.arange(len(keys))
        self._scratch.reserve(len(at))
        self._scratch.scatter(at, lines)
        self._write_home(keys, self._scratch.pack(at), freq, last_step)

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        with self._open(), self._change():
            keys = np.ascontiguousarray(keys)
            if self._point is None and not self.changes.any:
                return self._erase(keys, self._home.erase)
            lines = self._find(keys)
            slots = np.where(self._home.find(keys), 0, -1)
            if self._point is not None:
                self._set_aside(self._point, keys, lines, slots)
            n = self._erase(keys, self._home.erase)
            self.changes.note(keys, len(self._home), slots)
            return n

    def _erase(self, keys: Int64s, at_home: Callable[[Int64s], int]) -> int:
        lines = self._find(keys)
        lines = np.unique(lines[lines >= 0])
        self._lost(lines, -1)
        self._cache.remove(lines)
        return at_home(keys)

    def has(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each key has a row: bool[n]."""
        with self._open():
            return self._home.find(keys)

    def metadata(self, keys: Int64s) -> tuple[Int64s, Int64s]:
        """Frequency and last step of each key, all of which have rows."""
        with self._open():
            return self._metadata_of(keys, self._find(keys))

    def _metadata_of(self, keys: Int64s, lines: Int64s) -> tuple[Int64s, Int64s]:
        freq, last_step = np.zeros(len(keys), np.int64), np.full(len(keys), self.latest_step(), np.int64)
        if self.layout.metadata:
            near = lines >= 0
            freq[near], last_step[near] = self._metadata.get(lines[near])
            freq[~near], last_step[~near] = self._home.metadata(keys[~near])
        return freq, last_step

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order.

        A row changed or erased meanwhile is read as it is then.
        """
        with self._open():
            return self._chunks(self._home.in_order(), lines=True, since=since)

    def part(self, part: Part, rows: bool = True) -> Iterator[Chunk]:
        """Lines of the keys of `part`, in the order of their mix; without `rows`, row and state are [n, 0]."""
        with self._open():
            return self._chunks(iter([self._home.keys(part)]), lines=rows)

    def _chunks(self, pieces: Iterator[Int64s], lines: bool, since: int | None = None) -> Iterator[Chunk]:
        for keys in pieces:
            for part in _parts(len(keys), CHUNK_ROWS):
                with self._open():
                    chunk = self._chunk(keys[part], lines, since)
                if len(chunk.key):
                    yield chunk

    def _chunk(self, keys: Int64s, lines: bool, since: int | None) -> Chunk:
        slots = self._find(keys)
        held = (slots >= 0) | self._home.find(keys)
        keys, slots = keys[held], slots[held]
        freq, last_step = self._metadata_of(keys, slots)
        if since is not None:
            new = last_step > since
            keys, slots, freq, last_step = keys[new], slots[new], freq[new], last_step[new]
        out = np.empty((len(keys), self.layout.width if lines else 0), np.float32)
        if lines:
            self._gather(slots, np.flatnonzero(slots < 0), keys, out)
        return Chunk(keys, freq, last_step, out[:, : self.layout.dim], out[:, self.layout.dim :])

    def put(self, chunk: Chunk) -> None:
        """Insert or overwrite lines; those that are not near go straight home."""
        n_state = self.layout.width - self.layout.dim
        if chunk.row.shape[1] != self.layout.dim or chunk.state.shape[1] != n_state:
            raise SchemaMismatch(
                f"lines of {chunk.row.shape[1]} + {chunk.state.shape[1]} floats do not fit "
                f"{self.layout.dim} + {n_state}",
                table=self.layout.table,
                remedy="give the table the dim and optimizer that the lines were written with",
            )
        all_keys, freq, last_step = (np.ascontiguousarray(column, np.int64) for column in chunk[:3])
        with self._open(), self._change():
            for part in _parts(len(all_keys), self._scratch_lines):
                keys = all_keys[part]
                lines = np.concatenate([chunk.row[part], chunk.state[part]], axis=1, dtype=np.float32)
                self._write(keys, lines, freq[part], last_step[part])
                self.changes.note(keys, len(self._home))

    # --- points -----------------------------------------------------------------------------------------------

    def point(self, base: str | None = None, keep: Callable[[], Any] | None = None, spill: Path | None = None) -> Point:
        """Take a point; see `Store.point`. The pause grows with the keys erased since `base` alone."""
        self._pointing.acquire()
        try:
            with self._open():
                since = self.changes.since(base) if base is not None else None
                erased = None if since is None else since.keys[~self._home.find(since.keys)]
                latest = self.latest_step()
                kept = keep() if keep is not None else None
                mark = self.changes.mark(latest)
                self._point = point = _TierPoint(self, len(self._home), latest, erased, mark, kept, spill)
                point.since, point.touched, point.passed = since, Index(), None
                return point
        except BaseException:
            self._pointing.release()
            raise

    def _about_to_change(self, lease: Lease, lines: Int64s, step: int) -> None:
        """The rows of a lease, at `lines` where they are near, are; they are or have been stamped with `step`."""
        if self._point is not None:
            self._set_aside(self._point, lease.keys, lines, lease.slots)
        if not self.changes.tells(step):
            self.changes.note(lease.keys, len(self._home), lease.slots)

    def _set_aside(self, point: _TierPoint, keys: Int64s, lines: Int64s | None, slots: Int64s | None = None) -> None:
        """Set aside the lines of rows that are about to change, those that the point still needs. Never fails.

        `lines` are those of rows that are near, below 0 for others; None for keys that have no row. With `slots`, only
        keys whose slot is not below 0.
        """
        try:
            if slots is not None and lines is not None:
                keys, lines = keys[slots >= 0], lines[slots >= 0]
            some = np.arange(len(keys)) if point.passed is None else np.flatnonzero(keys > point.passed)
            some = some[point.touched.find_or_insert(keys[some])[1]]
            if lines is None:
                return
            for part in _parts(len(some), self._scratch_lines):
                at = some[part]
                at = at[point.has(keys[at], self._metadata_of(keys[at], lines[at])[1])]
                point.aside.add(keys[at], *self._rows(keys[at], lines[at]))
        except Exception as e:
            point.fail(e)

    def _rows(self, keys: Int64s, lines: Int64s) -> tuple[Int64s, Int64s, Float32s]:
        """Frequency, last step and whole line of rows."""
        out = np.empty((len(keys), self.layout.width), np.float32)
        self._gather(lines, np.flatnonzero(lines < 0), keys, out)
        return *self._metadata_of(keys, lines), out

    def point_keys(self, point: _TierPoint) -> Iterator[Int64s]:
        """Keys in order, among them all of the point's."""
        for piece in self._home.in_order() if point.since is None else self._changed(point.since):
            if len(piece):
                apart = point.aside.keys()  # after the piece: what is erased meanwhile is in one of them
                yield np.union1d(piece, apart[(apart <= piece[-1]) & point.ahead(apart)])
        apart = point.aside.keys()
        yield np.sort(apart[point.ahead(apart)])

    def _changed(self, since: Since) -> Iterator[Int64s]:
        """Keys of rows that are stamped so now, or noted: ascending, in one piece."""
        found, n = [since.keys], max(1, len(self._home) // CHUNK_ROWS)
        for i in range(n):
            keys = self._home.keys(Part.share(i, n))
            for part in _parts(len(keys), CHUNK_ROWS):
                with self._open():
                    some = keys[part]
                    lines = self._find(some)
                    held = (lines >= 0) | self._home.find(some)
                    some, lines = some[held], lines[held]
                    found.append(some[self._metadata_of(some, lines)[1] > since.step])
        yield np.unique(np.concatenate(found))

    def point_rows(self, point: _TierPoint, keys: Int64s) -> InPlace:
        """Those that nothing was about to change until they were read; the lock is let go while the home reads."""
        out = np.zeros((len(keys), self.layout.width), np.float32)
        freq, last_step = np.zeros((2, len(keys)), np.int64)
        with self._open():
            while True:
                lines = self._find(keys)
                there = (point.touched.find(keys) < 0) & self._home.find(keys)
                near, away = np.flatnonzero(there & (lines >= 0)), np.flatnonzero(there & (lines < 0))
                rows = np.empty((len(near), self.layout.width), np.float32)
                self._lines.gather(lines[near], rows)
                out[near] = rows
                freq[near], last_step[near] = self._metadata.get(lines[near])
                if len(away) == 0:
                    break
                self._lock.release()
                try:
                    got = self._home.read(keys[away])
                except Exception:
                    got = None
                finally:
                    self._lock.acquire()
                self._check_open()
                untouched = point.touched.find(keys[away]) < 0
                if got is None and untouched.all():
                    got = self._home.read(keys[away])  # nothing has been erased: raises again
                if got is not None:
                    at, scratch = away[untouched], np.arange(int(untouched.sum()))
                    for part in _parts(len(at), self._scratch_lines):
                        self._scratch.reserve(len(at[part]))
                        self._scratch.unpack(scratch[: len(at[part])], got[0][untouched][part])
                        rows = np.empty((len(at[part]), self.layout.width), np.float32)
                        self._scratch.gather(scratch[: len(at[part])], rows)
                        out[at[part]] = rows
                    freq[at], last_step[at] = got[1][untouched], got[2][untouched]
                    there[away[~untouched]] = False
                    there[near] = point.touched.find(keys[near]) < 0
                    break
            point.passed = int(keys[-1])
            point.touched.erase(keys)
        return InPlace(there, freq, last_step, out)

    def point_ended(self, point: _TierPoint) -> None:
        """Let the next one be taken."""
        self._point = None
        self._pointing.release()

    def commit(self, keep: Mapping[str, npt.NDArray[Any]] | None = None) -> str:
        """Make everything up to now durable, and the columns of `keep` beside it; its id.

        Raises
        ------
        StorageError
            The disk is full or failed, now or in an earlier update; the last commit stays. A commit that met a full
            disk may be tried again.
        """
        with self._open():
            if self._failed is not None:
                raise StorageError(
                    "an update was written only in part and cannot be committed",
                    table=self.layout.table,
                    remedy="open the table again: it begins at its last commit",
                ) from self._failed
            self._write_back(np.flatnonzero(self._cache.dirty))
            return self._home.commit(keep or {}, self.latest_step())

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """What the last commit that was opened was given to keep."""
        return self._home.kept()

    def latest_step(self) -> int:
        """Largest step that a row was stamped with, 0 for none."""
        return max(self._metadata.latest, self._home.latest_step())

    def stats(self) -> dict[str, Any]:
        """What the tier holds and has done.

        Rows; bytes held (of the home; ``cache_nbytes``: to know which lines are whose; ``window_nbytes``: of
        batches announced); hits and misses of `fetch`; of the rows that steps asked for,
        ``ready_rows`` were near when the batch was waited for and ``late_rows`` were not; ``waited_s`` seconds; rows
        that streamed past the cache; keys ignored.
        """
        with self._open():
            asked = self._n_hits + self._n_misses
            return {
                "tier": self.tier,
                "rows": len(self._home),
                "index_nbytes": self._home.nbytes,
                "lines_nbytes": self._lines.nbytes,
                "metadata_nbytes": 0,
                "cache_nbytes": self._metadata.nbytes + self._cache.nbytes + self._arriving.nbytes,
                "window_nbytes": self._window.nbytes,
                "cache_lines": self._limit,
                "hits": self._n_hits,
                "misses": self._n_misses,
                "hit_rate": self._n_hits / asked if asked else 0.0,
                "ready_rows": self._n_ready,
                "late_rows": self._n_late,
                "waited_s": self._waited,
                "evictions": self._n_evictions,
                "streamed_rows": self._n_streamed,
                "ignored_updates": self._n_ignored,
                "skipped_updates": self._n_skipped,
                **self._home.stats(),
            }

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        with self._open():
            self._home.validate()
            cache = self._cache
            cache.validate()
            self._unpin_abandoned()
            keys = cache.key[cache.held()]
            assert self._home.find(keys).all(), "a line's row is gone"
            lines = cache.find(keys)
            pins = np.zeros(cache.n_lines, np.int64)
            for lease in list(self._leases):
                slots = lease.slots[_near(lease.slots)]
                pins[slots] += 1
                assert np.array_equal(cache.key[slots], lease.keys[_near(lease.slots)]), "a lease has another's line"
            assert np.array_equal(pins[lines], cache.pins[lines]), "pins are miscounted"

    def close(self) -> None:
        """Let go of memory, files and locks; what was not committed is discarded. Idempotent."""
        with self._lock:
            if not self._closed:
                if self._point is not None:
                    remedy = "wait for what reads it first"
                    self._point.fail(Closed("the store was closed", table=self.layout.table, remedy=remedy))
                while self._arriving.any():
                    self._arrived.wait()
                self._closed = True
                del self._cache, self._lines
                self._home.close()


class _TierPoint(Point):
    """A point of rows some of which are near."""

    since: Since | None  # what belongs to it, of the rows that there were; all of them
    touched: Index  # keys beyond `passed` whose rows have changed, or were made
    passed: int | None  # up to where keys were read

    def has(self, keys: Int64s, last_step: Int64s) -> npt.NDArray[np.bool_]:
        """Whether rows, as they were, belong to it: bool[n]."""
        if self.since is None:
            return np.ones(len(keys), np.bool_)
        noted = np.minimum(np.searchsorted(self.since.keys, keys), len(self.since.keys) - 1)
        mine = last_step > self.since.step
        return mine | (self.since.keys[noted] == keys) if len(self.since.keys) else mine

    def ahead(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether keys are still to be read: bool[n]."""
        return np.ones(len(keys), np.bool_) if self.passed is None else keys > self.passed


_NONE = np.zeros(0, np.int64)
