"""Counter-based random numbers: the same key and column give the same value in any order, on any machine."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

import numpy as np

from hbkit._ext.isa cimport hb_draw, hb_fp_enter, hb_fp_leave, hb_fp_state, hb_mix64, hb_philox, kernels
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

    Row i, columns 4k to 4k + 3 come from the words w of Philox4x32-10 with counter (k, 0, key low, key high) under
    `seed`, in float32 by + - * and sqrt. With u = (w // 2**9 + 1/2) / 2**23: uniform a + (b - a) u; truncated_normal
    a + b Q(u), Q the quantile of a normal cut at two standard deviations; constant a. normal: a + b times Box and
    Muller's r cos t and r sin t in columns 4k and 4k + 2, r of w[0] and t of w[2]; columns 4k + 1 and 4k + 3 likewise
    of w[1] and w[3].
    """
    if kind not in KINDS or dim < 0:
        raise InvalidArgument(f"no initializer {kind!r} of dim {dim}", remedy=f"use one of {', '.join(KINDS)}")
    out = np.empty((keys.shape[0], dim), np.float32)
    cdef float[:, ::1] to = out
    cdef hb_draw draw = hb_draw(KINDS[kind], 0, dim, a, b, seed)
    cdef hb_fp_state fp
    if out.size:
        with nogil:
            fp = hb_fp_enter()
            kernels().initialize(&draw, &keys[0], keys.shape[0], &to[0, 0], dim)
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
