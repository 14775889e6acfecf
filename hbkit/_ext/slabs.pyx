"""Slabs: fixed-width lines of float32 in chunks that never move, addressed by slot.

A line is ``[row | optimizer state]`` side by side, so that an update touches one place in memory. Growing adds a
chunk; nothing is ever copied, and a pointer to a line stays good as long as the slabs live.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc

from hbkit._ext.isa cimport HB_HYPER, hb_fp_enter, hb_fp_leave, hb_fp_state, hb_line, hb_slabs, kernels
from hbkit.errors import InvalidArgument

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **, size_t, size_t)


cdef class Slabs:
    """Growable float32[n_lines, width].

    Parameters
    ----------
    width : int
        Floats a line.
    chunk_nbytes : int
        About how many bytes a chunk takes; the lines of a chunk are a power of two.

    Notes
    -----
    Contents of new lines are undefined. The GIL is released inside; callers order writes themselves.
    """

    cdef hb_slabs s
    cdef int64_t n_chunks

    def __cinit__(self, int64_t width, int64_t chunk_nbytes=1 << 22):
        if width < 1:
            raise InvalidArgument(f"a line of {width} floats", remedy="give a width of at least 1")
        self.s.width = width
        while (<int64_t>2 << self.s.shift) * width * 4 <= chunk_nbytes and self.s.shift < 30:
            self.s.shift += 1

    def __dealloc__(self):
        cdef int64_t i
        for i in range(self.n_chunks):
            free(self.s.chunks[i])
        free(self.s.chunks)

    @property
    def width(self):
        """Floats a line: int."""
        return self.s.width

    @property
    def capacity(self):
        """Lines there is room for: int."""
        return self.n_chunks << self.s.shift

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.capacity * self.s.width * sizeof(float) + self.n_chunks * sizeof(float *)

    def reserve(self, int64_t n_lines):
        """Make room for slots 0..n_lines-1. MemoryError leaves the lines as they were."""
        cdef float **grown
        cdef void *chunk
        while self.capacity < n_lines:
            grown = <float **>realloc(self.s.chunks, (self.n_chunks + 1) * sizeof(float *))
            if grown == NULL:
                raise MemoryError(f"no memory for {n_lines} lines")
            self.s.chunks = grown
            if posix_memalign(&chunk, 64, (<size_t>1 << self.s.shift) * self.s.width * sizeof(float)) != 0:
                raise MemoryError(f"no memory for {n_lines} lines of {self.s.width * 4} bytes")
            self.s.chunks[self.n_chunks] = <float *>chunk
            self.n_chunks += 1

    cdef int _check(self, const int64_t[::1] slots, int64_t least) except -1:
        cdef int64_t i, end = self.n_chunks << self.s.shift
        for i in range(slots.shape[0]):
            if slots[i] < least or slots[i] >= end:
                raise InvalidArgument(f"slot {slots[i]} is outside the {end} lines", remedy="reserve lines first")
        return 0

    def gather(self, const int64_t[::1] slots, float[:, ::1] out):
        """``out[i]`` = the first ``out.shape[1]`` floats of line ``slots[i]``; zeros where the slot is -1."""
        if out.shape[0] != slots.shape[0] or out.shape[1] > self.s.width:
            raise InvalidArgument(f"out has shape {out.shape[0], out.shape[1]} for {slots.shape[0]} slots",
                                  remedy=f"give one row a slot, at most {self.s.width} wide")
        self._check(slots, -1)
        if slots.shape[0] and out.shape[1]:
            with nogil:
                kernels().gather(&self.s, &slots[0], slots.shape[0], out.shape[1], &out[0, 0])

    def scatter(self, const int64_t[::1] slots, const float[:, ::1] lines, int64_t column=0):
        """Write ``lines[i]`` into line ``slots[i]`` from float `column` on; slots must be >= 0."""
        cdef int64_t i, j, w = lines.shape[1]
        cdef float *to
        if lines.shape[0] != slots.shape[0] or column < 0 or column + w > self.s.width:
            raise InvalidArgument(f"lines of shape {lines.shape[0], w} do not fit {slots.shape[0]} slots at {column}",
                                  remedy=f"a line has {self.s.width} floats")
        self._check(slots, 0)
        with nogil:
            for i in range(slots.shape[0]):
                to = hb_line(&self.s, slots[i]) + column
                for j in range(w):
                    to[j] = lines[i, j]

    def apply(self, int rule, const int64_t[::1] slots, const float[:, ::1] grads, const float[::1] hyper):
        """One optimizer step (a HB_ rule of kernels.h) on distinct slots; -1 is skipped. grads: float32[n, dim]."""
        cdef hb_fp_state fp
        cdef int status = 0
        cdef int64_t dim = grads.shape[1], need = dim
        if rule in (1, 4):
            need = 2 * dim if rule == 1 else 2 * dim + 1
        elif rule == 2:
            need = dim + 1
        elif rule in (3, 5):
            need = 3 * dim
        elif rule == 0 and hyper.shape[0] > 1 and hyper[1] != 0:
            need = 2 * dim
        if grads.shape[0] != slots.shape[0] or hyper.shape[0] < HB_HYPER or need > self.s.width:
            raise InvalidArgument(f"grads of shape {grads.shape[0], dim} do not fit {slots.shape[0]} slots or a line "
                                  f"of {self.s.width}", remedy="the rule needs its state beside the row")
        self._check(slots, -1)
        if slots.shape[0] and dim:
            with nogil:
                fp = hb_fp_enter()
                status = kernels().apply(rule, &self.s, &slots[0], slots.shape[0], dim, &grads[0, 0], &hyper[0])
                hb_fp_leave(fp)
        if status != 0:
            raise InvalidArgument(f"unknown optimizer rule {rule}", remedy="use a rule of hbkit.embedding")
