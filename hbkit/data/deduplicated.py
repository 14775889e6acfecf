"""Files that store what consecutive samples share once: how they are read as samples, and how they are written.

::

    samples               stored: one row is a block of samples
    user  history  item     user      history           user_index      item
    7     [1, 2]   50       [7, 9]    [[1, 2], [3]]     [0, 0, 1, 0]    [50, 51, 52, 53]
    7     [1, 2]   51
    9     [3]      52
    7     [1, 2]   53

A value column holds the distinct values of the block, its index column one number a sample: which of them is the
sample's. All other columns hold one item a sample.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors, ragged
from hbkit.data.batch import Batch
from hbkit.data.files import ArrowFile, DataFile, Mask, RowGroup
from hbkit.data.output import ROW_GROUP_ROWS, Output, writers
from hbkit.parquet import ColumnType, Field
from hbkit.parquet.arrow import Ranges, column_type, decode, rows_of
from hbkit.parquet.decoded import Slab, read
from hbkit.parquet.threads import ALONE, Threads
from hbkit.parquet.values import missing
from hbkit.ragged import Column, Ragged, Strings

__all__ = ["Deduplicated", "declared", "layout", "write_deduplicated"]

Int64s = npt.NDArray[np.int64]
_KEY = "hbkit.deduplicated"  # in the file's key-value metadata
_BROKEN = "write the file again, or leave it out"


def declared(file: DataFile) -> dict[str, list[str]] | None:
    """Index column to value columns, as the file's metadata says; None where it says nothing."""
    said = _said(file)
    return None if said is None else said["index"]


def _said(file: DataFile) -> dict[str, Any] | None:
    text = file.metadata.get(_KEY)
    if text is None:
        return None
    try:
        said = json.loads(text)
        index = {str(k): [str(name) for name in v] for k, v in said["index"].items()}
        samples = [n for n in said["samples"] if type(n) is int and n >= 0]
        if len(samples) != len(file.row_group_rows):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise errors.Corrupt(f"the metadata {_KEY!r} is damaged", remedy=_BROKEN, file=file.path) from e
    return {"index": index, "samples": samples}


