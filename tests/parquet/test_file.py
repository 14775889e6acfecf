"""Columns of files that pyarrow writes, against what pyarrow reads back."""

import datetime
import decimal
import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import Ragged, Strings, errors
from hbkit.parquet import Field, File, read_columns

INTS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


def bounds(t):
    info = np.iinfo(t.to_pandas_dtype())
    return st.integers(int(info.min), int(info.max))


def floats(width):
    return st.floats(width=width, allow_nan=False)


EPOCH = datetime.date(1970, 1, 1)
# type: (values, what hbkit gives for one)
LEAVES = {
    pa.bool_(): (st.booleans(), bool),
    **{t: (bounds(t), int) for t in INTS},
    pa.float16(): (floats(16).map(np.float16), float),
    pa.float32(): (floats(32), float),
    pa.float64(): (floats(64), float),
    pa.date32(): (st.dates(), lambda v: (v - EPOCH).days),
    pa.time64("us"): (st.integers(0, 86_399_999_999), int),
    pa.timestamp("ms"): (st.integers(-(2**50), 2**50), int),
    pa.timestamp("ns", "UTC"): (st.integers(-(2**62), 2**62), int),
    pa.decimal128(18, 3): (st.decimals(-(10**14), 10**14, places=3), lambda v: int(v.scaleb(3))),
    pa.decimal128(5, 0): (st.decimals(-99999, 99999, places=0), int),
    pa.string(): (st.text(max_size=5), str.encode),
    pa.binary(): (st.binary(max_size=5), bytes),
    pa.large_string(): (st.text(max_size=5), str.encode),
    pa.binary(3): (st.binary(min_size=3, max_size=3), bytes),
    pa.dictionary(pa.int8(), pa.string()): (st.sampled_from(["", "a", "bc"]), str.encode),
}


@st.composite
def columns(draw):
    """An Arrow array of up to 30 rows, its rank, and what hbkit should give for one value."""
    leaf = draw(st.sampled_from(list(LEAVES)))
    values, meaning = LEAVES[leaf]
    nullable = draw(st.booleans())
    rank = 0 if pa.types.is_dictionary(leaf) else draw(st.integers(0, 3))
    t, rows = leaf, st.none() | values if nullable else values
    for _ in range(rank):
        kind = draw(st.sampled_from([pa.list_, pa.large_list, lambda v: pa.list_(v, 2)]))
        t = kind(pa.field("element", t, nullable=nullable))
        size = (2, 2) if pa.types.is_fixed_size_list(t) else (0, 3)
        rows = st.lists(rows, min_size=size[0], max_size=size[1])
        # pyarrow cannot read a null fixed-size list within a list back
        if nullable and not pa.types.is_fixed_size_list(t):
            rows = st.none() | rows
    return pa.array(draw(st.lists(rows, max_size=30)), t), rank, meaning


def n_nulls(value, rank):
    if value is None:
        return 1
    return sum(n_nulls(v, rank - 1) for v in value) if rank else 0


def expected(value, rank, meaning, default=None):
    """What a row becomes with null="default", or without a default, with null="empty"."""
    if rank == 0:
        return default if value is None else meaning(value)
    inner = [] if value is None else value
    return [expected(v, rank - 1, meaning, default) for v in inner if v is not None or default is not None or rank > 1]


def write(table, row_group_size=None, **options):
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=row_group_size, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("file") / "x.parquet"


def stored_values(array):
    """Python rows, with times as integers."""
    leaf, lists = array.type, []
    while pa.types.is_nested(leaf):
        lists.append(leaf)
        leaf = leaf.value_type
    if pa.types.is_time(leaf) or pa.types.is_timestamp(leaf):
        leaf = pa.int64()
        for _ in lists:
            leaf = pa.large_list(leaf)
        array = array.cast(leaf)
    return array.to_pylist()


