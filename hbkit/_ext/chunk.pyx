"""Column chunks of Parquet files to rows: page after page, levels to row splits, values straight into the output.

How a chunk is read. Pages are opened one at a time. Their levels are decoded a *window* of entries at a time (an entry
is a value, a null or an empty list) into bitmaps: where a row starts, which entries are elements of the innermost list,
which have a value. A flat column is one whose entries all start a row; deeper lists keep their levels as numbers. From
the bitmaps come the row splits, run by run; the values between two positions are then decoded in one go, and nothing is
done for each value but its decoding. The window bounds the memory, whatever a page claims of itself.

Reading may stop after any row and goes on there: all state lies in the chunk. A row ends where the next one starts, so
the last row of a read may need the next page (SPEC: only v2 pages must begin with a row).

Trust. Bytes come from outside. A cursor knows its end; lengths are compared before they are used; dictionary indices
are proven in blocks before the first is looked up; levels beyond the schema's are an error; what a page claims to hold
is bounded by `MAX_PAGE_NBYTES`, what a read produces by the output's limit.

Encodings other than PLAIN and dictionaries are rare: their pages are rewritten as PLAIN, whole, and then read as such.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory

from hbkit._ext.isa cimport (HB_CODES, HB_E_END, HB_E_RANGE, HB_SHORT, HB_SLACK, hb_decoders, hb_runs,
                             hb_short, hb_span, kernels)
from hbkit._ext.thrift cimport Cursor, PageHeader, read_page_header

import zlib

import numpy as np

from hbkit._ext.pool import shared
from hbkit.errors import BudgetExceeded, Corrupt, InvalidArgument, Unsupported

cdef extern from "xxh64.h" nogil:
    uint64_t hb_xxh64(const uint8_t *, int64_t, uint64_t)

cdef extern from "snappy.h" nogil:
    int64_t hb_snappy_length(const uint8_t *, int64_t)

cdef enum:
    SNAPPY = 1  # SPEC: parquet.thrift, enum CompressionCodec
    LZ4_RAW = 7
    MOST_OF_SNAPPY = 22  # bytes that one compressed byte can give: three are a copy of 64

cdef enum:
    WINDOW = 16384  # entries
    WORDS = 16384 // 64 + 2
    UNPACKED_WINDOW = 16384 + 16
    BLOCK = 2048  # values between the nulls of a window
    UNPACKED = 4096 + 16  # HB_CODES and its slack

MAX_PAGE_NBYTES = 1 << 28
cdef int64_t _max_page = MAX_PAGE_NBYTES
REWRITE = "write the file again, or leave it out"

# SPEC: parquet.thrift, enum Type
cdef enum:
    BOOLEAN = 0
    INT32 = 1
    INT64 = 2
    INT96 = 3
    FLOAT = 4
    DOUBLE = 5
    BYTE_ARRAY = 6
    FIXED = 7

# SPEC: parquet.thrift, enum Encoding
cdef enum:
    PLAIN = 0
    PLAIN_DICTIONARY = 2
    RLE = 3
    BIT_PACKED = 4
    DELTA_BINARY_PACKED = 5
    DELTA_LENGTH_BYTE_ARRAY = 6
    DELTA_BYTE_ARRAY = 7
    RLE_DICTIONARY = 8
    BYTE_STREAM_SPLIT = 9

# What becomes of a stored value; see Form.
cdef enum:
    COPY = 0
    RESIZE = 1
    DECIMAL = 2
    HASH_INT = 3
    HASH_BYTES = 4
    STRINGS = 5

CONVERSIONS = {"copy": COPY, "resize": RESIZE, "decimal": DECIMAL, "hash_int": HASH_INT, "hash_bytes": HASH_BYTES,
               "strings": STRINGS}

# Null policies; see Form.
cdef enum:
    NULL_ERROR = 0
    NULL_DEFAULT = 1
    NULL_EMPTY = 2

NULLS = {"error": NULL_ERROR, "default": NULL_DEFAULT, "empty": NULL_EMPTY}

cdef enum:  # Output.vecs
    VALUES = 0
    MASK = 1
    ENDS = 2
    SPLITS = 3

cdef enum:  # what is known of a window's definition levels
    SAME = 0  # one level, same_level
    BITS = 1  # one bit each: valid has them
    MANY = 2  # nulls are in a bitmap
    NUMBERS = 3  # def_levels has them

cdef struct Vec:
    uint8_t *data
    int64_t capacity  # bytes; HB_SLACK more are there


cdef class Output:
    """Rows of one column as they are decoded, in memory of the shared pool.

    Parameters
    ----------
    dtype : numpy.dtype or None
        Of the values; None for strings.
    rank : int
        Lists a row nests.
    limit_nbytes : int
        The most that the values may take.
    with_mask : bool
        Also keep a byte for each value that says whether it was not null.
    past_cache : bool
        Write values around the caches: for outputs that are larger than they are.
    dictionary : Output, optional
        Where entries go when rows are to be uint32 positions in it: those of the file's dictionaries, and values that
        stand in none.
    """

    cdef object dtype
    cdef list owners
    cdef Vec *vecs
    cdef readonly int rank
    cdef int64_t item, limit
    cdef bint with_mask, is_text, past_cache
    cdef readonly Output dictionary
    cdef readonly int64_t n_rows, n_values, n_nulls
    cdef int64_t *n_items  # by level below the rows: items so far, values last

    def __cinit__(self, dtype, int rank, int64_t limit_nbytes, bint with_mask=False,
                  bint past_cache=False, Output dictionary=None):
        self.past_cache, self.dictionary = past_cache, dictionary
        self.dtype, self.rank, self.limit, self.with_mask = dtype, rank, limit_nbytes, with_mask
        self.is_text = dtype is None
        self.item = 1 if dtype is None else dtype.itemsize
        self.vecs = <Vec *>calloc(SPLITS + rank, sizeof(Vec))
        self.n_items = <int64_t *>calloc(rank + 1, sizeof(int64_t))
        if self.vecs == NULL or self.n_items == NULL:
            raise MemoryError
        self.owners = [None] * (SPLITS + rank)

    def __dealloc__(self):
        free(self.vecs)
        free(self.n_items)

    def reserve(self, n_rows, n_values, nbytes=0):
        """Make room for about this many more rows, values and (for strings) bytes, so that nothing need be moved later.
        The numbers are a file's claims: of any size, and what is beyond the limit is refused when it comes."""
        cdef int k
        for k in range(self.rank):
            self.expect(SPLITS + k, 8 * (self.n_rows + 1), 8 * n_rows)
        if self.dtype is None:
            self.expect(ENDS, 8 * (self.n_values + 1), 8 * n_values)
            self.expect(VALUES, self.n_bytes(), nbytes)
        else:
            self.expect(VALUES, self.n_values * self.item, n_values * self.item)

    cdef int expect(self, int which, int64_t used, object more) except -1:
        return self.room(which, used, max(0, min(more, self.limit - used)))

    cdef int64_t n_bytes(self) noexcept nogil:
        """Bytes of the strings so far."""
        return (<int64_t *>self.vecs[ENDS].data)[self.n_values] if self.vecs[ENDS].data != NULL else 0

    cdef int room(self, int which, int64_t used, int64_t more) except -1 nogil:
        """Make sure that `more` bytes fit behind the `used` ones. Splits and ends count their leading 0 as used."""
        if used + more <= self.vecs[which].capacity and self.vecs[which].data != NULL:
            return 0
        with gil:
            self._grow(which, used, used + more)
        return 0

    cdef int _grow(self, int which, int64_t used, int64_t need) except -1:
        cdef Vec *v = &self.vecs[which]
        cdef int64_t want = need if v.data == NULL else max(need, 2 * v.capacity)
        cdef uint8_t[::1] view
        if need > self.limit:
            raise BudgetExceeded(f"the decoded rows take more than {self.limit} bytes",
                                 remedy="read fewer rows at once, or raise limit_nbytes")
        owner = shared.take(want + HB_SLACK)
        view = owner
        if v.data != NULL:
            memcpy(&view[0], v.data, used)
        elif which >= ENDS:
            (<int64_t *>&view[0])[0] = 0
        self.owners[which] = owner
        v.data, v.capacity = &view[0], want
        return 0

    def append(self, bytes value):
        """Append one value, or string, to a flat output."""
        cdef int64_t n = len(value), at = self.n_values * self.item
        cdef const uint8_t *data = value
        if self.is_text:
            at = self.n_bytes()
            self.room(ENDS, 8 * (self.n_values + 1), 8)
            (<int64_t *>self.vecs[ENDS].data)[self.n_values + 1] = at + n
        elif n != self.item:
            raise InvalidArgument(f"a value of {n} bytes", remedy=f"give {self.item}")
        self.room(VALUES, at, n)
        memcpy(self.vecs[VALUES].data + at, data, n)
        self.n_values += 1

    cdef object _array(self, int which, object dtype, int64_t n):
        return np.empty(n, dtype) if n == 0 else np.frombuffer(self.owners[which], dtype, n)

    def finish(self):
        """(values, splits, mask): values an array, or (bytes, ends); splits a tuple of int64 arrays, outer to inner;
        mask a bool array or None. They share the pool's memory, which returns to it when the last of them is gone."""
        cdef int k
        cdef int64_t n = self.n_rows
        splits = []
        for k in range(self.rank):
            self.room(SPLITS + k, 8, 0)
            splits.append(self._array(SPLITS + k, np.int64, n + 1))
            n = self.n_items[k + 1]
        if self.dtype is None:
            self.room(ENDS, 8, 0)
            values = self._array(VALUES, np.uint8, self.n_bytes()), self._array(ENDS, np.int64, self.n_values + 1)
        else:
            values = self._array(VALUES, self.dtype, self.n_values)
        mask = self._array(MASK, np.bool_, self.n_values) if self.with_mask else None
        return values, tuple(splits), mask


