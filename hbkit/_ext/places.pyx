"""Places: where the row of each key is; an index whose slots the caller gives."""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

import numpy as np

from hbkit._ext.isa cimport hb_index, kernels
from hbkit.errors import InvalidArgument


cdef class Places:
    """Map from int64 keys (any bit pattern) to numbers in [0, 2**32).

    Parameters
    ----------
    capacity : int
        Keys to make room for at the start.

    Notes
    -----
    Memory, threads and cost as `hbkit._ext.index.Index`.
    """

    cdef hb_index index

    def __cinit__(self, int64_t capacity=0):
        memset(&self.index, 0, sizeof(hb_index))
        if kernels().index.create(&self.index, max(capacity, 0)) != 0:
            raise MemoryError(f"no memory for an index of {capacity} keys")

    def __dealloc__(self):
        kernels().index.destroy(&self.index)

    def __len__(self):
        return self.index.n

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.index.nbytes + <int64_t>sizeof(hb_index)

    def find(self, const int64_t[::1] keys):
        """Place of each key, -1 where it is absent: int64[n]."""
        cdef int64_t n = keys.shape[0]
        out = np.empty(n, np.int64)
        cdef int64_t[::1] to = out
        if n:
            with nogil:
                kernels().index.find(&self.index, &keys[0], n, &to[0])
        return out

    def put(self, const int64_t[::1] keys, const int64_t[::1] places):
        """Give keys places, in the order of the batch.

        Returns
        -------
        before : int64[n]
            The place that each had, -1 where it had none.

        Raises
        ------
        MemoryError
            No room to grow. Nothing has changed.
        """
        cdef int64_t n = keys.shape[0], i
        cdef int failed = 0
        if places.shape[0] != n:
            raise InvalidArgument(f"{places.shape[0]} places for {n} keys", remedy="give one each")
        for i in range(n):
            if not 0 <= places[i] < <int64_t>1 << 32:
                raise InvalidArgument(f"the place {places[i]}", remedy="give numbers in [0, 2**32)")
        before = np.empty(n, np.int64)
        cdef int64_t[::1] to = before
        if n:
            with nogil:
                failed = kernels().index.put(&self.index, &keys[0], n, &places[0], &to[0])
        if failed:
            raise MemoryError(f"the index of {self.index.n} keys cannot take {n} more")
        return before

    def drop(self, const int64_t[::1] keys):
        """Remove keys; the place that each had, -1 where it was absent (or repeated): int64[n]."""
        cdef int64_t n = keys.shape[0]
        before = np.empty(n, np.int64)
        cdef int64_t[::1] to = before
        if n:
            with nogil:
                kernels().index.drop(&self.index, &keys[0], n, &to[0])
        return before

    def part(self, uint64_t first, uint64_t last):
        """Keys whose mix lies in ``[first, last]``, in no order that matters: int64[m]. As `Index.part`."""
        cdef int64_t room = -1, n = 0
        cdef int64_t[::1] to
        cdef int64_t *at
        while n > room:  # first counts; another thread may put meanwhile
            room = n
            keys = np.empty(room, np.int64)
            to = keys
            at = &to[0] if room else NULL
            with nogil:
                n = kernels().index.part(&self.index, first, last, NULL, 0, room, at)
        return keys[:n]

    def validate(self):
        """Recount everything; AssertionError where the structure contradicts itself. For tests."""
        cdef const char *wrong
        with nogil:
            wrong = kernels().index.validate(&self.index)
        assert wrong == NULL, wrong.decode()
