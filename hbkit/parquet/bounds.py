"""What a Parquet file promises of the values in a row group, or in one of its pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hbkit.parquet.footer import Footer

__all__ = ["Promises", "guarantee", "page_guarantees"]

# For consecutive ranges of rows: the first row of each, and what is true of its values (None where nothing is certain).
Promises: TypeAlias = "tuple[npt.NDArray[np.int64], list[pc.Expression | None]]"


def guarantee(footer: Footer, schema: pa.Schema, g: int, name: str) -> pc.Expression | None:
    """What is true of all values of a column in a row group, or None where nothing is certain.

    Floats promise nothing: a NaN lies outside its chunk's bounds, yet ``~(x > 3)`` is true of it.
    """
    _, first, n_leaves = footer.columns[schema.names.index(name)]
    if n_leaves != 1:
        return None
    chunk, physical = footer.chunk(g, first), footer.leaves[first].physical
    return _between(name, schema.field(name).type, physical, chunk.minimum, chunk.maximum, chunk.n_nulls == 0)


def page_guarantees(
    name: str,
    kind: pa.DataType,
    physical: int,
    first_rows: npt.NDArray[np.int64],
    index: tuple[Sequence[bool], Sequence[bytes], Sequence[bytes], Sequence[int] | None],
) -> Promises | None:
    """The same of each page, from its column index; None where that does not fit the pages."""
    all_null, low, high, n_nulls = index
    if len(all_null) != len(first_rows):
        return None
    # SPEC: the bounds of a page of nulls are not to be read
    promises = [
        pc.field(name).is_null()
        if all_null[i]
        else _between(name, kind, physical, low[i], high[i], n_nulls is not None and n_nulls[i] == 0)
        for i in range(len(first_rows))
    ]
    return first_rows, promises


def _between(
    name: str, kind: pa.DataType, physical: int, minimum: bytes | None, maximum: bytes | None, has_no_null: bool
) -> pc.Expression | None:
    low, high = _bound(minimum, kind, physical), _bound(maximum, kind, physical)
    if low is None or high is None:
        return None
    field = pc.field(name)
    if has_no_null:
        return (field >= low) & (field <= high)
    # the simplifier knows a nullable bound in this form only
    return ((field >= low) | field.is_null()) & ((field <= high) | field.is_null())


def _bound(data: bytes | None, kind: pa.DataType, physical: int) -> pa.Scalar | None:
    """A PLAIN-encoded bound as a scalar of the column's type, or None where that is not certain."""
    types = pa.types
    if data is None:
        return None
    if types.is_string(kind) or types.is_large_string(kind):
        try:  # a bound may be cut off within a character
            return pa.scalar(data.decode(), kind)
        except UnicodeDecodeError:
            return None
    if types.is_binary(kind) or types.is_large_binary(kind):
        return pa.scalar(data, kind)
    # SPEC: physical types INT32 = 1, INT64 = 2
    n_bytes = {1: 4, 2: 8}.get(physical)
    if len(data) != n_bytes or not (types.is_integer(kind) or types.is_date32(kind) or types.is_timestamp(kind)):
        return None
    value = int.from_bytes(data, "little", signed=not types.is_unsigned_integer(kind))
    try:
        if types.is_integer(kind):
            return pa.scalar(value, kind)
        return pa.scalar(value, pa.int32() if types.is_date32(kind) else pa.int64()).cast(kind)
    except (pa.ArrowInvalid, OverflowError):  # a damaged footer: no narrower type would write such a bound
        return None
