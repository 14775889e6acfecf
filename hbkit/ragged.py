"""Ragged columns: values with row_splits, conversions to sparse and padded form, and interchange with Arrow.

A column is a NumPy array (one value a row), a `Strings` (one string a row) or a `Ragged` (a list, or a list of lists, a
row). The functions `n_rows`, `take`, `slice_rows` and `concat` treat the three alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from hbkit._ext import ragged as _ext
from hbkit._ext.pool import shared
from hbkit.errors import InvalidArgument

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Column", "Dictionary", "Ragged", "Sparse", "Strings", "concat", "gather", "n_rows", "slice_rows", "take"]

Int64s: TypeAlias = npt.NDArray[np.int64]


def _splits(row_splits: npt.ArrayLike, n_values: int) -> Int64s:
    """row_splits as contiguous int64, proven to start at 0, to be nondecreasing, and to end at n_values."""
    splits = np.asarray(row_splits)
    if splits.ndim != 1 or (splits.size and splits.dtype.kind not in "iu"):
        raise InvalidArgument(
            f"row_splits are {splits.dtype} of {splits.ndim} dimensions", remedy="give a vector of int64"
        )
    splits = np.ascontiguousarray(splits, np.int64)
    _ext.check_splits(splits, n_values)
    return splits


def _from_lengths(lengths: npt.ArrayLike) -> Int64s:
    """int64[n + 1] row_splits of rows of these lengths."""
    lengths = np.asarray(lengths, np.int64)
    splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def _rows(rows: npt.ArrayLike, n: int) -> Int64s:
    """Row numbers or a boolean mask over n rows, as int64 row numbers."""
    index = np.asarray(rows)
    if index.dtype == np.bool_:
        if index.shape != (n,):
            raise InvalidArgument(f"a mask of shape {index.shape} over {n} rows", remedy="give one bool a row")
        return np.flatnonzero(index)
    if (index.size and index.dtype.kind not in "iu") or index.ndim != 1:
        raise InvalidArgument(f"row numbers are {index.dtype}{index.shape}", remedy="give a vector of integers")
    return np.ascontiguousarray(index, np.int64)


def _bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


class Strings:
    """A column of strings or binary: bytes end to end, and where each string ends.

    Parameters
    ----------
    data : uint8[row_splits[-1]]
        Contiguous; kept, not copied.
    row_splits : int64[n + 1]
        String i is ``data[row_splits[i]:row_splits[i + 1]]``; starts at 0, nondecreasing.

    Raises
    ------
    InvalidArgument
        The splits do not fit the data.
    """

    __slots__ = ("data", "row_splits")

    @classmethod
    def _trusted(cls, data: npt.NDArray[np.uint8], row_splits: Int64s) -> Strings:
        """Of splits that our own code made."""
        out = cls.__new__(cls)
        out.data, out.row_splits = data, row_splits
        return out

    def __init__(self, data: npt.NDArray[np.uint8], row_splits: npt.ArrayLike) -> None:
        self.data = np.ascontiguousarray(data, np.uint8)
        self.row_splits = _splits(row_splits, self.data.size)

    @classmethod
    def from_list(cls, strings: Iterable[bytes | str]) -> Strings:
        """Strings of a list; str is encoded as UTF-8."""
        parts = [s.encode() if isinstance(s, str) else s for s in strings]
        return cls(np.frombuffer(b"".join(parts), np.uint8), _from_lengths([len(p) for p in parts]))

    @classmethod
    def from_arrow(cls, array: pa.Array) -> Strings:
        """Strings of an Arrow string, binary, large or fixed-size binary array; a null is an error."""
        import pyarrow as pa

        if array.null_count:
            raise InvalidArgument(f"{array.null_count} nulls among the strings", remedy="fill or drop them first")
        if pa.types.is_fixed_size_binary(array.type):
            width = array.type.byte_width
            data = np.frombuffer(array.buffers()[1] or b"", np.uint8)[array.offset * width :][: len(array) * width]
            return cls(data, np.arange(len(array) + 1, dtype=np.int64) * width)
        if not (pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)):
            array = array.cast(pa.large_binary())
        if len(array) == 0:
            return cls.from_list([])
        _, offsets, data = array.buffers()
        splits = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        raw = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
        return cls(raw[splits[0] : splits[-1]], splits - splits[0])

    def to_arrow(self) -> pa.Array:
        """Arrow large_binary array over the same memory."""
        import pyarrow as pa

        return pa.Array.from_buffers(
            pa.large_binary(), len(self), [None, pa.py_buffer(self.row_splits), pa.py_buffer(self.data)]
        )

    def __len__(self) -> int:
        return len(self.row_splits) - 1

    def lengths(self) -> Int64s:
        """Bytes in each string: int64[n]."""
        return np.diff(self.row_splits)

    def take(self, rows: npt.ArrayLike) -> Strings:
        """The strings at these row numbers (or where a mask is true), copied."""
        splits, data = _take_items(self.data, self.row_splits, _rows(rows, len(self)))
        return Strings._trusted(data, splits)

    def __getitem__(self, rows: slice) -> Strings:
        """A slice of consecutive rows; the bytes are shared."""
        first, last = _span(rows, len(self))
        s = self.row_splits[first : last + 1]
        return Strings._trusted(self.data[s[0] : s[-1]], s - s[0])

    def tolist(self) -> list[bytes]:
        """One bytes object a row."""
        raw, s = self.data.tobytes(), self.row_splits.tolist()
        return [raw[a:b] for a, b in pairwise(s)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Strings)
            and np.array_equal(self.row_splits, other.row_splits)
            and np.array_equal(self.data, other.data)
        )

    __hash__ = None  # type: ignore[assignment]  # it compares by mutable contents

    def __repr__(self) -> str:
        return f"Strings(n={len(self)}, nbytes={self.data.size})"


class Sparse(NamedTuple):
    """Coordinates and values, in row order: what a sparse tensor is made from.

    Attributes
    ----------
    indices : int64[nnz, k + 1]
        Row, then the position at each list level.
    values : array[nnz] or Strings
    dense_shape : int64[k + 1]
        Rows, then the longest list of each level.
    """

    indices: Int64s
    values: npt.NDArray[Any] | Strings
    dense_shape: Int64s


class Ragged:
    """A column of lists, or of lists of lists: values end to end, and the splits of each level.

    Parameters
    ----------
    values : array[n_values] or Strings
        Contiguous, one-dimensional; kept, not copied.
    row_splits : int64 array or tuple of them, outer to inner
        Level k's splits count items of level k + 1; the innermost counts values. Each starts at 0, is nondecreasing
        and ends at the number of items of the next.

    Raises
    ------
    InvalidArgument
        The splits do not fit each other or the values.
    """

    __slots__ = ("row_splits", "values")

    @classmethod
    def _trusted(cls, values: npt.NDArray[Any] | Strings, row_splits: tuple[Int64s, ...]) -> Ragged:
        """Of splits that our own code made."""
        out = cls.__new__(cls)
        out.values, out.row_splits = values, row_splits
        return out

    def __init__(
        self, values: npt.NDArray[Any] | Strings, row_splits: npt.ArrayLike | tuple[npt.ArrayLike, ...]
    ) -> None:
        levels = row_splits if isinstance(row_splits, tuple) else (row_splits,)
        if not levels:
            raise InvalidArgument("a Ragged without row_splits", remedy="a flat column is a plain array")
        if not isinstance(values, Strings):
            values = np.ascontiguousarray(values)
            if values.ndim != 1:
                raise InvalidArgument(f"values have {values.ndim} dimensions", remedy="give one-dimensional values")
        self.values = values
        checked: list[Int64s] = []
        inner = len(values)
        for splits in reversed(levels):
            checked.append(_splits(splits, inner))
            inner = len(checked[-1]) - 1
        self.row_splits: tuple[Int64s, ...] = tuple(reversed(checked))

    @classmethod
    def on_device(cls, values: Any, row_splits: npt.ArrayLike) -> Ragged:
        """Lists of values in a device's memory: a vector of any library, as keys for tables that are there.

        A collection of embeddings takes it; nothing else here does.
        """
        return cls._trusted(values, (_splits(row_splits, len(values)),))

    @classmethod
    def from_lists(cls, lists: Sequence[Any], dtype: npt.DTypeLike | None = None) -> Ragged:
        """A Ragged of nested Python lists of equal depth; without dtype, str and bytes become Strings."""
        splits, level = [_from_lengths([len(x) for x in lists])], [y for x in lists for y in x]
        while level and isinstance(level[0], (list, tuple)):
            splits.append(_from_lengths([len(x) for x in level]))
            level = [y for x in level for y in x]
        if dtype is None and level and isinstance(level[0], (str, bytes)):
            return cls(Strings.from_list(level), tuple(splits))
        return cls(np.asarray(level, dtype), tuple(splits))

    @classmethod
    def from_arrow(cls, array: pa.Array) -> Ragged:
        """A Ragged of an Arrow list, large_list or fixed_size_list array of any depth.

        Values of primitive type share the Arrow buffer. A null list is an empty list; a null value is an error.
        """
        import pyarrow as pa

        splits: list[Int64s] = []
        is_fixed = pa.types.is_fixed_size_list
        while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or is_fixed(array.type):
            if is_fixed(array.type):
                if array.null_count:  # a null slot of a fixed-size list still occupies values
                    array = array.cast(pa.large_list(array.type.value_type))
                    continue
                size = array.type.list_size
                splits.append(np.arange(len(array) + 1, dtype=np.int64) * size)
                array = array.values.slice(array.offset * size, len(array) * size)
                continue
            if array.null_count:  # an offset range under a null may hold garbage
                splits.append(_from_lengths(array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)))
                array = array.flatten()
                continue
            offsets = array.offsets.to_numpy().astype(np.int64)
            splits.append(offsets - offsets[0])
            array = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        if not splits:
            raise InvalidArgument(f"Arrow type {array.type} is not a list", remedy="use a list array")
        t = array.type
        if (
            pa.types.is_string(t)
            or pa.types.is_large_string(t)
            or pa.types.is_binary(t)
            or pa.types.is_large_binary(t)
            or pa.types.is_fixed_size_binary(t)
        ):
            return cls(Strings.from_arrow(array), tuple(splits))
        if array.null_count:
            raise InvalidArgument(f"{array.null_count} nulls among the values", remedy="fill or drop them first")
        return cls(array.to_numpy(zero_copy_only=False), tuple(splits))

    def to_arrow(self) -> pa.Array:
        """Arrow large_list array (nested once a level) over the same memory."""
        import pyarrow as pa

        array = self.values.to_arrow() if isinstance(self.values, Strings) else pa.array(self.values)
        for splits in reversed(self.row_splits):
            array = pa.LargeListArray.from_arrays(pa.array(splits), array)
        return array

    @property
    def ragged_rank(self) -> int:
        """Levels of lists: 1 for a list a row."""
        return len(self.row_splits)

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the values; object for Strings."""
        return np.dtype(object) if isinstance(self.values, Strings) else self.values.dtype

    def __len__(self) -> int:
        return len(self.row_splits[0]) - 1

    def lengths(self) -> Int64s:
        """Items in each row's outermost list: int64[n]."""
        return np.diff(self.row_splits[0])

    def take(self, rows: npt.ArrayLike) -> Ragged:
        """The rows at these numbers (or where a mask is true), copied."""
        index, levels = _rows(rows, len(self)), []
        for splits in self.row_splits[:-1]:
            new = _ext.take_splits(splits, index)
            levels.append(new)
            # Row numbers of the next level: each taken range, in order.
            index = np.repeat(splits[index] - new[:-1], np.diff(new)) + np.arange(new[-1])
        if isinstance(self.values, Strings):
            last = _ext.take_splits(self.row_splits[-1], index)
            inner = np.repeat(self.row_splits[-1][index] - last[:-1], np.diff(last)) + np.arange(last[-1])
            return Ragged(self.values.take(inner), (*levels, last))
        last, values = _take_items(self.values, self.row_splits[-1], index)
        return Ragged._trusted(values, (*levels, last))

    def __getitem__(self, rows: slice) -> Ragged:
        """A slice of consecutive rows; the values are shared."""
        first, last = _span(rows, len(self))
        levels: list[Int64s] = []
        for splits in self.row_splits:
            s = splits[first : last + 1]
            first, last = int(s[0]), int(s[-1])
            levels.append(s - first)
        return Ragged._trusted(self.values[first:last], tuple(levels))

    def to_padded(self, length: int | None = None, pad: Any = 0, truncate: str = "tail") -> npt.NDArray[Any]:
        """A dense array of the values, each list filled up with `pad`.

        Parameters
        ----------
        length : int, optional
            Length of the lists; the longest when left out. For more than one level it applies to the innermost, and
            the outer ones take their longest.
        truncate : "tail" or "head"
            Which end a list longer than `length` loses.

        Returns
        -------
        array[n, length] of the values' dtype, or array[n, ..., length]
        """
        if isinstance(self.values, Strings):
            raise InvalidArgument("strings cannot be padded", remedy="hash them first (hash_to='int64')")
        if truncate not in ("tail", "head"):
            raise InvalidArgument(f"truncate={truncate!r}", remedy="use 'tail' or 'head'")
        inner = self.row_splits[-1]
        if length is None:
            length = int(np.diff(inner).max(initial=0))
        if length < 0:
            raise InvalidArgument(f"length {length}", remedy="give a length of at least 0")
        n = len(inner) - 1
        out = np.full((n, length), pad, self.values.dtype)
        _ext.pad_ranges(_bytes(self.values), self.values.itemsize, inner, length, truncate == "tail", _bytes(out))
        for splits in reversed(self.row_splits[:-1]):
            rows, longest = len(splits) - 1, int(np.diff(splits).max(initial=0))
            wider = np.full((rows, longest, *out.shape[1:]), pad, out.dtype)
            size = out.dtype.itemsize * int(np.prod(out.shape[1:]))
            _ext.pad_ranges(_bytes(np.ascontiguousarray(out)), size, splits, longest, True, _bytes(wider))
            out = wider
        return out

    def to_sparse(self) -> Sparse:
        """Coordinates and values; the values are shared."""
        # Position of each value at each level, from the outermost in: repeat what is known, append the place in it.
        indices = np.arange(len(self), dtype=np.int64)[:, None]
        shape = [len(self)]
        for splits in self.row_splits:
            lengths = np.diff(splits)
            within = np.arange(splits[-1]) - np.repeat(splits[:-1], lengths)
            indices = np.concatenate([np.repeat(indices, lengths, axis=0), within[:, None]], axis=1)
            shape.append(int(lengths.max(initial=0)))
        return Sparse(indices, self.values, np.array(shape, np.int64))

    def tolist(self) -> list[Any]:
        """Nested Python lists."""
        level: list[Any] = self.values.tolist()
        for splits in reversed(self.row_splits):
            s = splits.tolist()
            level = [level[a:b] for a, b in pairwise(s)]
        return level

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged) or self.ragged_rank != other.ragged_rank:
            return False
        same = all(np.array_equal(a, b) for a, b in zip(self.row_splits, other.row_splits, strict=True))
        if isinstance(self.values, Strings) or isinstance(other.values, Strings):
            return same and self.values is not None and bool(self.values == other.values)
        return same and np.array_equal(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]  # it compares by mutable contents

    def __repr__(self) -> str:
        return f"Ragged(n={len(self)}, values={self.dtype}[{len(self.values)}], ragged_rank={self.ragged_rank})"


