"""Rows from elsewhere become a table's, and a table's rows go elsewhere, bit for bit."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.embedding import SGD, Adam, Table
from hbkit.parquet import Field, read_columns
from hbkit.snapshot import (
    export_arrow,
    export_dense,
    export_npy,
    export_parquet,
    import_arrays,
    import_parquet,
    load,
    save,
    saved,
)

FLOAT32 = pa.float32()
RNG = np.random.default_rng(0)
KEYS = {
    "int64": np.array([7, -(2**63), 2**63 - 1, 0, -5]),
    "uint64": np.array([7, 2**64 - 1, 2**63, 0, 5], np.uint64),
    "int32": np.array([7, -(2**31), 2**31 - 1, 0, -5], np.int32),
}


def lines(table):
    chunks = list(table.store.scan())
    return [np.concatenate(column) for column in zip(*chunks, strict=True)]


def trained(name="t", dim=3, key_dtype="int64", n=5, **kwargs):
    t = Table(name, dim, key_dtype=key_dtype, **{"optimizer": Adam(), **kwargs})
    for keys in (KEYS[key_dtype][:n], KEYS[key_dtype][:2]):
        t.lookup(keys, train=True)
        t.update(keys, RNG.standard_normal((len(keys), dim)))
    return t


def write(path, keys, vectors, kind=FLOAT32, size=None, **kwargs):
    key = keys if isinstance(keys, pa.Array) else pa.array(keys)
    vector = pa.array(vectors, pa.list_(kind, size) if size else pa.list_(kind))
    pq.write_table(pa.table({"item": key, "vec": vector}), path, **kwargs)
    return path


@pytest.mark.parametrize("key_dtype", KEYS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_import_arrays_puts_rows_with_initial_state(key_dtype, dtype):
    t, rows = Table("t", 3, key_dtype=key_dtype, optimizer=Adam()), RNG.standard_normal((5, 3)).astype(dtype)
    t.step = 4
    assert import_arrays(t, KEYS[key_dtype], rows) == 5
    np.testing.assert_array_equal(t.lookup(KEYS[key_dtype]), rows.astype(np.float32))
    _, freq, last_step, _, state = lines(t)
    assert freq.tolist() == [0] * 5 and last_step.tolist() == [4] * 5
    np.testing.assert_array_equal(state, np.tile(t.optimizer.initial_state(3), (5, 1)))
    t.store.validate()


def test_import_arrays_replaces_rows_and_keeps_others():
    t = trained()
    before = t.lookup(KEYS["int64"])
    import_arrays(t, [7, 1], np.ones((2, 3)))
    np.testing.assert_array_equal(t.lookup(KEYS["int64"]), np.concatenate([np.ones((1, 3)), before[1:]]))
    assert len(t) == 6


@settings(max_examples=15)
@given(n=st.integers(0, 50), size=st.integers(1, 60))
def test_import_of_export_is_the_same_table(tmp_path_factory, n, size):
    path = tmp_path_factory.mktemp("npy")
    t, u = (Table("t", 3, optimizer=Adam()) for _ in range(2))
    for seed in range(3):
        keys = np.random.default_rng(seed).permutation(n)[: max(1, n // (seed + 1))]
        t.lookup(keys, train=True)
        t.update(keys, RNG.standard_normal((len(keys), 3)))
    assert export_npy(t, path) == len(t)
    columns = {p.stem: np.load(p, mmap_mode="r") for p in path.iterdir()}
    assert set(columns) == {"key", "freq", "last_step", "row", "state"}
    for first in range(0, len(t), size):  # batch by batch, as a reader of OneEmbedding gives them
        part = {name: column[first : first + size] for name, column in columns.items()}
        import_arrays(u, part["key"], part["row"], part["state"], part["freq"], part["last_step"])
    for have, want in zip(lines(u), lines(t), strict=True) if n else ():
        np.testing.assert_array_equal(have, want)


def test_import_arrays_of_a_dense_weight_counts_the_keys():
    weight = RNG.standard_normal((6, 4)).astype(np.float32)
    t = Table("t", 4)
    assert import_arrays(t, None, weight) == 6
    np.testing.assert_array_equal(t.lookup(np.arange(6)), weight)
    np.testing.assert_array_equal(export_dense(t)[0], weight)


def test_import_arrays_takes_what_becomes_an_array():
    class Variable:  # as tf.Variable and keras.Variable do
        def __init__(self, value):
            self.value = np.asarray(value)

        def __array__(self, dtype=None, copy=None):
            return self.value

    class OnDevice:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    t = Table("t", 2, optimizer=SGD(momentum=0.9))
    import_arrays(t, Variable([3, 4]), Variable([[1.0, 2.0], [3.0, 4.0]]), Variable([[5.0, 6.0], [7.0, 8.0]]))
    assert lines(t)[3].tolist() == [[1, 2], [3, 4]] and lines(t)[4].tolist() == [[5, 6], [7, 8]]
    with pytest.raises(errors.InvalidArgument, match=r"cuda:0.*bring it to the CPU"):
        import_arrays(t, [1], OnDevice())


def test_import_leaves_the_padding_key_out(tmp_path):
    t = Table("t", 2, padding_key=0)
    assert import_arrays(t, None, np.ones((3, 2))) == 2
    assert import_parquet(t, write(tmp_path / "a.parquet", [0, 5], [[1, 1], [2, 2]]), "item", "vec") == 1
    assert t.lookup([0, 1, 5]).tolist() == [[0, 0], [1, 1], [2, 2]]
    t.store.validate()


ONE = np.ones((1, 3))


@pytest.mark.parametrize(
    ("keys", "rows", "kwargs", "error", "text"),
    [
        ([1, 2, 1], np.ones((3, 3)), {}, errors.InvalidArgument, "key 1 comes twice .table t"),
        ([1, 2], ONE, {}, errors.InvalidArgument, r"rows of shape \(1, 3\) for 2 keys"),
        ([1], np.ones((1, 4)), {}, errors.SchemaMismatch, "rows of 4 floats, the table has 3"),
        ([1], ONE, {"state": np.ones((1, 3))}, errors.SchemaMismatch, "state of 3 floats, the table has 6"),
        ([1], ONE, {"freq": [1, 2]}, errors.InvalidArgument, "freq is int64 of shape"),
        ([1.5], ONE, {}, errors.InvalidArgument, "keys are float64"),
        (["a"], ONE, {}, errors.InvalidArgument, "keys of dtype <U1"),
        ([1], np.ones((1, 3), int), {}, errors.InvalidArgument, "rows of dtype int64"),
        ([1], [[1, np.nan, 0]], {}, errors.InvalidArgument, "NaN or infinity in the line of key 1"),
        ([1], [[1, 1e300, 0]], {}, errors.InvalidArgument, "NaN or infinity in the line of key 1"),
    ],
)
def test_import_arrays_refuses_by_name(keys, rows, kwargs, error, text):
    t = trained()
    before = lines(t)
    with pytest.raises(error, match=text):
        import_arrays(t, keys, rows, **kwargs)
    for have, want in zip(lines(t), before, strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("key_dtype", KEYS)
def test_import_parquet_reads_keys_and_vectors(tmp_path, kind, size, key_dtype):
    keys, vectors = KEYS[key_dtype], RNG.standard_normal((5, 3)).astype(np.float16)
    for i, part in enumerate((slice(0, 2), slice(2, 5))):
        write(tmp_path / f"{i}.parquet", keys[part], list(vectors[part]), kind, size, row_group_size=2)
    for given_ in (tmp_path, [tmp_path / "0.parquet", str(tmp_path / "1.parquet")], str(tmp_path / "*.parquet")):
        t = Table("t", 3, key_dtype=key_dtype)
        t.step = 9
        assert import_parquet(t, given_, "item", "vec") == 5
        np.testing.assert_array_equal(t.lookup(keys), vectors.astype(np.float32))
        assert lines(t)[1].tolist() == [0] * 5 and lines(t)[2].tolist() == [9] * 5


def test_import_parquet_hashes_strings_as_a_dataset_does(tmp_path):
    path = write(tmp_path / "a.parquet", ["x", "y"], [[1, 2], [3, 4]])
    field = Field("item", hash_to="int64", hash_seed=3)
    t = Table("t", 2)
    import_parquet(t, path, field, "vec")
    keys = read_columns(path, [field])["item"]
    assert t.lookup(keys).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(errors.SchemaMismatch, match=r"keys are strings.*a\.parquet.*hash_to='int64'"):
        import_parquet(t, path, "item", "vec")


def test_import_parquet_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("hbkit.snapshot.interop.CHUNK_ROWS", 7)
    vectors = RNG.standard_normal((50, 2)).astype(np.float32)
    t = Table("t", 2)
    import_parquet(t, write(tmp_path / "a.parquet", np.arange(50), list(vectors), row_group_size=20), "item", "vec")
    np.testing.assert_array_equal(t.lookup(np.arange(50)), vectors)


def test_import_parquet_refuses_by_file_and_row_group(tmp_path):
    good = write(tmp_path / "a.parquet", [1, 2, 3], [[1, 2]] * 3, row_group_size=2)
    bad, place = tmp_path / "b.parquet", rf"{tmp_path}/b\.parquet.*row group 1"

    def refused(error, text, *args, key_dtype="int64", **kwargs):
        write(bad, *args, row_group_size=2, **kwargs)
        t = Table("t", 2, key_dtype=key_dtype)
        with pytest.raises(error, match=text) as e:
            import_parquet(t, [good, bad], "item", "vec")
        assert (e.value.place["file"], e.value.place["row_group"]) == (str(bad), 1)
        return t

    two = [[1, 2]] * 3
    again = r"key 2 comes twice, also in row group 0 of .*a\.parquet"
    assert len(refused(errors.InvalidArgument, again, [4, 5, 2], two)) == 0
    assert len(refused(errors.InvalidArgument, "key 6 comes twice, also there", [4, 5, 6, 6], two + two[:1])) == 0
    assert len(refused(errors.InvalidArgument, "does not fit int32", [4, 5, 2**31], two, key_dtype="int32")) == 0
    assert len(refused(errors.NullFound, place, [4, 5, None], two)) == 0
    refused(errors.NullFound, place, [4, 5, 6], [*two[:2], None])
    refused(errors.NullFound, place, [4, 5, 6], [*two[:2], [1, None]])
    refused(errors.SchemaMismatch, "vector of key 6 has 3 floats, the table has 2", [4, 5, 6], [*two[:2], [1, 2, 3]])
    refused(errors.InvalidArgument, "NaN or infinity in the line of key 6", [4, 5, 6], [*two[:2], [1, np.nan]])
    refused(errors.SchemaMismatch, "does not fit float32", [4, 5, 6], [*two[:2], [1, 1e300]], kind=pa.float64())


def test_import_parquet_names_what_is_not_there(tmp_path):
    path, t = write(tmp_path / "a.parquet", [1], [[1, 2]]), Table("t", 2)
    for key, vector in (("x", "vec"), ("item", "x")):
        with pytest.raises(errors.UnknownColumn, match=r"no column 'x'.*it has item, vec"):
            import_parquet(t, path, key, vector)
    with pytest.raises(errors.NotFound):
        import_parquet(t, tmp_path / "no.parquet", "item", "vec")
    with pytest.raises(errors.HbkitError):
        import_parquet(t, path, "item", "item")
    assert len(t) == 0


@pytest.mark.parametrize("key_dtype", KEYS)
@pytest.mark.parametrize("from_snapshot", [False, True])
def test_exports_hold_all_rows_in_key_order(tmp_path, key_dtype, from_snapshot, monkeypatch):
    monkeypatch.setattr("hbkit.store.host.CHUNK_ROWS", 2)
    t = trained(key_dtype=key_dtype, n=4)
    source = t
    if from_snapshot:
        save(tmp_path / "s", [t], 1)
        t.lookup(KEYS[key_dtype], train=True)
        t.store.erase(t.keys(KEYS[key_dtype][:1]))
        save(tmp_path / "s", [t], 2, base="latest")
        source = saved(tmp_path / "s")
    key, freq, last_step, row, state = lines(t)
    key = key.astype(key_dtype)

    arrow = export_arrow(source).read_all()
    assert export_parquet(source, tmp_path / "made" / "t.parquet") == len(key)
    assert arrow.equals(pq.read_table(tmp_path / "made" / "t.parquet"))
    assert arrow.column_names == ["key", "freq", "last_step", "row", "state"]
    for name, want in zip(arrow.column_names, (key, freq, last_step, row, state), strict=True):
        have = np.stack(arrow[name].to_pylist()) if want.ndim == 2 else arrow[name].to_numpy()
        np.testing.assert_array_equal(have, want)

    assert export_npy(source, tmp_path / "npy") == len(key)
    assert sorted(os.listdir(tmp_path / "npy")) == ["freq.npy", "key.npy", "last_step.npy", "row.npy", "state.npy"]
    for name, want in (("key", key), ("freq", freq), ("last_step", last_step), ("row", row), ("state", state)):
        have = np.load(tmp_path / "npy" / f"{name}.npy")
        np.testing.assert_array_equal(have, want)
        assert have.dtype == want.dtype

    weights, vocabulary = export_dense(source)
    np.testing.assert_array_equal(weights, row)
    np.testing.assert_array_equal(vocabulary, key)
    assert weights.dtype == np.float32 and vocabulary.dtype == key_dtype


def test_exports_of_no_rows_and_of_no_state(tmp_path):
    for t in (Table("t", 3, optimizer=SGD()), trained(optimizer=SGD())):
        n = len(t)
        assert export_arrow(t).read_all().column_names == ["key", "freq", "last_step", "row"]
        assert export_npy(t, tmp_path) == n and not (tmp_path / "state.npy").exists()
        assert np.load(tmp_path / "row.npy").shape == (n, 3)
        assert export_dense(t)[0].shape == (n, 3)
        assert export_parquet(t, tmp_path / "x.parquet") == n


def test_export_of_a_table_that_changes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hbkit.store.host.CHUNK_ROWS", 2)
    t = trained()
    scan = t.store.scan

    def erasing():
        for chunk in scan():
            yield chunk
            t.store.erase(t.keys(KEYS["int64"]))

    monkeypatch.setattr(t.store, "scan", erasing)
    with pytest.raises(errors.StorageError, match="there are 2 rows, there were 5"):
        export_npy(t, tmp_path / "npy")
    assert os.listdir(tmp_path / "npy") == []


def test_saved_names_what_is_not_there(tmp_path):
    with pytest.raises(errors.NotFound):
        saved(tmp_path)
    first = save(tmp_path, [trained("a"), trained("b")], 1)
    with pytest.raises(errors.UnknownColumn, match=r"no table named.*name one of a, b"):
        saved(tmp_path)
    with pytest.raises(errors.UnknownColumn, match=f"no table 'c' in commit {first}"):
        saved(tmp_path, "c")
    assert saved(tmp_path, "b", first).name == "b"


def test_deltas_have_imported_rows(tmp_path):
    """Rows that were put count as changed, whatever their stamps say."""
    t = trained()
    save(tmp_path, [t], 1)
    for n, value in enumerate((1.0, 2.0)):
        import_arrays(t, [7, 70], np.full((2, 3), value), freq=[2, 0], last_step=[1, 0])
        save(tmp_path, [t], 2 + n, base="latest")
        u = Table("t", 3, optimizer=Adam())
        load(tmp_path, [u])
        for have, want in zip(lines(u), lines(t), strict=True):
            np.testing.assert_array_equal(have, want)


def test_import_parquet_reads_uris(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = write(tmp_path / "a.parquet", [4, 5], [[1, 2], [3, 4]])
    fsspec.filesystem("memory").pipe("/vectors/a.parquet", path.read_bytes())
    for uri in (f"file://{path}", "memory://vectors/a.parquet", "memory://vectors"):
        t = Table("t", 2)
        assert import_parquet(t, uri, "item", "vec") == 2
        assert t.lookup([5, 4]).tolist() == [[3, 4], [1, 2]]
