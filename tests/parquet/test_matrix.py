"""Files of four writers, in each type, encoding, codec, nesting and page layout, value for value as pyarrow reads them.

Hypothesis draws how a file is written; its values come from a seeded generator, for a file must be long enough to have
pages. What hbkit should give is said in plain Python on what pyarrow reads.
"""

import contextlib
import decimal
import io
import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.data import Dataset
from hbkit.parquet import Field, File, read_columns
from hbkit.parquet.decoded import read

# What Parquet stores a type as; the encodings go by that.
PHYSICAL = {
    pa.bool_(): "bool",
    **dict.fromkeys([pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32()], "int"),
    **dict.fromkeys([pa.int64(), pa.uint64()], "int"),
    **dict.fromkeys([pa.date32(), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.duration("us")], "int"),
    **dict.fromkeys([pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns")], "int"),
    **dict.fromkeys([pa.float32(), pa.float64()], "float"),
    **dict.fromkeys([pa.float16(), pa.binary(1), pa.binary(3), pa.binary(16)], "fixed"),
    **dict.fromkeys([pa.decimal128(4, 1), pa.decimal128(9, 0), pa.decimal128(18, 3), pa.decimal256(18, 2)], "fixed"),
    **dict.fromkeys([pa.string(), pa.binary(), pa.large_string(), pa.large_binary(), pa.string_view()], "bytes"),
}
ENCODINGS = {
    "PLAIN": {"bool", "int", "float", "fixed", "bytes"},
    "dictionary": {"int", "float", "fixed", "bytes"},
    "dictionary, then PLAIN": {"int", "float", "fixed", "bytes"},
    "RLE": {"bool"},
    "DELTA_BINARY_PACKED": {"int"},
    "DELTA_LENGTH_BYTE_ARRAY": {"bytes"},
    "DELTA_BYTE_ARRAY": {"bytes", "fixed"},
    "BYTE_STREAM_SPLIT": {"int", "float", "fixed"},
}
NESTING = {
    "flat": [],
    "list": ["list"],
    "large_list": ["large_list"],
    "fixed_size_list": ["fixed"],
    "list of lists": ["list", "large_list"],
    "list of fixed_size_lists": ["list", "fixed"],
    "fixed_size_list of lists": ["fixed", "list"],
    "list of lists of lists": ["list", "list", "list"],
}
NULLS = "required", "none", "some", "lists", "elements", "all"
DEEP = int(os.environ.get("HBKIT_DEEP", "1"))  # times the examples
CODECS = "NONE", "SNAPPY", "ZSTD", "LZ4", "GZIP", "BROTLI"


def leaf_values(leaf: pa.DataType, shape: str, n: int, rng: np.random.Generator) -> list[Any]:
    """n Python values: of the whole range, of a few, or in runs and rising."""
    if shape != "any":
        few = leaf_values(leaf, "any", 3, rng)
        return [few[k] for k in (np.sort(rng.integers(0, 3, n)) if shape == "runs" else rng.integers(0, 3, n))]
    t = pa.types
    if t.is_boolean(leaf):
        return (rng.random(n) < 0.5).tolist()
    if t.is_floating(leaf):  # any bits: NaNs, infinities, denormals, -0.0
        dtype = np.dtype(leaf.to_pandas_dtype())
        return list(rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype))
    if t.is_decimal(leaf):
        end = 10**leaf.precision
        return [decimal.Decimal(int(v)).scaleb(-leaf.scale) for v in rng.integers(-end + 1, end, n)]
    if t.is_date(leaf):
        return rng.integers(-(10**5), 10**5, n).tolist()
    if t.is_time(leaf):
        end = 86_400 * {"ms": 10**3, "us": 10**6, "ns": 10**9}[leaf.unit]
        return rng.integers(0, end, n).tolist()
    if t.is_integer(leaf) or t.is_temporal(leaf):
        dtype = np.dtype(leaf.to_pandas_dtype() if t.is_integer(leaf) else np.int64)
        info = np.iinfo(dtype)
        if rng.random() < 0.5:  # small steps, which wrap around
            return np.cumsum(rng.integers(0, 100, n)).astype(dtype).tolist()
        return rng.integers(info.min, info.max, n, dtype, endpoint=True).tolist()
    if t.is_fixed_size_binary(leaf):
        return [rng.bytes(leaf.byte_width) for _ in range(n)]
    # with common beginnings, some empty, some not ASCII, one longer than a page
    texts = ["", "a", "abc" * 30, *(f"item/{k % 7}/ключ-{k}" for k in rng.integers(0, 10**6, n))]
    picked = [texts[k] for k in rng.integers(0, len(texts), n)]
    return [v.encode() for v in picked] if t.is_binary(leaf) or t.is_large_binary(leaf) else picked


def column(leaf: pa.DataType, nesting: str, nulls: str, shape: str, n_rows: int, seed: int) -> pa.Array:
    """An Arrow array to write."""
    rng, t, kinds = np.random.default_rng(seed), leaf, NESTING[nesting]
    for kind in reversed(kinds):
        item = pa.field("element", t, nullable=nulls != "required")
        t = {"list": pa.list_(item), "large_list": pa.large_list(item), "fixed": pa.list_(item, 2)}[kind]
    # pyarrow does not read a null fixed-size list back, so these get none
    list_nulls = {"some": 0.1, "lists": 0.3}.get(nulls, 0.0) if "fixed" not in kinds else 0.0
    leaf_nulls = {"some": 0.1, "elements": 0.3, "all": 1.0}.get(nulls, 0.0)
    if nulls == "all" and "fixed" not in kinds:
        return pa.nulls(n_rows, t)
    source = itertools.cycle(leaf_values(leaf, shape, max(1, n_rows), rng))

    def one(level: int) -> Any:
        if level == len(kinds):
            value = next(source)
            return None if rng.random() < leaf_nulls else value
        if rng.random() < list_nulls:
            return None
        return [one(level + 1) for _ in range(2 if kinds[level] == "fixed" else rng.integers(0, 4))]

    return pa.array([one(0) for _ in range(n_rows)], t)


# what is expected


def stored_rows(array: pa.Array | pa.ChunkedArray, path: tuple[str, ...] = ()) -> list[Any]:
    """Rows as Python values: text as bytes, times and decimals as the integers that stand for them; of a structure or
    map, the member that the path names."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    t, types = array.type, pa.types
    if types.is_dictionary(t):
        return stored_rows(array.dictionary_decode(), path)
    if types.is_struct(t):
        return stored_rows(array.flatten()[t.get_field_index(path[0])], path[1:])
    if types.is_map(t):
        items = array.keys if path[0] == "key" else array.items
        array, path = pa.ListArray.from_arrays(array.offsets, items, mask=array.is_null()), path[1:]
        t = array.type
    if types.is_list(t) or types.is_large_list(t) or types.is_fixed_size_list(t):
        lengths, inner = pc.list_value_length(array).to_pylist(), iter(stored_rows(array.flatten(), path))
        return [None if n is None else list(itertools.islice(inner, n)) for n in lengths]
    if types.is_temporal(t):
        array = array.view(pa.int32() if t.bit_width == 32 else pa.int64())
    elif types.is_string(t) or types.is_large_string(t) or types.is_string_view(t):
        array = array.cast(pa.large_binary())
    elif types.is_decimal(t):
        return [None if v is None else int(v.scaleb(t.scale)) for v in array.to_pylist()]
    return array.to_pylist()


def stored_table(table: pa.Table) -> dict[str, list[Any]]:
    return {name: stored_rows(table[name]) for name in table.column_names}


def has_nulls(value: Any, rank: int) -> bool:
    return value is None or (rank > 0 and any(has_nulls(v, rank - 1) for v in value))


def filled(value: Any, rank: int, default: Any) -> Any:
    """A row under null="default", or without a default, a row of lists under null="empty"."""
    if rank == 0:
        return default if value is None else value
    inner = [v for v in value or [] if v is not None or default is not None or rank > 1]
    return [filled(v, rank - 1, default) for v in inner]


def emptied(value: Any, rank: int, text: bool) -> Any:
    """A row under null="empty"."""
    if rank:
        return filled(value, rank, None)
    if text:
        return b"" if value is None else value
    return [] if value is None else [value]


def padded(row: list[Any], width: int, truncate: str, zero: Any) -> list[Any]:
    kept = row[:width] if truncate == "tail" else row[-width:]
    return kept + [zero] * (width - len(kept))


def hashed(value: Any, seed: int) -> Any:
    if isinstance(value, list):
        return [hashed(v, seed) for v in value]
    data = value if isinstance(value, bytes) else (int(value) % 2**64).to_bytes(8, "little")
    h = xxhash.xxh64_intdigest(data, seed)
    return h - 2**64 if h >= 2**63 else h


def exact(value: Any) -> Any:
    """A value that equals only itself: NaN does, -0.0 is not 0.0."""
    if isinstance(value, list):
        return [exact(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def same(got: Any, want: list[Any]) -> None:
    got = got if isinstance(got, list) else got.tolist()
    assert len(got) == len(want)
    if exact(got) != exact(want):
        at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if exact(a) != exact(b))
        pytest.fail(f"row {at} of {len(want)} is {got[at]!r}, not {want[at]!r}")


def check_column(path: Any, name: str, rows: list[Any]) -> None:
    """One column, read in each way that its type allows, against its rows as they are stored."""
    file = File(path)
    kind = file.schema[name]
    rank, text, floats = kind.ragged_rank, kind.dtype == "string", kind.dtype.startswith("float")

    def check(want: list[Any], row_groups: Any = None, **options: Any) -> None:
        same(read_columns(path, [Field(name, **options)], row_groups)[name], want)

    empty = [emptied(v, rank, text) for v in rows]
    check(empty, null="empty")
    default = b"none" if text else kind.dtype == "bool" or (7.0 if floats else 7)
    full = [filled(v, rank, default) for v in rows]
    check(full, null="default", default=default)
    if any(has_nulls(v, rank) for v in rows):
        with pytest.raises(errors.NullFound, match=f"column {name}"):
            read_columns(path, [name])
    else:
        check(rows)

    same(read_columns(path, [Field(name, null="empty")], dictionary=True)[name].decode(), empty)
    first = list(itertools.accumulate(file.row_group_rows, initial=0))
    some = list(range(len(file.row_group_rows)))[::-2]
    check([v for g in some for v in empty[first[g] : first[g + 1]]], some, null="empty")

    if rank == 0:
        check([[v] for v in full], null="default", default=default, ragged_rank=1)
    if rank == 1 and all(len(v or []) < 2 for v in rows):
        lone = [filled((v or [None])[0], 0, default) for v in rows]
        check(lone, null="default", default=default, ragged_rank=0)
    if text or (kind.dtype != "bool" and not floats):
        check(hashed(empty, 5), null="empty", hash_to="int64", hash_seed=5)
        check(hashed(full, 0), null="default", default=default, hash_to="int64")
    for width, truncate in (1, "head"), (2, "tail"):
        pad: dict[str, Any] = {"null": "empty", "pad_to": width, "truncate": truncate}
        if text and rank == 1:
            check([padded(hashed(v, 0), width, truncate, 0) for v in empty], hash_to="int64", **pad)
        elif not text and rank < 2:
            check([padded(v, width, truncate, 0.0 if floats else 0) for v in empty], **pad)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix") / "x.parquet"


LAYOUTS = st.fixed_dictionaries(
    {
        "compression": st.sampled_from(CODECS),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "data_page_size": st.sampled_from([1, 64, 1000, None]),
        "write_batch_size": st.sampled_from([1, 8, 100, None]),  # a page is not cut within one
        "max_rows_per_page": st.sampled_from([3, 50, None]),
        "row_group_size": st.sampled_from([13, 100, None]),
        "use_compliant_nested_type": st.booleans(),
        "write_page_checksum": st.booleans(),
        "store_decimal_as_integer": st.booleans(),
        "store_schema": st.booleans(),
    }
)


def write(path: Any, columns: dict[str, pa.Array], encoding: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Columns whose leaves have the encoding; a layout's None leaves it to pyarrow. Returns the rows."""
    table = pa.table(columns)
    options = {k: v for k, v in layout.items() if v is not None}
    if encoding == "DELTA_BYTE_ARRAY":  # not of integers
        options |= {"store_decimal_as_integer": False}
    if encoding.startswith("dictionary"):
        options |= {"use_dictionary": True}
        if encoding != "dictionary":
            options |= {"dictionary_pagesize_limit": 20}
    else:
        out = io.BytesIO()
        pq.write_table(table[:0], out, use_compliant_nested_type=layout["use_compliant_nested_type"])
        leaves = pq.ParquetFile(out).schema
        options |= {"use_dictionary": False, "column_encoding": {c.path: encoding for c in leaves}}
    pq.write_table(table, path, **options)
    written = stored_table(table)
    for name, rows in stored_table(pq.read_table(path)).items():
        # pyarrow loses the rows of a chunk whose first page holds empty lists alone, in the delta encodings
        if len(rows) == len(table):
            same(rows, written[name])
    return written


def leaves_of(encoding: str) -> st.SearchStrategy[pa.DataType]:
    return st.sampled_from([t for t, stored in PHYSICAL.items() if stored in ENCODINGS[encoding]])


COLUMNS = st.sampled_from(list(NESTING)), st.sampled_from(NULLS), st.sampled_from(["any", "few", "runs"])
SEEDS = st.integers(0, 2**32)
EACH_ENCODING = pytest.mark.parametrize("encoding", ENCODINGS)


@EACH_ENCODING
@settings(max_examples=50 * DEEP)
@given(st.data(), LAYOUTS, *COLUMNS, st.integers(0, 300), SEEDS)
def test_column_equals_pyarrow(path, encoding, data, layout, nesting, nulls, shape, n_rows, seed):
    leaf = data.draw(leaves_of(encoding))
    rows = write(path, {"x": column(leaf, nesting, nulls, shape, n_rows, seed)}, encoding, layout)
    check_column(path, "x", rows["x"])


@EACH_ENCODING
@settings(max_examples=2 * DEEP)
@given(st.data(), LAYOUTS, *COLUMNS, st.integers(10_000, 40_000), SEEDS)
def test_long_column_equals_pyarrow(path, encoding, data, layout, nesting, nulls, shape, n_rows, seed):
    leaf = data.draw(leaves_of(encoding))
    layout = {k: None if k.endswith(("size", "per_page")) else v for k, v in layout.items()}
    rows = write(path, {"x": column(leaf, nesting, nulls, shape, n_rows, seed)}, encoding, layout)
    check_column(path, "x", rows["x"])


@EACH_ENCODING
@settings(max_examples=40 * DEEP)
@given(st.data(), LAYOUTS, *COLUMNS, st.integers(1, 300), SEEDS)
def test_row_group_in_parts_equals_the_whole(path, encoding, data, layout, nesting, nulls, shape, n_rows, seed):
    """Rows that are read, masked or stepped over, however the cuts lie to the pages."""
    leaf = data.draw(leaves_of(encoding))
    rows = write(path, {"x": column(leaf, nesting, nulls, shape, n_rows, seed)}, encoding, layout)["x"]
    file, rng = File(path), np.random.default_rng(seed)
    rank, text = file.schema["x"].ragged_rank, file.schema["x"].dtype == "string"
    at = 0
    for g, n_left in enumerate(file.row_group_rows):
        group = file.open_row_group(g, [Field("x", null="empty")])
        while n_left:
            n = min(int(rng.integers(0, 40)), n_left)
            mask = [None, rng.random(n) < 0.5, np.zeros(n, np.bool_)][rng.integers(3)]
            if rng.random() < 0.3:
                group.skip(n)
            else:
                want = [emptied(v, rank, text) for v in rows[at : at + n]]
                same(read(group, n, mask)["x"], want if mask is None else list(itertools.compress(want, mask)))
            at, n_left = at + n, n_left - n


@settings(max_examples=40 * DEEP)
@given(
    st.lists(st.tuples(st.sampled_from(list(PHYSICAL)), *COLUMNS), min_size=1, max_size=4),
    LAYOUTS,
    st.integers(1, 1500),
    st.sampled_from([7, 100, 1000]),
    st.sampled_from([None, 1, 50, 10_000]),
    SEEDS,
)
def test_batches_equal_pyarrow(path, kinds, layout, n_rows, batch, buffer, seed):
    """Batches that straddle pages and row groups, in order or shuffled; the column "row" numbers the rows."""
    columns = {f"c{i}": column(*kind, n_rows, seed + i) for i, kind in enumerate(kinds)}
    columns["row"] = pa.array(range(n_rows))
    rows = write(path, columns, "dictionary" if seed % 2 else "PLAIN", layout)
    dataset = Dataset.from_parquet(path, [*(Field(f"c{i}", null="empty") for i in range(len(kinds))), "row"])
    ranks = {name: (kind.ragged_rank, kind.dtype == "string") for name, kind in File(path).schema.items()}
    if buffer is not None:
        dataset = dataset.shuffle(seed=seed, buffer_rows=buffer)
    seen: list[int] = []
    for b in dataset.batch(batch):
        at = b["row"].tolist()
        assert len(at) == min(batch, n_rows - len(seen))
        for name in columns:
            want = [rows[name][i] for i in at]
            same(b[name], want if name == "row" else [emptied(v, *ranks[name]) for v in want])
        seen += at
    assert (seen if buffer is None else sorted(seen)) == list(range(n_rows))


@settings(max_examples=50 * DEEP)
@given(
    st.sampled_from([t for t in PHYSICAL if not pa.types.is_string_view(t)]),
    st.sampled_from(["none", "some", "all"]),
    LAYOUTS,
    st.integers(0, 200),
    SEEDS,
)
def test_members_of_structures_and_maps_equal_pyarrow(path, leaf, nulls, layout, n_rows, seed):
    rng = np.random.default_rng(seed)
    ends = np.concatenate([[0], np.cumsum(rng.integers(0, 4, n_rows))]).astype(np.int32)

    def inner(nesting: str, n: int) -> pa.Array:
        return column(leaf, nesting, nulls, "few", n, seed)

    def structure(n: int) -> pa.Array:
        mask = pa.array(rng.random(n) < (0.2 if nulls == "some" else 0))
        members = [inner("flat", n), inner("list", n), pa.array([b"text"] * n, pa.binary())]
        return pa.StructArray.from_arrays(members, ["a", "b", "c"], mask=mask)

    keys = pa.array([f"k{i % 5}" for i in range(ends[-1])], pa.string())
    table = {
        "s": structure(n_rows),
        "l": pa.ListArray.from_arrays(ends, structure(ends[-1])),
        "m": pa.MapArray.from_arrays(ends, keys, inner("flat", ends[-1])),
        "n": pa.StructArray.from_arrays([structure(n_rows)], ["s"]),
    }
    options = {k: v for k, v in layout.items() if v is not None}
    pq.write_table(pa.table(table), path, **options)
    members = ["s.a", "s.b", "s.c", "l.a", "l.b", "l.c", "m.key", "m.value", "n.s.a", "n.s.b", "n.s.c"]
    assert list(File(path).schema) == members
    for name in members:
        top, *rest = name.split(".")
        check_column(path, name, stored_rows(table[top], tuple(rest)))


# other writers


def by_polars(path: Any, table: pa.Table, codec: str, size: int, version: int) -> None:
    polars = pytest.importorskip("polars")
    codec = {"NONE": "uncompressed"}.get(codec, codec.lower())
    polars.from_arrow(table).write_parquet(path, compression=codec, row_group_size=size, data_page_size=64 * version)


def by_duckdb(path: Any, table: pa.Table, codec: str, size: int, version: int) -> None:
    duckdb = pytest.importorskip("duckdb")
    codec = {"NONE": "uncompressed", "LZ4": "lz4_raw"}.get(codec, codec.lower())
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("t", table)
        connection.sql(
            f"COPY t TO '{path}' (FORMAT parquet, CODEC '{codec}', ROW_GROUP_SIZE {size}, PARQUET_VERSION V{version})"
        )


def by_fastparquet(path: Any, table: pa.Table, codec: str, size: int, version: int) -> None:
    pandas, fastparquet = pytest.importorskip("pandas"), pytest.importorskip("fastparquet")
    names = {t: getattr(pandas, f"{'U' if str(t)[0] == 'u' else ''}Int{t.bit_width}Dtype") for t in INTS}
    frame = table.to_pandas(types_mapper=lambda t: names[t]() if t in names else None)
    codec = {"NONE": "UNCOMPRESSED", "LZ4": "LZ4_RAW"}.get(codec, codec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastparquet.writer, "DATAPAGE_VERSION", version)
        patch.setattr(fastparquet.writer, "MAX_PAGE_SIZE", 500)
        fastparquet.write(str(path), frame, compression=codec, row_group_offsets=size)


INTS = [t for t in PHYSICAL if pa.types.is_integer(t)]
NOT_BY = {
    by_polars: [pa.decimal256(18, 2)],
    by_duckdb: [pa.decimal256(18, 2), pa.float16(), pa.duration("us")],
    by_fastparquet: [t for t in PHYSICAL if pa.types.is_temporal(t) and t != pa.timestamp("ns")],
}


@pytest.mark.parametrize("writer", NOT_BY)
@settings(max_examples=60 * DEEP)
@given(st.data(), *COLUMNS, st.sampled_from(CODECS), st.sampled_from([1, 2]), st.integers(1, 4000), SEEDS)
def test_file_of_another_writer_equals_pyarrow(path, writer, data, nesting, nulls, shape, codec, version, n_rows, seed):
    leaf = data.draw(st.sampled_from([t for t in PHYSICAL if t not in NOT_BY[writer]]))
    nesting = "flat" if writer is by_fastparquet else nesting
    n_rows = n_rows if nesting == "flat" else n_rows // 10
    table = pa.table({"x": column(leaf, nesting, nulls, shape, n_rows, seed)})
    writer(path, table, codec, 2048 if writer is by_duckdb else 150, version)
    try:
        rows = stored_rows(pq.read_table(path)["x"])
    except OSError:
        # DuckDB packs differences of 32-bit integers in 33 bits, which pyarrow takes for damage
        assert writer is by_duckdb and pa.types.is_integer(leaf)
        with contextlib.suppress(errors.Corrupt):
            check_column(path, "x", stored_rows(table["x"]))
        return
    check_column(path, "x", rows)


@pytest.mark.slow
def test_matrix_with_many_more_examples():
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    done = subprocess.run(
        run,
        env={**os.environ, "HBKIT_DEEP": os.environ.get("HBKIT_DEEP", "4")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
