"""Sequence files: what each user did, one line a user."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hbkit.data.formats.input import Advance, Batches, Input, line_blocks, list_array, parsed, whole_numbers, words_of

__all__ = ["Sequences"]


class Sequences(Input):
    """``user item item item ...``: columns ``user`` (int64) and ``items`` (a list of int64, in the order written)."""

    schema = pa.schema([("user", pa.int64()), ("items", pa.list_(pa.int64()))])

    must_scan = False

    def scan(self, advance: Advance) -> None:
        self.n_rows = 0
        for path in self.files:
            for _, lines in line_blocks(path, advance):
                self.n_rows += len(words_of(lines)[1]) - 1

    def batches(self, advance: Advance) -> Batches:
        for path in self.files:
            for line, lines in line_blocks(path, advance):
                yield parsed(path, line, lines, self._parse)

    def _parse(self, lines: pa.StringArray) -> pa.RecordBatch:
        words, splits = words_of(lines)
        is_item = np.ones(len(words), bool)
        is_item[splits[:-1]] = False
        user = whole_numbers(words.take(pa.array(splits[:-1])), pa.int64(), "user")
        items = whole_numbers(words.filter(pa.array(is_item)), pa.int64(), "item")
        row_splits = np.concatenate([[0], np.cumsum(is_item)])[splits]
        return pa.RecordBatch.from_arrays([user, list_array(items, row_splits)], schema=self.schema)
