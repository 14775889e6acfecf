"""Pool: memory that returns for reuse when its last reference dies.

Touching fresh pages costs several times what writing to retained ones does, so buffers that live for one batch are
taken from a pool. A `Buffer` offers the buffer protocol; NumPy (``np.frombuffer``), DLPack and the frameworks keep it
alive, and its memory goes back to the pool when the last of them lets go, in whatever order.
"""

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from cpython.buffer cimport PyBuffer_FillInfo

from hbkit.errors import InvalidArgument

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **, size_t, size_t)

cdef extern from "sys/mman.h" nogil:
    int madvise(void *, size_t, int)

DEF_ALIGN = 64
cdef size_t LEAST = 4096
cdef size_t HUGE = 2 << 20  # blocks from here on ask for huge pages: decoding into them is a tenth faster
cdef int MADV_HUGEPAGE = 14  # Linux; elsewhere refused, which does not matter


cdef extern from *:
    """
    #ifdef __GLIBC__
    #include <malloc.h>
    #define HB_TRIM() malloc_trim(0)
    #else
    #define HB_TRIM() 0
    #endif
    /* Of the allocations of several threads, one fails. */
    #define HB_FAILS(left) \
        (__atomic_load_n(left, __ATOMIC_RELAXED) > 0 && __atomic_sub_fetch(left, 1, __ATOMIC_RELAXED) == 0)
    """
    int HB_TRIM() nogil
    bint HB_FAILS(int64_t *left) nogil

cdef int64_t _countdown = 0


def give_back():
    """Give free memory of the C library's heap back to the system, where the library can. Takes some milliseconds."""
    with nogil:
        HB_TRIM()


cdef int64_t *countdown() noexcept nogil:
    return &_countdown


cdef bint fails() noexcept nogil:
    """Whether the allocation that is about to be made is the one that a test wants to fail."""
    return HB_FAILS(&_countdown)


cdef void *allocate(size_t nbytes) noexcept nogil:
    """`malloc`, but that a test may let it fail."""
    return NULL if fails() else malloc(nbytes)


def fail_allocation(int64_t nth):
    """For tests: the nth allocation from now on fails, of those of pools, indexes, slabs and metadata; 0: none does.

    Returns
    -------
    left : int
        How many allocations the failure that was asked for before was still away; 0 if it has come.
    """
    global _countdown
    left, _countdown = max(_countdown, 0), nth
    return left


cdef class Buffer:
    """One block of a `Pool`, writable, of the size that was asked for; uninitialised."""

    cdef void *data
    cdef readonly Py_ssize_t nbytes
    cdef size_t capacity
    cdef size_t align
    cdef Pool pool

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.nbytes, 0, flags)

    def __len__(self):
        return self.nbytes

    def __dealloc__(self):
        if self.data != NULL:
            self.pool._give_back(<uintptr_t>self.data, self.capacity, self.align)


cdef class Pool:
    """Blocks of memory kept for reuse, by size class (powers of two).

    Parameters
    ----------
    retain_nbytes : int
        Idle memory kept at the most, in bytes; what comes back beyond it is freed.

    Notes
    -----
    Safe to use from any thread: every operation holds the GIL.
    """

    cdef dict idle
    cdef readonly size_t retain_nbytes, idle_nbytes, live_nbytes
    cdef readonly size_t n_taken, n_reused

    def __init__(self, retain_nbytes=1 << 30):
        self.idle = {}
        self.retain_nbytes = retain_nbytes

    def take(self, nbytes, align=DEF_ALIGN):
        """A `Buffer` of `nbytes` bytes, aligned to `align` (a power of two), with undefined contents."""
        if nbytes < 0 or align < sizeof(void *) or align & (align - 1):
            raise InvalidArgument(f"cannot take {nbytes} bytes aligned to {align}",
                                  remedy="give a size >= 0 and a power of two >= 8")
        cdef size_t capacity = LEAST
        while capacity < <size_t>nbytes:
            capacity *= 2
        cdef Buffer buffer = Buffer.__new__(Buffer)
        buffer.pool = self
        if fails():
            raise MemoryError(f"no memory for a buffer of {capacity} bytes (a test asked for this)")
        blocks = self.idle.get((capacity, align))
        if blocks:
            buffer.data = <void *><uintptr_t>blocks.pop()
            self.idle_nbytes -= capacity
            self.n_reused += 1
        elif posix_memalign(&buffer.data, max(align, HUGE) if capacity >= HUGE else align, capacity) != 0:
            buffer.data = NULL
            raise MemoryError(f"no memory for a buffer of {capacity} bytes")
        elif capacity >= HUGE:
            madvise(buffer.data, capacity, MADV_HUGEPAGE)
        buffer.nbytes, buffer.capacity, buffer.align = nbytes, capacity, align
        self.live_nbytes += capacity
        self.n_taken += 1
        return buffer

    cdef _give_back(self, uintptr_t data, size_t capacity, size_t align):
        self.live_nbytes -= capacity
        if self.idle_nbytes + capacity > self.retain_nbytes:
            free(<void *>data)
        else:
            self.idle.setdefault((capacity, align), []).append(data)
            self.idle_nbytes += capacity

    def __dealloc__(self):
        if self.idle is not None:
            for blocks in self.idle.values():
                for data in blocks:
                    free(<void *><uintptr_t>data)

    def stats(self):
        """Bytes in use and idle, buffers taken and how many of those were reused: dict of int."""
        return {"live_nbytes": self.live_nbytes, "idle_nbytes": self.idle_nbytes,
                "n_taken": self.n_taken, "n_reused": self.n_reused}


# What is decoded, taken and delivered lives here. Idle, it keeps at most its limit.
shared = Pool()
