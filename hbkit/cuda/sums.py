"""Sums of gradients by segment, in the order that the C kernels have: blocks of 64 in order, then their sums in order.

A segment of at most a block is summed by whoever needs it (`gradient`). Of longer ones `block_sums` first sums all
blocks at once, so that a key that half of a batch asks for does not leave the device to one warp. Block k of segment s
is row ``starts[s] // 32 + k`` of `partials`: a segment of more than 64 positions has at most as many blocks as its
positions have 32s, so no two share a row, and nothing has to be counted first. A row of `partials`, as of the sums, is
written by the threads that share it, each its own columns, and read by a later launch.

Positions and rows are counted by 32 bits, which leaves registers for more warps (`hbkit.cuda.rows`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import add, cuda, device, mul, sign
from hbkit.cuda.device import BAD_SEGMENT
from hbkit.cuda.narrow import ZERO, load, store

SUM_BLOCK = 64
HALF_BLOCK = 32
WAYS = 8  # of a search


def n_partials(n: int) -> int:
    """Rows of `partials` for segments of `n` positions."""
    return n // HALF_BLOCK + 1


@device
def term(values: Any, rows: Any, scale: Any, p: Any, j: Any, dim: Any, vec: Any, error: Any) -> Any:
    """Columns j..j+3 of position p: ``scale[p] * values[rows[p]]``; rows and scale may be empty (p, and 1)."""
    row = p
    if rows.shape[0] > 0:
        row = rows[p]
    if row < 0 or row >= values.shape[0]:
        error[0] = BAD_SEGMENT
        return ZERO, ZERO, ZERO, ZERO
    a, b, c, d = load(values, np.int32(row), j, dim, vec)
    if scale.shape[0] > 0:
        k = scale[p]
        return mul(k, a), mul(k, b), mul(k, c), mul(k, d)
    return a, b, c, d


@device
def block(
    values: Any, rows: Any, scale: Any, order: Any, begin: Any, end: Any, j: Any, dim: Any, vec: Any, error: Any
) -> Any:
    """Columns j..j+3 of the sum over positions ``order[begin:end]``, in order; zeros where there are none."""
    if begin >= end:
        return ZERO, ZERO, ZERO, ZERO
    a, b, c, d = term(values, rows, scale, order[begin], j, dim, vec, error)
    i = np.int32(begin + 1)
    while i + 3 < end:  # four are read at once, and added in order
        e0, f0, g0, h0 = term(values, rows, scale, order[i], j, dim, vec, error)
        e1, f1, g1, h1 = term(values, rows, scale, order[i + 1], j, dim, vec, error)
        e2, f2, g2, h2 = term(values, rows, scale, order[i + 2], j, dim, vec, error)
        e3, f3, g3, h3 = term(values, rows, scale, order[i + 3], j, dim, vec, error)
        a, b, c, d = add(a, e0), add(b, f0), add(c, g0), add(d, h0)
        a, b, c, d = add(a, e1), add(b, f1), add(c, g1), add(d, h1)
        a, b, c, d = add(a, e2), add(b, f2), add(c, g2), add(d, h2)
        a, b, c, d = add(a, e3), add(b, f3), add(c, g3), add(d, h3)
        i = np.int32(i + 4)
    while i < end:
        e0, f0, g0, h0 = term(values, rows, scale, order[i], j, dim, vec, error)
        a, b, c, d = add(a, e0), add(b, f0), add(c, g0), add(d, h0)
        i = np.int32(i + 1)
    return a, b, c, d


@device
def gradient(
    values: Any,
    rows: Any,
    scale: Any,
    order: Any,
    starts: Any,
    partials: Any,
    s: Any,
    j: Any,
    dim: Any,
    vec: Any,
    error: Any,
) -> Any:
    """Columns j..j+3 of segment s; ``values[s]`` as it stands where `order` is empty."""
    if order.shape[0] == 0:
        return load(values, s, j, dim, vec)
    begin, end = starts[s], starts[s + 1]
    if begin < 0 or end > order.shape[0]:
        error[0] = BAD_SEGMENT
        return ZERO, ZERO, ZERO, ZERO
    if end - begin <= SUM_BLOCK:
        return block(values, rows, scale, order, np.int32(begin), np.int32(end), j, dim, vec, error)
    k = np.int32(begin // HALF_BLOCK)
    last = np.int32(k + (end - begin - 1) // SUM_BLOCK)
    a, b, c, d = load(partials, k, j, dim, vec)
    while k < last:
        k = np.int32(k + 1)
        e, f, g, h = load(partials, k, j, dim, vec)
        a, b, c, d = add(a, e), add(b, f), add(c, g), add(d, h)
    return a, b, c, d


@device
def segment_of(starts: Any, row: Any) -> Any:
    """The last segment that begins at or before a row of `partials`; `WAYS - 1` reads at a time are on their way."""
    low, high, limit = 0, starts.shape[0] - 1, (row + 1) * HALF_BLOCK
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        n_before = 0
        for way in range(1, WAYS):
            s = low + way * step
            n_before += (s < high) & (starts[min(s, high - 1)] < limit)
        low += n_before * step
        high = min(low + step, high)
    return low


def _block_sums(vec: bool) -> Any:
    def block_sums(
        values: Any,
        rows: Any,
        scale: Any,
        order: Any,
        starts: Any,
        partials: Any,
        shift: Any,
        error: Any,
    ) -> None:
        """Sums of the blocks of segments that have more than one; other rows of `partials` are left alone."""
        dim = np.int32(partials.shape[1])
        for at in range(cuda.grid(1) >> shift, partials.shape[0], cuda.gridsize(1) >> shift):
            low = segment_of(starts, at)
            begin, end = starts[low], starts[low + 1]
            if begin < 0 or end > order.shape[0]:
                error[0] = BAD_SEGMENT
                continue
            first = begin + (at - begin // HALF_BLOCK) * SUM_BLOCK
            if end - begin > SUM_BLOCK and begin <= first and first < end:
                start, stop = np.int32(first), np.int32(min(first + SUM_BLOCK, end))
                j = np.int32(4 * (cuda.grid(1) & ((1 << shift) - 1)))
                while j < dim:
                    a, b, c, d = block(values, rows, scale, order, start, stop, j, dim, vec, error)
                    store(partials, np.int32(at), j, dim, vec, a, b, c, d)
                    j = np.int32(j + (4 << shift))

    return block_sums


def _segment_sum(vec: bool) -> Any:
    def segment_sum(
        values: Any,
        rows: Any,
        scale: Any,
        order: Any,
        starts: Any,
        partials: Any,
        out: Any,
        shift: Any,
        error: Any,
    ) -> None:
        """``out[s]`` = sum of ``scale[p] * values[rows[p]]`` over p in ``order[starts[s]:starts[s + 1]]``."""
        n, dim = np.int32(out.shape[0]), np.int32(out.shape[1])
        s = np.int32(cuda.grid(1) >> shift)
        while s < n:
            j = np.int32(4 * (cuda.grid(1) & ((1 << shift) - 1)))
            while j < dim:
                a, b, c, d = gradient(values, rows, scale, order, starts, partials, s, j, dim, vec, error)
                store(out, s, j, dim, vec, a, b, c, d)
                j = np.int32(j + (4 << shift))
            s = np.int32(s + (cuda.gridsize(1) >> shift))

    return segment_sum


GRADIENTS = "float32[:,::1], int64[::1], float32[::1], int64[::1], int64[::1], float32[:,::1]"
# By whether columns are read and written in fours.
BLOCK_SUMS = {vec: _block_sums(vec) for vec in (False, True)}
SEGMENT_SUM = {vec: _segment_sum(vec) for vec in (False, True)}
BLOCK_SUMS[True].__name__ += "_fours"
SEGMENT_SUM[True].__name__ += "_fours"
SIGNATURES = {
    **dict.fromkeys(BLOCK_SUMS.values(), f"void({GRADIENTS}, int64, int32[::1])"),
    **dict.fromkeys(SEGMENT_SUM.values(), f"void({GRADIENTS}, float32[:,::1], int64, int32[::1])"),
}

sign(SIGNATURES)
