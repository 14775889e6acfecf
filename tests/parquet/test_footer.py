"""The footer reader against hostile bytes: a named error, soon, and no memory to speak of."""

import io
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit import errors
from hbkit.parquet.footer import CODECS, ENCODINGS, read_footer


class Bytes:
    remote, file = False, None

    def __init__(self, data):
        self.path, self.data, self.nbytes = "memory", data, len(data)

    def read(self, ranges):
        return [memoryview(self.data)[offset : offset + n] for offset, n in ranges]

    def close(self):
        pass


def with_footer(footer):
    return Bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def written(table, **options):
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def test_footer_says_what_pyarrow_wrote():
    table = pa.table({"a": [1, 2, 3], "b": [[1], [], None], "c": [{"x": 1, "y": "s"}] * 3, "d": ["p", None, "q"]})
    data = written(table, row_group_size=2, compression="zstd")
    footer = read_footer(Bytes(data))
    assert footer.columns == [("a", 0, 1), ("b", 1, 1), ("c", 2, 2), ("d", 4, 1)]
    assert footer.row_group_rows == [2, 1]
    assert [leaf.name for leaf in footer.leaves] == ["a", "b", "c.x", "c.y", "d"]
    assert not any(leaf.kind.unsupported for leaf in footer.leaves)
    assert footer.chunk(0, 0)[:3] == ((1).to_bytes(8, "little"), (2).to_bytes(8, "little"), 0)
    assert footer.chunk(0, 4)[:3] == (b"p", b"p", 1)
    told = pq.read_metadata(io.BytesIO(data)).row_group(0)
    for i in range(5):
        chunk = footer.chunk(0, i)
        theirs = told.column(i)
        assert CODECS[chunk.codec] == theirs.compression and chunk.nbytes == theirs.total_compressed_size
        assert {ENCODINGS[e] for e in chunk.encodings} == set(theirs.encodings)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1PAR1", b"x" * 100, b"PAR1" + b"\0" * 100], ids=repr)
def test_footer_of_no_parquet_is_corrupt(data):
    with pytest.raises(errors.Corrupt, match="memory"):
        read_footer(Bytes(data))


def test_footer_length_beyond_file_is_corrupt():
    with pytest.raises(errors.Corrupt, match="claims 4294967295"):
        read_footer(Bytes(b"PAR1" + b"\0" * 20 + b"\xff\xff\xff\xff" + b"PAR1"))


def test_encrypted_footer_is_unsupported():
    with pytest.raises(errors.Unsupported, match="encrypted"):
        read_footer(Bytes(b"PARE" + b"\0" * 20 + b"\x04\0\0\0" + b"PARE"))


BOMBS = {
    "nested structs": b"\x1c" * 100_000,
    "nested lists": b"\x19" + b"\x19" * 100_000,
    "list of 10^12 structs": b"\x29\xfc" + varint(10**12),
    "list of 10^12 booleans": b"\x99\xf1" + varint(10**12),
    "map of 10^12": b"\x9b" + varint(10**12) + b"\x11",
    "string of 10^12 bytes": b"\x98" + varint(10**12),
    "an endless integer": b"\x16" + b"\xff" * 1000,
    "no schema": b"\0",
    "wire type 15": b"\x1f",
    "children without end": b"\x29\x1c\x48\x01a\x15" + varint(2 * 10**9) + b"\0\0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_footer_bomb_is_corrupt_and_small(name):
    source = with_footer(BOMBS[name] * 1)
    tracemalloc.start()
    try:
        with pytest.raises(errors.Corrupt):
            read_footer(source)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_deep_schema_is_unsupported():
    group = b"\x48\x01a\x15\x02\0"  # SPEC: SchemaElement: name "a", one child
    leaf = b"\x15\x02\x38\x01a\0"  # type INT32, name "a"
    footer = b"\x29\xfc" + varint(201) + group * 200 + leaf + b"\0"
    with pytest.raises(errors.Unsupported, match="nests"):
        read_footer(with_footer(footer))


@given(st.binary(max_size=300))
def test_footer_of_any_bytes_raises_only_named_errors(data):
    try:
        read_footer(with_footer(data))
    except errors.HbkitError as e:
        assert "memory" in str(e)


GOOD = written(pa.table({"a": [1, 2, 3], "s": ["x", None, "z"], "l": [[1], None, []]}))


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4))
def test_footer_with_any_damage_raises_only_named_errors(changes):
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    try:
        read_footer(Bytes(bytes(data)))
    except errors.HbkitError as e:
        assert "memory" in str(e)
