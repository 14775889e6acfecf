"""Named columns: slices of one row with their own initializer and optimizer, all read by a single lookup.

A line holds the row, column after column, and behind it the state of each column's optimizer in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hbkit.embedding.initializers import Constant, Initializer, Normal, TruncatedNormal, Uniform
from hbkit.embedding.optimizers import Optimizer
from hbkit.errors import InvalidArgument
from hbkit.store.line import Float32s, Int64s

__all__ = ["Column"]


@dataclass(frozen=True)
class Column:
    """A named slice of a table's rows.

    Parameters
    ----------
    dim : int
        Floats of it.
    initializer : Initializer, optional
        Of its first values; the table's when left out.
    optimizer : Optimizer, optional
        Updates it, with a learning rate of its own; the table's when left out.
    """

    dim: int
    initializer: Initializer | None = None
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dim, (int, np.integer)) or self.dim < 1:
            raise InvalidArgument(f"a column of dim={self.dim!r}", remedy="give a dim of at least 1")


@dataclass(frozen=True)
class ColumnInitializer(Initializer):
    """The first value of a row whose columns have initializers of their own."""

    columns: tuple[tuple[str, int, Initializer], ...]

    def __call__(self, table: str, keys: Int64s, dim: int) -> Float32s:
        """Rows of keys: float32[n, dim]. Columns of one seed differ, as tables do, by name."""
        rows = np.empty((len(keys), dim), np.float32)
        at = 0
        for name, width, initializer in self.columns:
            rows[:, at : at + width] = initializer(f"{table}/{name}", keys, width)
            at += width
        return rows


@dataclass(frozen=True)
class ColumnOptimizer:
    """The optimizers of a row's columns, as a store takes one: see `hbkit.store.line.Rule`.

    Attributes
    ----------
    columns : tuple of str
        ``name:dim:optimizer`` of each: what the state beside a row belongs to.
    rules : tuple of (dim, Optimizer)
    """

    columns: tuple[str, ...]
    rules: tuple[tuple[int, Optimizer], ...]

    @property
    def code(self) -> tuple[tuple[int, int, int, int], ...]:
        """(rule, column, n_columns, state) of each, as `hbkit._ext.slabs.Slabs.apply` takes them."""
        out, column, state = [], 0, 0
        for dim, rule in self.rules:
            out.append((rule.code, column, dim, state))
            column, state = column + dim, state + rule.n_state(dim)
        return tuple(out)

    def n_state(self, dim: int) -> int:
        """Floats of state beside a row."""
        return sum(rule.n_state(width) for width, rule in self.rules)

    def initial_state(self, dim: int) -> Float32s:
        """float32[n_state] of a new row."""
        return np.concatenate([rule.initial_state(width) for width, rule in self.rules])

    def hyper(self, step: int) -> Float32s:
        """A row of hyper-parameters for each column."""
        return np.stack([rule.hyper(step) for _, rule in self.rules])


def divide(
    columns: Mapping[str, Column], initializer: Initializer, optimizer: Optimizer, table: str
) -> tuple[dict[str, slice], ColumnInitializer, ColumnOptimizer]:
    """Where each column lies in a row, and what makes and updates the rows."""
    if not columns:
        raise InvalidArgument("no columns", table=table, remedy="name at least one, or give dim")
    places: dict[str, slice] = {}
    at = 0
    for name, column in columns.items():
        places[name] = slice(at, at + column.dim)
        at += column.dim
    rules = tuple((c.dim, c.optimizer or optimizer) for c in columns.values())
    named = tuple(f"{n}:{dim}:{type(rule).__name__}" for n, (dim, rule) in zip(columns, rules, strict=True))
    first = tuple((name, c.dim, c.initializer or initializer) for name, c in columns.items())
    return places, ColumnInitializer(first), ColumnOptimizer(named, rules)


def draws(initializer: Initializer, table: str, dim: int) -> list[tuple[str, float, float, int, int, int]] | None:
    """Rows as `hbkit._ext.slabs.Slabs.fill` draws them, None where the initializer is another's."""
    if isinstance(initializer, ColumnInitializer):
        out, at = [], 0
        for name, width, part in initializer.columns:
            some = draws(part, f"{table}/{name}", width)
            if some is None:
                return None
            out += [(*draw[:4], draw[4] + at, draw[5]) for draw in some]
            at += width
        return out
    return (
        [initializer.draw(table, 0, dim)] if type(initializer) in (Constant, Normal, TruncatedNormal, Uniform) else None
    )
