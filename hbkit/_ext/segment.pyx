"""Sums over segments: pooling of rows into features, and of duplicate gradients into one gradient per key."""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcpy, memset

import numpy as np

from hbkit._ext.isa cimport hb_gradients, kernels
from hbkit._ext.pool import shared

from hbkit._ext.share cimport pieces, seats, share
from hbkit.errors import InvalidArgument

cdef int64_t MOST = 0x7FFFFFFF  # positions and segments: they are sorted as int32


cdef int in_range(const int64_t[::1] index, int64_t n) noexcept nogil:
    cdef int64_t i
    cdef uint64_t most = 0  # no branch a value; what is below 0 is large
    for i in range(index.shape[0]):
        most = most if most > <uint64_t>index[i] else <uint64_t>index[i]
    return index.shape[0] == 0 or most < <uint64_t>n


cdef int splits_fit(const int64_t[::1] splits, int64_t n) noexcept nogil:
    cdef int64_t i
    if splits.shape[0] == 0 or splits[0] != 0 or splits[splits.shape[0] - 1] != n:
        return 0
    for i in range(1, splits.shape[0]):
        if splits[i] < splits[i - 1]:
            return 0
    return 1


cdef _refuse(what):
    raise InvalidArgument(what, remedy="this is a precondition of the segment sums")


def row_ids(const int64_t[::1] splits):
    """Row of each value: int64[splits[-1]], row b repeated splits[b+1] - splits[b] times."""
    cdef int64_t n = splits[splits.shape[0] - 1] if splits.shape[0] else -1
    if not splits_fit(splits, n):
        _refuse("row_splits must start at 0 and not decrease")
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t b, p
    with nogil:
        for b in range(splits.shape[0] - 1):
            for p in range(splits[b], splits[b + 1]):
                to[p] = b
    return out


cdef struct Call:  # what the units of a call need, each for rows n * unit // n_units and so on
    const float *rows
    const int64_t *index
    const int64_t *splits
    const float *weight
    const float *row_scale
    const hb_gradients *g
    float *out
    int64_t n, dim, n_units


cdef void pool_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    kernels().pool(c.rows, c.index, c.splits + first, c.weight, c.row_scale + first if c.row_scale != NULL else NULL,
                   last - first, c.dim, c.out + first * c.dim)


cdef void expand_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    kernels().expand(c.rows, c.index + first, last - first, c.dim, c.out + first * c.dim)


cdef void sum_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef hb_gradients g = c.g[0]
    cdef int64_t first = first_of(&g, unit, c.n_units), last = first_of(&g, unit + 1, c.n_units)
    g.starts += first
    g.n_segments = last - first
    kernels().segment_sum(&g, c.out + first * c.dim)


cdef int64_t first_of(const hb_gradients *g, int64_t part, int64_t n_parts) noexcept nogil:
    """The first segment of one of several parts, which have about as much to do as each other."""
    cdef int64_t low = 0, high = g.n_segments, middle, before
    if g.order == NULL:
        return high * part // n_parts
    before = g.starts[0] + (g.starts[high] - g.starts[0] + high) * part // n_parts  # a segment costs a term more
    while low < high:
        middle = (low + high) // 2
        if g.starts[middle] + middle < before:
            low = middle + 1
        else:
            high = middle
    return low


