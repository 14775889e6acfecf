"""Bookkeeping of near lines: which are worth least, how often keys were asked for, and when they are needed next.

The arrays belong to `hbkit.store.cache.Cache`, which proves that lines lie within them.
"""

from libc.math cimport INFINITY, sqrt
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove

import numpy as np

from hbkit._ext.isa cimport hb_mix64
from hbkit._ext.index import Index
from hbkit.errors import InvalidArgument

cdef extern from "<math.h>" nogil:
    float exp2f(float)
    float log1pf(float)

cdef extern from *:
    """
    #define HB_PREFETCH(p) __builtin_prefetch(p, 1)
    """
    void HB_PREFETCH(const void *) nogil

NEVER = INT64_MAX
FREE, USED, QUEUED = 0, 1, 3  # states of a line; one that is queued is to be a victim unless somebody asks for it

cdef enum:
    USED_ = 1
    QUEUED_ = 3
    AHEAD = 12  # keys whose memory is asked for before their turn
    SAMPLE = 2048
    SMALL = 256  # lines of a miniature,
    REMEMBERED = 5  # keys it knows, a line,
    EPOCH = 2  # and accesses a line after which the best is chosen


cdef double CLEARLY = 1.003


cdef inline uint64_t _mix(int64_t key) noexcept nogil:
    """Bits of a key of which any are good: the leading ones of its mix alone are alike in all keys of a rank."""
    return hb_mix64(<uint64_t>key) * <uint64_t>0x9E3779B97F4A7C15


# --- the least of many ------------------------------------------------------------------------------------------

ctypedef struct Entry:
    double worth
    int64_t line


cdef inline bint _before(Entry a, Entry b) noexcept nogil:
    return a.worth < b.worth or (a.worth == b.worth and a.line < b.line)


