/* The kernels of the Parquet decoder, compiled once for each instruction set (see kernels.h), and the one state that
 * they share: a cursor over a hybrid of run-length and bit-packed runs.
 *
 * Bytes that come from a file are never trusted: every function that reads them is told where they end and returns a
 * negative code when they end too early or break the format. Outputs are the caller's, sized as each comment says.
 */
#ifndef HBKIT_DECODE_H
#define HBKIT_DECODE_H

#include <stddef.h>
#include <stdint.h>

enum { HB_SLACK = 64 };      /* writable bytes that some outputs need beyond their end */
enum { HB_CODES = 4096 };    /* dictionary codes unpacked at once: 16 KiB, half of a first-level cache */
enum { HB_E_END = -1, HB_E_FORMAT = -2, HB_E_RANGE = -3 }; /* bytes end too early; break the format; value too large */

/* SPEC: Encodings.md, "Run Length Encoding / Bit-Packing Hybrid". A run is either `left` times `value`, or `left`
 * values (a multiple of 8, the last group padded) packed from `packed` on, of which `done` are consumed. */
typedef struct {
    const uint8_t *at, *end; /* the next header, the end of all runs */
    const uint8_t *packed;   /* NULL in a run of one value */
    int64_t left, done;
    uint32_t value;
    int32_t width; /* bits, 0..32 */
} hb_runs;

/* One entry of a dictionary of strings: its bytes are data[at..at+n-1]. */
typedef struct {
    uint32_t at, n;
} hb_span;

/* The same where no string is longer than HB_SHORT: all of it in one place of memory. */
enum { HB_SHORT = 15 };
typedef struct {
    uint8_t n, bytes[HB_SHORT];
} hb_short;

