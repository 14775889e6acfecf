"""Snappy: what pyarrow compresses and what no compressor writes comes back; damaged data is an error, never a crash."""

import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit._ext import isa, snappy
from hbkit.errors import Corrupt, InvalidArgument

CODEC = pa.Codec("snappy")
GUARD = 64  # bytes beyond the slack that must stay as they were


@pytest.fixture(scope="module", params=isa.available(), autouse=True)
def each_isa(request):
    before = isa.name()
    isa.use(request.param)
    yield request.param
    isa.use(before)


def decompress(data):
    """With memory of exactly the size that may be read, and a guard behind what may be written."""
    size = snappy.length(data)
    out = np.full(size + snappy.SLACK + GUARD, 0xA5, np.uint8)
    try:
        return snappy.decompress(np.frombuffer(data, np.uint8).copy(), out[: size + snappy.SLACK]).tobytes()
    finally:
        assert (out[size + snappy.SLACK :] == 0xA5).all()


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def literal(data, n_bytes=None):
    """An element that gives data; its length in n_bytes (0 to 4) beside the tag, or as few as do."""
    n = len(data) - 1
    if n_bytes is None:
        n_bytes = 0 if n < 60 else (n.bit_length() + 7) // 8
    if n_bytes == 0:
        return bytes([n << 2]) + data
    return bytes([59 + n_bytes << 2]) + n.to_bytes(n_bytes, "little") + data


def copy(n, offset, kind=None):
    """An element that repeats n bytes of offset bytes ago, by the tag `kind` or the shortest."""
    if kind is None:
        kind = 1 if 4 <= n <= 11 and offset < 2048 else 2 if offset < 65536 else 3
    if kind == 1:
        return bytes([1 | n - 4 << 2 | offset >> 8 << 5, offset & 255])
    return bytes([kind | n - 1 << 2]) + struct.pack("<H" if kind == 2 else "<I", offset)


def stream(elements):
    """Elements, each bytes for a literal or (length, offset) for a copy, as snappy data and as what they give."""
    body, out = bytearray(), bytearray()
    for e in elements:
        if isinstance(e, bytes):
            body += literal(e)
            out += e
        else:
            n, offset = e
            body += copy(n, offset)
            for _ in range(n):
                out.append(out[-offset])
    return varint(len(out)) + body, bytes(out)


def random_bytes(n, seed=0):
    return np.random.default_rng(seed).bytes(n)


# ---- data as a compressor meets it ----


def keys(n, n_distinct, seed):
    """8-byte integers with zero bytes at the end, some of them again and again."""
    rank = np.minimum(np.random.default_rng(seed).zipf(1.2, n), n_distinct).astype(np.uint64)
    return (rank * np.uint64(2654435761) % np.uint64(2**40)).tobytes()


def words(n, seed):
    rank = np.minimum(np.random.default_rng(seed).zipf(1.3, n), 10**6)
    return b"".join(struct.pack("<I", len(w)) + w for w in (b"word%d" % r for r in rank))


PIECES = st.one_of(
    st.builds(keys, st.integers(1, 400), st.integers(1, 10**6), st.integers(0, 9)),
    st.builds(words, st.integers(1, 200), st.integers(0, 9)),
    st.builds(lambda unit, n: (unit * n)[:n], st.binary(min_size=1, max_size=70), st.integers(1, 700)),
    st.builds(random_bytes, st.sampled_from([1, 7, 59, 60, 61, 255, 256, 257, 1000, 70_000]), st.integers(0, 9)),
    st.binary(max_size=300),
)


