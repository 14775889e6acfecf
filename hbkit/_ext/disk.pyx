"""Many reads of files at once, see uring.h; without the GIL."""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset

import os

from hbkit.errors import InvalidArgument


cdef extern from "uring.h" nogil:
    ctypedef struct hb_reads:
        const int32_t *fd
        const int64_t *offset
        const int64_t *length
        const int64_t *at
        int64_t n
        uint8_t *out

    ctypedef struct hb_ring:
        int fd

    int hb_ring_open(hb_ring *)
    void hb_ring_close(hb_ring *)
    int hb_ring_read(hb_ring *, const hb_reads *, int64_t *)
    int hb_pread_all(const hb_reads *, int64_t *)
    int HB_END, HB_DEPTH

END, DEPTH = HB_END, HB_DEPTH


cdef hb_reads _reads(const int32_t[::1] fd, const int64_t[::1] offset, const int64_t[::1] length,
                     const int64_t[::1] at, uint8_t[::1] out) except *:
    cdef hb_reads reads
    cdef int64_t i
    memset(&reads, 0, sizeof(hb_reads))
    reads.n = fd.shape[0]
    if not offset.shape[0] == length.shape[0] == at.shape[0] == reads.n:
        raise InvalidArgument("reads differ in number", remedy="give one file, offset, length and place each")
    for i in range(reads.n):
        if offset[i] < 0 or length[i] < 0 or at[i] < 0 or length[i] > out.shape[0] - at[i]:
            raise InvalidArgument("a read reaches outside its buffer", remedy="give a larger buffer")
    if reads.n:
        reads.fd, reads.offset, reads.length, reads.at = &fd[0], &offset[0], &length[0], &at[0]
    reads.out = &out[0] if out.shape[0] else NULL
    return reads


def pread(const int32_t[::1] fd, const int64_t[::1] offset, const int64_t[::1] length, const int64_t[::1] at,
          uint8_t[::1] out):
    """Read ``out[at[i]:at[i] + length[i]]`` from file fd[i] at offset[i], one after the other.

    Returns
    -------
    (error, i) : int, int
        0, or an errno or `END` (the file ends before) and the first read that failed.
    """
    cdef hb_reads reads = _reads(fd, offset, length, at, out)
    cdef int64_t failed = 0
    cdef int error
    with nogil:
        error = hb_pread_all(&reads, &failed)
    return error, failed


cdef class Ring:
    """A queue of the kernel's (io_uring) that keeps up to `DEPTH` reads under way; one thread at a time.

    Raises
    ------
    OSError
        The kernel has none, or forbids it.
    """

    cdef hb_ring ring

    def __cinit__(self):
        cdef int error = hb_ring_open(&self.ring)
        if error:
            raise OSError(error, os.strerror(error))

    def __dealloc__(self):
        hb_ring_close(&self.ring)

    def read(self, const int32_t[::1] fd, const int64_t[::1] offset, const int64_t[::1] length,
             const int64_t[::1] at, uint8_t[::1] out):
        """As `pread`, but all at once, in any order."""
        cdef hb_reads reads = _reads(fd, offset, length, at, out)
        cdef int64_t failed = 0
        cdef int error
        with nogil:
            error = hb_ring_read(&self.ring, &reads, &failed)
        return error, failed
