"""Hostile Parquet files, put together by hand, each read in a process of its own; run as a script.

``python bombs.py``: one JSON line a file and way to read it: what came of it, its processor time, and by how much the
process grew. ``BOMBS`` maps a name to a function that builds the file, and what may come of it: a list is the rows it
holds, which may be given (or refused); without one there must be an error of hbkit's.

A file is built from Thrift values: a dict is a structure by field number, a list is a list, bytes are bytes, an int is
an i32, `I64` an i64, and `Raw` is whatever lies is wanted.
"""

import gc
import json
import os
import resource
import signal
import struct
import sys
import time
import zlib
from itertools import pairwise

import numpy as np
import pyarrow as pa

from hbkit import errors
from hbkit.parquet import Field, File, decoded

LIMIT_NBYTES = 64 << 20  # of what one read may decode to: RLE may promise any number of rows
SECONDS = 20  # until a process is ended
INT_MAX, LONG_MAX = 2**31 - 1, 2**63 - 1

BOOLEAN, INT32, INT64, INT96, FLOAT, DOUBLE, BYTE_ARRAY, FIXED = range(8)
PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, DELTA, DELTA_LENGTH, DELTA_BYTES, RLE_DICTIONARY, SPLIT = 0, *range(2, 10)
REQUIRED, OPTIONAL, REPEATED = range(3)
NONE, SNAPPY, GZIP, LZO, BROTLI, LZ4, ZSTD, LZ4_RAW = range(8)


# Thrift's compact protocol


class I64(int):
    pass


class Raw(bytes):
    """A value as it is, of a wire type."""

    wire: int

    def __new__(cls, wire, data):
        self = super().__new__(cls, data)
        self.wire = wire
        return self


def varint(n):
    """Two's complement where it is negative; any length."""
    n, out = n % 2**64 if n < 0 else n, b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def zigzag(n):
    return varint(2 * n if n >= 0 else -2 * n - 1)


def value(v):
    """Wire type and bytes."""
    if isinstance(v, Raw):
        return v.wire, bytes(v)
    if isinstance(v, bool):
        return (1 if v else 2), b""
    if isinstance(v, int):
        return (6 if isinstance(v, I64) else 5), zigzag(v)
    if isinstance(v, bytes):
        return 8, varint(len(v)) + v
    if isinstance(v, dict):
        return 12, struct_(v)
    wires = {value(x)[0] for x in v} or {5}
    return 9, many(len(v), wires.pop()) + b"".join(value(x)[1] for x in v)


def many(n, wire):
    """The head of a list."""
    return bytes([n << 4 | wire]) if n < 15 else bytes([0xF0 | wire]) + varint(n)


def struct_(fields):
    out, last = b"", 0
    for number, v in fields.items():
        if v is None:
            continue
        wire, data = value(v)
        step = number - last
        out += (bytes([step << 4 | wire]) if 0 < step < 16 else bytes([wire]) + zigzag(number)) + data
        last = number
    return out + b"\0"


# Parquet's parts; SPEC: parquet.thrift


def element(name=b"x", physical=None, repetition=None, children=None, length=None, more=()):
    return {1: physical, 2: length, 3: repetition, 4: name, 5: children, **dict(more)}


def schema(*columns):
    return [element(b"schema", children=len(columns)), *(e for c in columns for e in c)]


def flat(physical=INT32, repetition=REQUIRED, **options):
    return [element(b"x", physical, repetition, **options)]


def a_list(physical=INT32, depth=1):
    out = []
    for k in range(depth):
        out += [
            element(b"x" if k == 0 else b"element", None, OPTIONAL, 1, more={6: 3}),
            element(b"list", None, REPEATED, 1),
        ]
    return [*out, element(b"element", physical, OPTIONAL)]


def page(kind, body, header, nbytes=None, stored=None, crc=None):
    which = {0: 5, 1: 6, 2: 7, 3: 8}.get(kind, 5)
    sizes = {1: kind, 2: len(body) if nbytes is None else nbytes, 3: len(body) if stored is None else stored, 4: crc}
    return struct_({**sizes, which: header}) + body


def v1(n, body=b"", encoding=PLAIN, def_encoding=RLE, rep_encoding=RLE, **options):
    return page(0, body, {1: n, 2: encoding, 3: def_encoding, 4: rep_encoding}, **options)


def v2(
    n,
    body=b"",
    encoding=PLAIN,
    rows=None,
    nulls=0,
    defs=b"",
    reps=b"",
    def_nbytes=None,
    rep_nbytes=None,
    is_compressed=None,
    **options,
):
    def_nbytes = len(defs) if def_nbytes is None else def_nbytes
    rep_nbytes = len(reps) if rep_nbytes is None else rep_nbytes
    header = {
        1: n,
        2: nulls,
        3: n if rows is None else rows,
        4: encoding,
        5: def_nbytes,
        6: rep_nbytes,
        7: is_compressed,
    }
    return page(3, reps + defs + body, header, **options)


def dictionary(n, body, encoding=PLAIN, **options):
    return page(2, body, {1: n, 2: encoding}, **options)


def ints(*values):
    return struct.pack(f"<{len(values)}i", *values)


def longs(*values):
    return struct.pack(f"<{len(values)}q", *values)


def strings(*values):
    return b"".join(struct.pack("<I", len(v)) + v for v in values)


def run(n, v=0, nbytes=1):
    """A run of n times v."""
    return varint(n << 1) + v.to_bytes(nbytes, "little")


def packed(groups, data):
    return varint(groups << 1 | 1) + data


def levels(runs):
    return struct.pack("<I", len(runs)) + runs


def delta(first, *blocks, block=128, minis=4, count=None):
    return varint(block) + varint(minis) + varint(count) + zigzag(first) + b"".join(blocks)


