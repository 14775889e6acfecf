/* Compiled once for each instruction set, with -DHBKIT_ISA=<name>; see decode.h for what each function promises. */
#include "decode.h"

#include <string.h>

#include "xxh64.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)

enum { AHEAD = 24 }; /* dictionary entries prefetched before use */

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The 8 bytes at p, of which those from end on are read as 0. */
static inline uint64_t load64_until(const uint8_t *p, const uint8_t *end) {
    uint64_t x = 0;
    if (end - p >= 8) return hb_load64(p);
    if (p < end) memcpy(&x, p, (size_t)(end - p));
    return x;
}

/* ---- bit-packed values -------------------------------------------------------------------------------------------
 *
 * Value i of a packed run lies at bit i * width. Eight of them start at a byte, so a vector of eight 32-bit lanes takes
 * the four bytes around each value by one byte shuffle, shifts each lane by its own amount and masks. A value and its
 * shift fit four bytes up to width 25; wider ones are rare and go one by one.
 */
#if defined(__AVX2__)
enum { WIDEST = 25 };
static struct {
    uint8_t bytes[32];
    uint32_t shift[8];
} lanes[WIDEST + 1];

__attribute__((constructor)) static void fill_lanes(void) {
    for (int w = 1; w <= WIDEST; w++)
        for (int i = 0; i < 8; i++) {
            int bit = i * w, origin = i < 4 ? 0 : (4 * w) >> 3;
            for (int k = 0; k < 4; k++) lanes[w].bytes[4 * i + k] = (uint8_t)((bit >> 3) - origin + k);
            lanes[w].shift[i] = (uint32_t)(bit & 7);
        }
}

/* As many of n values (from a byte boundary) as can be had eight at a time without reading beyond end. */
static int64_t unpack_vector(const uint8_t *p, const uint8_t *end, int64_t n, int w, uint32_t *out) {
    if (w == 0 || w > WIDEST) return 0;
    int64_t i = 0, second = (4 * w) >> 3;
    __m256i bytes = _mm256_loadu_si256((const __m256i *)lanes[w].bytes);
    __m256i shift = _mm256_loadu_si256((const __m256i *)lanes[w].shift);
    __m256i mask = _mm256_set1_epi32((int)((1u << w) - 1));
    for (; i + 8 <= n && end - p >= second + 16; i += 8, p += w) {
        __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)),
                                            _mm_loadu_si128((const __m128i *)(p + second)), 1);
        x = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(x, bytes), shift), mask);
        _mm256_storeu_si256((__m256i *)(out + i), x);
    }
    return i;
}
#else
static int64_t unpack_vector(const uint8_t *p, const uint8_t *end, int64_t n, int w, uint32_t *out) {
    (void)p, (void)end, (void)n, (void)w, (void)out;
    return 0;
}
#endif

static inline uint32_t unpack_one(const uint8_t *p, const uint8_t *end, int64_t i, int w) {
    int64_t bit = i * w;
    return (uint32_t)((load64_until(p + (bit >> 3), end) >> (bit & 7)) & (((uint64_t)1 << w) - 1));
}

/* Values first..first+n-1 of a packed run. */
static void unpack(const uint8_t *p, const uint8_t *end, int64_t first, int64_t n, int w, uint32_t *out) {
    int64_t i = 0;
    for (; i < n && ((first + i) & 7); i++) out[i] = unpack_one(p, end, first + i, w);
    if (i < n) i += unpack_vector(p + (first + i) / 8 * w, end, n - i, w, out + i);
    for (; i < n && end - p >= ((first + i) * w >> 3) + 8; i++) {
        int64_t bit = (first + i) * w;
        out[i] = (uint32_t)((hb_load64(p + (bit >> 3)) >> (bit & 7)) & (((uint64_t)1 << w) - 1));
    }
    for (; i < n; i++) out[i] = unpack_one(p, end, first + i, w);
}

/* ---- runs --------------------------------------------------------------------------------------------------------*/

