"""Columns as tensors: the same values, the same memory, nothing that TensorFlow would abort on."""

import gc

import keras
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import hbkit.tensorflow as hb
from hbkit import Ragged, Strings, errors
from hbkit_tensorflow.data import array, from_column, tensor, to_column


def aligned(n, dtype, offset=0):
    memory = np.zeros(n * np.dtype(dtype).itemsize + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + n * np.dtype(dtype).itemsize].view(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("writeable", [True, False])
def test_tensor_shares_aligned_memory(dtype, writeable):
    column = aligned(100, dtype)
    column[:] = np.arange(100) % 2
    column.flags.writeable = writeable
    made = tensor(column)
    assert array(made).ctypes.data == column.ctypes.data
    assert made.dtype == dtype and made.numpy().tolist() == column.tolist()


def test_tensor_keeps_the_memory_alive():
    column = aligned(1 << 20, np.float32)
    column[:] = np.arange(1 << 20)
    made = tensor(column)
    del column
    np.zeros(1 << 20, np.float32)[:] = 1
    assert float(made[-1]) == (1 << 20) - 1


@pytest.mark.parametrize("offset", [4, 16, 32])
def test_tensor_copies_what_tensorflow_would_abort_on(offset):
    column = aligned(4096, np.float32, offset)
    column[:] = np.arange(4096)
    made = tensor(column)
    assert array(made).ctypes.data % 64 == 0
    assert float(tf.reduce_sum(tf.nn.relu(made) + made)) == 2 * 4095 * 2048  # relu asks for alignment


@pytest.mark.parametrize(
    "column",
    [
        np.zeros((0,), np.float32),
        np.zeros((0, 3), np.int64),
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.arange(4, dtype=">i4"),
    ],
)
def test_tensor_takes_any_array(column):
    made = tensor(column)
    assert made.shape == column.shape
    np.testing.assert_array_equal(made.numpy(), column)


@settings(max_examples=25)
@given(st.lists(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2), max_size=2), max_size=5))
def test_ragged_goes_there_and_back(lists):
    column = Ragged.from_lists(lists, np.int64) if lists else Ragged(np.zeros(0, np.int64), (np.zeros(1, np.int64),))
    made = from_column(column)
    assert made.to_list() == lists
    back = to_column(made)
    np.testing.assert_array_equal(back.values, column.values)
    assert all(np.array_equal(a, b) for a, b in zip(back.row_splits, column.row_splits, strict=True))


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=5), max_size=8))
def test_strings_become_a_string_tensor(strings):
    made = from_column(Strings.from_list(strings))
    assert made.dtype == tf.string and made.numpy().tolist() == strings


def test_ragged_strings_become_a_ragged_tensor_of_strings():
    column = Ragged(Strings.from_list([b"a", b"bc", b""]), (np.array([0, 2, 2, 3]),))
    assert from_column(column).to_list() == [[b"a", b"bc"], [], [b""]]


def test_to_column_takes_a_sparse_tensor_as_lists():
    column = Ragged.from_lists([[3, 0], [], [7]], np.int64)
    assert to_column(from_column(column.to_sparse())) == column
    apart = tf.SparseTensor([[1, 5], [1, 9]], [4, 2], [3, 10])
    assert to_column(apart) == Ragged.from_lists([[], [4, 2], []], np.int32)
    with pytest.raises(errors.InvalidArgument, match=r"not in order.*feature user.*reorder"):
        to_column(tf.SparseTensor([[1, 0], [0, 0]], [1, 2], [2, 1]), "user")
    with pytest.raises(errors.Unsupported, match=r"3 dimensions.*feature user"):
        to_column(tf.sparse.from_dense([[[1, 0]]]), "user")


def test_dataset_yields_the_file_as_tensors(click_file, clicks):
    ds = clicks(500, 64).select(["click", "age", "user", "tags"])
    batches = list(ds)
    assert [b.n_rows for b in batches] == [64] * 7 + [52]
    assert [b.cursor for b in batches] == [b.cursor for b in ds.batches()]
    assert isinstance(batches[0]["age"], tf.Tensor) and isinstance(batches[0]["tags"], tf.RaggedTensor)
    stored = pq.read_table(click_file(500)).to_pydict()
    for name in ds.schema:
        found = [x for b in batches for x in (b[name].to_list() if name == "tags" else b[name].numpy().tolist())]
        assert found == stored[name]


