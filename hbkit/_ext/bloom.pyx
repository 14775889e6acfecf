"""The counters of a counting Bloom filter (Fan et al., Summary cache, SIGCOMM 1998): 16 bits each, saturating.

Each of the 1,024 virtual shards of keys has counters of its own, so that what a key reads does not depend on which
other shards a rank holds.
"""

from libc.stdint cimport int64_t, uint16_t, uint64_t

import numpy as np

from hbkit._ext.isa cimport hb_mix64
from hbkit.errors import InvalidArgument

cdef enum:
    N_SHARDS = 1024
    MOST = 65535
    MOST_HASHES = 64


cdef inline int _cells(uint64_t key, int n_hashes, uint64_t per_shard, uint64_t *cells) noexcept nogil:
    """Counters of a key, distinct; how many."""
    cdef uint64_t mixed = hb_mix64(key), first = (mixed >> 54) * per_shard, cell
    cdef int k, j, n = 0
    for k in range(n_hashes):
        # A hash each: combinations of two (Kirsch and Mitzenmacher, ESA 2006) collide too often in so small a shard.
        cell = first + hb_mix64(mixed + (k + 1) * <uint64_t>0x9E3779B97F4A7C15u) % per_shard
        for j in range(n):
            if cells[j] == cell:  # counted twice, a key would pass for two
                break
        else:
            cells[n] = cell
            n += 1
    return n


def add(uint16_t[::1] counters, const int64_t[::1] keys, const int64_t[::1] counts, uint16_t[:, ::1] before):
    """Add counts to distinct keys, then estimate each.

    Parameters
    ----------
    counters : uint16[1024 * m]  IN, OUT
    keys, counts : int64[n]  IN
    before : uint16[n, number of hashes]  OUT
        What `take_back` wants.

    Returns
    -------
    int64[n]
        The least of each key's counters, after all were added: never below what was added, but where 65,535 stands
        for that and more.
    """
    cdef int64_t n = keys.shape[0], i, least, n_hashes = before.shape[1]
    cdef uint64_t per_shard = counters.shape[0] // N_SHARDS
    cdef uint64_t cells[MOST_HASHES]
    cdef int k, n_cells
    if counts.shape[0] != n or before.shape[0] != n or per_shard < 1 or not 1 <= n_hashes <= MOST_HASHES:
        raise InvalidArgument(f"{counts.shape[0]} counts for {n} keys", remedy="give one a key, and 1,024 counters")
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    with nogil:
        for i in range(n):
            n_cells = _cells(<uint64_t>keys[i], <int>n_hashes, per_shard, cells)
            for k in range(n_cells):
                before[i, k] = counters[cells[k]]
                counters[cells[k]] = <uint16_t>min(counters[cells[k]] + max(counts[i], 0), MOST)
        for i in range(n):
            n_cells = _cells(<uint64_t>keys[i], <int>n_hashes, per_shard, cells)
            least = MOST
            for k in range(n_cells):
                least = min(least, <int64_t>counters[cells[k]])
            to[i] = least
    return out


def take_back(uint16_t[::1] counters, const int64_t[::1] keys, const uint16_t[:, ::1] before):
    """Undo the last `add` of these keys, which gave `before`. It needs no memory."""
    cdef int64_t i
    cdef uint64_t per_shard = counters.shape[0] // N_SHARDS
    cdef uint64_t cells[MOST_HASHES]
    cdef int k
    if before.shape[0] != keys.shape[0] or per_shard < 1 or not 1 <= before.shape[1] <= MOST_HASHES:
        raise InvalidArgument(f"{before.shape[0]} counters for {keys.shape[0]} keys", remedy="give those of the add")
    with nogil:
        for i in range(keys.shape[0] - 1, -1, -1):  # the last first, since keys share counters
            for k in range(_cells(<uint64_t>keys[i], <int>before.shape[1], per_shard, cells)):
                counters[cells[k]] = before[i, k]
