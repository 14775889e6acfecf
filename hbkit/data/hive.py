"""Columns that stand in the path of a file: ``day=7/`` is a column ``day`` of 7s."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors
from hbkit.data.files import DataFile, Mask, RowGroup
from hbkit.parquet import Field
from hbkit.parquet.arrow import Ranges, column_type, decode
from hbkit.parquet.bounds import Promises
from hbkit.parquet.decoded import Decoded, Slab
from hbkit.parquet.threads import ALONE, Threads
from hbkit.ragged import Column

__all__ = ["Partitioned", "partitioned", "path_values"]

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?[0-9]{1,18}")  # what surely fits int64


def path_values(path: str) -> dict[str, str | None]:
    """The ``key=value`` directories of a path or URI, URL-decoded; of a key that comes twice, the innermost."""
    if "://" in path:
        path = path.partition("?")[0]
    pairs = [part.partition("=") for part in path.split("/")[:-1] if "=" in part]
    return {unquote(key): None if value == _NULL else unquote(value) for key, _, value in pairs if key}


def partitioned(files: Sequence[DataFile]) -> list[DataFile]:
    """The files with the columns of their paths.

    A key is int64 where its values are integers of at most 18 digits in all files, else string.
    """
    found = [path_values(file.path) for file in files]
    out: list[DataFile] = []
    kinds = {key: _kind([values.get(key) for values in found]) for key in dict.fromkeys(k for v in found for k in v)}
    for file, values in zip(files, found, strict=True):
        typed = {k: v if v is None or kinds[k] == pa.string() else int(v) for k, v in values.items()}
        out.append(Partitioned(file, {k: pa.scalar(v, kinds[k]) for k, v in typed.items()}))
    return out


def _kind(values: Sequence[str | None]) -> pa.DataType:
    known = [v for v in values if v is not None]
    return pa.int64() if known and all(_INTEGER.fullmatch(v) for v in known) else pa.string()


class Partitioned:
    """A file with further columns, each of one value; see ``DataFile`` for what it gives.

    Parameters
    ----------
    file : DataFile
    values : mapping of str to pyarrow.Scalar
        By column name; they come behind the file's own columns.

    Raises
    ------
    SchemaMismatch
        The file has a column of such a name: which of the two is meant, nobody can tell.
    """

    def __init__(self, file: DataFile, values: Mapping[str, pa.Scalar]) -> None:
        self.file, self.path, self.metadata = file, file.path, file.metadata
        self.remote = file.remote
        self.row_group_rows, self.n_rows = file.row_group_rows, file.n_rows
        self._values = dict(values)
        self.schema, self.arrow_schema = dict(file.schema), file.arrow_schema
        for name, value in self._values.items():
            if name in file.schema or name in file.arrow_schema.names:
                raise errors.SchemaMismatch(
                    "the column stands both in the file and in its path",
                    remedy="leave out hive=True, or write the file without it",
                    file=file.path,
                    column=name,
                )
            field = pa.field(name, value.type)
            self.schema[name] = column_type(field)
            self.arrow_schema = self.arrow_schema.append(field)

    def read_row_group(
        self, g: int, fields: Sequence[Field], rows: Mask | None = None, num_threads: int = 1
    ) -> dict[str, Column]:
        """See ``DataFile``."""
        stored = self.file.read_row_group(g, self._stored(fields), rows, num_threads)
        return self._with(stored, fields, self.row_group_rows[g] if rows is None else int(np.count_nonzero(rows)), g)

    def open_row_group(self, g: int, fields: Sequence[Field], threads: Threads = ALONE) -> RowGroup:
        """See ``DataFile``."""
        stored = self.file.open_row_group(g, self._stored(fields), threads)
        ours = [f for f in fields if f.name in self._values]
        constant = Decoded(self._with({}, ours, self.row_group_rows[g], g))
        return _Reader([stored, constant], [f.name for f in fields])

    def read_no_rows(self, fields: Sequence[Field]) -> dict[str, Column]:
        """See ``DataFile``."""
        return self._with(self.file.read_no_rows(self._stored(fields)), fields, 0, None)

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1, ranges: Ranges | None = None) -> pa.Table:
        """See ``DataFile``."""
        stored = self.file.read_arrow(g, [name for name in names if name not in self._values], num_threads, ranges)
        columns = {name: stored.column(name) for name in stored.column_names}
        n = self.row_group_rows[g] if ranges is None else sum(b - a for a, b in ranges)
        ours = {name: pa.repeat(self._values[name], n) for name in names if name in self._values}
        return pa.table({**columns, **ours})

    def find(self, name: str) -> str | None:
        """See ``DataFile``."""
        return name if name in self._values else self.file.find(name)

    def guarantee(self, g: int, name: str) -> pc.Expression | None:
        """See ``DataFile``; what a path says is true of every row."""
        if name not in self._values:
            return self.file.guarantee(g, name)
        value = self._values[name]
        return pc.field(name) == value if value.is_valid else pc.field(name).is_null()

    def page_guarantees(self, g: int, name: str) -> Promises | None:
        """See ``DataFile``."""
        return None if name in self._values else self.file.page_guarantees(g, name)

    def decoded_by(self, name: str) -> str:
        """See ``DataFile``."""
        return "path" if name in self._values else self.file.decoded_by(name)

    def close(self) -> None:
        """See ``DataFile``."""
        self.file.close()

    def _stored(self, fields: Sequence[Field]) -> list[Field]:
        return [f for f in fields if f.name not in self._values]

    def _with(
        self, columns: Mapping[str, Column], fields: Sequence[Field], n_rows: int, g: int | None
    ) -> dict[str, Column]:
        """The columns of all fields, in their order."""

        def one(field: Field) -> Column:
            if field.name not in self._values:
                return columns[field.name]
            array = pa.chunked_array([pa.repeat(self._values[field.name], n_rows)])
            place = {"file": self.path, "column": field.name, "row_group": g}
            return decode(array, field, self.schema[field.name], place)

        return {f.name: one(f) for f in fields}


class _Reader:
    """Readers of the same rows side by side, their columns in one order."""

    def __init__(self, readers: Sequence[RowGroup], names: Sequence[str]) -> None:
        self._readers, self._names = readers, names

    def add_to(self, slab: Slab, n_rows: int, rows: Mask | None = None) -> None:
        """See ``RowGroup``."""
        for name in self._names:  # in the fields' order
            slab.column(name)
        for reader in self._readers:
            reader.add_to(slab, n_rows, rows)

    def skip(self, n_rows: int) -> None:
        """See ``RowGroup``."""
        for reader in self._readers:
            reader.skip(n_rows)
