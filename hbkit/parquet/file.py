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

from hbkit import errors, ragged
from hbkit._ext import chunk as _chunk
from hbkit._ext import thrift
from hbkit.parquet import codecs
from hbkit.parquet.bounds import guarantee
from hbkit.parquet.column import Decoding, decode, missing
from hbkit.parquet.decoded import RowGroup
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.footer import Chunk, read_footer
from hbkit.parquet.schema import Leaf
from hbkit.parquet.source import Source, open_source, unreadable
from hbkit.parquet.threads import ALONE, Threads
from hbkit.ragged import Column

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
        place: dict[str, Any],
    ) -> None:
        self._decoding, self._limit, self._place = decoding, limit_nbytes, place
        self._chunk = _chunk.Chunk(decoding.form, data, chunk.codec, chunk.n_values, codecs.decompress, place)
        self._row, self._n_rows, self.n_values = 0, n_rows, chunk.n_values
        self._pages = pages
        # lists vary: rooms of their mean length would be moved
        self._values_per_row = chunk.n_values / max(n_rows, 1) * (1.1 if decoding.stored.ragged_rank else 1)
        self.nbytes_per_row = self._values_per_row * (16 if decoding.dtype is None else decoding.dtype.itemsize)

    def read(self, n_rows: int, rows: npt.NDArray[np.bool_] | None, past_cache: bool) -> Column:
        output = self._decoding.output(self._limit, past_cache)
        n_values = int(n_rows * self._values_per_row) + 64
        output.reserve(n_rows, n_values, 16 * n_values)
        self.read_into(n_rows, output, rows)
        return self._decoding.finish(output, self._place)

    def read_into(self, n_rows: int, output: Any, rows: npt.NDArray[np.bool_] | None = None) -> None:
        if rows is None:
            self._chunk.read(n_rows, output)
        else:
            self._chunk.read_masked(rows.view(np.uint8), output)
        self._step(n_rows)

    def check_nulls(self, output: Any) -> None:
        self._decoding.check_nulls(output.n_nulls, output.n_rows, self._place)

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


class _Whole:
    """One column of a row group that was decoded whole."""

    nbytes_per_row = 0.0

    def __init__(self, column: Column) -> None:
        self._column, self._at = column, 0

    def read(self, n_rows: int, rows: npt.NDArray[np.bool_] | None, past_cache: bool) -> Column:
        self._at += n_rows
        column = ragged.slice_rows(self._column, self._at - n_rows, self._at)
        return column if rows is None else ragged.take(column, rows)

    def skip(self, n_rows: int) -> None:
        self._at += n_rows


class _Missing:
    """A column that the file lacks."""

    nbytes_per_row = 0.0

    def __init__(self, field: Field, out: ColumnType, place: dict[str, Any]) -> None:
        self._arguments = field, out, place

    def read(self, n_rows: int, rows: npt.NDArray[np.bool_] | None, past_cache: bool) -> Column:
        return missing(n_rows if rows is None else int(np.count_nonzero(rows)), *self._arguments)

    def skip(self, n_rows: int) -> None:
        pass