@settings(max_examples=300)
@given(columns(), st.integers(1, 12), st.sampled_from(["none", "snappy", "zstd"]), st.sampled_from(["1.0", "2.0"]))
def test_column_round_trip(path, column, row_group_size, codec, page):
    array, rank, meaning = column
    table = pa.table({"x": array, "other": np.arange(len(array))})
    path.write_bytes(write(table, row_group_size, compression=codec, data_page_version=page))
    rows = stored_values(array)
    text = meaning in (bytes, str.encode)

    file = File(path)
    kind = file.schema["x"]
    assert (kind.ragged_rank, file.n_rows, kind.unsupported) == (rank, len(array), "")

    nulls = sum(n_nulls(v, rank) for v in rows)
    if nulls:
        with pytest.raises(errors.NullFound, match=r"x.parquet, column x, row group"):
            read_columns(path, ["x"])
    else:
        got = read_columns(path)
        assert got["x"].tolist() == [expected(v, rank, meaning) for v in rows]
        assert got["other"].tolist() == list(range(len(array)))
        assert isinstance(got["x"], Ragged if rank else Strings if text else np.ndarray)

    default = {"string": b"none", "bool": True}.get(kind.dtype, 7)
    got = read_columns(path, [Field("x", null="default", default=default)])["x"]
    assert got.tolist() == [expected(v, rank, meaning, default) for v in rows]

    got = read_columns(path, [Field("x", null="empty")])["x"]
    if rank:
        want = [expected(v, rank, meaning) for v in rows]
    elif text:
        want = [b"" if v is None else meaning(v) for v in rows]
    else:
        want = [[] if v is None else [meaning(v)] for v in rows]
    assert got.tolist() == want


@given(
    st.lists(st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=6), max_size=20),
    st.integers(1, 4),
    st.sampled_from(["head", "tail"]),
)
def test_pad_to_is_dense(path, rows, width, truncate):
    path.write_bytes(write(pa.table({"x": pa.array(rows, pa.list_(pa.int16()))}), 7))
    got = read_columns(path, [Field("x", null="empty", pad_to=width, truncate=truncate)])["x"]
    want = []
    for row in rows:
        kept = [v for v in row or [] if v is not None]
        kept = kept[:width] if truncate == "tail" else kept[-width:]
        want.append(kept + [0] * (width - len(kept)))
    assert got.shape == (len(rows), width)
    assert got.dtype == np.int16
    assert got.tolist() == want


NUMBERS = [t.to_pandas_dtype() for t in [*INTS, pa.float16(), pa.float32(), pa.float64(), pa.bool_()]]


@settings(max_examples=200)
@given(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.data())
def test_cast_is_exact_or_raises(path, have, to, data):
    have, to = np.dtype(have), np.dtype(to)
    values, _ = LEAVES[pa.from_numpy_dtype(have)]
    column = np.array(data.draw(st.lists(values, min_size=1, max_size=5)), have)
    path.write_bytes(write(pa.table({"x": column})))

    def fits(v):
        v = v.item()
        if to.kind == "f":  # rounding is no misfit, infinity out of nothing is
            with np.errstate(over="ignore"):
                return not (math.isfinite(v) and not np.isfinite(to.type(v)))
        if to.kind == "b":
            return v in (0, 1)
        return math.isfinite(v) and v == int(v) and np.iinfo(to).min <= v <= np.iinfo(to).max

    if all(fits(v) for v in column):
        got = read_columns(path, [Field("x", dtype=to)])["x"]
        assert got.dtype == to
        assert got.tolist() == column.astype(to).tolist()
    else:
        with pytest.raises(errors.SchemaMismatch, match="does not fit"):
            read_columns(path, [Field("x", dtype=to)])


def test_null_count_is_named(path):
    path.write_bytes(write(pa.table({"x": [1, None, 3, None, None, 6]}), 3))
    with pytest.raises(errors.NullFound, match=r"^1 of 3 rows.*column x, row group 0"):
        read_columns(path)
    with pytest.raises(errors.NullFound, match=r"^2 of 3 rows.*column x, row group 1"):
        read_columns(path, row_groups=[1])


def test_decimal_as_float_is_its_value(path):
    values = [decimal.Decimal("1.25"), decimal.Decimal("-0.50")]
    path.write_bytes(write(pa.table({"x": pa.array(values, pa.decimal128(6, 2))})))
    assert read_columns(path)["x"].tolist() == [125, -50]
    assert read_columns(path, [Field("x", dtype="float32")])["x"].tolist() == [1.25, -0.5]


def signed(h):
    return h - 2**64 if h >= 2**63 else h


@given(st.lists(st.text(max_size=40), max_size=20), st.integers(0, 2**64 - 1))
def test_hash_of_strings_is_xxh64(path, values, seed):
    table = pa.table(
        {
            "text": pa.array(values, pa.string()),
            "list": [[v, v] for v in values] or pa.array([], pa.list_(pa.string())),
            "dict": pa.array(values, pa.string()).dictionary_encode(),
        }
    )
    path.write_bytes(write(table, 6))
    got = read_columns(path, [Field(n, hash_to="int64", hash_seed=seed) for n in ("text", "list", "dict")])
    want = [signed(xxhash.xxh64_intdigest(v.encode(), seed)) for v in values]
    assert got["text"].tolist() == want
    assert got["list"].tolist() == [[h, h] for h in want]
    assert got["dict"].tolist() == want


