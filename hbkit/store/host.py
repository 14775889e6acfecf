"""The host tier: every row in memory, an index over slabs that never move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import absent, clear_bits, n_absent, set_bits, with_bits
from hbkit._ext.index import Index
from hbkit._ext.metadata import Metadata
from hbkit._ext.segment import Gradients, retained
from hbkit._ext.slabs import Lines, Slabs
from hbkit.errors import Closed, SchemaMismatch
from hbkit.store.base import Filter, Lease, admitted
from hbkit.store.changes import Changes
from hbkit.store.line import CHUNK_ROWS, Chunk, Float32s, Int64s, Layout, Part, Rule, check_lines, check_rows
from hbkit.store.locks import SharedLock
from hbkit.store.point import READ_ROWS, InPlace, Point


@dataclass(frozen=True)
class HostMemory:
    """Rows in this process's memory; see `host_memory`."""

    def open(self, layout: Layout) -> HostStore:
        """A store for one table of this layout."""
        return HostStore(layout)


def host_memory() -> HostMemory:
    """A place for tables in this process's memory: no capacity to plan, bounded by the machine.

    Examples
    --------
    >>> Table("user", dim=16, store=hbkit.store.host_memory())
    """
    return HostMemory()


class HostStore:
    """One table in host memory.

    Notes
    -----
    Lookups (`reserve`, `gather`) run beside each other and beside one update: rows never move, so what a lookup reads
    of a row that is being updated is, float by float, the old or the new one. What makes, erases or overwrites rows
    waits for those under way and lets no other begin. Kernels release the GIL.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._index = Index()
        self._slabs = Slabs(layout.width, dim=layout.dim, row_dtype=layout.dtype)
        self._metadata = Metadata(layout.metadata)
        self._erasures = self._creations = 0
        self._n_ignored = self._n_skipped = 0
        self._n_commits = 0
        self.lock = SharedLock()  # exclusive: keys come or go
        self.updating = threading.Lock()  # one thread at a time writes rows and metadata in place
        self._lines = None if layout.draws is None else Lines(self._slabs, layout.draws, layout.initial_state)
        self.changes = Changes(layout.metadata)
        self._pointing = threading.Lock()  # held while there is a point
        self._point: _HostPoint | None = None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def version(self) -> tuple[int, int]:
        """Erasures and creations so far."""
        return self._erasures, self._creations

    def reserve(self, keys: Int64s, counts: Int64s, padding: int = -1, ahead: bool = False) -> Lease:
        """Find the rows of distinct keys; nothing moves in this tier."""
        lease = Lease(keys, _NONE, counts, padding)
        with self.lock.shared:
            lease.refresh(self._index, self.version)
        return lease

    @property
    def parts(self) -> tuple[Index, Slabs, Metadata, Lines | None]:
        """What the store is made of, for passes over several stores at once (`hbkit.store.together`).

        The last says how new rows begin, where they are drawn in place.
        """
        return self._index, self._slabs, self._metadata, self._lines

    @property
    def room(self) -> tuple[int, int]:
        """Lines and metadata there is room for, as `shrink` takes them."""
        return self._slabs.capacity, self._metadata.room

    def grow(self, n: int) -> None:
        """Make room for n more rows, `lock` being held."""
        need = self._index.n_slots + n
        self._slabs.reserve(need)
        if need > self._metadata.room:
            self._metadata.reserve(need + need // 8 + 512)

    def shrink(self, room: tuple[int, int]) -> None:
        """Give back the room made since."""
        self._slabs.trim(room[0])
        self._metadata.trim(room[1])

    def created(self, slots: Int64s) -> None:
        """New keys have these slots, `lock` being held: their rows are none of a point's, though old ones had them."""
        if (point := self._point) is not None:
            clear_bits(point.bits, slots)
        self._creations += 1

    def refresh(self, lease: Lease) -> None:
        """Bring the lease's slots up to date, `lock` being held."""
        lease.refresh(self._index, self.version)

    def fetch(self, lease: Lease) -> None:
        """Every row is near in this tier."""

    def wait(self, lease: Lease, since: float | None = None) -> None:
        """Every row is near in this tier."""

    def lookup(self, keys: Int64s, out: Float32s) -> None:
        """Rows of keys, which may repeat, into ``out[n, dim]``; zeros where a key is absent."""
        with self.lock.shared:
            self._slabs.lookup(self._index, keys, out)

    def lookup_pooled(
        self, keys: Int64s, splits: Int64s, out: Float32s, weight: Float32s | None, row_scale: Float32s | None
    ) -> None:
        """Weighted sums of the rows of ``keys[splits[b]:splits[b + 1]]`` into ``out[b]``, as `pool` gives them."""
        with self.lock.shared:
            self._slabs.lookup_pooled(self._index, keys, splits, out, weight, row_scale)

    @contextmanager
    def _inserted(self, keys: Int64s) -> Iterator[Int64s]:
        """Slots of keys, whose lines and metadata are written within. If that fails, the store is as it was."""
        n_slots, room = self._index.n_slots, self.room
        try:
            self.grow(len(keys))
            slots, is_new = self._index.find_or_insert(keys)
            try:
                if (point := self._point) is not None:
                    self._set_aside(point, keys[~is_new], slots[~is_new])
                yield slots
            except BaseException:
                self._index.take_back(keys, is_new, n_slots)
                raise
        except BaseException:
            self.shrink(room)
            raise
        self.created(slots)

    def create(self, lease: Lease, step: int, admission: Filter | None = None) -> int:
        """Make the lease's absent rows that are admitted, count its keys, stamp them with `step`; rows made."""
        with self.lock.shared:
            lease.refresh(self._index, self.version)
            n_new = len(absent(lease.slots, lease.padding))
        if n_new:
            with self.lock.exclusive:
                lease.refresh(self._index, self.version)
                n_new = self._make(lease, absent(lease.slots, lease.padding), admission)
        with self.lock.shared, self.updating:
            lease.refresh(self._index, self.version)
            self.about_to_change(lease, step)
            self._metadata.stamp(lease.slots, step, lease.counts)
            lease.stamped = step, lease.version
        return n_new

    def _make(self, lease: Lease, missing: Int64s, admission: Filter | None) -> int:
        """Rows for the lease's keys at positions `missing`, as far as they are admitted."""
        keys = lease.keys[missing]
        with admitted(admission, keys, lease.counts[missing]) as some:
            missing, keys = missing[some], keys[some]
            if len(keys):
                layout = self.layout
                lines = layout.new_lines(keys) if layout.draws is None else None
                with self._inserted(keys) as slots:
                    if lines is None:
                        self._slabs.fill(slots, keys, layout.draws, layout.initial_state)
                    else:
                        self._slabs.scatter(slots, lines)
                    self._metadata.clear(slots)
                lease.slots[missing], lease.version = slots, self.version
        return len(keys)

    def gather(self, lease: Lease, out: Float32s, index: Int64s | None = None) -> None:
        """Copy rows to ``out[u, dim]``, or those of the keys number `index`; zeros where a key is absent."""
        with self.lock.shared:
            lease.refresh(self._index, self.version)
            self._slabs.gather(lease.slots, out, index)

    def pool(
        self,
        lease: Lease,
        index: Int64s,
        splits: Int64s,
        out: Float32s,
        weight: Float32s | None = None,
        row_scale: Float32s | None = None,
    ) -> None:
        """Weighted sums of rows, each read where it lies."""
        with self.lock.shared:
            lease.refresh(self._index, self.version)
            self._slabs.pool(lease.slots, index, splits, out, weight, row_scale)

    def apply(
        self, lease: Lease, grads: Float32s | Gradients, rule: Rule, hyper: Float32s, step: int, skip: bool = False
    ) -> int:
        """One optimizer step in place; how many of the keys were absent and ignored."""
        with self.lock.shared, self.updating:
            lease.refresh(self._index, self.version)
            self.about_to_change(lease, step)
            bad = "skip" if skip else "apply"
            self._n_skipped += self._slabs.apply(
                rule.code, lease.slots, grads, hyper, lease.keys, self.layout.seed, step, bad
            )
            ignored: int = n_absent(lease.slots) - (lease.padding >= 0)
            self.updated(lease, step, ignored)
            return ignored

    def updated(self, lease: Lease, step: int, ignored: int) -> None:
        """The rows of a lease were, with `updating` held; so many of its keys were absent."""
        if lease.stamped != (step, lease.version):  # as `create` left it, else
            self._metadata.stamp(lease.slots, step)
        self._n_ignored += ignored

    def release(self, lease: Lease) -> None:
        """Nothing is pinned in this tier."""

    def read(self, lease: Lease, at: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Whole lines and metadata of the lease's keys number `at`, all of which have rows."""
        check_lines(self.layout, lines, at, freq, last_step)
        with self.lock.shared:
            lease.refresh(self._index, self.version)
            slots = lease.slots[at]
            check_rows(self.layout, slots)
            self._slabs.read(slots, lines)
            self._metadata.get(slots, (freq, last_step))

    def write(self, keys: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Take back lines and metadata of distinct rows that a tier above had. MemoryError leaves all as it was.

        Lookups go on meanwhile, but for the rows that are made.
        """
        check_lines(self.layout, lines, keys, freq, last_step)
        with self.lock.shared:
            version, slots = self._erasures, self._index.find(keys)
        new = np.flatnonzero(slots < 0)
        if len(new):
            with self.lock.exclusive, self._inserted(keys[new]) as found:
                made = np.full(len(keys), -1)
                made[new] = found
                self._write(made, lines, freq, last_step)
                self.changes.note_stamped(keys[new], len(self._index), last_step[new])
            if len(new) == len(keys):
                return
        with self.lock.shared, self.updating:
            if self._erasures != version:  # what was erased meanwhile stays so
                slots = self._index.find(keys)
            if (point := self._point) is not None:
                self._set_aside(point, keys, slots)
            self._write(slots, lines, freq, last_step)
            self.changes.note_stamped(keys, len(self._index), last_step, slots)

    def _write(self, slots: Int64s, lines: Float32s, freq: Int64s, last_step: Int64s) -> None:
        """Whole lines and metadata of slots; what has slot -1 is left out."""
        self._slabs.write(slots, lines)
        self._metadata.put(slots, freq, last_step)

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        with self.lock.exclusive:
            n = len(self._index)
            if (point := self._point) is not None:
                self._set_aside(point, keys, self._index.find(keys))
            slots = self._index.erase(keys)
            n -= len(self._index)
            self._erasures += n > 0
            self.changes.note(keys, len(self._index), slots)
            return n

    def has(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Whether each key has a row: bool[n]."""
        with self.lock.shared:
            found: npt.NDArray[np.bool_] = self._index.find(keys) >= 0
            return found

    def metadata(self, keys: Int64s) -> tuple[Int64s, Int64s]:
        """Frequency and last step of each key, all of which have rows."""
        with self.lock.shared:
            freq, last_step = self._metadata.get(self._index.find(keys))
            return freq, last_step

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order.

        The keys are those of the moment the scan begins; a row changed or erased meanwhile is read as it is then.
        """
        with self.lock.shared:
            keys, slots = self._index.items()
            if since is not None:
                keys = keys[self._metadata.get(slots)[1] > since]
        return self._chunks(np.sort(keys), rows=True)

    def part(self, part: Part, rows: bool = True) -> Iterator[Chunk]:
        """Lines of the keys of `part`, in the order of their mix; without `rows`, row and state are [n, 0]."""
        with self.lock.shared:
            keys = part.of(self._index)
        return self._chunks(keys, rows)

    def _chunks(self, keys: Int64s, rows: bool) -> Iterator[Chunk]:
        dim = self.layout.dim
        for first in range(0, len(keys), CHUNK_ROWS):
            part = keys[first : first + CHUNK_ROWS]
            with self.lock.shared:
                slots = self._index.find(part)
                held = slots >= 0
                part, slots = part[held], slots[held]
                lines = np.empty((len(part), self.layout.width if rows else 0), np.float32)
                self._slabs.gather(slots, lines)
                freq, last_step = self._metadata.get(slots)
            yield Chunk(part, freq, last_step, lines[:, :dim], lines[:, dim:])

    def put(self, chunk: Chunk) -> None:
        """Insert or overwrite lines."""
        if chunk.row.shape[1] != self.layout.dim or chunk.state.shape[1] != self.layout.width - self.layout.dim:
            raise SchemaMismatch(
                f"lines of {chunk.row.shape[1]} + {chunk.state.shape[1]} floats do not fit "
                f"{self.layout.dim} + {self.layout.width - self.layout.dim}",
                table=self.layout.table,
                remedy="give the table the dim and optimizer that the lines were written with",
            )
        row, state = (np.ascontiguousarray(lines, np.float32) for lines in chunk[3:])
        keys, freq, last_step = (np.ascontiguousarray(column, np.int64) for column in chunk[:3])
        with self.lock.exclusive:
            with self._inserted(keys) as slots:
                self._metadata.put(slots, freq, last_step)
                self._slabs.put(slots, row, state)
            self.changes.note(keys, len(self._index))

    # --- points -----------------------------------------------------------------------------------------------

    def point(self, base: str | None = None, keep: Callable[[], Any] | None = None, spill: Path | None = None) -> Point:
        """Take a point; see `Store.point`. The pause is a pass over the stamps with a `base`, else about nothing."""
        self._pointing.acquire()
        try:
            with self.lock.exclusive:
                since = self.changes.since(base) if base is not None else None
                n_words = self._index.n_slots // 64 + 1
                if since is None:
                    bits, erased = np.full(n_words, -1, np.int64).view(np.uint64), None
                else:
                    bits, slots = np.empty(n_words, np.uint64), self._index.find(since.keys)
                    self._metadata.stamped_after(since.step, bits)
                    set_bits(bits, slots)
                    erased = since.keys[slots < 0]
                latest = self.latest_step()
                kept = keep() if keep is not None else None
                mark = self.changes.mark(latest)
                self._point = point = _HostPoint(self, len(self._index), latest, erased, mark, kept, spill)
                point.bits = bits
                return point
        except BaseException:
            self._pointing.release()
            raise

    def about_to_change(self, lease: Lease, step: int) -> None:
        """The rows of a lease are, and they are or have been stamped with `step`."""
        if (point := self._point) is not None:
            self._set_aside(point, lease.keys, lease.slots)
        if not self.changes.tells(step):
            self.changes.note(lease.keys, len(self._index), lease.slots)

    def _set_aside(self, point: _HostPoint, keys: Int64s, slots: Int64s) -> None:
        """Set aside the lines of rows that are about to change, those that the point still needs. Never fails."""
        try:
            some = np.flatnonzero(with_bits(point.bits, slots))
            for first in range(0, len(some), READ_ROWS):
                part = some[first : first + READ_ROWS]
                lines = np.empty((len(part), self.layout.width), np.float32)
                self._slabs.gather(slots[part], lines)
                freq, last_step = self._metadata.get(slots[part])
                point.aside.add(keys[part], freq, last_step, lines)
            clear_bits(point.bits, slots)
        except Exception as e:
            point.fail(e)

    def point_keys(self, point: _HostPoint) -> Iterator[Int64s]:
        """Keys of the point, ascending."""
        n = max(1, self._index.n_slots // CHUNK_ROWS)
        parts = (Part.share(i, n) for i in range(n))
        found = [self._index.part(part.first, part.last - 1, point.bits) for part in parts]
        keys = np.concatenate([*found, point.aside.keys()])  # in this order: what is changed meanwhile is set aside
        del found
        cuts = np.arange(PIECE_ROWS, len(keys), PIECE_ROWS)
        if len(cuts):
            keys.partition(cuts)
        last = keys[:0]
        pieces = np.split(keys, cuts)
        # No thread sorts ahead: a generator that is dropped as another thread starts would wait for its own for good.
        for piece in pieces:
            piece.sort()
            is_new = np.append(len(last) == 0 or piece[:1] != last, piece[1:] != piece[:-1])[: len(piece)]
            yield piece[is_new]
            last = piece[-1:]

    def point_rows(self, point: _HostPoint, keys: Int64s) -> InPlace:
        """Those that nothing was about to change until they were read."""
        lines: Float32s = retained((len(keys), self.layout.width))
        with self.lock.shared:
            slots = self._index.find(keys)
            self._slabs.gather(slots, lines)
            freq, last_step = self._metadata.get(np.maximum(slots, 0))
            with self.updating:
                there = with_bits(point.bits, slots)
                clear_bits(point.bits, slots)
        return InPlace(there, freq, last_step, lines)

    def point_ended(self, point: _HostPoint) -> None:
        """Let the next one be taken."""
        self._point = None
        self._pointing.release()

    def commit(self, keep: Mapping[str, npt.NDArray[Any]] | None = None) -> str:
        """Memory is as durable as this process: only a number is given out. Use `hbkit.snapshot` to keep the rows."""
        self._n_commits += 1
        return str(self._n_commits)

    def kept(self) -> dict[str, npt.NDArray[Any]]:
        """Nothing outlives this tier."""
        return {}

    def latest_step(self) -> int:
        """Largest step that a row was stamped with, 0 for none."""
        return self._metadata.latest

    def stats(self) -> dict[str, Any]:
        """Rows and bytes held, keys ignored by updates."""
        with self.lock.shared:
            return {
                "tier": "host",
                "rows": len(self._index),
                "index_nbytes": self._index.nbytes,
                "lines_nbytes": self._slabs.nbytes,
                "metadata_nbytes": self._metadata.nbytes,
                "ignored_updates": self._n_ignored,
                "skipped_updates": self._n_skipped,
            }

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        with self.lock.exclusive:
            self._index.validate()
            assert self._index.n_slots <= self._slabs.capacity, "a slot has no line"
            assert self._index.n_slots <= self._metadata.room, "a slot has no metadata"

    def close(self) -> None:
        """Nothing but memory is held: it goes with the object. But a point is read no further."""
        point = self._point
        if point is not None:
            point.fail(Closed("the store was closed", table=self.layout.table, remedy="wait for what reads it first"))


class _HostPoint(Point):
    """A point of rows in memory."""

    bits: npt.NDArray[np.uint64]  # of slots: the row is as it was then and is still to be read


_NONE = np.zeros(0, np.int64)
PIECE_ROWS = 1 << 18  # keys that are sorted at once
