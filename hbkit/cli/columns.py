"""Which columns of a data set a model takes, and how: named by the user or inferred from the schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hbkit.data import Field
from hbkit.errors import InvalidArgument, UnknownColumn
from hbkit.parquet import ColumnType
from hbkit.ragged import Ragged

__all__ = ["Columns", "choose"]


@dataclass(frozen=True)
class Columns:
    """The chosen columns.

    Attributes
    ----------
    label : str, or list of str if there are several
    dense, sparse : list of str
    fields : list of Field
        How to read them all.
    left_out : dict of str to str
        Column to why it is not used.
    newest : dict of str to int
        List column to how many of its keys are used, the last ones.
    """

    label: str | list[str]
    dense: list[str]
    sparse: list[str]
    fields: list[Field]
    left_out: dict[str, str] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The label, or all of them."""
        return [self.label] if isinstance(self.label, str) else self.label

    def cut(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns of a batch, those of `newest` as long as they may be."""
        return columns | {name: _last(columns[name], n) for name, n in self.newest.items()}

    def describe(self) -> dict[str, str]:
        """What was chosen, in words: for people."""
        ragged = {f.name for f in self.fields if f.ragged_rank == 1}
        text = {
            "label": ", ".join(self.labels),
            f"dense ({len(self.dense)})": ", ".join(self.dense) or "-",
            f"sparse ({len(self.sparse)})": ", ".join(f"{n}:ragged" if n in ragged else n for n in self.sparse) or "-",
        }
        if self.left_out:
            text["left out"] = ", ".join(f"{n} ({why})" for n, why in self.left_out.items())
        return text


def choose(
    schema: Mapping[str, ColumnType],
    unsupported: Mapping[str, str],
    label: str | Sequence[str],
    dense: Sequence[str] = (),
    sparse: Sequence[str] = (),
) -> Columns:
    """Choose columns by name, or by type where neither `dense` nor `sparse` names any.

    Floats are dense (0 stands for a missing one; a list of floats must hold at most one), integers, booleans and
    strings are sparse keys (strings by their hash; -1 or "" stands for a missing one), lists of those are ragged.
    Dates, times, decimals and lists of lists are left out unless named.

    Parameters
    ----------
    label : str, or a sequence of several
    sparse : sequence of str
        ``name`` or ``name:ragged``.

    Raises
    ------
    UnknownColumn
        A named column does not exist.
    InvalidArgument
        A column is named twice, or its type does not suit.
    """
    known = ", ".join(schema) or "none"
    labels = [label] if isinstance(label, str) else list(label)
    names = [s.removesuffix(":ragged") for s in sparse]
    for name in (*labels, *dense, *names):
        if name not in schema:
            why = unsupported.get(name)
            raise UnknownColumn(
                f"column {name!r} cannot be read: {why}" if why else f"there is no column {name!r}",
                remedy=f"columns are {known}",
            )
    if len({*labels, *dense, *names}) != len(labels) + len(dense) + len(names):
        raise InvalidArgument("a column is named twice among label, dense and sparse", remedy="name each once")
    fields, left_out = [Field(name, dtype="float32", ragged_rank=0) for name in labels], dict(unsupported)
    for name in labels:
        if schema[name].dtype == "string" or schema[name].ragged_rank > 1:
            raise InvalidArgument(
                f"a label of type {_type(schema[name])}", column=name, remedy="give a numeric column, 0 or 1 a row"
            )
    inferred = not dense and not sparse
    chosen_dense, chosen_sparse = list(dense), list(names)
    for name, kind in schema.items():
        if name in labels:
            continue
        if inferred and not kind.logical and kind.ragged_rank < 2:
            (chosen_dense if kind.dtype.startswith("float") else chosen_sparse).append(name)
        elif name not in dense and name not in names:
            left_out[name] = "not named" if not inferred else f"{_type(kind)}; name it to use it"
    for name in chosen_dense:
        kind = schema[name]
        if kind.dtype == "string" or kind.ragged_rank > 1:
            raise InvalidArgument(f"{_type(kind)} is not dense", column=name, remedy="name it in --sparse")
        fields.append(Field(name, dtype="float32", ragged_rank=0, null="default", default=0.0))
    for name in chosen_sparse:
        kind = schema[name]
        if kind.dtype.startswith("float") or kind.ragged_rank > 1:
            raise InvalidArgument(
                f"{_type(kind)} has no keys", column=name, remedy="name it in --dense or leave it out"
            )
        if f"{name}:ragged" in sparse and kind.ragged_rank == 0:
            raise InvalidArgument("the column holds no lists", column=name, remedy=f"write {name} without ':ragged'")
        fields.append(key_field(name, kind))
    return Columns(labels[0] if len(labels) == 1 else labels, chosen_dense, chosen_sparse, fields, left_out)


def key_field(name: str, kind: ColumnType) -> Field:
    """How a column of keys, or of lists of keys, is read."""
    string = kind.dtype == "string"
    dtype = None if string or kind.dtype == "uint64" else "int64"
    hashed: Literal["int64"] | None = "int64" if string else None
    if kind.ragged_rank:
        return Field(name, dtype=dtype, ragged_rank=1, null="empty", hash_to=hashed)
    missing = "" if string else 2**64 - 1 if kind.dtype == "uint64" else -1
    return Field(name, dtype=dtype, null="default", default=missing, hash_to=hashed)


def sequences(columns: Columns, pairs: Sequence[str]) -> dict[str, str]:
    """Each column of past behaviour to the key column that it is weighed by, from ``behaviour:target``.

    Raises
    ------
    InvalidArgument
        A text is no such pair; or the two are not a chosen column of lists and one of single keys, of one type.
    """
    fields = {f.name: f for f in columns.fields if f.name in columns.sparse}
    found = {}
    for pair in pairs:
        name, _, target = pair.partition(":")
        for column, rank, what in ((name, 1, "lists of keys"), (target, 0, "one key a row")):
            if column not in fields or (fields[column].ragged_rank or 0) != rank:
                raise InvalidArgument(
                    f"{column!r} is no chosen column of {what}",
                    remedy="write --sequence BEHAVIOUR:TARGET, such as clicked_items:item, and name both in --sparse",
                )
        if (fields[name].dtype, fields[name].hash_to) != (fields[target].dtype, fields[target].hash_to):
            raise InvalidArgument(
                f"its keys are of another type than those of {target!r}",
                column=name,
                remedy="give columns of one type: they share a table",
            )
        found[name] = target
    return found


def _last(lists: Ragged, n: int) -> Ragged:
    """The last n values of each list, or all where there are no more."""
    splits, values = lists.row_splits[0], np.asarray(lists.values)
    lengths = np.minimum(np.diff(splits), n)
    new = np.append(0, np.cumsum(lengths))
    return Ragged(values[np.repeat(splits[1:] - new[1:], lengths) + np.arange(new[-1])], new)


def _type(kind: ColumnType) -> str:
    return "list of " * kind.ragged_rank + (kind.logical or kind.dtype)
