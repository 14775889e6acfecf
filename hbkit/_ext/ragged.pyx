"""Ragged conversions: copies of ranges of fixed-size items, whole ranges at a time, bounds proven before the first."""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy

import numpy as np

from hbkit.errors import InvalidArgument


def check_splits(const int64_t[::1] splits, int64_t n_values):
    """Raise InvalidArgument unless splits start at 0, never decrease and end at n_values."""
    cdef int64_t i, bad = -1
    if splits.shape[0] == 0 or splits[0] != 0:
        raise InvalidArgument("row_splits do not start at 0", remedy="give int64[n + 1], nondecreasing from 0")
    with nogil:
        for i in range(1, splits.shape[0]):
            if splits[i] < splits[i - 1]:
                bad = i
                break
    if bad >= 0:
        raise InvalidArgument(f"row_splits decrease at {bad}", remedy="give int64[n + 1], nondecreasing from 0")
    if splits[splits.shape[0] - 1] != n_values:
        raise InvalidArgument(f"row_splits end at {splits[splits.shape[0] - 1]} but there are {n_values} values",
                              remedy="the last split is the number of values")


def take_splits(const int64_t[::1] splits, const int64_t[::1] rows):
    """Row splits of the rows taken: int64[len(rows) + 1]. Rows out of range raise InvalidArgument."""
    cdef int64_t i, r, n = splits.shape[0] - 1, total = 0, bad = -1
    out = np.empty(rows.shape[0] + 1, np.int64)
    cdef int64_t[::1] to = out
    to[0] = 0
    with nogil:
        for i in range(rows.shape[0]):
            r = rows[i]
            if r < 0 or r >= n:
                bad = i
                break
            total += splits[r + 1] - splits[r]
            to[i + 1] = total
    if bad >= 0:
        raise InvalidArgument(f"row {rows[bad]} of {n}", remedy="rows are 0..n-1; negative ones are not allowed")
    return out


def take_ranges(const uint8_t[::1] items, int64_t itemsize, const int64_t[::1] splits, const int64_t[::1] rows,
                const int64_t[::1] new_splits, uint8_t[::1] out):
    """Copy the items of each row taken: `new_splits` from `take_splits`, `out` of new_splits[-1] * itemsize bytes."""
    cdef int64_t i, n = rows.shape[0], size
    if items.shape[0] < splits[splits.shape[0] - 1] * itemsize or new_splits.shape[0] != n + 1 or \
            out.shape[0] != new_splits[n] * itemsize:
        raise InvalidArgument("items or out do not have the size that the splits say", remedy="use take_splits")
    with nogil:
        for i in range(n):
            size = (new_splits[i + 1] - new_splits[i]) * itemsize
            if size:
                memcpy(&out[new_splits[i] * itemsize], &items[splits[rows[i]] * itemsize], size)


def pad_ranges(const uint8_t[::1] items, int64_t itemsize, const int64_t[::1] splits, int64_t length, bint tail,
               uint8_t[::1] out):
    """Copy each row's items into `out` (rows x length items, prefilled with the padding).

    A row longer than `length` loses its tail if `tail`, else its head.
    """
    cdef int64_t b, n = splits.shape[0] - 1, size, first
    if items.shape[0] < splits[n] * itemsize or length < 0 or out.shape[0] != n * length * itemsize:
        raise InvalidArgument("items or out do not have the size that the splits say",
                              remedy="out holds rows x length items")
    with nogil:
        for b in range(n):
            size, first = splits[b + 1] - splits[b], splits[b]
            if size > length:
                if not tail:
                    first += size - length
                size = length
            if size and itemsize:
                memcpy(&out[b * length * itemsize], &items[first * itemsize], size * itemsize)
