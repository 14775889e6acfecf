"""One column as a field asks for it: what the decoder is told, and what is left to do with what it gives.

The decoder makes row splits, deals with nulls and hashes; casts, padding, and lists read as plain values come after it.
A column that another reader decoded arrives as an Arrow array and takes the same way from its values on.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbkit import errors, ragged
from hbkit._ext import chunk as _chunk
from hbkit._ext import hash as _hash
from hbkit.parquet.field import ColumnType, Field
from hbkit.parquet.schema import Leaf
from hbkit.ragged import Column, Dictionary, Ragged, Strings

__all__ = ["Column", "Decoding", "column_type", "decode", "missing"]

Place = dict[str, Any]

_MAX_DECIMAL_DIGITS = 18  # 10**18 fits int64, 10**19 does not
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
        if t.precision > _MAX_DECIMAL_DIGITS:
            return ColumnType("", rank, nullable, unsupported=f"{t} does not fit 64 bits")
    elif any(getattr(types, name)(t) for name in _STRINGS):
        dtype, logical = "string", ""
    else:
        what = next((n for n in ("struct", "map", "union", "null") if getattr(types, f"is_{n}")(t)), str(t))
        return ColumnType("", rank, nullable, unsupported=f"{what} columns are not supported")
    return ColumnType(dtype, rank, nullable, logical)


class Decoding:
    """How the native decoder reads a leaf for a field: one for a field and a file.

    Attributes
    ----------
    form : hbkit._ext.chunk.Form
    dtype : numpy.dtype or None
        Of the decoder's values; None for strings.
    rank : int
        Lists a row nests in what the decoder gives.
    """

    def __init__(self, leaf: Leaf, field: Field, place: Place) -> None:
        stored = leaf.kind
        self.field, self.stored, self.place = field, stored, place
        self.out = field.output(stored, place.get("file"))
        text = stored.dtype == "string"
        # an empty list read as a plain value is a null, which the decoder cannot know
        self._squeezes = field.ragged_rank == 0 and stored.ragged_rank == 1
        null: str = field.null
        if self._squeezes or (null == "empty" and text and not stored.ragged_rank):
            null = "default"
        self._casts = self.out.dtype != stored.dtype and not field.hash_to
        self._scale = leaf.scale if self.out.dtype.startswith("float") else 0
        self.with_mask = self._squeezes or (self._casts and null == "default")
        self.rank = stored.ragged_rank or int(null == "empty")
        self.dtype = None if text and not field.hash_to else np.dtype("int64" if field.hash_to else stored.dtype)
        fill = b""
        if self.dtype is not None:
            fill = bytes(self.dtype.itemsize)
        if null == "default" and not self.with_mask:
            fill = self.dtype.type(self._default()).tobytes() if self.dtype is not None else self._default_text()
        self.form = _chunk.Form(
            leaf.physical,
            leaf.type_length,
            leaf.max_def,
            leaf.thresholds,
            leaf.is_null,
            _conversion(leaf, field),
            leaf.bits,
            leaf.is_signed,
            1 if self.dtype is None else self.dtype.itemsize,
            null,
            fill,
            field.hash_seed,
        )
        self._null, self._fill = null, fill

    def _default(self) -> Any:
        """What stands for a null, as one value of the output's dtype."""
        if self.field.null == "empty":  # of a hashed plain string: as the empty string
            return _hash.hash_bytes(np.zeros(0, np.uint8), np.zeros(2, np.int64), self.field.hash_seed)[0]
        return default_value(self.field, self.out.dtype, self.place)

    def _default_text(self) -> bytes:
        return b"" if self.field.null == "empty" else _default_bytes(self.field, self.place)

    def output(self, limit_nbytes: int, past_cache: bool = False, dictionary: bool = False) -> Any:
        """An empty `hbkit._ext.chunk.Output` for the decoder: of values, or of codes and their dictionary."""
        if not dictionary:
            return _chunk.Output(self.dtype, self.rank, limit_nbytes, self.with_mask, past_cache)
        if self._casts or self._squeezes or self.out.pad_to is not None or self.out.ragged_rank != self.rank:
            raise errors.Unsupported(
                "a dictionary is read as it is stored",
                remedy="leave dtype, ragged_rank and pad_to out, or dictionary=True",
                **self.place,
            )
        entries = _chunk.Output(self.dtype, 0, limit_nbytes)
        if self._null == "default":
            entries.append(self._fill)  # code 0 stands for nulls
        return _chunk.Output(np.dtype(np.uint32), self.rank, limit_nbytes, False, past_cache, entries)

    def finish(self, output: Any, place: Place) -> Any:
        """The column that the field asks for, or a Dictionary, of what was decoded.

        Raises
        ------
        NullFound, SchemaMismatch
        """
        field, n_rows, n_nulls = self.field, output.n_rows, output.n_nulls
        values, splits, mask = output.finish()
        if output.dictionary is not None:
            self.check_nulls(n_nulls, n_rows, place)
            entries, _, _ = output.dictionary.finish()
            codes = Ragged._trusted(values, splits) if splits else values
            return Dictionary(Strings._trusted(*entries) if self.dtype is None else entries, codes)
        if self._squeezes:
            values, mask, n_nulls = self._squeeze(values, splits[0], mask, place)
            splits = ()
        self.check_nulls(n_nulls, n_rows, place)
        if self.dtype is None:
            values = Strings._trusted(*values)
        elif self._casts:
            values = _cast(values, np.dtype(self.out.dtype), self._scale, place)
        if mask is not None and not mask.all():
            values[~mask] = default_value(field, self.out.dtype, place)
        if not splits and self.out.ragged_rank + (self.out.pad_to is not None) == 1:
            splits = (np.arange(n_rows + 1, dtype=np.int64),)
        if not splits:
            return values
        column = Ragged._trusted(values, splits)
        return column if self.out.pad_to is None else column.to_padded(self.out.pad_to, truncate=field.truncate)

    def check_nulls(self, n_nulls: int, n_rows: int, place: Place) -> None:
        """Raise NullFound if there are nulls and the field allows none."""
        if n_nulls and self.field.null == "error":
            raise errors.NullFound(
                f"{n_nulls} of {n_rows} rows or values are null",
                remedy="set Field(null='default' or 'empty')",
                **place,
            )

    def _squeeze(self, values: Any, splits: Any, mask: Any, place: Place) -> tuple[Any, Any, int]:
        """Lists of at most one value as one value a row; an empty list is a null."""
        lengths = np.diff(splits)
        if len(lengths) and lengths.max() > 1:
            raise errors.SchemaMismatch(
                f"a row holds {lengths.max()} values where ragged_rank=0 allows one",
                remedy="leave ragged_rank out, or use pad_to=1 to keep the first",
                **place,
            )
        valid = lengths == 1
        valid[valid] = mask
        n_nulls = len(valid) - int(np.count_nonzero(valid))
        if self.dtype is None:
            strings = Strings(*values)
            text = self._default_text() if n_nulls and self.field.null != "error" else b""
            sizes = np.full(len(valid), len(text))
            sizes[valid] = strings.lengths()[mask]
            ends = _splits(sizes)
            out = np.empty(ends[-1], np.uint8)
            inside = np.repeat(valid, sizes)
            out[inside] = strings.data
            out[~inside] = np.tile(np.frombuffer(text, np.uint8), n_nulls)
            return (out, ends), None, n_nulls
        dense = np.zeros(len(valid), values.dtype)
        dense[valid] = values[mask]
        if self.field.null == "empty":  # of a hashed string
            dense[~valid] = self._default()
            return dense, None, n_nulls
        return dense, valid if self.field.null == "default" else None, n_nulls


