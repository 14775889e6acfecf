"""Which rows of a row group satisfy an expression: statistics rule out row groups, the expression rules out rows."""

from __future__ import annotations

import threading

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
        """bool[rows of the row group], or None where statistics show that no row is kept."""
        import pyarrow.dataset as pads

        names, left = self._plan(file)
        mask = None
        if g in left:
            table = file.read_arrow(g, names)
            if not names:  # a constant: any column gives it its length
                table = pa.table({"": np.zeros(file.row_group_rows[g], np.bool_)})
            try:
                column = pads.dataset(table).to_table(columns={"keep": self.expr}, use_threads=False).column("keep")
            except Exception as e:
                raise unreadable(e, "a column of the filter", file=file.path, row_group=g) from e
            mask = np.asarray(pc.fill_null(column, False).to_numpy(), np.bool_)
        self._counts[id(file), g] = 0 if mask is None else int(np.count_nonzero(mask))
        return mask

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
                plan = self._plans[id(file)] = names, self._left(file, names)
            return plan

    def _reads(self, schema: pa.Schema, i: int) -> bool:
        # an expression does not say which columns it names, but it no longer binds where one is taken away
        try:
            _type(self.expr, schema.remove(i))
        except pa.ArrowInvalid:
            return True
        return False

    def _left(self, file: DataFile, names: list[str]) -> frozenset[int]:
        """Row groups that may hold a row to keep.

        Each row group becomes a fragment that exists only by its guarantee, ``low <= x <= high or x is null``, and
        Arrow's expression simplifier says which guarantees rule the filter out.
        """
        import pyarrow.dataset as pads

        fragments = []
        form = pads.ParquetFileFormat()
        for g in range(len(file.row_group_rows)):
            promise = pc.scalar(True)
            for name in names:
                if (known := file.guarantee(g, name)) is not None:
                    promise &= known
            fragments.append(form.make_fragment(str(g), pafs.LocalFileSystem(), partition_expression=promise))
        groups = pads.FileSystemDataset(fragments, file.arrow_schema, form, pafs.LocalFileSystem())
        return frozenset(int(f.path) for f in groups.get_fragments(filter=self.expr))


def _type(expr: pc.Expression, schema: pa.Schema) -> pa.DataType:
    import pyarrow.dataset as pads

    empty = pads.dataset(schema.empty_table())
    return empty.scanner(columns={"keep": expr}).projected_schema.field("keep").type
