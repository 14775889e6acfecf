"""Together: one batch of several tables in host memory. Each pass over it is one call for all of them.

What a table costs beside its keys is then some pointers, not a dozen calls, and the GIL is let go of once a pass. Rows
and gradients of features that stand side by side are gone through row by row: what is long lies in order, and what is
gone through at random, rows and sums of the keys that a batch has many times, stays in the cache.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import numpy as np

from hbkit._ext.isa cimport (HB_HYPER, HB_SCRATCH, hb_feature, hb_fp_enter, hb_fp_leave, hb_fp_state, hb_index, hb_part,
                             hb_slabs, hb_update, kernels)
from hbkit._ext.segment import retained
from hbkit._ext.slabs import n_state

from hbkit._ext.index cimport Index
from hbkit._ext.metadata cimport Metadata, Pair, stamp
from hbkit._ext.pool cimport allocate, fails
from hbkit._ext.segment cimport in_range
from hbkit._ext.slabs cimport Lines, New, Slabs, begin, tile
from hbkit.errors import InvalidArgument

cdef int64_t MOST = 0x7FFFFFFF  # keys of a table

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
    int64_t n_features
    float *sums
    # During a pass:
    hb_slabs *slabs
    Pair *pairs
    bint stamped
    const New *new
    int64_t n_new, n_slots
    int64_t *new_keys
    int64_t *new_slots
    uint8_t *is_new
    hb_part rule
    hb_update update


cdef struct Place:  # of a feature, in the order of tables
    int64_t part, number  # table, and which of its features
    int64_t group, at  # array that its rows stand in, and its place there, in floats


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


cdef int insert(Part *part) noexcept nogil:
    """Put the absent keys into the index; not 0 without memory, and then it is as it was."""
    cdef int64_t k, n = 0
    for k in range(part.u):
        if part.slots[k] < 0:
            part.new_keys[n] = part.unique[k]
            n += 1
    return kernels().index.insert(<hb_index *>part.index, part.new_keys, n, part.new_slots, part.is_new)


cdef void taken(Part *part) noexcept nogil:
    """Slots of the keys that were absent are those of the new rows, which nobody has used yet."""
    cdef int64_t k, n = 0
    for k in range(part.u):
        if part.slots[k] < 0:
            part.slots[k] = part.new_slots[n]
            n += 1
            if part.pairs != NULL:
                part.pairs[part.slots[k]] = Pair(0, 0)


cdef int64_t room(const Part *part) noexcept nogil:
    """Floats of sums[u, dim], blocks[u, dim], seen[u]."""
    return odd(part.u * (2 * part.dim + 1), 16)


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

    cdef Part *parts
    cdef Place *places
    cdef hb_feature *features
    cdef int64_t n_parts, n_features, n_groups
    cdef int64_t dim, n_rows  # of `features`
    cdef list tables
    cdef object memory, given
    cdef readonly list keys, counts, slots

    def __cinit__(self, list tables, list keys, list places, list n_rows, list stands=None):
        cdef int64_t i, k, n, f = 0, total = 0, most = 0, n_wide = 0, n_narrow = 0, columns = 4 + (stands is not None)
        cdef int bits = 6
        cdef const int64_t[::1] some
        cdef Index index
        cdef Slabs slabs
        cdef Part *part
        self.tables, self.given, self.n_parts = tables, (keys, stands), len(tables)
        self.n_features = len(places)
        self.parts = NULL if fails() else <Part *>calloc(self.n_parts + 1, sizeof(Part))
        self.places = NULL if fails() else <Place *>calloc(self.n_features + 1, sizeof(Place))
        self.features = NULL if fails() else <hb_feature *>calloc(self.n_features + 1, sizeof(hb_feature))
        if self.parts == NULL or self.places == NULL or self.features == NULL:
            raise MemoryError("no memory for a batch")
        if not len(keys) == len(n_rows) == self.n_parts or len(keys if stands is None else stands) != self.n_parts:
            _refuse(f"{len(keys)} arrays for {self.n_parts} tables")
        for i in range(self.n_parts):
            part, some = &self.parts[i], keys[i]
            n, part.n_rows = some.shape[0], n_rows[i]
            if part.n_rows < 1 or n == 0 or n % part.n_rows or n >= MOST or f + n // part.n_rows > self.n_features:
                _refuse(f"{n} keys in {part.n_rows} rows")
            part.n, part.n_features, part.keys = n, n // part.n_rows, &some[0]
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
                self.places[f] = Place(i, k, group, at)
                self.n_groups = max(self.n_groups, self.places[f].group + 1)
                f += 1
        if f != self.n_features:
            _refuse(f"{self.n_features} places for {f} features")
        while bits < 32 and (<int64_t>1 << bits) < 6 * most:
            bits += 1
        # For each table unique[n + 1], counts[n], slots[n], rows[n], the first without meaning, and totals[n] where
        # keys stand for some number; and inverse[n].
        for i in range(self.n_parts):
            n_wide += odd(columns * self.parts[i].n + 1, 8)
            n_narrow += odd(self.parts[i].n, 16)
        wide, narrow = retained((n_wide,), np.int64), retained((n_narrow,), np.int32)
        self.memory = wide, narrow
        self._find(wide, narrow, retained((1 << bits,), np.uint32), bits)
        self.keys, self.counts, self.slots = [], [], []
        k = 1
        for i in range(self.n_parts):
            n, total = self.parts[i].n, self.parts[i].u
            self.keys.append(wide[k:k + total])
            self.counts.append(wide[k + (n if stands is None else 4 * n):][:total])
            self.slots.append(wide[k + 2 * n:k + 2 * n + total])
            k += odd(columns * n + 1, 8)

    cdef _find(self, int64_t[::1] wide, int32_t[::1] narrow, uint32_t[::1] table, int bits):
        cdef int64_t i, k
        cdef int64_t *at = &wide[0]
        cdef int32_t *inverse = &narrow[0]
        cdef Part *part
        with nogil:
            for i in range(self.n_parts):
                part = &self.parts[i]
                part.unique, part.counts, part.slots = at + 1, at + 1 + part.n, at + 1 + 2 * part.n
                part.rows, part.inverse = <const float **>(at + 1 + 3 * part.n), inverse
                part.totals = part.counts if part.stands == NULL else at + 1 + 4 * part.n
                at += odd((4 + (part.stands != NULL)) * part.n + 1, 8)
                inverse += odd(part.n, 16)
                part.u = kernels().index.dedupe(part.keys, part.n, &table[0], bits, part.unique - 1, part.inverse, 0,
                                                part.counts)
                if part.index != NULL:
                    kernels().index.find(part.index, part.unique, part.u, part.slots)
                else:
                    memset(part.slots, 0xFF, part.u * sizeof(int64_t))
                if part.stands != NULL:
                    memset(part.totals, 0, part.u * sizeof(int64_t))
                    for k in range(part.n):
                        part.totals[part.inverse[k]] += part.stands[k]

    def __dealloc__(self):
        free(self.parts)
        free(self.places)
        free(self.features)

    def inverse(self, int64_t number):
        """Which of the distinct keys each key of a table is: int64[n]."""
        cdef Part *part = self._part(number)
        return np.array(<int32_t[:part.n]>part.inverse, np.int64)

    cdef Part *_part(self, int64_t number) except NULL:
        if not 0 <= number < self.n_parts:
            _refuse(f"table {number} of {self.n_parts}")
        return &self.parts[number]

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
        for i in range(self.n_parts):
            n = 0
            for k in range(self.parts[i].u):
                n += self.parts[i].slots[k] < 0
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
        cdef int64_t i, total = 0, most = 0, n_made = 0, n = len(numbers), at = 0
        cdef int failed = 0
        cdef Index index
        cdef Slabs slabs
        cdef Metadata metadata
        cdef Lines lines
        cdef Part *part
        cdef int64_t[::1] wide
        cdef uint8_t[::1] narrow
        cdef int64_t *slots
        cdef int64_t *which
        cdef uint8_t *fresh
        cdef float *scratch
        cdef hb_fp_state fp
        n_absent = self.n_absent()
        for i in numbers:
            total += <int64_t>n_absent[i]
        if total == 0:
            return [np.empty(0, np.int64) for _ in numbers]
        wide = array = retained((2 * total + n,), np.int64)  # slots, keys; numbers
        narrow = retained((total,), np.uint8)
        slots, which, fresh = &wide[0], &wide[2 * total], &narrow[0]
        made = []
        for i in numbers:
            index, slabs, metadata, lines = self.tables[i]
            part = &self.parts[i]
            part.n_new, part.n_slots = n_absent[i], index.index.next_slot
            if lines is None or part.n_slots + part.n_new > min(<int64_t>slabs.capacity, metadata.n):
                _refuse("a table has no room for new rows, or does not say how they begin")
            part.new, part.pairs = &lines.lines, metadata.at if metadata.kept else NULL
            part.new_slots, part.new_keys, part.is_new = slots + at, slots + total + at, fresh + at  # maybe none
            made.append(array[at:at + part.n_new])
            most, at = max(most, tile(&slabs.s)), at + part.n_new
            which[n_made] = i
            n_made += 1
        scratch = <float *>allocate(most * sizeof(float))
        if scratch == NULL:
            raise MemoryError("no memory for new rows")
        n_made = 0
        with nogil:
            fp = hb_fp_enter()
            while n_made < n and not failed:
                part = &self.parts[which[n_made]]
                failed = part.n_new and insert(part)
                n_made += not failed
            for i in range(n_made):
                part = &self.parts[which[i]]
                if failed:
                    kernels().index.take_back(<hb_index *>part.index, part.new_keys, part.n_new, part.is_new,
                                              part.n_slots)
                elif part.n_new:
                    begin(part.new, part.slabs, part.new_slots, part.new_keys, part.n_new, scratch)
                    taken(part)
            hb_fp_leave(fp)
            free(scratch)
        if failed:
            raise MemoryError("no memory for the index of new rows")
        return made

    def stamp(self, list numbers, int64_t step):
        """`Metadata.stamp` of the tables of these numbers: each key's count is added."""
        cdef int64_t i, k
        cdef Metadata metadata
        cdef Part *part
        for i in numbers:
            part, metadata = &self.parts[i], self.tables[i][2]
            if not within(part.slots, part.u, metadata.n):
                _refuse("a slot is outside the metadata")
            metadata.stamped(step)
            part.pairs, part.stamped = metadata.at if metadata.kept else NULL, True
        with nogil:
            for k in range(self.n_parts):
                part = &self.parts[k]
                if part.stamped:
                    stamp(part.pairs, part.slots, part.u, step, part.totals)
                part.stamped = False

    cdef int64_t _dim(self, int64_t feature) noexcept nogil:
        return self.parts[self.places[feature].part].dim

    cdef int64_t _round(self, int64_t group, int64_t number) noexcept nogil:
        """Make `features` of an array's: those that are their table's feature of that number, or all where it is -1."""
        cdef int64_t i, n = 0
        cdef Place *place
        cdef Part *part
        for i in range(self.n_features):
            place = &self.places[i]
            part = &self.parts[place.part]
            if place.group == group and (number < 0 or place.number == number):
                self.n_rows, self.dim = part.n_rows, part.dim
                self.features[n].at, self.features[n].inverse = place.at, part.inverse + place.number * part.n_rows
                self.features[n].rows = part.rows
                self.features[n].sums, self.features[n].blocks = part.sums, part.sums + part.u * part.dim
                self.features[n].seen = <int32_t *>(part.sums + 2 * part.u * part.dim)
                n += 1
        return n

    cdef int _check(self, list arrays) except -1:
        """Whether arrays hold their features."""
        cdef int64_t i
        cdef const float[:, ::1] array
        cdef list dims = [-1] * self.n_groups
        if len(arrays) != self.n_groups:
            _refuse(f"{len(arrays)} arrays for {self.n_groups}")
        for i in range(self.n_features):
            array = arrays[self.places[i].group]
            dim, known = self._dim(i), dims[self.places[i].group]
            n_rows = self.parts[self.places[i].part].n_rows
            if array.shape[0] != n_rows or self.places[i].at + dim > array.shape[1] or known not in (-1, dim):
                _refuse(f"an array of shape {array.shape[0], array.shape[1]} for {n_rows} rows of {dim}")
            dims[self.places[i].group] = dim
        return 0

    def gather(self, list outs, list rows=None):
        """Rows of all features into float32[n_rows, width] arrays, as `places` says; zeros where a key is absent.

        rows : list of float32[u, dim]
            For each table, those of its distinct keys, where they are given.
        """
        cdef int64_t i, k, group, n
        cdef float[:, ::1] out
        cdef const float[:, ::1] given
        cdef Slabs slabs
        cdef hb_fp_state fp
        self._check(outs)
        for i in range(self.n_parts):
            if self.parts[i].index == NULL:
                given = rows[i]
                if given.shape[0] != self.parts[i].u or given.shape[1] != self.parts[i].dim:
                    _refuse(f"{given.shape[0]} rows for {self.parts[i].u} keys")
                for k in range(self.parts[i].u):
                    self.parts[i].rows[k] = &given[k, 0]
                continue
            slabs = self.tables[i][1]
            if not within(self.parts[i].slots, self.parts[i].u, slabs.capacity):
                _refuse("a slot is outside the lines")
            kernels().locate(self.parts[i].slabs, self.parts[i].slots, self.parts[i].u, self.parts[i].rows)
        for group in range(self.n_groups):
            out = outs[group]
            with nogil:
                n = self._round(group, -1)
                fp = hb_fp_enter()
                if n:
                    kernels().gather_together(self.features, n, self.n_rows, self.dim, &out[0, 0], out.shape[1])
                hb_fp_leave(fp)

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
        cdef int64_t i, group, number, n, total = 0, most = 1
        cdef int finite = 1
        cdef const float[:, ::1] values
        cdef float[::1] sums
        cdef float *at
        cdef Part *part
        cdef hb_fp_state fp
        self._check(grads)
        for i in range(self.n_parts):
            total += room(&self.parts[i])
            most = max(most, self.parts[i].n_features)
        sums = array = retained((total,))
        self.memory = *self.memory[:2], array
        at = &sums[0]
        for i in range(self.n_parts):
            part = &self.parts[i]
            part.sums = at
            memset(at + 2 * part.u * part.dim, 0, part.u * sizeof(int32_t))
            at += room(part)
        for number in range(most):  # a table's features one after the other: this is the batch's order
            for group in range(self.n_groups):
                values = grads[group]
                with nogil:
                    n = self._round(group, number)
                    fp = hb_fp_enter()
                    if n:
                        finite &= kernels().sum_together(self.features, n, self.n_rows, self.dim, &values[0, 0],
                                                         values.shape[1])
                    hb_fp_leave(fp)
        return bool(finite)

    def sums(self):
        """What was summed: for each table float32[u, dim], of its distinct keys."""
        cdef int64_t i, at = 0
        cdef Part *part
        cdef hb_feature feature
        cdef hb_fp_state fp
        memset(&feature, 0, sizeof(hb_feature))
        if len(self.memory) < 3:
            _refuse("gradients were not summed")
        array, found = self.memory[2], []
        for i in range(self.n_parts):
            part = &self.parts[i]
            if part.sums == NULL:
                _refuse("gradients were not summed")
            feature.sums, feature.blocks = part.sums, part.sums + part.u * part.dim
            with nogil:
                fp = hb_fp_enter()
                kernels().finish_sums(&feature, part.counts, part.u, part.dim)
                hb_fp_leave(fp)
            part.sums = NULL
            found.append(array[at:at + part.u * part.dim].reshape(part.u, part.dim))
            at += room(part)
        return found

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
        cdef hb_feature feature
        cdef void *scratch = NULL
        cdef hb_fp_state fp
        memset(&feature, 0, sizeof(hb_feature))
        for i in range(self.n_parts):
            part, slabs, hyper = &self.parts[i], self.tables[i][1], hypers[i]
            dim = slabs.s.dim
            if not (part.sums != NULL and hyper.shape[0] == HB_HYPER and slabs.divided and
                    n_state(rules[i], dim, hyper[1] != 0) <= slabs.s.n_state):
                _refuse("gradients were not summed, or the rule needs more state")
            if not within(part.slots, part.u, slabs.capacity):
                _refuse("a slot is outside the lines")
            memset(&part.update, 0, sizeof(hb_update))
            part.rule = hb_part(rules[i], 0, dim, 0, &hyper[0])
            part.update.slots, part.update.keys = part.slots, part.unique
            part.update.parts, part.update.n_parts = &part.rule, 1
            part.update.g.values, part.update.g.dim, part.update.g.n_segments = part.sums, dim, part.u
            part.update.seed, part.update.step = seeds[i], <uint32_t>(<uint64_t>step)
            most = max(most, dim)
        scratch = allocate(HB_SCRATCH(most))
        if scratch == NULL:
            raise MemoryError("no memory for an update")
        with nogil:
            fp = hb_fp_enter()
            for i in range(self.n_parts):
                part = &self.parts[i]
                dim = part.slabs.dim
                part.update.scratch = scratch
                feature.sums, feature.blocks = part.sums, part.sums + part.u * dim
                kernels().finish_sums(&feature, part.counts, part.u, dim)
                kernels().apply(part.slabs, &part.update)
                part.sums = NULL
            hb_fp_leave(fp)
            free(scratch)
        return self.n_absent()
