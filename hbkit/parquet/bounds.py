"""What a Parquet footer promises of the values in a row group."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from hbkit.parquet.footer import Footer

__all__ = ["guarantee"]


def guarantee(footer: Footer, schema: pa.Schema, g: int, name: str) -> pc.Expression | None:
    """What is true of all values of a column in a row group, or None where nothing is certain.

    Floats promise nothing: a NaN lies outside its chunk's bounds, yet ``~(x > 3)`` is true of it.
    """
    kind = schema.field(name).type
    _, first, n_leaves = footer.columns[schema.names.index(name)]
    if n_leaves != 1:
        return None
    bounds, physical = footer.chunk(g, first), footer.leaves[first].physical
    low, high = _bound(bounds.minimum, kind, physical), _bound(bounds.maximum, kind, physical)
    if low is None or high is None:
        return None
    field = pc.field(name)
    if bounds.n_nulls == 0:
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
