"""Kernels that move rows: gather, scatter, pool, and where the values of ragged lists go in padded ones.

Rows are [n_lines, stride] in device memory, addressed by slot. 2^shift threads share a row, four columns each at a time:
neighbours read neighbouring addresses, so a row is moved in whole sectors. No two threads write one place.
"""

from __future__ import annotations

from typing import Any

from hbkit.cuda.arith import add, cuda, mul
from hbkit.cuda.device import BAD_INDEX, BAD_SLOT
from hbkit.cuda.narrow import NEAREST, ROWS, ZERO, load, store


def _gather(load_row: Any) -> Any:
    def gather(
        rows: Any, slots: Any, index: Any, out: Any, first: Any, to: Any, width: Any, shift: Any, vec: Any, error: Any
    ) -> None:
        """``out[i, to:to + width]`` = row ``slots[i]``, from column `first` on; zeros where the slot is -1.

        With an index, row ``slots[index[i]]``.
        """
        mine = 4 * (cuda.grid(1) & ((1 << shift) - 1))
        for i in range(cuda.grid(1) >> shift, out.shape[0], cuda.gridsize(1) >> shift):
            at = index[i] if index.shape[0] > 0 else i
            if at < 0 or at >= slots.shape[0]:
                error[0] = BAD_INDEX
                continue
            slot = slots[at]
            if slot < -1 or slot >= rows.shape[0]:
                error[0] = BAD_SLOT
                continue
            for j in range(mine, width, 4 << shift):
                a, b, c, d = ZERO, ZERO, ZERO, ZERO
                if slot >= 0:
                    a, b, c, d = load_row(rows, slot, first + j, first + width, vec)
                store(out, i, to + j, to + width, vec, a, b, c, d)

    return gather


def _scatter(store_row: Any) -> Any:
    def scatter(
        rows: Any, slots: Any, values: Any, first: Any, to: Any, width: Any, shift: Any, vec: Any, error: Any
    ) -> None:
        """Row ``slots[i]``, from column `to` on, = ``values[i, first:first + width]``; slots are distinct and >= 0.

        Narrow rows round to the nearest value.
        """
        mine = 4 * (cuda.grid(1) & ((1 << shift) - 1))
        for i in range(cuda.grid(1) >> shift, values.shape[0], cuda.gridsize(1) >> shift):
            slot = slots[i]
            if slot < 0 or slot >= rows.shape[0]:
                error[0] = BAD_SLOT
                continue
            for j in range(mine, width, 4 << shift):
                a, b, c, d = load(values, i, first + j, first + width, vec)
                store_row(rows, slot, to + j, to + width, vec, a, b, c, d, NEAREST)

    return scatter


def _pool(load_row: Any) -> Any:
    def pool(
        rows: Any,
        slots: Any,
        index: Any,
        splits: Any,
        weight: Any,
        row_scale: Any,
        out: Any,
        shift: Any,
        vec: Any,
        error: Any,
    ) -> None:
        """``out[b]`` = ``row_scale[b]`` * sum of ``weight[p]`` * row ``slots[index[p]]`` over p of list b, in order.

        Index (p itself), weight and row_scale (1) may be empty. A slot of -1 is a row of zeros.
        """
        dim = out.shape[1]
        n = index.shape[0] if index.shape[0] > 0 else slots.shape[0]
        mine = 4 * (cuda.grid(1) & ((1 << shift) - 1))
        for i in range(cuda.grid(1) >> shift, out.shape[0], cuda.gridsize(1) >> shift):
            begin, end = splits[i], splits[i + 1]
            if begin < 0 or end > n:
                error[0] = BAD_INDEX
                continue
            for j in range(mine, dim, 4 << shift):
                a, b, c, d = ZERO, ZERO, ZERO, ZERO
                for p in range(begin, end):
                    at = index[p] if index.shape[0] > 0 else p
                    if at < 0 or at >= slots.shape[0]:
                        error[0] = BAD_INDEX
                        continue
                    slot = slots[at]
                    if slot < -1 or slot >= rows.shape[0]:
                        error[0] = BAD_SLOT
                        continue
                    e, f, g, h = ZERO, ZERO, ZERO, ZERO
                    if slot >= 0:
                        e, f, g, h = load_row(rows, slot, j, dim, vec)
                    if weight.shape[0] > 0:
                        k = weight[p]
                        e, f, g, h = mul(k, e), mul(k, f), mul(k, g), mul(k, h)
                    a, b, c, d = add(a, e), add(b, f), add(c, g), add(d, h)
                if row_scale.shape[0] > 0:
                    k = row_scale[i]
                    a, b, c, d = mul(k, a), mul(k, b), mul(k, c), mul(k, d)
                store(out, i, j, dim, vec, a, b, c, d)

    return pool


def padded(splits: Any, tail: Any, out: Any, error: Any) -> None:
    """``out[b, l]`` = position of value l of list b, -1 beyond its end; a list that is too long loses its tail or head.

    As the index of a gather it pads rows, as that of ids it pads ids.
    """
    n, length = out.shape
    for item in range(cuda.grid(1), n * length, cuda.gridsize(1)):
        b = item // length
        at = item - b * length
        begin, end = splits[b], splits[b + 1]
        if not tail and end - begin > length:
            begin = end - length
        out[b, at] = begin + at if begin + at < end else -1


_ARRAYS = {"float32": "float32[:,::1]", "float16": "uint16[:,::1]", "bfloat16": "uint16[:,::1]"}
_FLOATS, _INTS, _ERROR = "float32[:,::1]", "int64[::1]", "int32[::1]"
GATHER = {dtype: _gather(loads) for dtype, (loads, _) in ROWS.items()}
SCATTER = {dtype: _scatter(stores) for dtype, (_, stores) in ROWS.items()}
POOL = {dtype: _pool(loads) for dtype, (loads, _) in ROWS.items()}
SIGNATURES: dict[Any, str] = {padded: f"void({_INTS}, int64, int64[:,::1], {_ERROR})"}
for _dtype, _rows in _ARRAYS.items():
    SIGNATURES[GATHER[_dtype]] = f"void({_rows}, {_INTS}, {_INTS}, {_FLOATS}, {'int64, ' * 5}{_ERROR})"
    SIGNATURES[SCATTER[_dtype]] = f"void({_rows}, {_INTS}, {_FLOATS}, {'int64, ' * 5}{_ERROR})"
    SIGNATURES[POOL[_dtype]] = (
        f"void({_rows}, {_INTS}, {_INTS}, {_INTS}, float32[::1], float32[::1], {_FLOATS}, int64, int64, {_ERROR})"
    )
    for _made in (GATHER, SCATTER, POOL):
        _made[_dtype].__name__ += f"_{_dtype}"