class Deduplicated(ArrowFile):
    """The samples of a file that stores blocks of them; see ``DataFile`` for what it gives.

    Parameters
    ----------
    file : DataFile
        Its rows are blocks.
    deduplicated : mapping of str to sequence of str
        Index column to the value columns that it restores.

    Raises
    ------
    UnknownColumn, SchemaMismatch
        An index column is not there, or no list of integers.
    Corrupt
        The file's metadata, or an index column that has to be read, is damaged.

    Notes
    -----
    The number of samples in each row group stands in the metadata of files that ``write_deduplicated`` made; of other
    files, an index column is read once to count them. A value is decoded and hashed once a row group, however many
    samples share it.
    """

    def __init__(self, file: DataFile, deduplicated: Mapping[str, Sequence[str]]) -> None:
        self.file, self.path, self.metadata = file, file.path, file.metadata
        self._index_of = {name: index for index, names in deduplicated.items() for name in names}
        self._indices = list(deduplicated)
        for name in self._indices:
            kind = file.schema.get(name)
            if kind is None:
                raise errors.UnknownColumn(
                    f"index column {name!r} is not in the file",
                    remedy=f"columns are {', '.join(file.schema)}",
                    file=self.path,
                )
            if kind.ragged_rank != 1 or not kind.dtype.removeprefix("u").startswith("int") or kind.logical:
                raise errors.SchemaMismatch(
                    "an index column must hold lists of integers",
                    remedy="name the column that says which value is each sample's",
                    file=self.path,
                    column=name,
                )
        self.schema = {}
        kept = []
        for field in file.arrow_schema:
            if field.name in self._indices:
                continue
            kind = file.schema.get(field.name, ColumnType("", unsupported="a structure holds no items"))
            # nested and of a rank: a list, in no dictionary or extension that would hide its items
            if kind.ragged_rank and not kind.unsupported and pa.types.is_nested(field.type):
                kept.append(field.type.value_field.with_name(field.name))
                self.schema[field.name] = column_type(kept[-1])
            else:
                reason = kind.unsupported or "the column is no list with one item a sample"
                self.schema[field.name] = ColumnType("", unsupported=reason)
        self.arrow_schema = pa.schema(kept)
        said = _said(file)
        groups = range(len(file.row_group_rows))
        self.row_group_rows = said["samples"] if said else [self._count(g) for g in groups]

    def _count(self, g: int) -> int:
        name = self._indices[0]
        return int(_items(self.file.read_arrow(g, [name]).column(name))[0].sum())

    def read_row_group(
        self, g: int, fields: Sequence[Field], rows: Mask | None = None, num_threads: int = 1
    ) -> dict[str, Column]:
        """See ``DataFile``."""
        n_rows = self.row_group_rows[g] if rows is None else int(np.count_nonzero(rows))
        return read(self._open(g, fields, rows, n_rows, num_threads), n_rows)

    def open_row_group(self, g: int, fields: Sequence[Field], threads: Threads = ALONE) -> RowGroup:
        """See ``DataFile``; values are repeated for the rows of one step only."""
        return self._open(g, fields, None, self.row_group_rows[g], threads.n)

    def _open(self, g: int, fields: Sequence[Field], rows: Mask | None, n_rows: int, num_threads: int) -> RowGroup:
        arrays, places = self._read(g, self._stored(fields), num_threads)
        columns: dict[str, Column] = {}
        for field in fields:
            name, place = field.name, {"file": self.path, "column": field.name, "row_group": g}
            if name not in self.schema:
                columns[name] = missing(n_rows, field, field.of_missing(), place)
                continue
            array = arrays[name]
            if rows is not None and name not in places:
                array = array.filter(pa.array(rows))
            elif rows is not None:  # nulls and misfits that no row takes do not matter
                used, places[name] = np.unique(places[name][rows], return_inverse=True)
                array = array.take(pa.array(used))
            columns[name] = decode(array, field, self.schema[name], place)
        return _Reader(columns, places)

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1, ranges: Ranges | None = None) -> pa.Table:
        """See ``DataFile``; a row is a sample."""
        arrays, places = self._read(g, names, num_threads)
        table = pa.table({n: a.take(pa.array(places[n])) if n in places else a for n, a in arrays.items()})
        return rows_of(table, ranges)

    def _read(
        self, g: int, names: Sequence[str], num_threads: int
    ) -> tuple[dict[str, pa.ChunkedArray], dict[str, Int64s]]:
        """The items of columns, all blocks end to end; and of value columns, which item is each sample's: int64[n]."""
        # one index column is always read: it says how many items the others must have
        indices = dict.fromkeys([self._indices[0], *(self._index_of[n] for n in names if n in self._index_of)])
        table = self.file.read_arrow(g, [*indices, *names], num_threads)
        items = {name: _items(table.column(name)) for name in (*indices, *names)}
        n_samples = items[self._indices[0]][0]
        have, promised = int(n_samples.sum()), self.row_group_rows[g]
        if have != promised:
            raise self._corrupt(f"{have} samples where the metadata promises {promised}", self._indices[0], g)
        places = {}
        for name, (lengths, _) in items.items():
            if name not in self._index_of:
                if not np.array_equal(lengths, n_samples):
                    raise self._corrupt(
                        "a block has not one item a sample; is this a value column that was not named?", name, g
                    )
                continue
            index = self._index_of[name]
            of = _numbers(items[index][1])
            if of is None or ((of < 0) | (of >= np.repeat(lengths, n_samples))).any():
                raise self._corrupt(f"an index is none of a value in its block of {name!r}", index, g)
            places[name] = of + np.repeat(np.cumsum(lengths) - lengths, n_samples)
        return {name: items[name][1] for name in names}, places

    def _corrupt(self, problem: str, column: str, g: int) -> errors.Corrupt:
        return errors.Corrupt(problem, remedy=_BROKEN, file=self.path, column=column, row_group=g)

    def decoded_by(self, name: str) -> str:
        """See ``DataFile``."""
        return "pyarrow"

    def close(self) -> None:
        """See ``DataFile``."""
        self.file.close()


class _Reader:
    """Rows of columns, some of which hold their values once; ``places`` says which of them is each row's."""

    def __init__(self, columns: Mapping[str, Any], places: Mapping[str, Int64s]) -> None:
        self._columns, self._places, self._at = columns, places, 0

    def add_to(self, slab: Slab, n_rows: int, rows: Mask | None = None) -> None:
        """See ``RowGroup``."""
        step = slice(self._at, self._at + n_rows)
        self._at += n_rows
        for name, column in self._columns.items():
            part = ragged.take(column, self._places[name][step]) if name in self._places else column[step]
            slab.column(name).add(part if rows is None else ragged.take(part, rows))

    def skip(self, n_rows: int) -> None:
        """See ``RowGroup``."""
        self._at += n_rows


