"""Which rows of a row group satisfy an expression: statistics rule out row groups, the expression rules out rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from hbkit import errors
from hbkit.data.files import DataFile
from hbkit.parquet.source import unreadable

__all__ = ["RowFilter"]


class RowFilter:
    """A ``pyarrow.compute`` expression over the stored columns; a row is kept where it is true (null is not).

    Notes
    -----
    Safe from several threads. Counts of rows are remembered, masks are not.
    """

    def __init__(self, expr: pc.Expression) -> None:
        if not isinstance(expr, pc.Expression):
            raise errors.InvalidArgument(
                f"the filter is a {type(expr).__name__}",
                remedy="give a pyarrow.compute expression, e.g. pc.field('x') > 0",
            )
        self.expr = expr
        self._plans: dict[int, tuple[list[str], frozenset[int]]] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # what is remembered belongs to this process's files
        return RowFilter, (self.expr,)

    def __and__(self, other: RowFilter) -> RowFilter:
        return RowFilter(self.expr & other.expr)

    def check(self, file: DataFile) -> None:
        """Raise UnknownColumn, SchemaMismatch or InvalidArgument unless the expression suits the file's schema."""
        try:
            kind = _type(self.expr, file.arrow_schema)
        except Exception as e:
            text = str(e).splitlines()[0]
            if "FieldRef" in text:
                raise errors.UnknownColumn(
                    f"the filter names a column that the file lacks or has twice: {text}",
                    remedy=f"columns are {', '.join(file.schema)}",
                    file=file.path,
                ) from e
            raise errors.SchemaMismatch(
                f"the filter does not suit the file's columns: {text}",
                remedy="compare with a value of the column's type",
                file=file.path,
            ) from e
        if not pa.types.is_boolean(kind):
            raise errors.InvalidArgument(
                f"the filter gives {kind}, not bool", remedy="compare it with something", file=file.path
            )

    def mask(self, file: DataFile, g: int) -> npt.NDArray[np.bool_] | None:
        """bool[rows of the row group], or None where no row is kept."""
        names, left = self._plan(file)
        mask = None
        if g in left:
            mask = np.zeros(file.row_group_rows[g], np.bool_)
            ranges = self._pages(file, g, names)
            if ranges:
                mask[_inside(ranges)] = self._kept(file, g, names, ranges)
            if not mask.any():
                mask = None
        self._counts[id(file), g] = 0 if mask is None else int(np.count_nonzero(mask))
        return mask

    def _kept(self, file: DataFile, g: int, names: list[str], ranges: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
        import pyarrow.dataset as pads

        table = file.read_arrow(g, names, ranges=ranges)
        if not names:  # a constant: any column gives it its length
            table = pa.table({"": np.zeros(sum(b - a for a, b in ranges), np.bool_)})
        try:
            column = pads.dataset(table).to_table(columns={"keep": self.expr}, use_threads=False).column("keep")
        except Exception as e:
            raise unreadable(e, "a column of the filter", file=file.path, row_group=g) from e
        return np.asarray(pc.fill_null(column, False).to_numpy(), np.bool_)

    def _pages(self, file: DataFile, g: int, names: list[str]) -> list[tuple[int, int]]:
        """Ranges of rows that may hold one to keep: by the page indexes where there are some, else all."""
        n_rows = file.row_group_rows[g]
        found = [p for name in names if (p := file.page_guarantees(g, name)) is not None]
        if not found:
            return [(0, n_rows)]
        starts = np.unique(np.concatenate([first_rows for first_rows, _ in found]))
        promises: list[list[pc.Expression | None]] = [
            [said[int(np.searchsorted(first_rows, a, side="right")) - 1] for first_rows, said in found] for a in starts
        ]
        ends = np.append(starts[1:], n_rows)
        left = self._left(file.arrow_schema, promises)
        return [(int(starts[i]), int(ends[i])) for i in sorted(left) if starts[i] < ends[i]]

    def count(self, file: DataFile, g: int) -> int:
        """Rows of the row group that are kept."""
        if (id(file), g) not in self._counts:
            self.mask(file, g)
        return self._counts[id(file), g]

    def _plan(self, file: DataFile) -> tuple[list[str], frozenset[int]]:
        """The columns that the expression reads, and the row groups that statistics leave."""
        with self._lock:
            plan = self._plans.get(id(file))
            if plan is None:
                self.check(file)
                names = [name for i, name in enumerate(file.arrow_schema.names) if self._reads(file.arrow_schema, i)]
                groups = range(len(file.row_group_rows))
                promises = [[file.guarantee(g, name) for name in names] for g in groups]
                plan = self._plans[id(file)] = names, self._left(file.arrow_schema, promises)
            return plan

    def _reads(self, schema: pa.Schema, i: int) -> bool:
        # an expression does not say which columns it names, but it no longer binds where one is taken away
        try:
            _type(self.expr, schema.remove(i))
        except pa.ArrowInvalid:
            return True
        return False

    def _left(self, schema: pa.Schema, promises: Sequence[Sequence[pc.Expression | None]]) -> frozenset[int]:
        """Numbers of the ranges of rows that may hold one to keep, given what is promised of each.

        Each range becomes a fragment that exists only by its guarantee, ``low <= x <= high or x is null``, and Arrow's
        expression simplifier says which guarantees rule the filter out.
        """
        import pyarrow.dataset as pads

        fragments = []
        form = pads.ParquetFileFormat()
        for i, known in enumerate(promises):
            promise = pc.scalar(True)
            for said in known:
                if said is not None:
                    promise &= said
            fragments.append(form.make_fragment(str(i), pafs.LocalFileSystem(), partition_expression=promise))
        found = pads.FileSystemDataset(fragments, schema, form, pafs.LocalFileSystem())
        return frozenset(int(f.path) for f in found.get_fragments(filter=self.expr))


def _inside(ranges: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """The rows of the ranges, one after another."""
    return np.concatenate([np.arange(a, b) for a, b in ranges])


def _type(expr: pc.Expression, schema: pa.Schema) -> pa.DataType:
    import pyarrow.dataset as pads

    empty = pads.dataset(schema.empty_table())
    return empty.scanner(columns={"keep": expr}).projected_schema.field("keep").type
