"""A table as a snapshot sees it, and which commits it descends from: its store marks them by their digests."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hbkit.store.base import Store
from hbkit.store.line import Int64s, Part, Rule


class TableLike(Protocol):
    """What `save` and `load` use of a `hbkit.embedding.Table`."""

    step: int
    pending: Any  # what goes on with it in the background, None, or a `hbkit.snapshot.Saving`

    @property
    def name(self) -> str:
        """Unique among the tables of a snapshot."""
        ...

    @property
    def dim(self) -> int:
        """Floats of a row."""
        ...

    @property
    def dtype(self) -> str:
        """Type of the rows."""
        ...

    @property
    def key_dtype(self) -> str:
        """How keys are shown."""
        ...

    @property
    def store(self) -> Store:
        """Where the rows live."""
        ...

    @property
    def optimizer(self) -> Rule:
        """What the state beside each row belongs to."""
        ...

    @property
    def initializer(self) -> Any:
        """A dataclass."""
        ...

    @property
    def default(self) -> Any:
        """What keys without a row read: float32[dim], a dataclass that draws it, or None for zeros."""
        ...

    @property
    def padding_key(self) -> int | None:
        """The key that reads zeros whatever the default is."""
        ...

    @property
    def admission(self) -> Any:
        """A filter with ``state()`` and ``load_state(columns)``, or None."""
        ...


def config(part: Any) -> dict[str, Any]:
    """Class name and fields of an optimizer or initializer, for JSON."""
    values = dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else {}
    return {**{k: _plain(v) for k, v in values.items()}, "name": type(part).__name__}


def default_config(default: Any) -> Any:
    """A table's default for JSON: as `config`, a list of floats, or one where all are the same; None for zeros."""
    if not isinstance(default, np.ndarray):
        return None if default is None else config(default)
    return float(default[0]) if (default == default[0]).all() else default.tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    finite = isinstance(value, float) and math.isfinite(value)
    return value if finite or value is None or isinstance(value, int | str) else repr(value)


EVERYTHING, NOTHING = Part(), Part(0, 0)


def saved(table: TableLike, rank: int, size: int) -> Part:
    """Of which keys a rank writes the rows: its own, but all or none of a table that is not spread by key."""
    where = getattr(table, "placement", None)
    if size == 1 or where is None or isinstance(where, np.ndarray):
        return Part.share(rank, size, bits=10)
    return EVERYTHING if rank == (where if isinstance(where, int) else 0) else NOTHING


def held(table: TableLike, rank: int, size: int, keys: Int64s) -> npt.NDArray[np.bool_]:
    """Which keys a rank is to hold, those that are replicated among them: bool[n]."""
    where = getattr(table, "placement", None)
    if isinstance(where, str):
        return np.ones(len(keys), np.bool_)
    own = saved(table, rank, size).has(keys)
    return own | np.isin(keys, where) if isinstance(where, np.ndarray) else own


def mark(digest: str, part: Part = EVERYTHING) -> str:
    """What a mark goes by: a commit's rows of a part of all keys."""
    return digest if part == EVERYTHING else f"{digest} {part.first}-{part.last}"


def descend(table: TableLike, digest: str, part: Part = EVERYTHING) -> None:
    """Note that the rows of `table` are now what this commit holds of a part. Nothing else may use it meanwhile."""
    changes = table.store.changes
    changes.name(changes.mark(table.store.latest_step()), mark(digest, part))


def forget(table: TableLike) -> None:
    """Note that the rows of `table` are replaced."""
    table.store.changes.forget()
