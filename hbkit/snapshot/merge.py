"""The rows that a chain of commits comes to, in key order, without holding the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hbkit.errors import Corrupt
from hbkit.snapshot import rows
from hbkit.snapshot.files import RESTORE
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest
from hbkit.store.line import CHUNK_ROWS, Chunk, Int64s


class Part(NamedTuple):
    """Lines, or keys that are erased; they ascend.

    Attributes
    ----------
    key : int64[n]
    lines : Chunk or None
    """

    key: Int64s
    lines: Chunk | None

    def cut(self, first: int, last: int) -> Part:
        """Entries ``first:last``."""
        lines = None if self.lines is None else Chunk._make(column[first:last] for column in self.lines)
        return Part(self.key[first:last], lines)


class _Run:
    """Parts that ascend, one at a time."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = (part for part in parts if len(part.key))
        self._part = next(self._parts, _END)
        self._at = 0

    @property
    def last(self) -> int | None:
        """Last key at hand; None at the end."""
        return int(self._part.key[-1]) if len(self._part.key) else None

    def take(self, last: int) -> Part:
        """What is at hand and has keys of at most `last`."""
        first, self._at = self._at, int(np.searchsorted(self._part.key, last, side="right"))
        part = self._part.cut(first, self._at)
        if self._at == len(self._part.key):
            self._part, self._at = next(self._parts, _END), 0
        return part


def side_by_side(runs: Iterable[Iterable[Part]]) -> Iterator[list[Part]]:
    """Pass over several runs at once: a part of each, of keys that no other part of its run has in between.

    Holds one part of each run; what it yields may be views of them.
    """
    at_hand = [_Run(run) for run in runs]
    while ends := [run.last for run in at_hand if run.last is not None]:
        last = min(ends)  # no run goes on below it, and one part ends there
        yield [run.take(last) for run in at_hand]


def merged(history: History, chain: list[Manifest], table: str) -> Iterator[Chunk]:
    """Lines of a table as of the last commit of `chain`, in key order.

    Yields
    ------
    Chunk
        Of any size up to a row group of every file together. Of each file, this holds some row groups in memory, of at
        most 32 MiB and 65,536 rows; and all keys that the chain erases.

    Raises
    ------
    Corrupt
        A file is not what its manifest says. What was yielded is right if all comes without an error.
    """
    runs: list[Iterable[Part]] = []  # from old to new
    for manifest in chain:
        entry = manifest.tables[table]
        for file in entry.erased:
            runs.append([Part(rows.read_keys(history.place, file, entry), None)])
        for file in entry.rows:
            parts: Iterable[Part] = (Part(chunk.key, chunk) for chunk in rows.read_rows(history.place, file, entry))
            # A small file is read at once: chains are long, and a file that is open has threads.
            runs.append(list(parts) if file.n_rows <= CHUNK_ROWS else parts)
    n = 0
    for parts in side_by_side(runs):
        chunk = _newest([part for part in parts if len(part.key)])
        n += len(chunk.key)
        yield chunk
    if n != (said := chain[-1].tables[table].n_rows):
        raise Corrupt(
            f"commit {chain[-1].commit} has {n} rows, its manifest says {said}",
            file=history.place.where(f"{chain[-1].commit}.json"),
            table=table,
            remedy=RESTORE,
        )


def _newest(parts: list[Part]) -> Chunk:
    """Of each key the line of the last part that has it, unless that erases it."""
    if len(parts) == 1 and parts[0].lines is not None:
        return parts[0].lines
    keys = np.concatenate([part.key for part in parts])
    order = np.argsort(keys, kind="stable")  # linear: each part ascends
    keys = keys[order]
    order = order[np.append(keys[1:] != keys[:-1], True)]
    # Positions among the lines alone; those of erased keys fall out.
    is_line = np.concatenate([np.full(len(part.key), part.lines is not None) for part in parts])
    order = (np.cumsum(is_line) - 1)[order[is_line[order]]]
    lines = [part.lines for part in parts if part.lines is not None]
    if not lines:
        return _NO_LINES
    return Chunk._make(np.take(np.concatenate(columns), order, axis=0) for columns in zip(*lines, strict=True))


_NO_LINES = Chunk(*(np.zeros(0, np.int64),) * 3, *(np.zeros((0, 0), np.float32),) * 2)
_END = Part(np.zeros(0, np.int64), None)
