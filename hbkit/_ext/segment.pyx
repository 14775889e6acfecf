"""Sums over segments: pooling of rows into features, and of duplicate gradients into one gradient per key."""

from libc.stdint cimport int64_t

import numpy as np

from hbkit._ext.isa cimport hb_fp_enter, hb_fp_leave, hb_fp_state, kernels
from hbkit.errors import InvalidArgument


cdef int _in_range(const int64_t[::1] index, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(index.shape[0]):
        if index[i] < 0 or index[i] >= n:
            return 0
    return 1


cdef int _splits_fit(const int64_t[::1] splits, int64_t n) noexcept nogil:
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
    if not _splits_fit(splits, n):
        _refuse("row_splits must start at 0 and not decrease")
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t b, p
    with nogil:
        for b in range(splits.shape[0] - 1):
            for p in range(splits[b], splits[b + 1]):
                to[p] = b
    return out


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
    cdef hb_fp_state fp
    if out.shape[0] != n_out or out.shape[1] != dim:
        _refuse(f"out has shape {out.shape[0], out.shape[1]}, not {n_out, dim}")
    if weight is not None and weight.shape[0] != inverse.shape[0]:
        _refuse(f"{weight.shape[0]} weights for {inverse.shape[0]} values")
    if row_scale is not None and row_scale.shape[0] != n_out:
        _refuse(f"{row_scale.shape[0]} scales for {n_out} rows")
    if not _splits_fit(splits, inverse.shape[0]) or not _in_range(inverse, rows.shape[0]):
        _refuse("splits or inverse reach outside their arrays")
    if n_out == 0 or dim == 0:
        return
    with nogil:
        fp = hb_fp_enter()
        kernels().pool(&rows[0, 0] if rows.shape[0] else NULL, &inverse[0] if inverse.shape[0] else NULL, &splits[0],
                       &weight[0] if weight is not None and weight.shape[0] else NULL,
                       &row_scale[0] if row_scale is not None else NULL, n_out, dim, &out[0, 0])
        hb_fp_leave(fp)


def segment_sum(const float[:, ::1] values, const int64_t[::1] segment, int64_t n_segments,
                const int64_t[::1] rows=None, const float[::1] scale=None):
    """Sum per segment, in the order of positions, in blocks of 64 whose sums are then added in order.

    Parameters
    ----------
    values : float32[m, dim]  IN
    segment : int64[n], in [0, n_segments)  IN
        Segment of each position.
    rows : int64[n], in [0, m), or None (position p takes values[p], and m == n)  IN
    scale : float32[n] or None (all 1)  IN

    Returns
    -------
    float32[n_segments, dim]

    Notes
    -----
    The order of additions is fixed, so the result is the same on every instruction set. O(n * dim + n_segments).
    """
    cdef int64_t n = segment.shape[0], dim = values.shape[1], i
    cdef hb_fp_state fp
    if n_segments < 0 or not _in_range(segment, n_segments):
        _refuse("segments reach outside [0, n_segments)")
    if rows is None:
        if values.shape[0] != n:
            _refuse(f"{values.shape[0]} values for {n} positions")
    elif rows.shape[0] != n or not _in_range(rows, values.shape[0]):
        _refuse("rows reach outside values or do not match the positions")
    if scale is not None and scale.shape[0] != n:
        _refuse(f"{scale.shape[0]} scales for {n} positions")
    out = np.empty((n_segments, dim), np.float32)
    if n_segments == 0 or dim == 0:
        return out
    starts_, order_, cursor_ = np.zeros(n_segments + 1, np.int64), np.empty(n, np.int64), np.empty(n_segments, np.int64)
    cdef int64_t[::1] starts = starts_, order = order_, cursor = cursor_
    cdef float[:, ::1] to = out
    with nogil:
        # A stable counting sort: positions of one segment stay in batch order.
        for i in range(n):
            starts[segment[i] + 1] += 1
        for i in range(n_segments):
            cursor[i] = starts[i]
            starts[i + 1] += starts[i]
        for i in range(n):
            order[cursor[segment[i]]] = i
            cursor[segment[i]] += 1
        fp = hb_fp_enter()
        kernels().segment_sum(&values[0, 0] if values.shape[0] else NULL,
                              &rows[0] if rows is not None and n else NULL,
                              &scale[0] if scale is not None and n else NULL, &order[0] if n else NULL, &starts[0],
                              n_segments, dim, &to[0, 0])
        hb_fp_leave(fp)
    return out
