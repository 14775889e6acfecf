"""TFRecord files without TensorFlow: records with their checksums, and the tf.train.Example messages they hold.

Whatever a length says, nothing is read beyond the message that holds it: each loop runs on a position `at` and the
`end` of its own message, and only `_varint`, `_message` and `_room` move from one to the next. Errors are Corrupt
with the place `byte`, counted from the start of the block.

Sources: tensorflow/core/lib/io/record_writer.h, tensorflow/core/example/{example,feature}.proto, and
protobuf.dev/programming-guides/encoding.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy

import numpy as np

from hbkit.errors import Corrupt, InvalidArgument

BYTES, FLOAT, INT64 = 1, 2, 3  # SPEC: the fields of the oneof in Feature; 0 is a feature without a list

# What varint a field begins with: its number * 8 + its wire type (0 varint, 2 length and bytes, 5 four bytes).
cdef enum:
    FIELD_1_VARINT = 8
    FIELD_1 = 10
    FIELD_1_FIXED32 = 13
    FIELD_2 = 18
    FIELD_3 = 26

cdef enum:
    LIST_START = 4  # columns of what `features` gives
    LIST_END = 5
    N_COLUMNS = 6

# ---- CRC-32C, eight bytes at a time (Kounavis and Berry 2005, "slicing by 8") ----

cdef uint32_t TABLE[8][256]


cdef void _fill_table() noexcept:
    cdef uint32_t crc
    cdef int i, k
    for i in range(256):
        crc = i
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78u if crc & 1 else 0)
        TABLE[0][i] = crc
    for i in range(256):
        for k in range(1, 8):
            TABLE[k][i] = (TABLE[k - 1][i] >> 8) ^ TABLE[0][TABLE[k - 1][i] & 255]


_fill_table()


cdef uint32_t _crc32c(const uint8_t *p, int64_t n) noexcept nogil:
    cdef uint32_t crc = 0xFFFFFFFFu, high
    cdef uint64_t word
    cdef int64_t i
    for i in range(n >> 3):
        memcpy(&word, p + 8 * i, 8)
        crc ^= <uint32_t>word
        high = <uint32_t>(word >> 32)
        crc = (TABLE[7][crc & 255] ^ TABLE[6][(crc >> 8) & 255] ^ TABLE[5][(crc >> 16) & 255] ^ TABLE[4][crc >> 24]
               ^ TABLE[3][high & 255] ^ TABLE[2][(high >> 8) & 255] ^ TABLE[1][(high >> 16) & 255]
               ^ TABLE[0][high >> 24])
    for i in range(n & ~<int64_t>7, n):
        crc = (crc >> 8) ^ TABLE[0][(crc ^ p[i]) & 255]
    return ~crc


cdef inline bint _matches(const uint8_t *p, int64_t n, const uint8_t *stored) noexcept nogil:
    cdef uint32_t crc = _crc32c(p, n), masked
    memcpy(&masked, stored, 4)
    return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u == masked  # SPEC: rotated, so that a CRC of CRCs stays sound


def crc32c(const uint8_t[::1] data):
    """CRC-32C (Castagnoli) of bytes: int in [0, 2**32)."""
    return _crc32c(&data[0], data.shape[0]) if data.shape[0] else 0


# ---- records ----


def is_record(const uint8_t[::1] start):
    """Whether bytes begin with a record's length and its checksum."""
    return start.shape[0] >= 12 and bool(_matches(&start[0], 8, &start[8]))


