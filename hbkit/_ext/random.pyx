"""Counter-based random numbers: the same key and column give the same value in any order, on any machine."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

import numpy as np

from hbkit._ext.isa cimport hb_fp_enter, hb_fp_leave, hb_fp_state, hb_mix64, hb_philox, kernels
from hbkit.errors import InvalidArgument

KINDS = {"uniform": 0, "normal": 1, "truncated_normal": 2, "constant": 3}


def mix64(uint64_t x):
    """The finaliser of splitmix64, a bijection of 64 bits: int in [0, 2**64)."""
    return hb_mix64(x)


def philox(counter, key):
    """Philox4x32-10 of a counter of four 32-bit words under a key of two: tuple of four ints."""
    cdef uint32_t c[4]
    cdef uint32_t k[2]
    cdef uint32_t out[4]
    c[0], c[1], c[2], c[3] = counter
    k[0], k[1] = key
    hb_philox(c, k, out)
    return out[0], out[1], out[2], out[3]


def initialize(str kind, double a, double b, uint64_t seed, const int64_t[::1] keys, int64_t dim):
    """Initial rows of keys: float32[n, dim].

    Row i, column j comes from word j % 4 of Philox4x32-10 with counter (j // 4, 0, key low, key high) under `seed`,
    as u = (word + 1/2) / 2**32: uniform a + (b - a) u; normal a + b Q(u) with Q the normal quantile (Wichura's AS 241,
    built from + - * / and sqrt); truncated_normal the same within two standard deviations; constant a.
    """
    if kind not in KINDS or dim < 0:
        raise InvalidArgument(f"no initializer {kind!r} of dim {dim}", remedy=f"use one of {', '.join(KINDS)}")
    out = np.empty((keys.shape[0], dim), np.float32)
    cdef float[:, ::1] to = out
    cdef int code = KINDS[kind]
    cdef hb_fp_state fp
    if out.size:
        with nogil:
            fp = hb_fp_enter()
            kernels().initialize(code, a, b, seed, &keys[0], keys.shape[0], dim, &to[0, 0])
            hb_fp_leave(fp)
    return out


def permutation(const uint64_t[::1] draws):
    """0..n-1 in an order that n random words decide (Fisher and Yates, by Durstenfeld): int64[n]; n is below 2**32."""
    cdef int64_t n = draws.shape[0], i, j, x
    if n >= 1 << 32:
        raise InvalidArgument(f"{n} rows to permute", remedy="shuffle fewer at a time")
    out = np.arange(n)
    cdef int64_t[::1] to = out
    with nogil:
        for i in range(n - 1, 0, -1):
            j = <int64_t>(((draws[i] >> 32) * <uint64_t>(i + 1)) >> 32)
            x = to[i]
            to[i] = to[j]
            to[j] = x
    return out
