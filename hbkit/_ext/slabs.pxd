from libc.stdint cimport int64_t

from hbkit._ext.isa cimport hb_draw, hb_slabs

ctypedef struct New:
    hb_draw *draws
    int64_t n_draws
    float *state


cdef class Lines:
    cdef New lines


cdef class Slabs:
    cdef hb_slabs s
    cdef readonly int64_t width
    cdef bint divided, apart
    cdef int64_t n_chunks, n_regions, n_last, left  # chunks; regions; chunks of the last one, and those left of it
    cdef void **regions
    cdef readonly str row_dtype

    cdef int64_t _region_of(self, int64_t chunk) noexcept
    cdef int _add_region(self, size_t nbytes, int64_t n) except -1
    cdef int _check(self, const int64_t[::1] slots, int64_t least) except -1
    cdef bint _pools(self) noexcept


cdef int64_t tile(const hb_slabs *s) noexcept nogil
cdef void begin(const New *new, const hb_slabs *s, const int64_t *slots, const int64_t *keys, int64_t n,
                float *room) noexcept nogil