/* Opens the next run: left > 0 afterwards. */
static inline int next_run(hb_runs *r) {
    do {
        uint64_t head = 0;
        for (int shift = 0;; shift += 7) {
            if (r->at >= r->end) return HB_E_END;
            uint8_t b = *r->at++;
            head |= (uint64_t)(b & 127) << shift;
            if (b < 128) break;
            if (shift > 28) return HB_E_FORMAT;
        }
        int64_t n = (int64_t)(head >> 1), have = r->end - r->at;
        if (head & 1) {
            r->packed = r->at;
            r->done = 0;
            r->left = n * 8;
            int64_t nbytes = n * r->width;
            if (nbytes > have) { /* writers cut off the padding of the last group */
                nbytes = have;
                r->left = have * 8 / r->width;
                if (r->left == 0) return HB_E_END;
            }
            r->at += nbytes;
        } else {
            int nbytes = (r->width + 7) / 8;
            if (nbytes > have) return HB_E_END;
            r->value = 0;
            memcpy(&r->value, r->at, (size_t)nbytes);
            if (r->width < 32 && r->value >> r->width) return HB_E_RANGE;
            r->at += nbytes;
            r->packed = NULL;
            r->left = n;
        }
    } while (r->left == 0);
    return 0;
}

static int runs_read(hb_runs *r, uint32_t *restrict out, int64_t n) {
    while (n > 0) {
        if (r->left == 0) {
            int e = next_run(r);
            if (e) return e;
        }
        int64_t m = min64(n, r->left);
        if (r->packed) {
            unpack(r->packed, r->end, r->done, m, r->width, out);
            r->done += m;
        } else {
            uint32_t value = r->value;
            for (int64_t i = 0; i < m; i++) out[i] = value;
        }
        r->left -= m;
        out += m;
        n -= m;
    }
    return 0;
}

/* Levels of lists alternate between short runs of both kinds, which no branch predictor follows: so a run is taken up
 * to 64 bits at a time, and its kind selects a word rather than a way through the code. */
static int runs_bits(hb_runs *r, uint64_t *restrict bits, int64_t n) {
    uint64_t word = 0;
    int64_t fill = 0;
    while (n > 0) {
        if (r->left == 0) {
            int e = next_run(r);
            if (e) return e;
        }
        int64_t m = min64(min64(n, r->left), 64);
        uint64_t x;
        if (r->packed) {
            m = min64(m, 64 - (r->done & 7)); /* what 8 bytes hold */
            x = load64_until(r->packed + (r->done >> 3), r->end) >> (r->done & 7);
            r->done += m;
        } else {
            x = -(uint64_t)r->value;
        }
        x &= ~(uint64_t)0 >> (64 - m);
        r->left -= m;
        n -= m;
        word |= x << fill;
        if (fill + m >= 64) {
            *bits++ = word;
            word = fill ? x >> (64 - fill) : 0;
            fill += m - 64;
        } else {
            fill += m;
        }
    }
    *bits = word;
    return 0;
}

/* Sets bits from..from+n-1, of words that are 0 from there on. */
static inline void set_bits(uint64_t *bits, int64_t from, int64_t n) {
    int64_t i = from >> 6, last = (from + n) >> 6;
    uint64_t head = ~(uint64_t)0 << (from & 63), tail = ((uint64_t)1 << ((from + n) & 63)) - 1;
    if (i == last) {
        bits[i] |= head & tail;
        return;
    }
    bits[i++] |= head;
    for (; i < last; i++) bits[i] = ~(uint64_t)0;
    bits[i] |= tail;
}

static inline void put_bits(uint64_t *bits, int64_t from, uint64_t word) {
    bits[from >> 6] |= word << (from & 63);
    if (from & 63) bits[(from >> 6) + 1] |= word >> (64 - (from & 63));
}

