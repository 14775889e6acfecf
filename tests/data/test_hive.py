"""Columns out of paths, as pyarrow and Spark read them."""

from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit import errors
from hbkit.data import Dataset, Field
from hbkit.data.hive import partitioned, path_values
from hbkit.parquet import File


def write(folder, parts):
    """A file of three rows in each directory, ids counting through."""
    for k, part in enumerate(parts):
        (folder / part).mkdir(parents=True, exist_ok=True)
        table = pa.table({"id": [3 * k, 3 * k + 1, 3 * k + 2]})
        pq.write_table(table, folder / part / f"{k}.parquet", row_group_size=2)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("hive"), [f"day={d:02}/city={c}" for d in (1, 2, 10) for c in ("a b", "c%2Fd")]
    )


def rows(ds, *names):
    out = []
    for b in ds.batch(4):
        out += zip(*(b[name].tolist() for name in names), strict=True)
    return out


def test_hive_columns_equal_pyarrows(folder):
    want = pads.dataset(folder, partitioning="hive").to_table().sort_by("id")
    ds = Dataset.from_parquet(folder, hive=True)
    assert {name: kind.dtype for name, kind in ds.schema.items()} == {"id": "int64", "day": "int64", "city": "string"}
    got = rows(ds, "id", "day", "city")
    cities = [city.encode() for city in want["city"].to_pylist()]
    assert got == list(zip(want["id"].to_pylist(), want["day"].to_pylist(), cities, strict=True))
    assert set(got) == set(rows(Dataset.from_parquet(f"{folder}/*/*/*.parquet", hive=True), "id", "day", "city"))
    assert list(Dataset.from_parquet(folder).schema) == ["id"]
    assert ds.stats()["decoded_by"] == {"id": "native", "day": "path", "city": "path"}


@pytest.mark.parametrize(
    "expr, n_read",
    [
        (pc.field("day") == 2, 4),
        (pc.field("day") < 10, 8),
        (pc.field("city") == "a b", 6),
        (pc.field("city").isin(["a b", "x"]) & (pc.field("id") > 1), 5),
        ((pc.field("day") == 1) | (pc.field("id") == 17), 5),
        (pc.field("day").is_null(), 0),
        (~(pc.field("day") == 1) & (pc.field("city") != "c/d"), 4),
    ],
)
def test_hive_filter_prunes_files(folder, expr, n_read):
    ds = Dataset.from_parquet(folder, ["id"], hive=True).filter(expr).batch(100)
    want = pads.dataset(folder, partitioning="hive").to_table(filter=expr).sort_by("id")["id"].to_pylist()
    assert [i for b in ds for i in b["id"].tolist()] == want
    assert ds.stats()["n_row_groups_read"] == n_read
    assert ds.n_rows == len(want)


def test_hive_columns_take_fields_shards_and_shuffle(folder):
    fields = [Field("city", hash_to="int64"), Field("day", dtype="float32"), "id"]
    ds = Dataset.from_parquet(folder, fields, hive=True)
    whole = rows(ds, "id", "day", "city")
    assert len({city for *_, city in whole}) == 2
    assert ds.schema["day"].dtype == "float32"
    shuffled = ds.shuffle(1, 7)
    assert rows(shuffled, "id", "day", "city") != whole
    assert sorted(rows(shuffled, "id", "day", "city")) == whole
    dealt = [r for i in range(2) for r in rows(Dataset.from_parquet(folder, fields, (i, 2), hive=True), "id", "day")]
    assert sorted(dealt) == [r[:2] for r in whole]
    (batch,) = Dataset.from_parquet(folder, [Field("day", pad_to=2, ragged_rank=1)], hive=True).batch(99)
    assert batch["day"].shape == (18, 2)


