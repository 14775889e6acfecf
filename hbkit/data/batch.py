"""A batch: columns of equally many rows, and where to continue after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hbkit import errors, ragged
from hbkit.ragged import Column, Ragged, Strings

__all__ = ["Batch", "join", "pad"]


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
    """The rows of the parts end to end, in memory of their own."""
    if len(parts) > 1:
        return {name: ragged.concat([p[name] for p in parts]) for name in parts[0]}
    return {name: _copy(column) for name, column in parts[0].items()}


def _copy(column: Any) -> Any:
    if isinstance(column, Ragged):
        return Ragged(_copy(column.values), tuple(s.copy() for s in column.row_splits))
    if isinstance(column, Strings):
        return Strings(column.data.copy(), column.row_splits.copy())
    return column.copy()


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
