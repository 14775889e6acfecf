"""A row group read in steps: what every format gives, and how one does that can only decode it whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hbkit import ragged
from hbkit.ragged import Column

__all__ = ["Decoded", "RowGroup"]

Mask = npt.NDArray[np.bool_]


class RowGroup(Protocol):
    """The rows of one row group, from the first to the last."""

    def read(self, n_rows: int, rows: Mask | None = None) -> dict[str, Column]:
        """The next ``n_rows`` rows, or those of them where the mask ``rows`` is true."""

    def skip(self, n_rows: int) -> None:
        """Step over the next ``n_rows`` rows."""


class Decoded:
    """Decoded columns, handed out as consecutive slices; the slices share their memory.

    Parameters
    ----------
    columns : mapping of str to column
        Of equally many rows.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns, self._at = columns, 0

    def read(self, n_rows: int, rows: Mask | None = None) -> dict[str, Column]:
        """See ``RowGroup``."""
        first, self._at = self._at, self._at + n_rows
        columns = {name: column[first : self._at] for name, column in self._columns.items()}
        return columns if rows is None else {name: ragged.take(c, rows) for name, c in columns.items()}

    def skip(self, n_rows: int) -> None:
        """See ``RowGroup``."""
        self._at += n_rows
