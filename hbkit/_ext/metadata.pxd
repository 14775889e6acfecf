from libc.stdint cimport int64_t, uint32_t

ctypedef struct Pair:
    uint32_t freq
    uint32_t last_step


cdef class Metadata:
    cdef Pair *at
    cdef int64_t n
    cdef bint kept
    cdef uint32_t latest_step

    cdef int _check(self, const int64_t[::1] slots, int64_t n, int64_t least) except -1
    cdef void stamped(self, int64_t step) noexcept


cdef int64_t stamp(Pair *at, const int64_t *slots, int64_t n, int64_t step, const int64_t *counts) noexcept nogil
