"""Ragged conversions: copies of ranges of fixed-size items, whole ranges at a time, bounds proven before the first."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy

import numpy as np

from hbkit._ext.isa cimport kernels
from hbkit.errors import InvalidArgument


cdef extern from *:
    """
    #define HB_PREFETCH(p) __builtin_prefetch(p, 0, 2)
    """
    void HB_PREFETCH(const void *) nogil

# Items up to here fit a core's second cache: they are fetched in their order, which is several times as fast as in the
# order of the rows.
cdef int64_t FETCHED_NBYTES = 1 << 20


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


cdef inline void _copy_item(uint8_t *to, const uint8_t *at, int64_t size) noexcept nogil:
    if size == 8:
        memcpy(to, at, 8)
    elif size == 4:
        memcpy(to, at, 4)
    else:
        memcpy(to, at, size)


cdef _bases(list parts, int64_t itemsize, const int32_t[::1] part, const int64_t[::1] rows, list sizes):
    """Addresses of the parts as uint64[n]; proves that every (part, row) lies within them."""
    cdef int64_t i, n = rows.shape[0], k, bad = -1
    cdef const uint8_t[::1] view
    cdef int64_t n_parts = len(parts)
    cdef uint64_t[::1] base = np.zeros(max(n_parts, 1), np.uint64)
    cdef int64_t[::1] size = np.array(sizes, np.int64)
    for i in range(n_parts):
        view = parts[i]
        base[i] = <uint64_t>&view[0] if view.shape[0] else 0
        if size[i] * itemsize > view.shape[0]:
            raise InvalidArgument("a part has fewer bytes than its rows need", remedy="give whole parts")
    if part is not None and part.shape[0] != n or part is None and n_parts != 1:
        raise InvalidArgument(f"{n} rows of unknown parts", remedy="name a part for each")
    with nogil:
        for i in range(n):
            k = part[i] if part is not None else 0
            if k < 0 or k >= n_parts or rows[i] < 0 or rows[i] >= size[k]:
                bad = i
                break
    if bad >= 0:
        raise InvalidArgument(f"row {rows[bad]} does not exist",
                              remedy="rows are 0..n-1; negative ones are not allowed")
    return base


def take_items(list parts, int64_t itemsize, const int32_t[::1] part, const int64_t[::1] rows, uint8_t[::1] out):
    """Copy item rows[i] of part part[i] (of the only one where part is None) to place i of `out`."""
    cdef int64_t i, n = rows.shape[0]
    cdef const uint8_t *only
    cdef const uint8_t *at
    if out.shape[0] != n * itemsize:
        raise InvalidArgument(f"out has {out.shape[0]} bytes", remedy=f"give {n * itemsize}")
    cdef uint64_t[::1] base = _bases(parts, itemsize, part, rows, [len(p) // itemsize for p in parts])
    if n == 0:
        return
    only = <const uint8_t *>base[0]
    with nogil:
        if part is None and itemsize == 8:
            for i in range(n):
                memcpy(&out[i * 8], only + rows[i] * 8, 8)
        elif part is None and itemsize == 4:
            for i in range(n):
                memcpy(&out[i * 4], only + rows[i] * 4, 4)
        else:
            for i in range(n):
                at = only if part is None else <const uint8_t *>base[part[i]]
                _copy_item(&out[i * itemsize], at + rows[i] * itemsize, itemsize)


def gather_items(const uint8_t[::1] items, int64_t itemsize, const uint32_t[::1] rows, uint8_t[::1] out):
    """Copy item rows[i] to place i of `out`, around the caches; of items of 4 or 8 bytes, aligned to their size."""
    cdef int64_t n = rows.shape[0], line
    cdef int rc = 0
    if (itemsize != 4 and itemsize != 8) or out.shape[0] != n * itemsize:
        raise InvalidArgument(f"{itemsize} bytes an item, {out.shape[0]} of out",
                              remedy="give 4 or 8, and room for all")
    if n == 0:
        return
    if items.shape[0] and (<uint64_t>&items[0] | <uint64_t>&out[0]) % itemsize:
        raise InvalidArgument("items are not aligned to their size", remedy="give whole arrays")
    cdef const uint8_t *at = &items[0] if items.shape[0] else NULL
    with nogil:
        if 64 * n >= items.shape[0] and items.shape[0] <= FETCHED_NBYTES:
            for line in range(0, items.shape[0], 64):
                HB_PREFETCH(at + line)
        if itemsize == 8:
            rc = kernels().decode.gather8_past_cache(&rows[0], n, <const uint64_t *>at, items.shape[0] // 8,
                                                     <uint64_t *>&out[0])
        else:
            rc = kernels().decode.gather4_past_cache(&rows[0], n, <const uint32_t *>at, items.shape[0] // 4,
                                                     <uint32_t *>&out[0])
    if rc:
        raise InvalidArgument("a row does not exist", remedy="rows are 0..n-1")


def lengths_of(list splits, const int32_t[::1] part, const int64_t[::1] rows, int64_t[::1] out):
    """Row splits of the lists taken from several parts, into out[len(rows) + 1]."""
    cdef int64_t i, n = rows.shape[0], total = 0
    cdef const int64_t *s
    cdef uint64_t[::1] base = _bases([np.asarray(x).view(np.uint8) for x in splits], 8, part, rows,
                                     [len(x) - 1 for x in splits])
    if out.shape[0] != n + 1:
        raise InvalidArgument(f"out has {out.shape[0]} places", remedy=f"give {n + 1}")
    out[0] = 0
    with nogil:
        for i in range(n):
            s = <const int64_t *>base[part[i]] + rows[i]
            total += s[1] - s[0]
            out[i + 1] = total


def take_lists(list parts, int64_t itemsize, list splits, const int32_t[::1] part, const int64_t[::1] rows,
               const int64_t[::1] new_splits, uint8_t[::1] out):
    """Copy the items of each list taken: `new_splits` from `lengths_of`; each part's splits are those of its items."""
    cdef int64_t i, n = rows.shape[0], size
    cdef const int64_t *s
    for x, y in zip(parts, splits, strict=True):
        if y[len(y) - 1] * itemsize > len(x):
            raise InvalidArgument("a part has fewer items than its splits say", remedy="give whole parts")
    if new_splits.shape[0] != n + 1 or out.shape[0] != new_splits[n] * itemsize:
        raise InvalidArgument("out does not have the size that the splits say", remedy="use lengths_of")
    cdef uint64_t[::1] ends = _bases([np.asarray(x).view(np.uint8) for x in splits], 8, part, rows,
                                     [len(x) - 1 for x in splits])
    cdef uint64_t[::1] base = _bases(parts, itemsize, np.zeros(0, np.int32), np.zeros(0, np.int64),
                                     [len(p) // itemsize for p in parts])
    with nogil:
        for i in range(n):
            s = <const int64_t *>ends[part[i]] + rows[i]
            size = (new_splits[i + 1] - new_splits[i]) * itemsize
            if size:
                memcpy(&out[new_splits[i] * itemsize], <const uint8_t *>base[part[i]] + s[0] * itemsize, size)


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
