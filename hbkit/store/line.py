"""A line, `[row | optimizer state]`: what it holds, how it begins, and lines on their way in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import mixed, n_absent
from hbkit._ext.index import Index
from hbkit.errors import InvalidArgument

Int64s: TypeAlias = npt.NDArray[np.int64]
Float32s: TypeAlias = npt.NDArray[np.float32]


class Rule(Protocol):
    """An optimizer as a store sees it: which kernel, how much state a row needs, and how that state begins."""

    @property
    def code(self) -> int | tuple[tuple[int, int, int, int], ...]:
        """The kernel's number; or (number, column, n_columns, state) for each of several slices of a row."""
        ...

    def n_state(self, dim: int) -> int:
        """Floats of state beside a row of `dim`."""
        ...

    def initial_state(self, dim: int) -> Float32s:
        """float32[n_state(dim)] of a new row."""
        ...


@dataclass(frozen=True)
class Layout:
    """What the lines of one table hold.

    Attributes
    ----------
    table : str
        Name, for messages.
    dim : int
        Floats of a row.
    initial_state : float32[n_state]
        State of a new row.
    initialize : callable
        ``initialize(keys: int64[n]) -> float32[n, dim]``, a pure function of each key.
    draws : sequence of tuples, optional
        The same rows as `hbkit._ext.slabs.Slabs.fill` takes them, where it can draw them itself.
    metadata : bool
        Whether frequency and last step of each row are kept; else every row shows 0 and the table's latest step.
    dtype : one of `hbkit._ext.slabs.ROW_DTYPES`
        How rows are held; they come and go as float32. State is float32.
    seed : int
        With key, step and column, how an update of narrow rows rounds.
    """

    table: str
    dim: int
    initial_state: Float32s
    initialize: Callable[[Int64s], Float32s]
    metadata: bool = True
    draws: Sequence[tuple[str, float, float, int, int, int]] | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def width(self) -> int:
        """Floats of a line."""
        return self.dim + len(self.initial_state)

    @property
    def line_nbytes(self) -> int:
        """Bytes of a line as `hbkit._ext.slabs.Slabs.pack` gives it: rows are rounded up to 4 bytes."""
        row = 4 * self.dim if self.dtype == "float32" else (2 * self.dim + 3) // 4 * 4
        return row + 4 * len(self.initial_state)

    def new_lines(self, keys: Int64s) -> Float32s:
        """Lines of keys that are created: float32[n, width]."""
        lines = np.empty((len(keys), self.width), np.float32)
        lines[:, : self.dim] = self.initialize(keys)
        lines[:, self.dim :] = self.initial_state
        return lines


def check_lines(layout: Layout, lines: Float32s, *columns: Int64s) -> None:
    """Whether lines and columns beside them are of one size: InvalidArgument where they are not."""
    n = len(columns[0])
    if lines.shape != (n, layout.width) or any(column.shape != (n,) for column in columns):
        raise InvalidArgument(
            f"lines of shape {lines.shape} and columns of {[len(column) for column in columns]}",
            table=layout.table,
            remedy=f"give lines of {layout.width} floats, and one of each number a line",
        )


def check_rows(layout: Layout, slots: Int64s) -> None:
    """Whether all keys have rows: InvalidArgument where a slot of a lease says that one has none."""
    if n_absent(slots):
        raise InvalidArgument("a key has no row", table=layout.table, remedy="look at the slots of the lease")


class Chunk(NamedTuple):
    """Some lines as ``scan`` yields and ``put`` takes them, one entry a key.

    Attributes
    ----------
    key, freq, last_step : int64[n]
    row : float32[n, dim]
    state : float32[n, n_state]
    """

    key: Int64s
    freq: Int64s
    last_step: Int64s
    row: Float32s
    state: Float32s


CHUNK_ROWS = 65_536


class Part(NamedTuple):
    """A part of all keys: those whose mix (`hbkit._ext.batch.mixed`) lies in ``[first, last)``, within [0, 2**64).

    Which keys those are depends on nothing but the keys, so neither on order of arrival, tier nor rank.
    """

    first: int = 0
    last: int = 2**64

    @staticmethod
    def share(i: int, n: int, bits: int = 64) -> Part:
        """Share number i of n equal ones, 0 <= i < n; its ends are where the leading `bits` of the mix change."""
        shift = 64 - bits
        first, last = (-(-(x << 64) // n >> shift) << shift for x in (i, i + 1))
        return Part(first, last)

    def has(self, keys: Int64s) -> npt.NDArray[np.bool_]:
        """Which keys belong to it: bool[n]."""
        if self.first >= self.last:
            return np.zeros(len(keys), np.bool_)
        mix = mixed(keys)
        own: npt.NDArray[np.bool_] = (mix >= np.uint64(self.first)) & (mix <= np.uint64(self.last - 1))
        return own

    def of(self, index: Index) -> Int64s:
        """Keys of an index that belong to it, in the order of their mix: int64[m]. Passes over their shards alone."""
        if self.first >= self.last:
            return np.zeros(0, np.int64)
        keys = index.part(self.first, self.last - 1)
        in_order: Int64s = keys[np.argsort(mixed(keys))]
        return in_order