@pytest.mark.parametrize("longest", [2, 8, 11, 31, 32, 70])
@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_hash_of_many_strings(tmp_path, longest, compression):
    rng = np.random.default_rng(longest)
    values = [rng.bytes(n) for n in rng.integers(0, longest + 1, 3001)]
    pq.write_table(pa.table({"s": values}), tmp_path / "x.parquet", use_dictionary=False, compression=compression)
    got = read_columns(tmp_path / "x.parquet", [Field("s", hash_to="int64", hash_seed=7)])
    assert got["s"].tolist() == [signed(xxhash.xxh64_intdigest(v, 7)) for v in values]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(0, 99))
def test_hash_of_integers_does_not_depend_on_their_width(path, values, seed):
    path.write_bytes(write(pa.table({t: pa.array(values, t) for t in ("int32", "int64", "uint32", "uint64")})))
    got = read_columns(
        path, [Field(t, hash_to="int64", hash_seed=seed) for t in ("int32", "int64", "uint32", "uint64")]
    )
    want = [signed(xxhash.xxh64_intdigest(v.to_bytes(8, "little"), seed)) for v in values]
    assert all(column.tolist() == want for column in got.values())


def test_hash_covers_nulls(path):
    path.write_bytes(write(pa.table({"s": ["a", None], "n": [5, None]})))

    def h(v):
        return signed(xxhash.xxh64_intdigest(v, 0))

    got = read_columns(path, [Field("s", hash_to="int64", null="empty"), Field("n", hash_to="int64", null="empty")])
    assert got["s"].tolist() == [h(b"a"), h(b"")]
    assert got["n"].tolist() == [[h((5).to_bytes(8, "little"))], []]
    fields = (
        Field("s", hash_to="int64", null="default", default="?"),
        Field("n", hash_to="int64", null="default", default=9),
    )
    got = read_columns(path, fields)
    assert got["s"].tolist() == [h(b"a"), h(b"?")]
    assert got["n"].tolist() == [h(v.to_bytes(8, "little")) for v in (5, 9)]


def test_list_of_one_as_plain_and_back(path):
    path.write_bytes(write(pa.table({"x": [[1.5], [], None, [2.5]], "y": [1, 2, 3, 4], "z": [[1, 2], [3], [4], [5]]})))
    got = read_columns(
        path, [Field("x", ragged_rank=0, null="default", default=-1, dtype="float32"), Field("y", ragged_rank=1)]
    )
    assert got["x"].tolist() == [1.5, -1, -1, 2.5]
    assert got["y"].tolist() == [[1], [2], [3], [4]]
    with pytest.raises(errors.NullFound, match="2 of 4"):
        read_columns(path, [Field("x", ragged_rank=0)])
    with pytest.raises(errors.SchemaMismatch, match="a row holds 2 values"):
        read_columns(path, [Field("z", ragged_rank=0)])
    with pytest.raises(errors.SchemaMismatch, match="ragged rank 1, asked for 3"):
        read_columns(path, [Field("z", ragged_rank=3)])


