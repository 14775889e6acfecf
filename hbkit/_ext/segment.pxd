from libc.stdint cimport int64_t

from hbkit._ext.isa cimport hb_gradients


cdef class Gradients:
    cdef hb_gradients g
    cdef object owners  # what g points into

    cdef int64_t n_terms(self) noexcept

cdef int in_range(const int64_t[::1] index, int64_t n) noexcept nogil
cdef int splits_fit(const int64_t[::1] splits, int64_t n) noexcept nogil
cdef int64_t first_of(const hb_gradients *g, int64_t part, int64_t n_parts) noexcept nogil
