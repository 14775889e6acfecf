"""Rows read in steps, from one row group or several: what every format gives, and what is gathered of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hbkit import ragged
from hbkit.ragged import Column

__all__ = ["Decoded", "Gathered", "RowGroup", "Slab"]

Mask = npt.NDArray[np.bool_]


class Gathered:
    """One column of a slab: finished parts, and the output of a decoder that may go on."""

    def __init__(self) -> None:
        self.parts: list[Column] = []
        self.decoding: Any = None
        self.place: dict[str, Any] = {}
        self.output: Any = None

    def close(self) -> None:
        """Finish the output, so that what comes next is a part of its own."""
        if self.output is not None:
            self.parts.append(self.decoding.finish(self.output, self.place))
            self.output = None

    def add(self, part: Column) -> None:
        """Append decoded rows."""
        self.close()
        self.parts.append(part)

    def finish(self) -> Column:
        """The rows, in one piece."""
        self.close()
        return ragged.concat(self.parts)


class Slab:
    """Rows on their way out: each column in one piece of memory, as long as the row groups store it alike.

    Parameters
    ----------
    n_rows : int
        How many are expected.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._columns: dict[str, Gathered] = {}

    def column(self, name: str) -> Gathered:
        """What is gathered of a column."""
        return self._columns.setdefault(name, Gathered())

    def finish(self) -> dict[str, Column]:
        """The columns; the caller owns their memory."""
        return {name: column.finish() for name, column in self._columns.items()}


class RowGroup(Protocol):
    """The rows of one row group, from the first to the last."""

    def add_to(self, slab: Slab, n_rows: int, rows: Mask | None = None) -> None:
        """Append the next ``n_rows`` rows to a slab, or those of them where the mask ``rows`` is true."""

    def skip(self, n_rows: int) -> None:
        """Step over the next ``n_rows`` rows."""


def read(group: RowGroup, n_rows: int, rows: Mask | None = None) -> dict[str, Column]:
    """The next ``n_rows`` rows of a row group, or those of them where the mask ``rows`` is true."""
    slab = Slab(n_rows)
    group.add_to(slab, n_rows, rows)
    return slab.finish()


class Decoded:
    """Decoded columns, handed out as consecutive slices; the slices share their memory.

    Parameters
    ----------
    columns : mapping of str to column
        Of equally many rows.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns, self._at = columns, 0

    def add_to(self, slab: Slab, n_rows: int, rows: Mask | None = None) -> None:
        """See ``RowGroup``."""
        first, self._at = self._at, self._at + n_rows
        for name, column in self._columns.items():
            part = column[first : self._at]
            slab.column(name).add(part if rows is None else ragged.take(part, rows))

    def skip(self, n_rows: int) -> None:
        """See ``RowGroup``."""
        self._at += n_rows
