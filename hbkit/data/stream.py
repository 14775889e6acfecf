"""One epoch: row groups in an order, as one numbered stream of rows, cut into batches and dealt to shards.

::

    row groups  │ file 0, group 0 │ file 0, group 1 │ file 1, group 0 │ ...   permuted by (seed, epoch) if shuffled
    rows        0 . . . . . . . . . . . . . . . . . . . . . . . . . . . ...   numbered after the filter
    windows     │  buffer_rows  │  buffer_rows  │  buffer_rows  │             rows permuted by (seed, epoch, window)
    batches     │  0  │  1  │  2  │  3  │  4  │  5  │  6  │  7  │           batch b belongs to shard b % m

Everything is a function of the files, the filter, the seed, the epoch and the batch size; neither threads nor shards
appear in it. So a row number says exactly where to continue, for any number of shards.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit import errors, ragged
from hbkit._ext import random as _random
from hbkit.data.ahead import in_order, prefetch
from hbkit.data.files import DataFile
from hbkit.data.filter import RowFilter
from hbkit.parquet import Field, RowGroup, Slab, Threads
from hbkit.parquet.decoded import Decoded, read
from hbkit.ragged import Column

__all__ = ["Epoch", "Shuffle", "Stats", "Unit", "random_order"]

log = logging.getLogger("hbkit.data")

SLAB_ROWS = 65_536  # decoded at once, in whole batches or windows
Columns = dict[str, Column]


class Unit(NamedTuple):
    """One row group; ``number`` counts over all files in their order."""

    number: int
    file: DataFile
    row_group: int


class Shuffle(NamedTuple):
    """What fixes a shuffle, with the epoch."""

    seed: int
    buffer_rows: int


class Piece:
    """Consecutive rows of the stream, from number ``start`` on.

    They are those of the one part or, with places, rows of several parts in another order; see `ragged.places`.
    """

    def __init__(self, start: int, n_rows: int, parts: list[Columns], places: ragged.Places | None = None) -> None:
        self.start, self.n_rows, self.parts, self._places = start, n_rows, parts, places

    def rows(self, first: int, last: int) -> Columns:
        """Rows of the stream's numbers first..last-1, clipped to the piece."""
        a, z = max(first - self.start, 0), min(last - self.start, self.n_rows)
        if self._places is None:
            (columns,) = self.parts
            return columns if z - a == self.n_rows else {name: c[a:z] for name, c in columns.items()}
        return {name: self._take(name, a, z) for name in self.parts[0]}

    def shuffled(self, threads: Threads) -> Piece:
        """The same rows, put in their order column by column: while a column is in the cache."""
        names = list(self.parts[0])
        assert self._places is not None
        part, row = self._places
        if part is None and self.n_rows < 2**32:
            row32 = row.astype(np.uint32)
            columns = threads.each(lambda name: ragged.gather(self.parts[0][name], row32), names)
        else:
            columns = threads.each(lambda name: self._take(name, 0, self.n_rows), names)
        return Piece(self.start, self.n_rows, [dict(zip(names, columns, strict=True))])

    def _take(self, name: str, a: int, z: int) -> Column:
        assert self._places is not None
        part, row = self._places
        return ragged.take_from([p[name] for p in self.parts], None if part is None else part[a:z], row[a:z])