def test_hive_reader_steps_through_a_row_group(folder):
    (file,) = partitioned([File(folder / "day=01/city=a b/0.parquet")])
    reader = file.open_row_group(0, [Field("city"), Field("id"), Field("day")])
    steps = [reader.read(1), reader.read(1)]
    assert [list(s) for s in steps] == [["city", "id", "day"]] * 2
    assert [s["id"].tolist() for s in steps] == [[0], [1]]
    assert [s["city"].tolist() for s in steps] == [[b"a b"]] * 2
    assert [len(c) for c in file.read_no_rows([Field("city"), Field("id")]).values()] == [0, 0]
    file.close()


@pytest.mark.parametrize(
    "parts, dtype, want",
    [
        (["k=1", "k=x"], "string", [b"1", b"x"]),
        (["k=-1", "k=007"], "int64", [-1, 7]),
        (["k=1", "k=9999999999999999999"], "string", [b"1", b"9999999999999999999"]),
        (["k=1", "k=__HIVE_DEFAULT_PARTITION__"], "int64", [1, -5]),
        (["k=1.5", "k="], "string", [b"", b"1.5"]),
        (["k=%C3%A9", "k=a=b"], "string", ["é".encode(), b"a=b"]),
        (["_k=1", "_k=2"], "int64", [1, 2]),
    ],
)
def test_hive_types_and_nulls(tmp_path, parts, dtype, want):
    write(tmp_path, parts)
    name = parts[0].partition("=")[0]
    field = Field(name, null="default", default=-5 if dtype == "int64" else "x")
    ds = Dataset.from_parquet(tmp_path, [field], hive=True)
    assert ds.schema[name].dtype == dtype
    assert sorted({v for (v,) in rows(ds, name)}) == sorted(want)
    if any("HIVE" in part for part in parts):
        with pytest.raises(errors.NullFound, match="column k"):
            list(Dataset.from_parquet(tmp_path, hive=True).batch(2))
        ds = Dataset.from_parquet(tmp_path, ["id"], hive=True).filter(pc.field("k").is_null())
        assert len(rows(ds, "id")) == 3


def test_hive_key_that_some_files_lack(tmp_path):
    write(tmp_path, ["k=1", "other"])
    with pytest.raises(errors.UnknownColumn, match=r"'k' is in .*k=1.* not in this file.*other"):
        Dataset.from_parquet(tmp_path, hive=True)
    ds = Dataset.from_parquet(tmp_path, ["id", Field("k", default=0)], hive=True)
    assert [k for _, k in rows(ds, "id", "k")] == [1, 1, 1, 0, 0, 0]


def test_hive_column_that_the_file_has_too(tmp_path):
    write(tmp_path, ["id=1"])
    with pytest.raises(errors.SchemaMismatch, match=r"both in the file and in its path.*id=1.*column id"):
        Dataset.from_parquet(tmp_path, hive=True)


def test_hive_reads_orc(tmp_path):
    (tmp_path / "k=3").mkdir()
    orc.write_table(pa.table({"id": [1, 2]}), tmp_path / "k=3" / "a.orc")
    ds = Dataset.from_orc(tmp_path, hive=True)
    assert rows(ds, "id", "k") == [(1, 3), (2, 3)]
    assert ds.stats()["decoded_by"]["id"] == "pyarrow (ORC)"


def test_hive_path_of_a_uri():
    uri = "s3://bucket/day=1/key=a%20b/x=1.parquet?endpoint_override=http://host/no=1/"
    assert path_values(uri) == {"day": "1", "key": "a b"}
    assert path_values("k=1/k=2/=3/x.parquet") == {"k": "2"}


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_hive_values_survive_the_path(text):
    assert path_values(f"root/key={quote(text, safe='')}/f.parquet") == {"key": text}


def test_hive_filter_reads_one_file_of_many(tmp_path):
    write(tmp_path, [f"k={k}" for k in range(60)])
    ds = Dataset.from_parquet(tmp_path, hive=True).filter(pc.field("k") == 41).batch(10)
    np.testing.assert_array_equal(next(iter(ds))["id"], [123, 124, 125])
    assert ds.stats()["n_row_groups_read"] == 2
