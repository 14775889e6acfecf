"""Slabs: lines ``[row | optimizer state]`` in chunks that never move, addressed by slot.

Growing adds a chunk; nothing is ever copied, and a pointer to a line stays good as long as the slabs live. To callers a
line is one array of floats. In memory rows may be narrower (float16, bfloat16), and state lies where it costs least:

    one float of state a line           rows of a chunk | states of a chunk     a row of 16 floats is one cache line
    more                                row state row state row state ...      an update touches one place

Chunks of 2 MiB and more ask for huge pages: slots are random, and a miss of the TLB costs as much as one of the cache.
But for the first few they are cut from regions of sixteen, so that the ends of chunks lie in huge pages too; what is
not handed out yet of a region is address space, not memory.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

import numpy as np

from hbkit._ext.isa cimport HB_HYPER, HB_RULES, HB_SCRATCH, hb_draw, hb_index, hb_part, hb_slabs, hb_update, kernels
from hbkit._ext.random import KINDS
from hbkit._ext.segment import pool, retained

from hbkit._ext.index cimport Index
from hbkit._ext.pool cimport allocate, fails
from hbkit._ext.segment cimport Gradients, first_of, in_range, splits_fit
from hbkit._ext.share cimport HB_ADD, HB_SET, Unit, pieces, seats, share
from hbkit.errors import InvalidArgument

cdef extern from "kernels.h" nogil:
    void *hb_row(const hb_slabs *, int64_t slot)
    float *hb_state(const hb_slabs *, int64_t slot)

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **, size_t, size_t)

cdef extern from "sys/mman.h" nogil:
    int madvise(void *, size_t, int)

cdef size_t HUGE = 2 << 20
cdef uintptr_t PAGE = 4096
cdef int MADV_DONTNEED = 4
cdef int MADV_HUGEPAGE = 14  # Linux; elsewhere refused, which does not matter
cdef int64_t TILE = 64       # lines that are drawn, or written by row and state, at once
cdef int64_t NEAR = 1 << 17  # bytes of rows whose keys are looked up at once
cdef int64_t REGION = 16     # chunks of a region, once there are FEW
cdef int64_t FEW = 4
cdef int64_t NEW_NBYTES = 512  # bytes that could be moved in the time that a new line takes
cdef int64_t APART = 4       # most bytes of state a line for which it lies apart from the rows
ROW_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
BAD = ("apply", "raise", "skip")


cdef struct Call:  # what the units of a call need, each for lines n * unit // n_units and so on
    const hb_slabs *s
    const int64_t *slots
    const int64_t *index
    const int64_t *splits
    const float *weight
    const float *row_scale
    const float *rows
    const float *state
    float *out
    int64_t n, width, column, n_units
    int failed
    # Of keys:
    const hb_index *by
    const int64_t *keys
    int64_t *found
    int64_t lot, room  # keys that are looked up at once; lines there are
    # Of new lines and updates:
    const New *new
    const hb_update *update
    char *scratch
    int64_t scratch_nbytes  # of each seat
    int64_t skipped


cdef Call call_of(Slabs slabs) noexcept:
    cdef Call c
    memset(&c, 0, sizeof(Call))
    c.s, c.room, c.lot = &slabs.s, slabs.n_chunks << slabs.s.shift, max(NEAR // slabs.s.row_stride, 64)
    return c


cdef void run(Unit unit, Call *c, int64_t nbytes) noexcept nogil:
    """Go through a call's n lines, 1 or more, which take so many bytes."""
    c.n_units = min(pieces(nbytes), c.n)
    share(unit, c, c.n_units, seats(c.n_units))


cdef void gather_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    kernels().gather(c.s, c.slots if c.index != NULL else c.slots + first, c.index + first if c.index != NULL else NULL,
                     last - first, c.width, c.out + first * c.width)


cdef void pool_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    if first < last and kernels().pool_slots(c.s, c.slots, c.index, c.splits + first, c.weight,
                                             c.row_scale + first if c.row_scale != NULL else NULL, last - first,
                                             c.out + first * c.width) != 0:
        HB_SET(&c.failed)


