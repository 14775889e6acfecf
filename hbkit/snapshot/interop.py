"""Rows from elsewhere into a table, and rows of a table or a snapshot out to elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from hbkit._ext.batch import all_finite
from hbkit.errors import InvalidArgument, SchemaMismatch, StorageError, UnknownColumn
from hbkit.parquet import Field, File, Slab, list_files
from hbkit.ragged import Ragged
from hbkit.snapshot.files import storage_errors
from hbkit.snapshot.history import History
from hbkit.snapshot.manifest import Manifest
from hbkit.snapshot.merge import merged
from hbkit.snapshot.places import place_of
from hbkit.snapshot.rows import rows_schema
from hbkit.snapshot.table import TableLike
from hbkit.store.keys import as_keys
from hbkit.store.line import CHUNK_ROWS, Chunk, Float32s, Int64s

Key: TypeAlias = str | Field
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def import_arrays(
    table: TableLike,
    keys: Any,
    rows: Any,
    state: Any = None,
    freq: npt.ArrayLike | None = None,
    last_step: npt.ArrayLike | None = None,
) -> int:
    """Put rows of arrays into a table, in place of those that it has of the same keys; how many there were.

    Parameters
    ----------
    table : Table
        Rows of other keys stay as they are. Admission is not asked.
    keys : integers [n], or None
        Distinct, as `Table.lookup` takes them. None says that row i is that of key i: the weight of a
        ``torch.nn.Embedding`` or a Keras ``Embedding``.
    rows : floats [n, dim]
        Arrays of NumPy, mapped ones too; else whatever has ``__array__``: tensors in the CPU's memory, variables. Taken
        as float32.
    state : floats [n, n_state], optional
        Optimizer state, as the table's optimizer lays it out; its initial state when left out. A value of OneEmbedding
        is ``[row | state]``: give its first dim columns as rows, the others as state.
    freq, last_step : integers [n], optional
        0 and the table's present step when left out.

    Returns
    -------
    int
        Rows put. A row of the table's padding key is left out, since that key reads zeros.

    Raises
    ------
    InvalidArgument
        A key comes twice; shapes do not fit each other; there is NaN or infinity, or what float32 cannot hold. Before
        anything is put, but for numbers that are not finite: then the rows before are in the table.
    SchemaMismatch
        Rows or state have another width than the table's.

    Notes
    -----
    A following delta save has these rows. Takes 16 bytes a key, and memory for 65,536 rows at a time.
    """
    values, states = _array(rows, "rows", table.name), None if state is None else _array(state, "state", table.name)
    n = len(values)
    held = np.arange(n) if keys is None else _array(keys, "keys", table.name)
    held = as_keys(held, table.key_dtype, table.name)
    n_state = table.optimizer.n_state(table.dim)
    for what, array, width in (("rows", values, table.dim), ("state", states, n_state)):
        if array is not None and (array.ndim != 2 or len(array) != len(held)):
            raise InvalidArgument(
                f"{what} of shape {array.shape} for {len(held)} keys", table=table.name, remedy="give a line for each"
            )
        if array is not None and array.shape[1] != width:
            raise SchemaMismatch(
                f"{what} of {array.shape[1]} floats, the table has {width}",
                table=table.name,
                remedy="make a table of this width, or cut the columns",
            )
    stamps = []
    for what, given, default in (("freq", freq, 0), ("last_step", last_step, table.step)):
        column = np.full(n, default) if given is None else _array(given, what, table.name)
        if column.shape != (n,) or column.dtype.kind not in "iu":
            raise InvalidArgument(
                f"{what} is {column.dtype} of shape {column.shape}", table=table.name, remedy=f"give {n} integers"
            )
        stamps.append(column.astype(np.int64, copy=False))
    in_order = np.sort(held)
    if len(twice := in_order[1:][in_order[1:] == in_order[:-1]]):
        raise InvalidArgument(
            f"key {_shown(twice[0], table)} comes twice", table=table.name, remedy="keep one row a key"
        )
    put = 0
    for first in range(0, n, CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        put += _put(
            table,
            held[part],
            _floats(values[part], "rows", table.name),
            None if states is None else _floats(states[part], "state", table.name),
            stamps[0][part],
            stamps[1][part],
        )
    return put


def import_parquet(table: TableLike, path: Paths, key: Key = "key", vector: str = "row") -> int:
    """Put rows of Parquet files into a table, in place of those that it has of the same keys; how many there were.

    Parameters
    ----------
    table : Table
        Rows of other keys stay as they are. Imported rows have the optimizer's initial state, frequency 0 and the
        table's present step. Admission is not asked.
    path : str, path, or sequence of them
        Files, directories or globs; local, or URIs as `hbkit.data.Dataset.from_parquet` takes them.
    key : str or hbkit.parquet.Field
        Column of integers, no key twice. Strings become keys with ``Field(name, hash_to="int64", hash_seed=...)``, as
        in the dataset that the table is trained on.
    vector : str
        Column of lists, of fixed size or not, of float16, float32 or float64, each of the table's dim.

    Returns
    -------
    int
        Rows put. A row of the table's padding key is left out, since that key reads zeros.

    Raises
    ------
    NotFound, UnknownColumn
        No such files, or one lacks a column.
    InvalidArgument
        A key comes twice, in one file or in two, or does not fit the table's key_dtype. Nothing was put.
    SchemaMismatch
        A vector has another length than the table's dim, or a column holds something else. The rows before are in the
        table.
    NullFound
        A key, a vector or a float of it is null. The rows before are in the table.
    Corrupt, StorageError
        A file is damaged or cannot be read.

    Notes
    -----
    The keys are read first, 24 bytes each; then all, 65,536 rows at a time. A following delta save has these rows.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else path
    names = [name for one in paths for name in list_files(one)]
    key_field = key if isinstance(key, Field) else Field(key)
    vector_field = Field(vector, dtype="float32", ragged_rank=1)
    _refuse_twice(table, names, key_field)
    put = 0
    for columns, place in _read(names, [key_field, vector_field]):
        keys, lists = as_keys(columns[key_field.name], table.key_dtype, table.name), columns[vector]
        lengths = lists.lengths()
        if (wrong := np.flatnonzero(lengths != table.dim)).size:
            raise SchemaMismatch(
                f"the vector of key {_shown(keys[wrong[0]], table)} has {lengths[wrong[0]]} floats, "
                f"the table has {table.dim}",
                table=table.name,
                column=vector,
                **place,
                remedy="make a table of this dim, or leave the row out",
            )
        put += _put(table, keys, np.asarray(lists.values).reshape(len(keys), table.dim), column=vector, **place)
    return put


