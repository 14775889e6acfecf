"""Together: one batch of several tables in host memory. Each pass over it is one call for all of them.

What a table costs beside its keys is then some pointers, not a dozen calls, and the GIL is let go of once a pass. Rows
and gradients of features that stand side by side are gone through row by row: what is long lies in order, and what is
gone through at random, rows and sums of the keys that a batch has many times, stays in the cache.

Several threads share a pass (`hbkit._ext.share`). A gather is cut by rows of the batch, so that what is written lies in
order. In all other passes the tables' keys, laid end to end, are cut into pieces of one size, so that a large table
among small ones holds nobody up; what cannot be cut, the distinct keys of a table, is of the piece in which the table
begins, and so are its sums unless it is large. Those pieces are the same in all passes: what one thread has written it
will read. A key's numbers are computed by one thread, in the order in which one thread alone would, so they do not
depend on the pieces.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import numpy as np

from hbkit._ext.isa cimport HB_HYPER, HB_SCRATCH, hb_feature, hb_index, hb_part, hb_slabs, hb_update, kernels
from hbkit._ext.segment import retained
from hbkit._ext.slabs import n_state

from hbkit._ext.index cimport Index
from hbkit._ext.metadata cimport Metadata, Pair, stamp
from hbkit._ext.pool cimport allocate, fails
from hbkit._ext.segment cimport in_range
from hbkit._ext.share cimport HB_SET, Unit, pieces, seats, share
from hbkit._ext.slabs cimport Lines, New, Slabs, begin, tile
from hbkit.errors import InvalidArgument

cdef int64_t MOST = 0x7FFFFFFF  # keys of a table
# What a key costs in a pass, as bytes that could be moved in the same time:
cdef int64_t KEY_NBYTES = 64  # to find it, a cache line
cdef int64_t STAMP_NBYTES = 16
cdef int64_t LOCATE_NBYTES = 8
cdef int64_t NEW_NBYTES = 512

cdef struct Part:  # one table
    const hb_index *index  # NULL where rows are given
    const int64_t *keys  # of the batch, feature after feature
    const int64_t *stands  # what each key counts for; NULL: 1
    int64_t n, u, n_rows, dim  # keys; distinct ones
    int64_t *unique
    int64_t *counts
    int64_t *totals  # counts, or sums of `stands`
    int64_t *slots
    const float **rows
    int32_t *inverse
    int64_t feature, n_features  # the first one, and how many
    float *sums
    # During a pass:
    const float *given  # rows
    hb_slabs *slabs
    Pair *pairs
    bint stamped
    const New *new
    int64_t n_new, n_slots
    int64_t *new_keys
    int64_t *new_slots
    int64_t *new_at  # which of the distinct keys they are
    uint8_t *is_new
    bint failed
    hb_part rule
    hb_update update


cdef struct Place:  # of a feature, in the order of tables
    int64_t part, number  # table, and which of its features
    int64_t group, at  # array that its rows stand in, and its place there, in floats


cdef struct Group:  # an array that features stand in, during a pass
    float *at
    int64_t stride, n_rows, dim
    int64_t first, n  # of `features`, to gather


cdef struct Pass:
    Part *parts
    Place *places
    Group *groups
    hb_feature *features  # n_features for each seat
    int64_t n_parts, n_features, n_groups, n_keys
    int64_t total, n_units, n_seats  # keys that the units go through
    # What some passes need:
    int64_t step
    uint32_t *table  # of dedupe, for each seat
    int64_t table_n
    char *scratch
    int64_t scratch_nbytes  # of each seat
    int failed


cdef bint begins(const Pass *p, int64_t unit, int64_t before) noexcept nogil:
    """Whether a table with so many keys before it begins in a unit."""
    return p.total * unit // p.n_units <= before < p.total * (unit + 1) // p.n_units


cdef bint span(const Pass *p, int64_t unit, int64_t before, int64_t n_keys, int64_t n, int64_t *first,
               int64_t *last) noexcept nogil:
    """Which of n things, evenly spread over a table's keys, `before` before them, a unit goes through; any at all?"""
    cdef int64_t low = p.total * unit // p.n_units - before, high = p.total * (unit + 1) // p.n_units - before
    if n == 0 or low >= n_keys or high <= 0:
        return False
    first[0], last[0] = max(low, <int64_t>0) * n // n_keys, min(high, n_keys) * n // n_keys
    return first[0] < last[0]


