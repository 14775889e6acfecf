"""Rows as bytes on the wire: float32, float16, bfloat16, or int8 with a scale a row.

A block of n rows is their values, row after row in little-endian order, then for int8 their n scales. An int8 row is
about ``values * scale``: the scale is a bfloat16, its largest magnitude over 127 rounded up, so that it takes the range
of float32 whole. (A float16 scale takes the same two bytes and has three bits more, which the values cannot show; but
it ends at 2**-24, and gradients of a mean over 65,536 rows would be left with a handful of steps.)

Rows whose values are not all finite, or reach 2**127, come back as NaN from int8, whole, so that their owner sees them.
float16 gives infinity for what is beyond it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbkit._ext.hash import hash_bytes
from hbkit._ext.random import mix64
from hbkit.errors import InvalidArgument

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

WIRES = ("float32", "float16", "bfloat16", "int8")


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


def row_nbytes(dim: int, wire: str) -> int:
    """Bytes that a row of `dim` columns takes on the wire, its scale among them."""
    if wire not in WIRES:
        raise InvalidArgument(f"no wire {wire!r}", remedy=f"use one of {', '.join(WIRES)}")
    return dim + 2 if wire == "int8" else dim * (4 if wire == "float32" else 2)


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
    n, dim = rows.shape
    if out is None and not (wire == "float32" and residual is None):
        out = np.empty(n * row_nbytes(dim, wire), np.uint8)
    for name, given in (("residual", residual), ("out", out)):
        want = ((n, dim), np.float32) if name == "residual" else ((n * row_nbytes(dim, wire),), np.uint8)
        if given is not None and (given.shape, given.dtype) != want:
            raise InvalidArgument(f"{name} of {given.dtype}{given.shape}", remedy=f"give {want[1].__name__}{want[0]}")
    if noise is not None and noise.keys.shape != (n,):
        raise InvalidArgument(f"{len(noise.keys)} keys of {n} rows", remedy="give the noise a key a row")
    if residual is not None:
        rows = rows + residual
    data = _pack(rows, wire, noise).reshape(-1)
    if residual is not None:
        residual[...] = rows - unpack(data, dim, wire)
        residual[~np.isfinite(residual).all(axis=1)] = 0
    if out is None:
        return data
    out[:] = data
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
    n = len(data) // size if size else 0
    if n * size != len(data):
        raise InvalidArgument(f"{len(data)} bytes are no rows of dim {dim} as {wire}", remedy="give a whole block")
    if out is not None and (out.shape, out.dtype) != ((n, dim), np.float32):
        raise InvalidArgument(f"out of {out.dtype}{out.shape}", remedy=f"give float32{(n, dim)}")
    values = data[: n * (size - 2)] if wire == "int8" else data
    if wire == "float32":
        rows = values.view(np.float32).reshape(n, dim)
    elif wire == "float16":
        rows = values.view(np.float16).astype(np.float32).reshape(n, dim)
    elif wire == "bfloat16":
        rows = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(n, dim)
    else:
        scales = (data[n * dim :].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        rows = values.view(np.int8).reshape(n, dim) * scales[:, None]
    if out is None:
        return rows
    out[...] = rows
    return out


def stream(noise: Noise) -> int:
    """The 64-bit key of the generator."""
    name = np.frombuffer(noise.table.encode(), np.uint8)
    named = int(hash_bytes(name, np.array([0, len(name)]))[0]) % 2**64
    return int(mix64((mix64(noise.seed % 2**64) ^ named) + noise.rank + 1 & (2**64 - 1)))


def _bits(noise: Noise, dim: int) -> npt.NDArray[np.uint32]:
    """16 random bits a value: uint32[n, dim]."""
    keys, seed, mask = noise.keys.view(np.uint64), stream(noise), np.uint64(0xFFFFFFFF)
    blocks = np.arange((dim + 7) // 8, dtype=np.uint64)
    c0, c2 = np.broadcast_to(blocks, (len(keys), len(blocks))), (keys & mask)[:, None]
    c1, c3 = np.uint64(noise.step + 1), (keys >> np.uint64(32))[:, None]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)
    halves = np.stack([words & 0xFFFF, words >> 16], -1).reshape(len(keys), 8 * len(blocks))
    return np.asarray(halves[:, :dim], np.uint32)


def _pack(rows: Float32s, wire: str, noise: Noise | None) -> Bytes:
    dim = rows.shape[1]
    if wire == "float32":
        return rows.view(np.uint8)
    random = None if noise is None else _bits(noise, dim)
    if wire != "int8":
        return _narrow(rows, wire, random).view(np.uint8)
    largest = (rows.view(np.uint32) & 0x7FFFFFFF).max(axis=1, initial=0)
    bad = largest >= 0x7F000000
    # A little more than 1/127, so that no quotient is beyond 127.
    exact = np.where(bad, 0, largest).astype(np.uint32).view(np.float32) * np.float32(float.fromhex("0x1.02042p-7"))
    scales = np.maximum((exact.view(np.uint32) + 0xFFFF) >> 16, 0x0080).astype(np.uint16)
    inverse = np.float32(1) / (scales.astype(np.uint32) << 16).view(np.float32)
    quotients = np.where(bad[:, None], np.float32(0), rows) * inverse[:, None]
    if random is None:
        values = np.rint(quotients).astype(np.int8)
    else:  # with 15 bits behind the point
        fixed = np.rint(quotients * np.float32(32768)).astype(np.int32)
        values = ((fixed + (random & 0x7FFF).astype(np.int32)) >> 15).astype(np.int8)
    scales[bad] = 0x7FC0
    return np.concatenate([values.reshape(-1).view(np.uint8), scales.view(np.uint8)])


def _narrow(rows: Float32s, wire: str, random: npt.NDArray[np.uint32] | None) -> npt.NDArray[np.uint16]:
    """As ``_ext/kernels.c``, but that float16 has infinity beyond its range."""
    b = rows.view(np.uint32)
    sign, b = (b >> 16) & 0x8000, b & 0x7FFFFFFF
    if wire == "bfloat16":
        out = np.minimum((b + (0x7FFF + ((b >> 16) & 1) if random is None else random)) >> 16, 0x7F7F)
        out = np.where(b > 0x7F800000, 0x7FC0, np.where(b == 0x7F800000, 0x7F80, out))
    else:
        r = 0xFFF + ((b >> 13) & 1) if random is None else random & 0x1FFF
        out = np.minimum(((b + r) >> 13) - (112 << 10), 0x7BFF)
        small = b < 0x38800000  # the step is 2**-24: count steps
        steps = np.where(small, b, 0).astype(np.uint32).view(np.float32) * np.float32(2**24)
        few = np.rint(steps) if random is None else np.floor(steps + r.astype(np.float32) * np.float32(2**-13))
        out = np.where(small, few.astype(np.uint32), out)
        out = np.where(b >= 0x477FF000, 0x7C00, out)
        out = np.where(b > 0x7F800000, 0x7E00, out)
    return (out | sign).astype(np.uint16)
