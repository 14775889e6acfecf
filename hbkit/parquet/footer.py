"""The few footer fields that must be known before anything else reads the footer.

The reader behind ``File`` aborts the process when asked about a codec that the format does not have, or about an
encrypted column. So this bounds-checked reader of Thrift's compact protocol looks first. It trusts nothing: nesting
is bounded, a declared count allocates nothing (elements are read one by one until the bytes end), and every integer
is checked against the bytes that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hbkit import errors
from hbkit.parquet.source import Source

__all__ = ["Footer", "Leaf", "read_footer"]

MAGIC, MAGIC_ENCRYPTED = b"PAR1", b"PARE"
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
MAX_NESTING = 32  # of Thrift structures: the format itself needs 8
MAX_DEPTH = 512  # of the schema's tree

# SPEC: thrift-compact-protocol.md, "Struct encoding"
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(14)
_INTS = (_I16, _I32, _I64)


@dataclass
class Leaf:
    """What the footer says about one leaf column: which codecs its chunks use and whether one is encrypted."""

    codecs: set[int] = field(default_factory=set)
    encrypted: bool = False

    @property
    def unsupported(self) -> str:
        """Why no reader should touch the column's metadata, or an empty string."""
        if self.encrypted:
            return "the column is encrypted"
        bad = sorted(c for c in self.codecs if not 0 <= c < len(CODECS))
        return f"compression codec {bad[0]} is not in the format" if bad else ""


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
    """

    columns: list[tuple[str, int, int]]
    leaves: list[Leaf]
    row_group_rows: list[int]


class _Broken(Exception):
    pass


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
        while True:
            b = self.byte()
            value |= (b & 127) << shift
            if b < 128:
                return value
            shift += 7
            if shift > 63:
                raise _Broken("an integer is longer than 64 bits")

    def integer(self) -> int:
        n = self.varint()
        return (n >> 1) ^ -(n & 1)

    def binary(self) -> bytes:
        n = self.varint()
        if n > len(self.data) - self.at:
            raise _Broken("a string reaches beyond the end")
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

    def struct(self, fields: dict[int, Callable[[int], Any]], depth: int) -> None:
        """Read a struct, handing the fields that are asked for to their readers and skipping the rest."""
        last = 0
        while True:
            head = self.byte()
            kind = head & 15
            if kind == _STOP:
                return
            last = last + (head >> 4) if head >> 4 else self.integer()
            reader = fields.get(last)
            if reader is None:
                self.skip(kind, depth + 1)
            else:
                reader(kind)

    def structs(self, kind: int, one: Callable[[], None]) -> None:
        """Read a list of structs."""
        self.expect(kind, _LIST)
        n, element = self.array()
        if n:
            self.expect(element, _STRUCT)
        for _ in range(n):
            one()

    def expect(self, kind: int, *wanted: int) -> None:
        if kind not in wanted:
            raise _Broken(f"a field has wire type {kind}")

    def skip(self, kind: int, depth: int) -> None:
        if depth > MAX_NESTING:
            raise _Broken(f"it nests more than {MAX_NESTING} deep")
        if kind in (_TRUE, _FALSE):
            return
        if kind == _BYTE:
            self.byte()
        elif kind in _INTS:
            self.varint()
        elif kind in (_DOUBLE, _UUID):
            self.take(8 if kind == _DOUBLE else 16)
        elif kind == _BINARY:
            self.binary()
        elif kind in (_LIST, _SET):
            n, element = self.array()
            for _ in range(n):
                self.skip_element(element, depth + 1)
        elif kind == _MAP:
            n = self.varint()
            if n:
                kinds = self.byte()
                for _ in range(n):
                    self.skip_element(kinds >> 4, depth + 1)
                    self.skip_element(kinds & 15, depth + 1)
        elif kind == _STRUCT:
            self.struct({}, depth)
        else:
            raise _Broken(f"a field has wire type {kind}")

    def skip_element(self, kind: int, depth: int) -> None:
        # a boolean has no bytes as a field but one byte as an element
        if kind in (_TRUE, _FALSE):
            self.byte()
        else:
            self.skip(kind, depth)

    def take(self, n: int) -> None:
        if n > len(self.data) - self.at:
            raise _Broken("it ends too early")
        self.at += n


def read_footer(source: Source) -> Footer:
    """Read and check the footer of a Parquet file.

    Raises
    ------
    Corrupt
        The file is empty, cut off, not Parquet, or its footer breaks the format.
    Unsupported
        The footer itself is encrypted.
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
    except _Broken as e:
        raise errors.Corrupt(f"the footer is damaged: {e}", remedy=rewrite, file=source.path) from e


