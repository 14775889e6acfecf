"""A row group read in steps where it can only be decoded whole."""

from __future__ import annotations

from collections.abc import Mapping

from hbkit.ragged import Column

__all__ = ["Decoded"]


class Decoded:
    """Decoded columns, handed out as consecutive slices; the slices share their memory.

    Parameters
    ----------
    columns : mapping of str to column
        Of equally many rows.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns, self._at = columns, 0

    def read(self, n_rows: int) -> dict[str, Column]:
        """The next ``n_rows`` rows, fewer where the row group ends."""
        first, self._at = self._at, self._at + n_rows
        return {name: column[first : self._at] for name, column in self._columns.items()}
