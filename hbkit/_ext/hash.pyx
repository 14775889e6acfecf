"""XXH64: the seeded 64-bit hash that turns strings and integers into keys (github.com/Cyan4973/xxHash, spec 0.2)."""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy

import numpy as np

from hbkit.errors import InvalidArgument

cdef uint64_t P1 = 11400714785074694791u
cdef uint64_t P2 = 14029467366897019727u
cdef uint64_t P3 = 1609587929392839161u
cdef uint64_t P4 = 9650029242287828579u
cdef uint64_t P5 = 2870177450012600261u


cdef inline uint64_t _rotate(uint64_t x, int r) noexcept nogil:
    return (x << r) | (x >> (64 - r))


cdef inline uint64_t _round(uint64_t acc, uint64_t lane) noexcept nogil:
    return _rotate(acc + lane * P2, 31) * P1


cdef inline uint64_t _load64(const uint8_t *p) noexcept nogil:
    cdef uint64_t x
    memcpy(&x, p, 8)
    return x


cdef inline uint64_t _xxh64(const uint8_t *p, int64_t n, uint64_t seed) noexcept nogil:
    cdef const uint8_t *end = p + n
    cdef uint64_t h, a, b, c, d
    cdef uint32_t word
    if n >= 32:
        a, b, c, d = seed + P1 + P2, seed + P2, seed, seed - P1
        while end - p >= 32:
            a = _round(a, _load64(p))
            b = _round(b, _load64(p + 8))
            c = _round(c, _load64(p + 16))
            d = _round(d, _load64(p + 24))
            p += 32
        h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        h = (h ^ _round(0, a)) * P1 + P4
        h = (h ^ _round(0, b)) * P1 + P4
        h = (h ^ _round(0, c)) * P1 + P4
        h = (h ^ _round(0, d)) * P1 + P4
    else:
        h = seed + P5
    h += <uint64_t>n
    while end - p >= 8:
        h = _rotate(h ^ _round(0, _load64(p)), 27) * P1 + P4
        p += 8
    if end - p >= 4:
        memcpy(&word, p, 4)
        h = _rotate(h ^ (word * P1), 23) * P2 + P3
        p += 4
    while p < end:
        h = _rotate(h ^ (p[0] * P5), 11) * P1
        p += 1
    h = (h ^ (h >> 33)) * P2
    h = (h ^ (h >> 29)) * P3
    return h ^ (h >> 32)


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
            to[i] = <int64_t>_xxh64(base + splits[i], splits[i + 1] - splits[i], seed)
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
            to[i] = <int64_t>_xxh64(<const uint8_t *>&values[i], 8, seed)
    return out
