"""One Parquet file: its checked footer, its columns, and its row groups read row by row."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hbkit import errors
from hbkit._ext import chunk as _chunk
from hbkit._ext import thrift
from hbkit.parquet import codecs
from hbkit.parquet.arrow import Ranges, decode, is_plain, rows_of, to_arrow
from hbkit.parquet.bounds import Promises, guarantee, page_guarantees
from hbkit.parquet.column import Decoding
from hbkit.parquet.decoded import Decoded, Gathered, Mask, RowGroup, Slab, read
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.footer import Chunk, read_footer
from hbkit.parquet.schema import Leaf
from hbkit.parquet.source import Source, open_source, unreadable
from hbkit.parquet.threads import ALONE, Threads
from hbkit.parquet.values import Place, missing, refuse_nulls
from hbkit.ragged import Column, Strings

__all__ = ["File", "read_columns"]

LIMIT_NBYTES = 1 << 32
CACHE_NBYTES = 8 << 20  # a read of more goes around the caches: it would not be there when it is used
JUMP_ROWS = 1000  # from here on a skip looks into the offset index
INT96 = 3
_REWRITE = "write the file again, or leave it out"
# PARQUET-816: these writers leave the dictionary page's header out of a chunk's size
_SHORT_CHUNKS = re.compile(r"parquet-mr(?! version)|parquet-mr version (0|1\.[01]|1\.2\.[0-8])\b")
_SHORT_BY = 100


class PageRows(NamedTuple):
    """Where each page of a column chunk begins in it, the row it begins with, and where the last one ends."""

    offsets: npt.NDArray[np.int64]
    first_rows: npt.NDArray[np.int64]
    end: int


class _Native:
    """One column of a row group, by our own decoder."""

    def __init__(
        self,
        decoding: Decoding,
        data: Any,
        chunk: Chunk,
        pages: Callable[[], PageRows | None],
        n_rows: int,
        limit_nbytes: int,
        place: Place,
    ) -> None:
        self._decoding, self._limit, self._place = decoding, limit_nbytes, place
        self._chunk = _chunk.Chunk(decoding.form, data, chunk.codec, chunk.n_values, codecs.decompress, place)
        self._row, self._n_rows, self.n_values = 0, n_rows, chunk.n_values
        self._pages = pages
        # lists vary: rooms of their mean length would be moved
        self._values_per_row = chunk.n_values / max(n_rows, 1) * (1.1 if decoding.stored.ragged_rank else 1)
        self.nbytes_per_row = self._values_per_row * (16 if decoding.dtype is None else decoding.dtype.itemsize)

    def add_to(self, column: Gathered, n_rows: int, rows: Mask | None, n_expected: int, past_cache: bool) -> None:
        decoding = self._decoding
        # a value that does not fit is found when the output is finished, and must name its row group
        is_new = decoding.may_misfit and column.place is not self._place
        if column.output is None or is_new or not decoding.goes_on(column.decoding):
            column.close()
            column.decoding, column.place = decoding, self._place
            column.output = decoding.output(self._limit, past_cache)
            n_values = int(n_expected * self._values_per_row) + 64
            column.output.reserve(n_expected, n_values, 16 * n_values)
        self.read_into(n_rows, column.output, rows)
        self.check_nulls(column.output)

    def read_into(self, n_rows: int, output: Any, rows: Mask | None = None) -> None:
        if rows is None:
            self._chunk.read(n_rows, output)
        else:
            self._chunk.read_masked(rows.view(np.uint8), output)
        self._step(n_rows)

    def check_nulls(self, output: Any) -> None:
        refuse_nulls(output.n_nulls, output.n_rows, self._decoding.field, self._place)

    def skip(self, n_rows: int) -> None:
        to = self._row + n_rows
        pages = self._pages() if n_rows >= JUMP_ROWS else None
        if pages is not None:
            page = int(np.searchsorted(pages.first_rows, to, side="right")) - 1
            if page > 0 and pages.first_rows[page] > self._row and to < self._n_rows:
                self._chunk.jump(int(pages.offsets[page]), int(pages.end))
                n_rows, self._row = to - int(pages.first_rows[page]), int(pages.first_rows[page])
        self._chunk.skip(n_rows)
        self._step(n_rows)

    def _step(self, n_rows: int) -> None:
        self._row += n_rows
        if self._row == self._n_rows:
            self._chunk.finish()


class _RowGroup:
    """Columns that are decoded as they are read, and such as had to be decoded whole."""

    def __init__(self, columns: dict[str, _Native | Column], threads: Threads) -> None:
        self._names, self._threads = list(columns), threads
        self._native = {name: c for name, c in columns.items() if isinstance(c, _Native)}
        self._whole = Decoded({name: c for name, c in columns.items() if not isinstance(c, _Native)})
        self._nbytes_per_row = sum(c.nbytes_per_row for c in self._native.values())
        # the longest first, so that no thread begins with it when the others are done
        self._order = sorted(self._native, key=lambda name: -self._native[name].nbytes_per_row)

    def add_to(self, slab: Slab, n_rows: int, rows: Mask | None = None) -> None:
        n, past_cache = slab.n_rows, slab.n_rows * self._nbytes_per_row > CACHE_NBYTES
        gathered = {name: slab.column(name) for name in self._names}  # in the fields' order
        self._threads.each(
            lambda name: self._native[name].add_to(gathered[name], n_rows, rows, n, past_cache), self._order
        )
        self._whole.add_to(slab, n_rows, rows)

    def skip(self, n_rows: int) -> None:
        self._threads.each(lambda name: self._native[name].skip(n_rows), self._order)
        self._whole.skip(n_rows)


class File:
    """An open Parquet file.

    Parameters
    ----------
    source : Source, str or path
    ignore_case : bool
        Find columns by name whatever the case of their letters; what they are called stays as the caller says.
    limit_nbytes : int
        The most that one column of one read may take.

    Attributes
    ----------
    path : str
    schema : dict of str to ColumnType
        Columns in file order; members of structures and maps by dotted path. The ones that cannot be read say why in
        ``.unsupported``.
    row_group_rows : list of int
        Rows of each row group.
    n_rows : int
    metadata : dict of str to str
        The footer's key-value pairs, without the Arrow schema.

    Raises
    ------
    NotFound, StorageError
        The file cannot be opened.
    Corrupt
        The footer is damaged, or the file is not Parquet.
    Unsupported
        The footer is encrypted.
    SchemaMismatch
        Under ``ignore_case``, two columns differ in case alone.

    Notes
    -----
    Reading is safe from several threads at once.
    """

    def __init__(
        self, source: Source | str | os.PathLike[str], ignore_case: bool = False, limit_nbytes: int = LIMIT_NBYTES
    ) -> None:
        self.source: Source = open_source(source) if isinstance(source, (str, os.PathLike)) else source
        self.path, self.remote = self.source.path, self.source.remote
        self.footer = read_footer(self.source)
        self.row_group_rows = self.footer.row_group_rows
        self.n_rows = sum(self.row_group_rows)
        self.metadata = {k: v for k, v in self.footer.pairs.items() if k != "ARROW:schema"}
        self._limit = limit_nbytes
        self._arrow: tuple[Any, pa.Schema] | None = None
        self._planned: list[tuple[Field, Leaf | None, Decoding | None]] | None = None
        self._leaves: dict[str, Leaf] = {}
        self.schema: dict[str, ColumnType] = {}
        self._members: dict[str, list[str]] = {}
        tops = [name for name, _, _ in self.footer.columns]
        for leaf in self.footer.leaves:
            top = tops[leaf.column]
            if leaf.name != top:
                self._members.setdefault(top, []).append(leaf.name)
                if leaf.name in tops:  # a column that is called so comes before a member
                    continue
            if leaf.name in self._leaves:
                leaf.refuse("two columns have this name")
            self._leaves[leaf.name] = leaf
            self.schema[leaf.name] = leaf.kind
        self._folded = self._fold() if ignore_case else {}

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process opens the file anew
        return File, (self.source, bool(self._folded), self._limit)

    def _fold(self) -> dict[str, str]:
        folded: dict[str, str] = {}
        for name in self.schema:
            if name.casefold() in folded:
                other = folded[name.casefold()]
                raise errors.SchemaMismatch(
                    f"columns {other!r} and {name!r} differ in case alone",
                    remedy="read this file without ignore_case",
                    file=self.path,
                )
            folded[name.casefold()] = name
        return folded

    def find(self, name: str) -> str | None:
        """The name in this file of the column that a field calls `name`; None where there is none.

        Raises
        ------
        Unsupported
            It is a structure or map, whose members are columns of their own.
        """
        if name in self.schema:
            return name
        if name in self._members:
            raise errors.Unsupported(
                "a structure or map is read by its members",
                remedy=f"name {' or '.join(self._members[name][:5])}",
                file=self.path,
                column=name,
            )
        return self._folded.get(name.casefold())

    def decoded_by(self, name: str) -> str:
        """Which decoder takes a column: "native", or "pyarrow" where it takes one of its chunks."""
        leaf = self._leaves[name]
        return "native" if all(self._is_native(leaf, codec) for codec in self.footer.codecs(leaf.index)) else "pyarrow"

    def chunks(self, name: str) -> list[Chunk]:
        """What the footer says of a column in each row group."""
        return [self.footer.chunk(g, self._leaves[name].index) for g in range(len(self.row_group_rows))]

    @staticmethod
    def _is_native(leaf: Leaf, codec: int) -> bool:
        return leaf.physical != INT96 and codec in codecs.NATIVE

    @property
    def arrow_schema(self) -> pa.Schema:
        """What expressions on the file's rows are bound to."""
        return self._reader()[1]

    def _reader(self) -> tuple[Any, pa.Schema]:
        """pyarrow's metadata and schema; asked for where it is needed, since reading them takes a while."""
        if self._arrow is None:
            try:
                reader = pq.ParquetFile(self.source.file)
                self._arrow = reader.metadata, reader.schema_arrow
            except errors.HbkitError:  # the source's own
                raise
            except Exception as e:
                raise self.broken(e, "the footer") from e
            if self._arrow[1].names != [name for name, _, _ in self.footer.columns]:
                raise errors.Corrupt("the footer's schema contradicts itself", remedy=_REWRITE, file=self.path)
        return self._arrow

    def open_row_group(self, g: int, fields: Sequence[Field], threads: Threads = ALONE) -> RowGroup:
        """The rows of one row group, each column as its field asks.

        Parameters
        ----------
        g : int
        fields : sequence of Field
        threads : Threads
            They share the columns of each read.

        Raises
        ------
        Corrupt
            The bytes break the format; says which column. Also while reading.
        UnknownColumn, Unsupported, SchemaMismatch, NullFound
            A field does not suit the file. Also while reading.
        BudgetExceeded
            While reading: a column takes more than ``limit_nbytes``.
        """
        return _RowGroup(self._open(g, fields), threads)

    def _open(self, g: int, fields: Sequence[Field]) -> dict[str, _Native | Column]:
        """Each column's reader, or the column itself where it has to be decoded whole, or is not in the file."""
        if not 0 <= g < len(self.row_group_rows):
            raise errors.InvalidArgument(
                f"row group {g} of {len(self.row_group_rows)}", remedy="count from 0", file=self.path
            )
        n_rows = self.row_group_rows[g]
        found: dict[str, _Native | Column] = {}
        wanted: list[tuple[str, Decoding, Chunk, Place]] = []
        for field, leaf, decoding in self._plan(fields):
            place = {"file": self.path, "column": field.name, "row_group": g}
            if leaf is None or decoding is None:
                found[field.name] = missing(n_rows, field, field.of_missing(), place)
                continue
            chunk = self.footer.chunk(g, leaf.index)
            if self._is_native(leaf, chunk.codec):
                wanted.append((field.name, decoding, chunk, place))
            else:
                table = self._read(g, [leaf.index], field.name)
                found[field.name] = decode(table.column(0), field, leaf.kind, place)
        readers = self._readers(g, [(decoding, chunk, place) for _, decoding, chunk, place in wanted])
        found.update({name: reader for (name, _, _, _), reader in zip(wanted, readers, strict=True)})
        return {field.name: found[field.name] for field in fields}

    def _readers(self, g: int, wanted: Sequence[tuple[Decoding, Chunk, Place]]) -> list[_Native]:
        """Readers of column chunks, whose bytes are asked for together."""
        buffers = self.source.read([self._range(chunk, place) for _, chunk, place in wanted])
        n = self.row_group_rows[g]
        return [
            _Native(decoding, data, chunk, partial(self._page_rows, chunk, n), n, self._limit, place)
            for (decoding, chunk, place), data in zip(wanted, buffers, strict=True)
        ]

    def _page_rows(self, chunk: Chunk, n_rows: int) -> PageRows | None:
        """Where the pages of a column chunk lie and which rows they begin with; None without a sound offset index."""
        if chunk.offset_index is None or sum(chunk.offset_index) > self.source.nbytes:
            return None
        pages = thrift.read_offset_index(self.source.read([chunk.offset_index])[0])
        if pages is None or len(pages) == 0:
            return None
        offsets, sizes, first_rows = (pages - [chunk.first_page, 0, 0]).T
        end = int(offsets[-1] + sizes[-1])
        rising = (np.diff(offsets) > 0).all() and (np.diff(first_rows) >= 0).all()
        inside = offsets[0] >= 0 and sizes[-1] > 0 and end <= chunk.nbytes
        complete = first_rows[0] == 0 and first_rows[-1] < n_rows
        return PageRows(offsets, first_rows, end) if rising and inside and complete else None

    def _plan(self, fields: Sequence[Field]) -> list[tuple[Field, Leaf | None, Decoding | None]]:
        """The leaf of each field and how to decode it; kept for the fields that were asked for last."""
        last = self._planned
        if last is not None and len(last) == len(fields) and all(p[0] is f for p, f in zip(last, fields, strict=True)):
            return last
        plan: list[tuple[Field, Leaf | None, Decoding | None]] = []
        for field in fields:
            name = self.find(field.name)
            if name is None:
                plan.append((field, None, None))
                continue
            leaf, place = self._leaves[name], {"file": self.path, "column": field.name}
            if leaf.kind.unsupported:
                raise errors.Unsupported(leaf.kind.unsupported, remedy="leave it out of fields", **place)
            plan.append((field, leaf, Decoding(leaf, field, place)))
        self._planned = plan
        return plan

    def _range(self, chunk: Chunk, place: Place) -> tuple[int, int]:
        """Offset and size of a column chunk's pages."""
        if chunk.n_values == 0 and chunk.first_page < 0:
            return 0, 0
        nbytes = chunk.nbytes
        if _SHORT_CHUNKS.match(self.footer.writer):
            nbytes = min(nbytes + _SHORT_BY, self.source.nbytes - chunk.first_page)
        if chunk.first_page < 0 or nbytes < 0 or chunk.first_page + nbytes > self.source.nbytes:
            raise errors.Corrupt("the column chunk lies outside the file", remedy=_REWRITE, **place)
        return chunk.first_page, nbytes

    def read_row_group(
        self,
        g: int,
        fields: Sequence[Field],
        rows: Mask | None = None,
        num_threads: int = 1,
    ) -> dict[str, Column]:
        """The columns of one row group, each as its field asks; the caller owns their memory.

        Parameters
        ----------
        g, fields
            As of `open_row_group`.
        rows : bool[row_group_rows[g]], optional
            Only these rows; nulls and misfits elsewhere do not matter.
        num_threads : int
            More than 1 decodes columns in parallel.

        Raises
        ------
        HbkitError
            As `open_row_group`.
        """
        with Threads(num_threads) as threads:
            return read(self.open_row_group(g, fields, threads), self.row_group_rows[g], rows)

    def read(self, fields: Sequence[Field], row_groups: Sequence[int], dictionary: bool = False) -> dict[str, Any]:
        """Several row groups end to end; see `read_columns`."""
        opened = [self._open(g, fields) for g in row_groups]
        n_rows = sum(self.row_group_rows[g] for g in row_groups)
        out: dict[str, Any] = {}
        for field, _, decoding in self._plan(fields):
            found = [columns.pop(field.name) for columns in opened]
            readers = [r for r in found if isinstance(r, _Native)]
            place = {"file": self.path, "column": field.name}
            # what may misfit is read row group by row group, so that the error names the one
            if decoding is not None and len(readers) == len(found) and (dictionary or not decoding.may_misfit):
                output = decoding.output(self._limit, dictionary=dictionary)
                output.reserve(n_rows, sum(r.n_values for r in readers))
                for g, reader in zip(row_groups, readers, strict=True):
                    reader.read_into(self.row_group_rows[g], output)
                    reader.check_nulls(output)
                out[field.name] = decoding.finish(output, place)
                continue
            if dictionary:
                raise errors.Unsupported(
                    "this column has no dictionary to read", remedy="read it without dictionary=True", **place
                )
            column = Gathered()
            for g, part in zip(row_groups, found, strict=True):
                if isinstance(part, _Native):
                    part.add_to(column, self.row_group_rows[g], None, self.row_group_rows[g], False)
                else:
                    column.add(part)
            out[field.name] = column.finish() if row_groups else self.read_no_rows([field])[field.name]
        return out

    def read_no_rows(self, fields: Sequence[Field]) -> dict[str, Column]:
        """Columns as ``read_row_group`` gives them, of no rows."""
        out: dict[str, Column] = {}
        for field, _, decoding in self._plan(fields):
            place = {"file": self.path, "column": field.name}
            if decoding is None:
                out[field.name] = missing(0, field, field.of_missing(), place)
            else:
                out[field.name] = decoding.finish(decoding.output(self._limit), place)
        return out

    def guarantee(self, g: int, name: str) -> pc.Expression | None:
        """What statistics promise of all values of a stored column in a row group, or None."""
        return guarantee(self.footer, self.arrow_schema, g, name)

    def page_guarantees(self, g: int, name: str) -> Promises | None:
        """What the column index promises of a stored column's values page by page; None without one."""
        _, first, n_leaves = self.footer.columns[self.arrow_schema.names.index(name)]
        leaf, chunk = self.footer.leaves[first], self.footer.chunk(g, first)
        if n_leaves != 1 or leaf.kind.ragged_rank or chunk.column_index is None:
            return None
        pages = self._page_rows(chunk, self.row_group_rows[g])
        if pages is None or sum(chunk.column_index) > self.source.nbytes:
            return None
        index = thrift.read_column_index(self.source.read([chunk.column_index])[0])
        if index is None:
            return None
        return page_guarantees(name, self.arrow_schema.field(name).type, leaf.physical, pages.first_rows, index)

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1, ranges: Ranges | None = None) -> pa.Table:
        """Columns of one row group as they are stored, for expressions on them; of these ranges of rows, or of all."""
        stored = [found for name in names if (found := self._stored(g, name)) is not None]
        if len(stored) < len(names) or not names:  # not that simple
            return rows_of(self._read_leaves(g, names, num_threads), ranges)
        arrays = {}
        n_rows = self.row_group_rows[g]
        for name, (decoding, _, _), reader in zip(names, stored, self._readers(g, stored), strict=True):
            output, at = decoding.output(self._limit), 0
            for first, last in ranges if ranges is not None else [(0, n_rows)]:
                if first > at:
                    reader.skip(first - at)
                reader.read_into(last - first, output)
                at = last
            values, _, mask = output.finish()
            values = Strings(*values) if decoding.dtype is None else values
            arrays[name] = to_arrow(values, mask, self.arrow_schema.field(name).type)
        return pa.table(arrays)

    def _stored(self, g: int, name: str) -> tuple[Decoding, Chunk, Place] | None:
        """How our own decoder reads a column as Arrow has it; None where that is more than one plain value a row."""
        _, first, n_leaves = self.footer.columns[self.arrow_schema.names.index(name)]
        leaf, chunk, kind = self.footer.leaves[first], self.footer.chunk(g, first), self.arrow_schema.field(name).type
        if n_leaves != 1 or leaf.kind.ragged_rank or leaf.kind.unsupported or not self._is_native(leaf, chunk.codec):
            return None
        if not is_plain(leaf.kind, kind):
            return None
        place = {"file": self.path, "column": name, "row_group": g}
        text = leaf.kind.dtype == "string"
        field = Field(name, null="default", default="" if text else 0)
        return Decoding(leaf, field, place, keep_mask=True), chunk, place

    def _read_leaves(self, g: int, names: Sequence[str], num_threads: int) -> pa.Table:
        leaves = []
        for name in names:
            _, first, n = self.footer.columns[self.arrow_schema.names.index(name)]
            for leaf in self.footer.leaves[first : first + n]:
                if leaf.closed:
                    raise errors.Unsupported(
                        leaf.closed, remedy="leave it out of fields and filters", file=self.path, column=name
                    )
                leaves.append(leaf.index)
        return self._read(g, leaves, names[0] if len(names) == 1 else None, num_threads)

    def _read(self, g: int, leaves: Sequence[int], name: str | None, num_threads: int = 1) -> pa.Table:
        """Leaves of one row group by pyarrow; `name` says whose they are, where they are one column's."""
        metadata = self._reader()[0]
        try:
            # a reader of its own for every call: readers are not safe to share between threads, the metadata is
            reader = pq.ParquetFile(
                self.source.file, metadata=metadata, pre_buffer=self.source.remote, page_checksum_verification=True
            )
            table = reader.reader.read_row_group(g, column_indices=list(leaves), use_threads=num_threads > 1)
            table.validate()
        except errors.HbkitError:  # the source's own
            raise
        except Exception as e:
            raise self.broken(e, "the column" if name is not None else "the row group", g, name) from e
        if leaves and table.num_rows != self.row_group_rows[g]:
            raise errors.Corrupt(
                f"the columns hold {table.num_rows} rows, the footer promises {self.row_group_rows[g]}",
                remedy=_REWRITE,
                file=self.path,
                column=name,
                row_group=g,
            )
        return table

    def broken(self, e: Exception, what: str, g: int | None = None, name: str | None = None) -> errors.HbkitError:
        """The named error for whatever a reader raised."""
        return unreadable(e, what, file=self.path, column=name, row_group=g)

    def close(self) -> None:
        """Close the source."""
        self.source.close()


