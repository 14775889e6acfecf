"""Thrift's compact protocol, as far as Parquet uses it: the footer, page headers and page indexes.

Nothing is trusted. The cursor knows where its bytes end; once something is wrong it stays wrong, and every read gives
0, so that loops end. Nesting is bounded; a declared count allocates nothing (elements are read one by one until the
bytes end). Structures are small state machines over field numbers; fields that nobody asks for are skipped.
SPEC: thrift-compact-protocol.md; parquet.thrift
"""

from libc.stdint cimport int16_t, int64_t, uint64_t, uint8_t

import numpy as np

cdef enum:
    MAX_NESTING = 32  # of structures: the format itself needs 8

cdef enum:
    TRUE = 1
    FALSE = 2
    BYTE = 3
    I16 = 4
    I32 = 5
    I64 = 6
    DOUBLE = 7
    BINARY = 8
    LIST = 9
    SET = 10
    MAP = 11
    STRUCT = 12
    UUID = 13


cdef int _fail(Cursor *c, const char *problem) noexcept nogil:
    if c.problem == NULL:
        c.problem = problem
    c.at = c.end
    return 0


cdef inline uint8_t _byte(Cursor *c) noexcept nogil:
    if c.at >= c.end:
        return _fail(c, "it ends too early")
    c.at += 1
    return (c.at - 1)[0]


cdef uint64_t _varint(Cursor *c) noexcept nogil:
    cdef uint64_t value = 0
    cdef int shift = 0
    cdef uint8_t b
    while shift < 64:
        b = _byte(c)
        value |= <uint64_t>(b & 127) << shift
        if b < 128:
            return value if c.problem == NULL else 0
        shift += 7
    return _fail(c, "an integer is longer than 64 bits")


cdef int64_t _integer(Cursor *c, int wire) noexcept nogil:
    """An integer field or element; a byte is one byte, the wider ones are zigzag varints."""
    cdef uint64_t n
    if wire == BYTE:
        return <signed char>_byte(c)
    if wire != I16 and wire != I32 and wire != I64:
        return _fail(c, "a field has the wrong wire type")
    n = _varint(c)
    return <int64_t>(n >> 1) ^ -<int64_t>(n & 1)


cdef bint _boolean(Cursor *c, int wire) noexcept nogil:
    if wire != TRUE and wire != FALSE:
        return _fail(c, "a field has the wrong wire type")
    return wire == TRUE


cdef int64_t _take(Cursor *c, int wire) noexcept nogil:
    """The length of a binary field, whose bytes begin at c.at; the caller steps over them."""
    cdef uint64_t n
    if wire != BINARY:
        return _fail(c, "a field has the wrong wire type")
    n = _varint(c)
    if n > <uint64_t>(c.end - c.at):
        return _fail(c, "it ends too early")
    return <int64_t>n


cdef int _field(Cursor *c, int16_t *number) noexcept nogil:
    """The wire type of the next field of a structure, whose number is the last one's plus a delta; 0 at its end."""
    cdef uint8_t head = _byte(c)
    if head == 0:
        return 0
    if head >> 4:
        number[0] += head >> 4
    else:
        number[0] = <int16_t>_integer(c, I16)
    if head & 15 == 0:
        return _fail(c, "a field has wire type 0")
    return head & 15


cdef int64_t _list(Cursor *c, int wire, int *element) noexcept nogil:
    """The number of elements of a list and their wire type. Each takes a byte at least, which bounds the loops."""
    cdef uint8_t head
    cdef uint64_t n
    if wire != LIST and wire != SET:
        return _fail(c, "a field has the wrong wire type")
    head = _byte(c)
    n = head >> 4
    if n == 15:
        n = _varint(c)
    if n > <uint64_t>(c.end - c.at):
        return _fail(c, "a list reaches beyond the end")
    element[0] = head & 15
    return <int64_t>n


cdef bint _struct(Cursor *c, int wire) noexcept nogil:
    if wire != STRUCT:
        _fail(c, "a field has the wrong wire type")
    return wire == STRUCT


