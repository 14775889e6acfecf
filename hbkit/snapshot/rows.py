"""Rows of a table as Parquet files: plain, uncompressed, in key order, so that equal rows are equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbkit.errors import Corrupt, HbkitError, SchemaMismatch, StorageError
from hbkit.parquet import Field, File
from hbkit.snapshot.files import RESTORE, FileEntry
from hbkit.snapshot.manifest import TableEntry
from hbkit.snapshot.place import Draft, Place
from hbkit.store.base import CHUNK_ROWS, Chunk, Int64s

Columns = dict[str, npt.NDArray[Any]]

_COLUMN_ROWS = 1 << 20  # rows of a row group of the narrow files


class Metadata(NamedTuple):
    """What a table knows of its rows beside their floats, in key order.

    Attributes
    ----------
    key, freq, last_step : int64[n]
    """

    key: Int64s
    freq: Int64s
    last_step: Int64s

    def without(self, keys: Int64s) -> Metadata:
        """Without some distinct keys."""
        kept = ~np.isin(self.key, keys, assume_unique=True)
        return Metadata._make(column[kept] for column in self)

    def updated(self, parts: list[Metadata]) -> Metadata:
        """With the rows of `parts`, in place of those of the same keys."""
        both = Metadata._make(np.concatenate(columns) for columns in zip(self, *parts, strict=True))
        order = np.argsort(both.key, kind="stable")  # linear: two runs that ascend
        keys = both.key[order]
        order = order[np.append(keys[1:] != keys[:-1], np.ones(min(1, len(keys)), np.bool_))]
        return Metadata._make(column[order] for column in both)

    def has(self, chunk: Chunk) -> npt.NDArray[np.bool_]:
        """Which of a chunk's rows are here with the same freq and last_step: bool[n]."""
        at = np.searchsorted(self.key, chunk.key)
        there = at < len(self.key)
        for mine, theirs in zip(self, chunk[:3], strict=True):
            there[there] = mine[at[there]] == theirs[there]
        return there


_NONE = np.zeros(0, np.int64)
NO_METADATA = Metadata(_NONE, _NONE, _NONE)


def key_type(key_dtype: str) -> pa.DataType:
    """Parquet type of a table's keys."""
    return pa.type_for_alias(key_dtype)


def _floats(n: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32(), nullable=False), n)


def rows_schema(key_dtype: str, dim: int, n_state: int) -> pa.Schema:
    """Columns of a file of rows; without ``state`` where the optimizer keeps none."""
    columns = [("key", key_type(key_dtype)), ("freq", pa.int64()), ("last_step", pa.int64()), ("row", _floats(dim))]
    if n_state:
        columns.append(("state", _floats(n_state)))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def keys_schema(key_dtype: str) -> pa.Schema:
    """Column of a file of erased keys."""
    return pa.schema([pa.field("key", key_type(key_dtype), nullable=False)])


def _narrow(keys: Int64s, key_dtype: str, table: str) -> npt.NDArray[Any]:
    """Keys as they are stored: unsigned ones by their bits."""
    if key_dtype == "uint64":
        return keys.view(np.uint64)
    narrow: npt.NDArray[Any] = keys.astype(key_dtype)
    if (narrow != keys).any():
        raise SchemaMismatch(f"a key does not fit {key_dtype}", table=table, remedy="use key_dtype='int64'")
    return narrow


def _regroup(chunks: Iterable[Chunk], table: str) -> Iterator[Chunk]:
    """The same rows in chunks of exactly CHUNK_ROWS: row groups must not depend on the tier that scans."""
    held: list[Chunk] = []
    n, last = 0, None
    for chunk in chunks:
        if len(chunk.key) and ((last is not None and chunk.key[0] <= last) or (chunk.key[1:] <= chunk.key[:-1]).any()):
            raise StorageError("the store does not scan in key order", table=table, remedy="report this")
        last = chunk.key[-1] if len(chunk.key) else last
        while len(chunk.key):
            room = CHUNK_ROWS - n
            held.append(Chunk._make(column[:room] for column in chunk))
            n += len(held[-1].key)
            chunk = Chunk._make(column[room:] for column in chunk)
            if n == CHUNK_ROWS:
                yield _concatenate(held)
                held, n = [], 0
    if held:
        yield _concatenate(held)


def _concatenate(chunks: list[Chunk]) -> Chunk:
    return chunks[0] if len(chunks) == 1 else Chunk._make(np.concatenate(parts) for parts in zip(*chunks, strict=True))


def _write(draft: Draft, path: str, schema: pa.Schema, groups: Iterable[list[pa.Array]]) -> FileEntry:
    """A Parquet file at `path`; each of `groups` is one row group."""
    n_rows = 0
    statistics = [f.name for f in schema if not pa.types.is_nested(f.type)]
    with draft.create(path) as sink:
        with pq.ParquetWriter(
            sink, schema, version="2.6", compression="NONE", use_dictionary=False, write_statistics=statistics
        ) as writer:
            for arrays in groups:
                writer.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=max(1, len(arrays[0])))
                n_rows += len(arrays[0])
    return sink.entry(path, n_rows)


def write_rows(
    draft: Draft, path: str, chunks: Iterable[Chunk], table: str, key_dtype: str, dim: int, n_state: int
) -> FileEntry:
    """Write lines, which must come in key order."""
    schema = rows_schema(key_dtype, dim, n_state)

    def groups() -> Iterator[list[pa.Array]]:
        for chunk in _regroup(chunks, table):
            arrays = [
                pa.array(_narrow(chunk.key, key_dtype, table)),
                pa.array(chunk.freq),
                pa.array(chunk.last_step),
                *(
                    pa.FixedSizeListArray.from_arrays(
                        pa.array(np.ascontiguousarray(lines, np.float32).reshape(-1)), type=schema.field(name).type
                    )
                    for name, lines in (("row", chunk.row), ("state", chunk.state))[: 1 + bool(n_state)]
                ),
            ]
            yield arrays

    return _write(draft, path, schema, groups())