typedef struct {
    /* The next n values into out[n + HB_SLACK / 4]. */
    int (*runs_read)(hb_runs *r, uint32_t *out, int64_t n);
    /* The next n values of width 1 as bits, from bit 0 of bits[n / 64 + 2]. */
    int (*runs_bits)(hb_runs *r, uint64_t *bits, int64_t n);
    /* The next n definition levels, as bits: which reach `least`, which reach `most`, and (where nulls is not NULL) which
     * are in null_set, bit `level` of it; each array has n / 64 + 2 words. Levels beyond `most`, which is below 32, are an
     * error. */
    int (*runs_levels)(hb_runs *r, int64_t n, uint32_t least, uint32_t most, uint32_t null_set, uint64_t *elements,
                       uint64_t *valid, uint64_t *nulls);
    /* 1 and *value where the next n values all lie in one run of one value, which is then consumed; 0 where not. */
    int (*runs_same)(hb_runs *r, int64_t n, uint32_t *value);
    /* Step over the next n values. */
    int (*runs_skip)(hb_runs *r, int64_t n);
    /* out[i] = dictionary[codes[i]]; every code is below n_dictionary, else HB_E_RANGE and undefined output. */
    int (*gather8)(const uint32_t *codes, int64_t n, const uint64_t *dictionary, int64_t n_dictionary, uint64_t *out);
    int (*gather4)(const uint32_t *codes, int64_t n, const uint32_t *dictionary, int64_t n_dictionary, uint32_t *out);
    int (*gather2)(const uint32_t *codes, int64_t n, const uint16_t *dictionary, int64_t n_dictionary, uint16_t *out);
    int (*gather1)(const uint32_t *codes, int64_t n, const uint8_t *dictionary, int64_t n_dictionary, uint8_t *out);
    /* Bit i: levels[i] >= least. Returns the largest level. Bits beyond n in the last word are 0. */
    uint32_t (*at_least)(const uint32_t *levels, int64_t n, uint32_t least, uint64_t *bits);
    /* gather8 and gather4 into memory that does not fit the caches: around them. */
    int (*gather8_past_cache)(const uint32_t *codes, int64_t n, const uint64_t *dictionary, int64_t n_dictionary,
                              uint64_t *out);
    int (*gather4_past_cache)(const uint32_t *codes, int64_t n, const uint32_t *dictionary, int64_t n_dictionary,
                              uint32_t *out);
    /* memcpy that leaves the caches alone: for outputs that do not fit them anyway. */
    void (*copy_past_cache)(void *to, const void *from, int64_t nbytes);
    /* Bits set among bits from..to-1. */
    int64_t (*count_bits)(const uint64_t *bits, int64_t from, int64_t to);
    /* Where each row starts, counted in elements: for every set bit p of starts in from..to-1, out[row++] = base +
     * elements in from..p-1 (all are elements where elements is NULL). Stops before the row that would be one more than
     * n_rows. Returns where it stopped; *row is advanced. */
    int64_t (*row_starts)(const uint64_t *starts, const uint64_t *elements, int64_t from, int64_t to, int64_t n_rows,
                          int64_t base, int64_t *row, int64_t *out);
    /* For each set bit of slots in from..to-1 (all where slots is NULL), the next of values where its bit of valid is
     * set, else fill; item is 1, 2, 4 or 8 bytes. values is readable for HB_SLACK bytes beyond its items, out writable.
     * past_cache may write around the caches. Returns the number of slots. */
    int64_t (*expand)(const uint64_t *slots, const uint64_t *valid, int64_t from, int64_t to, const void *values,
                      int64_t item, uint64_t fill, void *out, int past_cache);
    /* SPEC: Encodings.md, "Delta Encoding". *count integers of `item` (4 or 8) bytes: the header's number, which is at
     * most `most` (else HB_E_RANGE). Returns the bytes consumed. */
    int64_t (*delta)(const uint8_t *src, const uint8_t *end, int64_t most, int64_t item, void *out, int64_t *count);
    /* Byte k of value i is src[k * n + i]: transposed into out[n * width]. */
    void (*unsplit)(const uint8_t *src, int64_t n, int64_t width, uint8_t *out);
    /* Copy items of 4 bytes as 1, 2 or 8 bytes: truncating, or extending by their sign. */
    void (*resize4)(const int32_t *in, int64_t n, int64_t item, void *out);
    /* Bits first..first+n-1, least significant first, as bytes of 0 or 1. */
    void (*bits_to_bytes)(const uint8_t *bits, int64_t first, int64_t n, uint8_t *out);
    /* n strings of PLAIN (4 bytes of length, then the bytes) appended: splits[1..n] after splits[0], the bytes from
     * data[splits[0]] on, which has room for end - src + HB_SLACK. data NULL: only the splits. Returns the bytes
     * consumed. */
    int64_t (*strings_plain)(const uint8_t *src, const uint8_t *end, int64_t n, int64_t *splits, uint8_t *data);
    /* XXH64 of n strings of PLAIN. Returns the bytes consumed. */
    int64_t (*strings_hash)(const uint8_t *src, const uint8_t *end, int64_t n, uint64_t seed, int64_t *out);
    /* Bytes that the strings of these codes take together; HB_E_RANGE where a code is not below n_dictionary. */
    int64_t (*strings_size)(const uint32_t *codes, int64_t n, const hb_span *dictionary, int64_t n_dictionary);
    /* n strings of PLAIN as short ones. Returns the bytes consumed, or HB_E_RANGE where one is longer than HB_SHORT. */
    int64_t (*strings_short)(const uint8_t *src, const uint8_t *end, int64_t n, hb_short *out);
    /* The strings of these codes appended as by strings_plain; data has room for n * HB_SHORT + HB_SLACK. HB_E_RANGE where
     * a code is not below n_dictionary. */
    int (*strings_gather_short)(const uint32_t *codes, int64_t n, const hb_short *dictionary, int64_t n_dictionary,
                                int64_t *splits, uint8_t *data);
    /* The strings of these codes (proven by strings_size) appended as by strings_plain. from and data have HB_SLACK. */
    void (*strings_gather)(const uint32_t *codes, int64_t n, const hb_span *dictionary, const uint8_t *from,
                           int64_t *splits, uint8_t *data);
} hb_decoders;

#endif