static int runs_levels(hb_runs *r, int64_t n, uint32_t least, uint32_t most, uint32_t null_set, uint64_t *elements,
                       uint64_t *valid, uint64_t *nulls) {
    size_t nbytes = (size_t)(n / 64 + 2) * 8;
    memset(elements, 0, nbytes);
    memset(valid, 0, nbytes);
    if (nulls) memset(nulls, 0, nbytes);
    for (int64_t at = 0; at < n;) {
        if (r->left == 0) {
            int e = next_run(r);
            if (e) return e;
        }
        int64_t m = min64(n - at, r->left);
        if (!r->packed) {
            if (r->value > most) return HB_E_RANGE;
            if (r->value >= least) set_bits(elements, at, m);
            if (r->value == most) set_bits(valid, at, m);
            if (nulls && null_set >> r->value & 1) set_bits(nulls, at, m);
        } else {
            uint32_t levels[64 + HB_SLACK / 4];
            uint64_t a = 0, b = 0, c = 0;
            uint32_t worst = 0;
            m = min64(m, 64);
            unpack(r->packed, r->end, r->done, m, r->width, levels);
            r->done += m;
            for (int64_t i = 0; i < m; i++) {
                uint32_t level = levels[i];
                worst = level > worst ? level : worst;
                a |= (uint64_t)(level >= least) << i;
                b |= (uint64_t)(level == most) << i;
                c |= (uint64_t)(null_set >> (level & 31) & 1) << i;
            }
            if (worst > most) return HB_E_RANGE;
            put_bits(elements, at, a);
            put_bits(valid, at, b);
            if (nulls) put_bits(nulls, at, c);
        }
        r->left -= m;
        at += m;
    }
    return 0;
}

static int runs_same(hb_runs *r, int64_t n, uint32_t *value) {
    if (r->left == 0) {
        int e = next_run(r);
        if (e) return e;
    }
    if (r->packed || r->left < n) return 0;
    *value = r->value;
    r->left -= n;
    return 1;
}

static int runs_skip(hb_runs *r, int64_t n) {
    while (n > 0) {
        if (r->left == 0) {
            int e = next_run(r);
            if (e) return e;
        }
        int64_t m = min64(n, r->left);
        r->left -= m;
        r->done += m;
        n -= m;
    }
    return 0;
}

/* ---- dictionaries ------------------------------------------------------------------------------------------------*/

