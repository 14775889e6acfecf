from libc.stdint cimport int32_t, int64_t, uint64_t, uint8_t

cdef struct Cursor:
    const uint8_t *at
    const uint8_t *end
    const char *problem  # NULL, or what was wrong first; afterwards everything reads as 0 and every structure ends

# SPEC: parquet.thrift, PageHeader
cdef struct PageHeader:
    int64_t kind  # 0 data, 1 index, 2 dictionary, 3 data v2; -1 absent
    int64_t nbytes  # uncompressed
    int64_t stored_nbytes
    int64_t crc  # -1 absent
    int64_t n_entries  # values, nulls and empty lists
    int64_t n_rows  # -1 unknown: only v2 says
    int64_t encoding
    int64_t def_encoding
    int64_t rep_encoding
    int64_t def_nbytes  # of v2
    int64_t rep_nbytes
    bint is_compressed

cdef int read_page_header(Cursor *c, PageHeader *out) noexcept nogil