cdef bint look_up(Call *c, int64_t i, int64_t n) noexcept nogil:
    """Slots of keys i..i + n - 1; whether they have lines, as they should."""
    kernels().index.find(c.by, c.keys + i, n, c.found + i)
    if not outside(c.found + i, n, -1, c.room):
        return True
    HB_SET(&c.failed)
    return False


cdef void lookup_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t i = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units, some
    while i < last:
        some = min(c.lot, last - i)
        if look_up(c, i, some):
            kernels().gather(c.s, c.found + i, NULL, some, c.width, c.out + i * c.width)
        i += some


cdef void lookup_pooled_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t b = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units, i = c.splits[b], some, end
    while b < last:
        some = min(c.lot, c.splits[last] - i)
        if some and not look_up(c, i, some):
            return
        i, end = i + some, b
        while end < last and c.splits[end + 1] <= i:
            end += 1
        if end > b:
            kernels().pool_slots(c.s, c.found, NULL, c.splits + b, c.weight,
                                 c.row_scale + b if c.row_scale != NULL else NULL, end - b, c.out + b * c.width)
            b = end


cdef void scatter_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t i = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units, some
    if c.state == NULL:
        kernels().scatter(c.s, c.slots + i, last - i, c.column, c.width, c.rows + i * c.width, c.width)
        return
    while i < last:  # by tiles, so that a line is written while it is in the cache
        some = min(TILE, last - i)
        kernels().scatter(c.s, c.slots + i, some, 0, c.s.dim, c.rows + i * c.s.dim, c.s.dim)
        kernels().scatter(c.s, c.slots + i, some, c.s.dim, c.s.n_state, c.state + i * c.s.n_state, c.s.n_state)
        i += some


cdef void read_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    kernels().read_lines(c.s, c.slots + first, last - first, c.out + first * c.width)


cdef void write_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    kernels().write_lines(c.s, c.slots + first, last - first, c.rows + first * c.width)


cdef void fill_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    begin(c.new, c.s, c.slots + first, c.keys + first, last - first,
          <float *>(c.scratch + seat * c.scratch_nbytes))


cdef void apply_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef hb_update u = c.update[0]
    cdef int64_t first = first_of(&u.g, unit, c.n_units), last = first_of(&u.g, unit + 1, c.n_units)
    u.g.n_segments = last - first
    if u.g.order == NULL:
        u.g.values += first * u.g.dim
    else:
        u.g.starts += first
    u.slots += first
    u.keys = u.keys + first if u.keys != NULL else NULL
    u.scratch = c.scratch + seat * c.scratch_nbytes
    if first < last:
        HB_ADD(&c.skipped, kernels().apply(c.s, &u))


cdef bint outside(const int64_t *slots, int64_t n, int64_t least, int64_t room) noexcept nogil:
    """Whether a slot is not one of least..room - 1."""
    cdef int64_t i
    cdef uint64_t most = 0  # no branch a slot; what is below `least` is large
    for i in range(n):
        most = most if most > <uint64_t>(slots[i] - least) else <uint64_t>(slots[i] - least)
    return n and most >= <uint64_t>(room - least)


cdef int64_t tile(const hb_slabs *s) noexcept nogil:
    """Floats of room that `begin` needs."""
    return TILE * (s.dim + s.n_state)


cdef void begin(const New *new, const hb_slabs *s, const int64_t *slots, const int64_t *keys, int64_t n,
                float *room) noexcept nogil:
    """Make n new lines in slots: rows drawn for their keys, and their state."""
    cdef int64_t i, k, some, width = s.dim + s.n_state
    memset(room, 0, tile(s) * sizeof(float))
    for i in range(TILE):
        memcpy(room + i * width + s.dim, new.state, s.n_state * sizeof(float))
    i = 0
    while i < n:
        some = TILE if n - i > TILE else n - i
        for k in range(new.n_draws):
            kernels().initialize(&new.draws[k], &keys[i], some, room + new.draws[k].column, width)
        kernels().scatter(s, &slots[i], some, 0, width, room, width)
        i += some


