"""The core dataset as TensorFlow tensors, and the conversions of columns both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

import hbkit
from hbkit import errors

__all__ = ["Dataset"]

Array = npt.NDArray[Any]

# TensorFlow aborts the process when an op meets memory that is not aligned so, and its DLPack import does not check.
ALIGN = 64


class _Writable:
    """An array's memory offered as writable: the DLPack that TensorFlow reads has no way to say read-only."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def tensor(array: Array) -> tf.Tensor:
    """A tensor that shares the array's memory if that is contiguous and aligned to 64 bytes, else a copy."""
    if not array.size or not array.flags.c_contiguous or array.ctypes.data % ALIGN or not array.dtype.isnative:
        return tf.convert_to_tensor(array)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def array(value: Any) -> Array:
    """A tensor on the CPU as a read-only array over its memory; anything else as NumPy converts it."""
    if isinstance(value, tf.Tensor) and value.dtype != tf.string:
        return np.asarray(memoryview(value))
    return np.asarray(value)


def from_column(column: Any) -> tf.Tensor | tf.RaggedTensor:
    """A column of the core as TensorFlow has it: Tensor, RaggedTensor for lists, a Tensor of `tf.string` for strings.

    Notes
    -----
    Memory is shared where the core's buffer is aligned to 64 bytes, else copied; strings are always copied.
    """
    if isinstance(column, hbkit.Ragged):
        splits = [tensor(s) for s in column.row_splits]
        return tf.RaggedTensor.from_nested_row_splits(from_column(column.values), splits, validate=False)
    if isinstance(column, hbkit.Strings):
        return tf.constant(column.tolist(), dtype=tf.string, shape=(len(column),))
    return tensor(column)


def to_column(column: Any, name: str = "") -> Any:
    """A column of a batch as the core has it: from a Tensor, a RaggedTensor, or as it is.

    Parameters
    ----------
    column : Tensor, RaggedTensor, ndarray, Ragged or Strings
    name : str
        The feature that an error names.

    Raises
    ------
    Unsupported
        The column is a SparseTensor.
    """
    if isinstance(column, tf.RaggedTensor):
        splits = tuple(array(s).astype(np.int64, copy=False) for s in column.nested_row_splits)
        return hbkit.Ragged(array(column.flat_values), splits)
    if isinstance(column, tf.SparseTensor):
        raise errors.Unsupported(
            "keys as a SparseTensor", feature=name, remedy="pass tf.RaggedTensor.from_sparse(keys)"
        )
    return array(column) if isinstance(column, tf.Tensor) else column


def feature_column(batch: Mapping[str, Any], feature: str) -> Any:
    """A feature's column of a batch, or an error that names it."""
    if feature not in batch:
        raise errors.UnknownColumn(
            "a feature is not in the batch",
            feature=feature,
            remedy=f"the batch has {', '.join(batch) or 'nothing'}",
        )
    return batch[feature]


class Dataset(hbkit.data.Dataset):
    """`hbkit.data.Dataset` whose iteration yields tensors: the core's batches, their columns as TensorFlow has them.

    ``map`` and ``filter`` run before the conversion, on the core's columns, so the same function serves every
    framework.
    """

    def __iter__(self) -> Iterator[hbkit.data.Batch]:
        """Batches of Tensors and RaggedTensors."""
        for batch in self.batches():
            columns = {name: from_column(column) for name, column in batch.items()}
            yield hbkit.data.Batch(columns, batch.n_rows, batch.cursor)
