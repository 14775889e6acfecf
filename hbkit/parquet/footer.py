"""The few footer fields that must be known before anything else reads the footer.

The reader behind ``File`` aborts the process when asked about a column chunk whose metadata is damaged or encrypted:
about its codec, its type, its statistics. So nothing asks it; what must be known is read here, by a bounds-checked
reader of Thrift's compact protocol. It trusts nothing: nesting is bounded, a declared count allocates nothing
(elements are read one by one until the bytes end), and every integer is checked against the bytes that are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hbkit import errors
from hbkit.parquet.source import Source

__all__ = ["CODECS", "ENCODINGS", "Chunk", "Footer", "Leaf", "read_footer"]

MAGIC, MAGIC_ENCRYPTED = b"PAR1", b"PARE"
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
ENCODINGS = {
    0: "PLAIN",
    2: "PLAIN_DICTIONARY",
    3: "RLE",
    4: "BIT_PACKED",
    5: "DELTA_BINARY_PACKED",
    6: "DELTA_LENGTH_BYTE_ARRAY",
    7: "DELTA_BYTE_ARRAY",
    8: "RLE_DICTIONARY",
    9: "BYTE_STREAM_SPLIT",
}
MAX_NESTING = 32  # of Thrift structures: the format itself needs 8
MAX_DEPTH = 99  # groups, of the schema's tree: what pyarrow reads

# SPEC: thrift-compact-protocol.md, "Struct encoding"
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(14)
_INTS = (_I16, _I32, _I64)
_WIDTHS = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}


@dataclass
class Leaf:
    """What the footer says about one leaf column: its type, which codecs its chunks use, whether one is encrypted."""

    physical_type: int
    codecs: set[int] = field(default_factory=set)
    encrypted: bool = False

    @property
    def unsupported(self) -> str:
        """Why no reader should touch the column's metadata, or an empty string."""
        if self.encrypted:
            return "the column is encrypted"
        bad = sorted(c for c in self.codecs if not 0 <= c < len(CODECS))
        return f"compression codec {bad[0]} is not in the format" if bad else ""


class Chunk(NamedTuple):
    """What the footer says of one column chunk; None where it does not say. The bounds are PLAIN-encoded values."""

    minimum: bytes | None = None
    maximum: bytes | None = None
    n_nulls: int | None = None
    codec: int | None = None
    encodings: tuple[int, ...] = ()
    nbytes: int = 0  # compressed


@dataclass
class Footer:
    """The checked part of a footer.

    Attributes
    ----------
    columns : list of (name, first leaf, number of leaves)
        The top-level columns in file order; names may repeat.
    leaves : list of Leaf
        In file order.
    row_group_rows : list of int
    chunks : list of list of Chunk
        By row group, then leaf.
    """

    columns: list[tuple[str, int, int]]
    leaves: list[Leaf]
    row_group_rows: list[int]
    chunks: list[list[Chunk]]


class _Broken(Exception):
    pass


class _TooDeep(Exception):
    pass


# What to keep of a structure: field number to the kind of its value. ``int`` and ``bytes`` are read, ``bool`` only says
# that the field is there, a dict is a structure, a list of one of them is a list; all else is skipped.
# SPEC: parquet.thrift
_Wanted = dict[int, Any]
_STATISTICS: _Wanted = {3: int, 5: bytes, 6: bytes}  # 1 and 2 are deprecated: their order is undefined
_COLUMN_META: _Wanted = {2: [int], 4: int, 7: int, 12: _STATISTICS}
_CHUNK: _Wanted = {3: _COLUMN_META, 8: bool, 9: bool}
_GROUP: _Wanted = {1: [_CHUNK], 3: int}
_ELEMENT: _Wanted = {1: int, 4: bytes, 5: int}
_FILE: _Wanted = {2: [_ELEMENT], 4: [_GROUP], 7: bool}


