"""A column that Arrow decoded, as a field asks for it: of codecs and types that are not ours to decode, and of ORC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors, ragged
from hbkit._ext import hash as _hash
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.schema import MAX_DECIMAL_DIGITS
from hbkit.parquet.source import unreadable
from hbkit.parquet.values import Place, cast, null_text, null_value, one_a_row, refuse_nulls, shaped
from hbkit.ragged import Column, Ragged, Strings

__all__ = ["Ranges", "column_type", "decode", "is_plain", "rows_of", "to_arrow"]

Ranges: TypeAlias = "Sequence[tuple[int, int]]"  # first row and the one behind the last, rising

_STRINGS = (
    "is_string",
    "is_large_string",
    "is_string_view",
    "is_binary",
    "is_large_binary",
    "is_binary_view",
    "is_fixed_size_binary",
)
_LISTS = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")


def _is_list(t: pa.DataType) -> bool:
    return any(getattr(pa.types, name)(t) for name in _LISTS)


def _storage(t: pa.DataType) -> pa.DataType:
    """A type without its extension or dictionary dress."""
    while isinstance(t, pa.BaseExtensionType) or pa.types.is_dictionary(t):
        t = t.value_type if pa.types.is_dictionary(t) else t.storage_type
    return t


def column_type(field: pa.Field) -> ColumnType:
    """The ``ColumnType`` of an Arrow field; where it cannot be read, ``unsupported`` says why."""
    t, rank, nullable = _storage(field.type), 0, bool(field.nullable)
    while _is_list(t):
        nullable |= bool(t.value_field.nullable)
        t, rank = _storage(t.value_type), rank + 1
    types = pa.types
    if types.is_boolean(t) or types.is_integer(t) or types.is_floating(t):
        dtype, logical = np.dtype(t.to_pandas_dtype()).name, ""
    elif types.is_date(t) or types.is_time(t) or types.is_timestamp(t) or types.is_duration(t):
        dtype, logical = f"int{t.bit_width}", str(t)
    elif types.is_decimal(t):
        dtype, logical = "int64", f"decimal(scale={t.scale})"
        if t.precision > MAX_DECIMAL_DIGITS:
            return ColumnType("", rank, nullable, unsupported=f"{t} does not fit 64 bits")
    elif any(getattr(types, name)(t) for name in _STRINGS):
        dtype, logical = "string", ""
    else:
        what = next((n for n in ("struct", "map", "union", "null") if getattr(types, f"is_{n}")(t)), str(t))
        return ColumnType("", rank, nullable, unsupported=f"{what} columns are not supported")
    return ColumnType(dtype, rank, nullable, logical)


def decode(array: pa.ChunkedArray, field: Field, stored: ColumnType, place: Place) -> Column:
    """The rows of an Arrow column as ``field`` asks for them.

    Raises
    ------
    NullFound
        There are nulls and ``field.null`` is "error".
    SchemaMismatch
        A value does not fit the dtype or ragged rank asked for.
    Corrupt
        The array is damaged.
    """
    out = field.output(stored, place.get("file"))
    chunks = array.chunks or [pa.array([], array.type)]
    try:
        return ragged.concat([_decode(chunk, field, stored, out, place) for chunk in chunks])
    except errors.HbkitError:
        raise
    except Exception as e:
        raise unreadable(e, "the column", **place) from e


def _decode(array: pa.Array, field: Field, stored: ColumnType, out: ColumnType, place: Place) -> Column:
    n_rows, n_nulls = len(array), 0
    splits: list[np.ndarray[Any, Any]] = []
    array = _plain(array)
    while _is_list(array.type):
        n_nulls += array.null_count
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        splits.append(_splits(_numpy(lengths)))
        array = _plain(array.flatten())
    if len(splits) == 1 and field.ragged_rank == 0:
        first = pa.array(splits[0][:-1], mask=~one_a_row(splits[0], place))
        array, splits, n_nulls = array.take(first), [], 0
    n_nulls += array.null_count
    refuse_nulls(n_nulls, n_rows, field, place)
    valid = None
    if array.null_count:
        valid = _numpy(array.is_valid())
        if field.null == "empty" and (splits or stored.dtype != "string"):
            kept = _splits(valid)
            splits.append(kept[splits.pop()] if splits else kept)
            array, valid = array.drop_null(), None
    values = _values(array, field, stored, out, valid, place)
    return shaped(Ragged(values, tuple(splits)) if splits else values, field, out)


def _plain(array: pa.Array) -> pa.Array:
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        elif pa.types.is_struct(array.type) and array.type.num_fields == 1:  # one leaf of it was read
            array = array.flatten()[0]
        elif pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        else:
            return array


def _splits(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _numpy(array: pa.Array) -> np.ndarray[Any, Any]:
    return array.to_numpy(zero_copy_only=False)


def _values(
    array: pa.Array, field: Field, stored: ColumnType, out: ColumnType, valid: np.ndarray[Any, Any] | None, place: Place
) -> Any:
    """The innermost values, cast or hashed; where ``valid`` is false, the field's default (or an empty string)."""
    if stored.dtype == "string":
        strings = _strings(array, null_text(field, place) if valid is not None else b"")
        if not field.hash_to:
            return strings
        return _hash.hash_bytes(strings.data, strings.row_splits, field.hash_seed)
    values = _fixed(array, stored, place)
    if field.hash_to:
        values = _hash.hash_ints(np.ascontiguousarray(values.astype(np.int64)), field.hash_seed)
    else:
        if valid is not None:
            values[~valid] = 0  # what lies under a null is undefined and must not fail the cast
        scale = array.type.scale if pa.types.is_decimal(array.type) else 0
        values = cast(values, np.dtype(out.dtype), scale, place)
    if valid is not None:
        values[~valid] = null_value(field, out.dtype, place)
    return values


