"""Descriptions: a collection as JSON, without its rows, and a new collection made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hbkit.embedding import eviction, initializers, optimizers
from hbkit.embedding.collection import Collection
from hbkit.embedding.table import Table
from hbkit.errors import SchemaMismatch, Unsupported
from hbkit.store.host import HostStore

__all__ = ["build", "describe"]

# What a description may name: it is data, and data runs no code.
CLASSES: dict[str, Any] = {
    name: getattr(module, name) for module in (eviction, initializers, optimizers) for name in module.__all__
}
PLAIN = ("name", "dim", "dtype", "key_dtype", "padding_key", "nonfinite", "evict_every")


def describe(collection: Collection) -> dict[str, Any]:
    """Tables, features and pooling as JSON values; `build` makes a collection of them, without rows.

    Raises
    ------
    Unsupported
        A table has more than JSON can say: another store than host memory, an admission filter, named columns,
        ``on_evict``, or a function for a learning rate.
    """
    return {
        "tables": [_describe(table) for table in collection.tables.values()],
        "features": dict(collection.features),
        "pooling": dict(collection.pooling),
    }


def _describe(table: Table) -> dict[str, Any]:
    parts = {
        "a store other than host memory": not isinstance(table.store, HostStore),
        "an admission filter": table.admission is not None,
        "named columns": bool(table.split(np.empty((0, table.dim)))),
        "on_evict": table.on_evict is not None,
    }
    for what, there in parts.items():
        if there:
            raise _refused(f"a table with {what}", table.name)
    default: Any = 0.0
    if table.default is not None:
        default = (
            table.default.tolist() if isinstance(table.default, np.ndarray) else _encode(table.default, table.name)
        )
    return {
        **{name: getattr(table, name) for name in PLAIN},
        "initializer": _encode(table.initializer, table.name),
        "optimizer": _encode(table.optimizer, table.name),
        "eviction": [_encode(rule, table.name) for rule in table.eviction],
        "default": default,
    }


def _encode(value: Any, table: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_encode(v, table) for v in value]
    if CLASSES.get(name := type(value).__name__) is not type(value):
        raise _refused(f"{value!r:.80}", table)
    fields = {f.name: _encode(getattr(value, f.name), table) for f in dataclasses.fields(value)}
    return {"class": name, **fields}


def _refused(what: str, table: str) -> Unsupported:
    return Unsupported(
        f"{what} in a description", table=table, remedy="make the collection in your program, and load its rows"
    )


def build(description: Mapping[str, Any]) -> Collection:
    """A collection as `describe` gave it: its tables are new, in host memory, and empty.

    Raises
    ------
    SchemaMismatch
        It is no such description.
    """
    try:
        tables = [Table(**{name: _decode(value) for name, value in table.items()}) for table in description["tables"]]
        return Collection(tables, description["features"], description["pooling"])
    except (KeyError, TypeError, AttributeError) as e:
        raise SchemaMismatch(f"no description of a collection: {e!r}", remedy="give what describe gave") from e


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if isinstance(value, Mapping):
        return CLASSES[value["class"]](**{name: _decode(v) for name, v in value.items() if name != "class"})
    return value
