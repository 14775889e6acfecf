"""BLAKE3: see blake3_kernel.c."""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from hbkit._ext.isa cimport hb_blake3, kernels


cdef class Blake3:
    """A running BLAKE3 digest of 32 bytes, as `b3sum` gives it; used as those of `hashlib` are.

    Notes
    -----
    `update` releases the GIL; one thread at a time.
    """

    cdef hb_blake3 state

    def __cinit__(self):
        memset(&self.state, 0, sizeof(hb_blake3))

    def update(self, data):
        """Take up bytes of any C-contiguous buffer."""
        cdef const uint8_t[::1] view = memoryview(data).cast("B")
        cdef int64_t n = view.shape[0]
        if n:
            with nogil:
                kernels().blake3.update(&self.state, &view[0], n)

    def hexdigest(self):
        """Digest of all bytes so far, in hexadecimal: str."""
        cdef uint8_t out[32]
        kernels().blake3.finish(&self.state, out)
        return bytes(out[:32]).hex()