def records(const uint8_t[::1] block, int64_t max_nbytes):
    """The whole records of a block that begins with one, checksums verified.

    Returns
    -------
    bounds : int64[n, 2], where the data of each begin and end in the block
    used : int, where the record that the block cuts begins
    """
    cdef int64_t at = 0, size = block.shape[0], n = 0
    cdef uint64_t length
    cdef const uint8_t *p = &block[0] if size else NULL
    bounds = np.empty((size // 16, 2), np.int64)  # SPEC: a record is its data and 16 bytes
    cdef int64_t[:, ::1] to = bounds
    while size - at >= 12:
        memcpy(&length, p + at, 8)
        if not _matches(p + at, 8, p + at + 8):
            _broken("the checksum of a record's length is wrong", at)
        if length > <uint64_t>max_nbytes:
            _broken(f"a record of {length} bytes, and {max_nbytes} are the most", at)
        if <uint64_t>(size - at) < length + 16:
            break
        if not _matches(p + at + 12, length, p + at + 12 + length):
            _broken("the checksum of a record's data is wrong", at)
        to[n, 0] = at + 12
        to[n, 1] = at + 12 + length
        n += 1
        at += 16 + length
    return bounds[:n], at


# ---- messages ----


cdef int _broken(problem, int64_t at) except -1:
    raise Corrupt(problem, remedy="fetch or write the file again", byte=at)


cdef int _varint(const uint8_t *p, int64_t *at, int64_t end, uint64_t *value) except -1:
    cdef uint64_t x = 0
    cdef int shift = 0
    while True:
        if at[0] >= end:
            _broken("a number is cut off", at[0])
        if shift > 63:
            _broken("a number of more than ten bytes", at[0])
        x |= <uint64_t>(p[at[0]] & 127) << shift
        shift += 7
        at[0] += 1
        if p[at[0] - 1] < 128:
            value[0] = x
            return 0


cdef int _message(const uint8_t *p, int64_t *at, int64_t end, int64_t *stop) except -1:
    """Read a length: the bytes at[0] .. stop[0] are the message, and lie within the one that holds it."""
    cdef uint64_t n = 0
    _varint(p, at, end, &n)
    if n > <uint64_t>(end - at[0]):
        _broken("a message is longer than the one that holds it", at[0])
    stop[0] = at[0] + <int64_t>n
    return 0


cdef int _only(const uint8_t *p, int64_t *at, int64_t end, uint64_t field, int64_t *stop) except -1:
    """Read the head of a message that must be this field."""
    cdef int64_t first = at[0]
    cdef uint64_t tag = 0
    _varint(p, at, end, &tag)
    if tag != field:
        _broken(f"no tf.train.Example: field {tag >> 3} of wire type {tag & 7}", first)
    return _message(p, at, end, stop)


cdef inline int _room(int64_t n, int64_t room, int64_t at) except -1:
    if n > room:
        _broken("more values than were counted", at)
    return 0


# Each walks over one list and counts its values; where `out` is not NULL it also writes them, `room` at most.

cdef int64_t _ints(const uint8_t *p, int64_t at, int64_t end, int64_t *out, int64_t room) except -1:
    cdef int64_t n = 0, stop = 0
    cdef uint64_t tag = 0, value = 0
    while at < end:
        _varint(p, &at, end, &tag)
        if tag == FIELD_1:
            _message(p, &at, end, &stop)
        elif tag == FIELD_1_VARINT:
            stop = at + 1  # one value, however long
        else:
            _broken(f"no Int64List: field {tag >> 3} of wire type {tag & 7}", at)
        while at < stop:
            _varint(p, &at, stop if tag == FIELD_1 else end, &value)
            if out != NULL:
                _room(n + 1, room, at)
                out[n] = <int64_t>value
            n += 1
    return n


cdef int64_t _floats(const uint8_t *p, int64_t at, int64_t end, float *out, int64_t room) except -1:
    cdef int64_t n = 0, more, stop = 0
    cdef uint64_t tag = 0
    while at < end:
        _varint(p, &at, end, &tag)
        if tag == FIELD_1:
            _message(p, &at, end, &stop)
        elif tag == FIELD_1_FIXED32 and end - at >= 4:
            stop = at + 4
        else:
            _broken(f"no FloatList: field {tag >> 3} of wire type {tag & 7}", at)
        if (stop - at) % 4:
            _broken("a number is cut off", stop)
        more = (stop - at) // 4
        if out != NULL and more:
            _room(n + more, room, at)
            memcpy(out + n, p + at, stop - at)
        n += more
        at = stop
    return n


cdef int64_t _strings(const uint8_t *p, int64_t at, int64_t end, int32_t *splits, uint8_t *data, int64_t room,
                      int64_t data_room) except -1:
    """`splits[0]` says how much of `data` is filled; those of the strings are written behind it."""
    cdef int64_t n = 0, stop = 0
    while at < end:
        _only(p, &at, end, FIELD_1, &stop)
        if splits != NULL:
            _room(n + 1, room, at)
            _room(splits[n] + stop - at, data_room, at)
            splits[n + 1] = splits[n] + <int32_t>(stop - at)
            if stop > at:
                memcpy(data + splits[n], p + at, stop - at)
        n += 1
        at = stop
    return n


def features(const uint8_t[::1] block, const int64_t[:, ::1] bounds, dict names):
    """The features of the tf.train.Example messages `block[start:end]`.

    Parameters
    ----------
    bounds : int64[n, 2]
    names : dict of bytes to int, which numbers the features; new names are added

    Returns
    -------
    int64[m, 6]: row, number of the name, kind, number of values, and where the list begins and ends in the block.
    All of it has been read once, so only `names` can fail later.
    """
    cdef int64_t size = block.shape[0], most = 0, m = 0, row, at, end, stop = 0, entry = 0, part = 0
    cdef int64_t key, key_end, value, value_end, first, kind, n
    cdef uint64_t tag = 0
    cdef const uint8_t *p = &block[0] if size else NULL
    _check(bounds, size)
    for row in range(bounds.shape[0]):
        most += (bounds[row, 1] - bounds[row, 0]) // 6  # an entry is a tag and a length, and so are its key and value
    out = np.empty((most, <int>N_COLUMNS), np.int64)
    cdef int64_t[:, ::1] to = out
    for row in range(bounds.shape[0]):
        at, end = bounds[row, 0], bounds[row, 1]
        while at < end:  # SPEC: Example { Features features = 1 }
            _only(p, &at, end, FIELD_1, &stop)
            while at < stop:  # SPEC: Features { map<string, Feature> feature = 1 }
                first = at
                _only(p, &at, stop, FIELD_1, &entry)
                key = value = key_end = value_end = -1
                while at < entry:  # SPEC: a map's entries are { key = 1, value = 2 }, in any order
                    _varint(p, &at, entry, &tag)
                    if tag == FIELD_1 and key < 0:
                        _message(p, &at, entry, &key_end)
                        key, at = at, key_end
                    elif tag == FIELD_2 and value < 0:
                        _message(p, &at, entry, &value_end)
                        value, at = at, value_end
                    else:
                        _broken("no tf.train.Example: a feature is not one name and one value", first)
                if key < 0 or value < 0:
                    _broken("no tf.train.Example: a feature is not one name and one value", first)
                kind = n = part = 0
                if value < value_end:  # SPEC: Feature { oneof { bytes_list = 1, float_list = 2, int64_list = 3 } }
                    _varint(p, &value, value_end, &tag)
                    if tag != FIELD_1 and tag != FIELD_2 and tag != FIELD_3:
                        _broken(f"no tf.train.Feature: field {tag >> 3} of wire type {tag & 7}", value)
                    _message(p, &value, value_end, &part)
                    if part != value_end:
                        _broken("a feature of more than one list", part)
                    kind = tag >> 3
                    if kind == 1:
                        n = _strings(p, value, part, NULL, NULL, 0, 0)
                    elif kind == 2:
                        n = _floats(p, value, part, NULL, 0)
                    else:
                        n = _ints(p, value, part, NULL, 0)
                name = <bytes>p[key:key_end]
                number = names.get(name)
                if number is None:
                    number = names[name] = len(names)
                to[m, 0] = row
                to[m, 1] = number
                to[m, 2] = kind
                to[m, 3] = n
                to[m, LIST_START] = value
                to[m, LIST_END] = value_end
                m += 1
    return out[:m]


def nested(const uint8_t[::1] block, const int64_t[:, ::1] bounds):
    """The Examples in ExampleListWithContext messages `block[start:end]`.

    Returns
    -------
    examples : int64[m, 2], where each begins and ends in the block
    message : int64[m], which message each stands in
    contexts : int64[n, 2], where the context of each message begins and ends; nothing where it has none
    """
    cdef int64_t size = block.shape[0], most = 0, m = 0, row, at, end, first, stop = 0
    cdef uint64_t tag = 0
    cdef const uint8_t *p = &block[0] if size else NULL
    cdef bint seen
    _check(bounds, size)
    for row in range(bounds.shape[0]):
        most += (bounds[row, 1] - bounds[row, 0]) // 2  # an example is at least a tag and a length
    examples, message = np.empty((most, 2), np.int64), np.empty(most, np.int64)
    contexts = np.zeros((bounds.shape[0], 2), np.int64)
    cdef int64_t[:, ::1] example = examples, context = contexts
    cdef int64_t[::1] of = message
    for row in range(bounds.shape[0]):
        at, end = bounds[row, 0], bounds[row, 1]
        seen = False
        while at < end:  # SPEC: ExampleListWithContext { repeated Example examples = 1; Example context = 2 }
            first = at
            _varint(p, &at, end, &tag)
            if tag != FIELD_1 and (tag != FIELD_2 or seen):
                _broken(f"no ExampleListWithContext: field {tag >> 3} of wire type {tag & 7}", first)
            _message(p, &at, end, &stop)
            if tag == FIELD_1:
                example[m, 0], example[m, 1] = at, stop
                of[m] = row
                m += 1
            else:
                context[row, 0], context[row, 1] = at, stop
                seen = True
            at = stop
    return examples[:m], message[:m], contexts


def int64_values(const uint8_t[::1] block, const int64_t[:, ::1] lists, int64_t n):
    """The n values of int64 lists, which are rows of what `features` gave: int64[n]."""
    _check(lists[:, LIST_START:], block.shape[0])
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    cdef int64_t i, done = 0
    for i in range(lists.shape[0] if n else 0):
        done += _ints(&block[0], lists[i, LIST_START], lists[i, LIST_END], &to[0] + done, n - done)
    return out[:done]


def float_values(const uint8_t[::1] block, const int64_t[:, ::1] lists, int64_t n):
    """The n values of float lists: float32[n]."""
    _check(lists[:, LIST_START:], block.shape[0])
    out = np.empty(n, np.float32)
    cdef float[::1] to = out
    cdef int64_t i, done = 0
    for i in range(lists.shape[0] if n else 0):
        done += _floats(&block[0], lists[i, LIST_START], lists[i, LIST_END], &to[0] + done, n - done)
    return out[:done]


def bytes_values(const uint8_t[::1] block, const int64_t[:, ::1] lists, int64_t n):
    """The n values of bytes lists: splits int32[n + 1] and data uint8[splits[-1]]."""
    cdef int64_t i, done = 0, nbytes = 0
    _check(lists[:, LIST_START:], block.shape[0])
    for i in range(lists.shape[0]):
        nbytes += lists[i, LIST_END] - lists[i, LIST_START]
    if nbytes >= 1 << 31:
        raise InvalidArgument(f"strings of {nbytes} bytes", remedy="decode fewer lists at once")
    splits, data = np.zeros(n + 1, np.int32), np.empty(nbytes + 1, np.uint8)
    cdef int32_t[::1] split = splits
    cdef uint8_t[::1] to = data
    for i in range(lists.shape[0] if n else 0):
        done += _strings(&block[0], lists[i, LIST_START], lists[i, LIST_END], &split[0] + done, &to[0], n - done,
                         nbytes)
    return splits[:done + 1], data[:split[done]]


cdef int _check(const int64_t[:, :] bounds, int64_t size) except -1:
    """Prove once that all messages lie in the block."""
    cdef int64_t i
    for i in range(bounds.shape[0]):
        if not 0 <= bounds[i, 0] <= bounds[i, 1] <= size:
            raise InvalidArgument(f"message {i} reaches outside the block", remedy="give 0 <= start <= end <= its size")
    return 0
