"""ORC files as data files: stripes are row groups, pyarrow decodes them.

The reader inside pyarrow aborts the process on some damaged footers, and does not tell how many rows a stripe has. So
the postscript is checked before anything is asked of it, and what it has unpacked of the footer is checked, by a
bounds-checked reader of protobuf, before it is asked for more.

ORC has no checksums, so damage inside a stripe is only found where it breaks an encoding. That is not guarded, and most
damage gives an error or other values, but some of it crashes or stalls pyarrow's reader: read ORC files from sources
that are trusted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from hbkit import errors
from hbkit.data.files import ArrowFile
from hbkit.parquet import ColumnType, Source, open_source
from hbkit.parquet.arrow import Ranges, column_type, rows_of
from hbkit.parquet.source import unreadable

__all__ = ["OrcFile"]

_REWRITE = "write the file again, or leave it out"
# SPEC: orc_proto.proto, Type.Kind; the children that each kind has
_LIST, _MAP, _STRUCT, _UNION, _DECIMAL = 10, 11, 12, 13, 14
_N_CHILDREN = {_LIST: 1, _MAP: 2}
MAX_DEPTH = 99  # of nested types, as for Parquet
MAX_BLOCK_NBYTES = 1 << 23  # SPEC: a compression chunk's header has 23 bits for its length


class OrcFile(ArrowFile):
    """An open ORC file; see ``DataFile`` for what it gives.

    Parameters
    ----------
    source : Source, str or path

    Raises
    ------
    NotFound, StorageError
        The file cannot be opened.
    Corrupt
        The footer is damaged, or the file is not ORC.
    Unsupported
        The file is encrypted, or pyarrow does not know its compression.

    Notes
    -----
    The footer is checked before it is used; the stripes cannot be. Damaged ones may crash the process.
    """

    def __init__(self, source: Source | str | os.PathLike[str]) -> None:
        self.source: Source = open_source(source) if isinstance(source, (str, os.PathLike)) else source
        self.path = self.source.path
        try:
            self._check_postscript()
            reader = self._reader()
            self.row_group_rows = self._check_footer(reader.reader.serialized_file_tail())
            self.arrow_schema = reader.schema
            self.schema = _schema(self.arrow_schema)
            self.metadata = {k.decode(): v.decode() for k, v in (reader.metadata or {}).items()}
        except errors.HbkitError:
            raise
        except _Broken as e:
            raise errors.Corrupt(f"the footer is damaged: {e}", remedy=_REWRITE, file=self.path) from e
        except Exception as e:
            raise unreadable(e, "the footer", file=self.path) from e

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process opens the file anew
        return OrcFile, (self.source,)

    def _reader(self) -> Any:
        """A reader of its own for every call: readers are not safe to share between threads."""
        from pyarrow import orc  # not every build of pyarrow has it

        return orc.ORCFile(self.source.file)

    def _check_postscript(self) -> None:
        n = self.source.nbytes
        tail = bytes(self.source.read([(max(n - 256, 0), min(n, 256))])[0])
        if tail[-4:-1] != b"ORC":  # SPEC: the postscript ends in it
            raise errors.Corrupt(f"{n} bytes are no ORC file", remedy=_REWRITE, file=self.path)
        size = tail[-1]
        if size >= len(tail):
            raise _Broken("it is longer than the file")
        post = dict(_fields(tail[-1 - size : -1]))
        sizes = [post.get(1, 0), post.get(5, 0), size + 1]
        if sum(map(_integer, sizes)) > n:
            raise _Broken("it is longer than the file")
        if _integer(post.get(3, 0)) > MAX_BLOCK_NBYTES:
            raise _Broken(f"compression blocks of {post[3]!r} bytes")

    def _check_footer(self, tail: bytes) -> list[int]:
        """Rows of each stripe."""
        footer = list(_fields(_bytes(dict(_fields(tail)).get(2, b""))))
        if any(number == 10 for number, _ in footer):
            raise errors.Unsupported("the file is encrypted", remedy="decrypt it first", file=self.path)
        _check_types([_bytes(value) for number, value in footer if number == 4])
        rows = []
        for stripe in (dict(_fields(_bytes(value))) for number, value in footer if number == 3):
            if sum(_integer(stripe.get(i, 0)) for i in range(1, 5)) > self.source.nbytes:
                raise _Broken("a stripe lies outside the file")
            rows.append(_integer(stripe.get(5, 0)))
        if sum(rows) != _integer(dict(footer).get(6, 0)):
            raise _Broken(f"its stripes have {sum(rows)} rows, the file {dict(footer).get(6, 0)!r}")
        return rows

    def read_arrow(self, g: int, names: Sequence[str], num_threads: int = 1, ranges: Ranges | None = None) -> pa.Table:
        """See ``DataFile``; one thread decodes all columns."""
        if not names:
            return pa.table({})
        try:
            batch = self._reader().read_stripe(g, columns=list(names))
            batch.validate()
        except Exception as e:
            column = names[0] if len(names) == 1 else None
            raise unreadable(e, "the stripe", file=self.path, row_group=g, column=column) from e
        if batch.num_rows != self.row_group_rows[g]:
            raise errors.Corrupt(
                f"the columns hold {batch.num_rows} rows, the footer promises {self.row_group_rows[g]}",
                remedy=_REWRITE,
                file=self.path,
                row_group=g,
            )
        return rows_of(pa.Table.from_batches([batch]), ranges)

    def decoded_by(self, name: str) -> str:
        """See ``DataFile``."""
        return "pyarrow (ORC)"

    def close(self) -> None:
        """See ``DataFile``."""
        self.source.close()


class _Broken(Exception):
    pass


def _schema(schema: pa.Schema) -> dict[str, ColumnType]:
    n_named = Counter(schema.names)
    twice = ColumnType("", unsupported="two columns have this name")
    return {f.name: column_type(f) if n_named[f.name] == 1 else twice for f in schema}


def _check_types(types: Sequence[bytes]) -> None:
    """Raise unless the types are a tree, in preorder and not too deep, with children and digits that suit their kinds.

    pyarrow takes all this on trust.
    """
    depths: list[int | None] = [None] * len(types)
    for i, data in enumerate(types):
        fields = list(_fields(data))
        kind = _integer(dict(fields).get(1, 0))
        children = [c for number, value in fields if number == 2 for c in _integers(value)]
        depth = depths[i] = 0 if i == 0 else depths[i]
        if depth is None or depth > MAX_DEPTH or (i == 0 and kind != _STRUCT):
            raise _Broken(f"type {i} has no place in the schema")
        n_names = sum(number == 3 for number, _ in fields)
        n_children = n_names if kind == _STRUCT else _N_CHILDREN.get(kind, len(children) if kind == _UNION else 0)
        if len(children) != n_children:
            raise _Broken(f"type {i} has {len(children)} children")
        for child in children:
            if not i < child < len(types) or depths[child] is not None:
                raise _Broken(f"type {child} has no place in the schema")
            depths[child] = depth + 1
        # SPEC: precision 0 is what Hive 0.11 wrote
        precision, scale = _integer(dict(fields).get(5, 0)), _integer(dict(fields).get(6, 0))
        if kind == _DECIMAL and not (precision <= 38 and scale <= (precision or 38)):
            raise _Broken(f"a decimal of {precision} digits with {scale} after the point")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: number and value; fixed-width values come as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = _varint(data, at)
        if size is None or size > len(data) - at:
            raise _Broken("it ends too early")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise _Broken("it ends too early")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise _Broken("an integer is longer than 64 bits")


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _Broken("a number is no number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Broken("a message is a number")
    return value


def _integers(value: int | bytes) -> Iterator[int]:
    """A repeated number, packed or not."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        one, at = _varint(value, at)
        yield one
