"""Blocks: fixed-size records in blocks that check themselves, as segment files hold them.

    record   key int64 | freq uint32 | last_step uint32 | line
    block    records | zeros | erased: a bit a record | n_records uint32 | form uint32 | check uint64

Little-endian. `check` is the XXH64 of the block before it, seeded with the table's nonce, the file's number and the
block's place in it: a block that lies in another place, file or table than it was written for is noticed.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

import numpy as np

from hbkit.errors import InvalidArgument


cdef extern from "xxh64.h" nogil:
    uint64_t hb_xxh64(const uint8_t *, int64_t, uint64_t)

cdef extern from "kernels.h" nogil:
    uint64_t hb_mix64(uint64_t)

cdef enum:
    PAGE = 4096
    MOST_PAGES = 4
    HEAD = 16  # of a record
    TAIL = 16  # of a block
    FORM = 1


cdef _refuse(what):
    raise InvalidArgument(what, remedy="this is a precondition of blocks")


cdef class Blocks:
    """The form of one table's blocks.

    Parameters
    ----------
    line_nbytes : int
    nonce : int, in [0, 2**64)
        Tells the table's files from those of others.

    Attributes
    ----------
    record_nbytes, block_nbytes, per_block : int
        A block is the least multiple of 4 KiB of which records fill 0.92; or that which they fill best, of those of
        16 KiB or less; or the least that holds a record.
    filled : float
        What part of a block records fill.

    Notes
    -----
    A record's *position* counts from the begin of a buffer: block times per_block, plus its number in the block. Blocks
    of a buffer are those of file `file` from number `first` on. The GIL is released.
    """

    cdef readonly int64_t line_nbytes, record_nbytes, block_nbytes, per_block
    cdef readonly double filled
    cdef uint64_t nonce

    def __init__(self, int64_t line_nbytes, uint64_t nonce):
        if not 0 < line_nbytes < 1 << 30:
            _refuse(f"lines of {line_nbytes} bytes")
        self.line_nbytes, self.record_nbytes, self.nonce = line_nbytes, line_nbytes + HEAD, nonce
        cdef int64_t size = 0, n
        while not self.per_block or (size < MOST_PAGES * PAGE and self.filled < 0.92):
            size += PAGE
            n = (size - TAIL) * 8 // (8 * self.record_nbytes + 1)
            while n * self.record_nbytes + (n + 7) // 8 + TAIL > size:
                n -= 1
            if n * self.record_nbytes > self.filled * size:
                self.block_nbytes, self.per_block, self.filled = size, n, n * self.record_nbytes / <double>size

    cdef inline uint64_t seed(self, int64_t file, int64_t block) noexcept nogil:
        return hb_mix64(hb_mix64(self.nonce ^ <uint64_t>file) ^ <uint64_t>block)

    cdef inline uint64_t check(self, const uint8_t *block, int64_t file, int64_t number) noexcept nogil:
        return hb_xxh64(block, self.block_nbytes - 8, self.seed(file, number))

    cdef inline uint8_t *erased(self, const uint8_t *block) noexcept nogil:
        return <uint8_t *>block + self.block_nbytes - TAIL - (self.per_block + 7) // 8

    cdef inline int good(self, const uint8_t *block, int64_t file, int64_t number) noexcept nogil:
        """Whether a block is what was written there."""
        cdef uint64_t check
        cdef uint32_t n, form
        memcpy(&check, block + self.block_nbytes - 8, 8)
        memcpy(&form, block + self.block_nbytes - 12, 4)
        memcpy(&n, block + self.block_nbytes - TAIL, 4)
        return check == self.check(block, file, number) and form == FORM and n <= <uint64_t>self.per_block

    def fill(self, uint8_t[::1] buffer, int64_t position, const int64_t[::1] keys, const uint32_t[::1] freq,
             const uint32_t[::1] last_step, const uint8_t[:, ::1] lines):
        """Write records from `position` on; without `lines`, those of erased keys. Fresh blocks hold zeros."""
        cdef int64_t n = keys.shape[0], i, p
        cdef uint8_t *block
        cdef uint8_t *record
        cdef uint32_t count
        if position < 0 or position + n > buffer.shape[0] // self.block_nbytes * self.per_block:
            _refuse("records reach outside the buffer")
        if lines is not None and (lines.shape[0] != n or lines.shape[1] != self.line_nbytes):
            _refuse(f"lines of shape {lines.shape[0], lines.shape[1]}, not {n, self.line_nbytes}")
        if freq.shape[0] != n or last_step.shape[0] != n:
            _refuse("keys and their metadata differ in number")
        with nogil:
            for i in range(n):
                p = position + i
                block = &buffer[0] + p // self.per_block * self.block_nbytes
                record = block + p % self.per_block * self.record_nbytes
                memcpy(record, &keys[i], 8)
                memcpy(record + 8, &freq[i], 4)
                memcpy(record + 12, &last_step[i], 4)
                if lines is not None:
                    memcpy(record + HEAD, &lines[i, 0], self.line_nbytes)
                else:
                    self.erased(block)[p % self.per_block // 8] |= <uint8_t>(1 << p % self.per_block % 8)
                count = <uint32_t>(p % self.per_block + 1)
                memcpy(block + self.block_nbytes - TAIL, &count, 4)

    def seal(self, uint8_t[::1] buffer, int64_t n_blocks, int64_t file, int64_t first):
        """Write the checks of the first `n_blocks` blocks."""
        cdef int64_t i
        cdef uint8_t *block
        cdef uint64_t check
        cdef uint32_t form = FORM
        if not 0 <= n_blocks <= buffer.shape[0] // self.block_nbytes:
            _refuse("blocks reach outside the buffer")
        with nogil:
            for i in range(n_blocks):
                block = &buffer[0] + i * self.block_nbytes
                memcpy(block + self.block_nbytes - 12, &form, 4)
                check = self.check(block, file, first + i)
                memcpy(block + self.block_nbytes - 8, &check, 8)

    def take(self, const uint8_t[::1] buffer, const int64_t[::1] positions, const int64_t[::1] files,
             const int64_t[::1] blocks, const int64_t[::1] keys, const int64_t[::1] index, uint32_t[::1] freq,
             uint32_t[::1] last_step, uint8_t[:, ::1] lines, bint verify=True):
        """Copy records out: what lies at positions[i], of the key ``keys[index[i]]``, to number index[i] of the rest.

        Parameters
        ----------
        buffer : uint8[n * block_nbytes]  IN
        positions : int64[m]  IN
            Those of one block follow each other, so that it is verified once.
        files, blocks : int64[m]  IN
            Where the block of each comes from.
        keys : int64[n]  IN
        index : int64[m], in [0, n)  IN
        freq, last_step : uint32[n]  OUT
        lines : uint8[n, line_nbytes]  OUT
        verify : bool
            False for blocks that are not sealed.

        Returns
        -------
        bad : int
            The first i whose block does not match its check or whose record is another's or erased; -1 for none.
        """
        cdef int64_t m = positions.shape[0], n = keys.shape[0], most = buffer.shape[0] // self.block_nbytes
        cdef int64_t i, b, p, j, last = -1, bad = -1
        cdef const uint8_t *block = NULL
        cdef const uint8_t *record
        if files.shape[0] != m or blocks.shape[0] != m or index.shape[0] != m:
            _refuse("positions differ in number")
        if freq.shape[0] != n or last_step.shape[0] != n or lines.shape[0] != n or lines.shape[1] != self.line_nbytes:
            _refuse("keys and what is to be written differ in number")
        for i in range(m):
            if not 0 <= positions[i] < most * self.per_block or not 0 <= index[i] < n:
                _refuse("a position lies outside the buffer")
        with nogil:
            for i in range(m):
                b, p, j = positions[i] // self.per_block, positions[i] % self.per_block, index[i]
                if b != last:
                    block, last = &buffer[0] + b * self.block_nbytes, b
                    if verify and not self.good(block, files[i], blocks[i]):
                        bad = i
                        break
                record = block + p * self.record_nbytes
                if memcmp(record, &keys[j], 8) != 0 or self.erased(block)[p // 8] >> p % 8 & 1:
                    bad = i
                    break
                memcpy(&freq[j], record + 8, 4)
                memcpy(&last_step[j], record + 12, 4)
                memcpy(&lines[j, 0], record + HEAD, self.line_nbytes)
        return bad

    def parse(self, const uint8_t[::1] buffer, int64_t n_blocks, int64_t file, int64_t first):
        """All records of `n_blocks` blocks, verified.

        Returns
        -------
        bad : int
            The first block that does not match its check, -1 for none; then the rest is of no use.
        keys : int64[m]
        freq, last_step : uint32[m]
        positions : int64[m], ascending
        erased : bool[m]
        """
        if not 0 <= n_blocks <= buffer.shape[0] // self.block_nbytes:
            _refuse("blocks reach outside the buffer")
        cdef int64_t room = n_blocks * self.per_block, i, j, m = 0, bad = -1
        cdef const uint8_t *block
        cdef const uint8_t *record
        cdef uint32_t n
        key, pos = np.empty(room, np.int64), np.empty(room, np.int64)
        pairs, gone = np.empty((2, room), np.uint32), np.empty(room, np.uint8)
        cdef int64_t[::1] to_key = key, to_pos = pos
        cdef uint32_t[:, ::1] to_pair = pairs
        cdef uint8_t[::1] to_gone = gone
        with nogil:
            for i in range(n_blocks):
                block = &buffer[0] + i * self.block_nbytes
                if not self.good(block, file, first + i):
                    bad = i
                    break
                memcpy(&n, block + self.block_nbytes - TAIL, 4)
                for j in range(n):
                    record = block + j * self.record_nbytes
                    memcpy(&to_key[m], record, 8)
                    memcpy(&to_pair[0, m], record + 8, 4)
                    memcpy(&to_pair[1, m], record + 12, 4)
                    to_pos[m] = i * self.per_block + j
                    to_gone[m] = self.erased(block)[j // 8] >> j % 8 & 1
                    m += 1
        return bad, key[:m], pairs[0, :m], pairs[1, :m], pos[:m], gone[:m].view(np.bool_)
