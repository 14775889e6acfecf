"""Rows of a table as Parquet files: plain, uncompressed, in key order, so that equal rows are equal bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbkit.errors import Corrupt, HbkitError, SchemaMismatch, StorageError
from hbkit.parquet import Field, File
from hbkit.snapshot.files import RESTORE, Bytes, FileEntry, check, empty, opened, read_ahead, storage_errors
from hbkit.snapshot.layout import Layout
from hbkit.snapshot.manifest import TableEntry
from hbkit.snapshot.place import Draft, Place
from hbkit.store.line import CHUNK_ROWS, Chunk, Int64s

Columns = dict[str, npt.NDArray[Any]]

_COLUMN_ROWS = 1 << 20  # rows of a row group of the narrow files


_NONE = np.zeros(0, np.int64)


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


def _in_order(chunks: Iterable[Chunk], table: str) -> Iterator[Chunk]:
    last: int | None = None
    for chunk in chunks:
        if len(chunk.key):
            if (last is not None and chunk.key[0] <= last) or (chunk.key[1:] <= chunk.key[:-1]).any():
                raise StorageError("the store does not scan in key order", table=table, remedy="report this")
            last = int(chunk.key[-1])
            yield chunk


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
    layout = Layout(rows_schema(key_dtype, dim, n_state), CHUNK_ROWS)
    full, total, n, bounds = layout.group(layout.group_rows), 0, 0, []
    data: Bytes
    columns: list[npt.NDArray[Any]] = []

    def end_group() -> None:
        bounds.append([_bounds(values[:n]) for values in columns])
        layout.frame(layout.group(n), total == n, data)
        sink.lend(data)

    with draft.create(path) as sink:
        # Row groups must not depend on the tier that scans, but lines are copied while they are in the CPU's cache.
        for chunk in _in_order(chunks, table):
            parts: tuple[Any, ...] = (_narrow(chunk.key, key_dtype, table), *chunk[1:])
            first = 0
            while first < len(chunk.key):
                if n == 0:
                    data = empty(layout.group_nbytes)
                    columns = [column.of(data) for column in full.columns]
                some = min(len(chunk.key) - first, layout.group_rows - n)
                for values, lines in zip(columns, parts, strict=False):
                    values[n : n + some] = lines[first : first + some]
                n, total, first = n + some, total + some, first + some
                if n == layout.group_rows:
                    end_group()
                    n = 0
        if n:
            last = layout.group(n)
            data = empty(last.nbytes)
            columns, filled = [column.of(data) for column in last.columns], columns
            for values, lines in zip(columns, filled, strict=True):
                values[:] = lines[:n]
            end_group()
        footer = layout.footer(total, bounds)
        sink.write(footer if total else layout.beginning + footer)
    return sink.entry(path, total)


def _bounds(values: npt.NDArray[Any]) -> tuple[Any, Any] | None:
    """Least and largest value of a column; None for lines."""
    return (values.min(), values.max()) if values.ndim == 1 else None


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
    """Lines of a file, in chunks; their keys ascend. Raises Corrupt.

    The file is compared with its manifest while it is read: what is yielded is right if all comes without an error.
    """
    for columns in _ascending(place.where(entry.path), _read_lines(place, entry, table)):
        state = columns.get("state", np.zeros((len(columns["key"]), 0), np.float32))
        yield Chunk(columns["key"], columns["freq"], columns["last_step"], columns["row"], state)


def _read_lines(place: Place, entry: FileEntry, table: TableEntry) -> Iterator[Columns]:
    """All columns of each row group, lines as float32[n, width]."""
    schema = rows_schema(table.key_dtype, table.dim, table.n_state)
    path, layout = place.local(entry.path), Layout(schema, CHUNK_ROWS)
    if path is not None:
        with storage_errors(path), opened(path, entry) as fd:
            if _is_own(fd, entry, layout):
                try:
                    yield from _read_in_place(fd, path, entry, layout)
                except Corrupt:
                    check(path, entry)  # where the checksum is wrong too, that says more
                    raise
                return
    place.check(entry)
    reader = _Reader(place, entry, schema)
    widths = {"row": table.dim, "state": table.n_state}
    for columns in reader.groups(reader.columns):
        n = len(columns["key"])
        yield {
            name: _lines(reader, column, n, widths[name]) if name in widths else column
            for name, column in columns.items()
        }


def _is_own(fd: int, entry: FileEntry, layout: Layout) -> bool:
    """Whether a file says that it is laid out so, and has the size for it."""
    tail = layout.tail
    n = len(tail) + 8  # the length of the footer and the magic
    has_room = entry.nbytes - layout.body_nbytes(entry.n_rows) >= n
    return has_room and os.pread(fd, len(tail), entry.nbytes - n) == tail


def _read_in_place(fd: int, path: Path, entry: FileEntry, layout: Layout) -> Iterator[Columns]:
    """As `_read_lines`, of a file that `_is_own`: digested by one thread while another uses it where it lies."""
    digest, bounds = entry.new_digest(), []
    groups = [layout.group(n) for n in layout.groups(entry.n_rows)]
    sizes = [layout.group_nbytes if g.n_rows == layout.group_rows else g.nbytes for g in groups] or [8]
    sizes.append(entry.nbytes - sum(sizes))
    with ThreadPoolExecutor(1, "hbkit-snapshot") as thread, closing(read_ahead(fd, path, sizes)) as parts:
        jobs: list[Future[None]] = []
        for number, (group, data) in enumerate(zip(groups, parts, strict=False)):
            jobs = [*jobs[-1:], thread.submit(digest.update, data)]
            if not layout.is_framed(group, number == 0, data):
                raise Corrupt("the file is not laid out as it says", file=str(path), remedy=RESTORE)
            columns = {column.name: column.of(data) for column in group.columns}
            bounds.append([_bounds(values) for values in columns.values()])
            yield columns
            jobs[0].result()  # so that no more than two groups wait to be digested
        thread.submit(lambda: None).result()
        rest = b"".join(part.data for part in parts)
        digest.update(rest)
    if rest != (b"" if groups else layout.beginning) + layout.footer(entry.n_rows, bounds):
        raise Corrupt("the footer does not say what the file holds", file=str(path), remedy=RESTORE)
    if digest.hexdigest() != entry.digest:
        raise Corrupt("the file's checksum is wrong", file=str(path), remedy=RESTORE)


def read_keys(place: Place, entry: FileEntry, table: TableEntry) -> Int64s:
    """Keys of a file of erased keys, ascending: int64[n]; compared with its manifest. Raises Corrupt."""
    place.check(entry)
    reader = _Reader(place, entry, keys_schema(table.key_dtype))
    return np.concatenate([_NONE, *(columns["key"] for columns in _ascending(reader.path, reader.groups(["key"])))])


def _ascending(path: str, groups: Iterable[Columns]) -> Iterator[Columns]:
    """The same, keys as int64."""
    last: int | None = None
    for columns in groups:
        keys = columns["key"] = _wide(columns["key"])
        if len(keys):
            if (last is not None and keys[0] <= last) or (keys[1:] <= keys[:-1]).any():
                raise Corrupt("keys do not ascend", file=path, remedy=RESTORE)
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