cdef struct Shape:
    int physical, max_def, max_rep, convert, bits, null, def_width, rep_width
    int64_t type_length, width, item, fill_nbytes
    bint is_signed, is_ragged
    int *thresholds  # from 1 on; 0 of the rows
    const uint8_t *is_null
    const uint8_t *fill_bytes
    uint64_t fill, seed
    uint32_t null_levels  # is_null as bits, where they are few


cdef class Form:
    """What a leaf stores, and what its values become: one for a field and a file.

    Parameters
    ----------
    physical, type_length : int
        SPEC: parquet.thrift, Type; the length of fixed-length values.
    max_def : int
    thresholds : list of int
        For each list, outer to inner, the definition level from which on an entry is an element of it.
    is_null : bytes
        For each definition level below max_def, 1 where it means a null and 0 where it means an empty list.
    convert : str, a key of CONVERSIONS
        "copy" of fixed-width values, "resize" of 32-bit integers, "decimal" to int64, "hash_int" and "hash_bytes" to
        int64 keys, "strings".
    bits, is_signed : int, bool
        Of the logical integer, for "hash_int".
    item : int
        Bytes of a value in the output; 1 for strings.
    null : str, a key of NULLS
        "empty" leaves nulls out; "error" counts them in Output.n_nulls.
    fill : bytes
        What stands for a null: `item` bytes, or a string.
    seed : int
    """

    cdef Shape shape
    cdef bytes is_null, fill

    def __cinit__(self, int physical, int64_t type_length, int max_def, list thresholds, bytes is_null, str convert,
                  int bits, bint is_signed, int64_t item, str null, bytes fill, uint64_t seed):
        cdef int k
        cdef Shape *f = &self.shape
        self.is_null, self.fill = is_null, fill  # kept alive for the pointers
        f.physical, f.type_length, f.max_def, f.max_rep = physical, type_length, max_def, len(thresholds)
        f.convert, f.null, f.bits, f.is_signed = CONVERSIONS[convert], NULLS[null], bits, is_signed
        f.item, f.seed = item, seed
        f.width = {BOOLEAN: 0, INT32: 4, INT64: 8, INT96: 12, FLOAT: 4, DOUBLE: 8, BYTE_ARRAY: 0,
                   FIXED: type_length}[physical]
        f.def_width, f.rep_width = (<object>max_def).bit_length(), len(thresholds).bit_length()
        f.thresholds = <int *>calloc(len(thresholds) + 1, sizeof(int))
        if f.thresholds == NULL:
            raise MemoryError
        for k in range(f.max_rep):
            f.thresholds[k + 1] = thresholds[k]
        f.is_null, f.fill_bytes, f.fill_nbytes = self.is_null, self.fill, len(fill)
        f.fill = int.from_bytes(fill[:8], "little")
        for k in range(min(max_def, 31)):
            f.null_levels |= <uint32_t>(is_null[k] != 0) << k
        # a flat column whose nulls make empty rows is read as lists of at most one value
        f.is_ragged = f.max_rep > 0 or (f.null == NULL_EMPTY and f.convert != STRINGS)

    def __dealloc__(self):
        free(self.shape.thresholds)