def _refuse_twice(table: TableLike, names: list[str], field: Field) -> None:
    parts, places = [], []
    for columns, place in _read(names, [field]):
        column = columns[field.name]
        if not isinstance(column, np.ndarray) or column.dtype.kind not in "iu":
            kind = "strings" if not isinstance(column, np.ndarray | Ragged) else "no integers"
            raise SchemaMismatch(
                f"the keys are {kind}",
                column=field.name,
                **place,
                remedy=f"give key=Field({field.name!r}, hash_to='int64') for strings, or a column of integers",
            )
        try:
            parts.append(as_keys(column, table.key_dtype, table.name))
        except InvalidArgument as e:
            raise InvalidArgument(e.problem, table=table.name, column=field.name, **place, remedy=e.remedy) from e
        places.append(place)
    keys = np.concatenate([np.zeros(0, np.int64), *parts])
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    if len(again):
        at = [order[again[0]], order[again[0] + 1]]
        ends = np.cumsum([len(part) for part in parts])
        first, second = (places[int(np.searchsorted(ends, x, side="right"))] for x in at)
        also = "there" if first == second else f"in row group {first['row_group']} of {first['file']}"
        raise InvalidArgument(
            f"key {_shown(keys[at[0]], table)} comes twice, also {also}",
            table=table.name,
            column=field.name,
            **second,
            remedy="keep one row a key",
        )


