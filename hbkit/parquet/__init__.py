"""Parquet files to arrays, ``Strings`` and ``Ragged``: footer, schema, row groups, nulls, casts and hashing."""

from hbkit.parquet.decoded import RowGroup
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.file import File, read_columns
from hbkit.parquet.source import Source, list_files, open_source
from hbkit.parquet.threads import Threads

__all__ = ["ColumnType", "Field", "File", "RowGroup", "Source", "Threads", "list_files", "open_source", "read_columns"]