def test_dataset_methods_are_those_of_the_core(clicks):

    ds = clicks(500, 50, weight="importance")
    assert (ds.label, ds.weight, ds.batch_size, ds.n_rows) == ("click", "importance", 50, 500)
    assert sum(b.n_rows for b in ds.filter(pc.field("age") < 40)) == ds.filter(pc.field("age") < 40).n_rows < 500
    assert sum(b.n_rows for b in ds.repeat(2).prefetch(2)) == 1000
    doubled = ds.map(lambda columns: {**columns, "age": columns["age"] * 2})
    assert [b["age"].numpy().tolist() for b in doubled] == [(b["age"].numpy() * 2).tolist() for b in ds]
    shuffled = ds.shuffle(3, 200)
    first, second = ([x for b in shuffled.set_epoch(e) for x in b["user"].numpy()] for e in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    iterator = iter(shuffled)
    next(iterator)
    rest = [b["user"].numpy().tolist() for b in iterator]
    again = clicks(500, 50, weight="importance").shuffle(3, 200).load_state_dict(next(iter(shuffled)).cursor)
    assert [b["user"].numpy().tolist() for b in again] == rest
    assert isinstance(again, hb.data.Dataset) and again.stats()["n_rows"] == 450


def test_dataset_yields_the_memory_of_the_core_where_it_is_aligned(clicks):
    ds = clicks(256, 64)
    core = list(ds.batches())
    ds.batches = lambda: iter(core)  # the same batches, to compare their addresses
    for ours, theirs in zip(ds, core, strict=True):
        assert theirs["user"].ctypes.data % 64 == 0
        assert all(array(ours[name]).ctypes.data == theirs[name].ctypes.data for name in ("user", "age", "click"))
    assert array(next(iter(ds))["tags"].values).ctypes.data == core[0]["tags"].values.ctypes.data


# -------------------------------------------------------------------------------------- tf.data.Dataset


def lists_of(batches, name):
    return [
        x for b in batches for x in (b[name].to_list() if hasattr(b[name], "to_list") else b[name].numpy().tolist())
    ]


@pytest.mark.parametrize("how", ["plain", "prefetch", "parallel"])
def test_loader_gives_each_row_once_whatever_is_put_behind_it(clicks, how):
    ds = clicks(500, 64).select(["click", "age", "tags"]).shuffle(3, 200).repeat(2)
    loader = ds.loader()
    if how == "prefetch":
        loader = loader.prefetch(8)
    if how == "parallel":
        loader = loader.map(lambda *element: element, num_parallel_calls=4, deterministic=True)
    for _ in range(2):  # each iteration is one of the dataset's
        batches = [{**x, "click": y} for x, y in loader]
        for name in ("click", "age", "tags"):
            assert lists_of(batches, name) == lists_of(ds, name)
    shards = [hb.data.Dataset.from_parquet(ds._plan.units[0].file.path, shard=(i, 2)).batch(64) for i in (0, 1)]
    found = [age for shard in shards for age in lists_of(shard.loader().prefetch(2), "age")]
    assert sorted(found) == sorted(lists_of(clicks(500, 64), "age"))


def test_loader_knows_its_elements(clicks):
    ds = clicks(100, 64, weight="importance").map(lambda c: {**c, "pair": np.stack([c["age"], c["age"]], 1)})
    x, y, weight = ds.loader().element_spec
    assert y == weight == tf.TensorSpec([None], tf.float32)
    assert x["tags"] == tf.RaggedTensorSpec([None, None], tf.int64, 1, tf.int64)
    assert (x["user"], x["pair"]) == (tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, 2], tf.int64))
    x, _ = clicks(100, 64).batch(64, drop_remainder=True).to_sparse().loader().element_spec
    assert x["tags"] == tf.SparseTensorSpec([64, None], tf.int64) and x["age"].shape == (64,)
    x, y, weight = clicks(100, 64).batch(64, "pad").supervised(["click", "age"]).to_dense().loader().element_spec
    assert x["tags"].shape == (64, None) and (y, weight) == (tf.TensorSpec((64, 2)), tf.TensorSpec((64,)))
    assert isinstance(clicks(100, 64).loader().take(1).get_single_element()[0]["tags"], tf.RaggedTensor)


