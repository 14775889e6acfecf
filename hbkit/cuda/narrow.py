"""Rows of float32, float16 and bfloat16 in device memory: four columns in, four columns out.

`ROWS` names a pair for each dtype: ``load(rows, i, j, end, vec)`` gives columns j..j+3 as float32 (from `end` on,
anything), and ``store(rows, i, j, end, vec, a, b, c, d, noise)`` writes them. float16 and bfloat16 lie in an array of
uint16. `vec` says that whole fours lie at multiples of their size. `noise` are 64 random bits, 16 a column, by which
narrow rows round up or down; where it is `NEAREST` they round to the nearest value, ties to even. As
``_ext/kernels.c``, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hbkit.cuda.arith import add, as_float, as_int, device, load4, mul, store4

NEAREST = -1, -1, -1, -1
ZERO = np.float32(0)


@device
def load(array: Any, i: Any, j: Any, end: Any, vec: Any) -> Any:
    """Columns j..j+3 of row i of an array of any dtype; the last that is there in place of what is not."""
    if vec:
        return load4(array, i, j)
    last = end - 1
    return array[i, j], array[i, min(j + 1, last)], array[i, min(j + 2, last)], array[i, min(j + 3, last)]


@device
def store(array: Any, i: Any, j: Any, end: Any, vec: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Write columns j..j+3 of row i of an array of any dtype."""
    if vec:
        store4(array, i, j, a, b, c, d)
    else:
        array[i, j] = a
        if j + 1 < end:
            array[i, j + 1] = b
        if j + 2 < end:
            array[i, j + 2] = c
        if j + 3 < end:
            array[i, j + 3] = d


@device
def store_float32(
    rows: Any, i: Any, j: Any, end: Any, vec: Any, a: Any, b: Any, c: Any, d: Any, noise: Any
) -> None:  # one of the stores of ROWS
    store(rows, i, j, end, vec, a, b, c, d)


@device
def widen_float16(h: Any) -> Any:
    """float32 of the bits of a float16."""
    h = np.int64(h)
    # Times 2^112 moves the exponent to float32's range, denormals included; infinity and NaN need their own.
    b = as_int(mul(as_float((h & 0x7FFF) << 13), np.float32(2.0**112)))
    if (h & 0x7C00) == 0x7C00:
        b |= 0x7F800000
    return as_float(b | (h & 0x8000) << 16)


@device
def widen_bfloat16(h: Any) -> Any:
    """float32 of the bits of a bfloat16."""
    return as_float(np.int64(h) << 16)


@device
def narrow_float16(x: Any, random: Any) -> Any:
    """Bits of x as float16, up or down by 13 random bits, or to the nearest where `random` is below 0."""
    b = as_int(x)
    sign = (b >> 16) & 0x8000
    b &= 0x7FFFFFFF
    r = random & 0x1FFF if random >= 0 else 0xFFF + ((b >> 13) & 1)
    out = min(((b + r) >> 13) - (112 << 10), 0x7BFF)
    if b < 0x38800000:  # below 2^-14 the step is 2^-24: count steps instead
        steps = mul(as_float(b), np.float32(2.0**24))
        if random >= 0:
            out = np.int64(add(steps, mul(np.float32(r), np.float32(2.0**-13))))
        else:
            out = as_int(add(steps, np.float32(2.0**23))) & 0x7FFFFF
    elif b > 0x7F800000:
        out = 0x7E00
    elif b == 0x7F800000:
        out = 0x7C00
    return np.uint16(out | sign)


@device
def narrow_bfloat16(x: Any, random: Any) -> Any:
    """Bits of x as bfloat16, up or down by 16 random bits, or to the nearest where `random` is below 0."""
    b = as_int(x)
    sign = (b >> 16) & 0x8000
    b &= 0x7FFFFFFF
    r = random & 0xFFFF if random >= 0 else 0x7FFF + ((b >> 16) & 1)
    out = min((b + r) >> 16, 0x7F7F)
    if b > 0x7F800000:
        out = 0x7FC0
    elif b == 0x7F800000:
        out = 0x7F80
    return np.uint16(out | sign)


def _pair(widen: Any, narrow: Any) -> tuple[Any, Any]:
    """load and store of a narrow dtype."""

    @device
    def load_narrow(rows: Any, i: Any, j: Any, end: Any, vec: Any) -> Any:
        a, b, c, d = load(rows, i, j, end, vec)
        return widen(a), widen(b), widen(c), widen(d)

    @device
    def store_narrow(rows: Any, i: Any, j: Any, end: Any, vec: Any, a: Any, b: Any, c: Any, d: Any, noise: Any) -> None:
        p, q, r, s = narrow(a, noise[0]), narrow(b, noise[1]), narrow(c, noise[2]), narrow(d, noise[3])
        store(rows, i, j, end, vec, p, q, r, s)

    return load_narrow, store_narrow


ROWS = {
    "float32": (load, store_float32),
    "float16": _pair(widen_float16, narrow_float16),
    "bfloat16": _pair(widen_bfloat16, narrow_bfloat16),
}


@device
def noise4(seed: Any, key: Any, step: Any, column: Any) -> Any:
    """16 random bits for each of the columns from `column` (a multiple of 4) on: Philox4x32-10, as the C kernels'."""
    c0, c1 = int(column) >> 3, (int(step) + 1) & 0xFFFFFFFF  # step 0 is the initializers'
    key, seed = int(key), int(seed)
    c2, c3 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = ((p1 >> 32) & 0xFFFFFFFF) ^ c1 ^ k0, ((p0 >> 32) & 0xFFFFFFFF) ^ c3 ^ k1
        c1, c3 = p1 & 0xFFFFFFFF, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    if column & 4:
        c0, c1 = c2, c3
    return c0 & 0xFFFF, c0 >> 16, c1 & 0xFFFF, c1 >> 16


@device
def noise_from(seed: Any, key: Any, step: Any, column: Any) -> Any:
    """As `noise4`, from any column on."""
    beyond = column & 3
    a, b, c, d = noise4(seed, key, step, column - beyond)
    e, f, g = a, b, c
    if beyond > 0:
        e, f, g, _ = noise4(seed, key, step, column - beyond + 4)
    for _ in range(beyond):
        a, b, c, d, e, f = b, c, d, e, f, g
    return a, b, c, d