cdef _refuse(what):
    raise InvalidArgument(what, remedy="this is a precondition of batches of several tables")


cdef bint within(const int64_t *slots, int64_t n, int64_t room) noexcept nogil:
    """Whether slots are -1..room - 1."""
    cdef int64_t i
    cdef uint64_t most = 0
    for i in range(n):
        most = most if most > <uint64_t>(slots[i] + 1) else <uint64_t>(slots[i] + 1)
    return most <= <uint64_t>room


cdef int64_t odd(int64_t n, int64_t line) noexcept nogil:
    """At least n, of which `line` fill a cache line: an odd number of lines.

    What is gone through side by side so lies in different sets of the first-level cache.
    """
    return ((n + line - 1) // line | 1) * line


cdef void permute(int64_t *numbers, const int64_t *order, int64_t n, int64_t *before) noexcept nogil:
    """``numbers[order]``; `before` is room for n."""
    cdef int64_t i
    memcpy(before, numbers, n * sizeof(int64_t))
    for i in range(n):
        numbers[i] = before[order[i]]


cdef void insert(Part *part) noexcept nogil:
    """Put the absent keys into the index; without memory it is as it was, and the part has failed."""
    cdef int64_t k, n = 0
    for k in range(part.u):
        if part.slots[k] < 0:
            part.new_keys[n] = part.unique[k]
            part.new_at[n] = k
            n += 1
    part.failed = kernels().index.insert(<hb_index *>part.index, part.new_keys, n, part.new_slots, part.is_new) != 0


cdef int64_t room(const Part *part) noexcept nogil:
    """Floats of sums[u, dim], blocks[u, dim], seen[u]."""
    return odd(part.u * (2 * part.dim + 1), 16)


cdef int bits_for(int64_t n) noexcept nogil:
    """Of the table in which n keys are deduplicated."""
    cdef int bits = 6
    while bits < 32 and (<int64_t>1 << bits) < 6 * n:
        bits += 1
    return bits


cdef void dedupe_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Pass *p = <Pass *>what
    cdef int64_t i, k, before = 0
    cdef Part *part
    for i in range(p.n_parts):
        part = &p.parts[i]
        if begins(p, unit, before):
            part.u = kernels().index.dedupe(part.keys, part.n, p.table + seat * p.table_n, bits_for(part.n),
                                            part.unique - 1, part.inverse, 0, part.counts)
            if part.stands != NULL:
                memset(part.totals, 0, part.u * sizeof(int64_t))
                for k in range(part.n):
                    part.totals[part.inverse[k]] += part.stands[k]
        before += part.n


cdef void find_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Pass *p = <Pass *>what
    cdef int64_t i, first, last, before = 0
    cdef Part *part
    for i in range(p.n_parts):
        part = &p.parts[i]
        if span(p, unit, before, part.n, part.u, &first, &last):
            if part.index != NULL:
                kernels().index.find(part.index, part.unique + first, last - first, part.slots + first)
            else:
                memset(part.slots + first, 0xFF, (last - first) * sizeof(int64_t))
        before += part.n


cdef void insert_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Pass *p = <Pass *>what
    cdef int64_t i, before = 0
    for i in range(p.n_parts):
        if p.parts[i].n_new and begins(p, unit, before):
            insert(&p.parts[i])
        before += p.parts[i].n_new


cdef void begin_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    """Rows of new keys, whose slots nobody has used yet."""
    cdef Pass *p = <Pass *>what
    cdef int64_t i, j, first, last, before = 0
    cdef Part *part
    for i in range(p.n_parts):
        part = &p.parts[i]
        if span(p, unit, before, part.n_new, part.n_new, &first, &last):
            begin(part.new, part.slabs, part.new_slots + first, part.new_keys + first, last - first,
                  <float *>(p.scratch + seat * p.scratch_nbytes))
            for j in range(first, last):
                part.slots[part.new_at[j]] = part.new_slots[j]
            if part.pairs != NULL:
                for j in range(first, last):
                    part.pairs[part.new_slots[j]] = Pair(0, 0)
        before += part.n_new


cdef void stamp_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Pass *p = <Pass *>what
    cdef int64_t i, first, last, before = 0
    cdef Part *part
    for i in range(p.n_parts):
        part = &p.parts[i]
        if part.stamped and span(p, unit, before, part.n, part.u, &first, &last):
            stamp(part.pairs, part.slots + first, last - first, p.step, part.totals + first)
        before += part.n


cdef void locate_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Pass *p = <Pass *>what
    cdef int64_t i, k, first, last, before = 0
    cdef Part *part
    for i in range(p.n_parts):
        part = &p.parts[i]
        if span(p, unit, before, part.n, part.u, &first, &last):
            if part.index != NULL:
                kernels().locate(part.slabs, part.slots + first, last - first, part.rows + first)
            else:
                for k in range(first, last):
                    part.rows[k] = part.given + k * part.dim
        before += part.n


cdef void refer(const Pass *p, int64_t number, hb_feature *to) noexcept nogil:
    """A feature as the kernels want it."""
    cdef const Place *place = &p.places[number]
    cdef const Part *part = &p.parts[place.part]
    to.at, to.inverse, to.rows = place.at, part.inverse + place.number * part.n_rows, part.rows
    if part.sums != NULL:
        to.sums, to.blocks = part.sums, part.sums + part.u * part.dim
        to.seen = <int32_t *>(part.sums + 2 * part.u * part.dim)


cdef void gather_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    """Some rows of each array, all features: what is written lies in order."""
    cdef Pass *p = <Pass *>what
    cdef int64_t group, first, last
    cdef const Group *to
    for group in range(p.n_groups):
        to = &p.groups[group]
        first, last = to.n_rows * unit // p.n_units, to.n_rows * (unit + 1) // p.n_units
        if to.n and first < last:
            kernels().gather_together(p.features + to.first, to.n, first, last, to.dim, to.at, to.stride)


cdef bint large(const Pass *p, const Part *part) noexcept nogil:
    """Whether a table's sums would hold up the other threads, were they all of one unit."""
    return p.n_seats > 1 and part.n > 2 * (p.total // p.n_units)


cdef bint keys_of(const Pass *p, int64_t unit, int64_t before, const Part *part, int64_t *first,
                  int64_t *last) noexcept nogil:
    """Which keys of a large table are summed in a unit: those with as many occurrences as in another; any at all?"""
    cdef int64_t low = p.total * unit // p.n_units - before, high = p.total * (unit + 1) // p.n_units - before, n = 0
    if low >= part.n or high <= 0:
        return False
    first[0] = last[0] = 0
    while last[0] < part.u and n < high:
        first[0] += n < low
        n += part.counts[last[0]]
        last[0] += 1
    return first[0] < last[0]


cdef void sum_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    """Sums of some tables: a table's features one after the other, which is the batch's order."""
    cdef Pass *p = <Pass *>what
    cdef int64_t i, k, n, number, group, first = p.n_parts, last = 0, most = 0, low, high, before = 0
    cdef hb_feature *features = p.features + seat * p.n_features
    cdef const Group *grads
    cdef Part *part
    for i in range(p.n_parts):
        part = &p.parts[i]
        if large(p, part):
            if keys_of(p, unit, before, part, &low, &high):
                memset(part.sums + 2 * part.u * part.dim + low, 0, (high - low) * sizeof(int32_t))
                for k in range(part.feature, part.feature + part.n_features):
                    grads = &p.groups[p.places[k].group]
                    refer(p, k, features)
                    if not kernels().sum_some(features, low, high, grads.n_rows, grads.dim, grads.at, grads.stride):
                        HB_SET(&p.failed)
        elif begins(p, unit, before):
            memset(part.sums + 2 * part.u * part.dim, 0, part.u * sizeof(int32_t))
            first, last, most = min(first, i), i + 1, max(most, part.n_features)
        before += part.n
    for number in range(most):
        for group in range(p.n_groups):
            n, grads = 0, &p.groups[group]
            for i in range(first, last):
                part = &p.parts[i]
                if not large(p, part) and number < part.n_features and p.places[part.feature + number].group == group:
                    refer(p, part.feature + number, &features[n])
                    n += 1
            if n and not kernels().sum_together(features, n, grads.n_rows, grads.dim, grads.at, grads.stride):
                HB_SET(&p.failed)


cdef void finish_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    """The end of sums, and where tables have a rule, one step of it."""
    cdef Pass *p = <Pass *>what
    cdef int64_t i, first, last, before = 0
    cdef hb_feature feature
    cdef hb_update update
    cdef Part *part
    memset(&feature, 0, sizeof(hb_feature))
    for i in range(p.n_parts):
        part = &p.parts[i]
        if span(p, unit, before, part.n, part.u, &first, &last):
            feature.sums, feature.blocks = part.sums + first * part.dim, part.sums + (part.u + first) * part.dim
            kernels().finish_sums(&feature, part.counts + first, last - first, part.dim)
            if p.scratch != NULL:
                update = part.update
                update.slots, update.keys = part.slots + first, part.unique + first
                update.g.values, update.g.n_segments = feature.sums, last - first
                update.scratch = p.scratch + seat * p.scratch_nbytes
                kernels().apply(part.slabs, &update)
        before += part.n


cdef class Together:
    """The distinct keys of a batch in each of several tables, and where their rows are.

    Parameters
    ----------
    tables : list of (Index, Slabs, Metadata, Lines or None), or of int
        None: `make` does not make this table's rows. int: its dim, where `gather` is given rows.
    keys : list of int64[k * n_rows]
        One array a table: the keys of its k features, one a row, end to end.
    places : list of (group, column)
        For each feature in the order of tables: in which of the arrays that `gather` and `sum` are given its rows
        stand, and from which column on. Those of one array have one dim.
    n_rows : list of int
        For each table.
    stands : list of int64[k * n_rows], optional
        How many occurrences each key counts for; 1 when left out.

    Attributes
    ----------
    keys, counts, slots : list of int64[u]
        Of each table's distinct keys in the order of their first appearance; slots are -1 where a key is absent.

    Notes
    -----
    The GIL is released inside. Callers order writes, and see to it that slots are up to date.
    """

    cdef Pass p
    cdef list tables
    cdef object memory, given
    cdef readonly list keys, counts, slots

    def __cinit__(self, list tables, list keys, list places, list n_rows, list stands=None):
        cdef int64_t i, k, n, f = 0, total = 0, most = 0, n_wide = 0, n_narrow = 0, columns = 4 + (stands is not None)
        cdef const int64_t[::1] some
        cdef Index index
        cdef Slabs slabs
        cdef Pass *p = &self.p
        cdef Part *part
        self.tables, self.given, p.n_parts = tables, (keys, stands), len(tables)
        p.n_seats, p.n_features = seats(MOST), len(places)
        p.parts = NULL if fails() else <Part *>calloc(p.n_parts + 1, sizeof(Part))
        p.places = NULL if fails() else <Place *>calloc(p.n_features + 1, sizeof(Place))
        p.features = NULL if fails() else <hb_feature *>calloc(p.n_seats * (p.n_features + 1), sizeof(hb_feature))
        if p.parts == NULL or p.places == NULL or p.features == NULL:
            raise MemoryError("no memory for a batch")
        if not len(keys) == len(n_rows) == p.n_parts or len(keys if stands is None else stands) != p.n_parts:
            _refuse(f"{len(keys)} arrays for {p.n_parts} tables")
        for i in range(p.n_parts):
            part, some = &p.parts[i], keys[i]
            n, part.n_rows = some.shape[0], n_rows[i]
            if part.n_rows < 1 or n == 0 or n % part.n_rows or n >= MOST or f + n // part.n_rows > p.n_features:
                _refuse(f"{n} keys in {part.n_rows} rows")
            part.n, part.feature, part.n_features, part.keys = n, f, n // part.n_rows, &some[0]
            p.n_keys += n
            if stands is not None:
                some = stands[i]
                if some.shape[0] != n:
                    _refuse(f"{some.shape[0]} counts for {n} keys")
                part.stands = &some[0]
            if isinstance(tables[i], int):
                part.dim = tables[i]
            else:
                index, slabs = tables[i][0], tables[i][1]
                part.index, part.slabs, part.dim = &index.index, &slabs.s, slabs.s.dim
            if part.dim < 1:
                _refuse(f"rows of {part.dim} floats")
            most = max(most, n)
            for k in range(part.n_features):
                group, at = places[f]
                if group < 0 or at < 0:
                    _refuse(f"a place of {group, at}")
                p.places[f] = Place(i, k, group, at)
                p.n_groups = max(p.n_groups, p.places[f].group + 1)
                f += 1
        if f != p.n_features:
            _refuse(f"{p.n_features} places for {f} features")
        p.groups = NULL if fails() else <Group *>calloc(p.n_groups + 1, sizeof(Group))
        if p.groups == NULL:
            raise MemoryError("no memory for a batch")
        # For each table unique[n + 1], counts[n], slots[n], rows[n], the first without meaning, and totals[n] where
        # keys stand for some number; and inverse[n].
        for i in range(p.n_parts):
            n_wide += odd(columns * p.parts[i].n + 1, 8)
            n_narrow += odd(p.parts[i].n, 16)
        wide, narrow = retained((n_wide,), np.int64), retained((n_narrow,), np.int32)
        self.memory = wide, narrow
        self._find(wide, narrow, most)
        self.keys, self.counts, self.slots = [], [], []
        k = 1
        for i in range(p.n_parts):
            n, total = p.parts[i].n, p.parts[i].u
            self.keys.append(wide[k:k + total])
            self.counts.append(wide[k + (n if stands is None else 4 * n):][:total])
            self.slots.append(wide[k + 2 * n:k + 2 * n + total])
            k += odd(columns * n + 1, 8)

    cdef _find(self, int64_t[::1] wide, int32_t[::1] narrow, int64_t most):
        cdef int64_t i, n_seats = self.p.n_seats
        cdef int64_t *at = &wide[0]
        cdef int32_t *inverse = &narrow[0]
        cdef uint32_t[::1] table
        cdef Part *part
        for i in range(self.p.n_parts):
            part = &self.p.parts[i]
            part.unique, part.counts, part.slots = at + 1, at + 1 + part.n, at + 1 + 2 * part.n
            part.rows, part.inverse = <const float **>(at + 1 + 3 * part.n), inverse
            part.totals = part.counts if part.stands == NULL else at + 1 + 4 * part.n
            at += odd((4 + (part.stands != NULL)) * part.n + 1, 8)
            inverse += odd(part.n, 16)
        self.p.n_seats = min(n_seats, self.p.n_keys // max(most, <int64_t>1) + 1)  # the largest table holds up more
        self.p.table_n = <int64_t>1 << bits_for(most)
        table = retained((self.p.n_seats * self.p.table_n,), np.uint32)
        self.p.table = &table[0]
        with nogil:
            self._pass(dedupe_unit, self.p.n_keys, KEY_NBYTES)
            self.p.n_seats = n_seats
            self._pass(find_unit, self.p.n_keys, KEY_NBYTES)

    def __dealloc__(self):
        free(self.p.parts)
        free(self.p.places)
        free(self.p.features)
        free(self.p.groups)

    cdef void _pass(self, Unit unit, int64_t n_keys, int64_t nbytes) noexcept nogil:
        """Go through so many keys of all tables, each of which takes about so many bytes."""
        self.p.total, self.p.n_units = n_keys, pieces(n_keys * nbytes)
        share(unit, &self.p, self.p.n_units, self.p.n_seats)

    cdef void _pass_of_rows(self, Unit unit) noexcept nogil:
        """Go through the rows or sums of all keys.

        The CPU gets cache lines by twos, so that where rows are one line, features are gone through by twos at least,
        unless there are few.
        """
        cdef int64_t n, width = self._width()
        n, self.p.total = pieces(self._nbytes()), self.p.n_keys
        self.p.n_units = n if width < 512 else min(n, width // 128)
        share(unit, &self.p, self.p.n_units, self.p.n_seats)

    cdef int64_t _width(self) noexcept nogil:
        """Bytes of all features' columns."""
        cdef int64_t i, nbytes = 0
        for i in range(self.p.n_parts):
            nbytes += self.p.parts[i].n_features * self.p.parts[i].dim * <int64_t>sizeof(float)
        return nbytes

    cdef int64_t _nbytes(self) noexcept nogil:
        """Bytes of the rows of all keys."""
        cdef int64_t i, nbytes = 0
        for i in range(self.p.n_parts):
            nbytes += self.p.parts[i].n * self.p.parts[i].dim * <int64_t>sizeof(float)
        return nbytes

    def inverse(self, int64_t number):
        """Which of the distinct keys each key of a table is: int64[n]."""
        cdef Part *part = self._part(number)
        return np.array(<int32_t[:part.n]>part.inverse, np.int64)

    cdef Part *_part(self, int64_t number) except NULL:
        if not 0 <= number < self.p.n_parts:
            _refuse(f"table {number} of {self.p.n_parts}")
        return &self.p.parts[number]

    def reorder(self, int64_t number, const int64_t[::1] order, const int64_t[::1] place):
        """Let key number ``order[k]`` of a table's distinct keys, whose rows are given, be number k: `place` of it."""
        cdef Part *part = self._part(number)
        cdef int64_t k
        cdef int64_t *before = <int64_t *>part.rows  # not in use yet
        if part.index != NULL or part.stands != NULL or order.shape[0] != part.u or place.shape[0] != part.u:
            _refuse(f"an order of {order.shape[0]} for {part.u} keys")
        if not (in_range(order, part.u) and in_range(place, part.u)):
            _refuse("an order of other keys")
        with nogil:
            permute(part.unique, &order[0], part.u, before)
            permute(part.counts, &order[0], part.u, before)
            for k in range(part.n):
                part.inverse[k] = <int32_t>place[part.inverse[k]]

    def n_absent(self):
        """How many keys are absent, of each table: list of int."""
        cdef int64_t i, k, n
        found = []
        for i in range(self.p.n_parts):
            n = 0
            for k in range(self.p.parts[i].u):
                n += self.p.parts[i].slots[k] < 0
            found.append(n)
        return found

    def make(self, list numbers):
        """Make rows of the absent keys of the tables of these numbers, as each has room for them.

        Where there is no memory, none is made in any. Nobody else may use these tables meanwhile.

        Returns
        -------
        list of int64[m]
            Slots of each table's new rows.
        """
        cdef int64_t i, total = 0, at = 0
        cdef bint failed = False
        cdef Index index
        cdef Slabs slabs
        cdef Metadata metadata
        cdef Lines lines
        cdef Pass *p = &self.p
        cdef Part *part
        cdef int64_t[::1] wide
        cdef uint8_t[::1] narrow
        cdef int64_t *slots
        cdef uint8_t *fresh
        n_absent = self.n_absent()
        for i in numbers:
            total += <int64_t>n_absent[i]
        if total == 0:
            return [np.empty(0, np.int64) for _ in numbers]
        wide = array = retained((3 * total,), np.int64)  # slots, keys, places
        narrow = retained((total,), np.uint8)
        slots, fresh = &wide[0], &narrow[0]
        made = []
        p.scratch_nbytes = 0
        for i in range(p.n_parts):
            p.parts[i].n_new = 0
        for i in numbers:
            index, slabs, metadata, lines = self.tables[i]
            part = &p.parts[i]
            part.n_new, part.n_slots, part.failed = n_absent[i], index.index.next_slot, False
            if lines is None or part.n_slots + part.n_new > min(<int64_t>slabs.capacity, metadata.n):
                _refuse("a table has no room for new rows, or does not say how they begin")
            part.new, part.pairs = &lines.lines, metadata.at if metadata.kept else NULL
            part.new_slots, part.is_new = slots + at, fresh + at  # maybe none
            part.new_keys, part.new_at = slots + total + at, slots + 2 * total + at
            made.append(array[at:at + part.n_new])
            p.scratch_nbytes, at = max(p.scratch_nbytes, tile(&slabs.s) * <int64_t>sizeof(float)), at + part.n_new
        p.scratch = <char *>allocate(self.p.n_seats * p.scratch_nbytes)
        if p.scratch == NULL:
            raise MemoryError("no memory for new rows")
        with nogil:
            self._pass(insert_unit, total, NEW_NBYTES)
            for i in range(p.n_parts):
                failed |= p.parts[i].n_new != 0 and p.parts[i].failed
            if not failed:
                self._pass(begin_unit, total, NEW_NBYTES)
            else:
                for i in range(p.n_parts):
                    part = &p.parts[i]
                    if part.n_new and not part.failed:
                        kernels().index.take_back(<hb_index *>part.index, part.new_keys, part.n_new, part.is_new,
                                                  part.n_slots)
            free(p.scratch)
        if failed:
            raise MemoryError("no memory for the index of new rows")
        return made

    def stamp(self, list numbers, int64_t step):
        """`Metadata.stamp` of the tables of these numbers: each key's count is added."""
        cdef int64_t i
        cdef Metadata metadata
        cdef Part *part
        for i in range(self.p.n_parts):
            self.p.parts[i].stamped = False
        for i in numbers:
            part, metadata = &self.p.parts[i], self.tables[i][2]
            if not within(part.slots, part.u, metadata.n):
                _refuse("a slot is outside the metadata")
            metadata.stamped(step)
            part.pairs, part.stamped = metadata.at if metadata.kept else NULL, True
        self.p.step = step
        with nogil:
            self._pass(stamp_unit, self.p.n_keys, STAMP_NBYTES)

    cdef int _check(self, list arrays) except -1:
        """Whether arrays hold their features; `groups` are made of them but for where they lie."""
        cdef int64_t i
        cdef const float[:, ::1] array
        cdef const Place *place
        cdef const Part *part
        cdef Group *group
        if len(arrays) != self.p.n_groups:
            _refuse(f"{len(arrays)} arrays for {self.p.n_groups}")
        memset(self.p.groups, 0, self.p.n_groups * sizeof(Group))
        for i in range(self.p.n_features):
            place = &self.p.places[i]
            part, group, array = &self.p.parts[place.part], &self.p.groups[place.group], arrays[place.group]
            if array.shape[0] != part.n_rows or place.at + part.dim > array.shape[1] or group.dim not in (0, part.dim):
                _refuse(f"an array of shape {array.shape[0], array.shape[1]} for {part.n_rows} rows of {part.dim}")
            group.at, group.stride = <float *>&array[0, 0], array.shape[1]
            group.n_rows, group.dim = part.n_rows, part.dim
        return 0

    def gather(self, list outs, list rows=None):
        """Rows of all features into float32[n_rows, width] arrays, as `places` says; zeros where a key is absent.

        rows : list of float32[u, dim]
            For each table, those of its distinct keys, where they are given.
        """
        cdef int64_t i, group, n = 0
        cdef float[:, ::1] _out
        cdef const float[:, ::1] given
        cdef Slabs slabs
        cdef Part *part
        self._check(outs)
        for _out in outs:  # raises where one is not writable
            pass
        for i in range(self.p.n_parts):
            part = &self.p.parts[i]
            if part.index == NULL:
                given = rows[i]
                if given.shape[0] != part.u or given.shape[1] != part.dim:
                    _refuse(f"{given.shape[0]} rows for {part.u} keys")
                part.given = &given[0, 0]
                continue
            slabs = self.tables[i][1]
            if not within(part.slots, part.u, slabs.capacity):
                _refuse("a slot is outside the lines")
        with nogil:
            self._pass(locate_unit, self.p.n_keys, LOCATE_NBYTES)
            for group in range(self.p.n_groups):
                self.p.groups[group].first = n
                for i in range(self.p.n_features):
                    if self.p.places[i].group == group:
                        refer(&self.p, i, &self.p.features[n])
                        n += 1
                self.p.groups[group].n = n - self.p.groups[group].first
            self.p.n_units = pieces(self._nbytes())
            share(gather_unit, &self.p, self.p.n_units, self.p.n_seats)

    def sum(self, list grads):
        """Sum the gradients, of the shape of what `gather` gives, for each distinct key; for `apply` or `sums`.

        Returns
        -------
        bool
            Whether all of them are finite.

        Notes
        -----
        The additions are those of `hbkit._ext.segment.segment_sum`.
        """
        cdef int64_t i, total = 0
        cdef float[::1] sums
        cdef float *at
        cdef Part *part
        self._check(grads)
        for i in range(self.p.n_parts):
            total += room(&self.p.parts[i])
        sums = array = retained((total,))
        self.memory = *self.memory[:2], array
        at = &sums[0]
        for i in range(self.p.n_parts):
            part = &self.p.parts[i]
            part.sums = at
            at += room(part)
        self.p.failed = False
        with nogil:
            self._pass_of_rows(sum_unit)
        return not self.p.failed

    def sums(self):
        """What was summed: for each table float32[u, dim], of its distinct keys."""
        cdef int64_t i, at = 0
        cdef Part *part
        if len(self.memory) < 3:
            _refuse("gradients were not summed")
        array, found = self.memory[2], []
        for i in range(self.p.n_parts):
            part = &self.p.parts[i]
            if part.sums == NULL:
                _refuse("gradients were not summed")
            found.append(array[at:at + part.u * part.dim].reshape(part.u, part.dim))
            at += room(part)
        self.p.scratch = NULL
        self._finish()
        return found

    cdef _finish(self):
        cdef int64_t i
        with nogil:
            self._pass_of_rows(finish_unit)
        for i in range(self.p.n_parts):
            self.p.parts[i].sums = NULL

    def apply(self, list rules, list hypers, list seeds, int64_t step):
        """One optimizer step of every table by what was summed.

        Parameters
        ----------
        rules : list of int
        hypers : list of float32[12]
        seeds : list of int
            With step and key they decide how narrow rows round.

        Returns
        -------
        list of int
            Keys of each table that were absent and ignored.
        """
        cdef int64_t i, dim, most = 1
        cdef const float[::1] hyper
        cdef Slabs slabs
        cdef Part *part
        for i in range(self.p.n_parts):
            part, slabs, hyper = &self.p.parts[i], self.tables[i][1], hypers[i]
            dim = slabs.s.dim
            if not (part.sums != NULL and hyper.shape[0] == HB_HYPER and slabs.divided and
                    n_state(rules[i], dim, hyper[1] != 0) <= slabs.s.n_state):
                _refuse("gradients were not summed, or the rule needs more state")
            if not within(part.slots, part.u, slabs.capacity):
                _refuse("a slot is outside the lines")
            memset(&part.update, 0, sizeof(hb_update))
            part.rule = hb_part(rules[i], 0, dim, 0, &hyper[0])
            part.update.parts, part.update.n_parts, part.update.g.dim = &part.rule, 1, dim
            part.update.seed, part.update.step = seeds[i], <uint32_t>(<uint64_t>step)
            most = max(most, dim)
        self.p.scratch_nbytes = (<int64_t>HB_SCRATCH(most) + 63) // 64 * 64
        self.p.scratch = <char *>allocate(self.p.n_seats * self.p.scratch_nbytes)
        if self.p.scratch == NULL:
            raise MemoryError("no memory for an update")
        self._finish()
        free(self.p.scratch)
        return self.n_absent()
