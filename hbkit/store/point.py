"""Points: the rows of a store as of one instant, read in key order while the store goes on.

Taking a point copies nothing. From then on, a row that is about to change for the first time, or to be erased, has its
line set aside before, unless it was read already; rows made since do not belong to the point. So each of the point's
rows is either as it was then, or set aside, and the store says which, under its lock:

    store: keys that may belong ──▶ in parts, in order ──▶ rows that are as they were ──▶ and those set aside ──▶ chunks

The store reads rows without holding up its updates: what is found set aside after the reading was read in vain.

If a line cannot be set aside (no memory, no room for the file), the point has failed: its reader is told so, and the
store goes on as if there were none.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext.index import Index
from hbkit.store.changes import Mark
from hbkit.store.line import Chunk, Float32s, Int64s, Layout

MEMORY_NBYTES = 64 << 20  # of lines set aside; more go to a file
READ_ROWS = 8192  # that are read at once


class Aside:
    """Lines set aside, by key: in memory up to `MEMORY_NBYTES`, then in a temporary file, which has no name.

    Parameters
    ----------
    width : int
        Floats of a line.
    directory : Path, optional
        Where the file is made; the system's temporary directory when left out.

    Notes
    -----
    The places of lines that are dropped are used again. Beside the lines, a key takes about 20 bytes. One thread adds
    while another reads and drops.
    """

    def __init__(self, width: int, directory: Path | None = None) -> None:
        self._width, self._directory = width, directory
        self._index = Index()
        # The line's bits, frequency, last step. Pages are taken as they are used.
        self._memory = np.empty((max(1, MEMORY_NBYTES // (4 * (width + 2))), width + 2), np.uint32)
        self._file: Any = None
        self._closed = False

    def add(self, keys: Int64s, freq: Int64s, last_step: Int64s, lines: Float32s) -> None:
        """Set lines aside: float32[n, width], with frequency and last step below 2**32. Nothing once it is closed."""
        if self._closed:
            return
        records = np.empty((len(keys), self._width + 2), np.uint32)
        records[:, : self._width] = lines.view(np.uint32)
        records[:, self._width], records[:, self._width + 1] = freq, last_step
        places, _ = self._index.find_or_insert(keys)
        near = places < len(self._memory)
        self._memory[places[near]] = records[near]
        if not near.all():
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 closed by `close`
            for some, offset in self._runs(places, ~near):
                data = memoryview(records[some].tobytes())
                while data:
                    n = os.pwrite(self._file.fileno(), data, offset)
                    data, offset = data[n:], offset + n

    def _runs(self, places: Int64s, far: npt.NDArray[np.bool_]) -> Iterator[tuple[Int64s, int]]:
        """Positions whose places in the file follow each other, and the offset of the first."""
        order = np.flatnonzero(far)
        order = order[np.argsort(places[order], kind="stable")]
        for some in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1):  # 0 where a key is given twice
            if len(some):
                yield some, int(places[some[0]] - len(self._memory)) * self._memory.strides[0]

    def find(self, keys: Int64s) -> Int64s:
        """Places of keys, -1 for what was not set aside: int64[n]."""
        places: Int64s = self._index.find(keys)
        return places

    def keys(self) -> Int64s:
        """All keys, in no order that matters."""
        keys: Int64s = self._index.part(0, 2**64 - 1)
        return keys

    def read(self, places: Int64s) -> tuple[Int64s, Int64s, Float32s]:
        """Frequency, last step and line at places: int64[n], int64[n], float32[n, width]."""
        records = np.empty((len(places), self._width + 2), np.uint32)
        near = places < len(self._memory)
        records[near] = self._memory[places[near]]
        for some, offset in self._runs(places, ~near):
            data = os.pread(self._file.fileno(), len(some) * self._memory.strides[0], offset)
            records[some] = np.frombuffer(data, np.uint32).reshape(len(some), -1)
        freq, last_step = records[:, self._width].astype(np.int64), records[:, self._width + 1].astype(np.int64)
        return freq, last_step, records[:, : self._width].view(np.float32)

    def drop(self, keys: Int64s) -> None:
        """Let go of lines."""
        self._index.erase(keys)

    def close(self) -> None:
        """Let go of memory and file. Idempotent."""
        self._closed = True
        self._index, self._memory = Index(), self._memory[:0].copy()
        if self._file is not None:
            self._file.close()
            self._file = None


class InPlace(NamedTuple):
    """What a store finds of some keys: which rows are as they were at the point, and those rows.

    Attributes
    ----------
    there : bool[n]
        Elsewhere, the other columns hold anything.
    freq, last_step : int64[n]
    lines : float32[n, width]
    """

    there: npt.NDArray[np.bool_]
    freq: Int64s
    last_step: Int64s
    lines: Float32s


class Source(Protocol):
    """What a point asks of its store."""

    layout: Layout

    def point_keys(self, point: Any) -> Iterator[Int64s]:
        """Keys in order, among them all of the point's: ascending pieces, one after the other."""
        ...

    def point_rows(self, point: Any, keys: Int64s) -> InPlace:
        """Rows of some of these keys that are as they were; they count as read from then on."""
        ...

    def point_ended(self, point: Any) -> None:
        """No line needs to be set aside for it any more. Called once."""
        ...


