"""Kernels that move rows: gather, scatter, pool, and where the values of ragged lists go in padded ones.

Rows are [n_lines, stride] in device memory, addressed by slot. 2^shift threads share a row, four columns each at a
time: neighbours read neighbouring addresses, so a row is moved in whole sectors. No two threads write one place.

Gathers and pools wait for memory, so the more warps there is room for, the better: they count rows, columns and slots
by 32 bits, which takes 40 to 48 registers where 64 bits take 64 to 80. Their loops are `while`, since Numba's `range`
counts by 64 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import add, cuda, device, mul, sign
from hbkit.cuda.device import BAD_INDEX, BAD_SLOT
from hbkit.cuda.narrow import NEAREST, ROWS, ZERO, load, store

AT_ONCE = 4  # rows that those who share one gather at a time


@device
def slot_at(slots: Any, index: Any, n_lines: Any, i: Any, n: Any, error: Any) -> Any:
    """Slot of row i of n, by way of the index where there is one; -1 beyond n, and for what is out of bounds: int32."""
    if i >= n:
        return np.int32(-1)
    at = index[i] if index.shape[0] > 0 else i
    if at < 0 or at >= slots.shape[0]:
        error[0] = BAD_INDEX
        return np.int32(-1)
    slot = slots[at]
    if slot < -1 or slot >= n_lines:
        error[0] = BAD_SLOT
        return np.int32(-1)
    return np.int32(slot)


def _gather(load_row: Any, vec: bool) -> Any:
    @device
    def load_or_zeros(rows: Any, slot: Any, j: Any, end: Any) -> Any:
        a, b, c, d = load_row(
            rows, max(slot, np.int32(0)), j, end, vec
        )  # without a branch, so that several are on their way
        if slot < 0:
            a, b, c, d = ZERO, ZERO, ZERO, ZERO
        return a, b, c, d

    def gather(
        rows: Any, slots: Any, index: Any, out: Any, first: Any, to: Any, width: Any, shift: Any, error: Any
    ) -> None:
        """``out[i, to:to + width]`` = row ``slots[i]``, from column `first` on; zeros where the slot is -1.

        With an index, row ``slots[index[i]]``. Four rows at a time: their slots, then the rows, are read at once.
        """
        n, last, end = np.int32(out.shape[0]), np.int32(first + width), np.int32(to + width)
        mine, groups = np.int32(4 * (cuda.grid(1) & ((1 << shift) - 1))), np.int32(cuda.gridsize(1) >> shift)
        i = np.int32(cuda.grid(1) >> shift)
        while i < n:
            p, q, r = np.int32(i + groups), np.int32(i + 2 * groups), np.int32(i + 3 * groups)
            s0 = slot_at(slots, index, rows.shape[0], i, n, error)
            s1 = slot_at(slots, index, rows.shape[0], p, n, error)
            s2 = slot_at(slots, index, rows.shape[0], q, n, error)
            s3 = slot_at(slots, index, rows.shape[0], r, n, error)
            j, k = np.int32(first + mine), np.int32(to + mine)
            while j < last:
                a0, b0, c0, d0 = load_or_zeros(rows, s0, j, last)
                a1, b1, c1, d1 = load_or_zeros(rows, s1, j, last)
                a2, b2, c2, d2 = load_or_zeros(rows, s2, j, last)
                a3, b3, c3, d3 = load_or_zeros(rows, s3, j, last)
                store(out, i, k, end, vec, a0, b0, c0, d0)
                if p < n:
                    store(out, p, k, end, vec, a1, b1, c1, d1)
                if q < n:
                    store(out, q, k, end, vec, a2, b2, c2, d2)
                if r < n:
                    store(out, r, k, end, vec, a3, b3, c3, d3)
                j, k = np.int32(j + (4 << shift)), np.int32(k + (4 << shift))
            i = np.int32(i + 4 * groups)

    return gather


def _scatter(store_row: Any, vec: bool) -> Any:
    def scatter(rows: Any, slots: Any, values: Any, first: Any, to: Any, width: Any, shift: Any, error: Any) -> None:
        """Row ``slots[i]``, from column `to` on, = ``values[i, first:first + width]``.

        Slots are distinct, and -1 is skipped. Narrow rows round to the nearest value.
        """
        mine = 4 * (cuda.grid(1) & ((1 << shift) - 1))
        for i in range(cuda.grid(1) >> shift, values.shape[0], cuda.gridsize(1) >> shift):
            slot = slots[i]
            if slot < 0 or slot >= rows.shape[0]:
                if slot != -1:
                    error[0] = BAD_SLOT
                continue
            for j in range(mine, width, 4 << shift):
                a, b, c, d = load(values, i, first + j, first + width, vec)
                store_row(rows, slot, to + j, to + width, vec, a, b, c, d, NEAREST)

    return scatter


def _pool(load_row: Any, vec: bool) -> Any:
    @device
    def one(
        rows: Any,
        slots: Any,
        index: Any,
        weight: Any,
        p: Any,
        end: Any,
        j: Any,
        dim: Any,
        error: Any,
    ) -> Any:
        slot = slot_at(slots, index, rows.shape[0], p, end, error)
        a, b, c, d = load_row(rows, max(slot, np.int32(0)), j, dim, vec)
        if slot < 0:
            a, b, c, d = ZERO, ZERO, ZERO, ZERO
        if weight.shape[0] > 0:
            k = weight[min(p, np.int32(end - 1))]
            a, b, c, d = mul(k, a), mul(k, b), mul(k, c), mul(k, d)
        return a, b, c, d

    def pool(
        rows: Any,
        slots: Any,
        index: Any,
        splits: Any,
        weight: Any,
        row_scale: Any,
        out: Any,
        shift: Any,
        error: Any,
    ) -> None:
        """``out[b]`` = ``row_scale[b]`` * sum of ``weight[p]`` * row ``slots[index[p]]`` over p of list b, in order.

        Index (p itself), weight and row_scale (1) may be empty. A slot of -1 is a row of zeros.
        """
        n_lists, dim = np.int32(out.shape[0]), np.int32(out.shape[1])
        n = index.shape[0] if index.shape[0] > 0 else slots.shape[0]
        i = np.int32(cuda.grid(1) >> shift)
        while i < n_lists:
            begin, end = np.int32(splits[i]), np.int32(splits[i + 1])
            if splits[i] < 0 or splits[i + 1] > n:
                error[0] = BAD_INDEX
                end = begin
            j = np.int32(4 * (cuda.grid(1) & ((1 << shift) - 1)))
            while j < dim:
                a, b, c, d = ZERO, ZERO, ZERO, ZERO
                p = begin
                while p < end:
                    q, r, t = np.int32(p + 1), np.int32(p + 2), np.int32(p + 3)
                    e0, f0, g0, h0 = one(rows, slots, index, weight, p, end, j, dim, error)
                    e1, f1, g1, h1 = one(rows, slots, index, weight, q, end, j, dim, error)
                    e2, f2, g2, h2 = one(rows, slots, index, weight, r, end, j, dim, error)
                    e3, f3, g3, h3 = one(rows, slots, index, weight, t, end, j, dim, error)
                    a, b, c, d = add(a, e0), add(b, f0), add(c, g0), add(d, h0)
                    if q < end:
                        a, b, c, d = add(a, e1), add(b, f1), add(c, g1), add(d, h1)
                    if r < end:
                        a, b, c, d = add(a, e2), add(b, f2), add(c, g2), add(d, h2)
                    if t < end:
                        a, b, c, d = add(a, e3), add(b, f3), add(c, g3), add(d, h3)
                    p = np.int32(p + 4)
                if row_scale.shape[0] > 0:
                    k = row_scale[i]
                    a, b, c, d = mul(k, a), mul(k, b), mul(k, c), mul(k, d)
                store(out, i, j, dim, vec, a, b, c, d)
                j = np.int32(j + (4 << shift))
            i = np.int32(i + (cuda.gridsize(1) >> shift))

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
# By dtype, and whether columns are read and written in fours (`hbkit.cuda.arith.fours`).
GATHER = {(dtype, vec): _gather(ROWS[dtype][0], vec) for dtype in ROWS for vec in (False, True)}
SCATTER = {(dtype, vec): _scatter(ROWS[dtype][1], vec) for dtype in ROWS for vec in (False, True)}
POOL = {(dtype, vec): _pool(ROWS[dtype][0], vec) for dtype in ROWS for vec in (False, True)}
SIGNATURES: dict[Any, str] = {padded: f"void({_INTS}, int64, int64[:,::1], {_ERROR})"}
for _dtype, _vec in GATHER:
    _rows, _suffix = _ARRAYS[_dtype], f"_{_dtype}{'_fours' if _vec else ''}"
    for _made, _arguments in (
        (GATHER, f"{_INTS}, {_INTS}, {_FLOATS}, int64, int64, int64, int64"),
        (SCATTER, f"{_INTS}, {_FLOATS}, int64, int64, int64, int64"),
        (POOL, f"{_INTS}, {_INTS}, {_INTS}, float32[::1], float32[::1], {_FLOATS}, int64"),
    ):
        _kernel = _made[_dtype, _vec]
        _kernel.__name__ += _suffix
        SIGNATURES[_kernel] = f"void({_rows}, {_arguments}, {_ERROR})"

sign(SIGNATURES)
