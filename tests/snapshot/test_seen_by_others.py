"""Other readers of Parquet find the same rows."""

import numpy as np
import pytest

from hbkit.embedding import SGD, Adam, Table
from hbkit.snapshot import save

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