static inline uint32_t largest(const uint32_t *v, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* The indices are proven before the first is used; the copies then need no check. */
#define GATHER(name, type)                                                                                       \
    static int name(const uint32_t *codes, int64_t n, const type *dictionary, int64_t n_dictionary, type *out) { \
        if (n > 0 && (int64_t)largest(codes, n) >= n_dictionary) return HB_E_RANGE;                              \
        int64_t i = 0;                                                                                           \
        for (; i + 8 <= n; i += 8) {                                                                             \
            type a = dictionary[codes[i]], b = dictionary[codes[i + 1]], c = dictionary[codes[i + 2]],           \
                 d = dictionary[codes[i + 3]], e = dictionary[codes[i + 4]], f = dictionary[codes[i + 5]],       \
                 g = dictionary[codes[i + 6]], h = dictionary[codes[i + 7]];                                     \
            out[i] = a, out[i + 1] = b, out[i + 2] = c, out[i + 3] = d;                                          \
            out[i + 4] = e, out[i + 5] = f, out[i + 6] = g, out[i + 7] = h;                                      \
        }                                                                                                        \
        for (; i < n; i++) out[i] = dictionary[codes[i]];                                                        \
        return 0;                                                                                                \
    }
GATHER(gather8, uint64_t)
GATHER(gather4, uint32_t)
GATHER(gather2, uint16_t)
GATHER(gather1, uint8_t)

/* Lookups wait for the dictionary, stores around the caches for memory: by turns, eight lines of one block are filled
 * while those of the block before are sent, so that neither waits for the other. */
#if defined(__AVX2__)
static inline void send_line(void *to, const void *from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(to, _mm512_load_si512(from));
#else
    _mm256_stream_si256((__m256i *)to, _mm256_load_si256((const __m256i *)from));
    _mm256_stream_si256((__m256i *)to + 1, _mm256_load_si256((const __m256i *)from + 1));
#endif
}

#define GATHER_PAST_CACHE(name, type, per_line)                                                                  \
    static int name(const uint32_t *codes, int64_t n, const type *dictionary, int64_t n_dictionary, type *out) { \
        enum { BLOCK = 8 * per_line };                                                                           \
        type lines[2][BLOCK] __attribute__((aligned(64)));                                                       \
        if (n > 0 && (int64_t)largest(codes, n) >= n_dictionary) return HB_E_RANGE;                              \
        int64_t i = 0;                                                                                           \
        for (; i < n && ((uintptr_t)(out + i) & 63); i++) out[i] = dictionary[codes[i]];                         \
        int64_t n_blocks = (n - i) / BLOCK;                                                                      \
        for (int64_t b = 0; b <= n_blocks; b++) {                                                                \
            type *fill = lines[b & 1], *full = lines[~b & 1];                                                    \
            for (int k = 0; k < BLOCK; k += per_line) {                                                          \
                if (b < n_blocks)                                                                                \
                    for (int j = 0; j < per_line; j++) fill[k + j] = dictionary[codes[i + b * BLOCK + k + j]];   \
                if (b) send_line(out + i + (b - 1) * BLOCK + k, full + k);                                       \
            }                                                                                                    \
        }                                                                                                        \
        for (i += n_blocks * BLOCK; i < n; i++) out[i] = dictionary[codes[i]];                                   \
        _mm_sfence(); /* another thread may read it next */                                                      \
        return 0;                                                                                                \
    }
GATHER_PAST_CACHE(gather8_past_cache, uint64_t, 8)
GATHER_PAST_CACHE(gather4_past_cache, uint32_t, 16)
#else
GATHER(gather8_past_cache, uint64_t)
GATHER(gather4_past_cache, uint32_t)
#endif

/* ---- levels as bitmaps -------------------------------------------------------------------------------------------*/

static uint32_t at_least(const uint32_t *levels, int64_t n, uint32_t least, uint64_t *bits) {
    for (int64_t i = 0; i < n; i += 64) {
        int64_t m = min64(64, n - i);
        uint64_t word = 0;
        for (int64_t j = 0; j < m; j++) word |= (uint64_t)(levels[i + j] >= least) << j;
        bits[i / 64] = word;
    }
    return largest(levels, n);
}

/* Word i of bits with only from..to-1 left. */
static inline uint64_t clip(uint64_t word, int64_t i, int64_t from, int64_t to) {
    if (i * 64 < from) word &= ~(uint64_t)0 << (from & 63);
    if (to - i * 64 < 64) word &= ~(~(uint64_t)0 << (to & 63));
    return word;
}

static int64_t count_bits(const uint64_t *bits, int64_t from, int64_t to) {
    int64_t n = 0;
    for (int64_t i = from / 64; i * 64 < to; i++) n += __builtin_popcountll(clip(bits[i], i, from, to));
    return n;
}

static int64_t row_starts(const uint64_t *starts, const uint64_t *elements, int64_t from, int64_t to, int64_t n_rows,
                          int64_t base, int64_t *row, int64_t *restrict out) {
    int64_t k = *row;
    for (int64_t i = from / 64; i * 64 < to; i++) {
        uint64_t word = clip(starts[i], i, from, to), among = elements ? clip(elements[i], i, from, to) : 0;
        if (k + __builtin_popcountll(word) > n_rows) { /* the last row begins and ends in this word */
            for (; k < n_rows; word &= word - 1) {
                int p = __builtin_ctzll(word);
                out[k++] = elements ? base + __builtin_popcountll(among & (((uint64_t)1 << p) - 1)) : base + i * 64 + p - from;
            }
            *row = k;
            return i * 64 + __builtin_ctzll(word);
        }
        if (elements) {
            for (; word; word &= word - 1)
                out[k++] = base + __builtin_popcountll(among & ((word & -word) - 1));
            base += __builtin_popcountll(among);
        } else {
            int64_t here = base + i * 64 - from;
            for (; word; word &= word - 1) out[k++] = here + __builtin_ctzll(word);
        }
    }
    *row = k;
    return to;
}

#define EXPAND(type, stop)                                                                       \
    do {                                                                                         \
        const type *in = values;                                                                 \
        type *to_ = out, fill_ = (type)fill;                                                     \
        for (; i < (stop); i++) {                                                                \
            if (slots && !(slots[i >> 6] >> (i & 63) & 1)) continue;                             \
            uint64_t bit = valid[i >> 6] >> (i & 63) & 1;                                        \
            to_[k++] = bit ? in[j] : fill_;                                                      \
            j += (int64_t)bit;                                                                   \
        }                                                                                        \
    } while (0)

#if defined(__AVX512F__)
/* A vector of entries at a time, from a line's beginning on if they go around the caches; type, its bits, entries. */
#define EXPAND_VECTORS(type, width, n)                                                                           \
    do {                                                                                                         \
        __m512i filler = _mm512_set1_epi##width((type)fill);                                                     \
        if (past_cache) EXPAND(type, min64(to, from + (int64_t)((-(uintptr_t)out & 63) / sizeof(type))));        \
        for (; i + n <= to; i += n, k += n) {                                                                    \
            uint64_t bits = valid[i >> 6] >> (i & 63);                                                           \
            if ((i & 63) > 64 - n) bits |= valid[(i >> 6) + 1] << (64 - (i & 63));                               \
            __m512i x = _mm512_loadu_si512((const type *)values + j);                                            \
            x = _mm512_mask_expand_epi##width(filler, (__mmask##n)bits, x);                                      \
            if (past_cache) _mm512_stream_si512((void *)((type *)out + k), x);                                   \
            else _mm512_storeu_si512((type *)out + k, x);                                                        \
            j += __builtin_popcountll(bits & ((1 << n) - 1));                                                    \
        }                                                                                                        \
        if (past_cache) _mm_sfence();                                                                            \
    } while (0)
#endif

static int64_t expand(const uint64_t *slots, const uint64_t *valid, int64_t from, int64_t to, const void *values,
                      int64_t item, uint64_t fill, void *restrict out, int past_cache) {
    int64_t i = from, j = 0, k = 0;
#if defined(__AVX512F__)
    if (!slots && item == 8) EXPAND_VECTORS(uint64_t, 64, 8);
    else if (!slots && item == 4) EXPAND_VECTORS(uint32_t, 32, 16);
#else
    (void)past_cache;
#endif
    if (item == 8) EXPAND(uint64_t, to);
    else if (item == 4) EXPAND(uint32_t, to);
    else if (item == 2) EXPAND(uint16_t, to);
    else EXPAND(uint8_t, to);
    return k;
}

/* ---- other encodings ---------------------------------------------------------------------------------------------*/

static int varint(const uint8_t **p, const uint8_t *end, uint64_t *out) {
    *out = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (*p >= end) return HB_E_END;
        uint8_t b = *(*p)++;
        *out |= (uint64_t)(b & 127) << shift;
        if (b < 128) return 0;
    }
    return HB_E_FORMAT;
}