cdef void _skip(Cursor *c, int wire, int depth) noexcept nogil:
    cdef int16_t number = 0
    cdef int inner, key
    cdef int64_t n, _i
    if depth > MAX_NESTING:
        _fail(c, "it nests more than 32 deep")
    elif wire == TRUE or wire == FALSE:
        pass
    elif wire == BYTE:
        _byte(c)
    elif wire == I16 or wire == I32 or wire == I64:
        _varint(c)
    elif wire == DOUBLE or wire == UUID:
        n = 8 if wire == DOUBLE else 16
        if c.end - c.at < n:
            _fail(c, "it ends too early")
        else:
            c.at += n
    elif wire == BINARY:
        n = _take(c, wire)
        c.at += n
    elif wire == STRUCT:
        inner = _field(c, &number)
        while inner:
            _skip(c, inner, depth + 1)
            inner = _field(c, &number)
    elif wire == LIST or wire == SET:
        n = _list(c, wire, &inner)
        if inner == TRUE or inner == FALSE:  # no bytes as a field, one byte as an element
            inner = BYTE
        for _i in range(n):
            if c.problem != NULL:
                break
            _skip(c, inner, depth + 1)
    elif wire == MAP:
        n = <int64_t>_varint(c)
        inner = _byte(c) if n else 0
        key = BYTE if inner >> 4 <= FALSE else inner >> 4
        inner = BYTE if inner & 15 <= FALSE else inner & 15
        while n and c.problem == NULL:
            _skip(c, key, depth + 1)
            _skip(c, inner, depth + 1)
            n -= 1
    else:
        _fail(c, "a field has an unknown wire type")


# ---- page headers ----------------------------------------------------------------------------------------------------

cdef void _page(Cursor *c, PageHeader *out, bint is_dictionary) noexcept nogil:
    cdef int16_t number = 0
    cdef int wire = _field(c, &number)
    while wire:
        if number == 1:
            out.n_entries = _integer(c, wire)
        elif number == 2:
            out.encoding = _integer(c, wire)
        elif number == 3 and not is_dictionary:
            out.def_encoding = _integer(c, wire)
        elif number == 4 and not is_dictionary:
            out.rep_encoding = _integer(c, wire)
        else:
            _skip(c, wire, 2)
        wire = _field(c, &number)


cdef void _page_v2(Cursor *c, PageHeader *out) noexcept nogil:
    cdef int16_t number = 0
    cdef int wire = _field(c, &number)
    while wire:
        if number == 1:
            out.n_entries = _integer(c, wire)
        elif number == 3:
            out.n_rows = _integer(c, wire)
        elif number == 4:
            out.encoding = _integer(c, wire)
        elif number == 5:
            out.def_nbytes = _integer(c, wire)
        elif number == 6:
            out.rep_nbytes = _integer(c, wire)
        elif number == 7:
            out.is_compressed = _boolean(c, wire)
        else:
            _skip(c, wire, 2)
        wire = _field(c, &number)


cdef int read_page_header(Cursor *c, PageHeader *out) noexcept nogil:
    """Read one header; 0, or -1 with c.problem set."""
    cdef int16_t number = 0
    cdef int wire = _field(c, &number)
    out.kind = out.crc = out.n_rows = -1
    out.nbytes = out.stored_nbytes = out.n_entries = out.encoding = -1
    out.def_encoding = out.rep_encoding = 3
    out.def_nbytes = out.rep_nbytes = 0
    out.is_compressed = True
    while wire:
        if number == 1:
            out.kind = _integer(c, wire)
        elif number == 2:
            out.nbytes = _integer(c, wire)
        elif number == 3:
            out.stored_nbytes = _integer(c, wire)
        elif number == 4:
            out.crc = _integer(c, wire) & <int64_t>0xFFFFFFFF
        elif (number == 5 or number == 7) and _struct(c, wire):
            _page(c, out, number == 7)
        elif number == 8 and _struct(c, wire):
            _page_v2(c, out)
        else:
            _skip(c, wire, 1)
        wire = _field(c, &number)
    return 0 if c.problem == NULL else -1


# ---- the footer --------------------------------------------------------------------------------------------------

