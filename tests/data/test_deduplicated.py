"""Samples written in blocks with shared values stored once, and read back as samples."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hbkit.data.deduplicated as module
from hbkit import Ragged, Strings, errors
from hbkit.data import Dataset, Field, write_deduplicated
from hbkit.data.deduplicated import Deduplicated
from hbkit.parquet import File, read_columns
from hbkit.parquet.decoded import read as read_rows

USER = {"user_index": ["user", "name", "history", "nested"]}


def samples(n, seed=0, n_users=9):
    """Samples of a few users in runs, and items of their own."""
    rng = np.random.default_rng(seed)
    user = np.repeat(rng.integers(0, n_users, n), rng.integers(1, 7, n))[:n]
    return {
        "id": np.arange(n),
        "user": user,
        "name": Strings.from_list([f"user {u}" * (u % 3) for u in user]),
        "history": Ragged.from_lists([list(range(u)) for u in user], np.int64),
        "nested": Ragged.from_lists([[[f"{u}"] * k for k in range(u % 4)] for u in user] or [[[""]]][:0]),
        "ad": Ragged.from_lists([[0.5] * (i % 3) for i in range(n)], np.float32),
        "shop": rng.integers(0, 3, n),
        "place": Strings.from_list([f"p{i}" for i in rng.integers(0, 3, n)]),
    }


def values(column):
    return column.tolist()


def read(path, fields=None, **how):
    columns = {}
    for batch in Dataset.from_parquet(path, fields, **how).batch(7):
        for name, column in batch.items():
            columns.setdefault(name, []).extend(values(column))
    return columns


def as_lists(columns):
    return {name: values(column) for name, column in columns.items()}


small = st.integers(0, 2)
pairs = st.lists(
    st.tuples(
        st.lists(small, max_size=2),
        st.sampled_from(["", "a", "ab"]),
        st.sampled_from([0.0, -0.0, 1.5]),
        st.none() | small,
        st.lists(st.none() | st.lists(small, max_size=2), max_size=2),
        st.integers(0, 1000),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(pairs, st.integers(1, 9), st.integers(1, 20), st.sampled_from([["l"], ["s", "f"], ["n", "ll"], list("lsfn")]))
def test_deduplicated_round_trip(tmp_path_factory, rows, block_rows, group_rows, names):
    path = tmp_path_factory.getbasetemp() / "round.parquet"
    columns = [list(c) for c in zip(*rows, strict=True)] or [[]] * 6
    kinds = [pa.list_(pa.int64()), pa.string(), pa.float64(), pa.int16(), pa.list_(pa.list_(pa.int8())), pa.int64()]
    arrays = [pa.array(c, kind) for c, kind in zip(columns, kinds, strict=True)]
    table = pa.table(dict(zip(["l", "s", "f", "n", "ll", "id"], arrays, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROW_GROUP_ROWS", group_rows)
        other = [n for n in ("s", "ll") if n not in names]
        write_deduplicated(path, table, {"i": names, "j": other}, block_rows)
    file = File(path)
    file = Deduplicated(file, {"i": names, "j": other})
    parts = [file.read_arrow(g, table.schema.names) for g in range(len(file.row_group_rows))]
    got = pa.concat_tables([table.slice(0, 0), *parts])
    assert got.to_pydict() == table.to_pydict()
    assert np.array_equal(np.signbit(got["f"].to_numpy()), np.signbit(table["f"].to_numpy()))
    assert file.n_rows == len(rows)
    assert all(n <= max(group_rows, block_rows) for n in file.row_group_rows)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """500 samples in blocks of 16 and row groups of 64."""
    path = tmp_path_factory.mktemp("deduplicated") / "samples.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROW_GROUP_ROWS", 64)
        write_deduplicated(path, samples(500), {**USER, "shop_index": ["shop", "place"]}, 16)
    return path


def test_deduplicated_file_is_read_as_samples(path):
    ds = Dataset.from_parquet(path)
    assert ds.n_rows == 500
    assert sorted(ds.schema) == sorted(samples(1))
    assert (ds.schema["user"].ragged_rank, ds.schema["nested"].ragged_rank) == (0, 2)
    assert read(path) == as_lists(samples(500))
    assert read(path, ["user", "id"], deduplicated={"user_index": ["user"]}).keys() == {"user", "id"}


@settings(max_examples=25)
@given(
    st.none() | st.tuples(st.integers(0, 99), st.integers(1, 200)),
    st.sampled_from([None, pc.field("id") >= 300, pc.field("user") == 3, pc.field("place") < "p1"]),
    st.integers(20, 300),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_deduplicated_shuffles_filters_shards_and_resumes(path, shuffle, expr, n, m, n_reads):
    def make(i, m):
        ds = Dataset.from_parquet(path, shard=(i, m), num_parallel_reads=n_reads)
        ds = ds if expr is None else ds.filter(expr)
        return (ds.shuffle(*shuffle) if shuffle else ds).batch(n)

    whole = list(make(0, 1))
    all_of = samples(500)
    plain = pa.table({name: np.asarray(c.tolist()) for name, c in all_of.items() if name in ("id", "user", "place")})
    plain = plain.set_column(2, "place", plain["place"].cast(pa.string()))
    want = (plain if expr is None else plain.filter(expr))["id"].to_pylist()
    assert sorted(i for b in whole for i in b["id"].tolist()) == want
    for b in whole:
        for name, column in b.items():
            assert values(column) == values(take(all_of[name], b["id"]))
    for i in range(m):
        assert [b["id"].tolist() for b in make(i, m)] == [b["id"].tolist() for b in whole[i::m]]
    if whole:
        rest = list(make(0, 1).load_state_dict(whole[len(whole) // 2].cursor))
        assert [b["id"].tolist() for b in rest] == [b["id"].tolist() for b in whole[len(whole) // 2 + 1 :]]


def take(column, rows):
    return column[rows] if isinstance(column, np.ndarray) else column.take(rows)


def test_deduplicated_steps_through_a_row_group(path):
    file = Deduplicated(File(path), {**USER, "shop_index": ["shop", "place"]})
    fields = [Field("user"), Field("ad"), Field("gone", default=7), Field("name", hash_to="int64")]
    whole = file.read_row_group(1, fields)
    reader = file.open_row_group(1, fields)
    steps = [read_rows(reader, n) for n in (1, 0, 40, 100)]
    assert [len(s["user"]) for s in steps] == [1, 0, 40, 23]
    for name in whole:
        assert [v for s in steps for v in values(s[name])] == values(whole[name])
    mask = np.arange(64) % 5 == 0
    some = file.read_row_group(1, fields, mask)
    assert all(values(some[name]) == values(take(whole[name], mask)) for name in whole)
    assert all(len(c) == 0 for c in file.read_no_rows(fields).values())
    file.close()


def test_deduplicated_takes_fields(path):
    fields = [
        Field("history", pad_to=3),
        Field("name", hash_to="int64"),
        Field("user", dtype="float32"),
        Field("shop", ragged_rank=1),
    ]
    got, all_of = read(path, fields), samples(500)
    assert got["history"] == all_of["history"].to_padded(3).tolist()
    assert got["user"] == all_of["user"].tolist()
    assert got["shop"] == [[s] for s in all_of["shop"].tolist()]
    assert len(set(got["name"])) == len(set(all_of["name"].tolist()))


def test_deduplicated_files_and_others_keep_their_order(tmp_path):
    table = pa.table({"id": range(30), "user": [i // 4 for i in range(30)]})
    names = [tmp_path / f"{k}.parquet" for k in range(3)]
    pq.write_table(table.slice(0, 10), names[0])
    write_deduplicated(names[1], table.slice(10, 10), {"i": ["user"]}, 4)
    pq.write_table(table.slice(20), names[2])
    assert read(names) == table.to_pydict()


def test_deduplicated_file_is_smaller(tmp_path):
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(400), 30)
    history = rng.integers(0, 1000, (400, 101))[user]
    table = {
        "user": user,
        "history": Ragged(history.reshape(-1), (np.arange(len(user) + 1) * 101,)),
        "item": rng.integers(0, 99, len(user)),
    }
    write_deduplicated(tmp_path / "small.parquet", table, {"i": ["user", "history"]})
    plain = pa.table({name: c.to_arrow() if isinstance(c, Ragged) else c for name, c in table.items()})
    pq.write_table(plain, tmp_path / "plain.parquet", compression="zstd")
    assert (tmp_path / "small.parquet").stat().st_size * 2 < (tmp_path / "plain.parquet").stat().st_size
    (batch,) = Dataset.from_parquet(tmp_path / "small.parquet").batch(len(user))
    assert batch["history"] == table["history"]
    assert (batch["item"] == table["item"]).all()


def test_write_deduplicated_takes_batches(tmp_path, path):
    whole = Dataset.from_parquet(path)
    layout = {"i": ["user", "history"]}
    write_deduplicated(tmp_path / "a.parquet", whole.batch(33, remainder="pad"), layout, 16)
    assert read(tmp_path / "a.parquet") == as_lists(samples(500))
    table = pa.table({"user": pa.array(["a", None, None], pa.dictionary(pa.int8(), pa.string()))})
    batches = [table, table.to_batches()[0], {"user": table["user"]}]
    write_deduplicated(tmp_path / "b.parquet", batches, {"i": "user"}, 2)
    file = Deduplicated(File(tmp_path / "b.parquet"), {"i": ["user"]})
    assert file.read_arrow(0, ["user"])["user"].to_pylist() == ["a", None, None] * 3
    assert read_columns(tmp_path / "b.parquet", ["i"])["i"].tolist() == [[0, 1], [0, 1], [0, 0], [0, 1], [0]]
    write_deduplicated(tmp_path / "c.parquet", {"x": np.zeros((3, 2)), "u": [1, 1, 2]}, {"i": ["x"]})
    assert read(tmp_path / "c.parquet") == {"x": [[0, 0]] * 3, "u": [1, 1, 2]}
    write_deduplicated(tmp_path / "d.parquet", {"u": np.zeros(0, np.int64)}, {"i": ["u"]})
    assert (Dataset.from_parquet(tmp_path / "d.parquet").n_rows, read(tmp_path / "d.parquet")) == (0, {})


def test_write_deduplicated_refuses(tmp_path):
    one = {"u": np.arange(3)}
    out = tmp_path / "x.parquet"
    for error, columns, layout, more in [
        (errors.InvalidArgument, one, {}, {}),
        (errors.InvalidArgument, one, {"i": ["u"], "j": ["u"]}, {}),
        (errors.InvalidArgument, one, {"u": ["u"]}, {}),
        (errors.InvalidArgument, {**one, "i": np.arange(3)}, {"i": ["u"]}, {}),
        (errors.InvalidArgument, one, {"i": ["u"]}, {"block_rows": 0}),
        (errors.InvalidArgument, {**one, "v": np.arange(2)}, {"i": ["u"]}, {}),
        (errors.InvalidArgument, [], {"i": ["u"]}, {}),
        (errors.InvalidArgument, 3, {"i": ["u"]}, {}),
        (errors.InvalidArgument, ["text"], {"i": ["u"]}, {}),
        (errors.UnknownColumn, one, {"i": ["v"]}, {}),
        (errors.SchemaMismatch, [one, {"u": np.zeros(3)}], {"i": ["u"]}, {}),
        (errors.Unsupported, {"u": pa.array([{"a": 1}])}, {"i": ["u"]}, {}),
    ]:
        with pytest.raises(error):
            write_deduplicated(out, columns, layout, **more)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(errors.InvalidArgument, match=r"\.parquet"):
        write_deduplicated(tmp_path / "x", one, {"i": ["u"]})


INDEX = pa.array([[0, 1, 0, 1], [], [0, 0, 1, 1]], pa.list_(pa.int64()))
FEATURE = pa.array([[[1], [2, 3]], [], [[4], [5]]], pa.list_(pa.list_(pa.int64())))
LABEL = pa.array([[0, 1, 1, 0], None, [1, 0, 0, 1]], pa.list_(pa.int8()))


def test_deduplicated_reads_files_without_metadata(tmp_path):
    # as HybridBackend stores them: an index for the samples' own columns too, which nobody has to name
    own = pa.array([[0, 1, 2, 3], [], [0, 1, 2, 3]])
    table = pa.table({"user": FEATURE, "user_index": INDEX, "label": LABEL, "own": own})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    orc.write_table(table, tmp_path / "x.orc")
    layout = {"user_index": ["user"], "own": ["label"]}
    for dataset in (
        Dataset.from_parquet(tmp_path, deduplicated=layout),
        Dataset.from_orc(tmp_path, deduplicated=layout),
    ):
        (batch,) = dataset.batch(20)
        assert as_lists(batch) == {
            "user": [[1], [2, 3], [1], [2, 3], [4], [4], [5], [5]],
            "label": [0, 1, 1, 0, 1, 0, 0, 1],
        }
    assert Deduplicated(File(tmp_path / "x.parquet"), layout).row_group_rows == [4, 4]
    assert len(read(tmp_path, ["user"])["user"]) == 3  # a file that says nothing is read as it is


@pytest.mark.parametrize(
    "index, label, problem",
    [
        ([[0, 1, 0, 2], [], [0, 0, 1, 1]], LABEL, "an index is none of a value.*column i"),
        ([[0, 1, 0, 1], [], [0, 0, -1, 1]], LABEL, "an index is none of a value"),
        ([[0, 1, 0, None], [], [0, 0, 1, 1]], LABEL, "an index is none of a value"),
        ([[0, 1, 0, 1], [0], [0, 0, 1]], LABEL, "an index is none of a value|one item a sample"),
        ([[0, 1, 0, 1], [], [0, 0, 1]], LABEL, "one item a sample.*column label"),
        (INDEX, [[0, 1, 1], [1], [1, 0, 0, 1]], "one item a sample.*column label"),
    ],
)
def test_deduplicated_hostile_index_raises(tmp_path, index, label, problem):
    index = pa.array(index, pa.list_(pa.int64()))
    pq.write_table(pa.table({"i": index, "user": FEATURE, "label": label}), tmp_path / "x.parquet")
    ds = Dataset.from_parquet(tmp_path, deduplicated={"i": ["user"]}).batch(3)
    with pytest.raises(errors.Corrupt, match=rf"({problem}).*") as caught:
        list(ds)
    assert caught.value.place["file"].endswith("x.parquet")
    assert caught.value.place["row_group"] == 0
    skipped = Dataset.from_parquet(tmp_path, deduplicated={"i": ["user"]}, on_error="skip").batch(3)
    assert list(skipped) == []
    assert skipped.stats()["n_row_groups_skipped"] == 1


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), min_size=3, max_size=3))
def test_deduplicated_any_index_reads_or_raises(tmp_path_factory, index):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    pq.write_table(pa.table({"i": pa.array(index, pa.list_(pa.int64())), "user": FEATURE}), path)
    try:
        got = read(path, deduplicated={"i": ["user"]}).get("user", [])
    except errors.Corrupt:
        assert any(not 0 <= x < len(v) for i, v in zip(index, FEATURE.to_pylist(), strict=True) for x in i)
    else:
        assert got == [v[x] for i, v in zip(index, FEATURE.to_pylist(), strict=True) for x in i]


@pytest.mark.parametrize(
    "said",
    [
        "no JSON",
        "[]",
        "[" * 100_000,
        json.dumps({"index": {"i": ["user"]}, "samples": [4]}),
        json.dumps({"index": {"i": ["user"]}, "samples": [4, -1, 4]}),
        json.dumps({"index": {"i": ["user"]}, "samples": [4, True, 4]}),
        json.dumps({"index": {"i": 3}, "samples": [4, 0, 4]}),
        json.dumps({"index": ["i"], "samples": [4, 0, 4]}),
        json.dumps({"index": {"i": ["user"]}, "samples": [4, 0, 2**62]}),
    ],
    ids=lambda said: said[:60],
)
def test_deduplicated_hostile_metadata_raises(tmp_path, said):
    table = pa.table({"i": INDEX, "user": FEATURE}).replace_schema_metadata({"hbkit.deduplicated": said})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    with pytest.raises(errors.Corrupt, match=r"metadata.*x\.parquet"):
        list(Dataset.from_parquet(tmp_path).batch(3))


def test_deduplicated_names_what_it_cannot_read(tmp_path):
    table = pa.table({"i": INDEX, "user": FEATURE, "block": [1, 2, 3], "s": [[{"a": 1}] * 4, [], [{"a": 1}] * 4]})
    pq.write_table(table, tmp_path / "x.parquet")
    ds = Dataset.from_parquet(tmp_path, deduplicated={"i": ["user"]})
    assert ds.stats()["unsupported"].keys() == {"block", "s"}
    with pytest.raises(errors.Unsupported, match="one item a sample"):
        Dataset.from_parquet(tmp_path, ["block"], deduplicated={"i": ["user"]})
    for layout, error in [
        ({"nothing": ["user"]}, errors.UnknownColumn),
        ({"user": ["i"]}, errors.SchemaMismatch),
        ({"block": ["user"]}, errors.SchemaMismatch),
        ({}, errors.InvalidArgument),
        (["i"], errors.InvalidArgument),
    ]:
        with pytest.raises(error):
            Dataset.from_parquet(tmp_path, deduplicated=layout)


def test_deduplicated_under_hive_directories(tmp_path):
    for day in 1, 2:
        (tmp_path / f"day={day}").mkdir()
        write_deduplicated(tmp_path / f"day={day}" / "x.parquet", {"user": [day, day, 5]}, {"i": ["user"]})
    got = read(tmp_path, hive=True)
    assert got == {"user": [1, 1, 5, 2, 2, 5], "day": [1, 1, 1, 2, 2, 2]}
    ds = Dataset.from_parquet(tmp_path, hive=True).filter((pc.field("day") == 2) & (pc.field("user") == 5)).batch(9)
    assert [as_lists(b) for b in ds] == [{"user": [5], "day": [2]}]