def pool(const float[:, ::1] rows, const int64_t[::1] inverse, const int64_t[::1] splits, float[:, ::1] out,
         const float[::1] weight=None, const float[::1] row_scale=None):
    """Weighted sums of rows: ``out[b] = row_scale[b] * sum(weight[p] * rows[inverse[p]])`` over p in row b's splits.

    Parameters
    ----------
    rows : float32[u, dim]  IN
    inverse : int64[n], in [0, u)  IN
    splits : int64[b+1]  IN
    out : float32[b, dim]  OUT
    weight : float32[n] or None (all 1)  IN
    row_scale : float32[b] or None (all 1)  IN
    """
    cdef int64_t dim = rows.shape[1], n_out = splits.shape[0] - 1
    cdef Call c
    if out.shape[0] != n_out or out.shape[1] != dim:
        _refuse(f"out has shape {out.shape[0], out.shape[1]}, not {n_out, dim}")
    if weight is not None and weight.shape[0] != inverse.shape[0]:
        _refuse(f"{weight.shape[0]} weights for {inverse.shape[0]} values")
    if row_scale is not None and row_scale.shape[0] != n_out:
        _refuse(f"{row_scale.shape[0]} scales for {n_out} rows")
    if not splits_fit(splits, inverse.shape[0]) or not in_range(inverse, rows.shape[0]):
        _refuse("splits or inverse reach outside their arrays")
    if n_out == 0 or dim == 0:
        return
    c.rows = &rows[0, 0] if rows.shape[0] else NULL
    c.index, c.splits = &inverse[0] if inverse.shape[0] else NULL, &splits[0]
    c.weight = &weight[0] if weight is not None and weight.shape[0] else NULL
    c.row_scale = &row_scale[0] if row_scale is not None else NULL
    c.out, c.n, c.dim = &out[0, 0], n_out, dim
    c.n_units = min(pieces(inverse.shape[0] * dim * sizeof(float)), n_out)
    with nogil:
        share(pool_unit, &c, c.n_units, seats(c.n_units))


def retained(shape, dtype=np.float32):
    """An array of undefined contents in memory that was touched before, where the pool has some; as `numpy.empty`."""
    count = 1
    for n in shape:
        count *= n
    dtype = np.dtype(dtype)
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(shared.take(count * dtype.itemsize), dtype).reshape(shape)


def expand(const float[:, ::1] rows, const int64_t[::1] index, out=None):
    """``rows[index]``: float32[n, dim], in `out` if it is given."""
    cdef int64_t n = index.shape[0], dim = rows.shape[1]
    if out is None:
        out = retained((n, dim))
    cdef float[:, ::1] to = out
    cdef Call c
    if to.shape[0] != n or to.shape[1] != dim or not in_range(index, rows.shape[0]):
        _refuse("index reaches outside the rows, or out has another shape than its rows")
    if n and dim:
        c.rows, c.index, c.out, c.n, c.dim = &rows[0, 0], &index[0], &to[0, 0], n, dim
        c.n_units = min(pieces(n * dim * sizeof(float)), n)
        with nogil:
            share(expand_unit, &c, c.n_units, seats(c.n_units))
    return out


cdef class Segments:
    """The positions of each segment, in batch order: what sums over segments share.

    Parameters
    ----------
    segment : int64[n], in [0, n_segments)
        Segment of each position.
    n_segments : int
        Segments, of which some may be empty.

    Notes
    -----
    A stable counting sort, O(n + n_segments), 4 bytes for each of both in retained memory. Where position p is segment
    p, as in a batch without duplicates, nothing is sorted.
    """

    cdef readonly int64_t n, n_segments
    cdef readonly bint same
    cdef object order_, starts_

    def __init__(self, const int64_t[::1] segment, int64_t n_segments):
        cdef int64_t n = segment.shape[0], i, at
        cdef int32_t sum = 0, bad = 0
        if n_segments < 0 or n >= MOST or n_segments >= MOST:
            _refuse(f"{n} positions in {n_segments} segments")
        self.n, self.n_segments = n, n_segments
        self.order_, self.starts_ = retained((n,), np.int32), retained((n_segments + 1,), np.int32)
        cdef int32_t[::1] order = self.order_, starts = self.starts_
        with nogil:
            self.same = n == n_segments
            for i in range(n):
                if segment[i] != i:
                    self.same = False
                    break
            if self.same:
                for i in range(n):
                    order[i] = <int32_t>i
                    starts[i] = <int32_t>i
                starts[n] = <int32_t>n
            else:
                memset(&starts[0], 0, (n_segments + 1) * sizeof(int32_t))
                for i in range(n):
                    if <uint64_t>segment[i] >= <uint64_t>n_segments:
                        bad = 1
                        break
                    starts[segment[i] + 1] += 1
                if not bad:
                    # starts[s + 1] is where segment s goes on, and in the end where s + 1 starts.
                    for i in range(n_segments):
                        at = starts[i + 1]
                        starts[i + 1] = sum
                        sum += <int32_t>at
                    for i in range(n):
                        at = segment[i] + 1
                        order[starts[at]] = <int32_t>i
                        starts[at] += 1
        if bad:
            _refuse(f"segments reach outside [0, {n_segments})")

    def of(self, const float[:, ::1] values, const int64_t[::1] rows=None, const float[::1] scale=None):
        """`Gradients`: position p contributes ``scale[p] * values[rows[p]]``. Arguments as of `segment_sum`."""
        cdef const int32_t[::1] order = self.order_, starts = self.starts_
        if rows is None:
            if values.shape[0] != self.n:
                _refuse(f"{values.shape[0]} values for {self.n} positions")
        elif rows.shape[0] != self.n or not in_range(rows, values.shape[0]):
            _refuse("rows reach outside values or do not match the positions")
        if scale is not None and scale.shape[0] != self.n:
            _refuse(f"{scale.shape[0]} scales for {self.n} positions")
        cdef Gradients out = Gradients.__new__(Gradients)
        out.g.values = &values[0, 0] if values.shape[0] and values.shape[1] else NULL
        out.g.dim, out.g.n_segments = values.shape[1], self.n_segments
        out.g.rows = &rows[0] if rows is not None and self.n else NULL
        out.g.scale = &scale[0] if scale is not None and self.n else NULL
        if rows is not None or scale is not None or not self.same:
            out.g.order, out.g.starts = &order[0] if self.n else &starts[0], &starts[0]
        out.owners = (values, rows, scale, self)
        return out