static inline uint64_t unzigzag(uint64_t x) { return (x >> 1) ^ -(x & 1); }

static int64_t delta(const uint8_t *src, const uint8_t *end, int64_t most, int64_t item, void *out, int64_t *count) {
    const uint8_t *p = src;
    uint64_t block, minis, total, value;
    int e = 0;
    if ((e = varint(&p, end, &block)) || (e = varint(&p, end, &minis)) || (e = varint(&p, end, &total)) ||
        (e = varint(&p, end, &value)))
        return e;
    /* SPEC: the block is a multiple of 128 values, a miniblock of 32; some writers use 8 */
    if (block == 0 || block > (1 << 24) || minis == 0 || minis > block || block % minis || block / minis % 8)
        return HB_E_FORMAT;
    if (total > (uint64_t)most) return HB_E_RANGE;
    uint64_t per = block / minis, n = 0, *out8 = out;
    uint32_t *out4 = out;
    value = unzigzag(value);
    *count = (int64_t)total;
    if (total) {
        if (item == 8) out8[n++] = value;
        else out4[n++] = (uint32_t)value;
    }
    while (n < total) {
        uint64_t least;
        if ((e = varint(&p, end, &least))) return e;
        least = unzigzag(least);
        if ((uint64_t)(end - p) < minis) return HB_E_END;
        const uint8_t *widths = p;
        p += minis;
        for (uint64_t k = 0; k < minis && n < total; k++) {
            int w = widths[k];
            if (w > 8 * item) return HB_E_FORMAT;
            uint64_t m = total - n < per ? total - n : per, need = (m * (uint64_t)w + 7) / 8, full = per * (uint64_t)w / 8;
            if ((uint64_t)(end - p) < need) return HB_E_END;
            uint64_t mask = w == 64 ? ~(uint64_t)0 : ((uint64_t)1 << w) - 1;
            for (uint64_t i = 0; i < m; i++) {
                uint64_t bit = i * (uint64_t)w, shift = bit & 7;
                const uint8_t *q = p + (bit >> 3);
                uint64_t x = load64_until(q, end) >> shift;
                if (shift + (uint64_t)w > 64) x |= (uint64_t)q[8] << (64 - shift);
                value += least + (x & mask);
                if (item == 8) out8[n++] = value;
                else out4[n++] = (uint32_t)value;
            }
            p += (uint64_t)(end - p) < full ? (uint64_t)(end - p) : full;
        }
    }
    return p - src;
}

