"""What a dataset asks of a file, whatever its format, and the part that formats decoded by Arrow share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.parquet import ColumnType, Field
from hbkit.parquet.arrow import Ranges, decode
from hbkit.parquet.bounds import Promises
from hbkit.parquet.decoded import Decoded, Mask, RowGroup
from hbkit.parquet.threads import ALONE, Threads
from hbkit.parquet.values import missing
from hbkit.ragged import Column

__all__ = ["ArrowFile", "DataFile", "Mask", "RowGroup"]


class DataFile(Protocol):
    """One open file: row groups of columns. Reading is safe from several threads at once.

    ``hbkit.parquet.File`` is one; others read another format, or stand before a file and change what it holds.

    Attributes
    ----------
    path : str
        Errors name it.
    remote : bool
        Whether its bytes are worth fetching ahead.
    schema : dict of str to ColumnType
        The columns; the ones that cannot be read say why in ``.unsupported``.
    row_group_rows : sequence of int
    n_rows : int
    metadata : dict of str to str
        Key-value pairs of the file.
    arrow_schema : pyarrow.Schema
        What filter expressions bind to.
    """

    @property
    def path(self) -> str: ...
    @property
    def remote(self) -> bool: ...
    @property
    def schema(self) -> dict[str, ColumnType]: ...
    @property
    def row_group_rows(self) -> Sequence[int]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def arrow_schema(self) -> pa.Schema: ...

    def read_row_group(
        self, g: int, fields: Sequence[Field], rows: Mask | None = None, num_threads: int = 1
    ) -> dict[str, Column]:
        """The columns of a row group as their fields ask, of the rows where the mask is true."""

    def open_row_group(self, g: int, fields: Sequence[Field], threads: Threads = ALONE) -> RowGroup:
        """The same columns, some rows at a time."""

    def read_no_rows(self, fields: Sequence[Field]) -> dict[str, Column]:
        """The same columns, of no rows."""

    def find(self, name: str) -> str | None:
        """What the column that a field calls `name` is called in the schema; None where there is none."""

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1, ranges: Ranges | None = None) -> pa.Table:
        """Columns of a row group as they are stored, for filter expressions; of some ranges of its rows, or of all."""

    def guarantee(self, g: int, name: str) -> pc.Expression | None:
        """What is known to be true of all values of a stored column in a row group, or None."""

    def page_guarantees(self, g: int, name: str) -> Promises | None:
        """The same for ranges of its rows; None where no more is known."""

    def decoded_by(self, name: str) -> str:
        """What decodes a column."""

    def close(self) -> None:
        """Forget the file."""


class ArrowFile(ABC):
    """A data file of which a format gives ``read_arrow``; the columns are decoded from that."""

    path: str
    remote = False  # it is decoded as it is fetched
    schema: dict[str, ColumnType]
    row_group_rows: Sequence[int]
    metadata: dict[str, str]
    arrow_schema: pa.Schema

    @property
    def n_rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_group_rows)

    @abstractmethod
    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1, ranges: Ranges | None = None) -> pa.Table:
        """See ``DataFile``."""

    def read_row_group(
        self, g: int, fields: Sequence[Field], rows: Mask | None = None, num_threads: int = 1
    ) -> dict[str, Column]:
        """See ``DataFile``."""
        table, n = self.read_arrow(g, self._stored(fields), num_threads), self.row_group_rows[g]
        if rows is not None:
            table, n = table.filter(pa.array(rows)), int(np.count_nonzero(rows))
        return {f.name: self._column(table, n, f, g) for f in fields}

    def open_row_group(self, g: int, fields: Sequence[Field], threads: Threads = ALONE) -> RowGroup:
        """See ``DataFile``."""
        return Decoded(self.read_row_group(g, fields, None, threads.n))

    def read_no_rows(self, fields: Sequence[Field]) -> dict[str, Column]:
        """See ``DataFile``."""
        table = self.arrow_schema.empty_table()
        return {f.name: self._column(table, 0, f, None) for f in fields}

    def find(self, name: str) -> str | None:
        """See ``DataFile``."""
        return name if name in self.schema else None

    def guarantee(self, g: int, name: str) -> pc.Expression | None:
        """See ``DataFile``; nothing here."""
        return None

    def page_guarantees(self, g: int, name: str) -> Promises | None:
        """See ``DataFile``; nothing here."""
        return None

    def _stored(self, fields: Sequence[Field]) -> list[str]:
        names = [f.name for f in fields if f.name in self.schema]
        for name in names:
            if reason := self.schema[name].unsupported:
                raise errors.Unsupported(reason, remedy="leave it out of fields", file=self.path, column=name)
        return names

    def _column(self, table: pa.Table, n_rows: int, field: Field, g: int | None) -> Column:
        place = {"file": self.path, "column": field.name, "row_group": g}
        if field.name not in self.schema:
            return missing(n_rows, field, field.of_missing(), place)
        return decode(table.column(field.name), field, self.schema[field.name], place)
