"""Kernels of the int8 wire: rows scaled by their largest magnitude. As `hbkit.shuffle.quantize`, bit for bit.

16 threads share a row: they find its largest magnitude by votes, and each writes columns of its own, one of them the
scale. Rows are read and never written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import as_float, as_int, cuda, device, div, mul, rint, sign
from hbkit.cuda.device import COOPERATING
from hbkit.cuda.narrow import ZERO, load, store, widen_bfloat16
from hbkit.cuda.warp import xor

NO_SCALE = 0x7F000000  # bits of the magnitude from which on there is none: 2**127, infinity, NaN
INFINITY = np.float32(np.inf)
A_STEP = np.float32(float.fromhex("0x1.02042p-7"))  # a little more than 1/127, so that no quotient is beyond 127
NAN, LEAST = 0x7FC0, 0x0080  # scales: of a row that is not finite; and 2**-126, whose inverse is finite


@device
def size_of(x: Any) -> Any:
    """Magnitude of x; infinity where that has no scale."""
    size = abs(x)
    return INFINITY if as_int(size) >= NO_SCALE else size


def _quantize(vec: bool) -> Any:
    def quantize(rows: Any, values: Any, scales: Any, error: Any) -> None:
        """``rows[i]`` is about ``values[i] * scales[i]``: int8, and the bits of a bfloat16. 16 threads share a row."""
        n, dim = rows.shape
        part, group = cuda.threadIdx.x % COOPERATING, cuda.threadIdx.x // COOPERATING
        together = cuda.blockDim.x // COOPERATING
        for first in range(cuda.blockIdx.x * together, n, cuda.gridDim.x * together):
            i = first + group
            largest = ZERO
            if i < n:
                for j in range(4 * part, dim, 4 * COOPERATING):
                    a, b, c, d = load(rows, i, j, dim, vec)
                    largest = max(largest, max(size_of(a), size_of(b)))
                    largest = max(largest, max(size_of(c), size_of(d)))
            for mask in (8, 4, 2, 1):
                largest = max(largest, xor(largest, mask))
            if i < n:
                bad = as_int(largest) >= NO_SCALE
                bits = max((as_int(mul(largest, A_STEP)) + 0xFFFF) >> 16, LEAST)  # up to a bfloat16
                inverse = div(np.float32(1), as_float(bits << 16))
                for j in range(4 * part, dim, 4 * COOPERATING):
                    a, b, c, d = load(rows, i, j, dim, vec)
                    if bad:
                        a, b, c, d = ZERO, ZERO, ZERO, ZERO
                    p, q = np.int8(rint(mul(a, inverse))), np.int8(rint(mul(b, inverse)))
                    r, s = np.int8(rint(mul(c, inverse))), np.int8(rint(mul(d, inverse)))
                    store(values, i, j, dim, vec, p, q, r, s)
                if part == 0:
                    scales[i] = np.uint16(NAN if bad else bits)

    return quantize


def _dequantize(vec: bool) -> Any:
    def dequantize(values: Any, scales: Any, out: Any, error: Any) -> None:
        """``out[i]`` = ``values[i] * scales[i]``: float32 of int8 and the bits of a bfloat16."""
        n, dim = out.shape
        part = cuda.grid(1) % COOPERATING
        for i in range(cuda.grid(1) // COOPERATING, n, cuda.gridsize(1) // COOPERATING):
            step = widen_bfloat16(scales[i])
            for j in range(4 * part, dim, 4 * COOPERATING):
                a, b, c, d = load(values, i, j, dim, vec)
                a, b = mul(np.float32(a), step), mul(np.float32(b), step)
                c, d = mul(np.float32(c), step), mul(np.float32(d), step)
                store(out, i, j, dim, vec, a, b, c, d)

    return dequantize


# By whether columns are read and written in fours.
QUANTIZE = {vec: _quantize(vec) for vec in (False, True)}
DEQUANTIZE = {vec: _dequantize(vec) for vec in (False, True)}
QUANTIZE[True].__name__ += "_fours"
DEQUANTIZE[True].__name__ += "_fours"
SIGNATURES = {
    **dict.fromkeys(QUANTIZE.values(), "void(float32[:,::1], int8[:,::1], uint16[::1], int32[::1])"),
    **dict.fromkeys(DEQUANTIZE.values(), "void(int8[:,::1], uint16[::1], float32[:,::1], int32[::1])"),
}

sign(SIGNATURES)
