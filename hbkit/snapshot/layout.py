"""Where everything lies in a file of rows: plain, uncompressed Parquet whose bytes follow from its rows alone.

    group 0 | group 1 | ... | last group | footer        all groups but the last have as many rows and bytes
    group   "PAR1" or zeros, 8 bytes | for each column: zeros, page header, levels, values | zeros

A column chunk is one page. Its values begin at a multiple of 8 and a group at one of 4096, so that values are written
and read where they lie, past the page cache. Parquet allows such gaps, since its footer says where each chunk begins:
to any other reader these are files as any others. hbkit knows them by the name of their writer, and reads files by
others, or by its own earlier versions, through `hbkit.parquet`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

ALIGN_NBYTES = 4096
GROUP_NBYTES = 32 << 20  # most of a row group, as far as one row allows it
_MAGIC = b"PAR1"

# SPEC: Thrift's compact protocol: types of fields
_BOOL_TRUE, _I8, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 3, 5, 6, 8, 9, 12
_PLAIN, _RLE = 0, 3
_PHYSICAL = {"int32": 1, "int64": 2, "uint64": 2, "float": 4}


class Column(NamedTuple):
    """One column chunk of a group.

    Attributes
    ----------
    name : str
    dtype : dtype
        Of one value.
    width : int
        Values a row; 0 for a column that is no list.
    at : int
        Where `head` begins in the group.
    head : bytes
        Page header and levels.
    values : int
        Where the values begin in the group.
    nbytes : int
        Of the values.
    """

    name: str
    dtype: np.dtype[Any]
    width: int
    at: int
    head: bytes
    values: int
    nbytes: int

    def of(self, group: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """The values in the bytes of a group: dtype[n], or dtype[n, width]; no copy."""
        flat = group[self.values : self.values + self.nbytes].view(self.dtype)
        return flat.reshape(-1, self.width) if self.width else flat


class Group(NamedTuple):
    """A row group: its columns, and its bytes without what aligns the next one."""

    n_rows: int
    columns: tuple[Column, ...]
    nbytes: int


class Layout:
    """The layout of files of one kind of rows.

    Parameters
    ----------
    schema : Schema
        Columns of numbers, or of lists of so many float32; none has nulls.
    most_rows : int
        Of a row group.

    Attributes
    ----------
    group_rows, group_nbytes : int
        Of all groups but the last.
    beginning : bytes
        Of a file without rows.
    """

    def __init__(self, schema: pa.Schema, most_rows: int) -> None:
        self.schema = schema
        self._columns = [_column(field) for field in schema]
        row_nbytes = sum(dtype.itemsize * max(width, 1) for _, dtype, width in self._columns)
        self.group_rows = max(1, min(most_rows, GROUP_NBYTES // row_nbytes))
        self._writer = _binary(b"hbkit version 1 (build %d)" % self.group_rows)
        self.beginning = _MAGIC + bytes(4)  # of a file without rows
        self.group_nbytes = -(-self.group(self.group_rows).nbytes // ALIGN_NBYTES) * ALIGN_NBYTES

    @lru_cache(maxsize=2)  # noqa: B019 the full groups' and the last one's, as long as the layout
    def group(self, n_rows: int) -> Group:
        """A row group of so many rows."""
        at, columns = 8, []
        for name, dtype, width in self._columns:
            head = _head(n_rows, dtype.itemsize, width)
            at += -(at + len(head)) % 8
            nbytes = n_rows * dtype.itemsize * max(width, 1)
            columns.append(Column(name, dtype, width, at, head, at + len(head), nbytes))
            at += len(head) + nbytes
        return Group(n_rows, tuple(columns), at)

    def groups(self, n_rows: int) -> list[int]:
        """Rows of each group of a file."""
        full, rest = divmod(n_rows, self.group_rows)
        return [self.group_rows] * full + [rest] * bool(rest)

    def body_nbytes(self, n_rows: int) -> int:
        """Size of a file of so many rows, up to its footer."""
        full, rest = divmod(n_rows, self.group_rows)
        return full * self.group_nbytes + (self.group(rest).nbytes if rest else 0 if full else 8)

    def frame(self, group: Group, first: bool, out: npt.NDArray[np.uint8]) -> None:
        """Write what lies between the values of a group."""
        end = 0
        for column in (*group.columns, None):
            at = len(out) if column is None else column.at
            out[end:at] = 0
            if column is not None:
                out[at : column.values] = np.frombuffer(column.head, np.uint8)
                end = column.values + column.nbytes
        if first:
            out[:4] = np.frombuffer(_MAGIC, np.uint8)

    def is_framed(self, group: Group, first: bool, data: npt.NDArray[np.uint8]) -> bool:
        """Whether the bytes of a group are those that `frame` writes, but for the values."""
        view, end = data.data, 4 if first else 0
        if first and view[:4] != _MAGIC:
            return False
        for column in group.columns:
            if np.any(data[end : column.at]) or view[column.at : column.values].tobytes() != column.head:
                return False
            end = column.values + column.nbytes
        return not np.any(data[end:])

    def footer(self, n_rows: int, bounds: Sequence[Sequence[tuple[Any, Any] | None]]) -> bytes:
        """What follows the last group, by the (least, largest) value of each column of each group; None for lists."""
        groups = [
            self._row_group(self.group(n), number * self.group_nbytes, of)
            for number, (n, of) in enumerate(zip(self.groups(n_rows), bounds, strict=True))
        ]
        arrow = base64.b64encode(self.schema.serialize())
        n_columns = len(self._columns)
        body = _struct(
            (1, _I32, _int(2)),
            (
                2,
                _LIST,
                _list(
                    _STRUCT,
                    [
                        _struct((3, _I32, _int(0)), (4, _BINARY, _binary(b"schema")), (5, _I32, _int(n_columns))),
                        *self._elements(),
                    ],
                ),
            ),
            (3, _I64, _int(n_rows)),
            (4, _LIST, _list(_STRUCT, groups)),
            (5, _LIST, _list(_STRUCT, [_struct((1, _BINARY, _binary(b"ARROW:schema")), (2, _BINARY, _binary(arrow)))])),
            (6, _BINARY, self._writer),
            (7, _LIST, _list(_STRUCT, [_struct((1, _STRUCT, _struct()))] * n_columns)),
        )
        return body + len(body).to_bytes(4, "little") + _MAGIC

    @property
    def tail(self) -> bytes:
        """How the footers of these files end, but for the length and the magic."""
        orders = _list(_STRUCT, [_struct((1, _STRUCT, _struct()))] * len(self._columns))
        return self._writer + bytes([1 << 4 | _LIST]) + orders + b"\0"

    def _elements(self) -> Iterable[bytes]:
        for name, dtype, width in self._columns:
            kind = str(self.schema.field(name).type)
            named = 4, _BINARY, _binary(name.encode())
            if width:
                logical = _struct((3, _STRUCT, _struct()))
                yield _struct((3, _I32, _int(0)), named, (5, _I32, _int(1)), (6, _I32, _int(3)), (10, _STRUCT, logical))
                yield _struct((3, _I32, _int(2)), (4, _BINARY, _binary(b"list")), (5, _I32, _int(1)))
                yield _struct((1, _I32, _int(4)), (3, _I32, _int(0)), (4, _BINARY, _binary(b"element")))
            elif kind.startswith("uint"):
                integer = _struct((1, _I8, bytes([8 * dtype.itemsize])), (2, 2, b""))  # not signed
                logical = _struct((10, _STRUCT, integer))
                yield _struct(
                    (1, _I32, _int(2)), (3, _I32, _int(0)), named, (6, _I32, _int(14)), (10, _STRUCT, logical)
                )
            else:
                yield _struct((1, _I32, _int(_PHYSICAL[kind])), (3, _I32, _int(0)), named)

    def _row_group(self, group: Group, at: int, bounds: Sequence[tuple[Any, Any] | None]) -> bytes:
        chunks, total = [], 0
        for column, bound in zip(group.columns, bounds, strict=True):
            path = [column.name.encode()] + ([b"list", b"element"] if column.width else [])
            nbytes = len(column.head) + column.nbytes
            total += nbytes
            fields = [
                (1, _I32, _int(4 if column.width else _PHYSICAL[str(self.schema.field(column.name).type)])),
                (2, _LIST, _list(_I32, [_int(_PLAIN), _int(_RLE)])),
                (3, _LIST, _list(_BINARY, [_binary(p) for p in path])),
                (4, _I32, _int(0)),
                (5, _I64, _int(group.n_rows * max(column.width, 1))),
                (6, _I64, _int(nbytes)),
                (7, _I64, _int(nbytes)),
                (9, _I64, _int(at + column.at)),
            ]
            if bound is not None:
                least, most = (np.array(x, column.dtype).tobytes() for x in bound)
                said = (3, _I64, _int(0)), (5, _BINARY, _binary(most)), (6, _BINARY, _binary(least))
                fields.append((12, _STRUCT, _struct(*said)))
            chunks.append(_struct((2, _I64, _int(0)), (3, _STRUCT, _struct(*fields))))
        return _struct(
            (1, _LIST, _list(_STRUCT, chunks)),
            (2, _I64, _int(total)),
            (3, _I64, _int(group.n_rows)),
            (5, _I64, _int(at + group.columns[0].at)),
            (6, _I64, _int(total)),
        )


def _column(field: pa.Field) -> tuple[str, np.dtype[Any], int]:
    listed = pa.types.is_fixed_size_list(field.type)
    kind = field.type.value_type if listed else field.type
    return field.name, np.dtype(kind.to_pandas_dtype()), field.type.list_size if listed else 0


def _head(n_rows: int, itemsize: int, width: int) -> bytes:
    """Page header and levels of a page."""
    n = n_rows * max(width, 1)
    levels = b""
    if width:
        # SPEC: repetition levels, bit-packed: 0 where a list begins; definition levels, one run of ones.
        starts = np.ones(-(-n // 8) * 8, np.bool_)
        starts[:n:width] = starts[n:] = False
        bits = np.packbits(starts, bitorder="little").tobytes()
        repetition = _varint(len(bits) << 1 | 1) + bits
        definition = _varint(n << 1) + b"\1"
        levels = b"".join(len(part).to_bytes(4, "little") + part for part in (repetition, definition))
    nbytes = len(levels) + n * itemsize
    page = _struct((1, _I32, _int(n)), (2, _I32, _int(_PLAIN)), (3, _I32, _int(_RLE)), (4, _I32, _int(_RLE)))
    return _struct((1, _I32, _int(0)), (2, _I32, _int(nbytes)), (3, _I32, _int(nbytes)), (5, _STRUCT, page)) + levels


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _int(n: int) -> bytes:
    return _varint(n << 1)  # zigzag; none is negative


def _binary(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _list(kind: int, items: Sequence[bytes]) -> bytes:
    head = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
    return head + b"".join(items)


def _struct(*fields: tuple[int, int, bytes]) -> bytes:
    out, last = bytearray(), 0
    for number, kind, data in fields:
        out += bytes([(number - last) << 4 | kind]) + data
        last = number
    return bytes(out) + b"\0"