class Dictionary(NamedTuple):
    """A column by its distinct values: what is done once for each entry need not be done for each value.

    Attributes
    ----------
    dictionary : array[n] or Strings
        The entries; one may occur more than once.
    codes : uint32[n_rows], or Ragged of uint32
        For each value the position of its entry.
    """

    dictionary: npt.NDArray[Any] | Strings
    codes: npt.NDArray[np.uint32] | Ragged

    def decode(self) -> npt.NDArray[Any] | Ragged | Strings:
        """The column itself."""
        if isinstance(self.codes, Ragged):
            codes: Any = self.codes.values
            values: Any = gather(self.dictionary, codes)
            return Ragged(values, self.codes.row_splits)
        return gather(self.dictionary, self.codes)


Column: TypeAlias = "npt.NDArray[Any] | Ragged | Strings"
AnyColumn = TypeVar("AnyColumn", npt.NDArray[Any], Ragged, Strings, Column)


def _take_items(items: npt.NDArray[Any], splits: Int64s, rows: Int64s) -> tuple[Int64s, npt.NDArray[Any]]:
    """New splits and items of the ranges taken."""
    new = _ext.take_splits(splits, rows)
    out = _empty(int(new[-1]), items.dtype)
    _ext.take_ranges(_bytes(items), items.itemsize, splits, rows, new, _bytes(out))
    return new, out


