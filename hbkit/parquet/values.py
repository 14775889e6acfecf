"""What a field makes of values, whoever decoded them: casts, defaults, nulls refused, lists of one and padding."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from hbkit import errors
from hbkit._ext import hash as _hash
from hbkit.parquet.field import ColumnType, Field
from hbkit.ragged import Column, Ragged, Strings

__all__ = ["Place", "cast", "missing", "null_text", "null_value", "one_a_row", "refuse_nulls", "shaped"]

Place = dict[str, Any]  # what an error names: file, column, row_group


def refuse_nulls(n_nulls: int, n_rows: int, field: Field, place: Place) -> None:
    """Raise NullFound if there are nulls and the field allows none."""
    if n_nulls and field.null == "error":
        raise errors.NullFound(
            f"{n_nulls} of {n_rows} rows or values are null", remedy="set Field(null='default' or 'empty')", **place
        )


def one_a_row(splits: npt.NDArray[np.int64], place: Place) -> npt.NDArray[np.bool_]:
    """Which lists hold a value, where lists are read as one value a row and an empty one is a null.

    Raises
    ------
    SchemaMismatch
        One holds more.
    """
    lengths = np.diff(splits)
    if len(lengths) and lengths.max() > 1:
        raise errors.SchemaMismatch(
            f"a row holds {lengths.max()} values where ragged_rank=0 allows one",
            remedy="leave ragged_rank out, or use pad_to=1 to keep the first",
            **place,
        )
    return lengths == 1


def shaped(column: Any, field: Field, out: ColumnType) -> Column:
    """A decoded column as lists of one, where a plain one was asked for as lists, and padded, where that was asked."""
    if not isinstance(column, Ragged) and out.ragged_rank + (out.pad_to is not None) == 1:
        column = Ragged._trusted(column, (np.arange(len(column) + 1, dtype=np.int64),))
    return column if out.pad_to is None else column.to_padded(out.pad_to, truncate=field.truncate)


def cast(values: np.ndarray[Any, Any], to: np.dtype[Any], scale: int, place: Place) -> np.ndarray[Any, Any]:
    """Values as another dtype; raises where one does not fit. Rounding to a narrower float is not a misfit."""
    have = values.dtype
    if scale and to.kind == "f":
        with np.errstate(over="ignore"):
            return _finite(values, (values / 10.0**scale).astype(to), to, place)
    if have == to:
        return values
    if to.kind == "b":
        bad = (values != 0) & (values != 1)
    elif to.kind in "iu" and have.kind == "f":
        x, end = values.astype(np.float64), 2.0 ** (to.itemsize * 8 - (to.kind == "i"))
        bad = ~((x >= (-end if to.kind == "i" else 0)) & (x < end) & (np.trunc(x) == x))
    elif to.kind in "iu" and have.kind in "iu":
        lo_int, hi_int = int(np.iinfo(to).min), int(np.iinfo(to).max)
        bad = np.zeros(len(values), np.bool_)
        if int(np.iinfo(have).min) < lo_int:
            bad |= values < lo_int
        if int(np.iinfo(have).max) > hi_int:
            bad |= values > hi_int
    elif to.kind == "f":
        with np.errstate(over="ignore"):
            return _finite(values, values.astype(to), to, place)
    else:
        bad = np.zeros(len(values), np.bool_)
    if bad.any():
        _misfit(values[bad][0], to, place)
    return values.astype(to)


def _finite(
    values: np.ndarray[Any, Any], narrow: np.ndarray[Any, Any], to: np.dtype[Any], place: Place
) -> np.ndarray[Any, Any]:
    bad = np.isinf(narrow)
    if values.dtype.kind == "f":
        bad &= np.isfinite(values)
    if bad.any():
        _misfit(values[bad][0], to, place)
    return narrow


def _misfit(value: Any, to: np.dtype[Any], place: Place) -> NoReturn:
    raise errors.SchemaMismatch(f"value {value} does not fit {to}", remedy="ask for a wider dtype", **place)


def null_text(field: Field, place: Place) -> bytes:
    """What stands for a null string."""
    return b"" if field.null == "empty" else _default_text(field, place)


def null_value(field: Field, dtype: str, place: Place) -> Any:
    """What stands for a null, as one NumPy value of the column's dtype; hashed where the field hashes."""
    if field.null == "empty":  # of a hashed string: no other null stays a value
        return _hash_text(b"", field)
    return _default_value(field, dtype, place)


def _default_value(field: Field, dtype: str, place: Place) -> Any:
    default = field.default
    try:
        if field.hash_to and isinstance(default, (str, bytes)):
            return _hash_text(_default_text(field, place), field)
        if field.hash_to:
            return _hash.hash_ints(np.array([default], np.int64), field.hash_seed)[0]
        if isinstance(default, (str, bytes)):
            raise TypeError
        return cast(np.array([default]), np.dtype(dtype), 0, place)[0]
    except (TypeError, ValueError, OverflowError) as e:
        raise errors.InvalidArgument(
            f"default {default!r} does not suit {dtype}", remedy="give default= in the column's type", **place
        ) from e


def _default_text(field: Field, place: Place) -> bytes:
    if isinstance(field.default, str):
        return field.default.encode()
    if isinstance(field.default, bytes):
        return field.default
    raise errors.InvalidArgument(
        f"default {field.default!r} is no string", remedy="give default= as str or bytes", **place
    )


def _hash_text(text: bytes, field: Field) -> np.int64:
    keys: npt.NDArray[np.int64] = _hash.hash_bytes(
        np.frombuffer(text, np.uint8), np.array([0, len(text)], np.int64), field.hash_seed
    )
    return keys[0]


def missing(n_rows: int, field: Field, out: ColumnType, place: Place) -> Column:
    """The column of a file that lacks it: every row ``field.default``, or every row an empty list.

    Raises
    ------
    UnknownColumn
        Neither a default nor ``null="empty"`` says what to put there.
    """
    if field.default is None and field.null != "empty":
        raise errors.UnknownColumn(
            f"column {field.name!r} is not in the file", remedy="set Field(default=...) or leave it out", **place
        )
    if out.ragged_rank or out.pad_to is not None:
        if out.pad_to is not None:
            return np.zeros((n_rows, out.pad_to), out.dtype)
        none: Any = Strings.from_list([]) if out.dtype == "string" else np.zeros(0, out.dtype)
        inner = [np.zeros(1, np.int64)] * (out.ragged_rank - 1)
        return Ragged(none, (np.zeros(n_rows + 1, np.int64), *inner))
    if out.dtype == "string":
        text = _default_text(field, place) if field.default is not None else b""
        return Strings(np.frombuffer(text * n_rows, np.uint8).copy(), np.arange(n_rows + 1, dtype=np.int64) * len(text))
    value = null_value if field.default is None else _default_value
    return np.full(n_rows, value(field, out.dtype, place), out.dtype)
