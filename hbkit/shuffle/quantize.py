"""Rows as bytes on the wire: float32, float16, bfloat16, or int8 with a scale a row.

A block of n rows is their values, row after row in little-endian order, then for int8 their n scales. An int8 row is
about ``values * scale``: the scale is a bfloat16, its largest magnitude over 127 rounded up, so that it takes the range
of float32 whole. (A float16 scale takes the same two bytes and has three bits more, which the values cannot show; but
it ends at 2**-24, and gradients of a mean over 65,536 rows would be left with a handful of steps.)

Rows whose values are not all finite, or reach 2**127, come back as NaN from int8, whole, so that their owner sees them.
float16 gives infinity for what is beyond it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext import wire as _ext
from hbkit._ext.hash import hash_bytes
from hbkit._ext.random import mix64
from hbkit.errors import InvalidArgument

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

WIRES = tuple(_ext.WIRES)


class Noise(NamedTuple):
    """What the random bits of stochastic rounding are drawn from: Philox(seed, table, rank, step, key, column).

    Attributes
    ----------
    seed : int
    table : str
    rank : int
        Who packs: ranks round one key's gradients apart.
    step : int
    keys : int64[n]
        One a row; rows of equal keys are rounded by equal bits.
    """

    seed: int
    table: str
    rank: int
    step: int
    keys: Int64s

    def stream(self) -> int:
        """The 64-bit key of the generator."""
        return _stream(self.seed, self.table, self.rank)


@lru_cache(maxsize=4096)
def _stream(seed: int, table: str, rank: int) -> int:
    name = np.frombuffer(table.encode(), np.uint8)
    named = int(hash_bytes(name, np.array([0, len(name)]))[0]) % 2**64
    return int(mix64(((mix64(seed % 2**64) ^ named) + rank + 1) % 2**64))


def row_nbytes(dim: int, wire: str) -> int:
    """Bytes that a row of `dim` columns takes on the wire, its scale among them."""
    nbytes: int = _ext.row_nbytes(dim, wire)
    return nbytes


def pack(
    rows: Float32s,
    wire: str,
    out: Bytes | None = None,
    noise: Noise | None = None,
    residual: Float32s | None = None,
) -> Bytes:
    """Rows as a block of bytes: uint8[n * row_nbytes(dim, wire)].

    Parameters
    ----------
    rows : float32[n, dim]
    wire : str
        One of `WIRES`.
    out : uint8[n * row_nbytes], optional
        Where the block is written; else memory of its own (for "float32" that of `rows`, which must then stay as it
        is).
    noise : Noise, optional
        Round up or down at random, so that the mean of many is the value; else to the nearest, ties to even.
    residual : float32[n, dim], optional
        What earlier blocks left out of these rows, changed in place: ``rows + residual`` is packed and what is lost of
        that is left there, 0 for a row that is not finite.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    if rows.ndim != 2:
        raise InvalidArgument(f"rows of shape {rows.shape}", remedy="give float32[n, dim]")
    nbytes = len(rows) * row_nbytes(rows.shape[1], wire)
    if out is None:
        if wire == "float32" and residual is None:
            return rows.view(np.uint8).reshape(-1)
        out = np.empty(nbytes, np.uint8)
    if noise is None or wire == "float32":
        _ext.pack(rows, wire, out, residual=residual)
    else:
        _ext.pack(rows, wire, out, noise.keys, noise.stream(), noise.step, residual)
    return out


def unpack(data: Bytes, dim: int, wire: str, out: Float32s | None = None) -> Float32s:
    """Rows of a block that `pack` made: float32[n, dim].

    Parameters
    ----------
    data : uint8[n * row_nbytes(dim, wire)]
    dim : int
    wire : str
    out : float32[n, dim], optional
        Where rows are written; else memory of their own (for "float32" that of `data`).
    """
    size = row_nbytes(dim, wire)
    n, left = divmod(len(data), size)
    if left:
        raise InvalidArgument(f"{len(data)} bytes are no rows of dim {dim} as {wire}", remedy="give a whole block")
    if out is None:
        if wire == "float32" and data.ctypes.data % 4 == 0:
            return data.view(np.float32).reshape(n, dim)
        out = np.empty((n, dim), np.float32)
    _ext.unpack(data, wire, out)
    return out
