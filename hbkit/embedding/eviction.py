"""Eviction: which rows lose their place. It reads (frequency, last step, row) alone, never the state of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hbkit.errors import InvalidArgument
from hbkit.store.base import Chunk

__all__ = ["Eviction", "IdleSteps", "L2Below"]


class Eviction(Protocol):
    """A rule of eviction, as given to a table."""

    def victims(self, chunk: Chunk, step: int) -> npt.NDArray[np.bool_]:
        """Which of a chunk's rows go at `step`: bool[n]."""
        ...


@dataclass(frozen=True)
class IdleSteps:
    """Evict rows that no training batch touched in the last `n` steps."""

    n: int

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

    def victims(self, chunk: Chunk, step: int) -> npt.NDArray[np.bool_]:
        """See `Eviction.victims`."""
        squares = chunk.row.astype(np.float64) ** 2
        below: npt.NDArray[np.bool_] = squares.sum(axis=1) < self.threshold**2
        return below
