"""Ali-CCP, clicks and purchases of one impression each, in the joined form that PaddleRec's ESMM reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data.formats import slot
from hbkit.data.formats.input import (
    Advance,
    Batches,
    Input,
    Malformed,
    all_true,
    line_blocks,
    natural,
    pairs_of,
    parsed,
    whole_numbers,
)

__all__ = ["AliCcp"]

SHAPE = "id,click,buy,slot:key,..."


class AliCcp(Input):
    """``id,click,buy,slot:key,slot:key,...``: those three as int64, and a list column ``slot_N`` for each slot.

    Keys are uint64. ``click`` and ``buy`` are both labels; neither is renamed unless it is named as the ``label``.
    """

    HEAD = ("id", "click", "buy")

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files)
        self._slots = pa.array([], pa.string())

    def scan(self, advance: Advance) -> None:
        self.n_rows = 0
        found: set[str] = set()
        for path in self.files:
            for line, lines in line_blocks(path, advance):
                n, names = parsed(path, line, lines, self._distinct)
                self.n_rows += n
                found.update(names.to_pylist())
                if len(found) > slot.MAX_SLOTS:
                    raise errors.Unsupported(
                        f"more than {slot.MAX_SLOTS} slots", remedy=f"are its lines {SHAPE}?", file=path
                    )
        self._slots = pa.array(sorted(found, key=natural), pa.string())
        self.schema = pa.schema(
            [(name, pa.int64()) for name in self.HEAD]
            + [(f"slot_{name}", pa.list_(pa.uint64())) for name in self._slots.to_pylist()]
        )

    def batches(self, advance: Advance) -> Batches:
        step = max(1, slot.SLOT_CELLS // max(1, len(self._slots)))
        for path in self.files:
            for line, lines in line_blocks(path, advance):
                for i in range(0, len(lines), step):
                    yield parsed(path, line + i, lines[i : i + step], self._parse)

    def _distinct(self, lines: pa.StringArray) -> tuple[int, pa.StringArray]:
        _, words, splits = self._words(lines)
        return len(splits) - 1, pairs_of(words, 2, "slot:key")[0].unique()

    def _parse(self, lines: pa.StringArray) -> pa.RecordBatch:
        head, words, splits = self._words(lines)
        columns = [whole_numbers(text, pa.int64(), name) for name, text in zip(self.HEAD, head, strict=True)]
        slots, keys = pairs_of(words, 2, "slot:key")
        columns += slot.slot_lists(self._slots, slots, keys, splits)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _words(self, lines: pa.StringArray) -> tuple[list[pa.StringArray], pa.StringArray, npt.NDArray[np.int64]]:
        """The first three columns, and the pairs of all rows with their splits."""
        lines = pc.ascii_trim_whitespace(lines)
        cells = pc.split_pattern(lines.filter(pc.not_equal(lines, "")), ",")
        n_head = len(self.HEAD)
        if not all_true(pc.greater_equal(pc.list_value_length(cells), n_head)):
            raise Malformed(f"the line is not {SHAPE}")
        splits = cells.offsets.to_numpy().astype(np.int64)
        splits -= splits[0]
        flat = cells.flatten()
        at = splits[:-1, None] + np.arange(n_head)
        is_pair = np.ones(len(flat), bool)
        is_pair[at] = False
        head = [flat.take(pa.array(at[:, i])) for i in range(n_head)]
        return head, flat.filter(pa.array(is_pair)), splits - n_head * np.arange(len(splits))