def _items(lists: pa.ChunkedArray) -> tuple[Int64s, pa.ChunkedArray]:
    """Lengths of lists, a null one being empty, and their items end to end."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    return lengths, pa.chunked_array([chunk.flatten() for chunk in lists.chunks], lists.type.value_type)


def _numbers(array: pa.ChunkedArray) -> Int64s | None:
    return None if array.null_count else array.to_numpy().astype(np.int64)


def layout(deduplicated: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Index column to value columns, checked.

    Raises
    ------
    InvalidArgument
        It names no index column, or a column twice.
    """
    remedy = "give {index column: [value columns]}"
    if not isinstance(deduplicated, Mapping) or not deduplicated:
        raise errors.InvalidArgument(f"deduplicated is {deduplicated!r}", remedy=remedy)
    out = {name: [values] if isinstance(values, str) else list(values) for name, values in deduplicated.items()}
    n_named = Counter([*out, *(name for names in out.values() for name in names)])
    for name, n in n_named.items():
        if n > 1:
            raise errors.InvalidArgument(f"deduplicated names {name!r} {n} times", remedy=remedy)
    return out


Samples: TypeAlias = "Mapping[str, Any] | pa.Table | pa.RecordBatch"


def write_deduplicated(
    path: str | os.PathLike[str],
    columns: Samples | Iterable[Samples],
    deduplicated: Mapping[str, Sequence[str]],
    block_rows: int = 1024,
) -> None:
    """Write samples as a Parquet file in which values that samples share are stored once a block.

    ``Dataset.from_parquet`` reads it as the samples that were written.

    Parameters
    ----------
    path : str or path
        Ends in ``.parquet``; a file that is there is replaced when the new one is whole.
    columns : mapping of str to column, pyarrow.Table, or an iterable of them
        One row a sample: arrays, ``Ragged`` and ``Strings``, such as the batches of a ``Dataset``. Samples that share
        values should follow one another.
    deduplicated : mapping of str to sequence of str
        Name of an index column, which is made here, to the columns that are stored once for all samples of a block
        that agree in all of them: ``{"user_index": ["user", "history"]}``.
    block_rows : int
        Samples in a block.

    Raises
    ------
    InvalidArgument, UnknownColumn, SchemaMismatch, Unsupported
        The columns do not suit ``deduplicated``, each other, or the format.
    StorageError
        The operating system refused.

    Notes
    -----
    Equal means equal in every bit: nothing is lost. A row group of 131,072 samples is held in memory.
    """
    indices = layout(deduplicated)
    if not isinstance(block_rows, int) or block_rows < 1:
        raise errors.InvalidArgument(f"block_rows is {block_rows!r}", remedy="use a positive integer")
    output = Output(path, overwrite=True)
    if not output.is_file:
        raise errors.InvalidArgument("the path is no file's", remedy="end it in .parquet", file=output.path)
    n_blocks = max(ROW_GROUP_ROWS // block_rows, 1)
    groups = _groups(_tables(columns), n_blocks * block_rows)
    group = next(groups, None)
    if group is None:
        raise errors.InvalidArgument("there are no columns to write", remedy="give at least one batch")
    n_samples, blocks = [], _blocks(group, indices, block_rows)
    with output, writers(output, [""], blocks.schema, n_blocks, "zstd") as (writer,):
        while group is not None:
            writer.write(_blocks(group, indices, block_rows))
            writer.flush()
            n_samples += [group.num_rows] * (group.num_rows > 0)
            group = next(groups, None)
        writer.finish({_KEY: json.dumps({"index": indices, "samples": n_samples})})


def _tables(columns: Samples | Iterable[Samples]) -> Iterator[pa.Table]:
    try:
        if isinstance(columns, pa.RecordBatch):
            columns = pa.Table.from_batches([columns])
        if isinstance(columns, Mapping):
            n = columns.n_rows if isinstance(columns, Batch) else None  # rows behind it are padding
            columns = pa.table({name: _arrow(column) for name, column in columns.items()}).slice(0, n)
    except (pa.ArrowException, TypeError) as e:
        raise errors.InvalidArgument(f"these are no columns: {e}", remedy="give columns of equally many rows") from e
    if isinstance(columns, pa.Table):
        yield columns.replace_schema_metadata(None)
    elif isinstance(columns, Iterable) and not isinstance(columns, (str, bytes)):
        for part in columns:
            yield from _tables(part)
    else:
        raise errors.InvalidArgument(f"columns are a {type(columns).__name__}", remedy="give a dict of columns")


def _arrow(column: Any) -> pa.Array:
    if isinstance(column, (Ragged, Strings)):
        return column.to_arrow()
    if isinstance(column, np.ndarray) and column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])
    return column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column)