def _conversion(leaf: Leaf, field: Field) -> str:
    """A key of `hbkit._ext.chunk.CONVERSIONS`."""
    if leaf.kind.dtype == "string":
        return "hash_bytes" if field.hash_to else "strings"
    if field.hash_to:
        return "hash_int"
    if leaf.kind.logical.startswith("decimal"):
        return {1: "resize", 2: "copy"}.get(leaf.physical, "decimal")
    return "resize" if leaf.physical == 1 and leaf.kind.dtype not in ("int32", "uint32") else "copy"


def decode(array: pa.ChunkedArray, field: Field, stored: ColumnType, place: Place) -> Column:
    """The rows of an Arrow column as ``field`` asks for them.

    Raises
    ------
    NullFound
        There are nulls and ``field.null`` is "error".
    SchemaMismatch
        A value does not fit the dtype or ragged rank asked for.
    """
    out = field.output(stored, place.get("file"))
    chunks = array.chunks or [pa.array([], array.type)]
    parts = [_decode(chunk, field, stored, out, place) for chunk in chunks]
    return parts[0] if len(parts) == 1 else ragged.concat(parts)


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
        array, splits, n_nulls = _squeeze(array, splits[0], place), [], 0
    n_nulls += array.null_count
    if n_nulls and field.null == "error":
        raise errors.NullFound(
            f"{n_nulls} of {n_rows} rows or values are null", remedy="set Field(null='default' or 'empty')", **place
        )
    valid = None
    if array.null_count:
        valid = _numpy(array.is_valid())
        if field.null == "empty" and (splits or stored.dtype != "string"):
            kept = _splits(valid)
            splits.append(kept[splits.pop()] if splits else kept)
            array, valid = array.drop_null(), None
    if not splits and out.ragged_rank + (out.pad_to is not None) == 1:
        splits = [np.arange(n_rows + 1, dtype=np.int64)]
    values = _values(array, field, stored, out, valid, place)
    if not splits:
        return values
    column = Ragged(values, tuple(splits))
    return column if out.pad_to is None else column.to_padded(out.pad_to, truncate=field.truncate)


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