def numbers(*values, bits=32):
    """DELTA_BINARY_PACKED, with steps of `bits` bits that wrap around."""
    steps, blocks = [(b - a) % 2**bits for a, b in pairwise(values)], []
    for at in range(0, len(steps), 128):
        packed_steps = sum(s << bits * i for i, s in enumerate(steps[at : at + 128]))
        used = -(-min(128, len(steps) - at) // 32)  # of four miniblocks; the others have no bits
        blocks.append(
            zigzag(0) + bytes([bits] * used + [0] * (4 - used)) + packed_steps.to_bytes(used * 4 * bits, "little")
        )
    return delta(values[0] if values else 0, *blocks, count=len(values))


def parquet(
    pages, n=4, columns=None, rows=None, n_values=None, codec=NONE, n_groups=1, meta=(), group=(), footer=(), index=None
):
    """A file of one column, whose chunk lies behind the magic number; `meta`, `group` and `footer` replace fields. The
    offset index lies behind the chunk."""
    columns = columns or flat()
    leaf = columns[-1]
    rows = n if rows is None else rows
    chunk = {
        1: leaf[1],
        2: [PLAIN, RLE],
        3: [b"x"],
        4: codec,
        5: I64(n if n_values is None else n_values),
        6: I64(len(pages)),
        7: I64(len(pages)),
        9: I64(4),
        **dict(meta),
    }
    indexed = {} if index is None else {4: I64(4 + len(pages)), 5: len(index)}
    groups = [{1: [{2: I64(4), 3: chunk, **indexed}], 2: I64(len(pages)), 3: I64(rows), **dict(group)}] * n_groups
    return whole(pages + (index or b""), {1: 1, 2: schema(columns), 3: I64(rows), 4: groups, **dict(footer)})


def whole(pages, footer):
    raw = footer if isinstance(footer, bytes) else struct_(footer)
    return b"PAR1" + pages + raw + len(raw).to_bytes(4, "little") + b"PAR1"


BOMBS = {}


def bomb(name, build, rows=None):
    assert name not in BOMBS, name
    BOMBS[name] = build if callable(build) else lambda: build, rows


FOUR = ints(1, 2, 3, 4)
ROWS = [1, 2, 3, 4]
# What each kind of column is in a good file: its schema, levels of four values, and those
NULLABLE = flat(repetition=OPTIONAL)
TEXT = flat(BYTE_ARRAY)
TEXTS = strings(b"a", b"bc", b"", b"d")
TEXT_ROWS = [b"a", b"bc", b"", b"d"]
LIST_LEVELS = levels(run(2) + run(2, 1)) + levels(run(4, 3))  # [1], [2, 3, 4]
LIST_ROWS = [[1], [2, 3, 4]]
LIES = -(2**31), -1, 0, 1, 2**28 + 1, INT_MAX


def good_files():
    one = levels(run(4, 1))
    bomb("good: ints", parquet(v1(4, FOUR)), ROWS)
    bomb("good: v2", parquet(v2(4, FOUR)), ROWS)
    bomb("good: nullable", parquet(v1(4, one + FOUR), columns=NULLABLE), ROWS)
    bomb("good: dictionary", parquet(dictionary(4, FOUR) + v1(4, b"\2" + packed(1, b"\xe4\0"), RLE_DICTIONARY)), ROWS)
    bomb("good: strings", parquet(v1(4, TEXTS), columns=TEXT), TEXT_ROWS)
    bomb("good: list", parquet(v1(4, LIST_LEVELS + FOUR), rows=2, columns=a_list()), LIST_ROWS)
    bomb("good: delta", parquet(v1(4, numbers(1, 2, 3, 4), DELTA)), ROWS)
    bomb("good: delta strings", parquet(v1(2, numbers(1, 2) + b"abc", DELTA_LENGTH), 2, TEXT), [b"a", b"bc"])
    prefixed = numbers(0, 1) + numbers(2, 1) + b"abc"
    bomb("good: delta prefixes", parquet(v1(2, prefixed, DELTA_BYTES), 2, TEXT), [b"ab", b"ac"])
    bomb("good: split", parquet(v1(4, bytes([1, 2, 3, 4]) + bytes(12), SPLIT)), ROWS)
    bomb("good: booleans", parquet(v1(4, levels(run(4, 1)), RLE), columns=flat(BOOLEAN)), [True] * 4)
    bomb("good: checksum", parquet(v1(4, FOUR, crc=signed(zlib.crc32(FOUR)))), ROWS)
    bomb("good: two pages and an empty one", parquet(v1(2, FOUR[:8]) + v1(0) + v2(2, FOUR[8:])), ROWS)


def signed(n):
    return n - 2**32 if n >= 2**31 else n


def page_sizes():
    makers = {
        "v1": lambda **o: v1(4, FOUR, **o),
        "v2": lambda **o: v2(4, FOUR, **o),
        "dictionary": lambda **o: dictionary(4, FOUR, **o) + v1(4, b"\1" + run(4), RLE_DICTIONARY),
    }
    for kind, make in makers.items():
        for lie in (*LIES, 15, 17):
            bomb(f"size: {kind} page claims to unpack to {lie}", parquet(make(nbytes=lie)))
            bomb(f"size: {kind} page claims to store {lie}", parquet(make(stored=lie)))
        bomb(f"size: {kind} page claims both to be {INT_MAX}", parquet(make(nbytes=INT_MAX, stored=INT_MAX)))
        for at in range(1, len(make()) - 1, 3):
            bomb(f"cut: {kind} page ends after {at} bytes", parquet(make()[:at]))


def number_lies(kind, columns, level_runs, body, rows):
    def pages(n=4):
        return v1(n, level_runs + body)

    for lie in (-(2**31), -1, 5, 10**9, INT_MAX):
        bomb(f"count: v1 page of {kind} claims {lie}", parquet(pages(lie), columns=columns, rows=rows))
        both = parquet(pages(lie), n_values=lie, columns=columns, rows=rows)
        bomb(f"count: v1 page and chunk of {kind} claim {lie}", both)
    for lie in (-1, 0, 3, 5, 10**9, LONG_MAX):
        bomb(f"count: chunk of {kind} claims {lie}", parquet(pages(), columns=columns, n_values=lie, rows=rows))
        bomb(f"count: row group of {kind} claims {lie}", parquet(pages(), columns=columns, rows=lie + (lie == rows)))
        if lie > 5:
            all_three = parquet(pages(min(lie, INT_MAX)), columns=columns, n_values=lie, rows=lie)
            bomb(f"count: page, chunk and row group of {kind} claim {lie}", all_three)
    of_footer = parquet(pages(), columns=columns, rows=rows, footer={3: I64(LONG_MAX)})
    bomb(f"count: footer of {kind} claims {LONG_MAX}", of_footer, ...)


def numbers_of_values():
    kinds = {
        "ints": (flat(), b"", FOUR, 4),
        "nulls": (NULLABLE, levels(run(10**9)), b"", 4),
        "lists": (a_list(), LIST_LEVELS, FOUR, 2),
        "strings": (TEXT, b"", TEXTS, 4),
    }
    for kind, options in kinds.items():
        number_lies(kind, *options)
    for lie in (*LIES[:3], 5, INT_MAX):
        codes = v1(4, b"\2" + packed(1, b"\xe4\0"), RLE_DICTIONARY)
        bomb(f"count: dictionary claims {lie}", parquet(dictionary(lie, FOUR) + codes))
        text = dictionary(lie, TEXTS) + v1(4, b"\2" + packed(1, b"\xe4\0"), RLE_DICTIONARY)
        bomb(f"count: dictionary of strings claims {lie}", parquet(text, columns=TEXT))
        bomb(f"count: v2 page claims {lie} rows", parquet(v2(4, FOUR, rows=lie)), ROWS)
        bomb(f"count: v2 page claims {lie} nulls", parquet(v2(4, FOUR, nulls=lie)), ROWS)
    n = 5000
    five_thousand = levels(run(n)) + levels(run(n, 3)) + ints(*range(n))
    for lie in (n + 1, 2**32, 2**60, 2**61, 2**61 + 1, 2**62, LONG_MAX):  # times 8 it may be 0 in 64 bits
        bomb(f"count: row group of 5000 lists claims {lie}", parquet(v1(n, five_thousand), n, a_list(), rows=lie))
        flat_one = levels(run(n, 1)) + ints(*range(n))
        bomb(f"count: row group of 5000 nullable values claims {lie}", parquet(v1(n, flat_one), n, NULLABLE, rows=lie))
    for n in (-1, LONG_MAX):
        bomb(f"count: 1000 row groups of {n} rows", parquet(v1(4, FOUR), rows=n, n_groups=1000))
    # true, and more than a reader may take at once
    many_pages = v1(INT_MAX, levels(run(INT_MAX, 0))) * 3
    bomb("count: 6 billion nulls in truth", parquet(many_pages, 3 * INT_MAX, NULLABLE), ...)
    one_list = v1(10**8, levels(run(1) + run(10**8 - 1, 1)) + levels(run(10**8, 2)))
    bomb("count: a list of 100 million nulls in truth", parquet(one_list, 10**8, a_list(), rows=1), ...)
    codes = dictionary(4, FOUR) + v1(10**9, b"\2" + run(10**9), RLE_DICTIONARY)
    bomb("count: a billion codes of one run in truth", parquet(codes, 10**9))
    text = dictionary(1, strings(bytes(1 << 20))) + v1(10**6, b"\1" + run(10**6), RLE_DICTIONARY)
    bomb("count: a million strings of a million bytes in truth", parquet(text, 10**6, TEXT), ...)
    bomb(
        "count: a billion booleans of one run in truth",
        parquet(v1(10**9, levels(run(10**9, 1)), RLE), 10**9, flat(BOOLEAN)),
    )


def runs():
    for name, codes in {
        "a run longer than the page": b"\2" + run(10**9),
        "a packed run longer than the page": b"\2" + packed(10**8, b"\xe4\0"),
    }.items():
        bomb(f"runs: {name}", parquet(dictionary(4, FOUR) + v1(4, codes, RLE_DICTIONARY)), ...)
    for name, codes in {
        "nothing": b"\2",
        "a run of nothing": b"\2" + run(0) * 100 + run(3),
        "a million runs of nothing": b"\2" + run(0) * 10**6,
        "a million packed runs of nothing": b"\2" + packed(0, b"") * 10**6,
        "a run cut off": b"\2\x08",
        "a packed run cut off": b"\2" + packed(1, b""),
        "a head without end": b"\2" + b"\xff" * 1000,
        "a head of 64 bits": b"\2" + varint(2**64 - 1) + b"\0",
        "a packed head of 63 bits": b"\2" + varint(2**63 - 1) + b"\0\0",
        "a run of 2^62": b"\2" + varint(2**63) + b"\1",
        "code 4 of 4, as a run": b"\3" + run(4, 4),
        "code 4 of 4, packed": b"\3" + packed(1, b"\x04\0\0"),
        "code 2^32 - 1, as a run": b"\x20" + run(4, 2**32 - 1, 4),
        "code 2^32 - 1, packed": b"\x20" + packed(1, b"\xff" * 32),
        "code 2^31, as a run": b"\x20" + run(4, 2**31, 4),
        **{f"codes of {w} bits": bytes([w]) + run(4, 0, 8) + bytes(600) for w in (33, 63, 64, 65, 128, 255)},
    }.items():
        bomb(f"runs: {name}", parquet(dictionary(4, FOUR) + v1(4, codes, RLE_DICTIONARY)))
        text = dictionary(4, TEXTS) + v1(4, codes, RLE_DICTIONARY)
        bomb(f"runs: strings by {name}", parquet(text, columns=TEXT))
    bomb("runs: codes of 0 bits", parquet(dictionary(1, FOUR[:4]) + v1(4, b"\0" + varint(8), RLE_DICTIONARY)), [1] * 4)
    bomb(
        "runs: codes of 0 bits into no dictionary",
        parquet(dictionary(0, b"") + v1(4, b"\0" + varint(8), RLE_DICTIONARY)),
    )
    bomb(
        "runs: booleans beyond their page",
        parquet(v1(4, struct.pack("<I", INT_MAX) + run(4, 1), RLE), columns=flat(BOOLEAN)),
    )
    bomb("runs: booleans whose length is cut off", parquet(v1(4, b"\2\0", RLE), columns=flat(BOOLEAN)))
    bomb("runs: booleans without bits", parquet(v1(4, b""), columns=flat(BOOLEAN)))
    bomb("runs: nine booleans in a byte", parquet(v1(9, b"\xff"), 9, flat(BOOLEAN)))


def level_lies():
    deep = a_list(depth=2)
    one = levels(run(4, 1))
    for name, data, columns, rows in [
        ("a definition level beyond the schema's", levels(run(4)) + levels(run(3, 5) + run(1, 6)) + FOUR, deep, 4),
        (
            "packed definition levels beyond the schema's",
            levels(run(4)) + levels(packed(1, b"\xff\xff\xff")) + FOUR,
            deep,
            4,
        ),
        ("a first row that goes on", levels(run(4, 1)) + levels(run(4, 3)) + FOUR, a_list(), 1),
        ("a first row that goes on, deep", levels(run(4, 2)) + levels(run(4, 5)) + FOUR, deep, 1),
        ("a repetition level beyond the schema's", levels(run(1) + run(3, 3)) + levels(run(4, 5)) + FOUR, deep, 1),
        ("an empty list that goes on", levels(run(1) + run(3, 1)) + levels(run(1, 1) + run(3, 3)) + FOUR, a_list(), 1),
        (
            "an empty list that goes on, deep",
            levels(run(1) + run(3, 2)) + levels(run(1, 1) + run(3, 5)) + FOUR,
            deep,
            1,
        ),
        ("fewer rows than the row group", LIST_LEVELS + FOUR, a_list(), 3),
        ("more rows than the row group", LIST_LEVELS + FOUR, a_list(), 1),
        ("no rows for the row group", LIST_LEVELS + FOUR, a_list(), 0),
        ("levels of no bytes", levels(b"") + FOUR, NULLABLE, 4),
        ("levels whose length is cut off", b"\1\0", NULLABLE, 4),
        ("levels beyond their page", struct.pack("<I", 1000) + run(4, 1) + FOUR, NULLABLE, 4),
        ("levels of 4 GiB", struct.pack("<I", 2**32 - 1) + run(4, 1) + FOUR, NULLABLE, 4),
        ("levels that end early", levels(run(3, 1)) + FOUR, NULLABLE, 4),
        ("repetitions that end early", levels(run(3)) + levels(run(4, 3)) + FOUR, a_list(), 3),
        ("fewer values than levels say", one + FOUR[:12], NULLABLE, 4),
        ("no values", one, NULLABLE, 4),
        ("lists without values", LIST_LEVELS, a_list(), 2),
    ]:
        bomb(f"levels: {name}", parquet(v1(4, data), columns=columns, rows=rows))
    # of more bits than levels have: a reader may look at those alone
    bomb("levels: a definition level of 255", parquet(v1(4, levels(run(4, 255)) + FOUR), columns=NULLABLE), ROWS)
    for encoding in (PLAIN, DELTA, 77, -1):
        bomb(f"levels: of encoding {encoding}", parquet(v1(4, one + FOUR, def_encoding=encoding), columns=NULLABLE))
    bomb("levels: packed bits cut off", parquet(v1(400, b"\xff" * 4, def_encoding=BIT_PACKED), 400, NULLABLE))
    a, r = {"columns": NULLABLE}, run(4, 1)
    for name, options in {
        "negative definitions": {"def_nbytes": -1},
        "negative repetitions": {"rep_nbytes": -1},
        "definitions beyond the page": {"def_nbytes": 1000},
        "repetitions beyond the page": {"rep_nbytes": 1000},
        "lengths whose sum overflows": {"def_nbytes": INT_MAX, "rep_nbytes": INT_MAX},
        "lengths whose sum is small": {"def_nbytes": INT_MAX, "rep_nbytes": -INT_MAX + 2},
        "levels longer than the page unpacks to": {"nbytes": 1},
        "no levels": {"def_nbytes": 0},
    }.items():
        bomb(f"levels: v2 with {name}", parquet(v2(4, FOUR, defs=r, **options), **a))
    lists = v2(4, FOUR, rows=1, reps=run(4, 1), defs=run(4, 3))
    bomb("levels: v2 page that starts within a row", parquet(lists, rows=1, columns=a_list()))
    bomb("levels: v2 repetitions of a flat column", parquet(v2(4, FOUR, reps=run(4, 1), defs=r), **a), ROWS)
    empty = v1(1, levels(run(1)) + levels(run(1, 1))) + v1(1, levels(run(1, 1)) + levels(run(1, 3)) + FOUR[:4])
    bomb("levels: an empty list that goes on in the next page", parquet(empty, 2, a_list(), rows=1))


def dictionaries():
    codes = v1(4, b"\2" + packed(1, b"\xe4\0"), RLE_DICTIONARY)
    plain, entries = v1(4, FOUR), dictionary(4, FOUR)
    for name, pages, n, rows in [
        ("missing", codes, 4, None),
        ("missing, after plain values", plain + codes, 8, None),
        ("behind the codes", codes + entries, 4, None),
        ("twice", entries + entries + codes, 4, None),
        ("twice, the second one longer", entries + dictionary(5, FOUR + FOUR[:4]) + codes, 4, None),
        ("between the pages", plain + entries + codes, 8, ROWS * 2),
        ("alone", entries, 4, None),
        ("alone, of no values", entries, 0, []),
        ("empty", dictionary(0, b"") + codes, 4, None),
        ("of run-length encoding", dictionary(4, FOUR, RLE_DICTIONARY) + codes, 4, None),
        ("of an unknown encoding", dictionary(4, FOUR, 77) + codes, 4, None),
        ("of more bytes than entries", dictionary(4, FOUR + FOUR) + codes, 4, ROWS),
        ("cut off", dictionary(4, FOUR[:15]) + codes, 4, None),
        ("a hundred times", entries * 100 + codes, 4, None),
    ]:
        bomb(f"dictionary: {name}", parquet(pages, n), rows)
    for name, body in {
        "a string beyond its page": strings(b"a", b"b", b"c") + struct.pack("<I", 100) + b"d",
        "a string of 2^31 - 1 bytes": struct.pack("<I", INT_MAX) + TEXTS,
        "a string of 2^32 - 1 bytes": struct.pack("<I", 2**32 - 1) + TEXTS,
        "a length cut off": TEXTS[:-3],
        "fewer strings": strings(b"a", b"bcdefghijk"),
    }.items():
        bomb(f"dictionary: {name}", parquet(dictionary(4, body) + codes, columns=TEXT))
    bits = dictionary(2, b"\1") + v1(4, b"\1" + run(4, 1), RLE_DICTIONARY)
    bomb("dictionary: of booleans", parquet(bits, columns=flat(BOOLEAN)))
    fixed = dictionary(4, FOUR) + codes
    bomb("dictionary: of 2^30 bytes a value", parquet(fixed, columns=flat(FIXED, length=2**30)))
    bomb("dictionary: of 3 bytes a value, in part", parquet(dictionary(6, FOUR) + codes, columns=flat(FIXED, length=3)))


def plain_values():
    for name, body in {
        "beyond its page": struct.pack("<I", 100) + b"a",
        "of 2^31 - 1 bytes": struct.pack("<I", INT_MAX) + TEXTS,
        "of 2^31 bytes": struct.pack("<I", 2**31) + TEXTS,
        "of 2^32 - 1 bytes": struct.pack("<I", 2**32 - 1) + TEXTS,
        "whose length is cut off": strings(b"a", b"b", b"c") + b"\1\0",
        "too few": strings(b"a", b"b", b"c"),
        "none": b"",
    }.items():
        bomb(f"values: strings, {name}", parquet(v1(4, body), columns=TEXT))
    for length in (-1, 0, INT_MAX):
        bomb(f"values: {length} bytes each", parquet(v1(4, FOUR), columns=flat(FIXED, length=length)))
    for physical, n in {INT32: 15, INT64: 31, FLOAT: 15, DOUBLE: 31, FIXED: 11, INT96: 47}.items():
        body, length = bytes(n), {"length": 3} if physical == FIXED else {}
        bomb(f"values: a byte too few of type {physical}", parquet(v1(4, body), columns=flat(physical, **length)))
    kinds = BOOLEAN, INT32, INT64, FLOAT, DOUBLE, BYTE_ARRAY, FIXED
    suits = {
        PLAIN: kinds,
        PLAIN_DICTIONARY: kinds,
        RLE_DICTIONARY: kinds,
        RLE: (BOOLEAN,),
        DELTA: (INT32, INT64),
        DELTA_LENGTH: (BYTE_ARRAY,),
        DELTA_BYTES: (BYTE_ARRAY, FIXED),
        SPLIT: (INT32, INT64, FLOAT, DOUBLE, FIXED),
    }
    for encoding in (1, *range(2, 11), 77, 255, -1, INT_MAX):
        for physical in kinds:
            if physical in suits.get(encoding, ()):
                continue
            columns = flat(physical, length=4 if physical == FIXED else None)
            bomb(
                f"values: encoding {encoding} of type {physical}", parquet(v1(4, bytes(64), encoding), columns=columns)
            )
    bomb("values: 7 bytes of split integers", parquet(v1(1, bytes(7), SPLIT), 1))
    bomb("values: too few split integers", parquet(v1(4, bytes(12), SPLIT)))
    decimal = {"more": {6: 5, 7: 2, 8: 18}}
    big = strings(b"\1" + bytes(8), *[b"\1"] * 3)
    bomb("values: a decimal of 9 bytes", parquet(v1(4, big), columns=flat(BYTE_ARRAY, **decimal)))
    bomb("values: a decimal of no bytes", parquet(v1(4, strings(*[b""] * 4)), columns=flat(BYTE_ARRAY, **decimal)))
    wide = flat(FIXED, length=10**6, **decimal)
    bomb("values: decimals of a million bytes", parquet(v1(1, b"\1" + bytes(10**6 - 1)), 1, wide))


def deltas():
    good = numbers(1, 2, 3, 4)
    body = zigzag(1) + bytes(4)
    for name, data in {
        "nothing": b"",
        "a head without end": b"\xff" * 100,
        "blocks of 2^30 values": delta(1, body, block=2**30, count=4),
        "blocks of 2^63 values": delta(1, body, block=2**63, count=4),
        "blocks of no values": delta(1, body, block=0, count=4),
        "blocks of 100 values": delta(1, body, block=100, count=4),
        "no miniblocks": delta(1, body, minis=0, count=4),
        "2^31 miniblocks": delta(1, body, minis=2**31, count=4),
        "2^63 miniblocks": delta(1, body, minis=2**63, count=4),
        "3 miniblocks": delta(1, body, minis=3, count=4),
        "128 miniblocks of one value": delta(1, zigzag(1) + bytes(128), minis=128, count=4),
        "2^31 values": delta(1, body, count=2**31),
        "2^63 values": delta(1, body, count=2**63),
        "5 values": delta(1, body, count=5),
        "3 values": delta(1, body, count=3),
        "bits of 65": delta(1, zigzag(1) + bytes([65, 0, 0, 0]) + bytes(600), count=4),
        "bits of 255": delta(1, zigzag(1) + bytes([255, 0, 0, 0]) + bytes(1100), count=4),
        "bits cut off": good[:-125],
        "padding cut off": good[:-100],
        "widths cut off": delta(1, zigzag(1) + b"\0\0", count=4),
        "no block": delta(1, count=4),
    }.items():
        for physical in (INT32, INT64):
            # a block that the format does not know may still be understood
            rows = ... if name.startswith(("blocks of 2", "blocks of 1", "128")) else None
            rows = ROWS if name == "padding cut off" else rows
            bomb(f"delta: {name} of type {physical}", parquet(v1(4, data, DELTA), columns=flat(physical)), rows)
        bomb(f"delta: lengths of {name}", parquet(v1(4, data + b"abc" * 9, DELTA_LENGTH), columns=TEXT), ...)
        bomb(
            f"delta: prefixes of {name}",
            parquet(v1(4, data + numbers(1, 1, 1, 1) + b"abcd", DELTA_BYTES), columns=TEXT),
        )
    bomb("delta: steps that overflow", parquet(v1(3, numbers(0, LONG_MAX, -2, bits=64), DELTA), 3, flat(INT64)), ...)
    for name, lengths in {
        "negative": (1, -1, 2, 1),
        "beyond the page": (1, 1, 1, 1000),
        "of 2^31 - 1": (INT_MAX,) * 4,
        "of -2^31": (-(2**31),) * 4,
        "fewer": (1, 1, 1),
    }.items():
        bomb(
            f"delta: string lengths {name}", parquet(v1(4, numbers(*lengths) + b"abcdefg", DELTA_LENGTH), columns=TEXT)
        )
        bomb(
            f"delta: suffix lengths {name}",
            parquet(v1(4, numbers(0, 0, 0, 0) + numbers(*lengths) + b"abcdefg", DELTA_BYTES), columns=TEXT),
        )
        if name != "fewer":
            data = numbers(0, *lengths[1:]) + numbers(1, 1, 1, 1) + b"abcd"
            bomb(f"delta: prefix lengths {name}", parquet(v1(4, data, DELTA_BYTES), columns=TEXT))
    data = numbers(1, 0, 0, 0) + numbers(1, 1, 1, 1) + b"abcd"
    bomb("delta: a first prefix", parquet(v1(4, data, DELTA_BYTES), columns=TEXT))
    data = numbers(0, 2, 0, 0) + numbers(1, 1, 1, 1) + b"abcd"
    bomb("delta: a prefix of more than the value before", parquet(v1(4, data, DELTA_BYTES), columns=TEXT))
    fixed = numbers(0, 2, 2, 2) + numbers(4, 1, 2, 2) + b"abcdefghi"
    bomb("delta: a value of another length", parquet(v1(4, fixed, DELTA_BYTES), columns=flat(FIXED, length=4)))
    n = 10**4  # 1 GB from 180 KB
    explosion = numbers(0, *[n * 10] * (n - 1)) + numbers(n * 10, *[0] * (n - 1)) + bytes(n * 10)
    bomb("delta: prefixes that explode", parquet(v1(n, explosion, DELTA_BYTES), n, TEXT))


def offsets():
    pages = v1(4, FOUR)
    end = len(parquet(pages))
    for lie in (-(2**63), -1, 0, 1, len(pages) + 4, end - 8, end, 10**12, LONG_MAX):
        at = {9: I64(lie)}
        # a dictionary's offset of 0 or less is none
        bomb(f"place: pages at {lie}", parquet(pages, meta=at), ... if lie == 1 else None)
        both = {9: I64(4), 11: I64(lie)}
        bomb(f"place: dictionary at {lie}", parquet(pages, meta=both), ...)
    for lie in (-(2**63), -1, 0, 1, len(pages) - 1, end, 10**12, LONG_MAX):
        bomb(f"place: chunk of {lie} bytes", parquet(pages, meta={7: I64(lie)}))
    bomb("place: no pages", parquet(pages, meta={9: None}))
    bomb("place: no metadata", parquet(pages, group={1: [{2: I64(4)}]}))
    bomb("place: in another file", parquet(pages, group={1: [{1: b"/etc/passwd", 2: I64(4), 3: meta_of(pages)}]}))
    bomb("place: a thousand row groups of the same pages", parquet(pages, n_groups=1000), ROWS * 1000)
    bomb("place: no columns in the row group", parquet(pages, group={1: []}))
    bomb("place: two columns in the row group", parquet(pages, group={1: [{2: I64(4), 3: meta_of(pages)}] * 2}))
    bomb("place: another type than the schema's", parquet(pages, meta={1: INT64}))
    bomb("place: type 99", parquet(pages, meta={1: 99}))
    for codec in (-1, 3, 8, 99, INT_MAX):
        bomb(f"codec: {codec}", parquet(pages, codec=codec))


def indices():
    """Three pages of a thousand rows, and what their offset index says of them."""
    pages = [v1(1000, ints(*range(k, k + 1000))) for k in (0, 1000, 2000)]
    size = len(pages[0])
    good = [(4, size, 0), (4 + size, size, 1000), (4 + 2 * size, size, 2000)]

    def indexed(places, n=None):
        entries = [struct_({1: I64(at), 2: nbytes, 3: I64(row)}) for at, nbytes, row in places]
        return b"\x19" + many(len(places) if n is None else n, 12) + b"".join(entries) + b"\0"

    bomb("good: offset index", parquet(b"".join(pages), 3000, index=indexed(good)), list(range(3000)))
    for name, index in {
        "nothing": b"",
        "no pages": indexed([]),
        "fewer pages": indexed(good[:2]),
        "more pages": indexed([*good, (4 + 3 * size, size, 3000)]),
        "pages in no order": indexed(good[::-1]),
        "the same page": indexed([good[0]] * 3),
        "2^31 pages": indexed(good, 2**31),
        "2^63 pages": indexed(good, 2**63),
        "cut off": indexed(good)[:-9],
        **{f"a place of {x}": indexed([good[0], (x, size, 1000), good[2]]) for x in (-(2**63), -1, 0, 5, LONG_MAX)},
        **{f"a place {x} further": indexed([good[0], (4 + size + x, size, 1000), good[2]]) for x in (-1, 1, 20, 4000)},
        **{f"a size of {x}": indexed([*good[:2], (good[2][0], x, 2000)]) for x in (-(2**31), -1, 0, 1, INT_MAX)},
        **{
            f"a row of {x}": indexed([good[0], (4 + size, size, x), good[2]])
            for x in (-(2**63), -1, 0, 999, 1001, LONG_MAX)
        },
        **{f"a last row of {x}": indexed([*good[:2], (4 + 2 * size, size, x)]) for x in (1001, 2999, 3000, LONG_MAX)},
    }.items():
        bomb(f"index: {name}", parquet(b"".join(pages), 3000, index=index), ...)
    for at in (-1, 0, 10**9, LONG_MAX):
        lie = {4: I64(at), 5: 100, 3: {**meta_of(b"".join(pages)), 5: I64(3000)}, 2: I64(4)}
        bomb(f"index: at {at}", parquet(b"".join(pages), 3000, group={1: [lie]}), ...)
    lie = {4: I64(4), 5: INT_MAX, 3: {**meta_of(b"".join(pages)), 5: I64(3000)}, 2: I64(4)}
    bomb("index: of 2^31 - 1 bytes", parquet(b"".join(pages), 3000, group={1: [lie]}), ...)
    lists = v1(2000, levels(run(2000)) + levels(run(2000, 3)) + ints(*range(2000)))
    wrong = indexed([(4, len(lists), 0), (4 + len(lists), len(lists), 2500)])
    bomb("index: of lists, with a wrong row", parquet(lists * 2, 4000, a_list(), rows=4000, index=wrong), ...)


def meta_of(pages):
    return {1: INT32, 2: [PLAIN], 3: [b"x"], 4: NONE, 5: I64(4), 6: I64(len(pages)), 7: I64(len(pages)), 9: I64(4)}


def page_headers():
    for kind in (-(2**31), -1, 4, 77, INT_MAX):
        bomb(f"page: of type {kind}", parquet(page(kind, FOUR, {1: 4, 2: 0, 3: 3, 4: 3})))
    index = page(1, bytes(100), {})
    bomb("page: an index is stepped over", parquet(index + v1(4, FOUR)), ROWS)
    bomb("page: a million empty ones", parquet(v1(0) * 10**6 + v1(4, FOUR)), ...)
    bomb("page: without a header of its own", parquet(struct_({1: 0, 2: 16, 3: 16}) + FOUR))
    bomb(
        "page: v1 with a header of v2",
        parquet(struct_({1: 0, 2: 16, 3: 16, 8: {1: 4, 2: 0, 3: 4, 4: 0, 5: 0, 6: 0}}) + FOUR),
        ROWS,
    )
    bomb("page: v1 with a dictionary's header", parquet(struct_({1: 0, 2: 16, 3: 16, 7: {1: 4, 2: 0}}) + FOUR), ROWS)
    bomb("page: without type", parquet(struct_({2: 16, 3: 16, 5: {1: 4, 2: 0, 3: 3, 4: 3}}) + FOUR))
    bomb("page: without sizes", parquet(struct_({1: 0, 5: {1: 4, 2: 0, 3: 3, 4: 3}}) + FOUR))
    bomb("page: without a number of values", parquet(struct_({1: 0, 2: 16, 3: 16, 5: {2: 0, 3: 3, 4: 3}}) + FOUR))
    bomb("page: without an encoding", parquet(struct_({1: 0, 2: 16, 3: 16, 5: {1: 4}}) + FOUR), ...)
    for wrong in (0, 1, -1, -(2**31)):
        bomb(f"page: checksum {wrong}", parquet(v1(4, FOUR, crc=wrong)))
        bomb(f"page: v2 checksum {wrong}", parquet(v2(4, FOUR, crc=wrong)))
        crc = dictionary(4, FOUR, crc=wrong) + v1(4, b"\2" + packed(1, b"\xe4\0"), RLE_DICTIONARY)
        bomb(f"page: dictionary's checksum {wrong}", parquet(crc))
    for name, junk in THRIFT.items():
        header = struct_({1: 0, 2: 16, 3: 16, 5: {1: 4, 2: 0, 3: 3, 4: 3}})[:-1]
        bomb(f"page: {name}", parquet(header + junk + FOUR))
        inside = struct_({1: 0, 2: 16, 3: 16, 5: {1: 4, 2: 0, 3: 3, 4: 3}})[:-2]
        bomb(f"page: within its header, {name}", parquet(inside + junk + FOUR))


# After field 5: fields that are unknown everywhere, and lie.
THRIFT = {
    "nested structures": b"\x9c" + b"\x1c" * 10**5,
    "nested lists": b"\x99" + b"\x19" * 10**5,
    "nested sets": b"\x9a" + b"\x1a" * 10**5,
    "nested maps": b"\x9b" + b"\1\xbb" * 10**5,
    "a list of 2^31 - 1": b"\x99\xf5" + varint(INT_MAX),
    "a list of 2^32 - 1 structures": b"\x99\xfc" + varint(2**32 - 1),
    "a list of 2^63 booleans": b"\x99\xf1" + varint(2**63),
    "a map of 2^31 - 1": b"\x9b" + varint(INT_MAX) + b"\x55",
    "a map of 2^63 booleans": b"\x9b" + varint(2**63) + b"\x11",
    "bytes of 2^31 - 1": b"\x98" + varint(INT_MAX),
    "bytes of 2^63 - 1": b"\x98" + varint(2**63 - 1),
    "bytes of 2^64 - 1": b"\x98" + varint(2**64 - 1),
    "an endless integer": b"\x96" + b"\xff" * 10**5,
    "a double cut off": b"\x97\0\0",
    "wire type 14": b"\x9e",
    "wire type 15": b"\x9f",
    "field number 2^31": b"\x05" + zigzag(2**31) + b"\0",
    "field number -2^62": b"\x05" + zigzag(-(2**62)) + b"\0",
    "a million booleans": b"\x11" * 10**6,
}


def footers():
    good = {1: 1, 2: schema(flat()), 3: I64(0), 4: []}
    for name, junk in THRIFT.items():
        start = struct_(good)[:-1] + struct_({1: 0, 5: []})[-4:-1]
        bomb(f"footer: {name}", whole(b"", struct_(good)[:-1] + junk), ...)
        bomb(f"footer: in the schema, {name}", whole(b"", b"\x15\2\x19\x1c" + junk))
        del start
    for wire in range(16):
        for field in (2, 3, 4):
            lie = struct_({**good, field: Raw(wire, b"")})
            bomb(f"footer: field {field} of wire type {wire}", whole(b"", lie), ...)
    for n in (2, 10**6, 2**31 - 1, 2**32, 2**63, 2**64 - 1):
        head = b"\x15\2\x19" + many(n, 12) if n > 14 else b"\x15\2\x19\x2c"
        bomb(f"schema: {n} elements claimed", whole(b"", head + struct_(element(b"schema", children=1)) + b"\0"))
    for n in (-(2**31), -1, 0, 2, 10**6, INT_MAX):
        elements = [element(b"schema", children=n), *flat()]
        bomb(f"schema: a root of {n} members", parquet(v1(4, FOUR), footer={2: elements}))
        deeper = [element(b"schema", children=1), element(b"g", None, OPTIONAL, n), *flat()]
        if n not in (-(2**31), -1, 0):
            bomb(f"schema: a group of {n} members", parquet(v1(4, FOUR), footer={2: deeper}))
    for depth in (100, 1000, 10**5):
        for repetition in (REQUIRED, OPTIONAL, REPEATED):
            chain = [element(b"g", None, repetition, 1)] * depth + flat()
            deep = whole(b"", {**good, 2: [element(b"schema", children=1), *chain]})
            bomb(f"schema: {depth} groups deep, repetition {repetition}", deep)
    wide = whole(
        b"", {**good, 2: [element(b"schema", children=20_000), *[flat()[0] | {4: b"%d" % i} for i in range(20_000)]]}
    )
    bomb("schema: 20,000 columns", wide, ...)
    for name, columns in {
        "no elements": {2: []},
        "a root alone": {2: [element(b"schema", children=0)]},
        "a name that is not UTF-8": {2: schema([element(b"\xff\xfe", INT32, REQUIRED)])},
        "a name of a million bytes that is not UTF-8": {2: schema([element(b"\xff" * 10**6, INT32, REQUIRED)])},
        "physical type 99": {2: schema(flat(99))},
        "physical type -1": {2: schema(flat(-1))},
        "repetition 7": {2: schema(flat(INT32, 7))},
        "repetition -1": {2: schema(flat(INT32, -1))},
    }.items():
        bomb(f"schema: {name}", parquet(v1(4, FOUR), footer=columns))
    for name, more in {
        "a scale of 2^31 - 1": {6: 5, 7: INT_MAX, 8: 9},
        "a scale of -2^31": {6: 5, 7: -(2**31), 8: 9},
        "a precision of -1": {6: 5, 7: 0, 8: -1},
        "a converted type of 99": {6: 99},
        "a logical type of 99": {10: {99: {}}},
        "an integer of 7 bits": {10: {10: {1: Raw(3, b"\7"), 2: True}}},
        "an integer of 64 bits in 32": {10: {10: {1: Raw(3, b"\x40"), 2: True}}},
        "a timestamp in 32 bits": {10: {8: {1: True, 2: {1: {}}}}},
    }.items():
        bomb(f"schema: {name}", parquet(v1(4, FOUR), columns=flat(more=more)), ...)
    for name, pairs in {
        "not UTF-8": [{1: b"\xff", 2: b"\xff"}],
        "without a key": [{}],
    }.items():
        bomb(f"footer: key-value pairs {name}", parquet(v1(4, FOUR), footer={5: pairs}), ...)
    bomb("footer: nothing", whole(b"", b""))
    bomb("footer: zeros", whole(b"", bytes(1000)))
    for n in (0, 1, 3, 2**31, 2**32 - 1):
        bomb(f"footer: claims {n} bytes", parquet(v1(4, FOUR))[:-8] + n.to_bytes(4, "little") + b"PAR1")


def compressed():
    raw = bytes(1000)
    codecs = {SNAPPY: "snappy", GZIP: "gzip", BROTLI: "brotli", ZSTD: "zstd", LZ4_RAW: "lz4_raw"}
    big = {
        GZIP: gzip_bomb,
        BROTLI: lambda: stream_bomb("brotli"),
        ZSTD: lambda: stream_bomb("zstd"),
        SNAPPY: lambda: varint(2**27) + b"\0\0" + b"\xfe\1\0" * (2**27 // 64),
        LZ4_RAW: lambda: b"\x1f\0\1\0" + b"\xff" * 2**20 + b"\0",
    }
    for codec, name in codecs.items():
        data = pa.Codec(name).compress(raw, asbytes=True)
        bomb(f"{name}: good", parquet(v1(250, data, nbytes=1000), 250, codec=codec), [0] * 250)
        for lie in (0, 1, 999, 1001, 10**6, 2**28):
            bomb(f"{name}: claims {lie} bytes of 1000", parquet(v1(250, data, nbytes=lie), 250, codec=codec))
            if lie != 2**28:
                v2_lie = v2(250, data, nbytes=lie)
                bomb(f"{name}: v2 claims {lie} bytes of 1000", parquet(v2_lie, 250, codec=codec))
        entries = dictionary(250, data, nbytes=2**28) + v1(4, b"\2", RLE_DICTIONARY)
        bomb(f"{name}: dictionary claims 2^28 bytes of 1000", parquet(entries, codec=codec))
        for what, cut in {"nothing": b"", "half": data[: len(data) // 2], "junk": b"\xa5" * 100}.items():
            bomb(f"{name}: {what}", parquet(v1(250, cut, nbytes=1000), 250, codec=codec))
        for claim in (1000, 2**27):
            bomb(
                f"{name}: a bomb that claims {claim} bytes",
                late(codec, big[codec], claim),
                ... if claim > 1000 else None,
            )
    for name, data in {
        "a length of 2^32 - 1": varint(2**32 - 1) + b"\0\0",
        "a length of 2^63": varint(2**63) + b"\0\0",
        "a length without end": b"\xff" * 100,
        "a copy from before the start": varint(1000) + b"\0\0" + b"\xfe\xff\xff" * 16,
        "a copy of offset 0": varint(1000) + b"\0\0" + b"\xfe\0\0" * 16,
        "a literal beyond the end": varint(1000) + b"\xf4\xff\xff" + bytes(10),
        "a literal of 2^32": varint(1000) + b"\xfc\xff\xff\xff\xff" + bytes(10),
        "a literal's length cut off": varint(1000) + b"\xfc\xff",
        "a copy cut off": varint(1000) + b"\0\0\xff\1",
        "more than it claims": varint(1000) + b"\0\0" + b"\xfe\1\0" * 17,
    }.items():
        bomb(f"snappy: {name}", parquet(v1(250, data, nbytes=1000), 250, codec=SNAPPY))
    bomb("snappy: v2 whose rest is not compressed", parquet(v2(4, FOUR, is_compressed=False), codec=SNAPPY), ROWS)
    bomb("snappy: v2 that says so and is not", parquet(v2(4, FOUR), codec=SNAPPY))


def late(codec, make, claim):
    return lambda: parquet(v1(250, make(), nbytes=claim), 250, codec=codec)


def gzip_bomb():
    """1 GiB of zeros in 1 MB: one block that ends at a byte, again and again."""
    c = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = c.compress(bytes(1 << 24)) + c.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + block * 64 + c.flush() + bytes(8)


def stream_bomb(codec):
    """512 MiB of zeros."""
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, codec) as stream:
        for _ in range(512):
            stream.write(bytes(1 << 20))
    return out.getvalue().to_pybytes()


for make in (
    good_files,
    page_sizes,
    numbers_of_values,
    runs,
    level_lies,
    dictionaries,
    plain_values,
    deltas,
    offsets,
    indices,
    page_headers,
    footers,
    compressed,
):
    make()


# The reading of them


class Bytes:
    """A source in memory."""

    remote = False

    def __init__(self, path, data):
        self.path, self.data, self.nbytes = path, data, len(data)
        self.file = pa.BufferReader(data)

    def read(self, ranges):
        # in memory of their own, so that a sanitizer sees a step beyond their end
        return [memoryview(np.frombuffer(self.data[offset : offset + n], np.uint8).copy()) for offset, n in ranges]

    def close(self):
        self.file.close()


def whole_groups(file, **options):
    rows = []
    for g in range(len(file.row_group_rows)):
        for column in file.read_row_group(g, [Field(n, **options) for n in file.schema]).values():
            rows += column.tolist()
    return rows


def by_pieces(file):
    """A row, a gap, and the rest."""
    for g, n in enumerate(file.row_group_rows):
        group = file.open_row_group(g, [Field(name, null="empty") for name in file.schema])
        decoded.read(group, min(n, 1))
        group.skip(min(n, 2) - min(n, 1))
        decoded.read(group, n - min(n, 2))


def by_leaps(file):
    """Rows behind a leap that is worth a look into the offset index."""
    for g, n in enumerate(file.row_group_rows):
        if 1500 < n < 10_000:
            group = file.open_row_group(g, [Field(name, null="empty") for name in file.schema])
            group.skip(1500)
            decoded.read(group, 7)
            group.skip(n - 1507)


def as_dictionaries(file):
    fields = [Field(name, null="empty") for name in file.schema]
    for column in file.read(fields, range(len(file.row_group_rows)), dictionary=True).values():
        if len(column.codes) < 10_000:  # what so many stand for may be anything
            column.decode()


WAYS = {
    "whole": whole_groups,
    "without nulls": lambda file: whole_groups(file, null="empty"),
    "by pieces": by_pieces,
    "by leaps": by_leaps,
    "as dictionaries": as_dictionaries,
    "hashed": lambda file: whole_groups(file, null="empty", hash_to="int64"),
}


def attempt(data, way):
    """What comes of one way to read a file: rows, or an error's name and text; seconds and bytes that it took."""
    before, start, said = peak(), time.process_time(), {"way": way}
    try:
        said["rows"] = repr(WAYS[way](File(Bytes("bomb", data), limit_nbytes=LIMIT_NBYTES)))[: 10**5]
    except errors.HbkitError as e:
        said["error"] = type(e).__name__
        said["text"] = str(e)
    except Exception as e:
        said["alien"] = repr(e)[:500]
    said["seconds"] = round(time.process_time() - start, 3)
    said["grown"] = peak() - before
    return said


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def try_one(name):
    """A JSON line for each way to read a file, in a process of its own: a crash or an endless loop has a name."""
    into, out = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(into)
        data = BOMBS[name][0]()
        with open(out, "w") as f:
            for way in WAYS:
                signal.alarm(SECONDS)
                print(json.dumps({"name": name, **attempt(data, way)}), file=f, flush=True)
        os._exit(0)
    os.close(out)
    with open(into) as f:
        text = f.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text + (json.dumps({"name": name, "way": "?", "alien": f"the process ends with {code}"}) if code else "")


if __name__ == "__main__":
    gc.freeze()  # else each process would copy what it inherits, when its garbage collector looks at it
    for bomb_name in BOMBS:
        if len(sys.argv) < 2 or any(word in bomb_name for word in sys.argv[1:]):
            print(try_one(bomb_name), flush=True, end="")
