"""Workers take a shard's batches in turn; datasets travel to other processes; HybridBackend's calls do as it says."""

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbkit import errors
from hbkit.data import Dataset, Field, write_deduplicated

N = 103


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """103 rows in two files and 14 row groups."""
    folder = tmp_path_factory.mktemp("data")
    ids = np.arange(N)
    table = pa.table({"id": ids, "x": ids % 7, "list": [list(range(i % 4)) for i in ids]})
    for k, (first, n) in enumerate([(0, 50), (50, 53)]):
        pq.write_table(table.slice(first, n), folder / f"{k}.parquet", row_group_size=8)
    return folder


def taken(iterators):
    """What several iterators give, each in its turn while it lasts, as a `DataLoader` takes it from its workers."""
    waiting = list(iterators)
    while waiting:
        for iterator in list(waiting):
            if (batch := next(iterator, None)) is None:
                waiting.remove(iterator)
            else:
                yield batch


def seen(batches):
    return [(b["id"].tolist(), b.n_rows, b.cursor) for b in batches]


chains = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "remainder": st.sampled_from(["keep", "drop", "pad"]),
        "filtered": st.booleans(),
        "shuffled": st.booleans(),
        "passes": st.integers(1, 3),
    }
)


def chain(folder, how, shard):
    ds = Dataset.from_parquet(folder, shard=shard).batch(how["n"], how["remainder"]).repeat(how["passes"])
    ds = ds.filter(pc.field("x") < 4) if how["filtered"] else ds
    return ds.shuffle(5, 30) if how["shuffled"] else ds


@settings(max_examples=40)
@given(chains, st.sampled_from([(0, 1), (0, 2), (2, 3)]), st.integers(1, 4), st.integers(0, 20))
def test_workers_in_turn_give_what_one_gives(folder, how, shard, w, at):
    """Also from any batch on where they resume."""
    ds = chain(folder, how, shard)
    want = seen(ds.batches())
    if at:
        cursors = [cursor for _, _, cursor in want[:at]]
        want = want[at:]
        if cursors:
            ds.load_state_dict(cursors[-1])
    copies = [pickle.loads(pickle.dumps(ds)) for _ in range(w)]
    assert seen(taken([copy.batches((k, w)) for k, copy in enumerate(copies)])) == want


def test_workers_of_an_endless_dataset_go_on(folder):
    ds = Dataset.from_parquet(folder).batch(40).shuffle(1, 20).repeat()
    one = ds.batches()
    three = taken([ds.batches((k, 3)) for k in range(3)])
    assert [next(one).cursor for _ in range(20)] == [next(three).cursor for _ in range(20)]


def test_worker_threads_give_each_row_once(folder):
    ds = Dataset.from_parquet(folder, num_parallel_reads=2).batch(5).shuffle(2, 50)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda k: [i for b in ds.batches((k, 4)) for i in b["id"].tolist()], range(4)))
    assert sorted(itertools.chain(*parts)) == list(range(N)) and all(parts)


@pytest.mark.parametrize("worker", [(2, 2), (-1, 2), (0, 0)])
def test_worker_that_does_not_exist_is_refused(folder, worker):
    with pytest.raises(errors.InvalidArgument, match="worker is"):
        Dataset.from_parquet(folder).batch(5).batches(worker)


def double(columns):
    return {**columns, "x": columns["x"] * 2}


def test_pickled_dataset_is_the_same(folder):
    ds = Dataset.from_parquet(folder, fields=["ID", Field("x"), "list"], ignore_case=True)
    ds = ds.filter(pc.field("x") < 5).shuffle(1, 30).batch(9).map(double).select(["x", "ID"]).prefetch(1)
    next(batches := ds.batches())
    batches.close()
    ds.load_state_dict(ds.state_dict())
    copy = pickle.loads(pickle.dumps(ds))
    assert (copy.state_dict(), copy.schema, repr(copy)) == (ds.state_dict(), ds.schema, repr(ds))
    for ours, theirs in zip(ds, copy, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ("x", "ID"))
    assert copy.stats()["n_rows"] == ds.stats()["n_rows"] - 9


