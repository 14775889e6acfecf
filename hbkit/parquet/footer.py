"""The footer of a Parquet file, checked: schema, row groups, and what is said of each column chunk.

It is parsed by our own bounds-checked reader of Thrift's compact protocol (`hbkit._ext.thrift`): other readers abort
the process when asked about a column chunk whose metadata is damaged or encrypted.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

from hbkit import errors
from hbkit._ext import thrift
from hbkit.parquet.schema import SchemaError, TooDeep, read_schema
from hbkit.parquet.source import Source

__all__ = ["CODECS", "ENCODINGS", "Chunk", "Footer", "read_footer"]

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
_FIELDS = {name: i for i, name in enumerate(thrift.CHUNK_FIELDS)}
_Said = namedtuple("_Said", thrift.CHUNK_FIELDS)  # type: ignore[misc]  # mypy wants literal names; these are the extension's
_REWRITE = "write the file again, or leave it out"


class Chunk(NamedTuple):
    """What the footer says of one column chunk; None where it does not say. The bounds are PLAIN-encoded values."""

    minimum: bytes | None
    maximum: bytes | None
    n_nulls: int | None
    codec: int
    encoding_bits: int
    nbytes: int  # compressed
    n_values: int  # with nulls and empty lists
    first_page: int
    offset_index: tuple[int, int] | None  # (offset, nbytes) in the file
    column_index: tuple[int, int] | None

    @property
    def encodings(self) -> tuple[int, ...]:
        """Numbers of the encodings in use; see `ENCODINGS`."""
        return tuple(e for e in range(63) if self.encoding_bits >> e & 1)


class Footer:
    """The checked footer.

    Attributes
    ----------
    columns : list of (name, first leaf, number of leaves)
        The top-level columns in file order; names may repeat.
    leaves : list of Leaf
        In file order; a leaf that cannot be read says why in its ``kind``.
    row_group_rows : list of int
    pairs : dict of str to str
        Key-value metadata.
    """

    def __init__(self, raw: thrift.Footer) -> None:
        self.columns, self.leaves = read_schema(raw.elements)
        self.row_group_rows: list[int] = raw.row_group_rows
        for g, (n, n_chunks) in enumerate(zip(raw.row_group_rows, raw.n_chunks, strict=True)):
            if n < 0:
                raise SchemaError(f"row group {g} has {n} rows")
            if n_chunks != len(self.leaves):
                raise SchemaError(f"row group {g} has {n_chunks} column chunks, the schema {len(self.leaves)} leaves")
        try:
            self.pairs = {k.decode(): v.decode() for k, v in raw.pairs}
        except UnicodeDecodeError:
            raise SchemaError("its key-value metadata is not UTF-8") from None
        self._raw, self._numbers = raw, raw.chunks.reshape(len(raw.row_group_rows), len(self.leaves), len(_FIELDS))
        self.writer: str = raw.created_by.decode(errors="replace")
        encrypted = self._numbers[:, :, _FIELDS["is_encrypted"]].any(axis=0)
        elsewhere = self._numbers[:, :, _FIELDS["is_elsewhere"]].any(axis=0)
        codecs = self._numbers[:, :, _FIELDS["codec"]]
        no_codec = (codecs >= len(CODECS)) | (codecs < 0) & ~encrypted
        for i in (encrypted | elsewhere | no_codec.any(axis=0)).nonzero()[0]:
            leaf = self.leaves[i]
            if encrypted[i]:
                reason = "the column is encrypted"
            elif no_codec[:, i].any():
                reason = f"compression codec {codecs[no_codec[:, i], i][0]} is not in the format"
            else:
                reason = "the column lies in another file"
            leaf.close(reason)
        # SPEC: physical types must agree; a damaged footer may not say so
        types = self._numbers[:, :, _FIELDS["physical_type"]]
        for g, i in zip(*(types != [leaf.physical for leaf in self.leaves]).nonzero(), strict=True):
            if not encrypted[i]:
                raise SchemaError(f"row group {g} contradicts the schema's type of {self.leaves[i].name!r}")

    def codecs(self, leaf: int) -> set[int]:
        """Of all chunks of a leaf."""
        return set(self._numbers[:, leaf, _FIELDS["codec"]].tolist())

    def chunk(self, g: int, leaf: int) -> Chunk:
        """What is said of one column chunk."""
        said: Any = _Said._make(self._numbers[g, leaf].tolist())
        data_page, dictionary_page = said.data_page, said.dictionary_page
        # Some writers leave the dictionary's offset out (then it is where the data is said to begin), some say 0.
        first = dictionary_page if dictionary_page > 0 and not 0 < data_page < dictionary_page else data_page
        return Chunk(
            self._bound(said.min_at, said.min_nbytes),
            self._bound(said.max_at, said.max_nbytes),
            said.n_nulls if said.n_nulls >= 0 else None,
            said.codec,
            said.encodings,
            said.stored_nbytes,
            said.n_values,
            first if first > 0 else -1,
            _place(said.offset_index, said.offset_index_nbytes),
            _place(said.column_index, said.column_index_nbytes),
        )

    def _bound(self, at: int, nbytes: int) -> bytes | None:
        # SPEC: without column_orders, min_value and max_value are to be ignored
        return self._raw.data[at : at + nbytes] if self._raw.has_orders and at >= 0 else None


def _place(at: int, nbytes: int) -> tuple[int, int] | None:
    return (at, nbytes) if at > 0 and nbytes > 0 else None


def read_footer(source: Source) -> Footer:
    """Read and check the footer of a Parquet file.

    Raises
    ------
    Corrupt
        The file is empty, cut off, not Parquet, or its footer breaks the format.
    Unsupported
        The footer itself is encrypted, or the schema nests too deep.
    """
    if source.nbytes < 12:
        raise errors.Corrupt(f"{source.nbytes} bytes are no Parquet file", remedy=_REWRITE, file=source.path)
    # SPEC: the file ends in the footer, its length as 4 little-endian bytes, and the magic number
    tail = bytes(source.read([(source.nbytes - 8, 8)])[0])
    if tail[4:] == MAGIC_ENCRYPTED:
        raise errors.Unsupported("the footer is encrypted", remedy="decrypt the file first", file=source.path)
    if tail[4:] != MAGIC:
        raise errors.Corrupt(
            "the file does not end as Parquet does: it is cut off or of another format",
            remedy=_REWRITE,
            file=source.path,
        )
    nbytes = int.from_bytes(tail[:4], "little")
    if nbytes > source.nbytes - 12:
        raise errors.Corrupt(
            f"the footer claims {nbytes} of the file's {source.nbytes} bytes", remedy=_REWRITE, file=source.path
        )
    try:
        raw = thrift.Footer(bytes(source.read([(source.nbytes - 8 - nbytes, nbytes)])[0]))
        if raw.problem is not None:
            raise SchemaError(raw.problem)
        return Footer(raw)
    except TooDeep as e:
        raise errors.Unsupported(str(e), remedy="write a flatter file", file=source.path) from None
    except SchemaError as e:
        raise errors.Corrupt(f"the footer is damaged: {e}", remedy=_REWRITE, file=source.path) from None