class _Reader:
    """A cursor over bytes in Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise _Broken("it ends too early")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while (b := self.byte()) > 127:
            value |= (b & 127) << shift
            shift += 7
            if shift > 63:
                raise _Broken("an integer is longer than 64 bits")
        return value | b << shift

    def integer(self) -> int:
        n = self.varint()
        return (n >> 1) ^ -(n & 1)

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise _Broken("it ends too early")
        self.at += n
        return self.data[self.at - n : self.at]

    def array(self) -> tuple[int, int]:
        head = self.byte()
        n = head >> 4
        if n == 15:
            n = self.varint()
        # each element takes at least one byte, so this also bounds the loop that reads them
        if n > len(self.data) - self.at:
            raise _Broken("a list reaches beyond the end")
        return n, head & 15

    def struct(self, wanted: _Wanted, depth: int) -> dict[int, Any]:
        """The wanted fields that are there, by number."""
        if depth > MAX_NESTING:
            raise _Broken(f"it nests more than {MAX_NESTING} deep")
        found: dict[int, Any] = {}
        last = 0
        while head := self.byte():
            wire = head & 15
            last = last + (head >> 4) if head >> 4 else self.integer()
            kind = wanted.get(last)
            if kind is None or kind is bool:
                self.skip(wire, depth + 1)
                found[last] = True
            elif kind is int:
                self.expect(wire, *_INTS)
                found[last] = self.integer()
            elif kind is bytes:
                self.expect(wire, _BINARY)
                found[last] = self.take(self.varint())
            elif isinstance(kind, dict):
                self.expect(wire, _STRUCT)
                found[last] = self.struct(kind, depth + 1)
            else:
                self.expect(wire, _LIST)
                n, element = self.array()
                integers = kind[0] is int
                if n:
                    self.expect(element, *(_INTS if integers else (_STRUCT,)))
                found[last] = [self.integer() if integers else self.struct(kind[0], depth + 1) for _ in range(n)]
        return found

    def expect(self, wire: int, *allowed: int) -> None:
        if wire not in allowed:
            raise _Broken(f"a field has wire type {wire}")

    def skip(self, wire: int, depth: int) -> None:
        if wire in (_TRUE, _FALSE):
            return
        if wire in _INTS:
            self.varint()
        elif wire == _BINARY:
            self.take(self.varint())
        elif wire in _WIDTHS:
            self.take(_WIDTHS[wire])
        elif wire == _STRUCT:
            self.struct({}, depth)
        elif wire in (_LIST, _SET):
            self.skip_elements(*self.array(), depth)
        elif wire == _MAP:
            n = self.varint()
            kinds = self.byte() if n else 0
            for _ in range(n):
                self.skip_elements(1, kinds >> 4, depth)
                self.skip_elements(1, kinds & 15, depth)
        else:
            raise _Broken(f"a field has wire type {wire}")

    def skip_elements(self, n: int, wire: int, depth: int) -> None:
        if depth > MAX_NESTING:
            raise _Broken(f"it nests more than {MAX_NESTING} deep")
        for _ in range(n):
            # a boolean has no bytes as a field but one byte as an element
            self.skip(_BYTE if wire in (_TRUE, _FALSE) else wire, depth + 1)


def read_footer(source: Source) -> Footer:
    """Read and check the footer of a Parquet file.

    Raises
    ------
    Corrupt
        The file is empty, cut off, not Parquet, or its footer breaks the format.
    Unsupported
        The footer itself is encrypted, or the schema nests too deep.
    """
    rewrite = "write the file again, or leave it out"
    if source.nbytes < 12:
        raise errors.Corrupt(f"{source.nbytes} bytes are no Parquet file", remedy=rewrite, file=source.path)
    # SPEC: the file ends in the footer, its length as 4 little-endian bytes, and the magic number
    tail = bytes(source.read([(source.nbytes - 8, 8)])[0])
    if tail[4:] == MAGIC_ENCRYPTED:
        raise errors.Unsupported("the footer is encrypted", remedy="decrypt the file first", file=source.path)
    if tail[4:] != MAGIC:
        raise errors.Corrupt(
            "the file does not end as Parquet does: it is cut off or of another format",
            remedy=rewrite,
            file=source.path,
        )
    nbytes = int.from_bytes(tail[:4], "little")
    if nbytes > source.nbytes - 12:
        raise errors.Corrupt(
            f"the footer claims {nbytes} of the file's {source.nbytes} bytes", remedy=rewrite, file=source.path
        )
    try:
        return _parse(bytes(source.read([(source.nbytes - 8 - nbytes, nbytes)])[0]))
    except _TooDeep:
        raise errors.Unsupported(
            f"the schema nests more than {MAX_DEPTH} deep", remedy="write a flatter file", file=source.path
        ) from None
    except _Broken as e:
        raise errors.Corrupt(f"the footer is damaged: {e}", remedy=rewrite, file=source.path) from e


def _parse(data: bytes) -> Footer:
    top = _Reader(data).struct(_FILE, 0)
    columns, leaves = _columns(top.get(2, []))
    rows: list[int] = []
    found: list[list[Chunk]] = []
    for g, group in enumerate(top.get(4, [])):
        chunks, n = group.get(1, []), group.get(3, -1)
        if n < 0:
            raise _Broken(f"row group {g} has {n} rows")
        if len(chunks) != len(leaves):
            raise _Broken(f"row group {g} has {len(chunks)} column chunks, the schema {len(leaves)} leaves")
        rows.append(n)
        found.append([])
        for leaf, chunk in zip(leaves, chunks, strict=True):
            meta = chunk.get(3, {})
            if 4 in meta:
                leaf.codecs.add(meta[4])
            leaf.encrypted |= 8 in chunk or 9 in chunk
            bounds = meta.get(12, {})
            # SPEC: without column_orders, min_value and max_value are to be ignored
            low, high = (bounds.get(6), bounds.get(5)) if 7 in top else (None, None)
            encodings = tuple(meta.get(2, ()))
            found[-1].append(Chunk(low, high, bounds.get(3), meta.get(4), encodings, meta.get(7, 0)))
    return Footer(columns, leaves, rows, found)


def _columns(elements: list[dict[int, Any]]) -> tuple[list[tuple[str, int, int]], list[Leaf]]:
    """The top-level columns and the leaves, from the schema's elements in depth-first order."""
    if not elements:
        raise _Broken("the schema is empty")
    columns: list[tuple[str, int, int]] = []
    leaves: list[Leaf] = []
    first, name = 0, ""
    open_groups = [elements[0].get(5, 0)]  # children still to come, of the root and each group below it
    for at, element in enumerate(elements[1:], 1):
        children, physical = element.get(5, 0), element.get(1, -1)
        while open_groups and open_groups[-1] <= 0:
            open_groups.pop()
        if not open_groups:
            raise _Broken(f"the schema's element {at} belongs to no group")
        if len(open_groups) == 1:
            if at > 1:
                columns.append((name, first, len(leaves) - first))
            name, first = _name(element.get(4, b"")), len(leaves)
        open_groups[-1] -= 1
        if children > 0:
            open_groups.append(children)
            if len(open_groups) > MAX_DEPTH:
                raise _TooDeep
        elif physical >= 0:
            leaves.append(Leaf(physical))
    if len(elements) > 1:
        columns.append((name, first, len(leaves) - first))
    if any(n > 0 for n in open_groups):
        raise _Broken("the schema ends too early")
    return columns, leaves


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Broken("a column name is not UTF-8") from None
