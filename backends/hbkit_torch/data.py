"""The core dataset as PyTorch tensors, and the conversions of columns both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Dataset(hbkit.data.Dataset):
    """`hbkit.data.Dataset` whose iteration yields tensors: the core's batches, their columns as PyTorch has them.

    ``map`` and ``filter`` run before the conversion, on the core's columns, so the same function serves every
    framework.
    """

    def __iter__(self) -> Iterator[hbkit.data.Batch]:
        """Batches of Tensors and `Jagged` columns."""
        for batch in self.batches():
            columns = {name: from_column(column) for name, column in batch.items()}
            yield hbkit.data.Batch(columns, batch.n_rows, batch.cursor)