static void unsplit(const uint8_t *src, int64_t n, int64_t width, uint8_t *restrict out) {
    if (width == 4) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t x = src[i] | (uint32_t)src[n + i] << 8 | (uint32_t)src[2 * n + i] << 16 | (uint32_t)src[3 * n + i] << 24;
            memcpy(out + 4 * i, &x, 4);
        }
        return;
    }
    for (int64_t first = 0; first < n; first += 512) { /* a tile that stays in cache for all of its bytes */
        int64_t last = min64(n, first + 512);
        for (int64_t k = 0; k < width; k++)
            for (int64_t i = first; i < last; i++) out[i * width + k] = src[k * n + i];
    }
}

static void resize4(const int32_t *in, int64_t n, int64_t item, void *restrict out) {
    if (item == 8)
        for (int64_t i = 0; i < n; i++) ((int64_t *)out)[i] = in[i];
    else if (item == 2)
        for (int64_t i = 0; i < n; i++) ((int16_t *)out)[i] = (int16_t)in[i];
    else
        for (int64_t i = 0; i < n; i++) ((int8_t *)out)[i] = (int8_t)in[i];
}

static void bits_to_bytes(const uint8_t *bits, int64_t first, int64_t n, uint8_t *restrict out) {
    for (int64_t i = 0; i < n; i++) out[i] = bits[(first + i) >> 3] >> ((first + i) & 7) & 1;
}

static void copy_past_cache(void *to, const void *from, int64_t nbytes) {
#if defined(__AVX2__)
    uint8_t *out = to;
    const uint8_t *in = from;
    int64_t head = -(intptr_t)out & 31;
    if (nbytes < 256) {
        memcpy(out, in, (size_t)nbytes);
        return;
    }
    memcpy(out, in, (size_t)head);
    for (out += head, in += head, nbytes -= head; nbytes >= 128; out += 128, in += 128, nbytes -= 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)in), b = _mm256_loadu_si256((const __m256i *)(in + 32)),
                c = _mm256_loadu_si256((const __m256i *)(in + 64)), d = _mm256_loadu_si256((const __m256i *)(in + 96));
        _mm256_stream_si256((__m256i *)out, a);
        _mm256_stream_si256((__m256i *)(out + 32), b);
        _mm256_stream_si256((__m256i *)(out + 64), c);
        _mm256_stream_si256((__m256i *)(out + 96), d);
    }
    memcpy(out, in, (size_t)nbytes);
    _mm_sfence(); /* another thread may read it next */
#else
    memcpy(to, from, (size_t)nbytes);
#endif
}

/* ---- strings -----------------------------------------------------------------------------------------------------*/

/* Most strings are short: 16 bytes are copied whatever the length, into slack that the next string overwrites. */
static inline void copy_string(uint8_t *to, const uint8_t *from, int64_t n) {
    memcpy(to, from, 16);
    if (n > 16) memcpy(to + 16, from + 16, (size_t)n - 16);
}

static int64_t strings_plain(const uint8_t *src, const uint8_t *end, int64_t n, int64_t *splits, uint8_t *restrict data) {
    const uint8_t *p = src;
    int64_t at = splits[0];
    for (int64_t i = 0; i < n; i++) {
        uint32_t size;
        if (end - p < 4) return HB_E_END;
        memcpy(&size, p, 4);
        p += 4;
        if (size > (uint64_t)(end - p)) return HB_E_END;
        if (data) {
            if (end - p >= 16) copy_string(data + at, p, size);
            else memcpy(data + at, p, size);
        }
        p += size;
        at += size;
        splits[i + 1] = at;
    }
    return p - src;
}

