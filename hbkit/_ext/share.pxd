from libc.stdint cimport int64_t

cdef extern from *:
    """
    /* Of units, any of which may. */
    #define HB_SET(flag) __atomic_store_n(flag, 1, __ATOMIC_RELAXED)
    #define HB_ADD(count, n) __atomic_fetch_add(count, n, __ATOMIC_RELAXED)
    """
    void HB_SET(int *flag) noexcept nogil
    void HB_ADD(int64_t *count, int64_t n) noexcept nogil

ctypedef void (*Unit)(void *what, int64_t unit, int64_t seat) noexcept nogil

cdef int64_t pieces(int64_t nbytes) noexcept nogil
cdef int64_t seats(int64_t n_units) noexcept nogil
cdef void share(Unit run, void *what, int64_t n_units, int64_t n_seats) noexcept nogil