cdef class Lines:
    """How lines of some slabs begin; `Slabs.fill` has the parameters."""

    def __cinit__(self, Slabs slabs, draws, const float[::1] state):
        cdef int64_t w = slabs.s.dim, k
        if not slabs.divided or state.shape[0] != slabs.s.n_state:
            raise InvalidArgument(f"a state of {state.shape[0]} for new lines",
                                  remedy=f"the lines must have a dim; give {slabs.s.n_state} floats of state")
        self.lines.n_draws = len(draws)
        self.lines.draws = <hb_draw *>allocate((self.lines.n_draws + 1) * sizeof(hb_draw))
        self.lines.state = <float *>allocate((slabs.s.n_state + 1) * sizeof(float))
        if self.lines.draws == NULL or self.lines.state == NULL:
            raise MemoryError("no memory for new lines")
        for k, (kind, a, b, seed, column, count) in enumerate(draws):
            if kind not in KINDS or column < 0 or count < 0 or column + count > w:
                raise InvalidArgument(f"{kind!r} in columns {column} to {column + count}",
                                      remedy=f"a row has {w} columns; initializers are {', '.join(KINDS)}")
            self.lines.draws[k] = hb_draw(KINDS[kind], column, count, a, b, seed)
        for k in range(slabs.s.n_state):
            self.lines.state[k] = state[k]

    def __dealloc__(self):
        free(self.lines.draws)
        free(self.lines.state)


def n_state(int rule, int64_t dim, bint momentum=False):
    """Floats of state that a rule keeps for `dim` columns: int. `momentum`: whether SGD has some."""
    if rule < 0 or rule >= HB_RULES:
        raise InvalidArgument(f"unknown optimizer rule {rule}", remedy="use a rule of hbkit.embedding")
    return (dim if momentum else 0, dim, 1, 2 * dim, dim + 1, 2 * dim, dim + 1, 2 * dim + 1)[rule]