#if defined(__AVX512DQ__)
/* XXH64 of eight strings of fewer than 32 bytes at a time: every lane takes every step that one of them needs, and keeps
 * what it had where the step is not its own; lengths vary, and a branch on each would be mispredicted. */
static inline __m512i load_lanes(const uint8_t *const *at, const uint64_t *offset) {
    uint64_t x[8];
    for (int i = 0; i < 8; i++) x[i] = hb_load64(at[i] + offset[i]);
    return _mm512_set_epi64((long long)x[7], (long long)x[6], (long long)x[5], (long long)x[4], (long long)x[3],
                            (long long)x[2], (long long)x[1], (long long)x[0]);
}

static inline __m512i times(__m512i a, uint64_t b) { return _mm512_mullo_epi64(a, _mm512_set1_epi64((long long)b)); }

static inline __m512i plus(__m512i a, uint64_t b) { return _mm512_add_epi64(a, _mm512_set1_epi64((long long)b)); }

/* at[i] is readable for 32 bytes */
static void hash_lanes(const uint8_t *const *at, const uint64_t *sizes, uint64_t seed, int64_t *out) {
    static const uint64_t words[3][8] = {{0}, {8, 8, 8, 8, 8, 8, 8, 8}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __m512i size = _mm512_loadu_si512(sizes), h = plus(size, seed + HB_P5), one = _mm512_set1_epi64(1);
    __m512i n_words = _mm512_srli_epi64(size, 3), rest = _mm512_and_si512(size, _mm512_set1_epi64(7));
    for (int k = 0; k < 3; k++) {
        __mmask8 has = _mm512_cmpgt_epi64_mask(n_words, _mm512_set1_epi64(k));
        if (!has) break;
        __m512i x = times(_mm512_rol_epi64(times(load_lanes(at, words[k]), HB_P2), 31), HB_P1);
        h = _mm512_mask_mov_epi64(h, has, plus(times(_mm512_rol_epi64(_mm512_xor_si512(h, x), 27), HB_P1), HB_P4));
    }
    uint64_t offset[8];
    _mm512_storeu_si512(offset, _mm512_slli_epi64(n_words, 3));
    __m512i tail = load_lanes(at, offset);
    __mmask8 has = _mm512_cmpge_epi64_mask(rest, _mm512_set1_epi64(4));
    if (has) {
        __m512i x = times(_mm512_and_si512(tail, _mm512_set1_epi64(0xFFFFFFFF)), HB_P1);
        h = _mm512_mask_mov_epi64(h, has, plus(times(_mm512_rol_epi64(_mm512_xor_si512(h, x), 23), HB_P2), HB_P3));
        tail = _mm512_mask_srli_epi64(tail, has, tail, 32);
    }
    rest = _mm512_and_si512(rest, _mm512_set1_epi64(3));
    while ((has = _mm512_test_epi64_mask(rest, rest))) {
        __m512i x = times(_mm512_and_si512(tail, _mm512_set1_epi64(255)), HB_P5);
        h = _mm512_mask_mov_epi64(h, has, times(_mm512_rol_epi64(_mm512_xor_si512(h, x), 11), HB_P1));
        tail = _mm512_srli_epi64(tail, 8);
        rest = _mm512_mask_sub_epi64(rest, has, rest, one);
    }
    h = times(_mm512_xor_si512(h, _mm512_srli_epi64(h, 33)), HB_P2);
    h = times(_mm512_xor_si512(h, _mm512_srli_epi64(h, 29)), HB_P3);
    _mm512_storeu_si512(out, _mm512_xor_si512(h, _mm512_srli_epi64(h, 32)));
}

/* As many of n strings as can be had eight at a time; *src moves behind them. */
static int64_t hash_eights(const uint8_t **src, const uint8_t *end, int64_t n, uint64_t seed, int64_t *out) {
    const uint8_t *p = *src, *at[8];
    uint64_t sizes[8];
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int k = 0; k < 8; k++) {
            uint32_t size;
            if (end - p < 36) return i;
            memcpy(&size, p, 4);
            if (size >= 32) return i;
            at[k] = p + 4;
            sizes[k] = size;
            p += 4 + size;
        }
        hash_lanes(at, sizes, seed, out + i);
        *src = p;
    }
    return i;
}
#else
static int64_t hash_eights(const uint8_t **src, const uint8_t *end, int64_t n, uint64_t seed, int64_t *out) {
    (void)src, (void)end, (void)n, (void)seed, (void)out;
    return 0;
}
#endif

