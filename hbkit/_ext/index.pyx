"""Index: 64-bit key to slot, and dedupe. The structures are in index_kernel.c and dedupe_kernel.c.

Arrays that are returned come from the shared pool: touching fresh memory would cost more than the search.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

import numpy as np

from hbkit._ext import pool
from hbkit._ext.isa cimport HB_PAGE, hb_index, hb_mix64, kernels
from hbkit._ext.pool cimport countdown
from hbkit._ext.share cimport pieces, seats, share
from hbkit.errors import InvalidArgument

MAX_SLOTS = 0xFFFFFFFE
cdef int64_t NBYTES = 64  # what a key that is looked for costs: a cache line

cdef struct Finding:
    const hb_index *index
    const int64_t *keys
    int64_t *slots
    int64_t n, n_units


cdef void find_unit(void *what, int64_t unit, int64_t seat) noexcept nogil:
    cdef Finding *f = <Finding *>what
    cdef int64_t first = f.n * unit // f.n_units, last = f.n * (unit + 1) // f.n_units
    kernels().index.find(f.index, f.keys + first, last - first, f.slots + first)


cdef _take(int64_t n, dtype):
    """An array of n elements from the shared pool, of any content."""
    if n == 0:
        return np.empty(0, dtype)
    return np.frombuffer(pool.shared.take(n * np.dtype(dtype).itemsize), dtype)


cdef _out(array, int64_t n, dtype):
    """`array` if it can hold the result, a new one if it is None."""
    if array is None:
        return _take(n, dtype)
    if array.dtype != dtype or array.shape != (n,) or not array.flags.c_contiguous or not array.flags.writeable:
        raise InvalidArgument(f"out cannot take {n} values of {np.dtype(dtype)}",
                              remedy="give a writable, contiguous array of that size and dtype")
    return array


cdef int64_t *_int64s(int64_t[::1] array) noexcept:
    return &array[0] if array.shape[0] else NULL


def vshard(const int64_t[::1] keys):
    """Virtual shard of each key, 0..1023: the top ten bits of its mix; int64[n]."""
    out = _take(keys.shape[0], np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t i
    with nogil:
        for i in range(keys.shape[0]):
            to[i] = <int64_t>(hb_mix64(<uint64_t>keys[i]) >> 54)
    return out


def partition(const int64_t[::1] keys, int64_t n_ranks):
    """A stable counting sort of keys by the rank that owns them: (order, place: int64[n], counts: int64[n_ranks]).

    ``keys[order]`` are in the order of the ranks, and key i is at ``place[i]`` there.
    """
    cdef int64_t n = keys.shape[0], i, r, sum = 0
    if not 1 <= n_ranks <= 1024:
        raise InvalidArgument(f"{n_ranks} ranks", remedy="use 1 to 1024")
    out, where, counted = _take(n, np.int64), _take(n, np.int64), np.zeros(n_ranks, np.int64)
    ends = np.empty(n_ranks, np.int64)
    cdef int64_t[::1] order = out, place = where, counts = counted, at = ends
    with nogil:
        for i in range(n):
            r = <int64_t>((hb_mix64(<uint64_t>keys[i]) >> 54) * <uint64_t>n_ranks >> 10)
            place[i] = r
            counts[r] += 1
        for r in range(n_ranks):
            at[r] = sum
            sum += counts[r]
        for i in range(n):
            r = place[i]
            place[i] = at[r]
            order[at[r]] = i
            at[r] += 1
    return out, where, counted


cdef class Index:
    """Map from int64 keys (any bit pattern) to slots 0..n_slots-1.

    Parameters
    ----------
    capacity : int
        Keys to make room for at the start, at load 0.8 or a little less.

    Notes
    -----
    About 16 to 20 bytes a key; fewer than 24 at any moment above a million keys. Grows and shrinks in steps of some
    hundred KiB. Safe to use from any thread: calls that find run side by side, those that change the index run alone,
    and the GIL is released meanwhile. Slots do not depend on the instruction set.
    """

    def __cinit__(self, int64_t capacity=0):
        memset(&self.index, 0, sizeof(hb_index))
        self.index.countdown = countdown()
        if kernels().index.create(&self.index, max(capacity, 0)) != 0:
            raise MemoryError(f"no memory for an index of {capacity} keys")

    def __dealloc__(self):
        kernels().index.destroy(&self.index)

    def __len__(self):
        return self.index.n

    @property
    def n_slots(self):
        """One more than the largest slot ever handed out: int."""
        return self.index.next_slot

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.index.nbytes + <int64_t>sizeof(hb_index)

    def find(self, const int64_t[::1] keys, out=None):
        """Slot of each key, -1 where it is absent: int64[n]. Changes nothing.

        Parameters
        ----------
        keys : int64[n]
        out : int64[n], optional
            Where to write the slots.
        """
        cdef int64_t n = keys.shape[0]
        out = _out(out, n, np.int64)
        cdef Finding f
        f.index, f.slots, f.n, f.n_units = &self.index, _int64s(out), n, pieces(n * NBYTES)
        if n:
            f.keys = &keys[0]
            with nogil:
                share(find_unit, &f, f.n_units, seats(f.n_units))
        return out

    def find_or_insert(self, const int64_t[::1] keys, out=None, is_new=None):
        """Slot of each key, inserting the absent ones.

        Parameters
        ----------
        keys : int64[n]
        out : int64[n], optional
            Where to write the slots.
        is_new : bool[n], optional
            Where to write the other result.

        Returns
        -------
        slots : int64[n]
            New keys take the least slot of an erased key, else the next one, in the order of the batch.
        is_new : bool[n]
            True at the first occurrence of a key that was absent.

        Raises
        ------
        MemoryError
            No room to grow, or `MAX_SLOTS` slots are taken. The index holds what it held before.
        """
        cdef int64_t n = keys.shape[0]
        cdef int failed = 0
        out, is_new = _out(out, n, np.int64), _out(is_new, n, np.bool_)
        cdef int64_t *to = _int64s(out)
        cdef uint8_t[::1] new = is_new.view(np.uint8)
        if n:
            with nogil:
                failed = kernels().index.insert(&self.index, &keys[0], n, to, &new[0])
        if failed:
            raise MemoryError(f"the index of {self.index.n} keys cannot take {n} more")
        return out, is_new

    def take_back(self, const int64_t[::1] keys, is_new, int64_t n_slots):
        """Undo the last `find_or_insert`, if nothing was erased since. It needs no memory, so it never fails.

        Parameters
        ----------
        keys : int64[n]
            What was inserted.
        is_new : bool[n]
            What the insert gave.
        n_slots : int
            `n_slots` before the insert.
        """
        cdef const uint8_t[::1] new = is_new.view(np.uint8)
        if new.shape[0] != keys.shape[0]:
            raise InvalidArgument(f"{new.shape[0]} marks for {keys.shape[0]} keys", remedy="give those of the insert")
        if keys.shape[0]:
            with nogil:
                kernels().index.take_back(&self.index, &keys[0], keys.shape[0], &new[0], n_slots)

    def erase(self, const int64_t[::1] keys, out=None):
        """Remove keys; absent ones are left out.

        Parameters
        ----------
        keys : int64[n]
        out : int64[n], optional
            Where to write the slots.

        Returns
        -------
        slots : int64[n]
            The slot that each key held, -1 where it was absent (or repeated). They will be handed out again.

        Raises
        ------
        MemoryError
            No room to note the free slots. Nothing is erased.
        """
        cdef int64_t n = keys.shape[0]
        cdef int failed = 0
        out = _out(out, n, np.int64)
        cdef int64_t *to = _int64s(out)
        if n:
            with nogil:
                failed = kernels().index.erase(&self.index, &keys[0], n, to)
        if failed:
            raise MemoryError(f"no memory to erase {n} keys")
        return out

    def items(self):
        """All keys and their slots, in slot order: (int64[n], int64[n])."""
        cdef int64_t room = -1, n = self.index.n
        cdef int64_t *k
        cdef int64_t *s
        while n > room:  # another thread may insert meanwhile
            room = n
            keys, slots = np.empty(room, np.int64), np.empty(room, np.int64)
            k, s = _int64s(keys), _int64s(slots)
            with nogil:
                n = kernels().index.items(&self.index, room, k, s)
        keys, slots = keys[:n], slots[:n]
        # By slot, without sorting: every slot is held once at the most.
        n_slots = int(slots.max()) + 1 if n else 0
        by_slot, held = np.empty(n_slots, np.int64), np.zeros(n_slots, np.bool_)
        by_slot[slots], held[slots] = keys, True
        return by_slot[held], np.flatnonzero(held)

    def part(self, uint64_t first, uint64_t last, const uint64_t[::1] bits=None):
        """Keys whose mix lies in ``[first, last]``, in no order that matters: int64[m].

        With `bits`, only those whose slot has its bit set; see `hbkit._ext.batch.set_bits`. Passes over the shards of
        that range alone: about m keys, and at most two shards more.
        """
        cdef int64_t room = -1, n_bits = 0
        cdef int64_t n = <int64_t>(1.05 * self.index.n * (<double>(last - first) / 2.0**64)) + 64
        cdef int64_t *k
        cdef const uint64_t *b = NULL
        if bits is not None:
            if bits.shape[0] == 0:
                return np.empty(0, np.int64)
            b, n_bits = &bits[0], 64 * bits.shape[0]
        while n > room:  # the first room is a guess: mixes are spread evenly
            room = n
            keys = np.empty(room, np.int64)
            k = _int64s(keys)
            with nogil:
                n = kernels().index.part(&self.index, first, last, b, n_bits, room, k)
        return keys[:n]

    def validate(self):
        """Recount everything; AssertionError where the structure contradicts itself. For tests."""
        cdef const char *wrong
        cdef const int64_t[::1] held
        cdef const uint64_t *page
        cdef int64_t slot
        with nogil:
            wrong = kernels().index.validate(&self.index)
        assert wrong == NULL, wrong.decode()
        held = slots = self.items()[1]
        assert len(slots) == self.index.n, "a slot is held twice"
        assert slots.max(initial=-1) < self.index.next_slot, "a slot was never handed out"
        for slot in held:
            page = self.index.free_bits[slot // HB_PAGE] if slot // HB_PAGE < self.index.room_pages else NULL
            assert page == NULL or not page[slot % HB_PAGE // 64] >> (slot % 64) & 1, "a slot is both free and held"


def dedupe(const int64_t[::1] keys, inverse="int64", counts=True):
    """Distinct keys in the order of their first appearance, and where each key went.

    Parameters
    ----------
    keys : int64[n], n < 2**31
    inverse : str
        Type of the inverse, "int64" or "int32".
    counts : bool
        Whether to count; about a tenth of the time.

    Returns
    -------
    unique : int64[u]
    inverse : int64[n] or int32[n]
        ``unique[inverse] == keys``.
    counts : int64[u] or None
    """
    cdef int64_t n = keys.shape[0], n_unique = 0
    cdef int bits = 6, wide = inverse == "int64"
    cdef uint32_t[::1] table
    cdef int64_t[::1] unique, count
    cdef int64_t *counted = NULL
    cdef uint8_t[::1] went
    if inverse not in ("int64", "int32") or n >= 1 << 31:
        raise InvalidArgument(f"cannot dedupe {n} keys with an inverse of {inverse!r}",
                              remedy="give fewer than 2**31 keys and 'int64' or 'int32'")
    if n == 0:
        return np.empty(0, np.int64), np.empty(0, inverse), np.empty(0, np.int64) if counts else None
    while bits < 32 and (<int64_t>1 << bits) < 6 * n:
        bits += 1
    unique = distinct = _take(n + 1, np.int64)
    table = _take(<int64_t>1 << bits, np.uint32)
    where = _take(n, np.dtype(inverse))
    went = where.view(np.uint8)
    if counts:
        count = n_each = _take(n, np.int64)
        counted = &count[0]
    with nogil:
        n_unique = kernels().index.dedupe(&keys[0], n, &table[0], bits, &unique[0], &went[0], wide, counted)
    return distinct[1:n_unique + 1], where, n_each[:n_unique] if counts else None