def _read(names: list[str], fields: list[Field]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Columns of all rows, at most CHUNK_ROWS of one row group at a time, and the file and row group."""
    for name in names:
        file = File(name)
        try:
            for field in fields:
                if file.find(field.name) is None:
                    raise UnknownColumn(
                        f"there is no column {field.name!r}", file=name, remedy=f"it has {', '.join(file.schema)}"
                    )
            for g, left in enumerate(file.row_group_rows):
                group = file.open_row_group(g, fields)
                while left:
                    n = min(left, CHUNK_ROWS)
                    slab = Slab(n)
                    group.add_to(slab, n)
                    left -= n
                    yield slab.finish(), {"file": name, "row_group": g}
        finally:
            file.close()


def _put(
    table: TableLike,
    keys: Int64s,
    values: Float32s,
    state: Float32s | None = None,
    freq: Int64s | None = None,
    last_step: Int64s | None = None,
    **place: object,
) -> int:
    """Put distinct keys, but for the padding key; how many."""
    for array in (values, state):
        if array is not None and not all_finite(np.ascontiguousarray(array)):
            bad = np.flatnonzero(~np.isfinite(array).all(axis=1))[0]
            raise InvalidArgument(
                f"NaN or infinity in the line of key {_shown(keys[bad], table)}",
                table=table.name,
                **place,
                remedy="leave the row out, or repair it",
            )
    if state is None:
        initial = np.asarray(table.optimizer.initial_state(table.dim), np.float32)
        state = np.broadcast_to(initial, (len(keys), len(initial)))
    freq = np.zeros(len(keys), np.int64) if freq is None else freq
    last_step = np.full(len(keys), table.step, np.int64) if last_step is None else last_step
    chunk = Chunk(keys, freq, last_step, values, state)
    if table.padding_key is not None:
        stays = keys != as_keys([table.padding_key], table.key_dtype, table.name)
        chunk = Chunk._make(column[stays] for column in chunk)
    table.store.put(chunk)
    return len(chunk.key)


def _array(given: Any, what: str, table: str) -> npt.NDArray[Any]:
    """An array, without a copy where that can be."""
    if hasattr(given, "detach"):  # a tensor of PyTorch that takes gradients refuses to become an array
        given = given.detach()
    try:
        array = np.asarray(given)
    except (TypeError, RuntimeError, ValueError) as e:
        raise InvalidArgument(
            f"{what} cannot become an array: {e}", table=table, remedy="bring it to the CPU, as float32"
        ) from e
    if array.dtype.kind not in "fiu":
        raise InvalidArgument(f"{what} of dtype {array.dtype}", table=table, remedy="give numbers")
    return array


def _floats(array: npt.NDArray[Any], what: str, table: str) -> Float32s:
    if array.dtype.kind != "f":
        raise InvalidArgument(f"{what} of dtype {array.dtype}", table=table, remedy="give floats")
    with np.errstate(over="ignore"):  # what becomes infinite is refused by `_put`
        return np.ascontiguousarray(array, np.float32)


def _shown(key: np.int64, table: TableLike) -> int:
    return int(key.astype(table.key_dtype))


@dataclass(frozen=True)
class Saved:
    """A table in a snapshot, for the exports; see `saved`.

    Attributes
    ----------
    name : str
    dim, n_state : int
        Floats of a row and of its state.
    key_dtype : str
    n_rows : int
    """

    name: str
    dim: int
    n_state: int
    key_dtype: str
    n_rows: int
    history: History
    chain: list[Manifest]

    def scan(self) -> Iterator[Chunk]:
        """All lines, in key order; holds some row groups of each file of the chain.

        The files are checked while they are read: what was yielded is right if all comes without an error. Raises
        Corrupt.
        """
        return merged(self.history, self.chain, self.name)


def saved(path: str | os.PathLike[str], table: str | None = None, commit: str | None = None) -> Saved:
    """A table as a commit holds it, for `export_arrow` and its siblings.

    Parameters
    ----------
    path : str or path
        Of a snapshot.
    table : str, optional
        May be left out where the commit has one.
    commit : str, optional
        Its id; the newest when left out.

    Raises
    ------
    NotFound, UnknownColumn, Corrupt, StorageError
        As `load`.
    """
    history = History(place_of(path))
    manifest = history.find(commit)
    if table is None and len(manifest.tables) == 1:
        (table,) = manifest.tables
    if table not in manifest.tables:
        raise UnknownColumn(
            f"no table {table!r} in commit {manifest.commit}" if table else "no table named",
            file=str(path),
            remedy=f"name one of {', '.join(manifest.tables) or 'none'}",
        )
    chain, entry = history.chain(manifest, table), manifest.tables[table]
    return Saved(table, entry.dim, entry.n_state, entry.key_dtype, entry.n_rows, history, chain)


def _source(table: TableLike | Saved) -> tuple[pa.Schema, int, Iterator[Chunk]]:
    """Schema of the lines, how many, and they, in key order."""
    if isinstance(table, Saved):
        n_state, n, chunks = table.n_state, table.n_rows, table.scan()
    else:
        n_state, n, chunks = table.optimizer.n_state(table.dim), len(table.store), table.store.scan()
    return rows_schema(table.key_dtype, table.dim, n_state), n, chunks


def export_arrow(table: TableLike | Saved) -> pa.RecordBatchReader:
    """All rows as a stream of Arrow record batches, in key order.

    Parameters
    ----------
    table : Table, or what `saved` gives
        It must rest until the stream is read.

    Returns
    -------
    pyarrow.RecordBatchReader
        Columns ``key, freq, last_step, row, state`` as in a snapshot's files, ``state`` only where there is any. Its
        ``read_all()`` is a ``pyarrow.Table``; pandas, Polars and DuckDB take that or the stream.
    """
    schema, _, chunks = _source(table)
    return pa.RecordBatchReader.from_batches(schema, (_batch(chunk, schema) for chunk in chunks))


def _batch(chunk: Chunk, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(_as(schema, "key", chunk.key)), pa.array(chunk.freq), pa.array(chunk.last_step)]
    for name in schema.names[len(arrays) :]:
        floats = np.ascontiguousarray(getattr(chunk, name)).reshape(-1)
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(floats), type=schema.field(name).type))
    return pa.record_batch(arrays, schema=schema)


def _as(schema: pa.Schema, name: str, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if name != "key":
        return column
    return column.astype(schema.field(name).type.to_pandas_dtype(), copy=False)  # unsigned keys: the same bits


def export_ipc(table: TableLike | Saved, path: str | os.PathLike[str]) -> int:
    """All rows as one local Arrow IPC file (Feather) with the columns of `export_arrow`; how many."""
    reader, n = export_arrow(table), 0
    with (
        _replacing(Path(path)) as part,
        pa.OSFile(str(part), "wb") as file,
        pa.ipc.new_file(file, reader.schema) as ipc,
    ):
        for batch in reader:
            ipc.write_batch(batch)
            n += len(batch)
    return n


def export_parquet(table: TableLike | Saved, path: str | os.PathLike[str]) -> int:
    """All rows as one local Parquet file with the columns of `export_arrow`, in place of one of that name; how many."""
    reader, n = export_arrow(table), 0
    with _replacing(Path(path)) as part, pq.ParquetWriter(part, reader.schema, compression="NONE") as writer:
        for batch in reader:
            writer.write_batch(batch)
            n += len(batch)
    return n


def export_npy(table: TableLike | Saved, directory: str | os.PathLike[str]) -> int:
    """All rows as arrays in a directory, in key order; how many.

    Parameters
    ----------
    table : Table, or what `saved` gives
        It must rest meanwhile.
    directory : str or path
        Gets ``key.npy`` (of the table's key_dtype), ``freq.npy`` and ``last_step.npy`` (int64), ``row.npy`` and, where
        there is state, ``state.npy`` (float32), which `import_arrays` takes again. Made where it is absent; files of
        these names are replaced. Takes memory for some chunks only.
    """
    return _write_arrays(table, directory, {name: name for name in Chunk._fields})


def _write_arrays(table: TableLike | Saved, directory: str | os.PathLike[str], names: dict[str, str]) -> int:
    """Columns of all rows as arrays of these file names."""
    schema, n, chunks = _source(table)
    with ExitStack() as stack:
        files = {}
        for field in schema:
            if field.name not in names:
                continue
            part = stack.enter_context(_replacing(Path(directory) / f"{names[field.name]}.npy"))
            files[field.name] = stack.enter_context(open(part, "wb"))
            nested = pa.types.is_fixed_size_list(field.type)
            kind = np.dtype((field.type.value_type if nested else field.type).to_pandas_dtype())
            shape = (n, field.type.list_size) if nested else (n,)
            header = {"descr": dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            write_array_header_1_0(files[field.name], header)
        for chunk in _exactly(n, chunks, table.name):
            for name, file in files.items():
                file.write(np.ascontiguousarray(_as(schema, name, getattr(chunk, name))).data)
    return n


def export_dense(table: TableLike | Saved) -> tuple[Float32s, npt.NDArray[Any]]:
    """All rows as one dense weight, and the key of each, ascending.

    Parameters
    ----------
    table : Table, or what `saved` gives
        It must rest meanwhile.

    Returns
    -------
    weights : float32[n, dim]
        For ``torch.nn.Embedding.from_pretrained`` or a Keras ``Embedding``: row i is that of ``vocabulary[i]``.
    vocabulary : key_dtype[n]
        Unsigned keys are in the order of their signed bits.
    """
    schema, n, chunks = _source(table)
    weights, vocabulary = np.empty((n, table.dim), np.float32), np.empty(n, schema.field("key").type.to_pandas_dtype())
    at = 0
    for chunk in _exactly(n, chunks, table.name):
        to = slice(at, at := at + len(chunk.key))
        weights[to], vocabulary[to] = chunk.row, _as(schema, "key", chunk.key)
    return weights, vocabulary


def export_dense_npy(table: TableLike | Saved, directory: str | os.PathLike[str]) -> int:
    """What `export_dense` gives as ``weights.npy`` and ``vocabulary.npy`` in a directory; how many rows."""
    return _write_arrays(table, directory, {"row": "weights", "key": "vocabulary"})


def _exactly(n: int, chunks: Iterator[Chunk], table: str) -> Iterator[Chunk]:
    """The same chunks, which must hold n rows together."""
    have = 0
    for chunk in chunks:
        have += len(chunk.key)
        if have > n:
            break
        yield chunk
    if have != n:
        raise StorageError(f"there are {have} rows, there were {n}", table=table, remedy="export it while it rests")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends without an exception."""
    part = path.with_name(path.name + ".part")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
