"""The device tier: a cache of rows in device memory over any other store.

A step whose rows are all in device memory is a few launches: they are gathered, pooled and updated there, and what is
given and asked for may be there too. `hbkit.store.resident` says which rows those are, and how they come and go. Rows
that find no line are gathered, counted and updated by the store below, to the same bits. And what is asked of all rows
(a scan, a point, a commit) the store below answers, once all that changed is written there.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import finite_rows, mixed
from hbkit._ext.segment import Gradients, expand, pool, retained
from hbkit.cuda.batch import MOST_STAMP, Room
from hbkit.cuda.parts import open_parts
from hbkit.errors import DeviceUnavailable, InvalidArgument, StorageError
from hbkit.store.base import Filter, Lease, Store, StoreSpec, admitted
from hbkit.store.cache import as_nbytes
from hbkit.store.lease import DeviceLease
from hbkit.store.line import CHUNK_ROWS, Chunk, Float32s, Int64s, Layout, Part, Rule, check_lines, check_rows
from hbkit.store.point import Point
from hbkit.store.resident import Resident
from hbkit.store.tier import AWAY

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


class DeviceStore(Resident):
    """One table in device memory over another store.

    Notes
    -----
    An array that is given or asked for is in host memory if it is NumPy's, else in device memory.
    """

    # --- a step -----------------------------------------------------------------------------------------------

    def create(self, lease: Lease, step: int, admission: Filter | None = None) -> int:
        """Make the lease's absent rows that are admitted, count its keys, stamp them with `step`; rows made."""
        with self._using(lease, moving=True) as held, self._change():
            n_new = 0
            if held.n_absent or held.n_away:
                n_new = self._make(held, step, admission)
            self._latest = max(self._latest, min(step, MOST_STAMP))
            if held.n_keys:
                self._index.stamp(held.far, step, held.far_counts)
            held.stamped = step, (self._n_cleaned, 0)
            return n_new

    def _make(self, lease: DeviceLease, step: int, admission: Filter | None) -> int:
        """Rows for absent keys that are admitted; those that find no line are made, and counted, below.

        `_moving` and the lock are held.
        """
        self._mark()
        rest = lease.rest
        new, away = np.flatnonzero(rest.slots == -1), np.flatnonzero(rest.slots == AWAY)
        new = new[np.argsort(rest.at[new])]
        with admitted(admission if len(new) else None, rest.keys[new], rest.counts[new]) as some:
            new = new[some]
            try:
                for first in range(0, len(new), self._batch_lines):
                    self._make_part(lease, new[first : first + self._batch_lines])
                streamed = np.concatenate([new[rest.slots[new] < 0], away])
                if len(streamed):
                    with self._unlocked(), self._leased(rest.keys[streamed], rest.counts[streamed]) as held:
                        self.below.create(held, step)
                    rest.slots[streamed] = AWAY
                    lease.recount()
                    self._n_streamed += len(streamed)
            except BaseException:
                self._forget(rest.keys[new])
                raise
        if len(new):
            self._n_rows += len(new)
            self._version += 1
        return len(new)

    def _make_part(self, lease: DeviceLease, some: Int64s) -> None:
        keys, layout = lease.rest.keys[some], self.layout
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
                    self._lines.gather(held.far, out, index)
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
        self._lines.gather(lease.far, out)
        self._lines.scatter_into(out, *self._rows_away(lease, out.shape[1]))
        return out

    def _rows_away(self, lease: DeviceLease, width: int) -> tuple[Int64s, Float32s]:
        """Which of a lease's keys are away, and their rows."""
        away = np.flatnonzero(lease.rest.slots == AWAY)
        rows = np.empty((len(away), width), np.float32)
        with self._unlocked(), self._leased(lease.rest.keys[away]) as held:
            self.below.gather(held, rows)
        self._n_streamed += len(away)
        return lease.rest.at[away], rows

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
                    self._lines.pool(held.far, index, splits, out, weight, row_scale)

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
                self._index.stamp(held.far, step)
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
                    rule.code, lease.far, given.values, order, starts, hyper, lease.far_keys, seed, step,
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
            slots = lease.far
            if skip:
                slots, n_skipped = lines.skip_bad(slots, sums)
            lines.apply(rule.code, slots, sums, hyper, lease.far_keys, seed, step)
        if lease.n_away:
            away = np.flatnonzero(lease.rest.slots == AWAY)
            at = lease.rest.at[away]
            if on_device:
                some = self.memory.empty((len(at), sums.shape[1]), np.float32)
                lines.gather_from(sums, self.memory.send(at), some)
                sums = self.memory.fetch(some)
            else:
                sums = sums[at]
            with self._unlocked(), self._leased(lease.rest.keys[away]) as held:
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
            found = self._lines.look(send(values), None if scale is None else send(scale))
        # Without the lock: gradients may be those of a model that is at work still, while rows of other batches come.
        return not self.memory.fetch(found).any()

    # --- what the store below answers -------------------------------------------------------------------------

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        keys = np.unique(keys)
        with self._moving, self._change():
            below = self.below.has(keys)
            if below.any():
                self.below.erase(keys[below])
            with self._open():
                here = self._forget(keys)
                n = int(np.count_nonzero(here | below))
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
                        freq[near], last_step[near] = self.memory.fetch(self._index.metadata(slots[near]))
                freq[away], last_step[away] = self.below.metadata(keys[away])
            return freq, last_step

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order."""
        self._flush()
        return self.below.scan(since)

    def part(self, part: Part, rows: bool = True) -> Iterator[Chunk]:
        """Lines of the keys of `part`, in the order of their mix; without `rows`, row and state are [n, 0].

        Without rows, no line leaves the device: of those that changed here, the metadata do, 24 bytes a line.
        """
        if rows:
            self._flush(part)
            return self.below.part(part)
        with self._moving:
            self._tell_step()
            with self._open():
                changed = self.memory.fetch(self._index.dirty(*part)).reshape(3, -1)
            chunks = self.below.part(part, rows=False)
        if not self.layout.metadata:
            changed[2] = self.latest_step()
        return _newest(chunks, changed)

    def _flush(self, part: Part | None = None) -> None:
        """Write below what changed, of all keys or those of a part; it stays here too. Steps go on meanwhile."""
        with self._open():
            keys = self._dirty_keys(part)
        for first in range(0, len(keys), self._batch_lines):
            with self._moving, self._open():
                self._write_back(keys[first : first + self._batch_lines], self._unlocked())
        with self._moving:
            self._tell_step()

    def _dirty_keys(self, part: Part | None = None) -> Int64s:
        dirty = self._index.dirty(*part or Part())
        keys: Int64s = self.memory.fetch(dirty[: dirty.shape[0] // 3])
        return keys

    def _write_back(self, keys: Int64s, meanwhile: AbstractContextManager[None]) -> None:
        """Write lines of keys below, as far as they are here. `_moving` and the lock are held."""
        slots = self._find(keys)
        keys, slots = keys[slots >= 0], slots[slots >= 0]
        if len(keys) == 0:
            return
        far = self.memory.send(slots)
        lines = self._lines.depart(far)
        freq, last_step = self.memory.fetch(self._index.metadata(far))
        self._index.clean(far)
        self._n_cleaned += 1
        try:
            with meanwhile:
                self.below.write(keys, lines(), freq, last_step)
        except BaseException:
            self._dirty(far, *self.memory.fetch(self._index.metadata(far)))
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
                "window_nbytes": self._window_nbytes + self._work_nbytes,
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
                mine = self.memory.fetch(lease.far)
                held = np.flatnonzero(mine >= 0)
                assert np.array_equal(self._find(lease.near_keys[held]), mine[held]), "a lease has another's line"
                if lease.fetched:
                    rest = lease.rest
                    none = np.setdiff1d(np.flatnonzero(mine < 0), [lease.padding])
                    assert np.array_equal(np.sort(rest.at[(rest.slots < 0) | (rest.slots == AWAY)]), none)
                    assert np.array_equal(lease.near_keys[rest.at], rest.keys), "a lease has other keys"

    def close(self) -> None:
        """Let go of memory, files and locks; what was not committed is discarded. Idempotent."""
        with self._moving, self._lock:
            if not self._closed:
                self._closed = True
                del self._index, self._lines, self._dedupe, self._order
                self._rooms.clear()
                self.below.close()


def _newest(below: Iterator[Chunk], changed: Int64s) -> Iterator[Chunk]:
    """Chunks without rows in the order of the mix, with what has `changed` above since: int64[3, n], keys, frequencies
    and last steps, which may be of keys that are not below.
    """
    changed = changed.take(np.argsort(mixed(changed[0])), axis=1)
    mix, end = mixed(changed[0]), 0
    for chunk in itertools.chain(below, [None]):
        begin, end = end, len(mix)
        columns = changed[:, begin:]
        if chunk is not None:
            end = int(np.searchsorted(mix, mixed(chunk.key[-1:])[0], "right")) if len(chunk.key) else begin
            if begin == end:
                yield chunk
                continue
            columns = np.concatenate([changed[:, begin:end], chunk[:3]], axis=1)  # of two of a key, the newer first
        _, some = np.unique(mixed(columns[0]), return_index=True)  # one of each, in order
        for first in range(0, len(some), CHUNK_ROWS):
            key, freq, last_step = columns.take(some[first : first + CHUNK_ROWS], axis=1)
            nothing = np.empty((len(key), 0), np.float32)
            yield Chunk(key, freq, last_step, nothing, nothing)


_NONE = np.zeros(0, np.int64)
