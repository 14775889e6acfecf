"""The core dataset as PyTorch tensors, and the conversions of columns both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import hbkit
from hbkit import errors

__all__ = ["Dataset"]

Array = npt.NDArray[Any]


class Jagged(NamedTuple):
    """A column of lists: the values of all rows end to end, and where each row's list starts and ends.

    Attributes
    ----------
    values : Tensor[n_values]
    row_splits : tuple of int64 tensors, outer to inner, as in `hbkit.Ragged`
        Row i of a column with one level is ``values[row_splits[0][i] : row_splits[0][i + 1]]``.
    """

    values: Any
    row_splits: Any


def tensor(array: Array) -> torch.Tensor:
    """A tensor that shares the array's memory; a copy only where the array is read-only, which torch can't express."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def from_column(column: Any) -> Any:
    """A column of the core as PyTorch has it: Tensor, `Jagged`, or `hbkit.Strings` as it is.

    Notes
    -----
    Memory is shared where the core's buffer is writable, else copied (torch has no read-only tensors).
    """
    if isinstance(column, np.ndarray):
        return tensor(column)
    if isinstance(column, hbkit.Ragged):
        return Jagged(from_column(column.values), tuple(tensor(splits) for splits in column.row_splits))
    return column


def to_column(column: Any, name: str = "") -> Any:
    """A column of a batch as the core has it: from a Tensor, `Jagged`, ``(values, row_splits)``, or as it is.

    Parameters
    ----------
    column : Tensor, Jagged, tuple of (values, row_splits), ndarray, Ragged or Strings
    name : str
        The feature that an error names.

    Raises
    ------
    InvalidArgument
        The tensor is not in host memory.
    """
    if isinstance(column, torch.Tensor):
        if column.device.type != "cpu":
            raise errors.InvalidArgument(
                f"keys on device {column.device}", feature=name, remedy="the core reads host memory: pass .cpu()"
            )
        return column.detach().numpy()
    if isinstance(column, tuple) and len(column) == 2:
        values, splits = column
        splits = splits if isinstance(splits, tuple | list) else (splits,)
        return hbkit.Ragged(to_column(values, name), tuple(to_column(s, name) for s in splits))
    return column


def key_columns(batch: Mapping[str, Any], features: Iterable[str]) -> dict[str, Any]:
    """The key column of each feature as the core has it, checked here so that an error can name the feature."""
    columns = {}
    for feature in features:
        if feature not in batch:
            raise errors.UnknownColumn(
                "a feature is not in the batch",
                feature=feature,
                remedy=f"the batch has {', '.join(batch) or 'nothing'}",
            )
        column = to_column(batch[feature], feature)
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
    dense = np.zeros((size, sum(part.shape[1] for part in flat)), np.float32)
    if flat:
        np.concatenate(flat, axis=1, out=dense[:n_rows], casting="unsafe")
    return dense


class Dataset:
    """`hbkit.data.Dataset` that yields tensors: each batch is the core's batch with its columns as PyTorch has them.

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