cdef class Gradients:
    """Gradients by segment, not summed yet: made by `Segments.of`, for `Slabs.apply` or `sum`."""

    @property
    def shape(self):
        """Of the sums: (n_segments, dim)."""
        return self.g.n_segments, self.g.dim

    cdef int64_t n_terms(self) noexcept:
        """Gradients that are to be added up; 0 where there is one a segment as it stands."""
        return 0 if self.g.order == NULL else self.g.starts[self.g.n_segments] - self.g.starts[0]

    def part(self, int64_t first, int64_t last):
        """`Gradients` of segments first..last - 1: what one of several threads sums or applies."""
        if not 0 <= first <= last <= self.g.n_segments:
            _refuse(f"segments {first} to {last} of {self.g.n_segments}")
        cdef Gradients out = Gradients.__new__(Gradients)
        out.g, out.owners = self.g, self.owners
        out.g.n_segments = last - first
        if self.g.order == NULL:
            out.g.values += first * self.g.dim
        else:
            out.g.starts += first
        return out

    def sum(self, out=None):
        """The sums: float32[n_segments, dim], in `out` if it is given, in retained memory if not."""
        cdef Call c
        if out is None:
            out = retained(self.shape)
        cdef float[:, ::1] to = out
        if (to.shape[0], to.shape[1]) != self.shape:
            _refuse(f"out has shape {to.shape[0], to.shape[1]}, not {self.shape}")
        if self.g.n_segments and self.g.dim:
            if self.g.order == NULL:
                memcpy(&to[0, 0], self.g.values, self.g.n_segments * self.g.dim * sizeof(float))
                return out
            c.g, c.out, c.dim = &self.g, &to[0, 0], self.g.dim
            c.n_units = min(pieces((self.n_terms() + self.g.n_segments) * c.dim * sizeof(float)), self.g.n_segments)
            with nogil:
                share(sum_unit, &c, c.n_units, seats(c.n_units))
        return out


def segment_sum(const float[:, ::1] values, const int64_t[::1] segment, int64_t n_segments,
                const int64_t[::1] rows=None, const float[::1] scale=None, out=None):
    """Sum per segment: ``out[s] = sum(scale[p] * values[rows[p]] for p where segment[p] == s)``.

    Positions of one segment are added in blocks of 64 in batch order, then the blocks in order.

    Parameters
    ----------
    values : float32[m, dim]  IN
    segment : int64[n], in [0, n_segments)  IN
        Segment of each position.
    rows : int64[n], in [0, m), or None (position p takes values[p], and m == n)  IN
    scale : float32[n] or None (all 1)  IN
    out : float32[n_segments, dim], optional  OUT

    Returns
    -------
    float32[n_segments, dim]

    Notes
    -----
    The order of additions is fixed, so the result is the same on every instruction set. O(n * dim + n_segments).
    """
    return Segments(segment, n_segments).of(values, rows, scale).sum(out)
