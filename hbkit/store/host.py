"""The host tier: every row in memory, an index over slabs that never move."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbkit._ext.index import Index
from hbkit._ext.slabs import Slabs
from hbkit.errors import SchemaMismatch
from hbkit.store.base import CHUNK_ROWS, Chunk, Float32s, Int64s, Layout, Lease, Rule


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
    One lock orders all operations: look-ahead may reserve while a step runs. Kernels release the GIL.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._index = Index()
        self._slabs = Slabs(layout.width)
        self._freq = np.zeros(0, np.int64)
        self._last_step = np.zeros(0, np.int64)
        self._version = 0  # changes whenever a key comes or goes: leases made before must look again
        self._n_ignored = 0
        self._n_commits = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._index)

    def reserve(self, keys: Int64s, counts: Int64s) -> Lease:
        """Find the rows of distinct keys; nothing moves in this tier."""
        with self._lock:
            return Lease(keys, self._index.find(keys), counts, version=self._version)

    def _refresh(self, lease: Lease) -> None:
        if lease.version != self._version:
            lease.slots, lease.version = self._index.find(lease.keys), self._version

    def _insert(self, keys: Int64s) -> Int64s:
        """Slots of keys, with room for lines and metadata made before the index changes."""
        need = self._index.n_slots + len(keys)
        self._slabs.reserve(need)
        if need > len(self._freq):
            room = max(need, 2 * len(self._freq), 1024)
            freq, last_step = np.zeros(room, np.int64), np.zeros(room, np.int64)
            freq[: len(self._freq)], last_step[: len(self._last_step)] = self._freq, self._last_step
            self._freq, self._last_step = freq, last_step
        slots, _ = self._index.find_or_insert(keys)
        self._version += 1
        return slots

    def create(self, lease: Lease, step: int) -> int:
        """Make the lease's absent, admitted rows, count its keys, stamp them with `step`; rows made."""
        with self._lock:
            self._refresh(lease)
            missing = lease.slots < 0
            if lease.admitted is not None:
                missing &= lease.admitted
            n_new = int(np.count_nonzero(missing))
            if n_new:
                keys = lease.keys[missing]
                lines = self.layout.new_lines(keys)
                slots = self._insert(keys)
                self._slabs.scatter(slots, lines)
                self._freq[slots] = 0
                lease.slots[missing], lease.version = slots, self._version
            held = lease.slots >= 0
            slots = lease.slots[held]
            self._freq[slots] += lease.counts[held]
            self._last_step[slots] = step
            return n_new

    def gather(self, lease: Lease, out: Float32s) -> None:
        """Copy rows to ``out[u, dim]``; zeros where a key is absent."""
        with self._lock:
            self._refresh(lease)
            self._slabs.gather(lease.slots, out)

    def apply(self, lease: Lease, grads: Float32s, rule: Rule, hyper: Float32s, step: int) -> int:
        """One optimizer step in place; how many of the keys were absent and ignored."""
        with self._lock:
            self._refresh(lease)
            self._slabs.apply(rule.code, lease.slots, grads, hyper)
            held = lease.slots >= 0
            self._last_step[lease.slots[held]] = step
            ignored = len(held) - int(np.count_nonzero(held))
            self._n_ignored += ignored
            return ignored

    def release(self, lease: Lease) -> None:
        """Nothing is pinned in this tier."""

    def erase(self, keys: Int64s) -> int:
        """Remove keys with their state; how many were there."""
        with self._lock:
            self._version += 1
            return int(np.count_nonzero(self._index.erase(keys) >= 0))

    def scan(self, since: int | None = None) -> Iterator[Chunk]:
        """All lines, or those stamped after step `since`, in key order.

        The keys are those of the moment the scan begins; a row changed or erased meanwhile is read as it is then.
        """
        with self._lock:
            keys, slots = self._index.items()
            if since is not None:
                changed = self._last_step[slots] > since
                keys = keys[changed]
            keys = np.sort(keys)
        dim = self.layout.dim
        for first in range(0, len(keys), CHUNK_ROWS):
            part = keys[first : first + CHUNK_ROWS]
            with self._lock:
                slots = self._index.find(part)
                held = slots >= 0
                part, slots = part[held], slots[held]
                lines = np.empty((len(part), self.layout.width), np.float32)
                self._slabs.gather(slots, lines)
                freq, last_step = self._freq[slots], self._last_step[slots]
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
        with self._lock:
            slots = self._insert(np.ascontiguousarray(chunk.key, np.int64))
            self._slabs.scatter(slots, np.concatenate([chunk.row, chunk.state], axis=1, dtype=np.float32))
            self._freq[slots], self._last_step[slots] = chunk.freq, chunk.last_step

    def commit(self) -> str:
        """Memory is as durable as this process: only a number is given out. Use `hbkit.snapshot` to keep the rows."""
        self._n_commits += 1
        return str(self._n_commits)

    def latest_step(self) -> int:
        """Largest step that a row was stamped with, 0 for none."""
        with self._lock:
            return int(self._last_step.max(initial=0))

    def stats(self) -> dict[str, Any]:
        """Rows and bytes held, keys ignored by updates."""
        with self._lock:
            return {
                "tier": "host",
                "rows": len(self._index),
                "index_nbytes": self._index.nbytes,
                "lines_nbytes": self._slabs.nbytes,
                "metadata_nbytes": self._freq.nbytes + self._last_step.nbytes,
                "ignored_updates": self._n_ignored,
            }

    def validate(self) -> None:
        """Recount everything; AssertionError where the store contradicts itself. For tests."""
        with self._lock:
            self._index.validate()
            assert self._index.n_slots <= self._slabs.capacity, "a slot has no line"
            assert self._index.n_slots <= len(self._freq) == len(self._last_step), "a slot has no metadata"

    def close(self) -> None:
        """Nothing but memory is held: it goes with the object."""