class Point:
    """Rows of one store as of the instant when it was made; `scan` once, then `close`.

    Attributes
    ----------
    n_rows : int
        Rows of the store then.
    changed : bool
        Whether only rows changed since a mark belong to it.
    erased : int64[m]
        Keys, ascending, that may have had a row at that mark and had none at the point.
    mark : Mark
        Of the instant.
    kept : object
        What was to be read at the same instant, see `Store.point`.
    then : callable, optional
        Called once, when the store may take another one.

    Notes
    -----
    Memory: 64 MiB of lines set aside; beyond that, about 20 bytes for each, and the file. The keys of the point, 8
    bytes each (in tiers with rows on disk, those changed since the mark, or some million at a time).
    """

    def __init__(
        self,
        source: Source,
        n_rows: int,
        latest_step: int,
        erased: Int64s | None,
        mark: Mark,
        kept: Any,
        directory: Path | None,
    ) -> None:
        self.n_rows, self.changed, self.mark, self.kept = n_rows, erased is not None, mark, kept
        self.erased: Int64s = np.zeros(0, np.int64) if erased is None else erased
        self.aside = Aside(source.layout.width, directory)
        self._source, self._latest = source, latest_step
        self._ended = threading.Lock()
        self.then: Callable[[], None] | None = None
        self._failure: BaseException | None = None

    def fail(self, failure: BaseException) -> None:
        """The rows of the point can no more be told."""
        self._failure = self._failure or failure
        self._end()

    def _end(self) -> None:
        if self._ended.acquire(blocking=False):
            self._source.point_ended(self)
            if self.then is not None:
                self.then()

    def scan(self) -> Iterator[Chunk]:
        """Rows in key order. Raises what `fail` was given."""
        for piece in self._source.point_keys(self):
            for first in range(0, len(piece), READ_ROWS):
                chunk = self._chunk(piece[first : first + READ_ROWS])
                if len(chunk.key):
                    yield chunk
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _chunk(self, keys: Int64s) -> Chunk:
        self._check()
        found, freq, last_step, lines = self._source.point_rows(self, keys)
        apart = np.flatnonzero(~found)
        if len(apart):
            places = self.aside.find(keys[apart])
            apart, places = apart[places >= 0], places[places >= 0]
            freq[apart], last_step[apart], lines[apart] = self.aside.read(places)
            self.aside.drop(keys[apart])
            found[apart] = True
        self._check()  # what was just read may have failed to be set aside
        if not self._source.layout.metadata:
            freq[:], last_step[:] = 0, self._latest
        if not found.all():
            keys, freq, last_step, lines = keys[found], freq[found], last_step[found], lines[found]
        dim = self._source.layout.dim
        return Chunk(keys, freq, last_step, lines[:, :dim], lines[:, dim:])

    def close(self) -> None:
        """Let go of what was set aside. Idempotent."""
        self._end()
        self.aside.close()
