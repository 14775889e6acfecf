"""Passes over a batch between its keys and its rows, that would each be several in NumPy."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

import numpy as np

from hbkit._ext.isa cimport hb_mix64
from hbkit.errors import InvalidArgument


def absent(const int64_t[::1] slots, int64_t padding=-1):
    """Positions whose slot is below 0, but for position `padding`: int64[m], ascending."""
    cdef int64_t i, n = slots.shape[0], m = 0
    with nogil:
        for i in range(n):
            m += slots[i] < 0
        m -= 0 <= padding < n and slots[padding] < 0
    out = np.empty(m, np.int64)
    cdef int64_t[::1] to = out
    if m:
        with nogil:
            m = 0
            for i in range(n):
                if slots[i] < 0 and i != padding:
                    to[m] = i
                    m += 1
    return out


def add_at(int32_t[::1] numbers, const int64_t[::1] slots, int32_t by):
    """``numbers[slot] += by`` for each slot; those that are none are skipped."""
    cdef int64_t i, n = numbers.shape[0]
    with nogil:
        for i in range(slots.shape[0]):
            if <uint64_t>slots[i] < <uint64_t>n:
                numbers[slots[i]] += by


def set_at(uint8_t[::1] flags, const int64_t[::1] slots):
    """Set the flag of each slot; those that are none are skipped."""
    cdef int64_t i, n = flags.shape[0]
    with nogil:
        for i in range(slots.shape[0]):
            if <uint64_t>slots[i] < <uint64_t>n:
                flags[slots[i]] = 1


def count_at(const uint8_t[::1] flags, const int64_t[::1] slots):
    """How many slots have their flag set: int; those that are none are skipped."""
    cdef int64_t i, n = flags.shape[0], found = 0
    with nogil:
        for i in range(slots.shape[0]):
            if <uint64_t>slots[i] < <uint64_t>n:
                found += flags[slots[i]] != 0
    return found


def set_bits(uint64_t[::1] bits, const int64_t[::1] slots):
    """Set bit ``slot % 64`` of word ``slot // 64`` for each slot; those that are none are skipped."""
    cdef int64_t i, n = 64 * bits.shape[0]
    with nogil:
        for i in range(slots.shape[0]):
            if <uint64_t>slots[i] < <uint64_t>n:
                bits[slots[i] // 64] |= <uint64_t>1 << (slots[i] % 64)


def clear_bits(uint64_t[::1] bits, const int64_t[::1] slots):
    """Clear the bit of each slot; those that are none are skipped."""
    cdef int64_t i, n = 64 * bits.shape[0]
    with nogil:
        for i in range(slots.shape[0]):
            if <uint64_t>slots[i] < <uint64_t>n:
                bits[slots[i] // 64] &= ~(<uint64_t>1 << (slots[i] % 64))


def with_bits(const uint64_t[::1] bits, const int64_t[::1] slots):
    """Which slots have their bit set, those that are none have not: bool[n]."""
    cdef int64_t i, n = 64 * bits.shape[0]
    out = np.zeros(slots.shape[0], np.bool_)
    cdef uint8_t[::1] to = out.view(np.uint8)
    with nogil:
        for i in range(slots.shape[0]):
            if <uint64_t>slots[i] < <uint64_t>n:
                to[i] = bits[slots[i] // 64] >> (slots[i] % 64) & 1
    return out


def n_absent(const int64_t[::1] slots):
    """How many slots are below 0: int."""
    cdef int64_t i, m = 0
    with nogil:
        for i in range(slots.shape[0]):
            m += slots[i] < 0
    return m


def find_key(const int64_t[::1] keys, int64_t key):
    """Position of the first `key` among keys, -1 where there is none: int."""
    cdef int64_t i, found = -1
    with nogil:
        for i in range(keys.shape[0]):
            if keys[i] == key:
                found = i
                break
    return found


def code_counts(const uint32_t[::1] codes, int64_t n_entries):
    """How often each entry of a dictionary is used: int64[n_entries]. InvalidArgument where a code is none."""
    cdef int64_t i, n = codes.shape[0], bad = 0
    out = np.zeros(n_entries, np.int64)
    cdef int64_t[::1] to = out
    with nogil:
        for i in range(n):
            if codes[i] < n_entries:
                to[codes[i]] += 1
            else:
                bad += 1
    if bad:
        raise InvalidArgument(f"{bad} codes are outside a dictionary of {n_entries}", remedy="codes are 0..n-1")
    return out


def sum_counts(const int64_t[::1] inverse, const int64_t[::1] counts, int64_t n_unique):
    """Sum of ``counts[i]`` by ``inverse[i]``: int64[n_unique]."""
    cdef int64_t i, n = inverse.shape[0], bad = 0
    if counts.shape[0] != n:
        raise InvalidArgument(f"{counts.shape[0]} counts for {n} keys", remedy="give one a key")
    out = np.zeros(n_unique, np.int64)
    cdef int64_t[::1] to = out
    with nogil:
        for i in range(n):
            if 0 <= inverse[i] < n_unique:
                to[inverse[i]] += counts[i]
            else:
                bad += 1
    if bad:
        raise InvalidArgument(f"{bad} positions are outside {n_unique} keys", remedy="positions are 0..u-1")
    return out


def decode(const uint32_t[::1] codes, const int64_t[::1] entries):
    """``entries[codes]``, codes being below ``len(entries)`` as `code_counts` has checked: int64[n]."""
    cdef int64_t i, n = codes.shape[0], m = entries.shape[0]
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    with nogil:
        for i in range(n):
            to[i] = entries[codes[i]] if codes[i] < m else -1
    return out


def all_finite(const float[:, ::1] values):
    """Whether no value is NaN or infinite: bool."""
    cdef int64_t i, n = values.shape[0] * values.shape[1]
    cdef const uint32_t *bits
    cdef uint32_t bad = 0
    if n == 0:
        return True
    bits = <const uint32_t *>&values[0, 0]
    with nogil:
        for i in range(n):  # integers, so that it vectorises
            bad |= (bits[i] & 0x7F800000u) == 0x7F800000u
    return bad == 0


def finite_rows(const float[:, ::1] values):
    """Which rows hold neither NaN nor infinity: bool[n]."""
    cdef int64_t i, j, n = values.shape[0], dim = values.shape[1]
    cdef const uint32_t *bits
    cdef uint32_t bad
    out = np.ones(n, np.bool_)
    cdef uint8_t[::1] to = out.view(np.uint8)
    if n == 0 or dim == 0:
        return out
    with nogil:
        for i in range(n):
            bits = <const uint32_t *>&values[i, 0]
            bad = 0
            for j in range(dim):
                bad |= (bits[j] & 0x7F800000u) == 0x7F800000u
            to[i] = bad == 0
    return out


def mixed(const int64_t[::1] keys):
    """The mix of each key, a bijection whose top ten bits are its virtual shard: uint64[n]."""
    cdef int64_t i
    out = np.empty(keys.shape[0], np.uint64)
    cdef uint64_t[::1] to = out
    with nogil:
        for i in range(keys.shape[0]):
            to[i] = hb_mix64(<uint64_t>keys[i])
    return out