# One row of numbers a column chunk; -1 where the footer does not say.
CHUNK_FIELDS = ("codec", "n_values", "nbytes", "stored_nbytes", "data_page", "dictionary_page", "n_nulls", "min_at",
                "min_nbytes", "max_at", "max_nbytes", "encodings", "is_encrypted", "is_elsewhere", "offset_index",
                "offset_index_nbytes", "column_index", "column_index_nbytes", "physical_type")

cdef enum:
    CODEC, N_VALUES, NBYTES, STORED_NBYTES, DATA_PAGE, DICTIONARY_PAGE, N_NULLS, MIN_AT, MIN_NBYTES, MAX_AT
    MAX_NBYTES, ENCODINGS, IS_ENCRYPTED, IS_ELSEWHERE, OFFSET_INDEX, OFFSET_INDEX_NBYTES, COLUMN_INDEX
    COLUMN_INDEX_NBYTES, PHYSICAL_TYPE, N_FIELDS


cdef class Footer:
    """A footer's bytes, parsed. Ownership: everything is the object's own.

    Attributes
    ----------
    elements : list of tuple
        The schema in depth-first order: (name, physical type, length, repetition, number of children, converted type,
        scale, precision, logical type). -1 where absent; the logical type is (kind, a, b), or None.
    row_group_rows : list of int
    chunks : int64[row groups, leaves, len(CHUNK_FIELDS)]
    n_chunks : list of int, chunks that each row group has
    pairs : list of (bytes, bytes)
    created_by : bytes
    has_orders : bool, whether min and max have a defined order
    problem : str or None, what breaks the format
    """

    cdef readonly list elements, row_group_rows, n_chunks, pairs
    cdef readonly object chunks, problem, data
    cdef readonly bytes created_by
    cdef readonly bint has_orders
    cdef const uint8_t *base

    def __init__(self, bytes data):
        cdef Cursor c
        self.data = data
        self.base = data
        c.at = self.base
        c.end = self.base + len(data)
        c.problem = NULL
        self.elements, self.row_group_rows, self.n_chunks, self.pairs = [], [], [], []
        self.created_by = b""
        rows = []
        self._file(&c, rows)
        self.problem = c.problem.decode() if c.problem != NULL else None
        self.chunks = None
        if self.problem is None:
            self.chunks = np.frombuffer(b"".join(rows), np.int64).reshape(-1, N_FIELDS)

    cdef object _bytes(self, Cursor *c, int wire):
        cdef int64_t n = _take(c, wire)
        out = c.at[:n]
        c.at += n
        return out

    cdef void _file(self, Cursor *c, list rows):
        cdef int16_t number = 0
        cdef int element, wire = _field(c, &number)
        cdef int64_t _i, n
        while wire:
            if number == 2:
                n = _list(c, wire, &element)
                for _i in range(n):
                    if c.problem != NULL or not _struct(c, element):
                        break
                    self.elements.append(self._element(c))
            elif number == 4:
                n = _list(c, wire, &element)
                for _i in range(n):
                    if c.problem != NULL or not _struct(c, element):
                        break
                    self._row_group(c, rows)
            elif number == 5:
                n = _list(c, wire, &element)
                for _i in range(n):
                    if c.problem != NULL or not _struct(c, element):
                        break
                    self.pairs.append(self._pair(c))
            elif number == 6:
                self.created_by = self._bytes(c, wire)
            else:
                self.has_orders |= number == 7
                _skip(c, wire, 1)
            wire = _field(c, &number)

    cdef tuple _pair(self, Cursor *c):
        cdef int16_t number = 0
        cdef int wire = _field(c, &number)
        key = value = b""
        while wire:
            if number == 1:
                key = self._bytes(c, wire)
            elif number == 2:
                value = self._bytes(c, wire)
            else:
                _skip(c, wire, 2)
            wire = _field(c, &number)
        return key, value

    cdef tuple _element(self, Cursor *c):
        cdef int16_t number = 0
        cdef int wire = _field(c, &number)
        cdef int64_t physical = -1, length = -1, repetition = 0, children = 0, converted = -1, scale = 0, precision = 0
        name, logical = b"", None
        while wire:
            if number == 1:
                physical = _integer(c, wire)
            elif number == 2:
                length = _integer(c, wire)
            elif number == 3:
                repetition = _integer(c, wire)
            elif number == 4:
                name = self._bytes(c, wire)
            elif number == 5:
                children = _integer(c, wire)
            elif number == 6:
                converted = _integer(c, wire)
            elif number == 7:
                scale = _integer(c, wire)
            elif number == 8:
                precision = _integer(c, wire)
            elif number == 10 and _struct(c, wire):
                logical = self._logical(c)
            else:
                _skip(c, wire, 2)
            wire = _field(c, &number)
        return name, physical, length, repetition, children, converted, scale, precision, logical

    cdef object _logical(self, Cursor *c):
        """A union: its one field says the kind. A time holds a unit and a flag, an integer bits and a flag, a decimal
        its scale and precision: (kind, unit or bits or scale, flag or precision)."""
        cdef int16_t number = 0, inner, unit
        cdef int wire = _field(c, &number), w
        cdef int64_t a, n
        cdef bint flag
        found = None
        while wire:
            a = n = flag = 0
            if not _struct(c, wire):
                break
            inner = 0
            w = _field(c, &inner)
            while w:
                if w == TRUE or w == FALSE:
                    flag = w == TRUE
                elif w == STRUCT:  # the unit of a time, itself a union of empty structures
                    unit = 0
                    w = _field(c, &unit)
                    a = unit
                    while w:
                        _skip(c, w, 5)
                        w = _field(c, &unit)
                elif w == BYTE or w == I16 or w == I32 or w == I64:
                    if inner == 1:
                        a = _integer(c, w)
                    else:
                        n = _integer(c, w)
                else:
                    _skip(c, w, 4)
                w = _field(c, &inner)
            found = (number, a, flag or n)
            wire = _field(c, &number)
        return found

    cdef void _row_group(self, Cursor *c, list rows):
        cdef int16_t number = 0
        cdef int element, wire = _field(c, &number)
        cdef int64_t _i, n = 0, n_rows = -1, n_chunks = 0
        while wire:
            if number == 1:
                n = _list(c, wire, &element)
                for _i in range(n):
                    if c.problem != NULL or not _struct(c, element):
                        break
                    rows.append(self._chunk(c))
                    n_chunks += 1
            elif number == 3:
                n_rows = _integer(c, wire)
            else:
                _skip(c, wire, 2)
            wire = _field(c, &number)
        self.row_group_rows.append(n_rows)
        self.n_chunks.append(n_chunks)

    cdef bytes _chunk(self, Cursor *c):
        cdef int64_t[N_FIELDS] out
        cdef int16_t number = 0
        cdef int i, wire = _field(c, &number)
        for i in range(N_FIELDS):
            out[i] = -1
        out[IS_ENCRYPTED] = out[IS_ELSEWHERE] = out[ENCODINGS] = 0
        while wire:
            if number == 1:
                out[IS_ELSEWHERE] = 1
                _skip(c, wire, 3)
            elif number == 3 and _struct(c, wire):
                self._chunk_meta(c, out)
            elif number == 4:
                out[OFFSET_INDEX] = _integer(c, wire)
            elif number == 5:
                out[OFFSET_INDEX_NBYTES] = _integer(c, wire)
            elif number == 6:
                out[COLUMN_INDEX] = _integer(c, wire)
            elif number == 7:
                out[COLUMN_INDEX_NBYTES] = _integer(c, wire)
            else:
                if number == 8 or number == 9:
                    out[IS_ENCRYPTED] = 1
                _skip(c, wire, 3)
            wire = _field(c, &number)
        return (<char *>out)[:sizeof(out)]

    cdef void _chunk_meta(self, Cursor *c, int64_t *out):
        cdef int16_t number = 0
        cdef int element, wire = _field(c, &number)
        cdef int64_t _i, n, x
        while wire:
            if number == 1:
                out[PHYSICAL_TYPE] = _integer(c, wire)
            elif number == 2:
                n = _list(c, wire, &element)
                for _i in range(n):
                    x = _integer(c, element)
                    if 0 <= x < 62:
                        out[ENCODINGS] |= <int64_t>1 << x
                    else:
                        out[ENCODINGS] |= <int64_t>1 << 62
            elif number == 4:
                out[CODEC] = _integer(c, wire)
            elif number == 5:
                out[N_VALUES] = _integer(c, wire)
            elif number == 6:
                out[NBYTES] = _integer(c, wire)
            elif number == 7:
                out[STORED_NBYTES] = _integer(c, wire)
            elif number == 9:
                out[DATA_PAGE] = _integer(c, wire)
            elif number == 11:
                out[DICTIONARY_PAGE] = _integer(c, wire)
            elif number == 12 and _struct(c, wire):
                self._statistics(c, out)
            else:
                _skip(c, wire, 4)
            wire = _field(c, &number)

    cdef void _statistics(self, Cursor *c, int64_t *out):
        """min_value and max_value; the older min and max are deprecated, since their order is undefined."""
        cdef int16_t number = 0
        cdef int wire = _field(c, &number)
        cdef int64_t n
        while wire:
            if number == 3:
                out[N_NULLS] = _integer(c, wire)
            elif number == 5 or number == 6:
                n = _take(c, wire)
                out[MAX_AT if number == 5 else MIN_AT] = c.at - self.base
                out[MAX_NBYTES if number == 5 else MIN_NBYTES] = n
                c.at += n
            else:
                _skip(c, wire, 5)
            wire = _field(c, &number)