def _strings(array: pa.Array, null: bytes) -> Strings:
    if array.null_count:
        array = array.cast(pa.large_binary()).fill_null(null)
    shared = Strings.from_arrow(array)
    return Strings(shared.data.copy(), shared.row_splits)


def _fixed(array: pa.Array, stored: ColumnType, place: Place) -> np.ndarray[Any, Any]:
    """Fixed-width values in memory of their own, nulls undefined: an integer for dates, times and decimals."""
    dtype = np.dtype(stored.dtype)
    if dtype == np.bool_:
        return np.array(_numpy(array.fill_null(False) if array.null_count else array), np.bool_)
    data = array.buffers()[1]
    if data is None or len(array) == 0:
        return np.zeros(len(array), dtype)
    if pa.types.is_decimal(array.type):
        n_words = array.type.bit_width // 64
        if not n_words:  # decimal32
            return np.frombuffer(data, np.int32)[array.offset : array.offset + len(array)].astype(np.int64)
        words = np.frombuffer(data, np.int64).reshape(-1, n_words)[array.offset : array.offset + len(array)]
        low = words[:, 0].copy()
        valid = _numpy(array.is_valid())
        if ((words[:, 1:] != (low >> 63)[:, None]).any(axis=1) & valid).any():
            raise errors.Corrupt(
                f"a value has more digits than {array.type} allows", remedy="write the file again", **place
            )
        return low
    return np.frombuffer(data, dtype)[array.offset : array.offset + len(array)].copy()


def is_plain(stored: ColumnType, kind: pa.DataType) -> bool:
    """Whether `to_arrow` makes arrays of this Arrow type from such a column."""
    types = pa.types
    if stored.dtype == "string":
        return types.is_string(kind) or types.is_binary(kind)
    if not stored.logical:
        plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
        return plain and np.dtype(kind.to_pandas_dtype()) == stored.dtype
    return stored.logical == str(kind) and not types.is_decimal(kind)


def to_arrow(values: Any, mask: Any, kind: pa.DataType) -> pa.Array:
    """Decoded values as an Arrow array of a type that `is_plain`; null where the mask is false."""
    if isinstance(values, np.ndarray) and values.dtype == np.bool_:
        return pa.array(values, mask=~mask)
    valid = pa.py_buffer(np.packbits(mask, bitorder="little"))
    if isinstance(values, Strings):
        buffers = [valid, pa.py_buffer(values.row_splits), pa.py_buffer(values.data)]
        return pa.Array.from_buffers(pa.large_binary(), len(values), buffers).cast(kind)
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(values)])


def rows_of(table: pa.Table, ranges: Ranges | None) -> pa.Table:
    """The rows of a table in these ranges; all of them where ranges is None."""
    return table if ranges is None else pa.concat_tables([table.slice(a, b - a) for a, b in ranges])