def write_keys(draft: Draft, path: str, keys: Int64s, table: str, key_dtype: str) -> FileEntry:
    """Write erased keys."""
    return write_columns(draft, path, {"key": _narrow(keys, key_dtype, table)}, keys_schema(key_dtype))


def write_columns(
    draft: Draft, path: str, columns: Mapping[str, npt.NDArray[Any]], schema: pa.Schema | None = None
) -> FileEntry:
    """Write plain columns of equal length."""
    table = pa.table(dict(sorted(columns.items())))
    groups = (batch.columns for batch in table.to_batches(max_chunksize=_COLUMN_ROWS))
    return _write(draft, path, schema or table.schema, groups)


class _Reader:
    """One Parquet file of a snapshot, believed in nothing that its bytes cannot hold."""

    def __init__(self, place: Place, entry: FileEntry, schema: pa.Schema | None) -> None:
        self.path = place.where(entry.path)
        self._file = self._named(lambda: File(place.open(entry.path)))
        have = self._named(lambda: self._file.arrow_schema)
        if schema is not None and not have.equals(schema):
            raise self.corrupt(f"columns {_one_line(have)} where {_one_line(schema)} belong")
        for field in have:
            if not _is_plain(field.type):
                raise self.corrupt(f"column {field.name!r} is {field.type}")
        if self._file.n_rows != entry.n_rows:
            raise self.corrupt(f"the file has {self._file.n_rows} rows, its manifest says {entry.n_rows}")
        # Everything is plain and uncompressed, so this bounds what reading allocates by the size of the file.
        if entry.n_rows * sum(_nbytes(f.type) for f in have) > entry.nbytes:
            raise self.corrupt(f"{entry.nbytes} bytes cannot hold {entry.n_rows} rows")
        self.schema: pa.Schema = have
        self.columns: list[str] = have.names

    def corrupt(self, problem: str) -> Corrupt:
        """What this file is guilty of."""
        return Corrupt(problem, file=self.path, remedy=RESTORE)

    def _named(self, read: Any) -> Any:
        try:
            return read()
        except (StorageError, Corrupt):
            raise
        except HbkitError as e:
            raise self.corrupt(e.problem) from e

    def groups(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Columns of each row group."""
        try:
            for g in range(len(self._file.row_group_rows)):
                yield self._named(lambda g=g: self._file.read_row_group(g, [Field(name) for name in names]))
        finally:
            self._file.close()


def _is_plain(t: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(t):
        t = t.value_type
    return pa.types.is_integer(t) or pa.types.is_floating(t)


def _nbytes(t: pa.DataType) -> int:
    return t.list_size * 4 if pa.types.is_fixed_size_list(t) else t.bit_width // 8


def _one_line(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in schema)


def _wide(keys: npt.NDArray[Any]) -> Int64s:
    return keys.view(np.int64) if keys.dtype == np.uint64 else keys.astype(np.int64)


def _lines(reader: _Reader, column: Any, n: int, width: int) -> npt.NDArray[np.float32]:
    values = np.asarray(column.values)
    if len(values) != n * width or (column.lengths() != width).any():
        raise reader.corrupt(f"a line does not hold {width} floats")
    return values.reshape(n, width)


def read_rows(place: Place, entry: FileEntry, table: TableEntry) -> Iterator[Chunk]:
    """Lines of a file, in chunks; their keys ascend. Raises Corrupt."""
    reader = _Reader(place, entry, rows_schema(table.key_dtype, table.dim, table.n_state))
    for columns in _ascending(reader, reader.columns):
        keys = columns["key"]
        row = _lines(reader, columns["row"], len(keys), table.dim)
        if table.n_state:
            state = _lines(reader, columns["state"], len(keys), table.n_state)
        else:
            state = np.zeros((len(keys), 0), np.float32)
        yield Chunk(keys, columns["freq"], columns["last_step"], row, state)


def read_metadata(place: Place, entry: FileEntry, table: TableEntry) -> Iterator[Metadata]:
    """The same without row and state."""
    reader = _Reader(place, entry, rows_schema(table.key_dtype, table.dim, table.n_state))
    for columns in _ascending(reader, list(Metadata._fields)):
        yield Metadata(**columns)


def read_keys(place: Place, entry: FileEntry, table: TableEntry) -> Int64s:
    """Keys of a file of erased keys, ascending: int64[n]. Raises Corrupt."""
    reader = _Reader(place, entry, keys_schema(table.key_dtype))
    return np.concatenate([_NONE, *(columns["key"] for columns in _ascending(reader, ["key"]))])


def _ascending(reader: _Reader, names: list[str]) -> Iterator[dict[str, Any]]:
    last: int | None = None
    for columns in reader.groups(names):
        keys = columns["key"] = _wide(columns["key"])
        if len(keys):
            if (last is not None and keys[0] <= last) or (keys[1:] <= keys[:-1]).any():
                raise reader.corrupt("keys do not ascend")
            last = int(keys[-1])
        yield columns


def read_columns(place: Place, entry: FileEntry) -> Columns:
    """All columns of a file of plain columns. Raises Corrupt."""
    reader = _Reader(place, entry, None)
    for field in reader.schema:
        if pa.types.is_nested(field.type):
            raise reader.corrupt(f"column {field.name!r} is {field.type}")
    groups = list(reader.groups(reader.columns))
    if not groups:
        return {f.name: np.zeros(0, f.type.to_pandas_dtype()) for f in reader.schema}
    return {name: np.concatenate([g[name] for g in groups]) for name in reader.columns}