cdef inline Entry _median(const Entry *at, int64_t low, int64_t high) noexcept nogil:
    cdef Entry a = at[low], b = at[(low + high) // 2], c = at[high]
    if _before(b, a):
        a, b = b, a
    return a if _before(c, a) else c if _before(c, b) else b


cdef inline void _part(Entry *at, int64_t low, int64_t high, int64_t *i, int64_t *j) noexcept nogil:
    """Split at[low..high] into at[..j] before a pivot and at[i..] after it; j < i."""
    cdef Entry pivot = _median(at, low, high)
    i[0], j[0] = low, high
    while i[0] <= j[0]:
        while _before(at[i[0]], pivot):
            i[0] += 1
        while _before(pivot, at[j[0]]):
            j[0] -= 1
        if i[0] <= j[0]:
            at[i[0]], at[j[0]] = at[j[0]], at[i[0]]
            i[0] += 1
            j[0] -= 1


cdef void _select(Entry *at, int64_t m, int64_t n) noexcept nogil:
    """Bring the n least of m entries to the front."""
    cdef int64_t low = 0, high = m - 1, i, j
    while low < high:
        _part(at, low, high, &i, &j)
        if n - 1 <= j:
            high = j
        elif n - 1 >= i:
            low = i
        else:
            return


cdef void _sort(Entry *at, int64_t low, int64_t high) noexcept nogil:
    cdef int64_t i, j
    while low < high:
        _part(at, low, high, &i, &j)
        if j - low < high - i:  # the smaller side first: the stack stays low
            _sort(at, low, j)
            low = i
        else:
            _sort(at, i, high)
            high = j


cdef inline bint _all_above(const double *worth, double limit) noexcept nogil:
    cdef int i, n = 0
    for i in range(8):
        n += worth[i] > limit
    return n == 8


cdef class Lines:
    """Views of a cache's arrays, to choose among its lines.

    Parameters
    ----------
    state : uint8[n_lines]
    pins : int32[n_lines]
    next_use : int64[n_lines]
    """

    cdef uint8_t[::1] state
    cdef const int32_t[::1] pins
    cdef const int64_t[::1] next_use

    def __init__(self, uint8_t[::1] state, const int32_t[::1] pins, const int64_t[::1] next_use):
        self.state, self.pins, self.next_use = state, pins, next_use

    cdef inline bint offered(self, int64_t line, bint known) noexcept nogil:
        return self.state[line] == USED_ and self.pins[line] == 0 and (self.next_use[line] != INT64_MAX) == known

    def candidates(self, int64_t first, int64_t last):
        """Lines of ``[first, last)`` that may go: used, not queued, unpinned, next use unknown; int64[m]."""
        out = np.empty(last - first, np.int64)
        cdef int64_t[::1] to = out
        cdef int64_t line, m = 0
        with nogil:
            for line in range(first, last):
                if self.offered(line, False):
                    to[m] = line
                    m += 1
        return out[:m]

    def farthest(self, int64_t n):
        """Up to n unpinned lines whose next use is known, the farthest first: int64[<=n]."""
        return self._least(None, 0, self.state.shape[0], n)

    def least(self, const double[::1] worth, int64_t first, int64_t last, int64_t n):
        """Up to n of the `candidates` in ``[first, last)``, those of least worth, in order: int64[<=n].

        Raises
        ------
        ValueError
            A candidate's worth is not a number.

        Notes
        -----
        A sample says below which worth the n least lie, nearly; one pass collects what lies below, and the n least of
        that are chosen exactly. Where the sample misled, a second pass collects all.
        """
        return self._least(worth, first, last, n)

    cdef _least(self, const double[::1] worth, int64_t first, int64_t last, int64_t n):
        cdef int64_t m, line, end, stride = max(1, (last - first) // SAMPLE), rank
        cdef bint known = worth is None
        cdef double w, limit = INFINITY
        cdef Entry *at = <Entry *>malloc(max(last - first, 1) * sizeof(Entry))
        if at == NULL:
            raise MemoryError(f"no memory to choose among {last - first} lines")
        try:
            with nogil:
                if stride > 1:
                    m, line = 0, first
                    while line < last:
                        if self.offered(line, known):
                            w = -<double>self.next_use[line] if known else worth[line]
                            if w == w:
                                at[m] = Entry(w, line)
                                m += 1
                        line += stride
                    if m:
                        w = n / <double>stride  # how many of the sample are among the n least
                        rank = <int64_t>(w + 3 * sqrt(w)) + 2
                        if rank < m:
                            _select(at, m, rank)
                            limit = at[0].worth
                            for line in range(1, rank):
                                limit = max(limit, at[line].worth)
                while True:
                    m, line = 0, first
                    while line < last:
                        end = min(line + 8, last)
                        if not known and end - line == 8 and _all_above(&worth[line], limit):
                            line = end  # as most are
                        while line < end:
                            w = -<double>self.next_use[line] if known else worth[line]
                            if not w > limit:
                                at[m] = Entry(w, line)
                                m += 1
                                HB_PREFETCH(&self.state[line])
                                HB_PREFETCH(&self.pins[line])
                                HB_PREFETCH(&self.next_use[line])
                            line += 1
                    end, m = m, 0
                    for line in range(end):
                        if self.offered(at[line].line, known):
                            at[m] = at[line]
                            m += 1
                    if m >= n or limit == INFINITY:
                        break
                    limit = INFINITY
                for line in range(m):
                    if at[line].worth != at[line].worth:
                        with gil:
                            raise ValueError(f"the worth of line {at[line].line} is not a number")
                if n < m:
                    _select(at, m, n)
                    m = n
                _sort(at, 0, m - 1)
            return _lines(at, m)
        finally:
            free(at)

    def claim(self, const int64_t[::1] lines):
        """Those of queued lines that may still go, in order, still marked as queued; the others are not: int64[<=n]."""
        out = np.empty(lines.shape[0], np.int64)
        cdef int64_t[::1] to = out
        cdef int64_t i, line, m = 0
        for i in range(lines.shape[0]):
            line = lines[i]
            if self.state[line] == QUEUED_:
                if self.pins[line] == 0 and self.next_use[line] == INT64_MAX:
                    to[m] = line
                    m += 1
                else:
                    self.state[line] = USED_
        return out[:m]

    def mark(self, const int64_t[::1] lines, uint8_t state):
        """Set the state of lines; -1 is nothing."""
        cdef int64_t i
        for i in range(lines.shape[0]):
            if lines[i] >= 0:
                self.state[lines[i]] = state


cdef _lines(const Entry *at, int64_t n):
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t i
    for i in range(n):
        to[i] = at[i].line
    return out


# --- how often --------------------------------------------------------------------------------------------------

cdef inline double _plus(double worth, double now) noexcept nogil:
    """log2(2**worth + 2**now): one use more."""
    if worth <= now:
        return now + 1.44269504 * log1pf(exp2f(<float>(worth - now)))
    return worth + 1.44269504 * log1pf(exp2f(<float>(now - worth)))


cdef inline uint32_t _units(double worth) noexcept nogil:
    return <uint32_t>(<int64_t>(worth * 256 + 0.5)) & 0xFFFFF


cdef inline uint32_t _below(uint32_t entry, double now) noexcept nogil:
    """How far an entry's worth lies below 64 above now, in units."""
    return (_units(now) + 64 * 256 - entry) & 0xFFFFF


cdef inline double _worth(uint32_t entry, double now) noexcept nogil:
    return now + 64 - _below(entry, now) / 256.0


cdef inline uint32_t *_find(uint32_t *block, uint32_t tag) noexcept nogil:
    cdef int i
    for i in range(16):
        if block[i] >> 20 == tag:
            return block + i
    return NULL


cdef void _put(uint32_t *block, uint32_t tag, double worth, double now) noexcept nogil:
    """Remember a worth, in the place of the least one of the block unless all are more."""
    cdef uint32_t *entry = _find(block, tag)
    cdef uint32_t below, most
    cdef int i
    if entry == NULL:
        most = _below(_units(worth), now)
        for i in range(16):
            if block[i] == 0:
                entry = block + i
                break
            below = _below(block[i], now)
            if below >= most:
                most, entry = below, block + i
        if entry == NULL:
            return
    entry[0] = tag << 20 | _units(worth)


cdef _aligned(int64_t nbytes):
    """Zeros that begin with a cache line: uint8[nbytes]."""
    memory = np.zeros(nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start:start + nbytes]


cdef class History:
    """How often keys that are not near were asked for lately, in four bytes a key; the least of them are forgotten.

    Parameters
    ----------
    n_keys : int
        Keys that it holds at the most.

    Notes
    -----
    A worth is the logarithm of a count that decays: log2 of the sum of 2**(t/H) over the uses at times t. A use adds
    2**(now/H), and nothing else ever changes it: no sweep ages the lines, yet what was counted H ago weighs half of
    what is counted now (Lee et al., "LRFU", IEEE ToC 2001).

    Keys are kept in blocks of 16, a cache line each, chosen by the key's mix. An entry is 12 bits of the mix above 20
    bits of worth, which are steps of 1/256 modulo 4096, read as at most 64 above the present; 0 is an empty entry.
    """

    cdef uint32_t[::1] entries
    cdef uint64_t n_blocks

    def __cinit__(self, int64_t n_keys):
        self.n_blocks = max(1, (n_keys + 15) // 16)
        self.entries = _aligned(self.n_blocks * 64).view(np.uint32)

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.entries.shape[0] * 4 + 63

    cdef inline uint32_t *block(self, int64_t key, uint32_t *tag) noexcept nogil:
        cdef uint64_t mix = _mix(key)
        tag[0] = max(<uint32_t>(mix & 0xFFF), <uint32_t>1)
        return &self.entries[16 * (((mix >> 32) * self.n_blocks) >> 32)]

    def access(self, const int64_t[::1] keys, const int64_t[::1] lines, double[::1] worth, double now):
        """Count a use: in `worth` of a key's line, here of a key that has none (-1)."""
        cdef int64_t i, n = keys.shape[0]
        cdef uint32_t tag
        cdef uint32_t *block
        cdef uint32_t *entry
        with nogil:
            for i in range(n):
                if i + AHEAD < n:
                    if lines[i + AHEAD] >= 0:
                        HB_PREFETCH(&worth[lines[i + AHEAD]])
                    else:
                        HB_PREFETCH(self.block(keys[i + AHEAD], &tag))
                if lines[i] >= 0:
                    worth[lines[i]] = _plus(worth[lines[i]], now)
                else:
                    block = self.block(keys[i], &tag)
                    entry = _find(block, tag)
                    _put(block, tag, now if entry == NULL else _plus(_worth(entry[0], now), now), now)

    def take(self, const int64_t[::1] keys, const int64_t[::1] lines, double[::1] worth, double now):
        """Move what is known of keys to their lines; an unknown key counts as used once, now."""
        cdef int64_t i, n = keys.shape[0]
        cdef uint32_t tag
        cdef uint32_t *entry
        with nogil:
            for i in range(n):
                if i + AHEAD < n:
                    HB_PREFETCH(self.block(keys[i + AHEAD], &tag))
                    HB_PREFETCH(&worth[lines[i + AHEAD]])
                entry = self.block(keys[i], &tag)
                entry = _find(entry, tag)
                worth[lines[i]] = now if entry == NULL else _worth(entry[0], now)
                if entry != NULL:
                    entry[0] = 0

    def put(self, const int64_t[::1] keys, const int64_t[::1] lines, const double[::1] worth, double now):
        """Remember keys whose lines go."""
        cdef int64_t i, n = keys.shape[0]
        cdef uint32_t tag
        cdef uint32_t *block
        with nogil:
            for i in range(n):
                if i + AHEAD < n:
                    HB_PREFETCH(self.block(keys[i + AHEAD], &tag))
                    HB_PREFETCH(&worth[lines[i + AHEAD]])
                block = self.block(keys[i], &tag)
                _put(block, tag, worth[lines[i]], now)


cdef class Tuner:
    """Which half-life gives most hits lately, tried on a sample of the keys.

    Parameters
    ----------
    n_lines : int
        Lines of the cache.
    half_lives : float64[k]
        Candidates, in accesses a line.
    start : int
        Number of the candidate to begin with.

    Notes
    -----
    Each candidate has a miniature of the cache, for a part of the keys and as small a part of the lines (Waldspurger et
    al., "Cache modeling and optimization using miniature simulations", ATC 2017). A cache that lets go what is worth
    least holds what is worth more than some limit. So the miniatures share one table of sampled keys, and each has only
    a number for each key and its limit, which is found anew now and then.
    """

    cdef const double[::1] half_lives
    cdef double[::1] now, limit, hits, step
    cdef double[:, ::1] worth
    cdef uint32_t[::1] tags
    cdef int64_t[::1] above
    cdef uint64_t below, n_blocks
    cdef int64_t n_lines, n_small, n_kept, n_passed, clock, best

    def __cinit__(self, int64_t n_lines, const double[::1] half_lives, int64_t start):
        self.half_lives, self.best = half_lives, start
        self.n_lines, self.n_small = n_lines, min(n_lines, SMALL)
        self.below = <uint64_t>(4294967296.0 * self.n_small / n_lines)
        self.n_blocks = (self.n_small * REMEMBERED + 15) // 16
        self.tags = np.zeros(self.n_blocks * 16, np.uint32)
        self.worth = np.zeros((self.n_blocks * 16, len(half_lives)))
        self.now, self.hits = np.zeros(len(half_lives)), np.zeros(len(half_lives))
        self.limit, self.above = np.full(len(half_lives), -np.inf), np.zeros(len(half_lives), np.int64)
        self.step = 1 / (np.asarray(half_lives) * n_lines)

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.tags.shape[0] * (sizeof(uint32_t) + self.worth.shape[1] * sizeof(double))

    def access(self, const int64_t[::1] keys, int64_t n_used):
        """Try what a batch asks for, as `n_used` lines hold a key; the best half-life by now: float."""
        cdef int64_t i, k
        cdef uint64_t mix
        self.n_kept = max(1, self.n_small * n_used // self.n_lines)
        with nogil:
            for i in range(keys.shape[0]):
                self.n_passed += 1
                mix = _mix(keys[i])
                if <uint32_t>mix >= self.below:
                    continue
                for k in range(self.step.shape[0]):  # one after the other, so that no two are worth the same
                    self.now[k] += self.n_passed * self.step[k]
                self.n_passed = 0
                self.use(mix)
                if self.clock % (EPOCH * self.n_small) == 0:
                    self.choose()
        return self.half_lives[self.best]

    cdef int use(self, uint64_t mix) except -1 nogil:
        cdef int64_t first = 16 * (((mix >> 32) * self.n_blocks) >> 32), at = first, i, k
        cdef uint32_t tag = max(<uint32_t>mix, <uint32_t>1)
        cdef int64_t held, least = INT64_MAX
        cdef bint known = False
        for i in range(first, first + 16):
            if self.tags[i] == tag:
                at, known = i, True
                break
        if not known:  # in the place of a key that as few as possible of the miniatures hold
            for i in range(first, first + 16):
                held = -1
                if self.tags[i]:
                    held = 0
                    for k in range(self.step.shape[0]):
                        held += self.worth[i, k] >= self.limit[k]
                if held < least or (held == least and self.worth[i, self.best] < self.worth[at, self.best]):
                    at, least = i, held
        for k in range(self.step.shape[0]):
            if self.tags[at] and self.worth[at, k] >= self.limit[k]:
                self.above[k] -= 1
                self.hits[k] += known
            self.worth[at, k] = _plus(self.worth[at, k], self.now[k]) if known else self.now[k]
            self.above[k] += self.worth[at, k] >= self.limit[k]
        self.clock += 1
        self.tags[at] = tag
        for k in range(self.step.shape[0]):
            if self.above[k] > self.n_kept + self.n_kept // 32:
                self.find_limit(k)

    cdef int find_limit(self, int64_t k) except -1 nogil:
        """Raise a limit so that few less keys than there are lines are worth as much."""
        cdef int64_t i, m = 0
        cdef Entry *at = <Entry *>malloc(self.tags.shape[0] * sizeof(Entry))
        if at == NULL:
            with gil:
                raise MemoryError("no memory to compare half-lives")
        for i in range(self.tags.shape[0]):
            if self.tags[i] and self.worth[i, k] >= self.limit[k]:
                at[m] = Entry(-self.worth[i, k], i)
                m += 1
        self.above[k] = min(m, self.n_kept - self.n_kept // 32)
        _select(at, m, self.above[k])
        self.limit[k] = INFINITY
        for i in range(self.above[k]):
            self.limit[k] = min(self.limit[k], -at[i].worth)
        free(at)
        return 0

    cdef void choose(self) noexcept nogil:
        """Change to the candidate of most hits if they are clearly more; what was long ago counts less."""
        cdef int64_t k, most = self.best
        for k in range(self.step.shape[0]):
            if self.hits[k] > self.hits[most]:
                most = k
        if self.hits[most] > self.hits[self.best] * CLEARLY:
            self.best = most
        for k in range(self.step.shape[0]):
            self.hits[k] *= 0.9


cdef class Sketch:
    """How often keys were seen: a count-min sketch of four bytes a key, all in one cache line, updated conservatively.

    Parameters
    ----------
    n_keys : int
        Keys it is made for.
    sample : int
        Counts halve once so many were added.

    Source
    ------
    Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ToS 2017; blocks as in Caffeine.
    """

    cdef uint8_t[::1] cells
    cdef uint64_t n_blocks
    cdef int64_t sample, n_added

    def __cinit__(self, int64_t n_keys, int64_t sample):
        self.n_blocks = max(1, (n_keys + 15) // 16)
        self.sample, self.n_added = sample, 0
        self.cells = _aligned(self.n_blocks * 64)

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return self.cells.shape[0] + 63

    cdef inline uint8_t *block(self, uint64_t mix) noexcept nogil:
        return &self.cells[64 * (((mix >> 32) * self.n_blocks) >> 32)]

    cdef inline int least(self, uint64_t mix) noexcept nogil:
        cdef const uint8_t *block = self.block(mix)
        cdef int i, least = 255
        for i in range(4):
            least = min(least, block[16 * i + (mix >> 4 * i & 15)])
        return least

    def add(self, const int64_t[::1] keys):
        """Count each key once more."""
        cdef int64_t i, n = keys.shape[0]
        cdef uint64_t mix
        cdef uint8_t *cell
        cdef int j, more
        with nogil:
            for i in range(n):
                if i + AHEAD < n:
                    HB_PREFETCH(self.block(_mix(keys[i + AHEAD])))
                mix = _mix(keys[i])
                more = min(self.least(mix) + 1, 255)
                for j in range(4):
                    cell = self.block(mix) + 16 * j + (mix >> 4 * j & 15)
                    cell[0] = <uint8_t>max(<int>cell[0], more)  # no count grows beyond what it must
            self.n_added += n
            if self.n_added >= self.sample:
                for i in range(self.cells.shape[0]):
                    self.cells[i] = self.cells[i] >> 1
                self.n_added //= 2

    def estimate(self, const int64_t[::1] keys):
        """How often each key was seen, or more: int64[n]."""
        out = np.empty(keys.shape[0], np.int64)
        cdef int64_t[::1] to = out
        cdef int64_t i
        for i in range(keys.shape[0]):
            to[i] = self.least(_mix(keys[i]))
        return out


# --- what comes next --------------------------------------------------------------------------------------------

ctypedef struct Use:
    int64_t key
    int32_t next, prev  # batches on and back to the one that uses the key too; 0 for none
    int32_t next_at, prev_at  # the key's position there


ctypedef struct Batch:
    int64_t n
    Use *uses  # NULL once it is released


cdef class Window:
    """Which of the announced batches uses a key next.

    Notes
    -----
    A batch's uses are linked to the uses of the same keys in the batches before and after; an index finds the last use
    of a key. So announcing and releasing take as long as a batch has keys, however many batches are announced, and in
    whatever order they are released. Not safe to use from several threads at once.
    """

    cdef object index
    cdef Batch *batches  # those numbered first .. first + n - 1
    cdef int64_t first, n, room, n_uses
    cdef int64_t[::1] last  # of each slot of the index: the number of the last batch that uses its key,
    cdef int32_t[::1] last_at  # and where it does

    def __cinit__(self):
        self.index = Index()
        self.last, self.last_at = np.zeros(0, np.int64), np.zeros(0, np.int32)

    def __dealloc__(self):
        cdef int64_t i
        for i in range(self.n):
            free(self.batches[i].uses)
        free(self.batches)

    @property
    def nbytes(self):
        """Memory held, in bytes: int."""
        return (self.index.nbytes + self.room * sizeof(Batch) + self.n_uses * sizeof(Use)
                + self.last.shape[0] * (sizeof(int64_t) + sizeof(int32_t)))

    def announce(self, const int64_t[::1] keys):
        """A batch of distinct keys will come, after all that were announced before: its number, counting up from 0.

        Raises
        ------
        MemoryError
            Nothing is announced.
        """
        cdef int64_t i, slot, n = keys.shape[0], number = self.first + self.n, n_slots, before
        cdef Batch *batches
        cdef Use *uses = NULL
        cdef Use *use
        cdef const int64_t[::1] slots
        cdef int64_t[::1] last
        cdef int32_t[::1] last_at
        cdef const uint8_t[::1] new
        if self.n == self.room:
            batches = <Batch *>realloc(self.batches, (2 * self.room + 16) * sizeof(Batch))
            if batches == NULL:
                raise MemoryError("no memory to announce a batch")
            self.batches, self.room = batches, 2 * self.room + 16
        found, is_new = self.index.find_or_insert(keys)
        try:
            n_slots = self.index.n_slots
            if n_slots > self.last.shape[0]:
                last, last_at = np.zeros(2 * n_slots, np.int64), np.zeros(2 * n_slots, np.int32)
                last[:self.last.shape[0]], last_at[:self.last.shape[0]] = self.last, self.last_at
                self.last, self.last_at = last, last_at
            uses = <Use *>malloc(max(n, 1) * sizeof(Use))
            if uses == NULL:
                raise MemoryError(f"no memory to announce {n} keys")
        except MemoryError:
            self.index.erase(np.asarray(keys)[is_new])
            raise
        slots, new = found, is_new.view(np.uint8)
        with nogil:
            for i in range(n):
                slot = slots[i]
                uses[i] = Use(keys[i], 0, 0, 0, 0)
                if not new[i]:
                    before = self.last[slot]
                    uses[i].prev, uses[i].prev_at = <int32_t>(number - before), self.last_at[slot]
                    use = self.batches[before - self.first].uses + uses[i].prev_at
                    use.next, use.next_at = uses[i].prev, <int32_t>i
                self.last[slot], self.last_at[slot] = number, <int32_t>i
        self.batches[self.n] = Batch(n, uses)
        self.n += 1
        self.n_uses += n
        return number

    def release(self, int64_t number):
        """Forget a batch; the number of the next announced batch that uses each of its keys, `NEVER` where none does.

        Returns
        -------
        next_use : int64[n]
            In the order in which the keys were announced.

        Raises
        ------
        InvalidArgument
            The batch was never announced, or is released already.
        """
        cdef int64_t i, n, at = number - self.first, n_ends = 0, n_gone = 0
        cdef Use *uses
        cdef Use *use
        cdef Use *other
        cdef int64_t[::1] to, ends
        cdef const int64_t[::1] slots
        if not 0 <= at < self.n or self.batches[at].uses == NULL:
            raise InvalidArgument(f"batch {number} is not announced", remedy="release what announce gave, once")
        n, uses = self.batches[at].n, self.batches[at].uses
        out, last_uses = np.empty(n, np.int64), np.empty(n, np.int64)
        to, ends = out, last_uses
        for i in range(n):
            use = uses + i
            to[i] = number + use.next if use.next else INT64_MAX
            if use.prev:
                other = self.batches[at - use.prev].uses + use.prev_at
                other.next, other.next_at = use.next + use.prev if use.next else 0, use.next_at
            if use.next:
                other = self.batches[at + use.next].uses + use.next_at
                other.prev, other.prev_at = use.next + use.prev if use.prev else 0, use.prev_at
            else:
                ends[n_ends] = use.key
                n_ends += 1
        slots = self.index.find(last_uses[:n_ends])
        n_ends = 0
        for i in range(n):
            use = uses + i
            if not use.next:
                if use.prev:
                    self.last[slots[n_ends]], self.last_at[slots[n_ends]] = number - use.prev, use.prev_at
                else:
                    ends[n_gone] = use.key
                    n_gone += 1
                n_ends += 1
        self.index.erase(last_uses[:n_gone])
        free(uses)
        self.n_uses -= n
        self.batches[at].uses = NULL
        at = 0
        while at < self.n and self.batches[at].uses == NULL:
            at += 1
        self.first += at
        self.n -= at
        memmove(self.batches, self.batches + at, self.n * sizeof(Batch))
        return out

    def validate(self):
        """Recount everything; AssertionError where the window contradicts itself. For tests."""
        cdef int64_t b, i, slot, n_uses = 0, n_last = 0
        cdef Use use
        cdef Use other
        self.index.validate()
        for b in range(self.n):
            if self.batches[b].uses == NULL:
                continue
            n_uses += self.batches[b].n
            for i in range(self.batches[b].n):
                use = self.batches[b].uses[i]
                if use.next:
                    assert b + use.next < self.n and self.batches[b + use.next].uses != NULL, "a next use is gone"
                    other = self.batches[b + use.next].uses[use.next_at]
                    assert other.key == use.key and other.prev == use.next and other.prev_at == i, "links do not match"
                else:
                    slot = self.index.find(np.array([use.key]))[0]
                    assert slot >= 0, "the last use of a key is not in the index"
                    assert self.last[slot] == self.first + b and self.last_at[slot] == i, "the last use is another"
                    n_last += 1
        assert n_last == len(self.index), "a key has no last use"
        assert n_uses == self.n_uses, "uses are miscounted"