def _span(rows: slice, n: int) -> tuple[int, int]:
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise InvalidArgument(f"rows {rows!r}", remedy="slice consecutive rows, or use take")
    first, last, _ = rows.indices(n)
    return first, max(first, last)


def n_rows(column: Column) -> int:
    """Rows of a column."""
    return len(column)


def take(column: AnyColumn, rows: npt.ArrayLike) -> AnyColumn:
    """The rows of a column at these numbers (or where a mask is true), copied."""
    if isinstance(column, np.ndarray):
        index = _rows(rows, len(column))
        if column.ndim > 1:
            if index.size and (index.min() < 0 or index.max() >= len(column)):
                raise InvalidArgument(f"rows {index.min()}..{index.max()} of {len(column)}", remedy="rows are 0..n-1")
            return column[index]
        out = _empty(len(index), column.dtype)
        _ext.take_items([_bytes(np.ascontiguousarray(column))], column.itemsize, None, index, _bytes(out))
        return out
    return column.take(rows)


Places: TypeAlias = "tuple[npt.NDArray[np.int32] | None, Int64s]"


def places(sizes: Sequence[int], rows: Int64s) -> Places:
    """Where rows of several parts of these sizes lie: which part (None if there is one), and which row of it."""
    if len(sizes) == 1:
        return None, rows
    starts = _from_lengths(sizes)
    part = np.searchsorted(starts, rows, side="right") - 1
    return part.astype(np.int32), rows - starts[part]


