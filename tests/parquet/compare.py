"""Compare hbkit with pyarrow on the files named on standard input, one JSON line a file; run as a script.

pyarrow is an oracle that may abort the process, so it runs here and not in the tests' process. Before each step the
script says who is about to work on what, so that a crash has a name.
"""

import decimal
import json
import math
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from hbkit import errors
from hbkit.parquet import Field, File

LISTS = pa.ListType, pa.LargeListType, pa.FixedSizeListType


def as_integers(t: pa.DataType) -> pa.DataType:
    """The type with dates and times as integers, text as bytes and no dictionaries, within lists too."""
    if isinstance(t, pa.BaseExtensionType):
        return as_integers(t.storage_type)
    if pa.types.is_dictionary(t):
        return as_integers(t.value_type)
    if isinstance(t, LISTS):
        return pa.large_list(as_integers(t.value_type))
    if pa.types.is_temporal(t):
        return pa.int32() if t.bit_width == 32 else pa.int64()
    if pa.types.is_string(t) or pa.types.is_large_string(t):
        return pa.large_binary()
    return t


def only_leaf(array: pa.Array) -> pa.Array:
    """The one leaf that was read, without the structures and maps around it."""
    t = array.type
    if isinstance(array, pa.ExtensionArray):
        return only_leaf(array.storage)
    if pa.types.is_struct(t):
        return only_leaf(array.flatten()[0])
    if pa.types.is_fixed_size_list(t):
        return only_leaf(array.cast(pa.large_list(t.value_type)))
    if pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_map(t):
        wanted = array.values if not pa.types.is_map(t) else array.keys
        lists = pa.LargeListArray.from_arrays(
            array.offsets.cast(pa.int64()), only_leaf(wanted), mask=array.is_null() if array.null_count else None
        )
        return lists
    return array


def without_nulls(value, rank: int, text: bool):
    """What null="empty" promises, in plain Python."""
    if rank:
        inner = [] if value is None else value
        return [without_nulls(v, rank - 1, text) for v in inner if v is not None or rank > 1]
    if isinstance(value, decimal.Decimal):
        return int(value.scaleb(-value.as_tuple().exponent))
    return value


def plain(value):
    """A value that compares equal to itself, NaN too."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def expected(column: pa.ChunkedArray, rank: int, text: bool) -> list:
    column = column.cast(as_integers(column.type)) if as_integers(column.type) != column.type else column
    rows = column.to_pylist()
    if rank:
        return [without_nulls(v, rank, text) for v in rows]
    if text:
        return [b"" if v is None else v for v in rows]
    return [[] if v is None else [without_nulls(v, 0, text)] for v in rows]


def compare(path: str) -> dict:
    result = {"path": path, "file": "", "columns": {}}
    print(f"hbkit opens {path}", flush=True)
    try:
        file = File(path)
    except errors.HbkitError as e:
        print(f"pyarrow opens {path}", flush=True)
        try:
            pq.read_table(path)
            result["file"] = f"hbkit alone fails: {type(e).__name__}: {e}"
        except Exception:
            result["file"] = f"both fail: {type(e).__name__}: {e}"
        return result
    for name, kind in file.schema.items():
        if kind.unsupported:
            result["columns"][name] = f"unsupported: {kind.unsupported}"
            continue
        result["columns"][name] = one_column(path, file, name, kind)
    return result


def one_column(path: str, file: File, name: str, kind) -> str:
    leaf = next(leaf for leaf in file.footer.leaves if leaf.name == name)
    for g in range(len(file.row_group_rows)):
        print(f"hbkit reads {path} {name} {g}", flush=True)
        got = wrong = None
        try:
            got = file.read_row_group(g, [Field(name, null="empty")])[name].tolist()
        except errors.HbkitError as e:
            wrong = f"{type(e).__name__}: {e}"
        print(f"pyarrow reads {path} {name} {g}", flush=True)
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).reader.read_row_group(
                g, column_indices=[leaf.index], use_threads=False
            )
            column = pa.chunked_array([only_leaf(chunk) for chunk in table.column(0).chunks])
            if len(column) != file.row_group_rows[g]:
                raise ValueError("the number of rows is not the footer's")
            want = expected(column, kind.ragged_rank, kind.dtype == "string")
        except Exception as e:
            return f"both fail: {wrong}" if wrong else f"pyarrow alone fails: {type(e).__name__}: {e}"
        if wrong:
            return f"hbkit alone fails: {wrong}"
        if plain(got) != plain(want):
            return f"differs in row group {g}"
    return "equal"


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(compare(line.rstrip("\n"))), flush=True)