def read_columns(
    path: str | os.PathLike[str],
    columns: Sequence[str | Field] | None = None,
    row_groups: Sequence[int] | None = None,
    dictionary: bool = False,
    ignore_case: bool = False,
) -> dict[str, Any]:
    """Whole columns of one file.

    Parameters
    ----------
    path : str or path
        Local, or a URI.
    columns : sequence of str or Field, optional
        None reads every column that can be read.
    row_groups : sequence of int, optional
        None reads all.
    dictionary : bool
        Give each column as ``Dictionary(dictionary, codes)``: the entries (array or Strings) and, in place of values, a
        uint32 position for each. What the file stores by dictionary is neither looked up nor hashed value by value.
        Every row group brings its own entries, so one may occur more than once.
    ignore_case : bool
        Find columns whatever the case of their letters.

    Returns
    -------
    dict of str to array, Ragged, Strings or Dictionary
        In memory that the caller owns.

    Raises
    ------
    Unsupported
        `dictionary` with a cast, padding or a rank other than the file's.
    HbkitError
        See ``File`` and ``File.open_row_group``.
    """
    file = File(path, ignore_case)
    try:
        if columns is None:
            columns = [name for name, kind in file.schema.items() if not kind.unsupported]
        fields = [c if isinstance(c, Field) else Field(c) for c in columns]
        groups = list(range(len(file.row_group_rows)) if row_groups is None else row_groups)
        return file.read(fields, groups, dictionary)
    finally:
        file.close()
