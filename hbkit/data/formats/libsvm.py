"""libsvm and libffm: sparse features as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit.data.formats.input import (
    Advance,
    Batches,
    Input,
    Malformed,
    all_true,
    cast,
    line_blocks,
    list_array,
    pairs_of,
    parsed,
    whole_numbers,
    words_of,
)

__all__ = ["LibFfm", "LibSvm"]


class LibSvm(Input):
    """``label [qid:n] index:value ...``: ragged columns ``index`` and ``value``, indices as they are written.

    ``label`` is float32, or a list where any line of the files has several (``1,0``); ``qid`` is there where any
    line has one. Indices must increase within a line, as the format demands, except in ranking data (lines with
    ``qid:``), whose writers do not sort, or with ``unsorted``.
    """

    N_PARTS = 2
    SHAPE = "index:value"

    def __init__(self, files: Sequence[str], unsorted: bool = False) -> None:
        super().__init__(files)
        self._unsorted = unsorted
        self._multilabel = self._qid = False

    def scan(self, advance: Advance) -> None:
        self.n_rows = 0
        for path in self.files:
            for _, lines in line_blocks(path, advance):
                words, splits = words_of(lines)
                self.n_rows += len(splits) - 1
                first = words.take(pa.array(splits[:-1]))
                self._multilabel |= bool(pc.any(pc.match_substring(first, ",")).as_py())
                self._qid |= bool(pc.any(pc.starts_with(words, "qid:")).as_py())
        label = pa.list_(pa.float32()) if self._multilabel else pa.float32()
        self.schema = pa.schema(
            [
                ("label", label),
                *([("qid", pa.int64())] if self._qid else []),
                *([("field", pa.list_(pa.int64()))] if self.N_PARTS == 3 else []),
                ("index", pa.list_(pa.int64())),
                ("value", pa.list_(pa.float32())),
            ]
        )

    def batches(self, advance: Advance) -> Batches:
        for path in self.files:
            for line, lines in line_blocks(path, advance):
                yield parsed(path, line, lines, self._parse)

    def _parse(self, lines: pa.StringArray) -> pa.RecordBatch:
        words, splits = words_of(lines)
        starts, n = splits[:-1], len(splits) - 1
        is_feature = np.ones(len(words), bool)
        labelled = ~np.asarray(pc.match_substring(words.take(pa.array(starts)), ":").to_numpy(False), bool)
        if not self._multilabel and not labelled.all():
            raise Malformed("the line has no label", "begin each line with its label")
        is_feature[starts[labelled]] = False
        columns = [self._labels(words.take(pa.array(starts[labelled])), labelled)]

        ranked = np.zeros(n, bool)
        if self._qid:
            second = starts + labelled
            has_second = second < splits[1:]
            text = words.take(pa.array(np.where(has_second, second, 0)))
            ranked = has_second & np.asarray(pc.starts_with(text, "qid:").to_numpy(False), bool)
            is_feature[second[ranked]] = False
            numbers = whole_numbers(pc.utf8_slice_codeunits(text.filter(pa.array(ranked)), 4), pa.int64(), "qid")
            at = np.cumsum(ranked) - 1
            columns.append(numbers.take(pa.array(at, mask=~ranked)))

        feature_splits = np.concatenate([[0], np.cumsum(is_feature)])[splits]
        *names, values = pairs_of(words.filter(pa.array(is_feature)), self.N_PARTS, self.SHAPE)
        for what, part in zip(("field", "index")[-len(names) :], names, strict=True):
            column = whole_numbers(part, pa.int64(), what)
            columns.append(list_array(column, feature_splits))
        if self.N_PARTS == 2 and not self._unsorted:
            index = column.to_numpy()
            rows = np.repeat(np.arange(n), np.diff(feature_splits))
            wrong = (index[1:] <= index[:-1]) & (rows[1:] == rows[:-1]) & ~ranked[rows[1:]]
            if wrong.any():
                a = int(np.flatnonzero(wrong)[0])
                raise Malformed(f"index {index[a + 1]} follows {index[a]}", "sort the line, or pass --unsorted")
        columns.append(list_array(cast(values, pa.float32(), "value"), feature_splits))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _labels(self, text: pa.StringArray, labelled: npt.NDArray[np.bool_]) -> Any:
        if not self._multilabel:
            return self._numbers(text)
        parts = pc.split_pattern(text, ",")
        n = np.zeros(len(labelled), np.int64)
        n[labelled] = pc.list_value_length(parts).to_numpy()
        return list_array(self._numbers(parts.flatten()), np.concatenate([[0], np.cumsum(n)]))

    @staticmethod
    def _numbers(text: pa.StringArray) -> Any:
        numbers = cast(pc.ascii_ltrim(text, "+"), pa.float32(), "label")
        if not all_true(pc.is_finite(numbers)):
            raise Malformed("a label is not finite")
        return numbers


class LibFfm(LibSvm):
    """``label field:index:value ...``: as libsvm, with a third ragged column ``field``, and in any order."""

    N_PARTS = 3
    SHAPE = "field:index:value"
