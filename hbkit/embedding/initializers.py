"""Initializers: the first value of a row, a pure function of (seed, table, key, column) without libm.

So a row is the same whatever the order, rank or machine it is first seen on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np

from hbkit._ext.hash import hash_bytes
from hbkit._ext.random import initialize, mix64
from hbkit.errors import InvalidArgument, Unsupported
from hbkit.store.line import Float32s, Int64s

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


def named(config: Mapping[str, Any]) -> Initializer:
    """The initializer that a snapshot describes by the name of its class and its fields.

    Raises
    ------
    Unsupported
        It is none of this module's.
    InvalidArgument
        Its fields are others, or no numbers.
    """
    kinds = {kind.__name__: kind for kind in (Constant, Normal, TruncatedNormal, Uniform)}
    name, values = config["name"], {k: v for k, v in config.items() if k != "name"}
    if name not in kinds:
        raise Unsupported(f"initializer {name!r:.40}", remedy=f"use one of {', '.join(kinds)}")
    types = {f.name: int if f.name == "seed" else (int, float) for f in fields(kinds[name])}
    if values.keys() != types.keys() or any(
        isinstance(v, bool) or not isinstance(v, types[k]) or not abs(v) < 2**128 for k, v in values.items()
    ):
        raise InvalidArgument(f"{name} of {values!r:.80}", remedy=f"give finite numbers as {', '.join(types)}")
    return kinds[name](**values)


Default: TypeAlias = "Float32s | Initializer"


def default_rows(default: Default, table: str, keys: Int64s, dim: int) -> Float32s:
    """What keys without a row read, be it a row or drawn for each key: float32[n, dim], not to be written to."""
    return default(table, keys, dim) if isinstance(default, Initializer) else np.broadcast_to(default, (len(keys), dim))
