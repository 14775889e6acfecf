"""Slot files: the keys of each row with the slots they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data.formats.input import (
    Advance,
    Batches,
    Input,
    line_blocks,
    list_array,
    pairs_of,
    parsed,
    whole_numbers,
    words_of,
)

__all__ = ["Slot"]

MAX_SLOTS = 10_000
SLOT_CELLS = 1 << 24


class Slot(Input):
    """``key:slot key:slot ...`` with numbered slots, or ``slot:key ...`` with named ones: a list column for each slot.

    Keys are uint64: they may lie above 2**63. Slot 1, or the one named ``label``, is held to be the label; the
    column of a numbered slot is called ``slot_N``.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files)
        self._slots = pa.array([], pa.string())
        self._named = False

    def scan(self, advance: Advance) -> None:
        self.n_rows = 0
        found: list[dict[str, None]] = [{}, {}]  # what stands left and right of the colons, in order of appearance
        for path in self.files:
            for line, lines in line_blocks(path, advance):
                n, *sides = parsed(path, line, lines, self._distinct)
                self.n_rows += n
                for names, more in zip(found, sides, strict=True):
                    if len(names) <= MAX_SLOTS:
                        names.update(dict.fromkeys(more.to_pylist()))
        self._named = not all(re.match(r"-?[0-9]", key) for key in found[0])
        slots = list(found[0] if self._named else found[1])
        if len(slots) > MAX_SLOTS:
            raise errors.Unsupported(
                f"more than {MAX_SLOTS} slots", remedy="is this a slot file? name its --format", file=self.files[0]
            )
        if not self._named and all(name.isdecimal() for name in slots):
            slots.sort(key=int)
        self._slots = pa.array(slots, pa.string())
        columns = slots if self._named else [f"slot_{name}" for name in slots]
        self.label = next((name for name in ("label", "slot_1") if name in columns), None)
        self.schema = pa.schema([(name, pa.list_(pa.uint64())) for name in columns])

    @staticmethod
    def _distinct(lines: pa.StringArray) -> tuple[int, pa.StringArray, pa.StringArray]:
        words, splits = words_of(lines)
        left, right = pairs_of(words, 2, "key:slot")
        return len(splits) - 1, left.unique(), right.unique()

    def batches(self, advance: Advance) -> Batches:
        step = max(1, SLOT_CELLS // max(1, len(self._slots)))  # rows x slots are counted at once
        for path in self.files:
            for line, lines in line_blocks(path, advance):
                for i in range(0, len(lines), step):
                    yield parsed(path, line + i, lines[i : i + step], self._parse)

    def _parse(self, lines: pa.StringArray) -> pa.RecordBatch:
        words, splits = words_of(lines)
        pairs = pairs_of(words, 2, "key:slot")
        slots, keys = pairs if self._named else pairs[::-1]
        return pa.RecordBatch.from_arrays(slot_lists(self._slots, slots, keys, splits), schema=self.schema)


def slot_lists(known: pa.StringArray, slots: Any, keys: Any, splits: npt.NDArray[np.int64]) -> list[pa.ListArray]:
    """The pairs of each row, ``splits[i] .. splits[i + 1]``, as one column of lists for each known slot."""
    n = len(splits) - 1
    keys = whole_numbers(keys, pa.uint64(), "key")
    cell = pc.index_in(slots, known).to_numpy().astype(np.int64) * n + np.repeat(np.arange(n), np.diff(splits))
    keys = keys.take(pa.array(np.argsort(cell, kind="stable")))
    ends = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=n * len(known)))])
    columns = []
    for s in range(len(known)):
        row_splits = ends[s * n : (s + 1) * n + 1]
        columns.append(list_array(keys[row_splits[0] : row_splits[-1]], row_splits - row_splits[0]))
    return columns
