"""XXH64 of strings and of integers: see xxh64.h."""

from libc.stdint cimport int64_t, uint64_t, uint8_t

import numpy as np

from hbkit.errors import InvalidArgument

cdef extern from "xxh64.h" nogil:
    uint64_t hb_xxh64(const uint8_t *, int64_t, uint64_t)


def hash_bytes(const uint8_t[::1] data, const int64_t[::1] splits, uint64_t seed=0):
    """XXH64 of each string ``data[splits[i]:splits[i+1]]``, as signed: int64[n]."""
    cdef int64_t n = splits.shape[0] - 1, i, size = data.shape[0]
    cdef const uint8_t *base = &data[0] if size else NULL
    cdef int ok = n >= 0
    out = np.empty(max(n, 0), np.int64)
    cdef int64_t[::1] to = out
    with nogil:
        for i in range(n):
            if splits[i] < 0 or splits[i + 1] < splits[i] or splits[i + 1] > size:
                ok = 0
                break
            to[i] = <int64_t>hb_xxh64(base + splits[i], splits[i + 1] - splits[i], seed)
    if not ok:
        raise InvalidArgument("splits reach outside the bytes", remedy="give n + 1 nondecreasing splits")
    return out


def hash_ints(const int64_t[::1] values, uint64_t seed=0):
    """XXH64 of the eight little-endian bytes of each value, as signed: int64[n]."""
    out = np.empty(values.shape[0], np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t i
    with nogil:
        for i in range(values.shape[0]):
            to[i] = <int64_t>hb_xxh64(<const uint8_t *>&values[i], 8, seed)
    return out
