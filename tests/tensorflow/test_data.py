"""Columns as tensors: the same values, the same memory, nothing that TensorFlow would abort on."""

import numpy as np
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
    import pyarrow.compute as pc

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
