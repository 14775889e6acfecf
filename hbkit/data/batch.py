"""A batch: columns of equally many rows, and where to continue after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit import errors, ragged
from hbkit._ext.pool import Pool
from hbkit.ragged import Column, Ragged, Strings

__all__ = ["Batch", "Inputs", "dense_inputs", "join", "pad"]

# Dense inputs live for one step: their memory is reused. Its alignment lets TensorFlow share it.
_pool = Pool()


class Batch(dict[str, Column]):
    """Columns by name, ``dict[str, np.ndarray | Ragged | Strings]``; the receiver owns their memory.

    Parameters
    ----------
    columns : mapping of str to column
        Of equally many rows.
    n_rows : int
        Real rows: rows behind them are padding.
    cursor : dict
        JSON-able: ``Dataset.load_state_dict(batch.cursor)`` continues after this batch.
    """

    __slots__ = ("cursor", "n_rows")

    def __init__(self, columns: Mapping[str, Column], n_rows: int, cursor: dict[str, Any]) -> None:
        super().__init__(columns)
        self.n_rows = n_rows
        self.cursor = cursor

    def __repr__(self) -> str:
        return f"Batch(n_rows={self.n_rows}, columns={list(self)})"


def join(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """The rows of the parts end to end."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: ragged.concat([p[name] for p in parts]) for name in parts[0]}


def pad(column: Any, n_rows: int) -> Any:
    """The column with rows of zeros, or empty rows, appended up to ``n_rows``."""
    missing = n_rows - ragged.n_rows(column)
    if missing < 0:
        raise errors.InvalidArgument(f"{ragged.n_rows(column)} rows do not fit {n_rows}", remedy="pad to more rows")
    if isinstance(column, Ragged):
        first, *inner = column.row_splits
        return Ragged(column.values, (np.pad(first, (0, missing), mode="edge"), *inner))
    if isinstance(column, Strings):
        return Strings(column.data, np.pad(column.row_splits, (0, missing), mode="edge"))
    return np.concatenate([column, np.zeros((missing, *column.shape[1:]), column.dtype)])


class Inputs(NamedTuple):
    """What a model takes of a batch besides its keys, padded to the batch size.

    Attributes
    ----------
    dense : float32[size, n_dense]
        Every column that is neither label, weight nor key, side by side in the dataset's order.
    label, weight : float32[size]
        Without such a column, labels are 0 and weights 1. Zeros in padded rows. Labels that were named as a sequence
        are float32[size, n_labels].
    n_rows : int
        Rows that are not padding.
    cursor : dict
        Where the dataset continues after this batch.
    """

    dense: npt.NDArray[np.float32]
    label: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    n_rows: int
    cursor: dict[str, Any]


def dense_inputs(columns: Mapping[str, Any], n_rows: int, size: int) -> npt.NDArray[np.float32]:
    """The first rows of numeric columns [n] or [n, k] side by side: float32[size, n_dense], zeros from `n_rows` on.

    The memory is aligned to 64 bytes and the receiver's own.

    Raises
    ------
    InvalidArgument
        A column is not numeric, or has more than two dimensions.
    """
    for name, column in columns.items():
        if not isinstance(column, np.ndarray) or column.dtype.kind not in "biuf" or column.ndim > 2:
            kind = f"{column.dtype} {list(column.shape)}" if isinstance(column, np.ndarray) else type(column).__name__
            raise errors.InvalidArgument(
                f"a dense input of type {kind}",
                column=name,
                remedy="dense inputs are numbers: give the column a table, or leave it out with select()",
            )
    flat = [(c[:, None] if c.ndim == 1 else c)[:n_rows] for c in columns.values()]
    width = sum(part.shape[1] for part in flat)
    dense = np.frombuffer(_pool.take(4 * size * width), np.float32).reshape(size, width)
    if flat:
        np.concatenate(flat, axis=1, out=dense[:n_rows], casting="unsafe")
    dense[n_rows:] = 0
    return dense