cdef class Slabs:
    """Growable lines of `width` floats each.

    Parameters
    ----------
    width : int
        Floats a line, as `gather` and `scatter` see it.
    chunk_nbytes : int
        About how many bytes a chunk takes; the lines of a chunk are a power of two.
    dim : int, optional
        Floats of the row, with which a line begins; the rest is state. When left out a line is not divided (``apply``
        finds the state behind as many columns as the gradients have), which costs an update nothing but the better
        places for its state.
    row_dtype : "float32", "float16" or "bfloat16"
        How rows are stored; state always is float32. Narrow rows need `dim`, and take 2 bytes a column, rounded up to
        4 bytes a row. `scatter` and `fill` round to the nearest value, `apply` stochastically, by 16 bits of
        Philox(seed, key, step, column); a finite value stays finite.

    Notes
    -----
    Contents of new lines are undefined. The GIL is released inside; callers order writes themselves. Two threads may
    write lines of different slots at once.
    """

    def __cinit__(self, int64_t width, int64_t chunk_nbytes=1 << 22, dim=None, str row_dtype="float32"):
        cdef int64_t row_nbytes, state_nbytes
        if width < 1:
            raise InvalidArgument(f"a line of {width} floats", remedy="give a width of at least 1")
        if dim is not None and not 0 < dim <= width:
            raise InvalidArgument(f"a row of {dim} floats in a line of {width}", remedy="give a dim within the line")
        if row_dtype not in ROW_DTYPES or (dim is None and row_dtype != "float32"):
            raise InvalidArgument(f"rows of dtype {row_dtype!r} in lines of dim {dim}",
                                  remedy=f"use one of {', '.join(ROW_DTYPES)}, and name dim")
        self.width, self.row_dtype, self.divided = width, row_dtype, dim is not None
        self.s.dtype = ROW_DTYPES[row_dtype]
        self.s.dim = width if dim is None else dim
        self.s.n_state = width - self.s.dim
        row_nbytes = self.s.dim * 4 if self.s.dtype == 0 else (self.s.dim * 2 + 3) // 4 * 4
        state_nbytes = self.s.n_state * 4
        while (<int64_t>2 << self.s.shift) * (row_nbytes + state_nbytes) <= chunk_nbytes and self.s.shift < 30:
            self.s.shift += 1
        self.apart = state_nbytes <= APART
        if self.apart:
            self.s.row_stride, self.s.state_stride = row_nbytes, state_nbytes
            self.s.state_at = row_nbytes << self.s.shift
        else:
            self.s.row_stride = self.s.state_stride = row_nbytes + state_nbytes
            self.s.state_at = row_nbytes

    def __dealloc__(self):
        cdef int64_t i
        for i in range(self.n_regions):
            free(self.regions[i])
        free(self.regions)
        free(self.s.chunks)

    @property
    def line_nbytes(self):
        """Memory a line takes, in bytes: int."""
        return self.s.row_stride + (self.s.state_stride if self.apart else 0)

    @property
    def capacity(self):
        """Lines there is room for: int."""
        return self.n_chunks << self.s.shift

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.capacity * self.line_nbytes + self.n_chunks * sizeof(char *)

    def reserve(self, int64_t n_lines):
        """Make room for slots 0..n_lines-1. MemoryError leaves the lines as they were."""
        cdef char **grown
        cdef size_t nbytes = self.line_nbytes << self.s.shift
        cdef int64_t had = self.capacity
        try:
            while self.capacity < n_lines:
                if self.left == 0:
                    self._add_region(nbytes, self._region_of(self.n_chunks))
                grown = NULL if fails() else <char **>realloc(self.s.chunks, (self.n_chunks + 1) * sizeof(char *))
                if grown == NULL:
                    raise MemoryError(f"no memory for {n_lines} lines")
                self.s.chunks = grown
                grown[self.n_chunks] = <char *>self.regions[self.n_regions - 1] + (self.n_last - self.left) * nbytes
                self.n_chunks += 1
                self.left -= 1
        except MemoryError:
            self.trim(had)
            raise

    cdef int64_t _region_of(self, int64_t chunk) noexcept:
        """Chunks of the region that a chunk lies in."""
        return REGION if <size_t>self.line_nbytes << self.s.shift >= HUGE and chunk >= FEW else 1

    cdef int _add_region(self, size_t nbytes, int64_t n) except -1:
        cdef void **grown = NULL if fails() else <void **>realloc(self.regions, (self.n_regions + 1) * sizeof(void *))
        cdef void *region
        if grown == NULL:
            raise MemoryError(f"no memory for {n} chunks of {nbytes} bytes")
        self.regions = grown
        if fails() or posix_memalign(&region, HUGE if nbytes >= HUGE else 64, n * nbytes) != 0:
            raise MemoryError(f"no memory for {n} chunks of {nbytes} bytes")
        if nbytes >= HUGE:
            madvise(region, n * nbytes, MADV_HUGEPAGE)
        self.regions[self.n_regions] = region
        self.n_regions += 1
        self.left = self.n_last = n
        return 0

    def trim(self, int64_t n_lines):
        """Let go of the chunks that only hold slots from n_lines on, and of the regions that have no others."""
        cdef size_t nbytes = self.line_nbytes << self.s.shift
        cdef uintptr_t begin, end
        while True:
            if self.n_regions and self.left == self.n_last:
                self.n_regions -= 1
                free(self.regions[self.n_regions])
                self.left, self.n_last = 0, self._region_of(self.n_chunks - 1)
            if self.n_chunks == 0 or (self.n_chunks - 1) << self.s.shift < n_lines:
                break
            self.n_chunks -= 1
            self.left += 1
            if nbytes >= HUGE:  # its pages go at once, its region perhaps later
                begin = (<uintptr_t>self.s.chunks[self.n_chunks] + PAGE - 1) // PAGE * PAGE
                end = (<uintptr_t>self.s.chunks[self.n_chunks] + nbytes) // PAGE * PAGE
                madvise(<void *>begin, end - begin, MADV_DONTNEED)

    cdef int _check(self, const int64_t[::1] slots, int64_t least) except -1:
        cdef int bad = 0
        if slots.shape[0]:
            with nogil:
                bad = outside(&slots[0], slots.shape[0], least, self.n_chunks << self.s.shift)
        if bad:
            raise InvalidArgument(f"a slot is outside the {self.capacity} lines", remedy="reserve lines first")
        return 0

    def gather(self, const int64_t[::1] slots, float[:, ::1] out, const int64_t[::1] index=None):
        """``out[i]`` = the first ``out.shape[1]`` floats of line ``slots[i]``; zeros where the slot is -1.

        With `index`, ``out[i]`` is of ``slots[index[i]]``: a row a key of a batch, straight from the slots of its
        distinct keys.
        """
        cdef Call c = call_of(self)
        cdef int64_t n = slots.shape[0] if index is None else index.shape[0]
        if out.shape[0] != n or out.shape[1] > self.width:
            raise InvalidArgument(f"out has shape {out.shape[0], out.shape[1]} for {n} slots",
                                  remedy=f"give one row a slot, at most {self.width} wide")
        self._check(slots, -1)
        if index is not None and not in_range(index, slots.shape[0]):
            raise InvalidArgument(f"index reaches outside {slots.shape[0]} slots", remedy="this is a precondition")
        if n and out.shape[1]:
            c.slots, c.index, c.n = &slots[0], &index[0] if index is not None else NULL, n
            c.out, c.width = &out[0, 0], out.shape[1]
            with nogil:
                run(gather_unit, &c, n * c.width * sizeof(float))

    def pool(self, const int64_t[::1] slots, const int64_t[::1] inverse, const int64_t[::1] splits,
             float[:, ::1] out, const float[::1] weight=None, const float[::1] row_scale=None):
        """`hbkit._ext.segment.pool` of the rows of slots (zeros where -1), without a copy of them where that is faster.

        out : float32[b, dim]; the other arguments as there, `inverse` into `slots`.
        """
        cdef Call c = call_of(self)
        cdef int64_t n = inverse.shape[0], n_out = splits.shape[0] - 1
        self._check(slots, -1)
        fits = out.shape[0] == n_out and out.shape[1] == self.s.dim and in_range(inverse, slots.shape[0])
        fits = fits and splits_fit(splits, n) and (weight is None or weight.shape[0] == n)
        if not (fits and (row_scale is None or row_scale.shape[0] == n_out)):
            raise InvalidArgument(f"{n} values in {n_out} rows do not fit an out of {out.shape[0], out.shape[1]} or "
                                  f"{slots.shape[0]} slots", remedy="this is a precondition of the segment sums")
        c.failed = True
        if n and n_out:
            c.slots, c.index, c.splits, c.n, c.failed = &slots[0], &inverse[0], &splits[0], n_out, False
            c.weight = &weight[0] if weight is not None else NULL
            c.row_scale = &row_scale[0] if row_scale is not None else NULL
            c.out, c.width = &out[0, 0], self.s.dim
            with nogil:
                run(pool_unit, &c, n * c.width * sizeof(float))
        if c.failed:
            rows = retained((slots.shape[0], self.s.dim))
            self.gather(slots, rows)
            pool(rows, inverse, splits, out, weight, row_scale)

    def lookup(self, Index index, const int64_t[::1] keys, float[:, ::1] out):
        """``out[i]`` = the row of ``keys[i]`` by `index`, zeros where it has none: `gather` of what is found.

        Keys may repeat; nothing is deduplicated. They are taken by lots, so that slots are still in the cache.
        """
        cdef Call c = call_of(self)
        cdef int64_t n = keys.shape[0]
        if out.shape[0] != n or out.shape[1] != self.s.dim:
            raise InvalidArgument(f"out has shape {out.shape[0], out.shape[1]} for {n} keys",
                                  remedy=f"give one row a key, {self.s.dim} wide")
        if n == 0:
            return
        cdef int64_t[::1] slots = retained((n,), np.int64)
        c.by, c.keys, c.found, c.n = &index.index, &keys[0], &slots[0], n
        c.out, c.width = &out[0, 0], self.s.dim
        with nogil:
            run(lookup_unit, &c, n * c.width * sizeof(float))
        if c.failed:
            self._check(index.find(keys), -1)  # raises

    def lookup_pooled(self, Index index, const int64_t[::1] keys, const int64_t[::1] splits, float[:, ::1] out,
                      const float[::1] weight=None, const float[::1] row_scale=None):
        """`pool` of the rows of keys by `index`: ``out[b]`` sums those of ``keys[splits[b]:splits[b + 1]]``."""
        cdef Call c = call_of(self)
        cdef int64_t n = keys.shape[0], n_out = splits.shape[0] - 1
        cdef int64_t[::1] slots = retained((n,), np.int64)
        if not (splits_fit(splits, n) and out.shape[0] == n_out and out.shape[1] == self.s.dim and
                (weight is None or weight.shape[0] == n) and (row_scale is None or row_scale.shape[0] == n_out)):
            raise InvalidArgument(f"{n} values in {n_out} rows do not fit an out of {out.shape[0], out.shape[1]}",
                                  remedy="this is a precondition of the segment sums")
        if n == 0 or n_out == 0 or not self._pools():
            self.pool(index.find(keys), np.arange(n), splits, out, weight, row_scale)
            return
        c.by, c.keys, c.found, c.splits, c.n = &index.index, &keys[0], &slots[0], &splits[0], n_out
        c.weight = &weight[0] if weight is not None else NULL
        c.row_scale = &row_scale[0] if row_scale is not None else NULL
        c.out, c.width = &out[0, 0], self.s.dim
        with nogil:
            run(lookup_pooled_unit, &c, n * c.width * sizeof(float))
        if c.failed:
            self._check(index.find(keys), -1)  # raises

    cdef bint _pools(self) noexcept:
        """Whether `pool_slots` knows such rows."""
        cdef int64_t splits[1]
        splits[0] = 0
        return kernels().pool_slots(&self.s, NULL, NULL, splits, NULL, NULL, 0, NULL) == 0

    def scatter(self, const int64_t[::1] slots, const float[:, ::1] lines, int64_t column=0):
        """Write ``lines[i]`` into line ``slots[i]`` from float `column` on; slots must be >= 0, and distinct."""
        cdef Call c = call_of(self)
        cdef int64_t n = slots.shape[0], w = lines.shape[1]
        if lines.shape[0] != n or column < 0 or column + w > self.width:
            raise InvalidArgument(f"lines of shape {lines.shape[0], w} do not fit {n} slots at {column}",
                                  remedy=f"a line has {self.width} floats")
        self._check(slots, 0)
        if n and w:
            c.slots, c.rows, c.n, c.width, c.column = &slots[0], &lines[0, 0], n, w, column
            with nogil:
                run(scatter_unit, &c, n * w * sizeof(float))

    def put(self, const int64_t[::1] slots, const float[:, ::1] rows, const float[:, ::1] state):
        """`scatter` of lines that are given as ``rows[n, dim]`` and ``state[n, width - dim]``."""
        cdef Call c = call_of(self)
        cdef int64_t n = slots.shape[0]
        if rows.shape[0] != n or state.shape[0] != n or rows.shape[1] != self.s.dim or state.shape[1] != self.s.n_state:
            raise InvalidArgument(f"rows of {rows.shape[1]} and states of {state.shape[1]} floats for {n} slots",
                                  remedy=f"a line has {self.s.dim} and {self.s.n_state}")
        if self.s.n_state == 0:
            self.scatter(slots, rows)
            return
        self._check(slots, 0)
        if n:
            c.slots, c.rows, c.state, c.n = &slots[0], &rows[0, 0], &state[0, 0], n
            with nogil:
                run(scatter_unit, &c, n * self.width * sizeof(float))

    def read(self, const int64_t[::1] slots, float[:, ::1] out):
        """As `gather`, of whole lines that the CPU will not ask for."""
        cdef Call c = call_of(self)
        cdef int64_t n = slots.shape[0]
        if out.shape[0] != n or out.shape[1] != self.width:
            raise InvalidArgument(f"out has shape {out.shape[0], out.shape[1]} for {n} slots",
                                  remedy=f"give one row a slot, {self.width} wide")
        self._check(slots, -1)
        if n:
            c.slots, c.out, c.n, c.width = &slots[0], &out[0, 0], n, self.width
            with nogil:
                run(read_unit, &c, n * self.width * sizeof(float))

    def write(self, const int64_t[::1] slots, const float[:, ::1] lines):
        """As `scatter`, of whole lines that the CPU will not ask for; where the slot is -1, nothing is written."""
        cdef Call c = call_of(self)
        cdef int64_t n = slots.shape[0]
        if lines.shape[0] != n or lines.shape[1] != self.width:
            raise InvalidArgument(f"lines of shape {lines.shape[0], lines.shape[1]} do not fit {n} slots",
                                  remedy=f"a line has {self.width} floats")
        self._check(slots, -1)
        if n:
            c.slots, c.rows, c.n, c.width = &slots[0], &lines[0, 0], n, self.width
            with nogil:
                run(write_unit, &c, n * self.width * sizeof(float))

    def pack(self, const int64_t[::1] slots):
        """Lines as they lie in memory, row then state: uint8[n, line_nbytes]. Slots must be >= 0."""
        cdef int64_t i, n = slots.shape[0], nbytes = self.line_nbytes
        out = retained((n, nbytes), np.uint8)
        cdef uint8_t[:, ::1] to = out
        self._check(slots, 0)
        with nogil:
            for i in range(n):
                memcpy(&to[i, 0], hb_row(&self.s, slots[i]), self.s.row_stride)
                if self.apart:
                    memcpy(&to[i, 0] + self.s.row_stride, hb_state(&self.s, slots[i]), self.s.state_stride)
        return out

    def unpack(self, const int64_t[::1] slots, const uint8_t[:, ::1] lines):
        """Write lines that `pack` of slabs with the same rows and states gave; slots must be >= 0."""
        cdef int64_t i, n = slots.shape[0], nbytes = self.line_nbytes
        if lines.shape[0] != n or lines.shape[1] != nbytes:
            raise InvalidArgument(f"lines of shape {lines.shape[0], lines.shape[1]} for {n} slots",
                                  remedy=f"a line has {nbytes} bytes")
        self._check(slots, 0)
        with nogil:
            for i in range(n):
                memcpy(hb_row(&self.s, slots[i]), &lines[i, 0], self.s.row_stride)
                if self.apart:
                    memcpy(hb_state(&self.s, slots[i]), &lines[i, 0] + self.s.row_stride, self.s.state_stride)

    def fill(self, const int64_t[::1] slots, const int64_t[::1] keys, draws, const float[::1] state):
        """Make new lines: rows drawn for their keys, and `state` beside each.

        Parameters
        ----------
        slots : int64[n], >= 0
        keys : int64[n]
        draws : sequence of (kind, a, b, seed, column, n_columns)
            What `hbkit._ext.random.initialize` takes, for the columns of the row from `column` on; what no draw names
            is 0. A draw's own columns count from 0. `Initializer.draw` makes one.
        state : float32[width - dim]
        """
        cdef int64_t n = slots.shape[0]
        cdef Call c = call_of(self)
        cdef Lines new = Lines(self, draws, state)
        if keys.shape[0] != n:
            raise InvalidArgument(f"{keys.shape[0]} keys for {n} slots", remedy="give one a slot")
        self._check(slots, 0)
        c.scratch_nbytes = tile(&self.s) * sizeof(float)
        if n == 0:
            return
        c.scratch = <char *>allocate(seats(n) * c.scratch_nbytes)
        if c.scratch == NULL:
            raise MemoryError("no memory for new lines")
        c.new, c.slots, c.keys, c.n = &new.lines, &slots[0], &keys[0], n
        with nogil:
            run(fill_unit, &c, n * NEW_NBYTES)
        free(c.scratch)

    def apply(self, rule, const int64_t[::1] slots, grads, hyper, const int64_t[::1] keys=None, uint64_t seed=0,
              step=0, str bad="apply"):
        """One optimizer step on distinct slots; -1 is skipped.

        Parameters
        ----------
        rule : int, or sequence of (rule, column, n_columns, state)
            A HB_ rule of kernels.h for the whole row. Or one for each of several slices of it: the row's columns from
            `column` on, whose state begins `state` floats into the line's state.
        slots : int64[n]
        grads : float32[n, dim] or Gradients of n segments
            `Gradients` are summed on the way, and never written out. dim is the row's.
        hyper : float32[h], or one such row for each slice
            As `Optimizer.hyper` makes them; what is left out is 0.
        keys : int64[n]
            Of the slots; with `seed` and `step` they decide how narrow rows round, and are needed for those alone.
        bad : "apply", "raise" or "skip"
            What happens to gradients that are not finite (as summed, before clipping): they are applied as they are;
            nothing is changed and InvalidArgument says how many there are; their lines are left as they are.

        Returns
        -------
        int
            Lines that "skip" left out.
        """
        cdef hb_slabs s = self.s
        cdef Call c = call_of(self)
        cdef hb_update u
        cdef hb_part *parts
        cdef float *h
        cdef float[:, ::1] wanted
        cdef const float[:, ::1] whole
        cdef const float[:, ::1] packed
        cdef Gradients by_segment
        cdef int64_t dim = grads.shape[1], n = slots.shape[0], n_terms = 0, k, result = 0
        if not self.divided:  # the state lies behind as many columns as there are
            s.dim, s.n_state, s.state_at, s.state_stride = dim, self.width - dim, dim * 4, s.row_stride
        slices = [(rule, 0, dim, 0)] if isinstance(rule, (int, np.integer)) else list(rule)
        packed = np.atleast_2d(np.ascontiguousarray(hyper, np.float32))
        if grads.shape[0] != n or dim != s.dim or s.n_state < 0 or packed.shape[0] != len(slices):
            raise InvalidArgument(f"grads of shape {tuple(grads.shape)} and {packed.shape[0]} hyper-parameters do not "
                                  f"fit {n} slots, rows of {s.dim} and {len(slices)} slices",
                                  remedy="the rule needs its state beside the row")
        if packed.shape[1] > HB_HYPER or bad not in BAD:
            raise InvalidArgument(f"{packed.shape[1]} hyper-parameters and bad={bad!r}",
                                  remedy=f"give at most {HB_HYPER}, and one of {', '.join(BAD)}")
        for k, (code, column, count, state) in enumerate(slices):
            momentum = packed.shape[1] > 1 and packed[k, 1] != 0
            if (column < 0 or count < 1 or column + count > dim or state < 0 or
                    state + n_state(code, count, momentum) > s.n_state):
                raise InvalidArgument(f"columns {column} to {column + count} with state from {state} on do not fit a "
                                      f"row of {dim} and a state of {s.n_state}",
                                      remedy="the rule needs its state beside the row")
        if s.dtype != 0 and (keys is None or keys.shape[0] != n):
            raise InvalidArgument("rounding needs the keys of the slots", remedy="give keys, one for each slot")
        self._check(slots, -1)
        if n == 0 or dim == 0:
            return 0
        if bad == "raise":
            if isinstance(grads, Gradients):
                grads = grads.sum()
            whole = grads
            used = np.asarray(slots) >= 0
            with nogil:
                result = kernels().count_bad(&whole[0, 0], n, dim)
            result = 0 if result == 0 else int(np.count_nonzero(used & ~np.isfinite(grads).all(axis=1)))
            if result:
                raise InvalidArgument(f"{result} of {n} gradients are not finite",
                                      remedy="lower the learning rate or clip, or let such rows be skipped")
        if isinstance(grads, Gradients):
            by_segment = grads
            u.g, n_terms = by_segment.g, by_segment.n_terms()
        else:
            whole = grads
            u.g.values, u.g.dim, u.g.n_segments = &whole[0, 0], dim, n
            u.g.order = u.g.starts = NULL
            u.g.rows = NULL
            u.g.scale = NULL
        u.slots, u.n_parts, u.skip = &slots[0], len(slices), bad == "skip"
        u.keys = &keys[0] if keys is not None and n else NULL
        u.seed, u.step = seed, <uint32_t>(<uint64_t>step)
        parts = <hb_part *>allocate((len(slices) + 1) * sizeof(hb_part))
        h = <float *>allocate((len(slices) + 1) * HB_HYPER * sizeof(float))
        c.scratch_nbytes = (<int64_t>HB_SCRATCH(dim) + 63) // 64 * 64
        c.scratch = <char *>allocate(seats(n) * c.scratch_nbytes)
        try:
            if parts == NULL or h == NULL or c.scratch == NULL:
                raise MemoryError("no memory for an update")
            wanted = <float[:len(slices) + 1, :HB_HYPER]>h
            wanted[:, :] = 0
            wanted[:len(slices), :packed.shape[1]] = packed
            for k, (code, column, count, state) in enumerate(slices):
                parts[k] = hb_part(code, column, count, state, h + k * HB_HYPER)
            u.parts, c.s, c.update, c.n = parts, &s, &u, n
            with nogil:
                run(apply_unit, &c, (n + n_terms) * dim * sizeof(float))
        finally:
            free(parts)
            free(h)
            free(c.scratch)
        return c.skipped