def gather(column: Column, rows: npt.NDArray[np.uint32]) -> Column:
    """The rows of a column at these numbers, written around the caches: for many rows, or a Dictionary's codes.

    Raises
    ------
    InvalidArgument
        A number is not a row's.
    """
    if not isinstance(column, np.ndarray) or column.ndim > 1 or column.itemsize not in (4, 8):
        return take(column, rows.astype(np.int64))
    out = _empty(len(rows), column.dtype)
    _ext.gather_items(_bytes(np.ascontiguousarray(column)), column.itemsize, rows, _bytes(out))
    return out


def take_from(parts: Sequence[Any], part: npt.NDArray[np.int32] | None, rows: Int64s) -> Column:
    """The rows of several parts of one column, each copied once: row ``rows[i]`` of part ``part[i]``; see `places`."""
    head = parts[0]
    if part is None:
        return take(head, rows)
    if isinstance(head, np.ndarray) and head.ndim == 1:
        flat = [np.ascontiguousarray(p) for p in parts]
        out = _empty(len(rows), head.dtype)
        _ext.take_items([_bytes(p) for p in flat], head.itemsize, part, rows, _bytes(out))
        return out
    if isinstance(head, Strings):
        splits, data = _take_lists([p.data for p in parts], [p.row_splits for p in parts], part, rows)
        return Strings._trusted(data, splits)
    if isinstance(head, Ragged) and head.ragged_rank == 1 and isinstance(head.values, np.ndarray):
        splits, data = _take_lists([p.values for p in parts], [p.row_splits[0] for p in parts], part, rows)
        return Ragged._trusted(data, (splits,))
    return take(concat(parts), rows + _from_lengths([len(p) for p in parts])[part])


