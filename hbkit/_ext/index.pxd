from hbkit._ext.isa cimport hb_index


cdef class Index:
    cdef hb_index index
