"""Other readers of Parquet find the same rows."""

import glob
import json
import pathlib
import re

import numpy as np
import pytest

from hbkit.embedding import SGD, Adam, Table
from hbkit.snapshot import load, save

FILE = "tables/user/rows-00000.parquet"


@pytest.fixture(params=["int64", "uint64", "int32"])
def saved(request, tmp_path):
    t = Table("user", 3, optimizer=Adam(), key_dtype=request.param)
    keys = np.array([5, 1, 2**31 - 1, 5], request.param)
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(0).standard_normal((4, 3)))
    commit = save(tmp_path, [t], 1)
    (chunk,) = t.store.scan()
    return str(tmp_path / commit / FILE), chunk, request.param


def compare(columns, chunk, key_dtype):
    assert list(columns) == ["key", "freq", "last_step", "row", "state"]
    for name, column in columns.items():
        want = getattr(chunk, name)
        got = np.stack([np.asarray(v) for v in column]) if want.ndim == 2 else np.asarray(column)
        np.testing.assert_array_equal(got, want)
        assert want.ndim == 2 or got.dtype == (key_dtype if name == "key" else np.int64)
        assert want.ndim == 1 or got.dtype == np.float32


def test_pandas_reads_a_snapshot(saved):
    pandas = pytest.importorskip("pandas")
    path, chunk, key_dtype = saved
    frame = pandas.read_parquet(path)
    compare({name: frame[name].to_numpy() for name in frame}, chunk, key_dtype)


def test_duckdb_reads_a_snapshot(saved):
    duckdb = pytest.importorskip("duckdb")
    path, chunk, key_dtype = saved
    arrow = duckdb.connect().execute("SELECT * FROM read_parquet(?) ORDER BY key", [path]).fetchnumpy()
    compare({k: np.ma.getdata(v) for k, v in arrow.items()}, chunk, key_dtype)


def test_polars_reads_a_snapshot(saved):
    polars = pytest.importorskip("polars")
    path, chunk, key_dtype = saved
    frame = polars.read_parquet(path)
    assert frame.schema["row"] == polars.Array(polars.Float32, 3)
    compare({name: frame[name].to_numpy() for name in frame.columns}, chunk, key_dtype)


def test_state_column_is_left_out_without_state(tmp_path):
    pandas = pytest.importorskip("pandas")
    t = Table("user", 3, optimizer=SGD())
    t.lookup([1], train=True)
    frame = pandas.read_parquet(tmp_path / save(tmp_path, [t], 1) / FILE)
    assert list(frame) == ["key", "freq", "last_step", "row"]


def chain(path, commit, table):
    """Directories of the files that hold a table's rows as of a commit, oldest first: by the manifests alone."""
    found = []
    while commit is not None:
        manifest = json.loads((path / f"{commit}.json").read_text())["manifest"]
        found.insert(0, f"{path}/{manifest['directory']}/tables/{table}")
        commit = manifest["parent"] if manifest["tables"][table]["since"] is not None else None
    return found


@pytest.fixture
def deltas(tmp_path):
    """Directories of a chain of commits, and the rows as of the last one; beside it, a branch that must not count."""
    t = Table("user", 3, optimizer=Adam())

    def train(keys):
        t.lookup(keys, train=True)
        t.update(keys, np.random.default_rng(len(keys)).standard_normal((len(keys), 3)))

    train(np.arange(20))
    first = save(tmp_path, [t], 1)
    t.store.erase(np.arange(5, 9))
    train(np.array([0, 30, -4]))
    second = save(tmp_path, [t], 2, base="latest")
    train(np.array([6, 0]))  # 6 was erased, and comes back
    t.store.erase(np.array([1, 30]))
    train(np.arange(10, 12))
    third = save(tmp_path, [t], 3, base="latest")
    u = Table("user", 3, optimizer=Adam())
    load(tmp_path, [u], first)
    u.lookup([99, 100], train=True)
    save(tmp_path, [u], 4, base=first)
    (chunk,) = t.store.scan()
    directories = chain(tmp_path, third, "user")
    assert directories == [f"{tmp_path}/{commit}/tables/user" for commit in (first, second, third)]
    return directories, chunk


# As in docs/formats.md, which names the files of one chain.
SQL = """
SELECT * EXCLUDE (filename)
FROM read_parquet($files, union_by_name = true, filename = true)
QUALIFY row_number() OVER (PARTITION BY key ORDER BY filename DESC) = 1 AND row IS NOT NULL
ORDER BY key
"""


def test_duckdb_reads_a_chain_of_deltas(deltas):
    duckdb = pytest.importorskip("duckdb")
    directories, chunk = deltas
    files = [f"{directory}/[re]*.parquet" for directory in directories]
    found = duckdb.connect().execute(SQL, {"files": files}).fetchnumpy()
    compare({k: np.ma.getdata(v) for k, v in found.items()}, chunk, "int64")


def test_the_documented_query_is_the_one_that_is_tested():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    (query,) = (part.partition("```")[0] for part in text.split("```sql\n") if "QUALIFY" in part)
    assert re.sub(r"\[[^]]*c0.*?parquet'\]", "$files", query, flags=re.DOTALL).split() == SQL.split()


def test_polars_reads_a_chain_of_deltas(deltas):
    polars = pytest.importorskip("polars")
    directories, chunk = deltas
    files = sorted(file for directory in directories for file in glob.glob(f"{directory}/[re]*.parquet"))
    frame = (
        polars.concat([polars.scan_parquet(file) for file in files], how="diagonal")
        .unique("key", keep="last", maintain_order=True)
        .filter(polars.col("row").is_not_null())
        .sort("key")
        .collect()
    )
    compare({name: frame[name].to_numpy() for name in frame.columns}, chunk, "int64")


def test_pandas_reads_a_chain_of_deltas(deltas):
    pandas = pytest.importorskip("pandas")
    directories, chunk = deltas
    files = sorted(file for directory in directories for file in glob.glob(f"{directory}/[re]*.parquet"))
    frame = pandas.concat([pandas.read_parquet(file) for file in files]).drop_duplicates("key", keep="last")
    frame = frame[frame["row"].notna()].sort_values("key").astype({"freq": np.int64, "last_step": np.int64})
    compare({name: frame[name].to_numpy() for name in frame}, chunk, "int64")