def random_order(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of n as a pure function of the key, the same in every version of NumPy.

    The bits of Philox are fixed by its definition; those of ``Generator.permutation`` may change.
    """
    return _random.permutation(np.random.Philox(np.random.SeedSequence(key)).random_raw(n))


class Stats:
    """Counts, safe from several threads."""

    def __init__(self, files_skipped: Sequence[str] = ()) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(n_files_skipped=len(files_skipped))
        self.skipped = list(files_skipped)

    def add(self, name: str, n: int = 1) -> None:
        with self._lock:
            self._counts[name] += n

    def skip(self, what: str, error: Exception) -> None:
        """Count and log something that was dropped."""
        with self._lock:
            self._counts[f"n_{what}_skipped"] += 1
            self.skipped.append(str(error))
        log.warning("skipped a bad %s: %s", what.rstrip("s").replace("_", " "), error)

    def child(self) -> Stats:
        """Fresh counts that remember the files left out when the dataset was made."""
        return Stats(self._files_skipped)

    @property
    def _files_skipped(self) -> list[str]:  # the first: files are opened before row groups are
        return self.skipped[: self._counts["n_files_skipped"]]

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process counts for itself
        return Stats, (self._files_skipped,)


@dataclass(frozen=True)
class Epoch:
    """How to read one epoch; ``batches`` reads it.

    Attributes
    ----------
    units : all row groups, in file order
    fields : what to decode
    shard : (i, m)
    skipped : numbers of row groups known to be bad; grows under ``skip_bad``
    """

    units: Sequence[Unit]
    fields: Sequence[Field]
    batch_size: int
    shard: tuple[int, int]
    filter: RowFilter | None
    shuffle: Shuffle | None
    epoch: int
    n_reads: int
    n_decodes: int
    skip_bad: bool
    skipped: set[int]
    stats: Stats

    def batches(self, start: int) -> Generator[tuple[int, list[Columns], int], None, None]:
        """Number, parts and rows of each batch of this shard, from row ``start`` (a batch boundary) on."""
        with Threads(self.n_decodes) as threads:
            yield from self._batches(start, threads)

    def _batches(self, start: int, threads: Threads) -> Iterator[tuple[int, list[Columns], int]]:
        window = self.shuffle.buffer_rows if self.shuffle else 1
        pieces = self._pieces(start // window * window, threads)
        if self.shuffle:
            pieces = self._windows(pieces, self.shuffle, threads)
        if max(threads.n, self.n_reads) > 1:  # else they would rest while batches are cut and used
            pieces = prefetch(pieces, 1)
        with closing(pieces):
            yield from self._cut(pieces, start)

    def _cut(self, pieces: Iterator[Piece], start: int) -> Iterator[tuple[int, list[Columns], int]]:
        """This shard's batches of pieces, from row ``start`` on."""
        n, m = self.batch_size, self.shard[1]
        parts: list[Columns] = []
        held = b = 0
        for piece in pieces:
            lo, hi = max(piece.start, start), piece.start + piece.n_rows
            for b in range(self._first_batch(lo), -(-hi // n), m):
                first, last = max(b * n, lo), min((b + 1) * n, hi)
                parts.append(piece.rows(first, last))
                held += last - first
                if last == (b + 1) * n:
                    yield b, parts, held
                    parts, held = [], 0
            del piece  # its memory may serve the next one
        if parts:
            yield b, parts, held

    def _first_batch(self, row: int) -> int:
        """The first batch of this shard that ends after ``row``."""
        b, (i, m) = row // self.batch_size, self.shard
        return b + (i - b) % m

    def _mine(self, first: int, last: int) -> bool:
        """Whether this shard has a batch with rows among first..last-1; shuffled, with rows of their windows."""
        if self.shuffle is None:
            return self._first_batch(first) * self.batch_size < last
        size = self.shuffle.buffer_rows
        windows = range(first // size, -(-last // size))
        return any(self._first_batch(w * size) * self.batch_size < (w + 1) * size for w in windows)

    def _order(self) -> list[Unit]:
        if self.shuffle is None:
            return list(self.units)
        return [self.units[i] for i in random_order(len(self.units), self.shuffle.seed, self.epoch, 0)]

    def count(self, unit: Unit) -> int:
        """Rows of the row group in the stream."""
        if unit.number in self.skipped:
            return 0
        if self.filter is None:
            return unit.file.row_group_rows[unit.row_group]
        try:
            return self.filter.count(unit.file, unit.row_group)
        except errors.Corrupt as e:
            self._drop(unit, e)
            return 0

    def _drop(self, unit: Unit, e: errors.Corrupt) -> None:
        if not self.skip_bad:
            raise e
        self.skipped.add(unit.number)
        self.stats.skip("row_groups", e)

    def _pieces(self, start: int, threads: Threads) -> Generator[Piece, None, None]:
        """The rows from ``start`` on in slabs, without those that this shard does not need."""
        order, at = self._order(), 0
        while order and at < start and at + (n := self.count(order[0])) <= start:
            at += n
            del order[0]
        # Row numbers depend on what decodes, and on the filter: only without both are they known beforehand.
        known = self.filter is None and not self.skip_bad

        def jobs() -> Iterator[Callable[[], _Read]]:
            row = at
            for unit in order:
                n = self.count(unit) if known else 0
                if not known:
                    yield partial(self._read, unit, 0, threads)
                elif self._mine(max(row, start), row + n):
                    yield partial(self._read, unit, max(start - row, 0), threads)
                else:
                    yield partial(_Read, unit, n)
                row += n

        # of a remote file, the next row group's bytes are fetched while this one's are decoded
        ahead = self.n_reads if self.n_reads > 1 else int(any(u.file.remote for u in order))
        whole, left = self._whole(), sum(u.file.row_group_rows[u.row_group] for u in order)
        size = max(1, SLAB_ROWS // whole) * whole
        slab: Slab | None = None
        begun = upto = at
        for found in in_order(jobs(), ahead):
            if found.bad is not None:
                self._drop(found.unit, found.bad)
            row, end = at + found.first, at + found.n_rows
            while found.group is not None and row < end:
                if slab is not None and row != upto:  # what lies between belongs to others
                    yield Piece(begun, upto - begun, [slab.finish()])
                    slab = None
                # what the row group before left unfinished is finished first
                n = min(size - row % size if slab is None else whole - row % whole, end - row)
                if self._reads_whole and slab is None and row + n == end:  # only what must be is joined by copying
                    n = max((row + n) // whole * whole - row, 0) or n
                n_stored, rows = found.step(n, row + n == end)
                if row + n > start and self._mine(max(row, start), row + n):
                    if slab is None:
                        slab, begun = Slab(min(size, left)), row
                    found.group.add_to(slab, n_stored, rows)
                    upto = row + n
                else:
                    found.group.skip(n_stored)
                row += n
                if slab is not None and row % whole == 0:
                    yield Piece(begun, upto - begun, [slab.finish()])
                    slab = None
            at = end
            left -= found.unit.file.row_group_rows[found.unit.row_group]
        if slab is not None:
            yield Piece(begun, upto - begun, [slab.finish()])

    def _read(self, unit: Unit, first: int, threads: Threads) -> _Read:
        """The row group from its row ``first`` on; or the error that makes it bad."""
        file, g = unit.file, unit.row_group
        n = file.row_group_rows[g]
        if unit.number in self.skipped:
            return _Read(unit, 0)
        try:
            mask = None
            if self.filter is not None:
                mask = self.filter.mask(file, g)
                n = 0 if mask is None else int(np.count_nonzero(mask))
            if n == 0:
                self.stats.add("n_row_groups_pruned", int(file.row_group_rows[g] > 0))
                return _Read(unit, 0)
            group = file.open_row_group(g, self.fields, threads)
            if first:
                group.skip(first)
            # in this thread; or first, since a bad row group is dropped whole
            if self._reads_whole:
                group, mask = Decoded(read(group, file.row_group_rows[g] - first, mask)), None
        except errors.Corrupt as e:
            return _Read(unit, 0, bad=e)
        self.stats.add("n_row_groups_read")
        return _Read(unit, n, first, group, mask)

    @property
    def _reads_whole(self) -> bool:
        """Whether a row group is decoded whole before any of its rows are used."""
        return self.n_reads > 1 or self.skip_bad

    def _whole(self) -> int:
        """Rows of a batch, or of a shuffle's window: what is to be one piece of memory."""
        return self.shuffle.buffer_rows if self.shuffle else self.batch_size

    def _windows(self, pieces: Iterator[Piece], shuffle: Shuffle, threads: Threads) -> Generator[Piece, None, None]:
        """The stream cut into windows and shuffled within each; windows without rows of this shard are left out."""
        size, parts, sizes, current = shuffle.buffer_rows, list[Columns](), list[int](), 0

        def window() -> Piece:
            order = random_order(sum(sizes), shuffle.seed, self.epoch, current + 1)
            piece = Piece(current * size, len(order), parts, ragged.places(sizes, order))
            return piece.shuffled(threads) if self.shard[1] == 1 else piece

        for piece in pieces:
            for w in range(piece.start // size, -(-(piece.start + piece.n_rows) // size)):
                if not self._mine(w * size, (w + 1) * size):
                    continue
                first, last = max(w * size, piece.start), min((w + 1) * size, piece.start + piece.n_rows)
                current = w
                parts.append(piece.rows(first, last))
                sizes.append(last - first)
                if last == (w + 1) * size:
                    yield window()
                    parts, sizes = [], []
        if parts:
            yield window()


class _Read:
    """What became of a row group: its rows in the stream, of which the first ``first`` are stepped over already."""

    def __init__(
        self,
        unit: Unit,
        n_rows: int,
        first: int = 0,
        group: RowGroup | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        bad: errors.Corrupt | None = None,
    ) -> None:
        self.unit, self.n_rows, self.first, self.group, self.bad = unit, n_rows, first, group, bad
        self._mask, self._kept = mask, None if mask is None else np.flatnonzero(mask)
        self._n_kept = self._at = 0  # rows of the stream, and stored rows, so far

    def step(self, n: int, is_last: bool) -> tuple[int, npt.NDArray[np.bool_] | None]:
        """How many stored rows hold the next n rows of the stream, and which of them these are (None: all)."""
        if self._mask is None or self._kept is None:
            return n, None
        first, self._n_kept = self._at, self._n_kept + n
        self._at = len(self._mask) if is_last else int(self._kept[self._n_kept - 1]) + 1
        return self._at - first, None if self._at - first == n else self._mask[first : self._at]
