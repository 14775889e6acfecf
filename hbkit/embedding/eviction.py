"""Eviction: which rows lose their place. It reads (frequency, last step, row, key) alone, never the state of a cache.

Rows are looked at by parts of the mixed key space (`hbkit.store.line.Part`), so what goes when depends on the rows and
the step, not on tiers, order of arrival, ranks or restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hbkit._ext.batch import mixed
from hbkit.errors import InvalidArgument
from hbkit.store.line import Chunk

__all__ = ["Eviction", "IdleSteps", "L2Below", "MaxRows"]


class Eviction(Protocol):
    """A rule of eviction, as given to a table.

    Attributes
    ----------
    reads_rows, reads_metadata : bool
        What `victims` looks at of a chunk.
    """

    reads_rows: ClassVar[bool]
    reads_metadata: ClassVar[bool]

    @property
    def group_bits(self) -> int:
        """Keys that share so many leading bits of their mix are judged together: they come in one chunk."""
        ...

    def victims(self, chunk: Chunk, step: int) -> npt.NDArray[np.bool_]:
        """Which of a chunk's rows go at `step`: bool[n]. The chunk is in the order of the mixed keys."""
        ...


@dataclass(frozen=True)
class IdleSteps:
    """Evict rows that no training batch touched in the last `n` steps."""

    n: int
    reads_rows: ClassVar[bool] = False
    reads_metadata: ClassVar[bool] = True
    group_bits: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidArgument(f"IdleSteps({self.n})", remedy="give at least one step")

    def victims(self, chunk: Chunk, step: int) -> npt.NDArray[np.bool_]:
        """See `Eviction.victims`."""
        return step - chunk.last_step > self.n


@dataclass(frozen=True)
class L2Below:
    """Evict rows whose Euclidean norm is below `threshold`: they hardly change a prediction."""

    threshold: float
    reads_rows: ClassVar[bool] = True
    reads_metadata: ClassVar[bool] = False
    group_bits: ClassVar[int] = 64

    def victims(self, chunk: Chunk, step: int) -> npt.NDArray[np.bool_]:
        """See `Eviction.victims`."""
        squares = chunk.row.astype(np.float64) ** 2
        below: npt.NDArray[np.bool_] = squares.sum(axis=1) < self.threshold**2
        return below


SCORES = {"frequency": ("freq", "last_step"), "last_step": ("last_step", "freq")}


@dataclass(frozen=True)
class MaxRows:
    """Keep at most `n` rows: those of the lowest score go.

    Parameters
    ----------
    n : int
        At least 1. Between two sweeps the table may hold more.
    score : "frequency" or "last_step"
        What a row is worth; ties go by the other of the two, then by key, the lower first.

    Notes
    -----
    Above 512 rows the keys are divided by their mix into groups that have 256 to 511 rows of `n` each, and each group
    lets its own lowest go. So a sweep never needs the whole table at once, and the number of ranks changes nothing. As
    groups differ in size, a table may have somewhat fewer than `n` rows while it could still fill some groups.
    """

    n: int
    score: str = "frequency"
    reads_rows: ClassVar[bool] = False
    reads_metadata: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n < 1 or self.score not in SCORES:
            raise InvalidArgument(f"{self}", remedy=f"give n of at least 1, and a score of {', '.join(SCORES)}")

    @property
    def group_bits(self) -> int:
        """See `Eviction.group_bits`."""
        return max(0, self.n.bit_length() - 9)

    def victims(self, chunk: Chunk, step: int) -> npt.NDArray[np.bool_]:
        """See `Eviction.victims`."""
        out = np.zeros(len(chunk.key), np.bool_)
        bits = self.group_bits
        group = (mixed(chunk.key) >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(out), np.int64)
        first = np.flatnonzero(np.diff(group, prepend=-1))  # of each group, which are in order
        size = np.diff(first, append=len(group))
        quota = (self.n >> bits) + (group[first] < self.n & ((1 << bits) - 1))
        over = np.repeat(size > quota, size)
        some = np.flatnonzero(over)
        columns = [getattr(chunk, name)[some] for name in SCORES[self.score]]
        order = np.lexsort((chunk.key[some], columns[1], columns[0], group[some]))
        # Where its group begins among those that are over, and how many of it go.
        size, quota = size[size > quota], quota[size > quota]
        rank = np.arange(len(some)) - np.repeat(np.cumsum(size) - size, size)
        out[some[order[rank < np.repeat(size - quota, size)]]] = True
        return out
