"""Rows of another store in device memory, with their index, scores, pins and dirty bits there too.

The host sees only keys that miss. A batch whose rows are all resident is deduped, found, pinned, gathered, updated and
let go by a few launches, and the host waits once: for how many keys are distinct, and how many of them are not there.
Where some are not, it waits once more, for which. A batch that is announced ahead waits for its keys and its lines one
after the other, since it is not to pin any before it is fetched.

**Where a row is.** A key has at most one line in device memory. While it has one, that one alone is current: the store
below may have an older row, or none yet. What changed is written below when the line makes way, and before anything is
asked of all rows (a scan, a point, a commit): then the store below answers, and snapshots and deltas are its own. A row
that finds no line, all of its buckets being pinned and the side list full, is *away*: the store below gathers, counts
and updates it, by the C kernels, to the same bits. So no result depends on the budget.

**Locks.** `_lock` guards what is in device memory and orders the launches. Whoever holds it sees each line whole.
`_moving` is held by what changes where rows are: lines that come and victims that go, rows made, erased, put or updated
below, write-backs. So while it is held nothing changes in the store below but by its holder, and between looking for a
key there and giving it a line nothing can become stale. It is taken before `_lock`, and kept while the store below
reads and writes, when `_lock` is not: steps whose rows are resident go on meanwhile. Fetching takes it anew for every
part of `batch_lines` lines, and it is given in the order of asking: a step that needs it, for a new row or one that is
away, waits for one part at the most.

Who looks for a batch's keys waits for the device without `_lock`: a batch ahead may stand behind all that a step has
launched, and the step must be able to launch the rest. So what the device finds has places that are the batch's own
(`Room.found` and `Room.listed`). An insertion waits with the lock, but for itself alone: what was launched before it
is over by then.

A line is in host memory before its key gets a slot, and is on its way into it (on the stream that all launches share)
before `_lock` is let go: nobody finds a slot whose line has not come. A victim's line is on its way to host memory
before `_lock` is let go, in a buffer that only who holds `_moving` uses, and below before `_moving` is let go: nobody
looks for it there too early. If the store below refuses it, it gets its line back and the newcomers go.

**Leases.** A lease pins its lines until it is released, or is forgotten: then `__del__` leaves them in `_abandoned`,
from where they are unpinned by whoever comes next. Its slots are read and written with `_lock` alone, since whoever
erases a key, or puts it, takes it from the leases that pin it; a key that nobody pins costs them nothing. What a lease
knows of keys without a line (absent, or away) holds as long as the store's `_version`, which counts rows made, put and
erased; keys that are away are looked for anew at every use.

**Failures.** What fails before a change leaves everything as it was. A change that was cut in the middle (`_change`)
leaves a store that still reads and refuses to commit.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit.cuda.batch import FOUND, MOST_SOON, N_KEYS, PINNED, Placement, Room, missing
from hbkit.cuda.parts import Parts
from hbkit.errors import BudgetExceeded, Closed, DeviceUnavailable, InvalidArgument
from hbkit.store.base import Lease, StoreSpec
from hbkit.store.lease import DeviceLease
from hbkit.store.line import Float32s, Int64s, Layout
from hbkit.store.locks import Turns
from hbkit.store.tier import AWAY, UNFIT

BUFFER_NBYTES = 2**24  # of a buffer of lines on their way
BUCKET = 32  # slots of the index that may hold a key
SIDE_LINES = 1024  # of the side list at the most; there is one for every bucket up to that
AGEING = 10  # uses a line after which all scores of "lfu" are halved


class Resident:
    """Which rows of another store are in device memory, and whose: base of `hbkit.store.device.DeviceStore`.

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
    """

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
        self._window_nbytes = self._work_nbytes = 0  # of batches announced, and of what dedupes and orders them
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
            self._window_nbytes += lease.nbytes
            if ahead:
                self._announce(lease)
            else:
                self._n_batches += 1
            return lease

    def reserve_batch(self, keys: Any, padding_key: int | None = None, ahead: bool = False) -> DeviceLease:
        """Announce a batch by its keys as they come, int64[n] in host or device memory: they are deduped on the device.

        The lease's `inverse` says which of the distinct keys each is; `padding_key` as ``keys[padding]`` of `reserve`.
        Where it is not `ahead`, its lines are looked for, too, so that both cost one wait.
        """
        n = int(keys.shape[0])
        with self._open():
            self._let_go()
            room = self._room(n)
            lease = DeviceLease(self, n, room.keys[:n], room.counts[:n], padding_key)
            lease.room, lease.inverse, lease.n = room, room.inverse[:n], n
            self._dedupe.begin(keys, room)
            if not ahead:
                self._n_batches += 1
                self._begin(lease)
        if not ahead:
            self._found(lease)
            return lease
        lease.cut(int(self.memory.fetch(room.found)[N_KEYS]) if n else 0)
        with self._open():
            self._announce(lease)
        return lease

    def _announce(self, lease: DeviceLease) -> None:
        lease.batch = self._n_batches
        self._announced[lease.batch] = lease.far_keys
        self._n_batches += 1

    def _room(self, n: int) -> Room:
        """A room for a batch of n positions, and what fills it."""
        if n > self._room_ids or self._dedupe is None:
            self._window_nbytes -= sum(room.nbytes for room in self._rooms)
            self._rooms.clear()
            self._dedupe = self._order = None  # whose memory may be what there is not enough of
            self._room_ids = self._work_nbytes = 0
            n_ids = n + n // 8 + 32
            dedupe, order = (make(self.memory, n_ids) for make in self._parts[3:])
            self._dedupe, self._order, self._room_ids = dedupe, order, n_ids
            self._work_nbytes = dedupe.nbytes + order.nbytes
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
            if lease.far is None:
                with self._open():
                    self._begin(lease)
                self._found(lease)
            lease.fetched = True
            wanted = _NONE
            with self._open():
                if lease.n_absent:
                    wanted = np.flatnonzero(lease.rest.slots == -1)
            if len(wanted):
                lease.n_brought = self._bring(lease, wanted)
                lease.done = time.monotonic()
            lease.seen = lease.begun  # what was made since may be among the absent ones

    def _begin(self, lease: DeviceLease) -> None:
        """Launch what finds and pins the lines of a lease. The lock is held; `_found` waits without it."""
        self._let_go()
        if lease.batch is not None:
            self._announced.pop(lease.batch, None)
        lease.begun = self._version
        if lease.n_keys:
            place: dict[str, Any] = {}
            if lease.room is not None:
                place = {name: getattr(lease.room, name) for name in ("slots", "found", "listed")}
            scores, how = self._scores(lease), {"add": self._by_use, "skip": lease.skip}
            lease.held = self._index.hold(lease.far_keys, scores, lease.far_counts, **how, **place)
        lease.far = lease.far_keys if lease.held is None else lease.held.slots
        self._leases.add(lease)

    def _found(self, lease: DeviceLease) -> None:
        """Know which of a lease's keys have no line: they count as absent, until they are looked for below."""
        if lease.held is None:
            return
        try:
            found = missing(self.memory, lease.held)
        except InvalidArgument:  # of a launch before, as of a gather by what is no key's number
            with self._lock:  # as if it had not begun
                self._index.settle(lease.far)
                self._leases.discard(lease)
                lease.far = lease.held = None
                if lease.room is not None:
                    lease.room.found = self.memory.send(np.array([lease.n_keys, 0, 0], np.int32))
            raise
        with self._open():
            lease.cut(found.n_keys)
            lease.held, lease.n_skipped = None, found.n_skipped
            if len(found.at):
                counts = found.counts if lease.near_counts is None else lease.near_counts[found.at]
                lease.rest.add(found.at, found.keys, counts)
                lease.recount()
            self._n_hits += lease.n_keys - len(found.at) - lease.n_skipped
            self._n_uses += lease.n_keys
            if self._by_use and self._n_uses > AGEING * self._n_lines:
                self._n_uses = 0
                self._index.age()

    def _scores(self, lease: DeviceLease, some: Int64s | None = None) -> Any:
        """What the uses of a lease's keys are worth, or of some of those that had no line."""
        if not self._by_use:
            return np.array([self._n_batches])
        return lease.far_counts if some is None else lease.rest.counts[some]

    def _bring(self, lease: DeviceLease, wanted: Int64s) -> int:
        """Look below for the lease's keys number `wanted`, and give lines to their rows; how many rows there are.

        The lease's mutex is held.
        """
        found = 0
        with self._open():
            lease.tried = self._n_releases
            self._mark()
        for first in range(0, len(wanted), self._batch_lines):
            with self._moving:
                if lease.released:
                    return found
                found += self._bring_part(lease, wanted[first : first + self._batch_lines])
        return found

    def _bring_part(self, lease: DeviceLease, some: Int64s) -> int:
        keys = lease.rest.keys[some]
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
        self.memory.sync()  # so that those who want the lock wait for the insertion alone, not for steps before it
        with self._open():
            self._n_misses += int(np.count_nonzero(lease.rest.slots[some] < 0))
            self._take_in(lease, some, AWAY, (freq, last_step))
        return n

    def _mark(self) -> None:
        """Before insertions that may evict: keys of announced batches go last, those of the soonest last of all."""
        if 2 * len(self._index) > self._n_lines:  # else hardly a bucket is full
            for soon, keys in zip(range(MOST_SOON, 0, -1), self._announced.values(), strict=False):
                self._index.mark(keys, soon)

    def _make_room(self) -> None:
        """Empty the side list, as far as its keys are not pinned any more. `_moving` and the lock are held."""
        if self._index.n_side and self._drained != self._n_releases:
            self._drained = self._n_releases
            with self._change((DeviceUnavailable, BudgetExceeded)):
                old, placed = self._index.drain()
                if placed.n:
                    victims, new = self._take_out(placed), self.memory.fetch(placed.slots)
                    self._lines.move(old[new >= 0], new[new >= 0])
            if placed.n:
                self._write_victims(victims, _NONE)

    def _take_in(
        self, lease: DeviceLease, some: Int64s, else_: int, metadata: tuple[Int64s, Int64s] | None = None
    ) -> None:
        """Give the lease's keys number `some`, whose lines are `incoming`, slots as far as there is room; `else_` is
        what the others have instead. `_moving` and the lock are held; that is let go while victims are written."""
        rest, memory = lease.rest, self.memory
        keys, scores = rest.keys[some], self._scores(lease, some)
        # What needs memory comes before the insertion, which must not be cut short.
        far, at = memory.send(keys), memory.send(rest.at[some])
        scores = memory.send(scores) if self._by_use else scores
        notes = None if metadata is None else [memory.send(column) for column in metadata]
        with self._change((DeviceUnavailable, BudgetExceeded)):
            placed = self._index.insert(far, scores, evict=True, add=self._by_use)
            victims = self._take_out(placed)
            slots, status = memory.fetch(placed.both).reshape(2, -1)
            new = np.where(status == FOUND, -1, slots)
            self._lines.land(new)
            if notes is not None:
                self._index.put_metadata(memory.join([new], far), *notes)
            self._index.put(lease.far, at, placed.slots)
            rest.slots[some] = np.where(slots >= 0, slots, else_)
            lease.recount()
        self._write_victims(victims, keys[new >= 0])

    def _take_out(self, placed: Placement) -> tuple[Any, Callable[[], Float32s]] | None:
        """What gives the dirty lines that have lost their slots: keys and metadata, still on the device, and lines on
        their way."""
        self._n_evictions += placed.n_evicted
        if not placed.n_dirty:
            return None
        victims = self._index.dirty_victims(placed)
        return victims.noted, self._lines.depart(victims.slots)

    def _write_victims(self, victims: tuple[Any, Callable[[], Float32s]] | None, newcomers: Int64s) -> None:
        """Write lines below that made way; if that fails, they come back in the place of the newcomers."""
        if victims is None:
            return
        with self._change((DeviceUnavailable,)):
            keys, freq, last_step = self.memory.fetch(victims[0]).reshape(3, -1)
            with self._unlocked():  # but with `_moving`: no other line leaves meanwhile
                lines = victims[1]()
        try:
            with self._unlocked():
                self.below.write(keys, lines, freq, last_step)
        except BaseException as e:
            with self._change((DeviceUnavailable, BudgetExceeded)):
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

    def _forget(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Take lines from distinct keys, whoever holds them; which had one. `_moving` and the lock are held."""
        living = list(self._leases)
        self._let_go()
        self._version += 1
        slots = self._index.erase(keys)
        pinned = keys[slots == PINNED]
        if len(pinned):
            self._take_from(living, pinned)
            self._index.erase(pinned)
        return slots != -1

    def _take_from(self, leases: list[DeviceLease], keys: Int64s) -> None:
        """Leases lose the lines that keys have."""
        slots = self._find(keys)
        order = np.argsort(slots)
        keys, slots = keys[order], slots[order]
        for lease in leases:
            near = self.memory.fetch(lease.far)
            lost = np.flatnonzero(np.isin(near, slots))
            if len(lost):
                gone, at, none = map(self.memory.send, (near[lost], lost, np.full(len(lost), -1)))
                counts = self.memory.fetch(lease.far_counts)
                self._index.settle(gone)
                self._index.put(lease.far, at, none)
                lease.rest.add(lost, keys[np.searchsorted(slots, near[lost])], counts[lost])
                lease.recount()

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

    # --- batches are used -------------------------------------------------------------------------------------

    def wait(self, lease: Lease, since: float | None = None) -> None:
        """Return once the lease's rows are near, as far as there is room. The step begins; it could have at `since`."""
        assert isinstance(lease, DeviceLease)
        begin = time.monotonic() if since is None else since
        self.fetch(lease)
        with lease.mutex:
            with self._open():
                wanted = _NONE
                if lease.n_away and lease.tried != self._n_releases:  # pins are gone since
                    wanted = np.flatnonzero(lease.rest.slots == AWAY)
            if len(wanted):
                self._bring(lease, wanted)
        if not lease.asked:
            lease.asked = True
            n_late = max(lease.n_brought if lease.done > begin else 0, lease.n_away)
            self._n_late += n_late
            self._n_ready += lease.n_keys - lease.n_absent - lease.n_skipped - n_late
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
        rest = lease.rest
        with self._open():
            some = np.flatnonzero((rest.slots == -1) | (rest.slots == AWAY))
            seen, keys = self._version, rest.keys[some]
            found = _NONE
            if len(some):
                at = self.memory.send(rest.at[some])
                slots = self._index.hold(keys, self._scores(lease, some), add=self._by_use).slots
                try:
                    found = self.memory.fetch(slots)
                except InvalidArgument:  # of a launch before, as of a gather by what is no key's number
                    self._index.settle(slots)
                    raise
                self._index.put(lease.far, at, slots)
                rest.slots[some] = found
                lease.recount()
        left = found < 0
        with self._open():
            rest.slots[some[left]] = np.where(self.below.has(keys[left]), AWAY, -1)
            lease.recount()
            lease.seen = seen

    def _near(self, lease: DeviceLease) -> Int64s:
        """The lease's lines in host memory."""
        if lease.near is None:
            lease.near = self.memory.fetch(lease.far)
        return lease.near


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