def test_pickled_dataset_of_other_files_is_the_same(folder, tmp_path):
    orc.write_table(pa.table({"id": range(9)}), tmp_path / "a.orc")
    (tmp_path / "day=3").mkdir()
    pq.write_table(pa.table({"id": range(9)}), tmp_path / "day=3" / "a.parquet")
    blocks = pa.table({"id": range(9), "user": [1, 1, 1, 2, 2, 2, 3, 3, 3]})
    write_deduplicated(tmp_path / "b.parquet", blocks, {"index": ["user"]}, block_rows=3)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for ds in (
        Dataset.from_orc(tmp_path / "a.orc"),
        Dataset.from_parquet(tmp_path / "day=3", hive=True),
        Dataset.from_parquet(tmp_path / "b.parquet"),
        Dataset.from_parquet([tmp_path / "bad.parquet", tmp_path / "day=3"], on_error="skip"),
    ):
        copy = pickle.loads(pickle.dumps(ds.batch(4)))
        assert copy.schema == ds.schema and [b.cursor for b in copy] == [b.cursor for b in ds.batch(4)]
        assert copy.stats()["n_files_skipped"] == ds.stats()["n_files_skipped"]
        assert copy.stats()["skipped"] == ds.stats()["skipped"]


def test_pickled_dataset_of_a_service_is_the_same(folder, tmp_path):
    ds = Dataset.from_parquet((folder / "0.parquet").as_uri()).batch(20)
    assert seen(pickle.loads(pickle.dumps(ds))) == seen(ds)


# ------------------------------------------------------------------------------- HybridBackend's calls


def ids(batches):
    return [i for b in batches for i in b["id"].tolist()]


def test_shuffle_batch_is_shuffle_and_batch(folder):
    ds = Dataset.from_parquet(folder)
    assert ids(ds.shuffle_batch(10, buffer_size=40, seed=3)) == ids(ds.shuffle(3, 40).batch(10))
    assert ids(ds.shuffle_batch(10)) == ids(ds.shuffle(0, 10).batch(10))
    assert len(ids(ds.shuffle_batch(10, True))) == len(ids(ds.batch(10, drop_remainder=True))) == 100


def test_shuffle_batch_reshuffles_each_iteration_only_where_asked(folder):
    """HybridBackend has ``reshuffle_each_iteration or True``: it cannot be switched off."""
    ds = Dataset.from_parquet(folder)
    again = ds.shuffle_batch(10, buffer_size=40, seed=3)
    orders = [ids(again) for _ in range(3)]
    assert orders == [ids(ds.shuffle(3, 40).batch(10).set_epoch(e)) for e in range(3)] and orders[0] != orders[1]
    fixed = ds.shuffle_batch(10, buffer_size=40, seed=3, reshuffle_each_iteration=False)
    assert [ids(fixed) for _ in range(3)] == [orders[0]] * 3
    assert ids(fixed.repeat(2)) == orders[0] * 2 == ids(fixed.set_epoch(4)) * 2


def test_shuffle_batch_resumes_and_goes_on_with_the_next_epoch(folder):
    ds = Dataset.from_parquet(folder).shuffle_batch(10, buffer_size=40)
    orders = [ids(ds) for _ in range(3)]
    fresh = Dataset.from_parquet(folder).shuffle_batch(10, buffer_size=40)
    ids(fresh)
    batches = iter(fresh)
    cursor = [next(batches).cursor for _ in range(4)][-1]
    resumed = Dataset.from_parquet(folder).shuffle_batch(10, buffer_size=40).load_state_dict(cursor)
    assert ids(resumed) == orders[1][40:] and ids(resumed) == orders[2]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_shards_without_a_seed_agree_and_lose_no_row_group(tmp_path, m):
    """HybridBackend drops up to (row groups mod shards) row groups: of 10 in 4 parts it reads 8."""
    pq.write_table(pa.table({"id": range(100)}), tmp_path / "a.parquet", row_group_size=10)
    shards = [Dataset.from_parquet(tmp_path, shard=(i, m)).shuffle_batch(7, buffer_size=50) for i in range(m)]
    assert sorted(itertools.chain(*map(ids, shards))) == list(range(100))


def test_defaults_suit_a_smaller_last_batch(tmp_path):
    """HybridBackend's ``populate_defaults`` makes as many values as a full batch has."""
    pq.write_table(pa.table({"id": range(5), "v": [1] * 5}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": range(5, 8)}), tmp_path / "b.parquet")
    batches = list(Dataset.from_parquet(tmp_path, fields=["id", Field("v", default=9)]).batch(5))
    assert [b["v"].tolist() for b in batches] == [[1] * 5, [9] * 3]


def test_schema_has_uint32_and_passes_over_columns_that_cannot_be_read(tmp_path):
    """HybridBackend forgets uint32, and one column that it cannot read spoils the file."""
    columns = {"id": pa.array([1], pa.uint32()), "odd": pa.array([1], pa.decimal256(60))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    ds = Dataset.from_parquet(tmp_path)
    assert ds.schema["id"].dtype == "uint32" and "odd" not in ds.schema and "odd" in str(ds.stats()["unsupported"])
    assert [b["id"].tolist() for b in ds.batch(1)] == [[1]]
