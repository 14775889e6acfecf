"""The device tier: some rows of another store in device memory, with the index, scores, pins and dirty bits there too.

The host sees only keys that miss. A batch whose rows are all resident is deduped, found, pinned, gathered, updated and
let go by a few launches, and the host waits twice: for how many keys are distinct, and for how many are not there.

**Where a row is.** A key has at most one line in device memory. While it has one, that one alone is current: the store
below may have an older row, or none yet. What changed is written below when the line makes way, and by `_flush` before
anything is asked of all rows (a scan, a point, a commit): then the store below answers, and snapshots and deltas are
its own. A row that finds no line, all of its bucket being pinned and the side list full, is *away*: the store below
gathers, counts and updates it, by the C kernels, to the same bits. So no result depends on the budget.

**Locks.** `_lock` guards what is in device memory and orders the launches. Whoever holds it sees each line whole.
`_moving` is held by what changes where rows are: lines that come and victims that go, rows made, erased, put or updated
below, write-backs. So while it is held nothing changes in the store below but by its holder, and between looking for a
key there and giving it a line nothing can become stale. It is taken before `_lock`, and kept while the store below
reads and writes, when `_lock` is not: steps whose rows are resident go on meanwhile. Fetching takes it anew for every
part of `batch_lines` lines, and it is given in the order of asking: a step that needs it, for a new row or one that is
away, waits for one part at the most.

A line is in host memory before its key gets a slot, and is on its way into it (on the stream that all launches share)
before `_lock` is let go: nobody finds a slot whose line has not come. A victim's line is in host memory before `_lock`
is let go, and below before `_moving` is: nobody looks for it there too early. If the store below refuses it, it gets
its line back and the newcomers go.

**Leases.** A lease pins its lines until it is released, or is forgotten: then `__del__` leaves them in `_abandoned`,
from where they are unpinned by whoever comes next. What it knows of keys without a line (absent, or away) holds as
long as the store's `_version`, which counts rows made, put and erased; keys that are away are looked for anew at every
use. A key that is erased, or put, is taken from all leases at once.

**Failures.** What fails before a change leaves everything as it was. A change that was cut in the middle (`_change`)
leaves a store that still reads and refuses to commit.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import absent, find_key, finite_rows
from hbkit._ext.segment import Gradients, expand, pool, retained
from hbkit.cuda.parts import FOUND, MOST_SOON, MOST_STAMP, Parts, Placement, Room, open_parts
from hbkit.errors import BudgetExceeded, Closed, DeviceUnavailable, InvalidArgument, StorageError
from hbkit.store.base import (
    Chunk,
    Filter,
    Float32s,
    Int64s,
    Layout,
    Lease,
    Part,
    Rule,
    Store,
    StoreSpec,
    admitted,
    check_lines,
    check_rows,
)
from hbkit.store.cache import as_nbytes
from hbkit.store.locks import Turns
from hbkit.store.point import Point
from hbkit.store.tier import AWAY, UNFIT

BUFFER_NBYTES = 2**24  # of a buffer of lines on their way
BUCKET = 32  # slots of the index that may hold a key
SIDE_LINES = 1024  # of the side list at the most; there is one for every bucket up to that
AGEING = 10  # uses a line after which all scores of "lfu" are halved
ROUNDS = 4  # write-backs before a point or commit that do not hold up steps
POLICIES = ("lfu", "lru")
log = logging.getLogger("hbkit.store")


class Summands(NamedTuple):
    """Gradients that `DeviceStore.apply` sums: ``scale[p] * values[rows[p]]`` for the key of position p of the batch.

    Each array is in host or device memory.

    Attributes
    ----------
    values : float32[m, dim]
    rows : int64[n], optional
        Position p takes ``values[p]`` when left out.
    scale : float32[n], optional
        All 1 when left out.
    """

    values: Any
    rows: Any = None
    scale: Any = None


@dataclass(frozen=True)
class DeviceCached:
    """Rows in device memory above another store; see `device_cached`."""

    below: StoreSpec
    cache_budget: int
    device: str
    policy: str
    allocate: Callable[[int], Any] | None = None

    def open(self, layout: Layout) -> Store:
        """A store for one table of this layout."""
        try:  # before the store below: without a device nothing is touched
            parts = open_parts("cuda:0" if self.device == "auto" else self.device, self.allocate)
        except DeviceUnavailable as e:
            if self.device != "auto":
                raise
            _say_once(f"rows stay in the store below the device tier: {e}")
            return self.below.open(layout)
        return DeviceStore(layout, self.below, self.cache_budget, parts, self.policy)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def device_cached(
    below: StoreSpec,
    cache_budget: int | str = "8GiB",
    device: str = "cuda:0",
    policy: str = "lfu",
    allocate: Callable[[int], Any] | None = None,
) -> DeviceCached:
    """A place for tables in GPU memory, over host memory or SSD.

    Where a store's `gather` and `apply` are given arrays in device memory (anything with ``__cuda_array_interface__``,
    such as PyTorch's CUDA tensors), rows and gradients stay there.

    Parameters
    ----------
    below : StoreSpec
        Where rows live that are not resident, such as `host_memory()` or `cached_ssd(path)`.
    cache_budget : int or str
        Bytes of device memory ("8GiB") for each table: lines, index and buffers. Batches that are announced are beside
        it (``stats()["window_nbytes"]``).
    device : str
        "cuda" or "cuda:N"; "auto": the first one, and where there is none, rows stay in the store below, which is
        logged once; or "cpu": the same tier in host memory, to try it, or to test without a GPU.
    policy : "lfu" or "lru"
        Which rows stay: those used most often, of which old uses count less and less, or last. No result depends on it.
    allocate : callable, optional
        ``allocate(nbytes)`` gives device memory, so that rows come out of a framework's own pool; see the example.

    Raises
    ------
    DeviceUnavailable
        On opening: Numba CUDA is not installed, or there is no such device or driver.

    Examples
    --------
    >>> Table("user", dim=16, store=device_cached(host_memory(), cache_budget="4GiB"))

    In memory of PyTorch's caching allocator:

    >>> device_cached(host_memory(), "4GiB", allocate=lambda n: torch.empty(n, dtype=torch.uint8, device="cuda"))
    """
    if policy not in POLICIES:
        raise InvalidArgument(f"policy {policy!r} on a device", remedy=f"use one of {', '.join(POLICIES)}")
    return DeviceCached(below, as_nbytes(cache_budget), device, policy, allocate)


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

    def __init__(self, store: DeviceStore, n_keys: int, far_keys: Any, far_counts: Any, skip: int | None) -> None:
        self.n_keys = n_keys
        self.mutex = threading.Lock()  # held while its rows are fetched
        self.far_keys, self.far_counts = far_keys, far_counts
        self.skip = skip  # the padding key
        self.near_keys: Int64s | None = None
        self.near_counts: Int64s | None = None
        self.far: Any = None  # lines in device memory, -1 where there is none
        self.near: Int64s | None = None  # the same in host memory, `AWAY` where the row is below; must be, if any is -1
        self.room: Room | None = None
        self.n = 0  # positions of the batch
        self.ordered = False  # whether the room's order is that of the batch
        self.batch: int | None = None  # its number among the announced that are not fetched
        self.seen = -1  # the store's version when the keys without a line were looked for
        self.n_absent = self.n_away = 0
        self.fetched = self.released = self.asked = False
        self.n_brought, self.done, self.tried = 0, 0.0, -1
        self.store = store
        self._padding: int | None = None if skip is not None else -1
        self._ended = False

    def __del__(self) -> None:
        if not self._ended:
            self.store._abandoned.append(self.hold())

    def hold(self) -> tuple[Any, Any, Room | None, int | None, int]:
        """What it has of the store, which ends with that: lines, keys, room, number, bytes."""
        self._ended = True
        lines = None
        if self.fetched:
            lines = self.far if self.near is None else near_lines(self.near)
        return lines, self.far_keys, self.room, self.batch, self.nbytes

    @property
    def nbytes(self) -> int:
        """Device memory that is its own."""
        return 0 if self.room is not None else 24 * self.n_keys

    @property  # type: ignore[override]  # a copy that is made when it is asked for
    def keys(self) -> Int64s:
        if self.near_keys is None:
            with self.store._lock:
                self.store._know(self)
        assert self.near_keys is not None
        return self.near_keys

    @property  # type: ignore[override]  # as `keys`
    def counts(self) -> Int64s:
        if self.near_counts is None:
            with self.store._lock:
                self.store._know(self)
        assert self.near_counts is not None
        return self.near_counts

    @property  # type: ignore[override]  # as `keys`
    def slots(self) -> Int64s:
        if self.near is not None:
            return self.near
        slots = np.zeros(self.n_keys, np.int64)
        if self.padding >= 0:
            slots[self.padding] = -1
        return slots

    @property  # type: ignore[override]  # as `keys`
    def padding(self) -> int:
        if self._padding is None:
            self._padding = find_key(self.keys, self.skip)
        return self._padding


def near_lines(slots: Int64s) -> Int64s:
    """Lines of a lease's slots, -1 where the row is away."""
    return np.where(slots < AWAY, slots, -1)