def test_loader_weighs_padded_rows_nothing_and_stacks_labels(clicks):
    x, y, weight = list(clicks(100, 64).batch(64, "pad").supervised(["click", "age"]).loader())[1]
    assert "age" not in x and y.shape == (64, 2) and y.dtype == tf.float32
    assert weight.numpy().tolist() == [1.0] * 36 + [0.0] * 28
    weight = list(clicks(100, 64, weight="importance").batch(64, "pad").loader())[1][2].numpy()
    assert weight[:36].all() and not weight[36:].any()


def test_loader_refuses_by_name(click_file, clicks):
    with pytest.raises(errors.InvalidArgument, match="not batched"):
        hb.data.Dataset.from_parquet(click_file()).loader()
    with pytest.raises(errors.UnknownColumn, match="column click"):
        clicks(100, 64).map(lambda c: {"age": c["age"]}).loader()
    with pytest.raises(errors.InvalidArgument, match="no rows"):
        clicks(100, 64).filter(pc.field("age") < 0).map(dict).loader()
    assert list(clicks(100, 64).filter(pc.field("age") < 0).loader()) == []


@pytest.mark.filterwarnings("ignore:.*shuffle=True", "ignore:Your input ran out of data")
def test_loader_drops_into_a_plain_fit(clicks):
    """Not attached: a Keras model over the columns, lists padded; each epoch in its own order."""
    inputs = {
        name: keras.Input((), name=name, dtype=dtype) for name, dtype in [("amount", "float32"), ("age", "int64")]
    }
    inputs["tags"] = keras.Input((None,), name="tags", dtype="int64")
    parts = [keras.ops.log1p(inputs["amount"]), keras.ops.cast(inputs["age"], "float32") / 70]
    tags = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(30, 4)(inputs["tags"]))
    hidden = keras.layers.Concatenate()([keras.ops.stack(parts, 1), tags])
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
    model.compile("adam", "binary_crossentropy", jit_compile=False)
    ds = clicks(500, weight="importance").select(["click", "importance", *inputs]).to_dense().shuffle_batch(64, seed=1)
    losses = model.fit(ds.loader(), epochs=3, verbose=0).history["loss"]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert ds.state_dict()["epoch"] == 2
    assert model.predict(ds.loader(), verbose=0).shape == (500, 1)


def test_loader_that_is_left_early_ends_its_threads(clicks, no_threads_left):
    iterator = iter(clicks(1000, 16).prefetch(2).loader())
    next(iterator)
    del iterator
    gc.collect()


def test_loader_raises_what_reading_raised_by_name(clicks):
    ds = clicks(100, 64)

    def spoil(columns, calls=[]):  # noqa: B006 counts its calls
        calls.append(1)
        return columns if len(calls) < 2 else {**columns, "age": columns["age"][:3]}

    with pytest.raises(tf.errors.OpError, match=r"age.*keep the number of rows"):
        list(ds.map(spoil).loader())


def test_to_dense_and_to_sparse_hold_the_same_lists(clicks):
    ds = clicks(100, 64)
    for core, padded, sparse in zip(ds.batches(), ds.to_dense(["tags"], pad=-1), ds.to_sparse(), strict=True):
        np.testing.assert_array_equal(padded["tags"], core["tags"].to_padded(pad=-1))
        assert isinstance(sparse["tags"], tf.SparseTensor) and to_column(sparse["tags"]) == core["tags"]
    with pytest.raises(errors.UnknownColumn, match="column nope"):
        next(iter(ds.to_dense(["nope"])))


def test_calls_of_hybridbackend(click_file):
    """As its users write them: one call after another, rows shuffled, lists as sparse tensors or padded."""
    ds = hb.data.Dataset.from_parquet([click_file(300)], fields=["click", "age", "tags"], num_parallel_reads=2)
    assert [len(b["age"]) for b in ds.batch(128, drop_remainder=True)] == [128, 128]
    shuffled = ds.shuffle_batch(128, drop_remainder=False, buffer_size=256, seed=1, reshuffle_each_iteration=False)
    first, second = (lists_of(shuffled.loader(), "age") for _ in range(2))
    assert first == second and [len(b["age"]) for b in shuffled] == [128, 128, 44]
    moving = ds.shuffle_batch(128, buffer_size=256, seed=1).loader()
    assert lists_of(moving, "age") == first != lists_of(moving, "age")
    assert next(iter(shuffled.to_sparse()))["tags"].dense_shape.numpy().tolist() == [128, 3]
