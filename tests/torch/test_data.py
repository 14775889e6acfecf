"""Columns as tensors and back: shared memory, and the dataset that yields them."""

import numpy as np
import pytest
import torch

import hbkit
import hbkit.torch as hb
from hbkit import errors
from hbkit_torch.data import Jagged, from_column, to_column


def test_column_shares_the_memory_of_a_writable_array():
    array = np.arange(6, dtype=np.float32)
    tensor = from_column(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert to_column(tensor).ctypes.data == array.ctypes.data


def test_column_copies_a_read_only_array_without_a_warning(recwarn):
    array = np.arange(6)
    array.flags.writeable = False
    tensor = from_column(array)
    tensor += 1
    assert array[0] == 0 and not recwarn


def test_column_of_lists_is_jagged_over_the_same_memory():
    ragged = hbkit.Ragged(np.arange(5), (np.array([0, 2, 2, 5]),))
    jagged = from_column(ragged)
    assert isinstance(jagged, Jagged)
    assert jagged.values.data_ptr() == ragged.values.ctypes.data
    assert jagged.row_splits[0].data_ptr() == ragged.row_splits[0].ctypes.data
    assert to_column(jagged) == ragged
    assert to_column((jagged.values, jagged.row_splits[0])) == ragged
    nested = hbkit.Ragged.from_lists([[[1, 2], []], [], [[3]]], np.int64)
    assert to_column(from_column(nested)) == nested


def test_column_of_strings_stays_as_it_is():
    strings = hbkit.Strings.from_list(["a", "bc"])
    assert from_column(strings) is strings


def test_column_on_another_device_is_refused():
    with pytest.raises(errors.InvalidArgument, match=r"meta.*user"):
        to_column(torch.empty(3, device="meta"), "user")


def test_dataset_yields_the_core_batches_as_tensors(clicks):
    ds = clicks(300, 64)
    for ours, core in zip(ds, ds.batches(), strict=True):
        assert (ours.n_rows, ours.cursor, list(ours)) == (core.n_rows, core.cursor, list(core))
        for name in ("click", "amount", "age", "user"):
            assert isinstance(ours[name], torch.Tensor)
            np.testing.assert_array_equal(ours[name].numpy(), core[name])
        assert to_column(ours["tags"]) == core["tags"]


def test_dataset_yields_the_memory_of_the_core(clicks):
    ds = clicks(100, 50)
    core = list(ds.batches())
    ds.batches = lambda: iter(core)  # the same batches, to compare their addresses
    for ours, theirs in zip(ds, core, strict=True):
        assert ours["user"].data_ptr() == theirs["user"].ctypes.data
        assert ours["tags"].values.data_ptr() == theirs["tags"].values.ctypes.data


def test_dataset_chain_is_that_of_the_core(clicks):
    import pyarrow.compute as pc

    ds = clicks(1000, 64).filter(pc.field("age") < 40).shuffle(3, 500).prefetch(2).repeat(2).set_epoch(1)
    ds = ds.map(lambda columns: {**columns, "half": columns["age"] / 2}).select(["click", "age", "half"])
    assert isinstance(ds, hb.data.Dataset)
    assert (ds.batch_size, ds.label, ds.weight) == (64, "click", None)
    batches = list(ds)
    assert sum(b.n_rows for b in batches) == 2 * ds.n_rows == ds.stats()["n_rows"]
    assert all(bool((b["half"] * 2 == b["age"]).all()) for b in batches)
    again = ds.load_state_dict(batches[2].cursor)
    assert again is ds and ds.state_dict() == batches[2].cursor
    assert torch.equal(next(iter(ds))["age"], batches[3]["age"])
