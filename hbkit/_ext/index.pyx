"""Index: 64-bit key to slot, by open addressing with linear probing.

Two parallel arrays hold keys and slots; a slot of EMPTY marks a free entry, so every 64-bit key may be stored. At most
3/4 of the entries are taken. Growing rehashes into a table of twice the size before the old one is let go: a key is
never lost, and if memory runs out the index stays as it was. Erasing shifts later entries of the probe sequence back,
so there are no tombstones and a find never slows down with age. Slots of erased keys are handed out again, last first.

Batched calls hash and prefetch a group of keys before probing any: the cache misses of a group overlap.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

import numpy as np

from hbkit._ext.isa cimport hb_mix64

cdef extern from *:
    """
    #define HB_PREFETCH(p) __builtin_prefetch(p)
    """
    void HB_PREFETCH(const void *) nogil

cdef uint32_t EMPTY = 0xFFFFFFFF
cdef int64_t GROUP = 32
MAX_SLOTS = 0xFFFFFFFE


def vshard(const int64_t[::1] keys):
    """Virtual shard of each key, 0..1023: the top ten bits of its mix; int64[n]."""
    out = np.empty(keys.shape[0], np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t i
    with nogil:
        for i in range(keys.shape[0]):
            to[i] = <int64_t>(hb_mix64(<uint64_t>keys[i]) >> 54)
    return out


cdef int _allocate(uint64_t entries, uint64_t **keys, uint32_t **slots) noexcept nogil:
    keys[0] = <uint64_t *>malloc(entries * sizeof(uint64_t))
    slots[0] = <uint32_t *>malloc(entries * sizeof(uint32_t))
    if keys[0] == NULL or slots[0] == NULL:
        free(keys[0])
        free(slots[0])
        keys[0] = NULL
        slots[0] = NULL
        return -1
    memset(slots[0], 0xFF, entries * sizeof(uint32_t))
    return 0


cdef class Index:
    """Map from int64 keys (any bit pattern) to slots 0..n_slots-1.

    Parameters
    ----------
    capacity : int
        Keys to make room for at the start.

    Notes
    -----
    12 bytes an entry. Not safe to change from two threads at once; the GIL is released while a batch runs.
    """

    cdef uint64_t *keys
    cdef uint32_t *slots
    cdef uint64_t mask          # entries - 1
    cdef int64_t n              # keys held
    cdef int64_t next_slot      # slots ever handed out
    cdef uint32_t *free_slots   # erased slots, a stack
    cdef int64_t n_free, room_free

    def __cinit__(self, int64_t capacity=0):
        cdef uint64_t entries = 64
        while entries * 3 // 4 < <uint64_t>max(capacity, 0):
            entries *= 2
        if _allocate(entries, &self.keys, &self.slots) != 0:
            raise MemoryError(f"no memory for an index of {capacity} keys")
        self.mask = entries - 1

    def __dealloc__(self):
        free(self.keys)
        free(self.slots)
        free(self.free_slots)

    cdef inline uint64_t _probe(self, uint64_t key) noexcept nogil:
        """Entry that holds key, or the free entry where it belongs. A free entry always exists."""
        cdef uint64_t e = hb_mix64(key) & self.mask
        while self.slots[e] != EMPTY and self.keys[e] != key:
            e = (e + 1) & self.mask
        return e

    cdef int _grow(self, int64_t wanted) noexcept nogil:
        cdef uint64_t entries = self.mask + 1, e, f
        cdef uint64_t *keys
        cdef uint32_t *slots
        cdef uint64_t mask
        while <int64_t>(entries * 3 // 4) < wanted:
            entries *= 2
        if entries == self.mask + 1:
            return 0
        if _allocate(entries, &keys, &slots) != 0:
            return -1
        mask = entries - 1
        for e in range(self.mask + 1):
            if self.slots[e] != EMPTY:
                f = hb_mix64(self.keys[e]) & mask
                while slots[f] != EMPTY:
                    f = (f + 1) & mask
                keys[f] = self.keys[e]
                slots[f] = self.slots[e]
        free(self.keys)
        free(self.slots)
        self.keys, self.slots, self.mask = keys, slots, mask
        return 0

    def __len__(self):
        return self.n

    @property
    def n_slots(self):
        """One more than the largest slot ever handed out: int."""
        return self.next_slot

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return (self.mask + 1) * (sizeof(uint64_t) + sizeof(uint32_t)) + self.room_free * sizeof(uint32_t)

    def find(self, const int64_t[::1] keys):
        """Slot of each key, -1 where it is absent: int64[n]. Changes nothing."""
        cdef int64_t n = keys.shape[0], i, g, end
        cdef uint64_t e
        out = np.empty(n, np.int64)
        cdef int64_t[::1] to = out
        with nogil:
            g = 0
            while g < n:
                end = min(g + GROUP, n)
                for i in range(g, end):
                    e = hb_mix64(<uint64_t>keys[i]) & self.mask
                    HB_PREFETCH(&self.keys[e])
                    HB_PREFETCH(&self.slots[e])
                for i in range(g, end):
                    e = self._probe(<uint64_t>keys[i])
                    to[i] = -1 if self.slots[e] == EMPTY else <int64_t>self.slots[e]
                g = end
        return out

    def find_or_insert(self, const int64_t[::1] keys):
        """Slot of each key, inserting the absent ones.

        Returns
        -------
        slots : int64[n]
        is_new : bool[n]
            True at the first occurrence of a key that was absent.

        Raises
        ------
        MemoryError
            No room to grow, or 2**32 - 2 slots are taken. Keys before the one that failed stay inserted only if the
            whole batch fitted: room is made first, so the index is then as it was.
        """
        cdef int64_t n = keys.shape[0], i, g, end, fresh = 0
        cdef uint64_t e
        cdef int failed = 0
        slots, is_new = np.empty(n, np.int64), np.zeros(n, np.bool_)
        cdef int64_t[::1] to = slots
        cdef uint8_t[::1] new = is_new.view(np.uint8)
        with nogil:
            # How many are absent is known only after probing, and growing for n would waste memory on a batch of old
            # keys; so probe first when the batch might not fit.
            if <uint64_t>(self.n + n) > (self.mask + 1) * 3 // 4:
                for i in range(n):
                    if self.slots[self._probe(<uint64_t>keys[i])] == EMPTY:
                        fresh += 1
                failed = self._grow(self.n + fresh)
            if self.next_slot + n > <int64_t>EMPTY:
                failed = -1
            g = 0
            while g < n and not failed:
                end = min(g + GROUP, n)
                for i in range(g, end):
                    e = hb_mix64(<uint64_t>keys[i]) & self.mask
                    HB_PREFETCH(&self.keys[e])
                    HB_PREFETCH(&self.slots[e])
                for i in range(g, end):
                    e = self._probe(<uint64_t>keys[i])
                    if self.slots[e] == EMPTY:
                        self.keys[e] = <uint64_t>keys[i]
                        if self.n_free > 0:
                            self.n_free -= 1
                            self.slots[e] = self.free_slots[self.n_free]
                        else:
                            self.slots[e] = <uint32_t>self.next_slot
                            self.next_slot += 1
                        self.n += 1
                        new[i] = 1
                    to[i] = <int64_t>self.slots[e]
                g = end
        if failed:
            raise MemoryError(f"the index of {self.n} keys cannot take {n} more")
        return slots, is_new

    def erase(self, const int64_t[::1] keys):
        """Remove keys; absent ones are left out.

        Returns
        -------
        slots : int64[n]
            The slot that each key held, -1 where it was absent (or repeated). They will be handed out again.
        """
        cdef int64_t n = keys.shape[0], i
        cdef uint64_t e, hole, home
        cdef uint32_t *grown
        out = np.empty(n, np.int64)
        cdef int64_t[::1] to = out
        if self.n_free + n > self.room_free:
            grown = <uint32_t *>realloc(self.free_slots, (self.n_free + n) * sizeof(uint32_t))
            if grown == NULL:
                raise MemoryError(f"no memory to erase {n} keys")
            self.free_slots = grown
            self.room_free = self.n_free + n
        with nogil:
            for i in range(n):
                e = self._probe(<uint64_t>keys[i])
                if self.slots[e] == EMPTY:
                    to[i] = -1
                    continue
                to[i] = <int64_t>self.slots[e]
                self.free_slots[self.n_free] = self.slots[e]
                self.n_free += 1
                self.n -= 1
                hole = e
                e = (e + 1) & self.mask
                while self.slots[e] != EMPTY:
                    home = hb_mix64(self.keys[e]) & self.mask
                    # An entry may fill the hole if its probe sequence passes it: home is not in (hole, e].
                    if ((e - home) & self.mask) >= ((e - hole) & self.mask):
                        self.keys[hole] = self.keys[e]
                        self.slots[hole] = self.slots[e]
                        hole = e
                    e = (e + 1) & self.mask
                self.slots[hole] = EMPTY
        return out

    def items(self):
        """All keys and their slots, in slot order: (int64[n], int64[n])."""
        keys, slots = np.empty(self.n, np.int64), np.empty(self.n, np.int64)
        cdef int64_t[::1] k = keys, s = slots
        cdef int64_t i = 0
        cdef uint64_t e
        with nogil:
            for e in range(self.mask + 1):
                if self.slots[e] != EMPTY:
                    k[i] = <int64_t>self.keys[e]
                    s[i] = <int64_t>self.slots[e]
                    i += 1
        order = np.argsort(slots)
        return keys[order], slots[order]

    def validate(self):
        """Recount everything; AssertionError where the structure contradicts itself. For tests."""
        cdef uint64_t e
        cdef int64_t count = 0
        seen = set()
        for e in range(self.mask + 1):
            if self.slots[e] != EMPTY:
                count += 1
                assert self._probe(self.keys[e]) == e, "a key cannot be found from its home"
                assert self.slots[e] < <uint64_t>self.next_slot, "a slot was never handed out"
                seen.add(self.slots[e])
        free_ = {self.free_slots[i] for i in range(self.n_free)}
        assert count == self.n == len(seen), "the count of keys is wrong or a slot is held twice"
        assert len(free_) == self.n_free and not (free_ & seen), "a slot is both free and held"
        assert self.n + self.n_free == self.next_slot, "a slot leaked"
        assert <uint64_t>self.n <= (self.mask + 1) * 3 // 4, "overfull"


def dedupe(const int64_t[::1] keys):
    """Distinct keys in the order of their first appearance, and where each key went.

    Returns
    -------
    unique : int64[u]
    inverse : int64[n]
        ``unique[inverse] == keys``.
    counts : int64[u]
    """
    cdef Index index = Index(min(keys.shape[0], 1 << 16))
    inverse, is_new = index.find_or_insert(keys)
    unique = np.asarray(keys)[is_new]
    counts = np.zeros(unique.shape[0], np.int64)
    cdef int64_t[::1] c = counts, inv = inverse
    cdef int64_t i
    with nogil:
        for i in range(inv.shape[0]):
            c[inv[i]] += 1
    return unique, inverse, counts