@pytest.mark.parametrize(
    "field, want",
    [
        (Field("new", default=3), [3, 3]),
        (Field("new", default=3, dtype="float32"), [3.0, 3.0]),
        (Field("new", default="ab"), [b"ab", b"ab"]),
        (Field("new", default="ab", hash_to="int64"), [signed(xxhash.xxh64_intdigest(b"ab", 0))] * 2),
        (Field("new", null="empty", ragged_rank=1, dtype="int64"), [[], []]),
        (Field("new", null="empty", ragged_rank=2, dtype="string"), [[], []]),
        (Field("new", null="empty", dtype="string"), [b"", b""]),
        (Field("new", null="empty", dtype="int32"), [[], []]),
        (Field("new", default=1, pad_to=3, dtype="int64"), [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_missing_column_takes_what_the_field_says(path, field, want):
    path.write_bytes(write(pa.table({"x": [1, 2]})))
    got = read_columns(path, [field, "x"])
    assert got["new"].tolist() == want
    assert got["x"].tolist() == [1, 2]


def test_missing_column_without_default_is_unknown(path):
    path.write_bytes(write(pa.table({"x": [1, 2]})))
    with pytest.raises(errors.UnknownColumn, match=r"'new'.*x.parquet"):
        read_columns(path, ["new"])


def test_unsupported_column_does_not_spoil_the_others(path):
    table = pa.table(
        {"s": [{"a": 1}], "x": [1], "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "n": [None]}
    )
    path.write_bytes(write(table))
    assert {n: c.tolist() for n, c in read_columns(path).items()} == {
        "s.a": [1],
        "x": [1],
        "m.key": [[b"k"]],
        "m.value": [[1]],
    }
    assert File(path).schema["n"].unsupported
    with pytest.raises(errors.Unsupported, match=r"structure.*x.parquet, column s\).*s\.a"):
        read_columns(path, ["x", "s"])
    with pytest.raises(errors.Unsupported, match=r"null.*x.parquet, column n"):
        read_columns(path, ["x", "n"])


def test_columns_of_one_name_are_unsupported(path):
    table = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "b", "a"])
    path.write_bytes(write(table))
    assert {n: c.tolist() for n, c in read_columns(path).items()} == {"b": [2]}
    with pytest.raises(errors.Unsupported, match="two columns"):
        read_columns(path, ["a"])


def test_names_with_dots_are_names(path):
    path.write_bytes(write(pa.table({"a.b": [1], "a": [{"b": 2}], "": [3]})))
    assert {n: c.tolist() for n, c in read_columns(path).items()} == {"a.b": [1], "": [3]}


@pytest.mark.parametrize(
    "table", [pa.table({}), pa.table({"x": pa.array([], pa.list_(pa.int64())), "s": pa.array([], "string")})]
)
def test_file_without_rows(path, table):
    path.write_bytes(write(table))
    got = read_columns(path)
    assert list(got) == table.column_names
    assert all(len(c) == 0 for c in got.values())
    if table.num_columns:
        assert got["x"].dtype == np.int64


def test_row_groups_and_mask(path):
    path.write_bytes(write(pa.table({"x": [1, None, 3, 4], "l": [[1], [2, 2], [], [4]]}), 2))
    assert read_columns(path, ["l"], row_groups=[1])["l"].tolist() == [[], [4]]
    got = File(path).read_row_group(0, [Field("x"), Field("l")], np.array([True, False]))
    assert got["x"].tolist() == [1]  # the null lies outside the mask
    assert got["l"].tolist() == [[1]]
    with pytest.raises(errors.InvalidArgument, match="row group 2 of 2"):
        File(path).read_row_group(2, [])


def test_columns_are_the_callers_to_change(path):
    path.write_bytes(write(pa.table({"x": [1, 2], "l": [[1], [2]], "s": ["a", "b"], "b": [True, False]})))
    got = read_columns(path)
    for array in (got["x"], got["l"].values, got["s"].data, got["b"]):
        array[:] = 0


def test_metadata_is_the_footers(path):
    path.write_bytes(write(pa.table({"x": [1]}).replace_schema_metadata({"key": "värde"})))
    assert File(path).metadata == {"key": "värde"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "complex64"},
        {"dtype": "nonsense"},
        {"null": "drop"},
        {"null": "default"},
        {"truncate": "middle"},
        {"pad_to": 0},
        {"hash_to": "int32"},
        {"hash_to": "int64", "dtype": "float32"},
        {"hash_seed": -1},
        {"ragged_rank": -1},
        {"default": [1]},
    ],
    ids=str,
)
def test_field_refuses_contradictions(arguments):
    with pytest.raises(errors.InvalidArgument, match="column x"):
        Field("x", **arguments)


@pytest.mark.parametrize(
    "field, error",
    [
        (Field("s", dtype="int64"), errors.SchemaMismatch),
        (Field("f", hash_to="int64"), errors.SchemaMismatch),
        (Field("f", pad_to=2), errors.SchemaMismatch),
        (Field("l", pad_to=2), errors.SchemaMismatch),
        (Field("f", null="empty", ragged_rank=0), errors.SchemaMismatch),
        (Field("n", null="default", default=300), errors.InvalidArgument),
        (Field("n", null="default", default="x"), errors.InvalidArgument),
        (Field("s", null="default", default=3), errors.InvalidArgument),
    ],
    ids=str,
)
def test_field_that_does_not_suit_the_column(path, field, error):
    table = pa.table({"s": ["a", None], "f": [0.5, 1.5], "l": [["a"], []], "n": pa.array([1, None], pa.uint8())})
    path.write_bytes(write(table))
    with pytest.raises(error, match=f"column {field.name}"):
        read_columns(path, [field])


def test_real_columns_equal_pyarrow(shared):
    path = shared("data/ml-1m/ratings.parquet")
    got, want = read_columns(path, ["user_id", "movie_id", "rating"]), pq.read_table(path)
    for name, column in got.items():
        np.testing.assert_array_equal(column, want[name].to_numpy())
    path = shared("data/criteo-80k/clicks.parquet")
    got, want = read_columns(path), pq.read_table(path)
    assert list(got) == want.column_names
    for name, column in got.items():
        assert column == Ragged.from_arrow(want[name].combine_chunks())


@pytest.mark.parametrize("field", [{"dtype": "int8"}, {"ragged_rank": 0, "null": "default", "default": 0}])
def test_misfit_names_its_row_group(path, field):
    rows = [[1], [2], [300, 4]] if "ragged_rank" in field else [1, 2, 300]
    path.write_bytes(write(pa.table({"x": rows}), row_group_size=1))
    with pytest.raises(errors.SchemaMismatch) as caught:
        read_columns(path, [Field("x", **field)])
    assert caught.value.place == {"file": str(path), "column": "x", "row_group": 2}


@pytest.mark.parametrize(
    "field",
    [
        Field("text"),
        Field("text", hash_to="int64", hash_seed=3),
        Field("items"),
        Field("tags", null="empty"),
        Field("tags", null="default", default="?"),
        Field("maybe", null="default", default=-1),
    ],
)
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_dictionary_decodes_to_the_column(path, field, use_dictionary):
    table = pa.table(
        {
            "text": [f"word {i % 7}" for i in range(3000)],
            "items": [[i % 5, i % 3][: i % 4] for i in range(3000)],
            "tags": [None if i % 11 == 0 else [None, f"tag {i % 3}"][: i % 3] for i in range(3000)],
            "maybe": [None if i % 5 == 0 else i % 9 for i in range(3000)],
        }
    )
    path.write_bytes(write(table, row_group_size=1000, use_dictionary=use_dictionary))
    got = read_columns(path, [field], dictionary=True)[field.name]
    assert got.codes.dtype == np.uint32
    assert got.decode().tolist() == read_columns(path, [field])[field.name].tolist()
    if use_dictionary:  # each of the three row groups brings its own
        assert len(got.dictionary) <= 3 * 10


def test_dictionary_of_a_cast_is_unsupported(path):
    path.write_bytes(write(pa.table({"x": [1, 2], "t": pa.array([1, 2], pa.timestamp("ns"))})))
    with pytest.raises(errors.Unsupported, match=r"dictionary.*x.parquet, column x\)"):
        read_columns(path, [Field("x", dtype="float32")], dictionary=True)


def test_members_of_structures_and_maps_are_columns(path):
    users = [{"age": 7, "tags": ["a", None]}, None, {"age": None, "tags": None}, {"age": 9, "tags": []}]
    bags = [[("k", 1), ("l", None)], [], None, [("m", 2)]]
    visits = [[{"day": 1, "at": 0.5}, None], None, [], [{"day": 2, "at": None}]]
    table = pa.table(
        {
            "user": pa.array(users, pa.struct({"age": pa.int32(), "tags": pa.list_(pa.string())})),
            "bag": pa.array(bags, pa.map_(pa.string(), pa.int64())),
            "visits": pa.array(visits, pa.list_(pa.struct({"day": pa.int8(), "at": pa.float64()}))),
        }
    )
    path.write_bytes(write(table))
    file = File(path)
    assert list(file.schema) == ["user.age", "user.tags", "bag.key", "bag.value", "visits.day", "visits.at"]
    assert {file.decoded_by(name) for name in file.schema} == {"native"}
    got = read_columns(
        path,
        [
            Field("user.age", null="default", default=-1),
            Field("user.tags", null="default", default="?"),
            Field("bag.key", null="empty"),
            Field("bag.value", null="default", default=-1),
            Field("visits.day", null="default", default=-1),
            Field("visits.at", null="empty"),
        ],
    )
    assert {name: column.tolist() for name, column in got.items()} == {
        "user.age": [7, -1, -1, 9],
        "user.tags": [[b"a", b"?"], [], [], []],
        "bag.key": [[b"k", b"l"], [], [], [b"m"]],
        "bag.value": [[1, -1], [], [], [2]],
        "visits.day": [[1, -1], [], [], [2]],
        "visits.at": [[0.5], [], [], []],
    }
