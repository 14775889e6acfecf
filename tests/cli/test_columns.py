"""Which columns `hbkit train` takes."""

import numpy as np
import pytest

from hbkit import Ragged
from hbkit.cli.columns import Columns, choose, sequences
from hbkit.errors import InvalidArgument, UnknownColumn
from hbkit.parquet import ColumnType

SCHEMA = {
    "y": ColumnType("int8"),
    "price": ColumnType("float64"),
    "boxed": ColumnType("float32", ragged_rank=1),
    "user": ColumnType("int32"),
    "big": ColumnType("uint64"),
    "city": ColumnType("string", nullable=True),
    "seen": ColumnType("int64", ragged_rank=1),
    "tags": ColumnType("string", ragged_rank=1),
    "time": ColumnType("int64", logical="timestamp[us]"),
    "deep": ColumnType("int64", ragged_rank=2),
}


def test_choose_infers_by_type():
    c = choose(SCHEMA, {"map": "maps cannot be read"}, "y")
    assert c.dense == ["price", "boxed"] and c.sparse == ["user", "big", "city", "seen", "tags"]
    assert set(c.left_out) == {"time", "deep", "map"}
    fields = {f.name: f for f in c.fields}
    assert fields["y"].null == "error" and fields["y"].ragged_rank == 0
    assert fields["boxed"].ragged_rank == 0 and fields["boxed"].default == 0.0
    assert fields["city"].hash_to == "int64" and fields["city"].default == ""
    assert fields["tags"].hash_to == "int64" and fields["tags"].ragged_rank == 1
    assert fields["user"].dtype == "int64" and fields["big"].dtype is None
    assert "seen:ragged" in c.describe()["sparse (5)"]


def test_choose_takes_several_labels():
    c = choose(SCHEMA, {}, ["y", "price"], [], ["user"])
    assert c.label == ["y", "price"] == c.labels and [f.name for f in c.fields] == ["y", "price", "user"]
    assert choose(SCHEMA, {}, ["y"]).label == "y"
    assert "y, price" in c.describe()["label"]
    with pytest.raises(InvalidArgument, match="twice"):
        choose(SCHEMA, {}, ["y", "y"])


def test_sequences_pair_past_keys_with_their_target():
    c = choose(SCHEMA, {}, "y", [], ["user", "city", "seen", "tags"])
    assert sequences(c, ["seen:user", "tags:city"]) == {"seen": "user", "tags": "city"}
    assert sequences(c, []) == {}
    for pair, says in [
        ("seen", "'' is no chosen column of one key"),
        ("seen:big", "'big' is no chosen"),
        ("user:seen", "'user' is no chosen column of lists"),
        ("seen:tags", "'tags' is no chosen column of one key"),
        ("seen:city", "another type.*column seen"),
    ]:
        with pytest.raises(InvalidArgument, match=says):
            sequences(c, [pair])


def test_choose_takes_what_is_named_and_nothing_else():
    c = choose(SCHEMA, {}, "y", ["user"], ["time", "seen:ragged"])
    assert c.dense == ["user"] and c.sparse == ["time", "seen"]
    assert set(c.left_out) == {"price", "boxed", "big", "city", "tags", "deep"}


@pytest.mark.parametrize(
    ("label", "dense", "sparse", "error", "words"),
    [
        ("nope", [], [], UnknownColumn, "there is no column 'nope'"),
        ("y", ["nope"], [], UnknownColumn, "columns are y, price"),
        ("y", [], ["map"], UnknownColumn, "maps cannot be read"),
        ("city", [], [], InvalidArgument, "label of type string"),
        ("y", ["city"], [], InvalidArgument, "name it in --sparse"),
        ("y", [], ["price"], InvalidArgument, "name it in --dense"),
        ("y", [], ["deep"], InvalidArgument, "has no keys"),
        ("y", [], ["user:ragged"], InvalidArgument, "holds no lists"),
        ("y", ["user"], ["user"], InvalidArgument, "named twice"),
        ("y", ["y"], [], InvalidArgument, "named twice"),
    ],
)
def test_choose_refuses_by_name(label, dense, sparse, error, words):
    with pytest.raises(error, match=words):
        choose(SCHEMA, {"map": "maps cannot be read"}, label, dense, sparse)


def test_columns_cut_lists_to_their_newest_keys():
    lists = [[1, 2, 3], [], [4], [5, 6]]
    values, splits = np.array([x for part in lists for x in part]), np.cumsum([0, *map(len, lists)])
    batch = {"seen": Ragged(values, splits), "user": np.arange(4)}
    for n in (1, 2, 3, 100):
        cut = Columns("y", [], ["user", "seen"], [], newest={"seen": n}).cut(batch)
        assert [x.tolist() for x in np.split(cut["seen"].values, cut["seen"].row_splits[0][1:-1])] == [
            x[-n:] for x in lists
        ]
        assert cut["user"] is batch["user"]
