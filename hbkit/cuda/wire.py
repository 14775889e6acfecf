"""Kernels of the int8 wire: rows scaled by their largest magnitude. As `hbkit.shuffle.quantize`, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import as_int, cuda, div, mul, rint, swap
from hbkit.cuda.device import BAD_VALUE, COOPERATING
from hbkit.cuda.narrow import ZERO, narrow_float16, widen_float16

INFINITY = 0x7F800000
LARGEST = np.float32(127 * 65504.0)  # what the largest float16 scale reaches


def quantize(rows: Any, values: Any, scales: Any, error: Any) -> None:
    """``rows[i]`` is about ``values[i] * scales[i]``: int8, and the bits of a float16. 16 threads share a row."""
    n, dim = rows.shape
    part, group = cuda.threadIdx.x % COOPERATING, cuda.threadIdx.x // COOPERATING
    together = cuda.blockDim.x // COOPERATING
    for first in range(cuda.blockIdx.x * together, n, cuda.gridDim.x * together):
        i = first + group
        largest = ZERO
        if i < n:
            for j in range(part, dim, COOPERATING):
                size = abs(rows[i, j])
                if as_int(size) >= INFINITY or size > LARGEST:
                    error[0] = BAD_VALUE
                    size = ZERO
                largest = max(largest, size)
        for mask in (8, 4, 2, 1):
            largest = max(largest, swap(largest, mask))
        if i < n:
            bits = narrow_float16(div(largest, np.float32(127)), -1)
            # float16 rounds: where it rounded down, 127 steps would not reach the largest value.
            if mul(widen_float16(bits), np.float32(127)) < largest:
                bits = np.uint16(bits + 1)
            step = widen_float16(bits)
            for j in range(part, dim, COOPERATING):
                fits = step > ZERO and abs(rows[i, j]) <= LARGEST
                values[i, j] = np.int8(rint(div(rows[i, j], step))) if fits else np.int8(0)
            if part == 0:
                scales[i] = bits


def dequantize(values: Any, scales: Any, out: Any, error: Any) -> None:
    """``out[i]`` = ``values[i] * scales[i]``: float32 of int8 and the bits of a float16."""
    n, dim = out.shape
    part = cuda.grid(1) % COOPERATING
    for i in range(cuda.grid(1) // COOPERATING, n, cuda.gridsize(1) // COOPERATING):
        step = widen_float16(scales[i])
        for j in range(part, dim, COOPERATING):
            out[i, j] = mul(np.float32(values[i, j]), step)


SIGNATURES = {
    quantize: "void(float32[:,::1], int8[:,::1], uint16[::1], int32[::1])",
    dequantize: "void(int8[:,::1], uint16[::1], float32[:,::1], int32[::1])",
}
