"""The core dataset as TensorFlow tensors, and the conversions of columns both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

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


def zeros(shape: tuple[int, ...]) -> Array:
    """float32 zeros, aligned so that ``tensor`` need not copy them."""
    n_floats, block = int(np.prod(shape)), ALIGN // 4
    memory = np.zeros(n_floats + block, np.float32)
    start = -memory.ctypes.data % ALIGN // 4
    return memory[start : start + n_floats].reshape(shape)


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


def key_columns(batch: Mapping[str, Any], features: Iterable[str]) -> dict[str, Any]:
    """The key column of each feature as the core has it, checked here so that an error can name the feature."""
    columns = {}
    for feature in features:
        column = to_column(feature_column(batch, feature), feature)
        keys = column.values if isinstance(column, hbkit.Ragged) else column
        if not isinstance(keys, np.ndarray) or keys.dtype.kind not in "iu":
            kind = keys.dtype if isinstance(keys, np.ndarray) else type(keys).__name__
            raise errors.InvalidArgument(
                f"keys of type {kind}",
                feature=feature,
                remedy="keys are integers: cast them, or hash strings with Field(hash_to='int64')",
            )
        columns[feature] = column
    return columns


def dense_columns(columns: Mapping[str, Any], n_rows: int, size: int) -> Array:
    """Numeric columns [n] or [n, k] side by side: float32[size, n_dense], zeros from row ``n_rows`` on."""
    for name, column in columns.items():
        if not isinstance(column, np.ndarray) or column.dtype.kind not in "biuf" or column.ndim > 2:
            kind = f"{column.dtype} {list(column.shape)}" if isinstance(column, np.ndarray) else type(column).__name__
            raise errors.InvalidArgument(
                f"a dense input of type {kind}",
                column=name,
                remedy="dense inputs are numbers: give the column a table, or leave it out with select()",
            )
    flat = [column[:n_rows].reshape(n_rows, -1) for column in columns.values()]
    dense = zeros((size, sum(part.shape[1] for part in flat)))
    if flat:
        np.concatenate(flat, axis=1, out=dense[:n_rows], casting="unsafe")
    return dense


class Dataset:
    """`hbkit.data.Dataset` that yields tensors: each batch is the core's batch with its columns as TensorFlow has them.

    The methods are those of the core dataset and give a new dataset. ``map`` and ``filter`` run before the conversion,
    on the core's columns, so the same function serves every framework.
    """

    def __init__(self, core: hbkit.data.Dataset) -> None:
        self.core = core

    @classmethod
    def from_parquet(cls, *args: Any, **options: Any) -> Dataset:
        """A dataset over Parquet files; arguments as `hbkit.data.Dataset.from_parquet`."""
        return cls(hbkit.data.Dataset.from_parquet(*args, **options))

    def filter(self, expr: Any) -> Dataset:
        """Keep the rows for which a pyarrow.compute expression is true."""
        return Dataset(self.core.filter(expr))

    def select(self, names: Sequence[str]) -> Dataset:
        """Keep the columns named, in this order."""
        return Dataset(self.core.select(names))

    def map(self, fn: Callable[[Any], Any]) -> Dataset:
        """Replace each batch by what ``fn`` makes of it; ``fn`` gets and gives the core's columns."""
        return Dataset(self.core.map(fn))

    def shuffle(self, seed: int, buffer_rows: int) -> Dataset:
        """Mix rows within a buffer, the same way for the same seed."""
        return Dataset(self.core.shuffle(seed, buffer_rows))

    def batch(self, n: int, remainder: Literal["keep", "drop", "pad"] = "keep") -> Dataset:
        """Cut the rows into batches of ``n``; ``remainder``: "keep", "drop" or "pad"."""
        return Dataset(self.core.batch(n, remainder=remainder))

    def prefetch(self, k: int) -> Dataset:
        """Decode up to ``k`` batches ahead in a thread."""
        return Dataset(self.core.prefetch(k))

    def repeat(self, n: int | None = None) -> Dataset:
        """Pass over the rows ``n`` times; None: without end."""
        return Dataset(self.core.repeat(n))

    def supervised(self, label: str, weight: str | None = None) -> Dataset:
        """Say which column is the label, and which weighs the rows."""
        return Dataset(self.core.supervised(label, weight))

    def set_epoch(self, epoch: int) -> Dataset:
        """Start at this epoch: another one, another shuffle."""
        return Dataset(self.core.set_epoch(epoch))

    def state_dict(self) -> dict[str, Any]:
        """Where the dataset stands (JSON-able); as the core's."""
        return self.core.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> Dataset:
        """Let the next iteration continue after the rows that were delivered when ``state`` was taken; gives itself."""
        self.core.load_state_dict(state)
        return self

    def stats(self) -> dict[str, Any]:
        """Counters of the reader; as the core's."""
        return self.core.stats()

    @property
    def schema(self) -> Any:
        """Column types; as the core's."""
        return self.core.schema

    @property
    def n_rows(self) -> int:
        """Rows that one epoch delivers; as the core's."""
        return self.core.n_rows

    @property
    def batch_size(self) -> int | None:
        """Rows of a full batch; None before ``batch``."""
        return self.core.batch_size

    @property
    def label(self) -> str | None:
        """Name of the label column; None before ``supervised``."""
        return self.core.label

    @property
    def weight(self) -> str | None:
        """Name of the column that weighs the rows, if any."""
        return self.core.weight

    def __iter__(self) -> Iterator[hbkit.data.Batch]:
        for batch in self.core:
            columns = {name: from_column(column) for name, column in batch.items()}
            yield hbkit.data.Batch(columns, batch.n_rows, batch.cursor)
