from libc.stdint cimport int64_t

from hbkit._ext.isa cimport hb_gradients


cdef class Gradients:
    cdef hb_gradients g
    cdef object owners  # what g points into
