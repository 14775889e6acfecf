"""Snappy's raw format (pages of Parquet) to bytes; snappy_kernel.c does the work."""

from libc.stdint cimport int64_t, uint8_t

import numpy as np

from hbkit._ext.isa cimport kernels
from hbkit.errors import Corrupt, InvalidArgument

cdef extern from "snappy.h" nogil:
    int64_t hb_snappy_length(const uint8_t *, int64_t)
    int HB_SNAPPY_SLACK
    int HB_SNAPPY_OFFSET
    int HB_SNAPPY_TRUNCATED

SLACK = HB_SNAPPY_SLACK  # bytes that `out` has beyond the length
MOST = 22  # bytes that one compressed byte can give: three are a copy of 64


def length(const uint8_t[::1] data):
    """What `data` declares to decompress to, in bytes: int."""
    cdef int64_t n = data.shape[0]
    cdef int64_t found = hb_snappy_length(&data[0], n) if n else -1
    if found < 0:
        raise Corrupt("snappy data does not begin with a length")
    return found


def decompress(const uint8_t[::1] data, out=None):
    """The bytes that `data` compresses: uint8[length], of new memory or the first bytes of the uint8 array `out`.

    `out` needs `SLACK` bytes more than `length(data)`; what they hold afterwards is undefined.
    """
    cdef int64_t n = data.shape[0], size = length(data)
    cdef uint8_t[::1] to
    cdef int rc
    if size > MOST * n:
        raise Corrupt(f"{n} bytes of snappy data declare {size}")
    if out is None:
        out = np.empty(size + SLACK, np.uint8)
    to = out
    if to.shape[0] < size + SLACK:
        raise InvalidArgument(f"out has {to.shape[0]} bytes", remedy=f"{size} and {SLACK} more are written")
    with nogil:
        rc = kernels().snappy(&data[0], n, &to[0], size)
    if rc:
        what = ("is truncated" if rc == HB_SNAPPY_TRUNCATED else
                "copies from before its start" if rc == HB_SNAPPY_OFFSET else
                "has another length than it declares")
        raise Corrupt(f"snappy data {what}")
    return out[:size]
