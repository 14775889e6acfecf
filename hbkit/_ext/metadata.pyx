"""Metadata: how often and when each row was last used, 8 bytes a slot.

The two numbers of a slot lie side by side, so that a step touches one cache line a row. Growing is a realloc, which
moves pages rather than bytes once the table is large.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc

import numpy as np

from hbkit._ext.pool cimport fails
from hbkit._ext.share cimport HB_ADD, Unit, pieces, seats, share
from hbkit.errors import InvalidArgument

cdef extern from *:
    """
    #define HB_PREFETCH(p) __builtin_prefetch(p, 0, 2) /* the first-level cache has too few places for what comes */
    """
    void HB_PREFETCH(const void *) nogil

cdef extern from "sys/mman.h" nogil:
    int madvise(void *, size_t, int)

cdef uint32_t MOST = 0xFFFFFFFF
cdef int64_t AHEAD = 32
cdef int64_t NBYTES = 16  # bytes that could be moved in the time that a slot takes
cdef uintptr_t HUGE = 2 << 20
cdef int MADV_HUGEPAGE = 14  # Linux; elsewhere refused, which does not matter

cdef inline uint32_t _clip(int64_t x) noexcept nogil:
    return 0 if x < 0 else MOST if x > <int64_t>MOST else <uint32_t>x


cdef int64_t stamp(Pair *at, const int64_t *slots, int64_t n, int64_t step, const int64_t *counts) noexcept nogil:
    """`Metadata.stamp` of slots within `at`; that and counts may be NULL."""
    cdef int64_t i, absent = 0
    cdef uint32_t now = _clip(step)
    cdef Pair *pair
    for i in range(n):
        if slots[i] < 0:
            absent += 1
        elif at != NULL:
            if i + AHEAD < n and slots[i + AHEAD] >= 0:
                HB_PREFETCH(&at[slots[i + AHEAD]])
            pair = &at[slots[i]]
            if counts != NULL:
                pair.freq = _clip(pair.freq + counts[i])
            pair.last_step = now
    return absent


cdef struct Call:  # what the units of a call need, each for slots n * unit // n_units and so on
    Pair *at
    const int64_t *slots
    const int64_t *counts
    int64_t *freq
    int64_t *last_step
    int64_t n, n_units, step, absent


cdef void run(Unit unit, Call *c) noexcept nogil:
    c.n_units = min(pieces(c.n * NBYTES), c.n)
    share(unit, c, c.n_units, seats(c.n_units))


cdef void stamp_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t first = c.n * unit // c.n_units, last = c.n * (unit + 1) // c.n_units
    HB_ADD(&c.absent, stamp(c.at, c.slots + first, last - first, c.step,
                            c.counts + first if c.counts != NULL else NULL))


cdef void put_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t i, last = c.n * (unit + 1) // c.n_units
    for i in range(c.n * unit // c.n_units, last):
        if c.slots[i] >= 0:
            if i + AHEAD < last and c.slots[i + AHEAD] >= 0:
                HB_PREFETCH(&c.at[c.slots[i + AHEAD]])
            c.at[c.slots[i]] = Pair(_clip(c.freq[i]), _clip(c.last_step[i]))


cdef void get_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Call *c = <Call *>what
    cdef int64_t i, last = c.n * (unit + 1) // c.n_units
    for i in range(c.n * unit // c.n_units, last):
        if i + AHEAD < last:
            HB_PREFETCH(&c.at[c.slots[i + AHEAD]])
        c.freq[i] = c.at[c.slots[i]].freq
        c.last_step[i] = c.at[c.slots[i]].last_step


cdef class Metadata:
    """Frequency and last step by slot, unsigned 32-bit: what is larger stays at 2**32 - 1.

    Parameters
    ----------
    kept : bool
        False: nothing is kept or takes memory; every slot reads frequency 0 and the latest step of all.

    Notes
    -----
    The GIL is released inside; callers order writes themselves.
    """

    def __cinit__(self, bint kept=True):
        self.kept = kept

    def __dealloc__(self):
        free(self.at)

    @property
    def room(self):
        """Slots there is room for: int."""
        return self.n

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.n * sizeof(Pair) if self.kept else 0

    @property
    def latest(self):
        """Largest step that was ever written, 0 for none: int."""
        return self.latest_step

    def reserve(self, int64_t n_slots):
        """Make room for slots 0..n_slots-1, whose numbers are undefined. MemoryError leaves all as it was."""
        cdef Pair *grown
        cdef uintptr_t begin, end
        if n_slots <= self.n:
            return
        if self.kept:
            grown = NULL if fails() else <Pair *>realloc(self.at, n_slots * sizeof(Pair))
            if grown == NULL:
                raise MemoryError(f"no memory for the metadata of {n_slots} rows")
            self.at = grown
            begin, end = (<uintptr_t>grown + HUGE - 1) // HUGE * HUGE, <uintptr_t>(grown + n_slots) // HUGE * HUGE
            if begin < end:  # slots are random: a miss of the TLB costs as much as one of the cache
                madvise(<void *>begin, end - begin, MADV_HUGEPAGE)
        self.n = n_slots

    def trim(self, int64_t n_slots):
        """Let go of the room for slots from n_slots on."""
        cdef Pair *less
        if n_slots >= self.n:
            return
        self.n = n_slots
        if self.kept:
            less = <Pair *>realloc(self.at, max(n_slots, 1) * sizeof(Pair))
            self.at = self.at if less == NULL else less

    cdef int _check(self, const int64_t[::1] slots, int64_t n, int64_t least) except -1:
        cdef int64_t i
        cdef uint64_t most = 0  # no branch a slot; what is below `least` is large
        if slots.shape[0] != n:
            raise InvalidArgument(f"{n} numbers for {slots.shape[0]} slots", remedy="give one a slot")
        with nogil:
            for i in range(n):
                most = most if most > <uint64_t>(slots[i] - least) else <uint64_t>(slots[i] - least)
        if n and most >= <uint64_t>(self.n - least):
            raise InvalidArgument(f"a slot is outside the {self.n} rows", remedy="reserve rows first")
        return 0

    def clear(self, const int64_t[::1] slots):
        """Set slots (all >= 0) to frequency 0, last step 0."""
        cdef int64_t i, n = slots.shape[0]
        self._check(slots, n, 0)
        if self.kept:
            with nogil:
                for i in range(n):
                    self.at[slots[i]] = Pair(0, 0)

    def stamp(self, const int64_t[::1] slots, int64_t step, const int64_t[::1] counts=None):
        """Stamp slots with `step` and add ``counts[i]`` (>= 0; 0 when left out) to their frequency; -1 is skipped.

        Returns
        -------
        int
            Slots that were -1.
        """
        cdef int64_t n = slots.shape[0]
        cdef Call c
        self._check(slots, n if counts is None else counts.shape[0], -1)
        self.stamped(step)
        if n == 0:
            return 0
        c.at, c.slots, c.n, c.step, c.absent = self.at if self.kept else NULL, &slots[0], n, step, 0
        c.counts = NULL if counts is None else &counts[0]
        with nogil:
            run(stamp_unit, &c)
        return c.absent

    cdef void stamped(self, int64_t step) noexcept:
        """Rows are being stamped with `step`."""
        self.latest_step = max(self.latest_step, _clip(step))

    def put(self, const int64_t[::1] slots, const int64_t[::1] freq, const int64_t[::1] last_step):
        """Write both numbers of slots, clipped to what is held; -1 is skipped."""
        cdef int64_t i, n = slots.shape[0]
        cdef uint32_t latest = self.latest_step
        cdef Call c
        self._check(slots, freq.shape[0], -1)
        self._check(slots, last_step.shape[0], -1)
        with nogil:
            for i in range(n):
                if slots[i] < 0:
                    continue
                latest = max(latest, _clip(last_step[i]))
        if n and self.kept:
            c.at, c.slots, c.n = self.at, &slots[0], n
            c.freq, c.last_step = <int64_t *>&freq[0], <int64_t *>&last_step[0]
            with nogil:
                run(put_unit, &c)
        self.latest_step = max(self.latest_step, latest)

    def stamped_after(self, int64_t step, uint64_t[::1] bits):
        """Set the bit of each slot that was stamped after `step`, clear the others; bits for slots 0..64*n-1.

        A slot that nobody holds has the stamp that it had.
        """
        cdef int64_t i, j, n
        cdef uint64_t word
        cdef uint32_t least = _clip(step)
        if not self.kept:
            raise InvalidArgument("there are no stamps", remedy="keep the metadata")
        with nogil:
            for i in range(bits.shape[0]):
                word, n = 0, min(<int64_t>64, self.n - 64 * i)
                for j in range(n):
                    word |= <uint64_t>(self.at[64 * i + j].last_step > least) << j
                bits[i] = word

    def get(self, const int64_t[::1] slots, out=None):
        """Frequency and last step of slots (all >= 0): (int64[n], int64[n]), in the two arrays of `out` if given."""
        cdef int64_t n = slots.shape[0]
        freq_, last_step_ = (np.empty(n, np.int64), np.empty(n, np.int64)) if out is None else out
        cdef int64_t[::1] freq = freq_, last_step = last_step_
        cdef Call c
        self._check(slots, freq.shape[0], 0)
        self._check(slots, last_step.shape[0], 0)
        if n and self.kept:
            c.at, c.slots, c.n, c.freq, c.last_step = self.at, &slots[0], n, &freq[0], &last_step[0]
            with nogil:
                run(get_unit, &c)
        elif n:
            freq[:], last_step[:] = 0, self.latest_step
        return freq_, last_step_
