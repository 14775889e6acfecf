from libc.stdint cimport int64_t

cdef extern from *:
    """
    #define HB_SET(flag) __atomic_store_n(flag, 1, __ATOMIC_RELAXED) /* by units, any of which may */
    """
    void HB_SET(int *flag) noexcept nogil

ctypedef void (*Unit)(void *what, int64_t unit, int64_t seat) noexcept nogil

cdef int64_t pieces(int64_t nbytes) noexcept nogil
cdef int64_t seats(int64_t n_units) noexcept nogil
cdef void share(Unit run, void *what, int64_t n_units, int64_t n_seats) noexcept nogil
