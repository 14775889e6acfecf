"""The rows that a chain of commits comes to, in key order, without holding the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hbkit.errors import Corrupt
from hbkit.snapshot import rows
from hbkit.snapshot.files import RESTORE
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest
from hbkit.store.base import Chunk, Int64s


class _Part(NamedTuple):
    """Lines, or keys that are erased, of one file; both ascend."""

    key: Int64s
    lines: Chunk | None

    def upto(self, last: int) -> tuple[_Part, _Part]:
        """What has keys of at most `last`, and what is left."""
        n = int(np.searchsorted(self.key, last, side="right"))
        if n == len(self.key):
            return self, self._slice(n, n)
        return self._slice(0, n), self._slice(n, len(self.key))

    def _slice(self, first: int, last: int) -> _Part:
        lines = None if self.lines is None else Chunk._make(column[first:last] for column in self.lines)
        return _Part(self.key[first:last], lines)


class _Run:
    """The parts of one file, one at a time."""

    def __init__(self, parts: Iterator[_Part]) -> None:
        self._parts = parts
        self._held: _Part | None = None
        self._fill()

    def _fill(self) -> None:
        while self._held is None or not len(self._held.key):
            self._held = next(self._parts, None)
            if self._held is None:
                return

    @property
    def last(self) -> int | None:
        """Last key at hand; None at the end."""
        return None if self._held is None else int(self._held.key[-1])

    def take(self, last: int) -> _Part:
        """What is at hand and has keys of at most `last`."""
        assert self._held is not None
        part, self._held = self._held.upto(last)
        self._fill()
        return part


def merged(history: History, chain: list[Manifest], table: str) -> Iterator[Chunk]:
    """Lines of a table as of the last commit of `chain`, in key order.

    Yields
    ------
    Chunk
        Of any size up to a row group of every file together, which is about what this holds in memory, beside the keys
        that the chain erases.

    Raises
    ------
    Corrupt
        The files do not fit their manifests. Their checksums are the caller's to check.
    """
    runs: list[_Run] = []  # from old to new
    for manifest in chain:
        entry = manifest.tables[table]
        for file in entry.erased:
            runs.append(_Run(iter([_Part(rows.read_keys(history.root, file, entry), None)])))
        for file in entry.rows:
            runs.append(_Run(_Part(chunk.key, chunk) for chunk in rows.read_rows(history.root, file, entry)))
    n = 0
    while runs := [run for run in runs if run.last is not None]:
        # No run goes on below the least of these keys, and one ends there.
        last = min(run.last for run in runs if run.last is not None)
        chunk = _newest([part for part in (run.take(last) for run in runs) if len(part.key)])
        n += len(chunk.key)
        yield chunk
    if n != (said := chain[-1].tables[table].n_rows):
        raise Corrupt(
            f"commit {chain[-1].commit} has {n} rows, its manifest says {said}",
            file=str(history.root / f"{chain[-1].commit}.json"),
            table=table,
            remedy=RESTORE,
        )


def _newest(parts: list[_Part]) -> Chunk:
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
    return Chunk._make(
        np.take(np.concatenate(columns), order, axis=0) for columns in zip(*(lines or [_NONE]), strict=True)
    )


_NONE = Chunk(*(np.zeros(0, np.int64),) * 3, *(np.zeros((0, 0), np.float32),) * 2)