static int64_t strings_hash(const uint8_t *src, const uint8_t *end, int64_t n, uint64_t seed, int64_t *restrict out) {
    const uint8_t *p = src;
    int64_t next = 0; /* the eights are tried again behind a string that was none of theirs */
    for (int64_t i = 0; i < n; i++) {
        uint32_t size;
        if (i >= next) {
            i += hash_eights(&p, end, n - i, seed, out + i);
            next = i + 8;
            if (i == n) break;
        }
        if (end - p < 4) return HB_E_END;
        memcpy(&size, p, 4);
        p += 4;
        if (size > (uint64_t)(end - p)) return HB_E_END;
        out[i] = (int64_t)hb_xxh64(p, size, seed);
        p += size;
    }
    return p - src;
}

static int64_t strings_size(const uint32_t *codes, int64_t n, const hb_span *dictionary, int64_t n_dictionary) {
    int64_t total = 0;
    if (n > 0 && (int64_t)largest(codes, n) >= n_dictionary) return HB_E_RANGE;
    for (int64_t i = 0; i < n; i++) total += dictionary[codes[i]].n;
    return total;
}

static int64_t strings_short(const uint8_t *src, const uint8_t *end, int64_t n, hb_short *restrict out) {
    const uint8_t *p = src;
    for (int64_t i = 0; i < n; i++) {
        uint32_t size;
        if (end - p < 4) return HB_E_END;
        memcpy(&size, p, 4);
        p += 4;
        if (size > HB_SHORT) return HB_E_RANGE;
        if (size > (uint64_t)(end - p)) return HB_E_END;
        if (end - p >= HB_SHORT) memcpy(out[i].bytes, p, HB_SHORT);
        else memcpy(out[i].bytes, p, size);
        out[i].n = (uint8_t)size;
        p += size;
    }
    return p - src;
}

static int strings_gather_short(const uint32_t *codes, int64_t n, const hb_short *dictionary, int64_t n_dictionary,
                                int64_t *restrict splits, uint8_t *restrict data) {
    int64_t at = splits[0];
    if (n > 0 && (int64_t)largest(codes, n) >= n_dictionary) return HB_E_RANGE;
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n) __builtin_prefetch(&dictionary[codes[i + AHEAD]]);
        const hb_short *s = &dictionary[codes[i]];
        memcpy(data + at, s->bytes, HB_SHORT);
        at += s->n;
        splits[i + 1] = at;
    }
    return 0;
}

static void strings_gather(const uint32_t *codes, int64_t n, const hb_span *dictionary, const uint8_t *from,
                           int64_t *restrict splits, uint8_t *restrict data) {
    int64_t at = splits[0];
    for (int64_t i = 0; i < n; i++) {
        hb_span s = dictionary[codes[i]];
        copy_string(data + at, from + s.at, s.n);
        at += s.n;
        splits[i + 1] = at;
    }
}

const hb_decoders PASTE(hb_decoders_, HBKIT_ISA) = {
    .runs_read = runs_read,
    .runs_bits = runs_bits,
    .runs_levels = runs_levels,
    .runs_same = runs_same,
    .runs_skip = runs_skip,
    .gather8 = gather8,
    .gather4 = gather4,
    .gather2 = gather2,
    .gather1 = gather1,
    .gather8_past_cache = gather8_past_cache,
    .gather4_past_cache = gather4_past_cache,
    .at_least = at_least,
    .copy_past_cache = copy_past_cache,
    .count_bits = count_bits,
    .row_starts = row_starts,
    .expand = expand,
    .delta = delta,
    .unsplit = unsplit,
    .resize4 = resize4,
    .bits_to_bytes = bits_to_bytes,
    .strings_plain = strings_plain,
    .strings_hash = strings_hash,
    .strings_size = strings_size,
    .strings_short = strings_short,
    .strings_gather_short = strings_gather_short,
    .strings_gather = strings_gather,
};
