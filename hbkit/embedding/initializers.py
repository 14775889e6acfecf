"""Initializers: the first value of a row, a pure function of (seed, table, key, column) without libm.

So a row is the same whatever the order, rank or machine it is first seen on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbkit._ext.hash import hash_bytes
from hbkit._ext.random import initialize, mix64
from hbkit.errors import InvalidArgument
from hbkit.store.base import Float32s, Int64s

__all__ = ["Constant", "Initializer", "Normal", "TruncatedNormal", "Uniform"]


def stream(seed: int, table: str) -> int:
    """The generator's 64-bit key of a table: tables of equal seed differ by name."""
    name = np.frombuffer(table.encode(), np.uint8)
    named = int(hash_bytes(name, np.array([0, len(name)]))[0]) % 2**64
    return int(mix64(seed % 2**64)) ^ named


@dataclass(frozen=True)
class Initializer:
    """Base of the initializers: call it with a table's name, its keys and dim to get rows."""

    def _parameters(self) -> tuple[str, float, float, int]:
        raise InvalidArgument("Initializer is abstract", remedy="use Normal, Uniform, TruncatedNormal or Constant")

    def __call__(self, table: str, keys: Int64s, dim: int) -> Float32s:
        """Rows of keys: float32[n, dim]."""
        kind, a, b, seed = self._parameters()
        rows: Float32s = initialize(kind, a, b, stream(seed, table), keys, dim)
        return rows

    def draw(self, table: str, column: int, n_columns: int) -> tuple[str, float, float, int, int, int]:
        """These rows as `hbkit._ext.slabs.Slabs.fill` makes them in place, in columns from `column` on."""
        kind, a, b, seed = self._parameters()
        return kind, a, b, stream(seed, table), column, n_columns


@dataclass(frozen=True)
class Normal(Initializer):
    """Normal with `mean` and standard deviation `std`."""

    mean: float = 0.0
    std: float = 0.05
    seed: int = 0

    def _parameters(self) -> tuple[str, float, float, int]:
        return "normal", self.mean, self.std, self.seed


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal cut off two standard deviations from the mean."""

    mean: float = 0.0
    std: float = 0.05
    seed: int = 0

    def _parameters(self) -> tuple[str, float, float, int]:
        return "truncated_normal", self.mean, self.std, self.seed


@dataclass(frozen=True)
class Uniform(Initializer):
    """Uniform between `low` and `high`."""

    low: float = -0.05
    high: float = 0.05
    seed: int = 0

    def _parameters(self) -> tuple[str, float, float, int]:
        return "uniform", self.low, self.high, self.seed


@dataclass(frozen=True)
class Constant(Initializer):
    """The same `value` everywhere."""

    value: float = 0.0

    def _parameters(self) -> tuple[str, float, float, int]:
        return "constant", self.value, 0.0, 0