# ---- page indexes ----------------------------------------------------------------------------------------------------

def read_offset_index(const uint8_t[::1] data):
    """Offset, stored bytes and first row of each page: int64[n, 3]; None where the bytes break the format."""
    cdef Cursor c
    cdef int16_t number = 0, inner
    cdef int element, wire, w
    cdef int64_t _i, n, offset, nbytes, first
    if data.shape[0] == 0:
        return None
    c.at = &data[0]
    c.end = c.at + data.shape[0]
    c.problem = NULL
    pages = []
    wire = _field(&c, &number)
    while wire:
        if number == 1:
            n = _list(&c, wire, &element)
            for _i in range(n):
                if c.problem != NULL or not _struct(&c, element):
                    break
                offset = nbytes = first = -1
                inner = 0
                w = _field(&c, &inner)
                while w:
                    if inner == 1:
                        offset = _integer(&c, w)
                    elif inner == 2:
                        nbytes = _integer(&c, w)
                    elif inner == 3:
                        first = _integer(&c, w)
                    else:
                        _skip(&c, w, 3)
                    w = _field(&c, &inner)
                pages.append((offset, nbytes, first))
        else:
            _skip(&c, wire, 1)
        wire = _field(&c, &number)
    if c.problem != NULL:
        return None
    return np.array(pages, np.int64).reshape(-1, 3)


def read_column_index(const uint8_t[::1] data):
    """(is_null, minimum, maximum, n_nulls) of each page, as lists (n_nulls may be None); None where the bytes break the
    format."""
    cdef Cursor c
    cdef int16_t number = 0
    cdef int element, wire
    cdef int64_t _i, n, size
    cdef list nulls = [], low = [], high = [], counts = None, into
    if data.shape[0] == 0:
        return None
    c.at = &data[0]
    c.end = c.at + data.shape[0]
    c.problem = NULL
    wire = _field(&c, &number)
    while wire:
        if number == 1:
            n = _list(&c, wire, &element)
            for _i in range(n):
                nulls.append(_byte(&c) == 1)
        elif number == 2 or number == 3:
            into = low if number == 2 else high
            n = _list(&c, wire, &element)
            for _i in range(n):
                size = _take(&c, element)
                into.append(c.at[:size])
                c.at += size
        elif number == 5:
            n = _list(&c, wire, &element)
            counts = [_integer(&c, element) for _ in range(n)]
        else:
            _skip(&c, wire, 1)
        wire = _field(&c, &number)
    if c.problem != NULL or not len(nulls) == len(low) == len(high) or counts is not None and len(counts) != len(low):
        return None
    return nulls, low, high, counts
