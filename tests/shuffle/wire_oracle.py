"""Rows on the wire in plain NumPy: what the kernels must give, bit for bit."""

import numpy as np

from hbkit._ext.random import philox


def bits(seed, step, keys, dim):
    """16 random bits a value: uint32[n, dim]."""
    out = np.empty((len(keys), dim + 7), np.uint32)
    for i, key in enumerate(keys.view(np.uint64).tolist()):
        for block in range((dim + 7) // 8):
            words = philox((block, step + 1, key & 0xFFFFFFFF, key >> 32), (seed & 0xFFFFFFFF, seed >> 32))
            out[i, 8 * block : 8 * block + 8] = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return out[:, :dim]


def pack(rows, wire, random=None):
    """A block of rows, rounded at random by 16 bits a value: uint8[n * row_nbytes]."""
    if wire == "float32":
        return rows.view(np.uint8).reshape(-1)
    if wire != "int8":
        return narrow(rows, wire, random).view(np.uint8).reshape(-1)
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


def narrow(rows, wire, random):
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


def unpack(data, n, dim, wire):
    """Rows of a block: float32[n, dim]."""
    values = data[: n * dim] if wire == "int8" else data
    if wire == "float32":
        return values.view(np.float32).reshape(n, dim)
    if wire == "float16":
        return values.view(np.float16).astype(np.float32).reshape(n, dim)
    if wire == "bfloat16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(n, dim)
    scales = (data[n * dim :].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.view(np.int8).reshape(n, dim) * scales[:, None]