def _parse(data: bytes) -> Footer:
    r = _Reader(data)
    elements: list[tuple[str, int]] = []  # name, number of children
    rows: list[int] = []
    chunks: list[list[Leaf]] = []

    def element() -> None:
        name, children = "", 0

        def set_name(kind: int) -> None:
            nonlocal name
            r.expect(kind, _BINARY)
            try:
                name = r.binary().decode()
            except UnicodeDecodeError:
                raise _Broken("a column name is not UTF-8") from None

        def set_children(kind: int) -> None:
            nonlocal children
            r.expect(kind, *_INTS)
            children = r.integer()

        r.struct({4: set_name, 5: set_children}, 1)  # SPEC: SchemaElement
        elements.append((name, children))

    def chunk() -> None:
        leaf = Leaf()

        def encrypted(kind: int) -> None:
            leaf.encrypted = True
            r.skip(kind, 4)

        def codec(kind: int) -> None:
            r.expect(kind, *_INTS)
            leaf.codecs.add(r.integer())

        def metadata(kind: int) -> None:
            r.expect(kind, _STRUCT)
            r.struct({4: codec}, 4)  # SPEC: ColumnMetaData

        r.struct({3: metadata, 8: encrypted, 9: encrypted}, 3)  # SPEC: ColumnChunk
        chunks[-1].append(leaf)

    def row_group() -> None:
        n = -1
        chunks.append([])

        def set_rows(kind: int) -> None:
            nonlocal n
            r.expect(kind, *_INTS)
            n = r.integer()

        r.struct({1: lambda kind: r.structs(kind, chunk), 3: set_rows}, 2)  # SPEC: RowGroup
        if n < 0:
            raise _Broken(f"row group {len(rows)} has {n} rows")
        rows.append(n)

    # SPEC: FileMetaData
    r.struct({2: lambda kind: r.structs(kind, element), 4: lambda kind: r.structs(kind, row_group)}, 0)
    columns, n_leaves = _columns(elements)
    leaves = [Leaf() for _ in range(n_leaves)]
    for g, group in enumerate(chunks):
        if len(group) != n_leaves:
            raise _Broken(f"row group {g} has {len(group)} column chunks, the schema {n_leaves} leaves")
        for leaf, one in zip(leaves, group, strict=True):
            leaf.codecs |= one.codecs
            leaf.encrypted |= one.encrypted
    return Footer(columns, leaves, rows)


def _columns(elements: list[tuple[str, int]]) -> tuple[list[tuple[str, int, int]], int]:
    """The top-level columns and the number of leaves, from the schema's elements in depth-first order."""
    if not elements:
        raise _Broken("the schema is empty")
    columns: list[tuple[str, int, int]] = []
    n_leaves, first, name = 0, 0, ""
    open_groups = [elements[0][1]]  # children still to come, of the root and each group below it
    for at, (element_name, children) in enumerate(elements[1:], 1):
        while open_groups and open_groups[-1] <= 0:
            open_groups.pop()
        if not open_groups:
            raise _Broken(f"the schema's element {at} belongs to no group")
        if len(open_groups) == 1:
            if at > 1:
                columns.append((name, first, n_leaves - first))
            name, first = element_name, n_leaves
        open_groups[-1] -= 1
        if children > 0:
            open_groups.append(children)
            if len(open_groups) > MAX_DEPTH:
                raise _Broken(f"the schema nests more than {MAX_DEPTH} deep")
        else:
            n_leaves += 1
    if len(elements) > 1:
        columns.append((name, first, n_leaves - first))
    if any(n > 0 for n in open_groups):
        raise _Broken("the schema ends too early")
    return columns, n_leaves
