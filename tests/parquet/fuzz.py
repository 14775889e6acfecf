"""A coverage-guided fuzzer of the Parquet reader, for `make fuzz`: ``python fuzz.py FOLDER [options of libFuzzer]``.

The folder keeps the inputs that reached something new; it is sown with small files and pages of each encoding. Whatever
is raised that is no error of hbkit's, and whatever a sanitizer sees, ends the run and leaves the input behind.

An input's first byte says what the rest is: a whole file, a footer, or the pages of one column of the KINDS. Pages have
three more bytes before them: codec and way to read, values, rows.
"""

import pathlib
import sys

import atheris

with atheris.instrument_imports(include=["hbkit"]):
    import bombs
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from bombs import BOOLEAN, BYTE_ARRAY, DOUBLE, FIXED, INT32, INT64, OPTIONAL, REQUIRED, a_list, flat, parquet

    from hbkit import errors
    from hbkit.parquet import File

DECIMAL = {"more": {6: 5, 7: 2, 8: 18}}
KINDS = [  # schema, and a type with which pyarrow writes such a column
    (flat(INT32), pa.int32()),
    (flat(INT64, OPTIONAL), pa.int64()),
    (flat(DOUBLE, OPTIONAL), pa.float64()),
    (flat(BOOLEAN, OPTIONAL), pa.bool_()),
    (flat(BYTE_ARRAY), pa.binary()),
    (flat(BYTE_ARRAY, OPTIONAL), pa.binary()),
    (flat(FIXED, OPTIONAL, length=3), pa.binary(3)),
    (flat(FIXED, REQUIRED, length=8, **DECIMAL), pa.decimal128(18, 2)),
    (flat(INT32, REQUIRED, more={6: 15}), pa.int8()),
    (a_list(INT32), pa.list_(pa.int32())),
    (a_list(BYTE_ARRAY), pa.list_(pa.binary())),
    (a_list(BOOLEAN), pa.list_(pa.bool_())),
    (a_list(INT64, 2), pa.list_(pa.list_(pa.int64()))),
    (a_list(BYTE_ARRAY, 3), pa.list_(pa.list_(pa.list_(pa.binary())))),
]
WHOLE, FOOTER, PAGES = 0, 1, 2
CODECS = bombs.NONE, bombs.SNAPPY, bombs.ZSTD, bombs.LZ4_RAW
WAYS = list(bombs.WAYS.values())
ENCODINGS = ["PLAIN", "RLE", "DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "BYTE_STREAM_SPLIT"]


def read(data: bytes) -> None:
    if len(data) < 4:
        return
    kind, how, way = data[0] % (PAGES + len(KINDS)), data[1], WAYS[0]
    if kind == WHOLE:
        file = data[1:]
    elif kind == FOOTER:
        file = bombs.whole(b"", data[1:])
    else:
        columns, _ = KINDS[kind - PAGES]
        file = parquet(data[4:], data[2], columns, rows=data[3], codec=CODECS[how % len(CODECS)])
        way = WAYS[how // len(CODECS) % len(WAYS)]
    try:
        way(File(bombs.Bytes("fuzz", file), limit_nbytes=bombs.LIMIT_NBYTES))
    except errors.HbkitError:
        pass


def sow(folder: pathlib.Path) -> None:
    """Inputs to begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [b"\0" + file for make, rows in bombs.BOMBS.values() if len(file := make()) < 4096]
    for kind, (columns, t) in enumerate(KINDS, PAGES):
        rng = np.random.default_rng(kind)
        column = pa.array([value(t, columns[-1].get(3) == OPTIONAL, rng) for _ in range(20)], t)
        for codec, how in ("none", 0), ("snappy", 5), ("zstd", 10), ("lz4", 15):
            for encoding in [None, *ENCODINGS]:
                out = pa.BufferOutputStream()
                path = "x" + ".list.element" * (len(columns) // 2)
                options = {"use_dictionary": False, "column_encoding": {path: encoding}} if encoding else {}
                schema = pa.schema([pa.field("x", t, nullable=columns[0][3] == OPTIONAL)])
                try:
                    pq.write_table(
                        pa.table([column], schema),
                        out,
                        compression=codec,
                        max_rows_per_page=8,
                        data_page_version="2.0" if how % 2 else "1.0",
                        **options,
                    )
                except (OSError, NotImplementedError):  # not of this type
                    continue
                data = out.getvalue().to_pybytes()
                chunk = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
                seeds.append(bytes([kind, how, chunk.num_values, 20]) + data[4 : 4 + chunk.total_compressed_size])
                seeds.append(b"\1" + data[-8 - int.from_bytes(data[-8:-4], "little") : -8])
    for i, seed in enumerate(seeds):
        (folder / f"seed-{i}").write_bytes(seed)


def value(t: pa.DataType, nullable: bool, rng: np.random.Generator):
    if nullable and rng.random() < 0.2:
        return None
    if pa.types.is_list(t):
        return [value(t.value_type, nullable, rng) for _ in range(rng.integers(3))]
    k = int(rng.integers(9))
    return [b"abc"[: 3 if pa.types.is_fixed_size_binary(t) else k], k > 4, k][
        0 if pa.types.is_binary(t) or pa.types.is_fixed_size_binary(t) else 1 if pa.types.is_boolean(t) else 2
    ]


if __name__ == "__main__":
    corpus = pathlib.Path(sys.argv[1])
    if not corpus.exists():
        sow(corpus)
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