@given(st.lists(PIECES, max_size=6))
def test_snappy_gives_back_what_pyarrow_compressed(pieces):
    data = b"".join(pieces)
    compressed = CODEC.compress(data, asbytes=True)
    assert snappy.length(compressed) == len(data)
    assert decompress(compressed) == data


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 300_000])
def test_snappy_long_data_of_each_shape(n):
    for data in (keys(n // 8, 50_000, 1), words(n // 10, 1), random_bytes(n), bytes(n), bytes(range(256)) * (n // 256)):
        assert decompress(CODEC.compress(data, asbytes=True)) == data


# ---- streams that no compressor writes ----


@st.composite
def elements(draw):
    """A few thousand bytes of literals and copies, mostly short ones; what pyarrow would never write included."""
    kinds = st.tuples(
        st.sampled_from(["short", "short", "short", "long", "copy", "copy", "copy", "repeat"]), st.integers(0, 2**32)
    )
    out, n_out = [], 0
    for kind, draws in draw(st.lists(kinds, min_size=1, max_size=150)):
        if kind == "short" or n_out == 0:
            e = random_bytes(1 + draws % 9, draws)
        elif kind == "long":
            e = random_bytes(1 + draws % 80, draws)
        elif kind == "copy":
            e = (1 + draws % 20, 1 + draws // 20 % n_out)
        else:
            e = (1 + draws % 64, 1 + draws // 64 % min(n_out, 70))
        out.append(e)
        n_out += len(e) if isinstance(e, bytes) else e[0]
    return out


@given(elements())
def test_snappy_any_mix_of_elements(mix):
    data, expected = stream(mix)
    assert CODEC.decompress(data, len(expected), asbytes=True) == expected
    assert decompress(data) == expected


@pytest.mark.parametrize("offset", range(1, 71))
def test_snappy_overlapping_copies_of_every_length(offset):
    start = random_bytes(70)
    for tail in (0, 2):  # in the middle of much and at the very end
        data, expected = stream([start, *[(n, offset) for n in range(1, 65)], *[random_bytes(400)] * tail])
        assert decompress(data) == expected


@pytest.mark.parametrize("n_bytes, most", [(0, 60), (1, 1 << 8), (2, 1 << 16), (3, 1 << 24), (4, 1 << 32)])
@pytest.mark.parametrize("n", [1, 6, 7, 60, 61, 256, 257, 65_536, 65_537, 1 << 20])
def test_snappy_literals_with_lengths_of_every_size(n, n_bytes, most):
    n = min(n, most)
    data = random_bytes(n)
    for copies in (0, 1, 300):
        body = literal(data, n_bytes) + copy(8, 1) * copies
        assert decompress(varint(n + 8 * copies) + body) == data + data[-1:] * (8 * copies)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_snappy_copies_of_every_kind(kind):
    start = random_bytes(100_000)
    offset = {1: 2047, 2: 65_535, 3: 100_000}[kind]
    body = literal(start) + copy(9, offset, kind) * 400
    expected = bytearray(start)
    for _ in range(400):
        expected += expected[-offset:][:9]
    assert decompress(varint(len(expected)) + body) == bytes(expected)
    assert CODEC.decompress(varint(len(expected)) + body, len(expected), asbytes=True) == bytes(expected)


def test_snappy_of_nothing():
    assert decompress(b"\0") == b""
    assert decompress(CODEC.compress(b"", asbytes=True)) == b""


# ---- damage ----


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff\xff\xff\xff\xff", b"\xff\xff\xff\xff\x10", b"\x80" * 5 + b"\0"])
def test_snappy_damaged_length(data):
    with pytest.raises(Corrupt, match="length"):
        snappy.length(data)
    with pytest.raises(Corrupt):
        snappy.decompress(data)


def test_snappy_declares_more_than_it_could_hold():
    assert snappy.length(b"\xff\xff\xff\xff\x0f") == 2**32 - 1
    with pytest.raises(Corrupt, match="declare 4294967295"):
        snappy.decompress(b"\xff\xff\xff\xff\x0f")


def mixed():
    """A compressed kilobyte or two with every path in it."""
    mix = [random_bytes(300), (64, 1), (5, 300), b"abcd", (4, 200)]
    mix += [e for i in range(60) for e in (random_bytes(4, i), (4, 16 + i), (8, 100 + i))]
    mix += [(60, 3), random_bytes(40), (64, 350), random_bytes(61)]
    mix += [e for i in range(30) for e in (random_bytes(1 + i % 9, i), (4 + i % 8, 16 + i))]
    return stream(mix)


def test_snappy_truncated_at_every_byte():
    data, expected = mixed()
    assert decompress(data) == expected
    for n in range(2, len(data)):
        with pytest.raises(Corrupt):
            decompress(data[:n])


def test_snappy_with_another_length_than_declared():
    data, expected = mixed()
    body = data[len(varint(len(expected))) :]
    for wrong in (0, 1, len(expected) - 1, len(expected) + 1, 2 * len(expected)):
        with pytest.raises(Corrupt, match="another length"):
            decompress(varint(wrong) + body)


@pytest.mark.parametrize("before", [1, 8, 100, 300])
@pytest.mark.parametrize("excess", [0, 1, 1000])
@pytest.mark.parametrize("n", [4, 8, 11, 16, 17, 64])
def test_snappy_copy_from_before_the_start(before, excess, n):
    """Wherever it stands, and offset 0 too."""
    offset = before + excess if excess else 0
    for rest in (0, 1000):
        body = literal(random_bytes(before)) + copy(n, offset, 2) + literal(random_bytes(1000)) * bool(rest)
        with pytest.raises(Corrupt, match="before its start"):
            decompress(varint(before + n + rest) + body)


@given(st.randoms(use_true_random=False), st.sampled_from(["mixed", "keys", "words"]))
def test_snappy_flipped_bits_are_an_error_or_other_bytes(random, what):
    data = {
        "mixed": lambda: mixed()[0],
        "keys": lambda: CODEC.compress(keys(500, 1000, 1), asbytes=True),
        "words": lambda: CODEC.compress(words(300, 1), asbytes=True),
    }[what]()
    for _ in range(20):
        damaged = bytearray(data)
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(2, len(data))] ^= 1 << random.randrange(8)
        try:
            ours = decompress(bytes(damaged))
        except Corrupt:
            ours = None
        try:
            theirs = CODEC.decompress(bytes(damaged), snappy.length(data), asbytes=True)
        except OSError:
            theirs = None
        assert ours == theirs


def test_snappy_into_given_memory():
    data, expected = mixed()
    out = np.zeros(len(expected) + snappy.SLACK, np.uint8)
    got = snappy.decompress(data, out)
    assert got.base is not None and np.shares_memory(got, out) and got.tobytes() == expected
    with pytest.raises(InvalidArgument, match="64 more"):
        snappy.decompress(data, out[1:])