cdef int64_t lz4_length(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """The bytes that an LZ4 block decompresses to, which its decompressor does not tell; -1 of a damaged one.

    SPEC: lz4_Block_format.md: sequences of a token (two lengths of 4 bits, which go on in bytes up to one below 255),
    the literals, and an offset of two bytes, which the last sequence lacks."""
    cdef int64_t total = 0, n
    cdef int token, part
    while p < end:
        token = p[0]
        p += 1
        for part in range(2):
            n = token & 15 if part else token >> 4
            if n == 15:
                while True:
                    if p == end:
                        return -1
                    n += p[0]
                    p += 1
                    if (p - 1)[0] != 255:
                        break
            total += n
            if part:
                total += 4
                break
            if n > end - p:
                return -1
            p += n
            if p == end:
                return total
            if end - p < 2:
                return -1
            p += 2
    return -1


cdef class Chunk:
    """One column chunk, read from its first row on; not safe to share between threads at the same time.

    Parameters
    ----------
    form : Form
    data : buffer
        The chunk's bytes from its first page on; kept.
    codec : int
    n_entries : int
        Values, nulls and empty lists of the whole chunk, as the footer says.
    decompress : callable
        ``decompress(codec, source, nbytes)`` for every codec but "none" and snappy: a buffer, or an exception.
    place : dict
        For errors: file, column, row group.
    """

    cdef Form form
    cdef const Shape *f
    cdef object data, decompress, place, page_owner, other_page_owner, flat_owner, dict_owner, span_owner
    cdef object lengths_owner, prefixes_owner
    cdef Output dictionary  # of the output that is being read into
    cdef const hb_decoders *k
    cdef int (*snappy)(const uint8_t *, int64_t, uint8_t *, int64_t) noexcept nogil
    cdef int codec
    cdef const uint8_t *base
    cdef const uint8_t *at
    cdef const uint8_t *end
    cdef int64_t entries_left  # behind the current page
    cdef readonly int64_t n_pages
    # buffers: a decompressed page, a page rewritten as PLAIN, the dictionary and the spans of its strings
    cdef Vec page, flat, dictionary_bytes, spans, lengths, prefixes
    cdef const uint8_t *dict_data  # items, or strings with their lengths
    cdef int64_t n_dict, code_base
    # the current page
    cdef int64_t page_entries  # behind the current window
    cdef hb_runs reps, defs, runs
    cdef bint is_dict, is_runs, is_short
    cdef const uint8_t *value_at
    cdef const uint8_t *value_end
    cdef int64_t bit_at
    # the current window
    cdef int64_t window_at, window_n
    cdef bint all_elements, all_valid, any_before, has_jumped
    cdef int last_def, levels_are, same_level
    cdef uint64_t *starts
    cdef uint64_t *elements
    cdef uint64_t *valid
    cdef uint64_t *nulls
    cdef uint32_t *rep_levels
    cdef uint32_t *def_levels

    def __cinit__(self, Form form, const uint8_t[::1] data, int codec, int64_t n_entries, decompress, dict place):
        self.form, self.data, self.codec, self.decompress, self.place = form, data, codec, decompress, place
        self.f = &form.shape
        self.k = kernels().decode
        self.snappy = kernels().snappy
        self.base = self.at = &data[0] if data.shape[0] else NULL
        self.end = self.at + data.shape[0]
        self.entries_left = n_entries
        if n_entries < 0:
            self.fail("the footer claims a negative number of values")
        if self.f.max_def:
            self.starts = <uint64_t *>malloc(4 * WORDS * 8)
            self.elements, self.valid = self.starts + WORDS, self.starts + 2 * WORDS
            self.nulls = self.starts + 3 * WORDS
        if self.f.max_rep > 1 or self.f.max_def >= 32:
            self.rep_levels = <uint32_t *>malloc(2 * UNPACKED_WINDOW * 4)
            self.def_levels = self.rep_levels + UNPACKED_WINDOW
        if self.f.max_def and self.starts == NULL or \
                (self.f.max_rep > 1 or self.f.max_def >= 32) and self.rep_levels == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.starts)
        free(self.rep_levels)

    cdef int fail(self, const char *problem) except -1 nogil:
        with gil:
            page = {"page": self.n_pages} if self.n_pages else {}
            raise Corrupt(problem.decode(), remedy=REWRITE, **self.place, **page)

    cdef int check(self, int64_t code) except -1 nogil:
        """Raise for a kernel's negative code."""
        if code == HB_E_END:
            return self.fail("a page ends too early")
        if code == HB_E_RANGE:
            return self.fail("an index or count is larger than the page allows")
        if code < 0:
            return self.fail("a page breaks its encoding")
        return 0

    cdef object take(self, Vec *v, int64_t nbytes, object owner):
        """A buffer of at least `nbytes` and slack for v, contents undefined; returns its owner."""
        cdef uint8_t[::1] view
        if v.data != NULL and nbytes <= v.capacity:
            return owner
        owner = shared.take(nbytes + HB_SLACK)
        view = owner
        v.data, v.capacity = &view[0], len(owner) - HB_SLACK
        return owner

    # ---- pages -------------------------------------------------------------------------------------------------------

    cdef int open_page(self) except -1 nogil:
        """Open the next data page; 0 at the end of the chunk."""
        cdef PageHeader h
        cdef const uint8_t *body
        while self.entries_left > 0:
            if self.has_jumped and self.at == self.end:
                self.entries_left = 0
                break
            self.n_pages += 1
            self.header(&h, &body)
            if h.kind != 1:
                self.check_crc(&h, body)
            if h.kind == 2:
                self.open_dictionary(&h, body)
            elif h.kind == 0 or h.kind == 3:
                if h.n_entries > 0:
                    self.entries_left -= h.n_entries
                    self.page_entries = h.n_entries
                    if h.kind == 0:
                        self.open_v1(&h, body)
                    else:
                        self.open_v2(&h, body)
                    return 1
        return 0

    cdef int header(self, PageHeader *h, const uint8_t **body) except -1 nogil:
        """The next page's header and where its body lies; the cursor moves behind it."""
        cdef Cursor c
        c.at, c.end, c.problem = self.at, self.end, NULL
        if c.at >= c.end:
            self.fail("the column chunk ends before all of its values")
        if read_page_header(&c, h) < 0:
            self.fail("a page header is damaged")
        if h.stored_nbytes < 0 or h.stored_nbytes > c.end - c.at:
            self.fail("a page reaches beyond its column chunk")
        if h.nbytes < 0:
            self.fail("a page has a negative size")
        if (h.kind == 0 or h.kind == 3) and (h.n_entries < 0 or h.n_entries > self.entries_left):
            self.fail("a page claims more values than are left in the column chunk")
        body[0] = c.at
        self.at = c.at + h.stored_nbytes
        if h.nbytes > _max_page and h.kind != 1:
            with gil:
                raise BudgetExceeded(f"a page claims {h.nbytes} bytes, more than {MAX_PAGE_NBYTES}",
                                     remedy="write smaller pages", page=self.n_pages, **self.place)
        return 0

    cdef int check_crc(self, PageHeader *h, const uint8_t *body) except -1 nogil:
        if h.crc >= 0:
            with gil:
                if zlib.crc32(PyMemoryView_FromMemory(<char *>body, h.stored_nbytes, PyBUF_READ)) != h.crc:
                    self.fail("a page's checksum is wrong")
        return 0

    cdef int skip_page(self, int64_t n_rows, int64_t *skipped) except -1 nogil:
        """Step over the next page without opening it, where its header shows that its rows are among the next n_rows;
        1 if so. SPEC: a page of version 2 begins with a row."""
        cdef PageHeader h
        cdef const uint8_t *before = self.at
        cdef const uint8_t *body
        if self.entries_left == 0 or self.at == self.end:
            return 0
        self.n_pages += 1
        self.header(&h, &body)
        if h.kind == 0 and self.f.max_rep == 0:
            h.n_rows = h.n_entries
        if (h.kind == 0 or h.kind == 3) and 0 <= h.n_rows <= n_rows and h.n_entries > 0 and \
                (self.f.max_rep == 0 or h.kind == 3):
            self.entries_left -= h.n_entries
            self.last_def, self.any_before = self.f.max_def, True
            skipped[0] += h.n_rows
            return 1
        self.at = before
        self.n_pages -= 1
        return 0

    def jump(self, int64_t offset, int64_t end):
        """Go on with the page at this byte of the chunk, which begins with a row; `end` is where the last page ends.

        The first page is opened before, if it is the dictionary.
        """
        cdef PageHeader h
        cdef const uint8_t *body
        cdef const uint8_t *base = self.base
        if self.n_pages == 0:
            self.n_pages = 1
            self.header(&h, &body)
            if h.kind == 2:
                self.check_crc(&h, body)
                self.open_dictionary(&h, body)
        if not self.at - base <= offset < end <= self.end - base:
            self.fail("the offset index points outside of the column chunk's pages")
        self.at, self.end = base + offset, base + end
        self.page_entries = self.window_at = self.window_n = 0
        self.last_def, self.any_before, self.has_jumped = self.f.max_def, False, True

    cdef const uint8_t *unpack(self, const uint8_t *source, int64_t stored, int64_t nbytes,
                               uint8_t *into) except? NULL nogil:
        """The page's bytes decompressed: into `into` where that is not NULL, else in memory that is good until the next
        page is opened."""
        cdef const uint8_t[::1] view
        cdef const uint8_t *out = NULL
        if nbytes == 0:
            return source
        if stored == 0:
            self.fail("a compressed page is empty")
        if self.codec == SNAPPY:
            if hb_snappy_length(source, stored) != nbytes or nbytes > MOST_OF_SNAPPY * stored:
                self.fail("a page decompresses to another size than it claims")
            if into == NULL:
                if self.page.capacity < nbytes:
                    with gil:
                        self.page_owner = self.take(&self.page, nbytes, self.page_owner)
                into = self.page.data
            if self.snappy(source, stored, into, nbytes):
                self.fail("a page's snappy data is damaged")
            return into
        if self.codec == LZ4_RAW and lz4_length(source, source + stored) != nbytes:
            self.fail("a page decompresses to another size than it claims")
        with gil:
            try:
                owner = self.decompress(self.codec, PyMemoryView_FromMemory(<char *>source, stored, PyBUF_READ), nbytes)
            except Exception as e:
                raise Corrupt(f"a page does not decompress: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
                              remedy=REWRITE, page=self.n_pages, **self.place) from e
            view = owner
            if view.shape[0] != nbytes:
                self.fail("a page decompresses to another size than it claims")
            out = &view[0]
            if into != NULL:
                memcpy(into, out, nbytes)
                out = into
            else:
                self.other_page_owner = owner
        return out

    cdef int body(self, const uint8_t *source, int64_t stored, int64_t nbytes, bint is_compressed,
                  const uint8_t **out) except -1 nogil:
        """The bytes of a page, decompressed if need be."""
        if self.codec == 0 or not is_compressed:
            if stored != nbytes:
                self.fail("an uncompressed page has two sizes")
            out[0] = source
            return 0
        out[0] = self.unpack(source, stored, nbytes, NULL)
        return 0

    cdef int open_v1(self, PageHeader *h, const uint8_t *source) except -1 nogil:
        cdef const uint8_t *p = NULL
        cdef const uint8_t *end
        self.body(source, h.stored_nbytes, h.nbytes, True, &p)
        end = p + h.nbytes
        if self.f.max_rep:
            p = self.levels_v1(&self.reps, p, end, self.f.rep_width, h.rep_encoding, h.n_entries)
        if self.f.max_def:
            p = self.levels_v1(&self.defs, p, end, self.f.def_width, h.def_encoding, h.n_entries)
        return self.open_values(h.encoding, p, end)

    cdef const uint8_t *levels_v1(self, hb_runs *r, const uint8_t *p, const uint8_t *end, int width, int64_t encoding,
                                  int64_t n) except? NULL nogil:
        """SPEC: the levels of a v1 page are RLE behind their length, or (deprecated) BIT_PACKED."""
        cdef uint32_t nbytes = 0
        if encoding == BIT_PACKED:  # one packed run without a header; least significant bit first, as its writers do
            nbytes = <uint32_t>((n * width + 7) // 8)
            if nbytes > <uint64_t>(end - p):
                self.fail("levels reach beyond their page")
            self.set_runs(r, p + nbytes, p + nbytes, width)
            r.packed, r.left = p, n
            return p + nbytes
        if encoding != RLE:
            self.fail("levels have an unknown encoding")
        if end - p < 4:
            self.fail("a page ends within its levels")
        memcpy(&nbytes, p, 4)
        p += 4
        if nbytes > <uint64_t>(end - p):
            self.fail("levels reach beyond their page")
        self.set_runs(r, p, p + nbytes, width)
        return p + nbytes

    cdef void set_runs(self, hb_runs *r, const uint8_t *at, const uint8_t *end, int width) noexcept nogil:
        r.at, r.end, r.packed, r.left, r.done, r.value, r.width = at, end, NULL, 0, 0, 0, width

    cdef int open_v2(self, PageHeader *h, const uint8_t *source) except -1 nogil:
        cdef const uint8_t *p = NULL
        cdef int64_t levels = h.rep_nbytes + h.def_nbytes
        if h.rep_nbytes < 0 or h.def_nbytes < 0 or h.rep_nbytes > h.stored_nbytes or \
                h.def_nbytes > h.stored_nbytes - h.rep_nbytes or levels > h.nbytes:
            self.fail("levels reach beyond their page")
        self.set_runs(&self.reps, source, source + h.rep_nbytes, self.f.rep_width)
        self.set_runs(&self.defs, source + h.rep_nbytes, source + levels, self.f.def_width)
        # SPEC: levels are never compressed; nothing is stored of an empty rest
        if h.nbytes == levels:
            return self.open_values(h.encoding, source + levels, source + levels)
        self.body(source + levels, h.stored_nbytes - levels, h.nbytes - levels, h.is_compressed, &p)
        return self.open_values(h.encoding, p, p + h.nbytes - levels)

    cdef int open_values(self, int64_t encoding, const uint8_t *p, const uint8_t *end) except -1 nogil:
        cdef uint32_t nbytes = 0
        cdef int physical = self.f.physical
        self.is_dict = self.is_runs = False
        self.bit_at = 0
        self.value_at, self.value_end = p, end
        if encoding == PLAIN:
            return 0
        if encoding == PLAIN_DICTIONARY or encoding == RLE_DICTIONARY:
            self.is_dict = True
            if p == end:  # all null
                self.set_runs(&self.runs, p, end, 0)
                return 0
            if p[0] > 32:
                self.fail("dictionary indices are wider than 32 bits")
            self.set_runs(&self.runs, p + 1, end, p[0])
        elif encoding == RLE and physical == BOOLEAN:
            if p != end:
                if end - p < 4:
                    self.fail("a page ends too early")
                memcpy(&nbytes, p, 4)
                if nbytes > <uint64_t>(end - p - 4):
                    self.fail("booleans reach beyond their page")
                end = p + 4 + nbytes
                p += 4
            self.is_runs = True
            self.set_runs(&self.runs, p, end, 1)
        elif encoding == DELTA_BINARY_PACKED and (physical == INT32 or physical == INT64):
            self.rewrite_delta(p, end)
        elif (encoding == DELTA_LENGTH_BYTE_ARRAY and physical == BYTE_ARRAY) or \
                (encoding == DELTA_BYTE_ARRAY and (physical == BYTE_ARRAY or physical == FIXED)):
            self.rewrite_strings(p, end, encoding == DELTA_BYTE_ARRAY)
        elif encoding == BYTE_STREAM_SPLIT and self.f.width > 0:
            if (end - p) % self.f.width:
                self.fail("a page ends within a value")
            self.flat_room(end - p)
            self.k.unsplit(p, (end - p) // self.f.width, self.f.width, self.flat.data)
            self.value_at, self.value_end = self.flat.data, self.flat.data + (end - p)
        elif 0 <= encoding <= BYTE_STREAM_SPLIT:
            self.fail("a page's encoding does not suit the column's type")
        else:
            with gil:
                raise Unsupported(f"encoding {encoding} is not in the format", remedy=REWRITE, page=self.n_pages,
                                  **self.place)
        return 0

    cdef int flat_room(self, int64_t nbytes) except -1 nogil:
        if nbytes > _max_page:
            with gil:
                raise BudgetExceeded(f"a page decodes to {nbytes} bytes, more than {MAX_PAGE_NBYTES}",
                                     remedy="write smaller pages", page=self.n_pages, **self.place)
        if self.flat.data == NULL or self.flat.capacity < nbytes:
            with gil:
                self.flat_owner = self.take(&self.flat, nbytes, self.flat_owner)
        return 0

    cdef int64_t count_delta(self, const uint8_t *p, const uint8_t *end) except -1 nogil:
        """How many integers a delta-encoded run claims: its third number."""
        cdef uint64_t value = 0
        cdef int _i, shift
        for _i in range(3):
            value, shift = 0, 0
            while True:
                if p >= end or shift > 56:
                    self.fail("a delta header is damaged")
                value |= <uint64_t>(p[0] & 127) << shift
                shift += 7
                p += 1
                if (p - 1)[0] < 128:
                    break
        if value > <uint64_t>self.page_entries:
            self.fail("a page holds more values than it claims")
        return <int64_t>value

    cdef int rewrite_delta(self, const uint8_t *p, const uint8_t *end) except -1 nogil:
        cdef int64_t n = self.count_delta(p, end), count = 0
        self.flat_room(n * self.f.width)
        self.check(self.k.delta(p, end, n, self.f.width, self.flat.data, &count))
        self.value_at, self.value_end = self.flat.data, self.flat.data + n * self.f.width
        return 0

    cdef int rewrite_strings(self, const uint8_t *p, const uint8_t *end, bint has_prefixes) except -1 nogil:
        """SPEC: DELTA_LENGTH_BYTE_ARRAY is all lengths, then all bytes; DELTA_BYTE_ARRAY has before them the length of
        the prefix that each value shares with the one before."""
        cdef int64_t n = self.count_delta(p, end), count = 0, used, total = 0, i, prefix = 0, size = 0
        cdef bint is_fixed = self.f.physical == FIXED
        cdef int32_t *prefixes = NULL
        cdef int32_t *lengths = NULL
        cdef uint8_t *to
        cdef uint8_t *last = NULL
        self.flat_room(4 * n)  # or raise
        with gil:
            self.lengths_owner = self.take(&self.lengths, 4 * n, self.lengths_owner)
            if has_prefixes:
                self.prefixes_owner = self.take(&self.prefixes, 4 * n, self.prefixes_owner)
        lengths, prefixes = <int32_t *>self.lengths.data, <int32_t *>self.prefixes.data
        if has_prefixes:
            used = self.k.delta(p, end, n, 4, prefixes, &count)
            self.check(used)
            p += used
            if self.count_delta(p, end) != n:
                self.fail("prefixes and suffixes differ in number")
        used = self.k.delta(p, end, n, 4, lengths, &count)
        self.check(used)
        p += used
        for i in range(n):
            prefix = prefixes[i] if has_prefixes else 0
            if lengths[i] < 0 or lengths[i] > end - p or prefix < 0 or prefix > size:
                self.fail("a string is longer than its page, or shares more than there is")
            size = prefix + lengths[i]
            if is_fixed and size != self.f.type_length:
                self.fail("a value does not have the column's length")
            total += size + (0 if is_fixed else 4)
            if total > _max_page:
                break  # flat_room raises
        self.flat_room(total)
        to = self.flat.data
        for i in range(n):
            prefix = prefixes[i] if has_prefixes else 0
            size = prefix + lengths[i]
            if lengths[i] > end - p:
                self.fail("strings reach beyond their page")
            if not is_fixed:
                memcpy(to, &size, 4)
                to += 4
            if prefix:
                memcpy(to, last, prefix)
            memcpy(to + prefix, p, lengths[i])
            last = to
            to += size
            p += lengths[i]
        self.value_at, self.value_end = self.flat.data, to
        return 0

    # ---- dictionaries ------------------------------------------------------------------------------------------------

    cdef int open_dictionary(self, PageHeader *h, const uint8_t *source) except -1 nogil:
        """SPEC: the dictionary page comes before all data pages, in PLAIN."""
        cdef const uint8_t *p = NULL
        cdef int64_t n = h.n_entries, i, width = self.f.width, used
        cdef uint32_t size = 0
        cdef hb_span *span
        if self.n_dict >= 0 and self.dict_data != NULL:
            self.fail("the column chunk has two dictionaries")
        if h.encoding != PLAIN and h.encoding != PLAIN_DICTIONARY:
            self.fail("the dictionary has an encoding other than PLAIN")
        if n < 0 or (width and n > h.nbytes // width) or (self.f.physical == BYTE_ARRAY and n > h.nbytes // 4):
            self.fail("the dictionary claims more entries than its bytes hold")
        if self.f.physical == BOOLEAN:
            self.fail("booleans have no dictionary")
        # decompressed into a buffer of its own, since pages follow while it is in use
        with gil:
            self.dict_owner = self.take(&self.dictionary_bytes, h.nbytes, None)
        if self.codec == 0:
            if h.stored_nbytes != h.nbytes:
                self.fail("an uncompressed page has two sizes")
            memcpy(self.dictionary_bytes.data, source, h.nbytes)
        else:
            self.unpack(source, h.stored_nbytes, h.nbytes, self.dictionary_bytes.data)
        memset(self.dictionary_bytes.data + h.nbytes, 0, HB_SLACK)
        self.n_dict, self.dict_data = n, self.dictionary_bytes.data
        p = self.dict_data
        if self.dictionary is not None:
            self.value_at, self.value_end = p, p + h.nbytes
            self.is_dict = self.is_runs = False
            self.code_base = self.dictionary.n_values
            return self.append(n, self.dictionary)
        if self.f.convert == COPY:
            return 0
        if self.f.convert == STRINGS:
            with gil:
                self.span_owner = self.take(&self.spans, n * sizeof(hb_short), None)
            used = HB_E_RANGE if width else self.k.strings_short(p, p + h.nbytes, n, <hb_short *>self.spans.data)
            self.is_short = used >= 0
            if used != HB_E_RANGE:
                return self.check(used)
            span = <hb_span *>self.spans.data
            if width:
                for i in range(n):
                    span[i].at, span[i].n = <uint32_t>(i * width), <uint32_t>width
                return 0
            for i in range(n):
                if h.nbytes - (p - self.dict_data) < 4:
                    self.fail("the dictionary ends too early")
                memcpy(&size, p, 4)
                p += 4
                if size > h.nbytes - (p - self.dict_data):
                    self.fail("the dictionary ends too early")
                span[i].at, span[i].n = <uint32_t>(p - self.dict_data), size
                p += size
            return 0
        # converted once for each entry
        with gil:
            self.span_owner = self.take(&self.spans, n * self.f.item, None)
        self.convert(&p, p + h.nbytes, n, self.spans.data)
        self.dict_data = self.spans.data
        return 0

    # ---- values ------------------------------------------------------------------------------------------------------

    cdef int convert(self, const uint8_t **at, const uint8_t *end, int64_t n, uint8_t *out) except -1 nogil:
        """n values of PLAIN from at[0] on, converted to `item` bytes each; moves at[0]."""
        cdef const uint8_t *p = at[0]
        cdef const Shape *f = self.f
        cdef int64_t i, used, width = f.width
        cdef uint64_t x
        cdef int32_t word = 0
        cdef uint32_t size = 0
        cdef int unused
        if width and n > (end - p) // width:
            self.fail("a page holds fewer values than it claims")
        if f.convert == COPY:
            memcpy(out, p, n * width)
        elif f.convert == RESIZE:
            self.resize(p, n, out)
        elif f.convert == HASH_INT and (f.physical == INT32 or f.physical == INT64):
            unused = 64 - f.bits
            for i in range(n):
                if width == 8:
                    memcpy(&x, p + 8 * i, 8)
                else:
                    memcpy(&word, p + 4 * i, 4)
                    x = <uint64_t><int64_t>word
                x = x << unused
                x = <uint64_t>(<int64_t>x >> unused) if f.is_signed else x >> unused
                x = hb_xxh64(<const uint8_t *>&x, 8, f.seed)
                memcpy(out + 8 * i, &x, 8)
        elif f.physical == BYTE_ARRAY and f.convert == HASH_BYTES:
            used = self.k.strings_hash(p, end, n, f.seed, <int64_t *>out)
            self.check(used)
            at[0] = p + used
            return 0
        elif f.convert == HASH_BYTES:
            for i in range(n):
                x = hb_xxh64(p + i * width, width, f.seed)
                memcpy(out + 8 * i, &x, 8)
        elif f.physical == BYTE_ARRAY:
            for i in range(n):
                if end - p < 4:
                    self.fail("a page holds fewer values than it claims")
                memcpy(&size, p, 4)
                p += 4
                if size > <uint64_t>(end - p):
                    self.fail("a value reaches beyond its page")
                self.decimal(p, size, out + 8 * i)
                p += size
            at[0] = p
            return 0
        else:
            for i in range(n):
                self.decimal(p + i * width, width, out + 8 * i)
        at[0] = p + n * width
        return 0

    cdef void resize(self, const uint8_t *p, int64_t n, uint8_t *out) noexcept nogil:
        cdef int32_t words[BLOCK]
        cdef int64_t i = 0, m
        while i < n:  # through aligned memory
            m = min(n - i, <int64_t>BLOCK)
            memcpy(words, p + 4 * i, 4 * m)
            self.k.resize4(words, m, self.f.item, out + i * self.f.item)
            i += m

    cdef int decimal(self, const uint8_t *p, int64_t n, uint8_t *out) except -1 nogil:
        """SPEC: the unscaled value in two's complement, most significant byte first."""
        cdef uint64_t x
        cdef int64_t i
        if n == 0:
            self.fail("a decimal has no digits")
        x = <uint64_t>-<int64_t>(p[0] >> 7)
        for i in range(n):
            if i < n - 8 and p[i] != (p[0] >> 7) * 255:
                self.fail("a decimal has more digits than its column allows")
            x = x << 8 | p[i]
        if n > 8 and (x >> 63) != (p[0] >> 7):
            self.fail("a decimal has more digits than its column allows")
        if self.f.convert == HASH_INT:
            x = hb_xxh64(<const uint8_t *>&x, 8, self.f.seed)
        memcpy(out, &x, 8)
        return 0

    cdef int values(self, int64_t n, uint8_t *out, bint past_cache) except -1 nogil:
        """The next n values of the page, of fixed width, into out (with slack)."""
        cdef uint32_t codes[UNPACKED]
        cdef int64_t done = 0, m, i, item = self.f.item
        cdef int e
        if not self.is_dict and not self.is_runs:
            if self.f.physical == BOOLEAN:
                if self.bit_at + n > 8 * (self.value_end - self.value_at):
                    self.fail("a page holds fewer values than it claims")
                self.k.bits_to_bytes(self.value_at, self.bit_at, n, out)
                self.bit_at += n
                return 0
            if past_cache and self.f.convert == COPY and n <= (self.value_end - self.value_at) // item:
                self.k.copy_past_cache(out, self.value_at, n * item)
                self.value_at += n * item
                return 0
            return self.convert(&self.value_at, self.value_end, n, out)
        if self.is_dict and self.dict_data == NULL:
            self.fail("a page refers to a dictionary that is not there")
        while done < n:
            m = min(n - done, <int64_t>HB_CODES)
            e = self.k.runs_read(&self.runs, codes, m)
            self.check(e)
            if self.is_runs:
                for i in range(m):
                    out[done + i] = <uint8_t>codes[i]
            elif item == 8 and past_cache:
                e = self.k.gather8_past_cache(codes, m, <const uint64_t *>self.dict_data, self.n_dict,
                                              <uint64_t *>out + done)
            elif item == 4 and past_cache:
                e = self.k.gather4_past_cache(codes, m, <const uint32_t *>self.dict_data, self.n_dict,
                                              <uint32_t *>out + done)
            elif item == 8:
                e = self.k.gather8(codes, m, <const uint64_t *>self.dict_data, self.n_dict, <uint64_t *>out + done)
            elif item == 4:
                e = self.k.gather4(codes, m, <const uint32_t *>self.dict_data, self.n_dict, <uint32_t *>out + done)
            elif item == 2:
                e = self.k.gather2(codes, m, <const uint16_t *>self.dict_data, self.n_dict, <uint16_t *>out + done)
            else:
                e = self.k.gather1(codes, m, self.dict_data, self.n_dict, out + done)
            self.check(e)
            done += m
        return 0

    cdef int codes(self, int64_t n, uint8_t *out) except -1 nogil:
        """As `values`, but positions in self.dictionary; what is in no dictionary is appended to it."""
        cdef uint32_t codes[UNPACKED]
        cdef int64_t done = 0, m, i, first
        cdef uint32_t *to = <uint32_t *>out
        if not self.is_dict:
            first = self.dictionary.n_values
            self.append(n, self.dictionary)
            for i in range(n):
                to[i] = <uint32_t>(first + i)
            return 0
        if self.dict_data == NULL:
            self.fail("a page refers to a dictionary that is not there")
        while done < n:
            m = min(n - done, <int64_t>HB_CODES)
            self.check(self.k.runs_read(&self.runs, codes, m))
            for i in range(m):
                if codes[i] >= self.n_dict:
                    self.check(HB_E_RANGE)
                to[done + i] = <uint32_t>(codes[i] + self.code_base)
            done += m
        return 0

    cdef int append(self, int64_t n, Output out) except -1 nogil:
        """The next n values of the page behind those of the output, no null among them."""
        if n == 0:
            return 0
        if out.is_text:
            self.strings(n, out)
        else:
            out.room(VALUES, out.n_values * out.item, n * out.item)
            if self.dictionary is not None and out is not self.dictionary:
                self.codes(n, out.vecs[VALUES].data + 4 * out.n_values)
            else:
                self.values(n, out.vecs[VALUES].data + out.n_values * out.item, out.past_cache)
        out.n_values += n
        return 0

    cdef int strings(self, int64_t n, Output out) except -1 nogil:
        """The next n strings of the page; the caller counts them."""
        cdef uint32_t codes[UNPACKED]
        cdef int64_t done = 0, m, i, used, size, width = self.f.width
        cdef int64_t *ends
        out.room(ENDS, 8 * (out.n_values + 1), 8 * n)
        ends = <int64_t *>out.vecs[ENDS].data + out.n_values
        if not self.is_dict:
            size = self.value_end - self.value_at
            if width:
                if n > size // width:
                    self.fail("a page holds fewer values than it claims")
                size = n * width
            elif ends[0] + size > out.limit:  # the rest of the page is more than may be had: ask how much it is
                self.check(self.k.strings_plain(self.value_at, self.value_end, n, ends, NULL))
                size = ends[n] - ends[0]
            out.room(VALUES, ends[0], size)
            if not width:
                used = self.k.strings_plain(self.value_at, self.value_end, n, ends, out.vecs[VALUES].data)
                self.check(used)
                self.value_at += used
                return 0
            memcpy(out.vecs[VALUES].data + ends[0], self.value_at, size)
            for i in range(n):
                ends[i + 1] = ends[i] + width
            self.value_at += size
            return 0
        if self.dict_data == NULL:
            self.fail("a page refers to a dictionary that is not there")
        while done < n:
            m = min(n - done, <int64_t>HB_CODES)
            self.check(self.k.runs_read(&self.runs, codes, m))
            if self.is_short:
                out.room(VALUES, ends[done], m * HB_SHORT)
                self.check(self.k.strings_gather_short(codes, m, <hb_short *>self.spans.data, self.n_dict, ends + done,
                                                       out.vecs[VALUES].data))
                done += m
                continue
            size = self.k.strings_size(codes, m, <hb_span *>self.spans.data, self.n_dict)
            self.check(size)
            out.room(VALUES, ends[done], size)
            self.k.strings_gather(codes, m, <hb_span *>self.spans.data, self.dict_data, ends + done,
                                  out.vecs[VALUES].data)
            done += m
        return 0

    cdef int skip_values(self, int64_t n) except -1 nogil:
        """Step over values of the page."""
        cdef int64_t ends[BLOCK + 1]
        cdef int64_t m, used
        if self.is_dict or self.is_runs:
            return self.check(self.k.runs_skip(&self.runs, n))
        if self.f.physical == BOOLEAN:
            self.bit_at += n
        elif self.f.physical == BYTE_ARRAY:
            ends[0] = 0
            while n:
                m = min(n, <int64_t>BLOCK)
                used = self.k.strings_plain(self.value_at, self.value_end, m, ends, NULL)
                self.check(used)
                self.value_at += used
                n -= m
        else:
            if n > (self.value_end - self.value_at) // self.f.width:
                self.fail("a page holds fewer values than it claims")
            self.value_at += n * self.f.width
        return 0

    cdef int append_with_nulls(self, int64_t a, int64_t b, Output out) except -1 nogil:
        """Values for the window's entries a..b-1 that are elements; the form's fill for those that are null."""
        cdef uint64_t dense[BLOCK + 8]
        cdef int64_t z, m, n_slots
        cdef const uint64_t *slots = NULL if self.all_elements else self.elements
        while a < b:
            z = min(a + BLOCK, b)
            m = self.k.count_bits(self.valid, a, z)
            n_slots = self.k.count_bits(slots, a, z) if slots != NULL else z - a
            if out.with_mask:
                out.room(MASK, out.n_values, n_slots)
                memset(dense, 1, m)
                self.k.expand(slots, self.valid, a, z, dense, 1, 0, out.vecs[MASK].data + out.n_values, 0)
            if out.is_text:
                self.strings_with_nulls(slots, a, z, m, n_slots, out)
            else:
                if self.dictionary is not None:
                    self.codes(m, <uint8_t *>dense)
                else:
                    self.values(m, <uint8_t *>dense, False)
                out.room(VALUES, out.n_values * out.item, n_slots * out.item)
                self.k.expand(slots, self.valid, a, z, dense, out.item,
                              0 if self.dictionary is not None else self.f.fill,
                              out.vecs[VALUES].data + out.n_values * out.item, out.past_cache)
                out.n_values += n_slots
            a = z
        return 0

    cdef int strings_with_nulls(self, const uint64_t *slots, int64_t a, int64_t z, int64_t m, int64_t n_slots,
                                Output out) except -1 nogil:
        """The strings are appended without the nulls, then spread from the last one on."""
        cdef int64_t first = out.n_values, fill = self.f.fill_nbytes, i, j, k, at, size
        cdef int64_t *ends
        cdef uint8_t *to
        self.strings(m, out)
        out.room(ENDS, 8 * (first + m + 1), 8 * (n_slots - m))
        ends = <int64_t *>out.vecs[ENDS].data + first
        out.room(VALUES, ends[m], fill * (n_slots - m))
        to = out.vecs[VALUES].data
        at = ends[m] + fill * (n_slots - m)
        j, k = m, n_slots
        for i in range(z - 1, a - 1, -1):
            if slots != NULL and not slots[i >> 6] >> (i & 63) & 1:
                continue
            # ends[j] still is where the j-th dense string ends: j <= k, and k is written after j was read
            if self.valid[i >> 6] >> (i & 63) & 1:
                size = ends[j] - ends[j - 1]
                if fill and size:
                    self.move(to, at - size, ends[j - 1], size)
                j -= 1
                ends[k] = at
                at -= size
            else:
                ends[k] = at
                at -= fill
                memcpy(to + at, self.f.fill_bytes, fill)
            k -= 1
        out.n_values = first + n_slots
        return 0

    cdef void move(self, uint8_t *base, int64_t to, int64_t at, int64_t n) noexcept nogil:
        """memmove to a higher place."""
        cdef int64_t i
        if to != at:
            for i in range(n - 1, -1, -1):
                base[to + i] = base[at + i]

    # ---- levels ------------------------------------------------------------------------------------------------------

    cdef int open_window(self) except -1 nogil:
        """Decode the levels of the next entries; 0 at the end of the chunk."""
        cdef int64_t n, i
        cdef uint64_t carry, bits
        cdef const Shape *f = self.f
        cdef bint is_first = not self.any_before
        if self.page_entries == 0 and not self.open_page():
            return 0
        n = min(self.page_entries, <int64_t>WINDOW)
        self.page_entries -= n
        self.window_at, self.window_n = 0, n
        self.any_before = True
        if f.max_rep > 1:
            self.check(self.k.runs_read(&self.reps, self.rep_levels, n))
            self.check(self.k.runs_read(&self.defs, self.def_levels, n))
            if is_first and self.rep_levels[0]:
                self.fail("the first row does not start with the first value")
            return 1
        self.open_defs(n)
        if f.max_rep:
            self.check(self.k.runs_bits(&self.reps, self.starts, n))
            for i in range((n + 63) // 64):
                self.starts[i] = ~self.starts[i]
            if n & 63:
                self.starts[n // 64] &= (<uint64_t>1 << (n & 63)) - 1
            if is_first and not self.starts[0] & 1:
                self.fail("the first row does not start with the first value")
            if not self.all_elements:
                # only a list that has an element goes on
                carry = self.last_def >= f.thresholds[1]
                for i in range((n + 63) // 64):
                    bits = self.starts[i] | self.elements[i] << 1 | carry
                    carry = self.elements[i] >> 63
                    if n - 64 * i < 64:
                        bits |= ~<uint64_t>0 << (n & 63)
                    if bits != ~<uint64_t>0:
                        self.fail("an empty list goes on")
            elif not is_first and self.last_def < f.thresholds[1] and not self.starts[0] & 1:
                self.fail("an empty list goes on")
            self.last_def = f.max_def if self.elements[(n - 1) // 64] >> ((n - 1) & 63) & 1 or self.all_elements else 0
        if f.null == NULL_EMPTY and not self.all_valid:
            self.all_elements = False
            memcpy(self.elements, self.valid, WORDS * 8)
        elif f.null == NULL_EMPTY:
            # nulls are none, but lists may be empty: then not all were valid
            self.all_elements = True
        return 1

    cdef int open_defs(self, int64_t n) except -1 nogil:
        """Which of the next n entries are elements, and which are valid: the bitmaps, or that all are."""
        cdef const Shape *f = self.f
        cdef uint32_t level = 0
        cdef int least = f.thresholds[1] if f.max_rep else 0
        cdef int same = 1
        if f.max_def:
            same = self.k.runs_same(&self.defs, n, &level)
            self.check(same)
        else:
            level = 0
        if same:
            if level > <uint32_t>f.max_def:
                self.fail("a definition level is beyond the schema's")
            self.all_elements = level >= <uint32_t>least
            self.all_valid = level == <uint32_t>f.max_def
            if not self.all_elements:
                memset(self.elements, 0, WORDS * 8)
            if not self.all_valid:
                memset(self.valid, 0, WORDS * 8)
            self.same_level = <int>level
            self.levels_are = SAME
            return 0
        if f.def_width == 1:
            self.check(self.k.runs_bits(&self.defs, self.valid, n))
            self.all_valid = self.k.count_bits(self.valid, 0, n) == n
            self.all_elements = least == 0 or self.all_valid
            if not self.all_elements:
                memcpy(self.elements, self.valid, WORDS * 8)
            self.levels_are = BITS
            return 0
        if f.max_def < 32:
            self.check(self.k.runs_levels(&self.defs, n, least, f.max_def, f.null_levels, self.elements, self.valid,
                                          self.nulls if f.null == NULL_ERROR else NULL))
            self.levels_are = MANY
        else:
            self.check(self.k.runs_read(&self.defs, self.def_levels, n))
            if self.k.at_least(self.def_levels, n, f.max_def, self.valid) > <uint32_t>f.max_def:
                self.fail("a definition level is beyond the schema's")
            self.k.at_least(self.def_levels, n, least, self.elements)
            self.levels_are = NUMBERS
        self.all_valid = self.k.count_bits(self.valid, 0, n) == n
        self.all_elements = least == 0 or self.k.count_bits(self.elements, 0, n) == n
        return 0

    cdef int64_t nulls_between(self, int64_t a, int64_t b) noexcept nogil:
        """Nulls among the window's entries a..b-1, lists and structures included."""
        cdef int64_t i, n = 0
        if self.all_valid:
            return 0
        if self.levels_are == SAME:
            return (b - a) * self.f.is_null[self.same_level]
        if self.levels_are == BITS:
            return (b - a - self.k.count_bits(self.valid, a, b)) * self.f.is_null[0]
        if self.levels_are == MANY:
            return self.k.count_bits(self.nulls, a, b)
        for i in range(a, b):
            if self.def_levels[i] < <uint32_t>self.f.max_def:
                n += self.f.is_null[self.def_levels[i]]
        return n

    # ---- rows --------------------------------------------------------------------------------------------------------

    cdef int bind(self, Output out) except -1:
        if out.dictionary is not self.dictionary:
            if self.n_pages:
                raise InvalidArgument("the chunk was begun with another dictionary", remedy="read it with one output")
            self.dictionary = out.dictionary
        return 0

    def read(self, int64_t n_rows, Output out):
        """Append the next n_rows rows.

        Raises
        ------
        Corrupt
            The bytes break the format, or hold fewer rows.
        Unsupported, BudgetExceeded
        """
        cdef int64_t done
        self.bind(out)
        try:
            with nogil:
                done = self.rows(n_rows, out)
        except BudgetExceeded as e:
            raise BudgetExceeded(e.problem, remedy=e.remedy, **self.place) from None
        if done < n_rows:
            self.fail("the column chunk holds fewer rows than its row group")

    def read_masked(self, const uint8_t[::1] mask, Output out):
        """Append those of the next len(mask) rows whose byte is not 0; the others are stepped over.

        Raises
        ------
        HbkitError
            As `read`.
        """
        cdef int64_t a = 0, b, n = mask.shape[0], done = 0
        self.bind(out)
        try:
            with nogil:
                while a < n:
                    b = a + 1
                    while b < n and (mask[b] != 0) == (mask[a] != 0):
                        b += 1
                    done += self.rows(b - a, out) if mask[a] else self.skip_rows(b - a)
                    a = b
        except BudgetExceeded as e:
            raise BudgetExceeded(e.problem, remedy=e.remedy, **self.place) from None
        if done < n:
            self.fail("the column chunk holds fewer rows than its row group")

    def skip(self, int64_t n_rows):
        """Step over the next n_rows rows."""
        cdef int64_t done
        with nogil:
            done = self.skip_rows(n_rows)
        if done < n_rows:
            self.fail("the column chunk holds fewer rows than its row group")

    def finish(self):
        """Raise Corrupt unless all rows were read."""
        if self.window_at < self.window_n or self.page_entries or (
                self.entries_left and not (self.has_jumped and self.at == self.end)):
            self.fail("the column chunk holds more rows than its row group")

    cdef int64_t rows(self, int64_t n_rows, Output out) except -1 nogil:
        cdef int64_t row = 0, p, n_slots, n_valid
        cdef int64_t *splits = NULL
        cdef bint is_ragged = self.f.is_ragged
        if self.f.max_rep > 1:
            return self.nested(n_rows, out)
        if is_ragged:
            out.room(SPLITS, 8 * (out.n_rows + 1), 8 * min(n_rows, out.limit))  # n_rows is a claim: of any size
            splits = <int64_t *>out.vecs[SPLITS].data + out.n_rows
        while True:
            if self.window_at == self.window_n:
                if not self.f.max_rep and row == n_rows:
                    break
                if not self.open_window():
                    break
            if self.f.max_rep:
                p = self.k.row_starts(self.starts, NULL if self.all_elements else self.elements, self.window_at,
                                      self.window_n, n_rows, out.n_values, &row, splits)
            else:
                p = min(self.window_at + n_rows - row, self.window_n)
                if is_ragged:
                    self.flat_splits(self.window_at, p, out.n_values, splits + row)
                row += p - self.window_at
            if p > self.window_at:
                if self.f.null == NULL_ERROR:
                    out.n_nulls += self.nulls_between(self.window_at, p)
                if self.all_valid:
                    n_slots = n_valid = p - self.window_at
                else:
                    n_valid = self.k.count_bits(self.valid, self.window_at, p)
                    n_slots = p - self.window_at if self.all_elements else \
                        self.k.count_bits(self.elements, self.window_at, p)
                if n_slots == n_valid:
                    if out.with_mask:
                        out.room(MASK, out.n_values, n_slots)
                        memset(out.vecs[MASK].data + out.n_values, 1, n_slots)
                    self.append(n_valid, out)
                else:
                    self.append_with_nulls(self.window_at, p, out)
            self.window_at = p
            if p < self.window_n:
                break
        if is_ragged:
            splits[row] = out.n_values
            out.n_items[1] = out.n_values
        out.n_rows += row
        return row

    cdef void flat_splits(self, int64_t a, int64_t b, int64_t base, int64_t *out) noexcept nogil:
        """Where each row starts if every entry is a row of its value, or empty."""
        cdef int64_t i
        for i in range(a, b):
            out[i - a] = base
            base += 1 if self.all_valid else self.valid[i >> 6] >> (i & 63) & 1

    cdef int64_t skip_rows(self, int64_t n_rows) except -1 nogil:
        cdef int64_t splits[WINDOW + 1]
        cdef int64_t row = 0, p, i
        cdef uint32_t level
        while True:
            if self.window_at == self.window_n:
                if not self.f.max_rep and row == n_rows:
                    break
                if self.page_entries == 0 and row < n_rows and self.skip_page(n_rows - row, &row):
                    continue
                if not self.open_window():
                    break
            if self.f.max_rep > 1:
                p = self.window_at
                i = 0
                while p < self.window_n:
                    if self.rep_levels[p] == 0:
                        if row == n_rows:
                            break
                        row += 1
                    level = self.def_levels[p]
                    if level > <uint32_t>self.f.max_def or self.rep_levels[p] > <uint32_t>self.f.max_rep:
                        self.fail("a level is beyond the schema's")
                    i += level == <uint32_t>self.f.max_def
                    p += 1
                self.last_def = <int>self.def_levels[p - 1] if p > self.window_at else self.last_def
                self.skip_values(i)
            else:
                if self.f.max_rep:
                    i = 0
                    p = self.k.row_starts(self.starts, NULL, self.window_at, self.window_n, n_rows - row, 0, &i, splits)
                    row += i
                else:
                    p = min(self.window_at + n_rows - row, self.window_n)
                    row += p - self.window_at
                self.skip_values(p - self.window_at if self.all_valid else
                                 self.k.count_bits(self.valid, self.window_at, p))
            self.window_at = p
            if p < self.window_n:
                break
        return row

    cdef int64_t nested(self, int64_t n_rows, Output out) except -1 nogil:
        """Lists of lists. An entry of repetition level r and definition level d starts a new item at each level j >= r
        whose threshold d reaches; level 0 are the rows, the last level the values."""
        cdef const Shape *f = self.f
        cdef int64_t row = 0, i, n, a, b, m
        cdef int j, depth = f.max_rep
        cdef uint32_t r, d
        cdef bint is_valid
        while True:
            if self.window_at == self.window_n and not self.open_window():
                break
            a, n = self.window_at, self.window_n
            for j in range(depth):
                m = out.n_rows + row if j == 0 else out.n_items[j]
                out.room(SPLITS + j, 8 * (m + 1), 8 * (n - a + 1))
            memset(self.elements, 0, WORDS * 8)
            memset(self.valid, 0, WORDS * 8)
            i = a
            while i < n:
                r, d = self.rep_levels[i], self.def_levels[i]
                if r == 0 and row == n_rows:
                    break
                if r > <uint32_t>depth or d > <uint32_t>f.max_def:
                    self.fail("a level is beyond the schema's")
                if r and self.last_def < f.thresholds[r]:
                    self.fail("an empty list goes on")
                self.last_def = <int>d
                j = <int>r
                while j <= depth and d >= <uint32_t>f.thresholds[j]:
                    if j == depth:
                        is_valid = d == <uint32_t>f.max_def
                        if is_valid or f.null != NULL_EMPTY:
                            out.n_items[j] += 1
                            self.elements[i >> 6] |= <uint64_t>1 << (i & 63)
                        if is_valid:
                            self.valid[i >> 6] |= <uint64_t>1 << (i & 63)
                    else:
                        m = out.n_rows + row if j == 0 else out.n_items[j]
                        (<int64_t *>out.vecs[SPLITS + j].data)[m] = out.n_items[j + 1]
                        if j == 0:
                            row += 1
                        else:
                            out.n_items[j] += 1
                    j += 1
                if d < <uint32_t>f.max_def and f.null == NULL_ERROR and f.is_null[d]:
                    out.n_nulls += 1
                i += 1
            self.all_elements = self.all_valid = False
            b = self.k.count_bits(self.valid, a, i)
            if b == self.k.count_bits(self.elements, a, i):
                if out.with_mask:
                    out.room(MASK, out.n_values, b)
                    memset(out.vecs[MASK].data + out.n_values, 1, b)
                self.append(b, out)
            else:
                self.append_with_nulls(a, i, out)
            self.window_at = i
            if i < n:
                break
        out.n_rows += row
        for j in range(depth):
            m = out.n_rows if j == 0 else out.n_items[j]
            out.room(SPLITS + j, 8 * (m + 1), 0)
            (<int64_t *>out.vecs[SPLITS + j].data)[m] = out.n_items[j + 1]
        return row
