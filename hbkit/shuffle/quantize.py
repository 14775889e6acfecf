"""int8 on the wire: each row scaled by its largest magnitude, with a float16 scale beside it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit.errors import InvalidArgument

Float32s = npt.NDArray[np.float32]


class Quantized(NamedTuple):
    """Rows as int8.

    Attributes
    ----------
    values : int8[n, dim]
    scales : float16[n]
        A row is about ``values * scale``; 0 for a row of zeros.
    """

    values: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]


def quantize(rows: Float32s) -> Quantized:
    """Rows float32[n, dim] to the nearest int8 multiples of a scale per row: error at most half a scale.

    Raises
    ------
    InvalidArgument
        A row is not finite, or too large for a float16 scale.
    """
    rows = np.asarray(rows, np.float32)
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise InvalidArgument(f"row {bad} is not finite", remedy="clip or skip it before the exchange")
    largest = np.abs(rows).max(axis=1, initial=0.0)
    if largest.size and largest.max() > 127 * float(np.finfo(np.float16).max):
        raise InvalidArgument(f"a value of magnitude {largest.max():g}", remedy="clip it, or use a wider wire dtype")
    scales = (largest / np.float32(127)).astype(np.float16)
    # float16 rounds: where it rounded down, 127 steps would not reach the largest value.
    short = scales.astype(np.float32) * np.float32(127) < largest
    scales[short] = np.nextafter(scales[short], np.float16(np.inf))
    steps = scales.astype(np.float32)[:, None]
    quotient = np.divide(rows, steps, out=np.zeros_like(rows), where=steps > 0)
    return Quantized(np.rint(quotient).astype(np.int8), scales)


def dequantize(quantized: Quantized) -> Float32s:
    """Rows float32[n, dim] of what `quantize` made."""
    return quantized.values.astype(np.float32) * quantized.scales.astype(np.float32)[:, None]