class DeviceStore:
    """One table in device memory over another store; see the page's beginning.

    Parameters
    ----------
    layout : Layout
    below : StoreSpec
    cache_budget : int
        Bytes of device memory.
    parts : Parts
        The opened device, see `hbkit.cuda.parts.open_parts`.
    policy : "lfu" or "lru"

    Attributes
    ----------
    device : str
        "cuda:N", or "cpu".
    memory : hbkit.cuda.device.Device, or its twin in host memory
    below : Store

    Notes
    -----
    An array that is given or asked for is in host memory if it is NumPy's, else in device memory.
    """

    on_device = True

    def __init__(self, layout: Layout, below: StoreSpec, cache_budget: int, parts: Parts, policy: str) -> None:
        self.layout, self._parts, self._by_use = layout, parts, policy == "lfu"
        self.memory = parts.device
        self.device = self.memory.name if self.memory.name != "cuda" else "cuda:0"
        n_slots, n_side, self._batch_lines = _fit(parts, layout, cache_budget)
        self._index = parts.index(self.memory, n_slots, self._batch_lines, n_side, layout.metadata)
        sizes = n_slots + n_side, layout.width, self._batch_lines, layout.dim, layout.dtype
        self._lines = parts.lines(self.memory, *sizes)
        self._buffer_nbytes = parts.lines.nbytes_of(*sizes) - self._lines.nbytes
        self._n_lines = n_slots + n_side
        self._lock, self._moving = threading.Lock(), Turns()
        self._pointing = threading.Lock()  # held while there is a point
        self._leases: weakref.WeakSet[DeviceLease] = weakref.WeakSet()  # that pin lines
        self._abandoned: deque[tuple[Any, Any, Room | None, int | None, int]] = deque()
        self._announced: dict[int, Any] = {}  # keys of batches that are announced and not fetched, the soonest first
        self._rooms: list[Room] = []  # that are free
        self._dedupe: Any = None
        self._order: Any = None
        self._room_ids = 0  # positions that rooms have at the least
        self._window_nbytes = 0
        self._version = 0  # counts rows made, put, erased
        self._n_batches = self._n_releases = self._n_cleaned = self._n_uses = 0
        self._drained = 0  # releases when the side list was emptied
        self._latest = 0
        self._failed: BaseException | None = None
        self._closed = False
        self._n_hits = self._n_misses = self._n_evictions = self._n_streamed = self._n_ready = self._n_late = 0
        self._n_ignored = self._n_skipped = 0
        self._waited = 0.0
        self.below = below.open(layout)
        self.changes = self.below.changes
        self._n_rows = len(self.below)

    def __len__(self) -> int:
        return self._n_rows

    # --- locks and failures -----------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            yield

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let others have the lock meanwhile."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the store is closed", table=self.layout.table, remedy="open the table again")

    @contextmanager
    def _change(self, kinds: tuple[type[BaseException], ...] = UNFIT) -> Iterator[None]:
        """A change that leaves the store unfit to commit if it fails half-way."""
        try:
            yield
        except kinds as e:
            self._failed = e
            raise

    # --- leases -----------------------------------------------------------------------------------------------

    def reserve(self, keys: Int64s, counts: Int64s, padding: int = -1, ahead: bool = False) -> DeviceLease:
        """Announce a batch's distinct keys; `ahead` of others that were, so that the cache may reckon with it."""
        with self._open():
            self._let_go()
            send = self.memory.send
            skip = int(keys[padding]) if padding >= 0 else None
            lease = DeviceLease(self, len(keys), send(keys), send(counts), skip)
            lease.near_keys, lease.near_counts, lease._padding = keys, counts, padding
            return self._announce(lease, ahead)

    def reserve_batch(self, keys: Any, padding_key: int | None = None, ahead: bool = False) -> DeviceLease:
        """Announce a batch by its keys as they come, int64[n] in host or device memory: they are deduped on the device.

        The lease's `inverse` says which of the distinct keys each is; `padding_key` as ``keys[padding]`` of `reserve`.
        """
        n = int(keys.shape[0])
        with self._open():
            self._let_go()
            room = self._room(n)
            try:
                found = self._dedupe(keys, room)
            except BaseException:
                self._rooms.append(room)
                raise
            lease = DeviceLease(self, found.n_distinct, found.keys, found.counts, padding_key)
            lease.room, lease.inverse, lease.n = room, found.inverse, n
            return self._announce(lease, ahead)

    def _announce(self, lease: DeviceLease, ahead: bool) -> DeviceLease:
        self._window_nbytes += lease.nbytes
        if ahead:
            lease.batch = self._n_batches
            self._announced[lease.batch] = lease.far_keys
        self._n_batches += 1
        return lease

    def _room(self, n: int) -> Room:
        """A room for a batch of n positions, and what fills it."""
        if n > self._room_ids or self._dedupe is None:
            self._room_ids = n + n // 8 + 32
            self._window_nbytes -= sum(room.nbytes for room in self._rooms)
            self._rooms.clear()
            self._dedupe, self._order = (make(self.memory, self._room_ids) for make in self._parts[3:])
        if not self._rooms:
            self._rooms.append(Room(self.memory, self._room_ids))
            self._window_nbytes += self._rooms[0].nbytes
        return self._rooms.pop()

    def _know(self, lease: DeviceLease) -> None:
        """Have the lease's keys and counts in host memory."""
        if lease.near_keys is None:
            lease.near_keys = self.memory.fetch(lease.far_keys)
        if lease.near_counts is None:
            lease.near_counts = self.memory.fetch(lease.far_counts)

    def _let_go(self) -> None:
        """Unpin what forgotten leases had."""
        while self._abandoned:
            self._end(*self._abandoned.popleft())

    def _end(self, lines: Any, keys: Any, room: Room | None, batch: int | None, nbytes: int) -> None:
        self._n_releases += 1
        self._window_nbytes -= nbytes
        if lines is not None:
            self._index.settle(lines)
        if batch is not None and self._announced.pop(batch, None) is not None:
            self._index.mark(keys, 0)
        if room is not None and room.max_ids == self._room_ids:
            self._rooms.append(room)
        elif room is not None:
            self._window_nbytes -= room.nbytes

    def release(self, lease: Lease) -> None:
        """Unpin the lease's rows. Idempotent."""
        assert isinstance(lease, DeviceLease)
        lease.released = True  # whoever fetches it stops
        with lease.mutex, self._lock:
            if not lease._ended:
                held = lease.hold()
                self._leases.discard(lease)
                if not self._closed:
                    self._end(*held)
                lease.fetched, lease.room = True, None

    # --- rows come --------------------------------------------------------------------------------------------

    def fetch(self, lease: Lease) -> None:
        """Give each of the lease's rows a line and pin it, as far as there is room."""
        assert isinstance(lease, DeviceLease)
        with lease.mutex:
            if lease.fetched:
                return
            with self._open():
                self._hold(lease)
                seen = self._version
            if lease.n_absent:
                lease.n_brought = self._bring(lease, absent(lease.near, lease.padding))
                lease.done = time.monotonic()
            lease.seen = seen  # what was made since may be among the absent ones

    def _hold(self, lease: DeviceLease) -> None:
        """Pin what is resident of a lease; the others count as absent, until they are looked for below."""
        self._let_go()
        self._leases.add(lease)
        if lease.batch is not None:
            self._announced.pop(lease.batch, None)
        slots = None if lease.room is None else lease.room.slots[: lease.n_keys]
        scores, n_missing = self._scores(lease), 0
        if lease.n_keys:
            held = self._index.hold(lease.far_keys, scores, add=self._by_use, skip=lease.skip, slots=slots)
            lease.far, n_missing = held.slots, held.n_missing
        else:
            lease.far = lease.far_keys
        lease.fetched = True
        self._n_hits += lease.n_keys - n_missing
        self._n_uses += lease.n_keys
        if self._by_use and self._n_uses > AGEING * self._n_lines:
            self._n_uses = 0
            self._index.age()
        if n_missing:
            self._know(lease)
            lease.near = self.memory.fetch(lease.far)
            if lease._padding is None:
                lease._padding = find_key(lease.near_keys, lease.skip)
            lease.n_absent = n_missing
        if lease.n_keys and lease._padding is not None and lease._padding >= 0:
            self._n_hits -= 1

    def _scores(self, lease: DeviceLease, some: Int64s | None = None) -> Any:
        """What the uses of a lease's keys are worth."""
        if not self._by_use:
            return np.array([self._n_batches])
        return lease.far_counts if some is None or lease.near_counts is None else lease.near_counts[some]

    def _bring(self, lease: DeviceLease, wanted: Int64s) -> int:
        """Look below for the lease's keys number `wanted`, and give lines to their rows; how many rows there are.

        The lease's mutex is held.
        """
        found, lease.tried = 0, self._n_releases
        for first in range(0, len(wanted), self._batch_lines):
            with self._moving:
                if lease.released:
                    return found
                found += self._bring_part(lease, wanted[first : first + self._batch_lines])
        return found

    def _bring_part(self, lease: DeviceLease, some: Int64s) -> int:
        assert lease.near_keys is not None and lease.near is not None
        keys = lease.near_keys[some]
        with self._open():
            self._make_room()  # before rows are read: a key that is here may make way, with a newer row than is below
        with self._leased(keys) as held:
            self.below.fetch(held)
            at = np.flatnonzero(held.slots >= 0)
            n = len(at)
            if n == 0:
                return 0
            freq, last_step = np.empty((2, n), np.int64)
            self.below.read(held, at, self._lines.incoming(n), freq, last_step)
        some = some[at]
        with self._open():
            self._n_misses += int(np.count_nonzero(lease.near[some] < 0))
            self._take_in(lease, some, AWAY, (freq, last_step))
        return n

    def _make_room(self) -> None:
        """Before an insertion: the keys of announced batches are to go last, and the side list is emptied."""
        if self._n_evictions:
            for soon, keys in zip(range(MOST_SOON, 0, -1), self._announced.values(), strict=False):
                self._index.mark(keys, soon)
        if self._index.n_side and self._drained != self._n_releases:
            self._drained = self._n_releases
            with self._change((DeviceUnavailable,)):
                old, placed = self._index.drain()
                if placed.n:
                    new = self.memory.fetch(placed.slots)
                    victims = self._take_out(placed)
                    self._lines.move(old[new >= 0], new[new >= 0])
                    self._write_victims(victims, _NONE)

    def _take_in(
        self, lease: DeviceLease, some: Int64s, else_: int, metadata: tuple[Int64s, Int64s] | None = None
    ) -> None:
        """Give the lease's keys number `some`, whose lines are `incoming`, slots as far as there is room; `else_` is
        what the others have instead. `_moving` and the lock are held; that is let go while victims are written."""
        assert lease.near_keys is not None and lease.near is not None
        keys = lease.near_keys[some]
        with self._change((DeviceUnavailable,)):
            placed = self._index.insert(keys, self._scores(lease, some), evict=True, add=self._by_use)
            slots, found = self.memory.fetch(placed.slots), self.memory.fetch(placed.status) == FOUND
            victims = self._take_out(placed)
            new = np.where(found, -1, slots)
            self._lines.land(new)
            if metadata is not None:
                self._index.put_metadata(new, *metadata)
            lease.near[some] = np.where(slots >= 0, slots, else_)
            self._recount(lease)
            self._write_victims(victims, keys[new >= 0])

    def _recount(self, lease: DeviceLease) -> None:
        """A lease's slots have changed."""
        assert lease.near is not None and lease._padding is not None
        lease.far, lease.stamped = None, _NEVER
        lease.n_absent = len(absent(lease.near, lease._padding))
        lease.n_away = int(np.count_nonzero(lease.near == AWAY))

    def _take_out(self, placed: Placement) -> Any:
        """Dirty lines that have lost their slots, in host memory: as `Store.write` takes them."""
        self._n_evictions += placed.n_evicted
        if not placed.n_dirty:
            return None
        victims = self._index.dirty_victims(placed)
        keys, freq, last_step = (self.memory.fetch(a) for a in (victims.keys, victims.freq, victims.last_step))
        return keys, self._lines.leave(victims.slots), freq, last_step

    def _write_victims(self, victims: Any, newcomers: Int64s) -> None:
        """Write lines below that made way; if that fails, they come back in the place of the newcomers."""
        if victims is None:
            return
        try:
            with self._unlocked():
                self.below.write(*victims)
        except BaseException as e:
            keys, lines, freq, last_step = victims
            self._forget(newcomers)
            placed = self._index.insert(keys, np.zeros(1, np.int64))
            slots = self.memory.fetch(placed.slots)
            there = slots >= 0
            self._lines.scatter(slots[there], lines[there])
            self._dirty(slots, freq, last_step)
            self._index.settle(slots)
            if not there.all():  # another one of them took the last place of two buckets
                self._failed = e
                self._n_rows -= int(np.count_nonzero(~self.below.has(keys[~there])))
            raise

    def _dirty(self, slots: Any, freq: Any, last_step: Any) -> None:
        """Lines are not as they are below, and have this metadata."""
        self._index.stamp(slots, 0)
        self._index.put_metadata(slots, freq, last_step)

    def _forget(self, keys: Int64s) -> None:
        """Take lines from distinct keys, whoever holds them. `_moving` and the lock are held."""
        living = list(self._leases)
        self._let_go()
        slots = self._find(keys)
        keys, slots = keys[slots >= 0], slots[slots >= 0]
        self._version += 1
        if len(keys) == 0:
            return
        for lease in living:
            near = self.memory.fetch(lease.far) if lease.near is None else lease.near
            lost = np.flatnonzero(np.isin(near, slots))
            if len(lost):
                self._index.settle(near[lost])
                near[lost] = -1
                self._know(lease)
                if lease._padding is None:
                    lease._padding = find_key(lease.near_keys, lease.skip)
                lease.near = near
                self._recount(lease)
        self._index.erase(keys)

    def _find(self, keys: Int64s) -> Int64s:
        """Slots of keys, in host memory."""
        if len(keys) == 0:
            return keys
        slots: Int64s = self.memory.fetch(self._index.find(keys))
        return slots

    @contextmanager
    def _leased(self, keys: Int64s, counts: Int64s | None = None) -> Iterator[Lease]:
        """A lease of the store below."""
        held = self.below.reserve(keys, np.zeros(len(keys), np.int64) if counts is None else counts)
        try:
            yield held
        finally:
            self.below.release(held)

    # --- a step -----------------------------------------------------------------------------------------------

    def wait(self, lease: Lease, since: float | None = None) -> None:
        """Return once the lease's rows are near, as far as there is room. The step begins; it could have at `since`."""
        assert isinstance(lease, DeviceLease)
        begin = time.monotonic() if since is None else since
        self.fetch(lease)
        with lease.mutex:
            if lease.n_away and lease.tried != self._n_releases:  # pins are gone since
                self._bring(lease, np.flatnonzero(lease.near == AWAY))
        if not lease.asked:
            lease.asked = True
            n_late = max(lease.n_brought if lease.done > begin else 0, lease.n_away)
            padded = lease._padding is not None and lease._padding >= 0
            self._n_late += n_late
            self._n_ready += lease.n_keys - lease.n_absent - padded - n_late
            self._waited += time.monotonic() - begin

    @contextmanager
    def _using(self, lease: Lease, moving: bool = False) -> Iterator[DeviceLease]:
        """A lease whose slots are right, with the lock; with `_moving` where a row is away, or absent and `moving`."""
        assert isinstance(lease, DeviceLease)
        if not lease.asked:
            self.wait(lease)
        with self._open():
            if not lease.n_away and (not lease.n_absent or (not moving and lease.seen == self._version)):
                yield lease
                return
        with self._moving:
            self._look(lease)
            with self._open():
                yield lease

    def _look(self, lease: DeviceLease) -> None:
        """Look again for the lease's keys that have no line. `_moving` is held."""
        if not lease.n_away and lease.seen == self._version:
            return
        with self._open():
            assert lease.near is not None and lease.near_keys is not None and lease._padding is not None
            some = np.flatnonzero((lease.near < 0) | (lease.near == AWAY))
            some = some[some != lease._padding]
            seen, keys = self._version, lease.near_keys[some]
            found = _NONE
            if len(some):
                found = self.memory.fetch(self._index.hold(keys, self._scores(lease, some), add=self._by_use).slots)
            lease.near[some] = found
            self._recount(lease)
        rest = found < 0
        with self._open():
            lease.near[some[rest]] = np.where(self.below.has(keys[rest]), AWAY, -1)
            self._recount(lease)
            lease.seen = seen

    def _far(self, lease: DeviceLease) -> Any:
        """The lease's lines in device memory."""
        if lease.far is None:
            assert lease.near is not None
            lease.far = self.memory.send(near_lines(lease.near))
        return lease.far

    def _near(self, lease: DeviceLease) -> Int64s:
        """The lease's lines in host memory."""
        if lease.near is None:
            lease.near = self.memory.fetch(lease.far)
        return near_lines(lease.near) if lease.n_away else lease.near

    def create(self, lease: Lease, step: int, admission: Filter | None = None) -> int:
        """Make the lease's absent rows that are admitted, count its keys, stamp them with `step`; rows made."""
        with self._using(lease, moving=True) as held, self._change():
            n_new = 0
            if held.n_absent or held.n_away:
                n_new = self._make(held, step, admission)
            self._latest = max(self._latest, min(step, MOST_STAMP))
            if held.n_keys:
                self._index.stamp(self._far(held), step, held.far_counts)
            held.stamped = step, (self._n_cleaned, 0)
            return n_new

    def _make(self, lease: DeviceLease, step: int, admission: Filter | None) -> int:
        """Rows for absent keys that are admitted; those that find no line are made, and counted, below.

        `_moving` and the lock are held.
        """
        assert lease.near is not None and lease.near_keys is not None and lease.near_counts is not None
        new, away = absent(lease.near, lease._padding), np.flatnonzero(lease.near == AWAY)
        keys, counts = lease.near_keys, lease.near_counts
        with admitted(admission if len(new) else None, keys[new], counts[new]) as some:
            new = new[some]
            try:
                for first in range(0, len(new), self._batch_lines):
                    self._make_part(lease, new[first : first + self._batch_lines])
                streamed = np.concatenate([new[lease.near[new] < 0], away])
                if len(streamed):
                    with self._unlocked(), self._leased(keys[streamed], counts[streamed]) as held:
                        self.below.create(held, step)
                    lease.near[streamed] = AWAY
                    self._recount(lease)
                    self._n_streamed += len(streamed)
            except BaseException:
                self._forget(keys[new])
                raise
        if len(new):
            self._n_rows += len(new)
            self._version += 1
        return len(new)

    def _make_part(self, lease: DeviceLease, some: Int64s) -> None:
        assert lease.near_keys is not None
        keys, layout = lease.near_keys[some], self.layout
        self._make_room()
        with self._unlocked():
            lines = self._lines.incoming(len(some))
            lines[:, : layout.dim] = layout.initialize(keys)
            lines[:, layout.dim :] = layout.initial_state
        self._take_in(lease, some, -1)

    def gather(self, lease: Lease, out: Any, index: Any = None) -> None:
        """Copy rows (or whole lines, as wide as `out`) to ``out[u, dim]``, or those of the keys number `index`; zeros
        where a key is absent.

        An `out` in device memory is written there without waiting, ordered with the legacy default stream.
        """
        with self._using(lease) as held:
            if isinstance(out, np.ndarray):
                if index is not None and not isinstance(index, np.ndarray):
                    index = self.memory.fetch(self.memory.array(index))
                if not held.n_away:
                    self._lines.gather(self._near(held), out, index)
                elif index is None:
                    self._rows(held, out)
                else:
                    expand(self._rows(held, retained((held.n_keys, out.shape[1]))), index, out)
            elif out.shape[0]:
                out = self.memory.array(out)
                if not held.n_away:
                    self._lines.gather(self._far(held), out, index)
                elif index is None:
                    self._rows_there(held, out)
                else:
                    rows = self._rows_there(held, self.memory.empty((held.n_keys, out.shape[1]), np.float32))
                    self._lines.gather_from(rows, self.memory.array(index), out)

    def _rows(self, lease: DeviceLease, out: Float32s) -> Float32s:
        """Rows of all of a lease's keys, of which some are away, in host memory."""
        self._lines.gather(self._near(lease), out)
        away, rows = self._rows_away(lease, out.shape[1])
        out[away] = rows
        return out

    def _rows_there(self, lease: DeviceLease, out: Any) -> Any:
        """Rows of all of a lease's keys, of which some are away, in device memory."""
        self._lines.gather(self._far(lease), out)
        self._lines.scatter_into(out, *self._rows_away(lease, out.shape[1]))
        return out

    def _rows_away(self, lease: DeviceLease, width: int) -> tuple[Int64s, Float32s]:
        """Which of a lease's keys are away, and their rows."""
        assert lease.near is not None and lease.near_keys is not None
        away = np.flatnonzero(lease.near == AWAY)
        rows = np.empty((len(away), width), np.float32)
        with self._unlocked(), self._leased(lease.near_keys[away]) as held:
            self.below.gather(held, rows)
        self._n_streamed += len(away)
        return away, rows

    def pool(self, lease: Lease, index: Any, splits: Any, out: Any, weight: Any = None, row_scale: Any = None) -> None:
        """Weighted sums of rows, each read where it lies; an `out` in device memory as for `gather`."""
        memory = self.memory
        with self._using(lease) as held:
            if isinstance(out, np.ndarray):
                index, splits, weight, row_scale = (
                    a if a is None or isinstance(a, np.ndarray) else memory.fetch(memory.array(a))
                    for a in (index, splits, weight, row_scale)
                )
                if held.n_away:
                    pool(self._rows(held, retained((held.n_keys, out.shape[1]))), index, splits, out, weight, row_scale)
                else:
                    self._lines.pool(self._near(held), index, splits, out, weight, row_scale)
            elif out.shape[0]:
                index, splits, out, weight, row_scale = (
                    a if a is None else memory.array(a) for a in (index, splits, out, weight, row_scale)
                )
                if held.n_away:
                    rows = self._rows_there(held, memory.empty((held.n_keys, out.shape[1]), np.float32))
                    self._lines.pool_from(rows, index, splits, out, weight, row_scale)
                else:
                    self._lines.pool(self._far(held), index, splits, out, weight, row_scale)

    def apply(self, lease: Lease, grads: Any, rule: Rule, hyper: Float32s, step: int, skip: bool = False) -> int:
        """One optimizer step in place; how many of the keys were absent and ignored.

        Parameters
        ----------
        grads : float32[u, dim] in host or device memory, `Gradients`, or `Summands` of a lease of `reserve_batch`
            Those in device memory are used there.
        """
        with self._using(lease) as held, self._change():
            if held.n_keys:
                self._n_skipped += self._update(held, grads, rule, hyper, step, skip)
            self._latest = max(self._latest, min(step, MOST_STAMP))
            if held.n_keys and held.stamped != (step, (self._n_cleaned, 0)):
                self._index.stamp(self._far(held), step)
            self._n_ignored += held.n_absent
            return held.n_absent

    def _update(self, lease: DeviceLease, grads: Any, rule: Rule, hyper: Float32s, step: int, skip: bool) -> int:
        """Update rows; how many were left out, their gradients not being finite."""
        lines, seed, n_skipped = self._lines, self.layout.seed, 0
        on_device = not isinstance(grads, (np.ndarray, Gradients))
        if isinstance(grads, Summands):
            given, room = self._given(grads), self._sorted(lease)
            order, starts = room.order[: lease.n], room.starts[: lease.n_keys + 1]
            if not skip and not lease.n_away:
                lines.apply_segments(
                    rule.code, self._far(lease), given.values, order, starts, hyper, lease.far_keys, seed, step,
                    given.rows, given.scale,
                )  # fmt: skip
                return 0
            sums = self.memory.empty((lease.n_keys, given.values.shape[1]), np.float32)
            lines.sums(given.values, order, starts, sums, given.rows, given.scale)
        elif not on_device:
            self._know(lease)
            sums = grads.sum() if isinstance(grads, Gradients) and lease.n_away else grads
            bad = "skip" if skip else "apply"
            n_skipped = lines.apply(rule.code, self._near(lease), sums, hyper, lease.near_keys, seed, step, bad)
        else:
            sums = self.memory.array(grads)
        if on_device:
            slots = self._far(lease)
            if skip:
                slots, n_skipped = lines.skip_bad(slots, sums)
            lines.apply(rule.code, slots, sums, hyper, lease.far_keys, seed, step)
        if lease.n_away:
            assert lease.near is not None and lease.near_keys is not None
            away = np.flatnonzero(lease.near == AWAY)
            if on_device:
                some = self.memory.empty((len(away), sums.shape[1]), np.float32)
                lines.gather_from(sums, self.memory.send(away), some)
                sums = self.memory.fetch(some)
            else:
                sums = sums[away]
            with self._unlocked(), self._leased(lease.near_keys[away]) as held:
                self.below.apply(held, sums, rule, hyper, step, skip)
            self._n_streamed += len(away)
            n_skipped += int(np.count_nonzero(~finite_rows(sums))) if skip else 0
        return n_skipped

    def _given(self, grads: Summands) -> Summands:
        return Summands(*(a if a is None else self.memory.array(a) for a in grads))

    def _sorted(self, lease: DeviceLease) -> Room:
        """The lease's room, with its positions in the order of their keys."""
        if lease.room is None:
            raise InvalidArgument(
                "gradients by position for a batch that was not deduped on the device",
                table=self.layout.table,
                remedy="reserve it by `reserve_batch`, or give gradients summed by key",
            )
        if not lease.ordered:
            self._order(lease.room, lease.n, lease.n_keys)
            lease.ordered = True
        return lease.room

    def all_finite(self, values: Any, scale: Any = None) -> bool:
        """Whether neither gradients in device memory nor what scales them hold NaN or infinities."""
        send = self.memory.array
        with self._open():
            return bool(self._lines.all_finite(send(values), None if scale is None else send(scale)))

    # --- what the store below answers -------------------------------------------------------------------------

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        keys = np.unique(keys)
        with self._moving, self._change():
            with self._open():
                here = self._find(keys) >= 0
            below = self.below.has(keys)
            n = int(np.count_nonzero(here | below))
            if below.any():
                self.below.erase(keys[below])
            with self._open():
                self._forget(keys[here])
                self._n_rows -= n
                self.changes.note(keys[here & ~below], self._n_rows)  # which may have been there at a mark
            return n

    def put(self, chunk: Chunk) -> None:
        """Insert or overwrite lines; they go to the store below."""
        with self._moving, self._change(), self._replaced(np.unique(np.ascontiguousarray(chunk.key, np.int64))):
            self.below.put(chunk)

    def write(self, keys: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """See `Store.write`: as `put`."""
        with self._moving, self._replaced(keys):
            self.below.write(keys, lines, freq, last_step)

    @contextmanager
    def _replaced(self, keys: Int64s) -> Iterator[None]:
        """Lines of distinct keys are written below, within; none is here any more. `_moving` is held."""
        with self._open():
            here = self._find(keys) >= 0
        new = keys[~(here | self.below.has(keys))]
        try:
            yield
        finally:  # some may have been written where it failed
            self._n_rows += int(np.count_nonzero(self.below.has(new)))
        with self._open():
            self._forget(keys[here])

    def read(self, lease: Lease, at: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """See `Store.read`."""
        check_lines(self.layout, lines, at, freq, last_step)
        self.gather(lease, lines, at)
        check_rows(self.layout, lease.slots[at])
        freq[:], last_step[:] = self.metadata(lease.keys[at])

    def has(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each key has a row: bool[n]."""
        with self._moving:
            with self._open():
                here = self._find(keys) >= 0
            return here | self.below.has(keys)

    def metadata(self, keys: Int64s) -> tuple[Int64s, Int64s]:
        """Frequency and last step of each key, all of which have rows."""
        with self._moving:
            freq, last_step = np.zeros(len(keys), np.int64), np.full(len(keys), self.latest_step())
            if self.layout.metadata:
                with self._open():
                    slots = self._find(keys)
                    near, away = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
                    if len(near):
                        kept = self._index.metadata(self.memory.send(slots[near]))
                        freq[near], last_step[near] = map(self.memory.fetch, kept)
                freq[away], last_step[away] = self.below.metadata(keys[away])
            return freq, last_step

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order."""
        self._flush()
        return self.below.scan(since)

    def part(self, part: Part, rows: bool = True) -> Iterator[Chunk]:
        """Lines of the keys of `part`, in the order of their mix; without `rows`, row and state are [n, 0]."""
        self._flush(part)
        return self.below.part(part, rows)

    def _flush(self, part: Part | None = None) -> None:
        """Write below what changed, of all keys or those of a part; it stays here too. Steps go on meanwhile."""
        with self._open():
            keys = self._dirty_keys()
        if part is not None:
            keys = keys[part.has(keys)]
        for first in range(0, len(keys), self._batch_lines):
            with self._moving, self._open():
                self._write_back(keys[first : first + self._batch_lines], self._unlocked())
        with self._moving:
            self._tell_step()

    def _dirty_keys(self) -> Int64s:
        keys: Int64s = self.memory.fetch(self._index.dirty()[0])
        return keys

    def _write_back(self, keys: Int64s, meanwhile: AbstractContextManager[None]) -> None:
        """Write lines of keys below, as far as they are here. `_moving` and the lock are held."""
        slots = self._find(keys)
        keys, slots = keys[slots >= 0], slots[slots >= 0]
        if len(keys) == 0:
            return
        far = self.memory.send(slots)
        lines = self._lines.leave(far)
        freq, last_step = map(self.memory.fetch, self._index.metadata(far))
        self._index.clean(far)
        self._n_cleaned += 1
        try:
            with meanwhile:
                self.below.write(keys, lines, freq, last_step)
        except BaseException:
            self._dirty(far, *self._index.metadata(far))
            raise

    def _tell_step(self) -> None:
        """Let the store below know the latest step, which no row may show any more. `_moving` is held."""
        if self.below.latest_step() < self._latest:
            with self._leased(_NONE) as held:
                self.below.create(held, self._latest)

    @contextmanager
    def _all_below(self) -> Iterator[None]:
        """All rows are as they are in the store below, and nothing changes there; within, both locks are held."""
        for _ in range(ROUNDS):
            with self._open():
                n = len(self._dirty_keys())
            if n <= self._batch_lines:
                break
            self._flush()
        with self._moving, self._open():
            keys = self._dirty_keys()
            for first in range(0, len(keys), self._batch_lines):
                self._write_back(keys[first : first + self._batch_lines], nullcontext())
            self._tell_step()
            yield

    def point(self, base: str | None = None, keep: Callable[[], Any] | None = None, spill: Path | None = None) -> Point:
        """Take a point of the store below, where all rows are then; see `Store.point`.

        The pause grows with the rows that were changed while those changed before were written below.
        """
        self._pointing.acquire()
        try:
            with self._all_below():
                point = self.below.point(base, keep, spill)
                point.then = self._pointing.release
                return point
        except BaseException:
            self._pointing.release()
            raise

    def commit(self, keep: Mapping[str, npt.NDArray[Any]] | None = None) -> str:
        """Write what changed below and commit that; its id.

        Raises
        ------
        StorageError
            The store below refuses; or an update was cut in the middle. The last commit stays.
        """
        with self._all_below():
            if self._failed is not None:
                raise StorageError(
                    "an update was written only in part and cannot be committed",
                    table=self.layout.table,
                    remedy="open the table again: it begins at its last commit",
                ) from self._failed
            with self._unlocked():
                return self.below.commit(keep)

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """See `Store.kept`."""
        return self.below.kept()

    def latest_step(self) -> int:
        """Largest step that a row was stamped with, 0 for none."""
        return max(self._latest, self.below.latest_step())

    def stats(self) -> dict[str, Any]:
        """What the tier holds and has done.

        Rows; device memory held (``index_nbytes``, ``metadata_nbytes``, ``lines_nbytes`` and ``buffer_nbytes``, which
        the budget bounds; ``window_nbytes``: of batches announced); hits and misses of `fetch`; of the rows that steps
        asked for, ``ready_rows`` were near when the batch was waited for and ``late_rows`` were not; ``waited_s``
        seconds; keys that went to the side list, and are there; rows that streamed past the cache; keys ignored; and
        the stats of the store below.
        """
        with self._open():
            asked = self._n_hits + self._n_misses
            index, metadata = self._index, 8 * self._n_lines * self.layout.metadata
            side = index.stats()
            return {
                "tier": "device",
                "rows": self._n_rows,
                "index_nbytes": index.nbytes - metadata,
                "lines_nbytes": self._lines.nbytes,
                "metadata_nbytes": metadata,
                "buffer_nbytes": self._buffer_nbytes,
                "window_nbytes": self._window_nbytes,
                "cache_lines": self._n_lines,
                "hits": self._n_hits,
                "misses": self._n_misses,
                "hit_rate": self._n_hits / asked if asked else 0.0,
                "ready_rows": self._n_ready,
                "late_rows": self._n_late,
                "waited_s": self._waited,
                "evictions": self._n_evictions,
                "side_rows": side["n_side"],
                "spilled_rows": side["n_spilled"],
                "streamed_rows": self._n_streamed,
                "ignored_updates": self._n_ignored,
                "skipped_updates": self._n_skipped,
                "device": self.device,
                "below": self.below.stats(),
            }

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        with self._moving, self._open():
            self._let_go()
            self._index.validate()
            keys, _ = self._index.contents()
            n_unwritten = int(np.count_nonzero(~self.below.has(keys)))
            assert self._n_rows == len(self.below) + n_unwritten, "rows are miscounted"
            for lease in list(self._leases):
                self._know(lease)
                assert lease.near_keys is not None
                mine = self._near(lease)
                held = np.flatnonzero(mine >= 0)
                assert np.array_equal(self._find(lease.near_keys[held]), mine[held]), "a lease has another's line"

    def close(self) -> None:
        """Let go of memory, files and locks; what was not committed is discarded. Idempotent."""
        with self._moving, self._lock:
            if not self._closed:
                self._closed = True
                del self._index, self._lines, self._dedupe, self._order
                self._rooms.clear()
                self.below.close()


def _fit(parts: Parts, layout: Layout, budget: int) -> tuple[int, int, int]:
    """Slots, lines of the side list and lines of a buffer, that fit a budget."""

    def nbytes(n_buckets: int, batch_lines: int) -> int:
        n_slots, n_side = BUCKET * n_buckets, min(n_buckets, SIDE_LINES)
        index: int = parts.index.nbytes_of(n_slots, batch_lines, n_side, layout.metadata)
        lines: int = parts.lines.nbytes_of(n_slots + n_side, layout.width, batch_lines, layout.dim, layout.dtype)
        return index + lines

    per_line = nbytes(1, 2) - nbytes(1, 1)
    batch_lines = max(1, min(BUFFER_NBYTES // (4 * layout.width), budget // 4 // per_line))
    while batch_lines > 1 and nbytes(1, batch_lines) > budget:
        batch_lines //= 2
    if nbytes(1, batch_lines) > budget:
        raise BudgetExceeded(
            f"cache_budget of {budget} bytes does not hold a bucket of {BUCKET} lines of {layout.width} floats",
            table=layout.table,
            remedy=f"give at least {nbytes(1, 1)} bytes",
        )
    least, most = 1, budget // (4 * layout.width) + 1  # buckets that fit, and that do not
    while most - least > 1:
        half = (least + most) // 2
        least, most = (half, most) if nbytes(half, batch_lines) <= budget else (least, half)
    return BUCKET * least, min(least, SIDE_LINES), batch_lines


_NONE = np.zeros(0, np.int64)
_NEVER = (-1, (-1, -1))
