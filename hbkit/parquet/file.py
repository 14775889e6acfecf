"""One Parquet file: its checked footer, its schema, and its row groups as columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbkit import errors, ragged
from hbkit.parquet.column import column_type, decode, missing
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.footer import read_footer
from hbkit.parquet.source import Source, open_source
from hbkit.ragged import Column

__all__ = ["File", "read_columns"]


class File:
    """An open Parquet file.

    Parameters
    ----------
    source : Source, str or path

    Attributes
    ----------
    path : str
    schema : dict of str to ColumnType
        Columns in file order; the ones that cannot be read say why in ``.unsupported``.
    row_group_rows : list of int
        Rows of each row group.
    n_rows : int
    metadata : dict of str to str
        The footer's key-value pairs, without the Arrow schema.
    arrow_schema : pyarrow.Schema
        What expressions on the file's rows are bound to.

    Raises
    ------
    NotFound, StorageError
        The file cannot be opened.
    Corrupt
        The footer is damaged, or the file is not Parquet.
    Unsupported
        The footer is encrypted, or describes a type that no reader here knows.

    Notes
    -----
    Reading is safe from several threads at once.
    """

    def __init__(self, source: Source | str | os.PathLike[str]) -> None:
        self.source: Source = open_source(source) if isinstance(source, (str, os.PathLike)) else source
        self.path = self.source.path
        self.footer = read_footer(self.source)
        self.row_group_rows = self.footer.row_group_rows
        self.n_rows = sum(self.row_group_rows)
        try:
            reader = pq.ParquetFile(self.source.file)
            self._metadata = reader.metadata
            arrow = reader.schema_arrow
            pairs = self._metadata.metadata or {}
            self.metadata = {k.decode(): v.decode() for k, v in pairs.items() if k != b"ARROW:schema"}
        except errors.HbkitError:  # the source's own
            raise
        except Exception as e:
            raise self.broken(e, "the footer") from e
        if arrow.names != [name for name, _, _ in self.footer.columns]:
            raise errors.Corrupt("the footer's schema contradicts itself", remedy=_REWRITE, file=self.path)
        self.arrow_schema: pa.Schema = arrow
        self.schema: dict[str, ColumnType] = {}
        self._leaves: dict[str, range] = {}
        self._unreadable: dict[str, str] = {}
        for (name, first, n_leaves), field in zip(self.footer.columns, arrow, strict=True):
            kind = column_type(field)
            leaves = range(first, first + n_leaves)
            reason = next((r for i in leaves if (r := self.footer.leaves[i].unsupported)), "")
            if name in self.schema:
                reason = "two columns have this name"
            if reason:
                self._unreadable[name] = reason
                kind = ColumnType(kind.dtype, kind.ragged_rank, kind.nullable, unsupported=reason)
            self.schema[name] = kind
            self._leaves[name] = leaves

    def read_row_group(
        self,
        g: int,
        fields: Sequence[Field],
        rows: npt.NDArray[np.bool_] | None = None,
        num_threads: int = 1,
    ) -> dict[str, Column]:
        """The columns of one row group, each as its field asks; the caller owns their memory.

        Parameters
        ----------
        g : int
        fields : sequence of Field
        rows : bool[row_group_rows[g]], optional
            Only these rows; nulls and misfits elsewhere do not matter.
        num_threads : int
            More than 1 decodes columns in parallel.

        Raises
        ------
        Corrupt
            The bytes break the format; says which column.
        UnknownColumn, Unsupported, SchemaMismatch, NullFound
            A field does not suit the file.
        """
        if not 0 <= g < len(self.row_group_rows):
            raise errors.InvalidArgument(
                f"row group {g} of {len(self.row_group_rows)}", remedy="count from 0", file=self.path
            )
        names = [f.name for f in fields if f.name in self.schema]
        for name in names:
            if reason := self.schema[name].unsupported:
                raise errors.Unsupported(reason, remedy="leave it out of fields", file=self.path, column=name)
        table = self.read_arrow(g, names, num_threads)
        n = self.row_group_rows[g]
        if rows is not None:
            table, n = table.filter(pa.array(rows)), int(np.count_nonzero(rows))
        return {f.name: self._column(table, n, f, g) for f in fields}

    def read_no_rows(self, fields: Sequence[Field]) -> dict[str, Column]:
        """Columns as ``read_row_group`` gives them, of no rows."""
        table = self.arrow_schema.empty_table()
        return {f.name: self._column(table, 0, f, None) for f in fields}

    def _column(self, table: pa.Table, n_rows: int, field: Field, g: int | None) -> Column:
        place = {"file": self.path, "column": field.name, "row_group": g}
        if field.name not in self.schema:
            return missing(n_rows, field, _type_of_missing(field), place)
        try:
            return decode(table.column(field.name), field, self.schema[field.name], place)
        except errors.HbkitError:
            raise
        except Exception as e:
            raise self.broken(e, "the column", g, field.name) from e

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1) -> pa.Table:
        """Columns of one row group as they are stored, for expressions on them."""
        for name in names:
            if reason := self._unreadable.get(name):
                raise errors.Unsupported(
                    reason, remedy="leave it out of fields and filters", file=self.path, column=name
                )
        try:
            table = self._read(g, names, num_threads)
        except errors.HbkitError:
            raise
        except Exception as e:
            # again one by one, to name the column
            for name in names if len(names) > 1 else ():
                try:
                    self._read(g, [name], num_threads)
                except Exception as one:
                    raise self.broken(one, "the column", g, name) from one
            what, only = ("the column", names[0]) if len(names) == 1 else ("the row group", None)
            raise self.broken(e, what, g, only) from e
        if names and table.num_rows != self.row_group_rows[g]:
            raise errors.Corrupt(
                f"the columns hold {table.num_rows} rows, the footer promises {self.row_group_rows[g]}",
                remedy=_REWRITE,
                file=self.path,
                row_group=g,
            )
        return table

    def _read(self, g: int, names: Sequence[str], num_threads: int) -> pa.Table:
        # a reader of its own for every call: readers are not safe to share between threads, the metadata is
        reader = pq.ParquetFile(
            self.source.file,
            metadata=self._metadata,
            pre_buffer=self.source.remote,
            page_checksum_verification=True,
        )
        leaves = [i for name in names for i in self._leaves[name]]
        table = reader.reader.read_row_group(g, column_indices=leaves, use_threads=num_threads > 1)
        table.validate()
        return table

    def broken(self, e: Exception, what: str, g: int | None = None, name: str | None = None) -> errors.HbkitError:
        """The named error for whatever a reader raised."""
        place: dict[str, Any] = {"file": self.path, "row_group": g, "column": name}
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        if isinstance(e, OSError) and (e.errno is not None or type(e) is not OSError):
            return errors.StorageError(f"cannot read {what}: {text}", remedy="check the connection and retry", **place)
        if isinstance(e, NotImplementedError):
            return errors.Unsupported(f"cannot read {what}: {text}", remedy="leave it out of fields", **place)
        return errors.Corrupt(f"{what} is damaged: {text}", remedy=_REWRITE, **place)

    def close(self) -> None:
        """Close the source."""
        self.source.close()


_REWRITE = "write the file again, or leave it out"


def _type_of_missing(field: Field) -> ColumnType:
    """The type of a column that the file lacks: what the field says, else what its default is."""
    if field.dtype is not None:
        dtype = str(field.dtype)
    elif field.hash_to:
        dtype = field.hash_to
    elif isinstance(field.default, (str, bytes)):
        dtype = "string"
    else:
        dtype = np.asarray(0.0 if field.default is None else field.default).dtype.name
    stored = ColumnType(dtype if not field.hash_to else "string", field.ragged_rank or (field.pad_to is not None) + 0)
    return field.output(stored)


def read_columns(
    path: str | os.PathLike[str],
    columns: Sequence[str | Field] | None = None,
    row_groups: Sequence[int] | None = None,
) -> dict[str, Column]:
    """Whole columns of one file.

    Parameters
    ----------
    path : str or path
        Local, or a URI.
    columns : sequence of str or Field, optional
        None reads every column that can be read.
    row_groups : sequence of int, optional
        None reads all.

    Returns
    -------
    dict of str to array, Ragged or Strings
        In memory that the caller owns.

    Raises
    ------
    HbkitError
        See ``File`` and ``File.read_row_group``.
    """
    file = File(path)
    try:
        if columns is None:
            columns = [name for name, kind in file.schema.items() if not kind.unsupported]
        fields = [c if isinstance(c, Field) else Field(c) for c in columns]
        groups = range(len(file.row_group_rows)) if row_groups is None else row_groups
        parts = [file.read_row_group(g, fields) for g in groups] or [file.read_no_rows(fields)]
        return {f.name: ragged.concat([p[f.name] for p in parts]) for f in fields}
    finally:
        file.close()
