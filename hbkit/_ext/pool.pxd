from libc.stdint cimport int64_t

cdef int64_t *countdown() noexcept nogil
cdef bint fails() noexcept nogil
cdef void *allocate(size_t nbytes) noexcept nogil