def _groups(tables: Iterator[pa.Table], n_rows: int) -> Iterator[pa.Table]:
    """The rows cut into tables of ``n_rows``; at least one, if of no rows."""
    held: pa.Table | None = None
    done = False
    for table in tables:
        try:
            held = table if held is None else pa.concat_tables([held, table])
        except pa.ArrowInvalid as e:
            raise errors.SchemaMismatch(f"the batches differ: {e}", remedy="give all the same columns") from e
        while held.num_rows >= n_rows:
            done = True
            yield held.slice(0, n_rows)
            held = held.slice(n_rows)
    if held is not None and (held.num_rows or not done):
        yield held


def _blocks(table: pa.Table, indices: Mapping[str, Sequence[str]], block_rows: int) -> pa.RecordBatch:
    """The samples as one row a block."""
    for field in table.schema:
        if reason := column_type(field).unsupported:
            raise errors.Unsupported(reason, remedy="leave the column out", column=field.name)
        if field.name in indices or table.schema.names.count(field.name) > 1:
            raise errors.InvalidArgument("two columns have this name", remedy="rename one", column=field.name)
    for name in (name for names in indices.values() for name in names):
        if name not in table.schema.names:
            raise errors.UnknownColumn(
                f"column {name!r} is not given", remedy=f"columns are {', '.join(table.schema.names)}"
            )
    n = table.num_rows
    block, starts = np.arange(n) // block_rows, np.arange(0, n, block_rows)
    columns = {name: table.column(name).combine_chunks() for name in table.schema.names}
    lists = {name: _lists(np.append(starts, n), column) for name, column in columns.items()}
    for index, names in indices.items():
        # the block is part of the code, and codes count up: a block's begin where its first sample's is
        code = _combined([block, *(_codes(columns[name]) for name in names)])
        distinct, first = np.unique(code, return_index=True)
        splits = np.append(code[starts], len(distinct))
        for name in names:
            lists[name] = _lists(splits, columns[name].take(pa.array(first)))
        lists[index] = _lists(np.append(starts, n), pa.array((code - splits[block]).astype(np.int32)))
    return pa.RecordBatch.from_pydict(lists)


def _lists(splits: Int64s, items: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(splits.astype(np.int32)), items)


def _codes(array: pa.Array) -> Int64s:
    """A number for each row, the same where the rows are the same in every bit, counting up in order of appearance."""
    if isinstance(array, pa.ExtensionArray):
        return _codes(array.storage)
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _codes(array.dictionary_decode())
    if pa.types.is_nested(kind):
        lengths, items = _items(pa.chunked_array([array]))
        splits = pa.py_buffer(8 * np.append(0, np.cumsum(lengths)))
        codes = pa.py_buffer(np.ascontiguousarray(_codes(items.combine_chunks())))
        texts = pa.Array.from_buffers(pa.large_binary(), len(array), [None, splits, codes])
        return _combined([_encoded(texts), array.is_null().to_numpy(zero_copy_only=False)])
    if pa.types.is_floating(kind):  # as bits: of equal floats, 0.0 and -0.0 differ, and so do NaNs
        array = array.view(f"int{kind.bit_width}")
    return _encoded(array)


def _combined(codes: Sequence[npt.NDArray[Any]]) -> Int64s:
    rows = np.ascontiguousarray(np.stack(codes, axis=1), np.int64)
    kind = pa.binary(8 * len(codes))
    return _encoded(pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)]))


def _encoded(array: pa.Array) -> Int64s:
    return array.dictionary_encode(null_encoding="encode").indices.to_numpy().astype(np.int64)
