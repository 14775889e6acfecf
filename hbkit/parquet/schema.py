"""The schema's tree as columns: what each leaf is called, what it holds, and what its levels mean.

A column is a leaf of the tree. Lists add a rank and no name; the members of a structure or map are columns of their
own, named by a dotted path (``user.age``, ``attributes.key``). A value's definition level says how far down its path
things are there: each optional node and each list on the way adds one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hbkit.parquet.field import ColumnType

__all__ = ["MAX_DEPTH", "Leaf", "SchemaError", "TooDeep", "read_schema"]

MAX_DEPTH = 99  # of the tree: what pyarrow reads
MAX_DECIMAL_DIGITS = 18  # 10**18 fits int64, 10**19 does not

# SPEC: parquet.thrift: Type, FieldRepetitionType, ConvertedType, LogicalType
_BOOLEAN, _INT32, _INT64, _INT96, _FLOAT, _DOUBLE, _BYTES, _FIXED = range(8)
_REQUIRED, _OPTIONAL, _REPEATED = range(3)
_C_MAP, _C_MAP_KEY_VALUE, _C_LIST, _, _C_DECIMAL, _C_DATE, _C_TIME_MS, _C_TIME_US, _C_TS_MS, _C_TS_US = range(1, 11)
_C_INTS = {11: (8, 0), 12: (16, 0), 13: (32, 0), 14: (64, 0), 15: (8, 1), 16: (16, 1), 17: (32, 1), 18: (64, 1)}
_L_MAP, _L_LIST, _, _L_DECIMAL, _L_DATE, _L_TIME, _L_TIMESTAMP, _, _L_INTEGER, _L_NULL = range(2, 12)
_L_FLOAT16 = 15
_UNITS = {1: "ms", 2: "us", 3: "ns"}


class SchemaError(Exception):
    """The footer breaks the format."""


class TooDeep(Exception):
    """The schema nests deeper than `MAX_DEPTH`."""


@dataclass
class Leaf:
    """One leaf of the schema.

    Attributes
    ----------
    index : int
        Among all leaves, in file order.
    name : str
        The column's name: top-level name, and the members of structures on the way.
    column : int
        Which top-level column it belongs to.
    kind : ColumnType
        What hbkit gives for it.
    physical, type_length : int
        How it is stored; the length of fixed-length values.
    max_def : int
    thresholds : list of int
        For each list, outer to inner, the definition level from which on an entry is an element of it.
    is_null : bytes
        For each definition level below max_def: 1 means a null, 0 an empty list.
    bits, is_signed : int, bool
        Of integers.
    scale : int
        Of decimals.
    closed : str
        Why no reader may touch its chunks, else empty.
    """

    index: int
    name: str
    column: int
    kind: ColumnType
    physical: int
    type_length: int
    max_def: int
    thresholds: list[int]
    is_null: bytes
    bits: int
    is_signed: bool
    scale: int
    closed: str = ""

    def refuse(self, reason: str) -> None:
        """Note why the column cannot be read."""
        self.kind = replace(self.kind, unsupported=self.kind.unsupported or reason)

    def close(self, reason: str) -> None:
        """Note why no reader may touch its chunks."""
        self.closed = reason
        self.refuse(reason)


@dataclass
class _Node:
    name: str
    physical: int
    length: int
    repetition: int
    converted: int
    scale: int
    precision: int
    logical: tuple[int, int, int] | None
    children: list[_Node]

    @property
    def is_list(self) -> bool:
        return self._is(_L_LIST, _C_LIST) and len(self.children) == 1 and self.children[0].repetition == _REPEATED

    @property
    def is_map(self) -> bool:
        return (
            (self._is(_L_MAP, _C_MAP) or self.converted == _C_MAP_KEY_VALUE)
            and len(self.children) == 1
            and self.children[0].repetition == _REPEATED
            and bool(self.children[0].children)
        )

    def _is(self, logical: int, converted: int) -> bool:
        return self.logical[0] == logical if self.logical else self.converted == converted


def read_schema(elements: list[tuple[Any, ...]]) -> tuple[list[tuple[str, int, int]], list[Leaf]]:
    """The top-level columns (name, first leaf, number of leaves) and the leaves, of elements in depth-first order.

    Raises
    ------
    SchemaError, TooDeep
    """
    root = _tree(elements)
    columns: list[tuple[str, int, int]] = []
    leaves: list[Leaf] = []
    for i, node in enumerate(root.children):
        first = len(leaves)
        _walk(node, "", i, 0, [], b"", leaves)
        columns.append((node.name, first, len(leaves) - first))
    return columns, leaves


def _tree(elements: list[tuple[Any, ...]]) -> _Node:
    if not elements:
        raise SchemaError("the schema is empty")
    root: _Node | None = None
    open_groups: list[tuple[_Node, int]] = []  # groups and the children still to come
    for at, (name, physical, length, repetition, n, converted, scale, precision, logical) in enumerate(elements):
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise SchemaError("a column name is not UTF-8") from None
        if repetition not in (_REQUIRED, _OPTIONAL, _REPEATED) and at:
            raise SchemaError(f"the schema's element {at} has repetition {repetition}")
        node = _Node(text, physical, length, repetition, converted, scale, precision, logical, [])
        if root is None:
            root = node
        else:
            while open_groups and open_groups[-1][1] <= 0:
                open_groups.pop()
            if not open_groups:
                raise SchemaError(f"the schema's element {at} belongs to no group")
            parent, left = open_groups[-1]
            open_groups[-1] = (parent, left - 1)
            parent.children.append(node)
            if n <= 0 and physical < 0:
                continue  # a group without members holds nothing
            if n <= 0 and physical > _FIXED:
                raise SchemaError(f"the schema's element {at} has physical type {physical}")
            if physical == _FIXED and n <= 0 and length <= 0:
                raise SchemaError(f"the schema's element {at} has fixed-length values of {length} bytes")
        if n > 0:
            node.physical = -1
            open_groups.append((node, n))
            if len(open_groups) > MAX_DEPTH:
                raise TooDeep(f"the schema nests more than {MAX_DEPTH} deep")
    if any(left > 0 for _, left in open_groups):
        raise SchemaError("the schema ends too early")
    assert root is not None
    return root


def _walk(
    node: _Node,
    path: str,
    column: int,
    def_level: int,
    thresholds: list[int],
    is_null: bytes,
    leaves: list[Leaf],
    named: bool = True,
) -> None:
    """Append the leaves under a node, whose parent has this definition level, these lists and this path."""
    if node.repetition == _OPTIONAL:
        def_level, is_null = def_level + 1, is_null + b"\1"
    elif node.repetition == _REPEATED:
        def_level, is_null = def_level + 1, is_null + b"\0"
        thresholds = [*thresholds, def_level]
    if named:
        path = f"{path}.{node.name}" if path else node.name
    if not node.children:
        if node.physical >= 0:
            leaves.append(_leaf(node, path, column, len(leaves), def_level, thresholds, is_null))
        return
    if node.is_list:
        item = node.children[0]
        # SPEC: LogicalTypes.md, "Lists", backward compatibility: when the repeated node is the element itself
        if item.children and not (
            len(item.children) > 1
            or item.name in ("array", f"{node.name}_tuple")
            or item.children[0].repetition == _REPEATED
        ):
            _walk_members(item, path, column, def_level, thresholds, is_null, leaves, named=False)
        else:
            _walk(item, path, column, def_level, thresholds, is_null, leaves, named=False)
    elif node.is_map:
        _walk_members(node.children[0], path, column, def_level, thresholds, is_null, leaves, named=True)
    else:
        for child in node.children:
            _walk(child, path, column, def_level, thresholds, is_null, leaves)


def _walk_members(
    repeated: _Node,
    path: str,
    column: int,
    def_level: int,
    thresholds: list[int],
    is_null: bytes,
    leaves: list[Leaf],
    named: bool,
) -> None:
    """The members of a list's or map's repeated node, which itself has no part in the path."""
    for child in repeated.children:
        _walk(child, path, column, def_level + 1, [*thresholds, def_level + 1], is_null + b"\0", leaves, named)


def _leaf(node: _Node, name: str, column: int, index: int, max_def: int, thresholds: list[int], is_null: bytes) -> Leaf:
    dtype, logical, unsupported, bits, is_signed, scale = _type(node)
    kind = ColumnType(dtype, len(thresholds), 1 in is_null, logical, unsupported=unsupported)
    return Leaf(
        index, name, column, kind, node.physical, node.length, max_def, thresholds, is_null, bits, is_signed, scale
    )


def _type(node: _Node) -> tuple[str, str, str, int, bool, int]:
    """dtype, logical type, why unsupported, bits, is signed, decimal scale."""
    physical, kind, a, b = node.physical, -1, 0, 0
    if node.logical is not None:
        kind, a, b = node.logical
    c = node.converted
    if kind == _L_NULL:
        return "", "", "null columns are not supported", 0, True, 0
    if physical == _BOOLEAN:
        return "bool", "", "", 1, False, 0
    if physical == _INT96:
        return "int64", "timestamp[ns]", "", 64, True, 0
    if physical in (_FLOAT, _DOUBLE):
        return ("float32" if physical == _FLOAT else "float64"), "", "", 0, True, 0
    if kind == _L_DECIMAL or (kind < 0 and c == _C_DECIMAL):
        if physical not in (_INT32, _INT64, _BYTES, _FIXED):
            return "", "", "a decimal of floating point numbers is not in the format", 0, True, 0
        scale, precision = (a, b) if kind == _L_DECIMAL else (node.scale, node.precision)
        if precision > MAX_DECIMAL_DIGITS:
            return "", "", f"decimal({precision}, {scale}) does not fit 64 bits", 0, True, 0
        return "int64", f"decimal(scale={scale})", "", 64, True, scale
    if physical == _BYTES:
        return "string", "", "", 0, True, 0
    if physical == _FIXED:
        if kind == _L_FLOAT16 and node.length == 2:
            return "float16", "", "", 0, True, 0
        return "string", "", "", 0, True, 0
    bits, signed = (32, True) if physical == _INT32 else (64, True)
    logical = ""
    if kind == _L_INTEGER:
        bits, signed = (a, bool(b)) if a in (8, 16, 32, 64) else (bits, signed)
    elif kind < 0 and c in _C_INTS:
        bits, signed = _C_INTS[c][0], bool(_C_INTS[c][1])
    elif kind == _L_DATE or (kind < 0 and c == _C_DATE):
        logical = "date32[day]"
    elif kind == _L_TIME or (kind < 0 and c in (_C_TIME_MS, _C_TIME_US)):
        unit = _UNITS.get(a, "us") if kind == _L_TIME else "ms" if c == _C_TIME_MS else "us"
        logical = f"time{bits}[{unit}]"
    elif kind == _L_TIMESTAMP or (kind < 0 and c in (_C_TS_MS, _C_TS_US)):
        unit = _UNITS.get(a, "us") if kind == _L_TIMESTAMP else "ms" if c == _C_TS_MS else "us"
        # SPEC: the older type says nothing of zones, and counts as adjusted to UTC
        logical = f"timestamp[{unit}, tz=UTC]" if b or kind < 0 else f"timestamp[{unit}]"
    if (physical == _INT64) != (bits == 64) or (logical and logical.startswith("timestamp") and physical != _INT64):
        return "", "", "its logical type does not suit its physical type", 0, True, 0
    return f"{'' if signed else 'u'}int{bits}", logical, "", bits, signed, 0
