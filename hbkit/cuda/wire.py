"""Kernels of the int8 wire: rows scaled by their largest magnitude. As `hbkit.shuffle.quantize`, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import as_int, cuda, device, div, mul, rint, swap
from hbkit.cuda.device import BAD_VALUE, COOPERATING
from hbkit.cuda.narrow import ZERO, load, narrow_float16, store, widen_float16

INFINITY = 0x7F800000
LARGEST = np.float32(127 * 65504.0)  # what the largest float16 scale reaches


@device
def size_of(x: Any, error: Any) -> Any:
    """Magnitude of what has one that fits, else 0."""
    size = abs(x)
    if as_int(size) >= INFINITY or size > LARGEST:
        error[0] = BAD_VALUE
        size = ZERO
    return size


@device
def steps_of(x: Any, step: Any) -> Any:
    """The nearest multiple of the step; 0 where there is none."""
    return np.int8(rint(div(x, step))) if step > ZERO and abs(x) <= LARGEST else np.int8(0)


def _quantize(vec: bool) -> Any:
    def quantize(rows: Any, values: Any, scales: Any, error: Any) -> None:
        """``rows[i]`` is about ``values[i] * scales[i]``: int8, and the bits of a float16. 16 threads share a row."""
        n, dim = rows.shape
        part, group = cuda.threadIdx.x % COOPERATING, cuda.threadIdx.x // COOPERATING
        together = cuda.blockDim.x // COOPERATING
        for first in range(cuda.blockIdx.x * together, n, cuda.gridDim.x * together):
            i = first + group
            largest = ZERO
            if i < n:
                for j in range(4 * part, dim, 4 * COOPERATING):
                    a, b, c, d = load(rows, i, j, dim, vec)
                    largest = max(largest, max(size_of(a, error), size_of(b, error)))
                    largest = max(largest, max(size_of(c, error), size_of(d, error)))
            for mask in (8, 4, 2, 1):
                largest = max(largest, swap(largest, mask))
            if i < n:
                bits = narrow_float16(div(largest, np.float32(127)), -1)
                # float16 rounds: where it rounded down, 127 steps would not reach the largest value.
                if mul(widen_float16(bits), np.float32(127)) < largest:
                    bits = np.uint16(bits + 1)
                step = widen_float16(bits)
                for j in range(4 * part, dim, 4 * COOPERATING):
                    a, b, c, d = load(rows, i, j, dim, vec)
                    p, q, r, s = steps_of(a, step), steps_of(b, step), steps_of(c, step), steps_of(d, step)
                    store(values, i, j, dim, vec, p, q, r, s)
                if part == 0:
                    scales[i] = bits

    return quantize


def _dequantize(vec: bool) -> Any:
    def dequantize(values: Any, scales: Any, out: Any, error: Any) -> None:
        """``out[i]`` = ``values[i] * scales[i]``: float32 of int8 and the bits of a float16."""
        n, dim = out.shape
        part = cuda.grid(1) % COOPERATING
        for i in range(cuda.grid(1) // COOPERATING, n, cuda.gridsize(1) // COOPERATING):
            step = widen_float16(scales[i])
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
