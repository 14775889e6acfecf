"""Parquet files to arrays, ``Strings`` and ``Ragged``: footer, schema, row groups, nulls, casts and hashing."""

from hbkit.parquet.decoded import RowGroup, Slab
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.file import File, read_columns
from hbkit.parquet.source import Source, list_files, list_modified, open_source
from hbkit.parquet.threads import Threads

__all__ = [
    "ColumnType",
    "Field",
    "File",
    "RowGroup",
    "Slab",
    "Source",
    "Threads",
    "list_files",
    "list_modified",
    "open_source",
    "read_columns",
]