def _squeeze(array: pa.Array, splits: np.ndarray[Any, Any], place: Place) -> pa.Array:
    """Lists of at most one value as one value a row; an empty list is a null."""
    lengths = np.diff(splits)
    if len(lengths) and lengths.max() > 1:
        raise errors.SchemaMismatch(
            f"a row holds {lengths.max()} values where ragged_rank=0 allows one",
            remedy="leave ragged_rank out, or use pad_to=1 to keep the first",
            **place,
        )
    return array.take(pa.array(splits[:-1], mask=lengths == 0))


def _values(
    array: pa.Array, field: Field, stored: ColumnType, out: ColumnType, valid: np.ndarray[Any, Any] | None, place: Place
) -> Any:
    """The innermost values, cast or hashed; where ``valid`` is false, the field's default (or an empty string)."""
    if stored.dtype == "string":
        empty = b"" if field.null == "empty" else _default_bytes(field, place) if valid is not None else b""
        strings = _strings(array, empty)
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
        values = _cast(values, np.dtype(out.dtype), scale, place)
    if valid is not None:
        values[~valid] = default_value(field, out.dtype, place)
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


def _cast(values: np.ndarray[Any, Any], to: np.dtype[Any], scale: int, place: Place) -> np.ndarray[Any, Any]:
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
    values: np.ndarray[Any, Any], cast: np.ndarray[Any, Any], to: np.dtype[Any], place: Place
) -> np.ndarray[Any, Any]:
    bad = np.isinf(cast)
    if values.dtype.kind == "f":
        bad &= np.isfinite(values)
    if bad.any():
        _misfit(values[bad][0], to, place)
    return cast


def _misfit(value: Any, to: np.dtype[Any], place: Place) -> NoReturn:
    raise errors.SchemaMismatch(f"value {value} does not fit {to}", remedy="ask for a wider dtype", **place)


def _default_bytes(field: Field, place: Place) -> bytes:
    if isinstance(field.default, str):
        return field.default.encode()
    if isinstance(field.default, bytes):
        return field.default
    raise errors.InvalidArgument(
        f"default {field.default!r} is no string", remedy="give default= as str or bytes", **place
    )


def default_value(field: Field, dtype: str, place: Place) -> Any:
    """``field.default`` as one NumPy value of the column's dtype, hashed where the field hashes."""
    default = field.default
    try:
        if field.hash_to and isinstance(default, (str, bytes)):
            data = np.frombuffer(_default_bytes(field, place), np.uint8)
            return _hash.hash_bytes(data, np.array([0, len(data)], np.int64), field.hash_seed)[0]
        if field.hash_to:
            return _hash.hash_ints(np.array([default], np.int64), field.hash_seed)[0]
        if isinstance(default, (str, bytes)):
            raise TypeError
        return _cast(np.array([default]), np.dtype(dtype), 0, place)[0]
    except (TypeError, ValueError, OverflowError) as e:
        raise errors.InvalidArgument(
            f"default {default!r} does not suit {dtype}", remedy="give default= in the column's type", **place
        ) from e


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
        text = _default_bytes(field, place) if field.default is not None else b""
        return Strings(np.frombuffer(text * n_rows, np.uint8).copy(), np.arange(n_rows + 1, dtype=np.int64) * len(text))
    if field.default is None:  # a null string is the empty string, also when hashed
        return np.full(n_rows, _hash.hash_bytes(np.zeros(0, np.uint8), np.zeros(2, np.int64), field.hash_seed)[0])
    return np.full(n_rows, default_value(field, out.dtype, place), out.dtype)
