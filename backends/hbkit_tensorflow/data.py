"""The core dataset as TensorFlow tensors, and the conversions of columns both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tensorflow as tf

import hbkit
from hbkit import errors

__all__ = ["Dataset"]

Array = npt.NDArray[Any]
Columns = dict[str, Any]

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


def from_column(column: Any) -> tf.Tensor | tf.RaggedTensor | tf.SparseTensor:
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
    if isinstance(column, hbkit.ragged.Sparse):
        return tf.SparseTensor(tensor(column.indices), from_column(column.values), tensor(column.dense_shape))
    return tensor(column)


def to_column(column: Any, name: str = "") -> Any:
    """A column of a batch as the core has it: from a Tensor, a RaggedTensor, a SparseTensor, or as it is.

    Parameters
    ----------
    column : Tensor, RaggedTensor, SparseTensor, ndarray, Ragged or Strings
        A SparseTensor of two dimensions is lists: in each row, its values in their order.
    name : str
        The feature that an error names.

    Raises
    ------
    InvalidArgument
        A SparseTensor's rows are not in order.
    Unsupported
        A SparseTensor has another number of dimensions.
    """
    if isinstance(column, tf.RaggedTensor):
        splits = tuple(array(s).astype(np.int64, copy=False) for s in column.nested_row_splits)
        return hbkit.Ragged(array(column.flat_values), splits)
    if isinstance(column, tf.SparseTensor):
        if column.shape.rank != 2:
            raise errors.Unsupported(
                f"keys as a SparseTensor of {column.shape.rank} dimensions", feature=name, remedy="pass hbkit.Ragged"
            )
        rows = array(column.indices)[:, 0]
        if (np.diff(rows) < 0).any():
            raise errors.InvalidArgument(
                "a SparseTensor whose rows are not in order", feature=name, remedy="pass tf.sparse.reorder(keys)"
            )
        lengths = np.bincount(rows, minlength=int(column.dense_shape[0]))
        return hbkit.Ragged(array(column.values), (np.concatenate([[0], np.cumsum(lengths)]),))
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


def padded(name: str, lists: hbkit.Ragged, pad: Any = 0) -> Array:
    """Lists as one array, as long as the longest of them."""
    return lists.to_padded(pad=pad)


def sparse(name: str, lists: hbkit.Ragged) -> hbkit.ragged.Sparse:
    """Lists as coordinates and values."""
    return lists.to_sparse()


def named(columns: Mapping[str, Any], name: str) -> Any:
    """A column of a batch, or an error that names it."""
    if name not in columns:
        raise errors.UnknownColumn(
            "a column is not in the batch", column=name, remedy=f"the batch has {', '.join(columns)}"
        )
    return columns[name]


def lists_by(convert: Callable[[str, hbkit.Ragged], Any], names: Sequence[str] | None, columns: Columns) -> Columns:
    """The columns with those of lists, or the named ones of them, converted."""
    chosen = columns if names is None else {name: named(columns, name) for name in names}
    found = {name: convert(name, column) for name, column in chosen.items() if isinstance(column, hbkit.Ragged)}
    return {**columns, **found}


def spec(value: Any, size: int | None, any_length: bool) -> Any:
    """What `tf.data` must know of a column: values like these, of `size` rows, of any length where they were lists."""
    if isinstance(value, tf.RaggedTensor):
        shape = [size, *[None] * value.ragged_rank, *value.flat_values.shape[1:]]
        return tf.RaggedTensorSpec(shape, value.dtype, value.ragged_rank, tf.int64)
    lengths = [None] * (value.shape.rank - 1) if any_length else value.shape[1:]
    kind = tf.SparseTensorSpec if isinstance(value, tf.SparseTensor) else tf.TensorSpec
    return kind([size, *lengths], value.dtype)


class Dataset(hbkit.data.Dataset):
    """`hbkit.data.Dataset` whose iteration yields tensors: the core's batches, their columns as TensorFlow has them.

    ``map`` and ``filter`` run before the conversion, on the core's columns, so the same function serves every
    framework.

    `loader` gives it as a `tf.data.Dataset`, which Keras takes.
    """

    _forms: tuple[Callable[[Columns], Columns], ...] = ()

    def _with(self, **changes: Any) -> Self:
        out = super()._with(**changes)
        out._forms = self._forms
        return out

    def _in_form(self, form: Callable[[Columns], Columns]) -> Self:
        out = self._with()
        out._forms = (*self._forms, form)
        return out

    def to_dense(self, names: Sequence[str] | None = None, pad: Any = 0) -> Self:
        """Columns of lists (all, or those named) as Tensors [n, L], filled with `pad` to the batch's longest list.

        `pipeline` and what else takes the core's batches still sees lists. For one L in all batches, use
        ``Field(pad_to=...)``.
        """
        return self._in_form(partial(lists_by, partial(padded, pad=pad), names))

    def to_sparse(self, names: Sequence[str] | None = None) -> Self:
        """Columns of lists (all, or those named) as SparseTensors [n, L], L the batch's longest list."""
        return self._in_form(partial(lists_by, sparse, names))

    def _tensors(self, columns: Columns) -> Columns:
        for form in self._forms:
            columns = form(columns)
        return {name: from_column(column) for name, column in columns.items()}

    def __iter__(self) -> Iterator[hbkit.data.Batch]:
        """Batches of Tensors and RaggedTensors."""
        for batch in self.batches():
            yield hbkit.data.Batch(self._tensors(dict(batch)), batch.n_rows, batch.cursor)

    def loader(self) -> tf.data.Dataset:
        """A `tf.data.Dataset` over this dataset: what Keras's ``fit`` and a training loop take batches from.

        Its elements are the batches, dicts; of a ``supervised`` dataset ``(columns, label)`` or
        ``(columns, label, weight)``. Labels named as a sequence are float32[B, n_labels]. Where batches are padded
        there always is a weight, 0 in padded rows. Each of its iterations is one of this dataset's, so batches come
        once, in order, whatever ``prefetch`` and parallel ``map`` are put behind it; ``ds.state_dict()`` is ahead by
        what they hold.

        To know the types, the first batch is read, if there is a ``map``.

        Raises
        ------
        InvalidArgument
            The dataset is not batched, or has a ``map`` and no rows.
        UnknownColumn
            There is no such label or weight.
        """
        like = self._like()
        size = None if self._plan.remainder == "keep" else self.batch_size
        specs = {
            name: spec(value, size, isinstance(like.get(name), hbkit.Ragged))
            for name, value in self._tensors(like).items()
        }
        signature = self._example(specs, tf.TensorSpec([size], tf.float32))
        return tf.data.Dataset.from_generator(self._examples, output_signature=signature)

    def _examples(self) -> Iterator[Any]:
        for batch in self:
            real = None
            if self._plan.remainder == "pad":
                real = tf.cast(tf.range(self.batch_size) < batch.n_rows, tf.float32)
            yield self._example(batch, real)

    def _like(self) -> Columns:
        """Columns like those of all batches."""
        if self.batch_size is None:
            raise errors.InvalidArgument("the dataset is not batched", remedy="call .batch(n) on it")
        if not self._plan.ops:
            return self._plan.units[0].file.read_no_rows(self._plan.fields)
        first = next(self._with(prefetch=0).batches(), None)
        if first is None:
            raise errors.InvalidArgument("no rows tell what map makes", remedy="give data, or leave out map")
        return dict(first)

    def _example(self, columns: Mapping[str, Any], real: Any) -> Any:
        """Columns, or specs of columns, as the loader's elements; `real` is 1 where rows are not padding."""
        if self.label is None:
            return dict(columns)
        names = self._plan.labels
        label = [named(columns, name) for name in names]
        is_spec = isinstance(real, tf.TensorSpec)
        if isinstance(self.label, str):
            (label,) = label
        elif is_spec:
            label = tf.TensorSpec([real.shape[0], len(names)], tf.float32)
        else:
            label = tf.stack([tf.cast(column, tf.float32) for column in label], axis=1)
        rest = {name: column for name, column in columns.items() if name not in {*names, self.weight}}
        weight = None if self.weight is None else named(columns, self.weight)
        if self._plan.remainder == "pad":
            weight = real if weight is None or is_spec else tf.cast(weight, tf.float32) * real
        return (rest, label) if weight is None else (rest, label, weight)