def _take_lists(
    items: list[npt.NDArray[Any]], splits: list[Int64s], part: npt.NDArray[np.int32], rows: Int64s
) -> tuple[Int64s, npt.NDArray[Any]]:
    new = _empty(len(rows) + 1, np.dtype(np.int64))
    _ext.lengths_of(splits, part, rows, new)
    out = _empty(int(new[-1]), items[0].dtype)
    _ext.take_lists([_bytes(i) for i in items], items[0].itemsize, splits, part, rows, new, _bytes(out))
    return new, out


def _empty(n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Memory that was touched before, where it pays."""
    nbytes = n * dtype.itemsize
    return np.frombuffer(shared.take(nbytes), dtype) if nbytes >= 1 << 16 else np.empty(n, dtype)


def slice_rows(column: AnyColumn, first: int, last: int) -> AnyColumn:
    """Rows first..last-1 of a column, sharing its values."""
    return column[first:last]


def concat(columns: Sequence[Column]) -> Column:
    """Rows of several columns of one kind and dtype end to end; a single column is returned as it is."""
    if not columns:
        raise InvalidArgument("nothing to concatenate", remedy="give at least one column")
    head = columns[0]
    if len(columns) == 1:
        return head
    if any(type(c) is not type(head) for c in columns):
        raise InvalidArgument("columns of different kinds cannot be concatenated", remedy="decode them alike")
    if isinstance(head, Ragged):
        ragged = [c for c in columns if isinstance(c, Ragged)]
        if any(c.ragged_rank != head.ragged_rank for c in ragged):
            raise InvalidArgument("columns of different ragged_rank cannot be concatenated", remedy="decode them alike")
        levels = tuple(_concat_splits([c.row_splits[k] for c in ragged]) for k in range(head.ragged_rank))
        values = concat([c.values for c in ragged])
        assert not isinstance(values, Ragged)
        return Ragged._trusted(values, levels)
    if isinstance(head, Strings):
        strings = [c for c in columns if isinstance(c, Strings)]
        return Strings._trusted(_concat([c.data for c in strings]), _concat_splits([c.row_splits for c in strings]))
    return _concat([c for c in columns if isinstance(c, np.ndarray)])


def _concat(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    head = parts[0]
    if any(p.dtype != head.dtype or p.ndim != 1 for p in parts):
        return np.concatenate(parts)
    out = _empty(sum(len(p) for p in parts), head.dtype)
    return np.concatenate(parts, out=out)


def _concat_splits(parts: list[Int64s]) -> Int64s:
    out = _empty(sum(len(p) - 1 for p in parts) + 1, np.dtype(np.int64))
    out[0] = at = 0
    for p in parts:
        np.add(p[1:], out[at], out=out[at + 1 : at + len(p)])
        at += len(p) - 1
    return out