class _RowGroup:
    def __init__(self, columns: dict[str, Any], threads: Threads) -> None:
        self._columns, self._threads = columns, threads
        self._nbytes_per_row = sum(c.nbytes_per_row for c in columns.values())
        # the longest first, so that no thread begins with it when the others are done
        self._order = sorted(columns, key=lambda name: -columns[name].nbytes_per_row)

    def read(self, n_rows: int, rows: npt.NDArray[np.bool_] | None = None) -> dict[str, Column]:
        past_cache = n_rows * self._nbytes_per_row > CACHE_NBYTES
        columns = self._threads.each(lambda name: self._columns[name].read(n_rows, rows, past_cache), self._order)
        found = dict(zip(self._order, columns, strict=True))
        return {name: found[name] for name in self._columns}

    def skip(self, n_rows: int) -> None:
        self._threads.each(lambda name: self._columns[name].skip(n_rows), self._order)


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
        """
        return _RowGroup(self._open(g, fields), threads)

    def _open(self, g: int, fields: Sequence[Field]) -> dict[str, Any]:
        if not 0 <= g < len(self.row_group_rows):
            raise errors.InvalidArgument(
                f"row group {g} of {len(self.row_group_rows)}", remedy="count from 0", file=self.path
            )
        n_rows = self.row_group_rows[g]
        readers: dict[str, Any] = {}
        wanted = []
        for field, leaf, decoding in self._plan(fields):
            place = {"file": self.path, "column": field.name, "row_group": g}
            readers[field.name] = None
            if leaf is None or decoding is None:
                readers[field.name] = _Missing(field, field.of_missing(), place)
                continue
            chunk = self.footer.chunk(g, leaf.index)
            if self._is_native(leaf, chunk.codec):
                wanted.append((field.name, decoding, chunk, place))
            else:
                readers[field.name] = _Whole(self._decode(g, leaf, field, place))
        buffers = self.source.read([self._range(chunk, place) for _, _, chunk, place in wanted])
        for (name, decoding, chunk, place), data in zip(wanted, buffers, strict=True):
            pages = partial(self._page_rows, chunk, n_rows)
            readers[name] = _Native(decoding, data, chunk, pages, n_rows, self._limit, place)
        return readers

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
        if not rising or offsets[0] < 0 or sizes[-1] <= 0 or end > chunk.nbytes or not 0 == first_rows[0] <= first_rows[-1] < n_rows:
            return None
        return PageRows(offsets, first_rows, end)

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

    def _range(self, chunk: Any, place: dict[str, Any]) -> tuple[int, int]:
        """Offset and size of a column chunk's pages."""
        if chunk.n_values == 0 and chunk.first_page < 0:
            return 0, 0
        nbytes = chunk.nbytes
        if _SHORT_CHUNKS.match(self.footer.writer):
            nbytes = min(nbytes + _SHORT_BY, self.source.nbytes - chunk.first_page)
        if chunk.first_page < 0 or nbytes < 0 or chunk.first_page + nbytes > self.source.nbytes:
            raise errors.Corrupt("the column chunk lies outside the file", remedy=_REWRITE, **place)
        return chunk.first_page, nbytes

    def _decode(self, g: int, leaf: Leaf, field: Field, place: dict[str, Any]) -> Column:
        """A whole column chunk by pyarrow."""
        try:
            table = self._read(g, [leaf.index], 1)
            if table.num_rows != self.row_group_rows[g]:
                raise pa.ArrowInvalid("the number of rows is not the footer's")
            return decode(table.column(0), field, leaf.kind, place)
        except errors.HbkitError:
            raise
        except Exception as e:
            raise self.broken(e, "the column", g, field.name) from e

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
        g, fields
            As of `open_row_group`.
        num_threads : int
            More than 1 decodes columns in parallel.
        rows : bool[row_group_rows[g]], optional
            Only these rows; nulls and misfits elsewhere do not matter.

        Raises
        ------
        HbkitError
            As `open_row_group`.
        """
        with Threads(num_threads) as threads:
            return self.open_row_group(g, fields, threads).read(self.row_group_rows[g], rows)

    def read(self, fields: Sequence[Field], row_groups: Sequence[int], dictionary: bool = False) -> dict[str, Any]:
        """Several row groups end to end; see `read_columns`."""
        opened = [self._open(g, fields) for g in row_groups]
        n_rows = sum(self.row_group_rows[g] for g in row_groups)
        out: dict[str, Any] = {}
        for field, _, decoding in self._plan(fields):
            readers = [columns.pop(field.name) for columns in opened]
            place = {"file": self.path, "column": field.name}
            if decoding is not None and all(isinstance(r, _Native) for r in readers):
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
            parts = [r.read(self.row_group_rows[g], None, False) for g, r in zip(row_groups, readers, strict=True)]
            out[field.name] = ragged.concat(parts or [self.read_no_rows([field])[field.name]])
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

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1) -> pa.Table:
        """Columns of one row group as they are stored, for expressions on them."""
        leaves = []
        for name in names:
            _, first, n = self.footer.columns[self.arrow_schema.names.index(name)]
            for leaf in self.footer.leaves[first : first + n]:
                if leaf.kind.unsupported and not leaf.kind.unsupported.startswith("decimal"):
                    raise errors.Unsupported(
                        leaf.kind.unsupported, remedy="leave it out of fields and filters", file=self.path, column=name
                    )
                leaves.append(leaf.index)
        try:
            table = self._read(g, leaves, num_threads)
        except errors.HbkitError:  # the source's own
            raise
        except Exception as e:
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

    def _read(self, g: int, leaves: Sequence[int], num_threads: int) -> pa.Table:
        # a reader of its own for every call: readers are not safe to share between threads, the metadata is
        reader = pq.ParquetFile(
            self.source.file,
            metadata=self._reader()[0],
            pre_buffer=self.source.remote,
            page_checksum_verification=True,
        )
        table = reader.reader.read_row_group(g, column_indices=list(leaves), use_threads=num_threads > 1)
        table.validate()
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
        uint32 position for each. What the file stores by dictionary is neither looked up nor hashed value by value. Every
        row group brings its own entries, so one may occur more than once.
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
