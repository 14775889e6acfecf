/* Snappy, decompressed. Compiled once for each instruction set, with -DHBKIT_ISA=<name>.
 *
 * SPEC: github.com/google/snappy, format_description.txt. After the length come tags. A tag's low two bits are its
 * kind; the other six are a literal's length less one (60 to 63: the length follows in 1 to 4 bytes), or a copy's
 * length less one, with the offset in 2 or 4 bytes; or, for COPY1, three bits of a length of 4 to 11 below the three
 * high bits of an offset of 11, whose low eight are the next byte.
 *
 * Where a tag stands is known only when the one before has been read, and in data of 8-byte keys or short words there
 * is a tag for every four bytes. A loop over tags waits for each: for the load, for the arithmetic, and for the wrong
 * guesses of its branches, since the kinds alternate as the values do. So the work is cut in two:
 *
 *   scan   reads a block of the input as if a tag began at every byte of it, and notes what would follow from that;
 *          most of it is in vain, but there is no order in it, so that vectors do 16 or 32 bytes at once;
 *   walk   goes through the notes from one true tag to the next. Between two of them lie one load and one addition.
 *
 * A step of the walk is a literal of at most SHORT bytes, or none, and a copy of at most 16: the copy's tag stands in
 * the 32 bytes from where the literal's lane begins, which one look-up in vectors reaches. All else is ODD: longer
 * elements, a literal after a literal, COPY4, copies that overlap themselves, damage, the last bytes of the output.
 * There the walk stops, and `element` takes one tag with every check.
 *
 * Nothing is read outside src: the last block is copied to where padding can follow it. A step takes at most 19 bytes
 * of input and gives at most 31. Copies go in sixteens, so that up to 15 bytes beyond are written, into the slack at
 * the end.
 */
#include <stddef.h>
#include <string.h>

#include "kernels.h"
#include "snappy.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define NOINLINE __attribute__((noinline)) /* so that each loop has all registers */

enum { LITERAL = 0, COPY1 = 1, COPY2 = 2, COPY4 = 3 };
enum { SHORT = 15, BLOCK = 512, PAD = 64, ODD = 128 };

/* What scan notes of each byte of a block, were it a tag. */
typedef struct {
    _Alignas(64) uint8_t step[BLOCK + PAD]; /* bytes to the next step's tag; ODD or more: not a step */
    uint8_t skip[BLOCK + PAD];              /* bytes to the copy's tag: 0 if this is the copy */
    uint8_t literal[BLOCK + PAD];           /* the literal's length: 0 if this is the copy */
    uint8_t length[BLOCK + PAD];            /* a copy's length */
    uint8_t high[BLOCK + PAD];              /* the high byte of a copy's offset; the low one is the next byte */
    uint8_t tail[BLOCK + PAD];              /* the last block's input, padded */
} notes;

/* ---- vectors ---- */

typedef uint8_t line __attribute__((vector_size(16)));
#ifdef __AVX2__
typedef uint8_t vec __attribute__((vector_size(32)));
typedef int8_t signed_vec __attribute__((vector_size(32)));
#define LANES(...) {__VA_ARGS__, __VA_ARGS__}
#else
typedef line vec;
typedef int8_t signed_vec __attribute__((vector_size(16)));
#define LANES(...) {__VA_ARGS__}
#endif

static inline vec load(const uint8_t *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(uint8_t *p, vec v) { memcpy(p, &v, sizeof v); }

static inline void copy16(uint8_t *to, const uint8_t *from) {
    line v;
    memcpy(&v, from, 16);
    memcpy(to, &v, 16);
}

static inline vec pick(vec mask, vec a, vec b) {
#ifdef __AVX2__
    return (vec)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)mask);
#else
    return (mask & a) | (~mask & b);
#endif
}

/* table[at], at < 16, in each lane of 16 bytes. With x86 any `at` of 128 or more gives 0. */
static inline line look16(line table, line at) {
#if defined(__aarch64__)
    return (line)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)at);
#else
    return (line)_mm_shuffle_epi8((__m128i)table, (__m128i)at);
#endif
}

static inline vec look(vec table, vec at) {
#ifdef __AVX2__
    return (vec)_mm256_shuffle_epi8((__m256i)table, (__m256i)at);
#else
    return look16(table, at);
#endif
}

/* The same with the lane of `more` after that of `table`, at < 32. */
static inline vec look32(vec table, vec more, vec at) {
#if defined(__aarch64__)
    return (vec)vqtbl2q_u8((uint8x16x2_t){{(uint8x16_t)table, (uint8x16_t)more}}, (uint8x16_t)at);
#else
    return look(table, at + 0x70) | look(more, at - 16);
#endif
}

/* ---- scan and walk ---- */

/* The bytes that a copy's tag takes, by kind. */
static inline vec size(vec tag) {
    const vec sizes = LANES(ODD, 2, 3, ODD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return look(sizes, tag & 3);
}

static NOINLINE void scan(const uint8_t *in, int64_t n, notes *p) {
    const vec lane = LANES(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < n + SHORT + 1; i += (int64_t)sizeof(vec)) {
        vec tag = load(in + i), six = tag >> 2, kind = tag & 3;
        vec literal = (vec)(kind == LITERAL), copy1 = (vec)(kind == COPY1);
        vec skip = literal & (six + 2);
        vec far = (vec)((signed_vec)skip > SHORT + 1); /* x86 compares signed bytes alone */
        store(p->step + i, (skip + look32(size(tag), size(load(in + i + 16)), lane + skip)) | far);
        store(p->skip + i, skip);
        store(p->literal + i, literal & (six + 1));
        store(p->length + i, pick(copy1, (six & 7) + 4, six + 1));
        store(p->high + i, pick(copy1, tag >> 5, load(in + i + 2)));
    }
    memset(p->step + n, ODD, PAD / 2); /* the walk ends here */
}

/* Goes from in[*at] on, and from op to less than limit; leaves in *at where it stopped, and returns the new op. */
static NOINLINE uint8_t *walk(const notes *p, const uint8_t *in, int64_t *at, uint8_t *op, const uint8_t *dst,
                              const uint8_t *limit) {
    int64_t i = *at;
    while (op < limit) {
        int64_t step = p->step[i], tag = i + p->skip[i];
        if (step >= ODD) break;
        copy16(op, in + i + 1);
        uint8_t *to = op + p->literal[i];
        int64_t length = p->length[tag], offset = in[tag + 1] | p->high[tag] << 8;
        if ((length > 16) | (offset < length) | (offset > to - dst)) break;
        copy16(to, to - offset);
        op = to + length;
        i += step;
    }
    *at = i;
    return op;
}

/* ---- the rest ---- */

#define TURN(k) \
    {0,     1 % k, 2 % k,  3 % k,  4 % k,  5 % k,  6 % k,  7 % k, \
     8 % k, 9 % k, 10 % k, 11 % k, 12 % k, 13 % k, 14 % k, 15 % k}

/* to[i] = to[i - offset] for i < n <= 64, in order; writes up to 15 bytes more. */
static inline void repeat(uint8_t *to, int64_t offset, int64_t n) {
    static const line turns[16] = {TURN(1), TURN(1), TURN(2),  TURN(3),  TURN(4),  TURN(5),  TURN(6),  TURN(7),
                                   TURN(8), TURN(9), TURN(10), TURN(11), TURN(12), TURN(13), TURN(14), TURN(15)};
    const uint8_t *from = to - offset;
    if (offset >= 16) {
        for (int64_t i = 0; i < n; i += 16) copy16(to + i, from + i);
        return;
    }
    line pattern;
    memcpy(&pattern, from, 16);
    pattern = look16(pattern, turns[offset]);
    for (int64_t i = 0; i < n; i += 16 - 16 % offset) memcpy(to + i, &pattern, 16);
}

typedef struct {
    const uint8_t *ip, *end;
    uint8_t *dst, *op, *op_end;
} cursor;

/* One tag at c->ip < c->end and what it gives, with every check. */
static inline int element(cursor *c) {
    int64_t tag = *c->ip++, six = tag >> 2, kind = tag & 3, value = 0;
    int64_t bytes = kind == LITERAL ? (six < 60 ? 0 : six - 59) : kind == COPY4 ? 4 : kind;
    if (bytes > c->end - c->ip) return HB_SNAPPY_TRUNCATED;
    for (int64_t i = 0; i < bytes; i++) value |= (int64_t)*c->ip++ << (8 * i);
    if (kind == LITERAL) {
        int64_t length = 1 + (bytes ? value : six), left = c->end - c->ip;
        if (length > left) return HB_SNAPPY_TRUNCATED;
        if (length > c->op_end - c->op) return HB_SNAPPY_LENGTH;
        if (length <= 64 && left >= 64)
            for (int64_t i = 0; i < length; i += 16) copy16(c->op + i, c->ip + i);
        else
            memcpy(c->op, c->ip, (size_t)length);
        c->ip += length;
        c->op += length;
    } else {
        int64_t length = kind == COPY1 ? 4 + (six & 7) : 1 + six;
        int64_t offset = kind == COPY1 ? value | (six >> 3) << 8 : value;
        if (offset == 0 || offset > c->op - c->dst) return HB_SNAPPY_OFFSET;
        if (length > c->op_end - c->op) return HB_SNAPPY_LENGTH;
        repeat(c->op, offset, length);
        c->op += length;
    }
    return 0;
}

HB_SNAPPY_DECLARE(PASTE(hb_snappy_, HBKIT_ISA)) {
    int64_t length, start = hb_snappy_preamble(src, n, &length);
    if (!start) return HB_SNAPPY_TRUNCATED;
    if (length != dst_n) return HB_SNAPPY_LENGTH;
    cursor c = {.ip = src + start, .end = src + n, .dst = dst, .op = dst, .op_end = dst + dst_n};
    const uint8_t *limit = dst_n > 30 ? c.op_end - 30 : dst; /* before it a step has room */
    notes p;
    while (c.ip < c.end) {
        const uint8_t *block = c.ip, *in = block;
        int64_t left = c.end - block, block_n = left < BLOCK ? left : BLOCK, at = 0;
        if (left < BLOCK + PAD) {
            memset(p.tail, COPY4, sizeof p.tail);
            memcpy(p.tail, block, (size_t)left);
            in = p.tail;
        }
        scan(in, block_n, &p);
        while (at < block_n) {
            c.op = walk(&p, in, &at, c.op, dst, limit);
            if (at > left) return HB_SNAPPY_TRUNCATED; /* the walk took padding for a tag's last bytes */
            c.ip = block + at;
            if (at >= block_n) break;
            int rc = element(&c);
            if (rc) return rc;
            at = c.ip - block;
        }
    }
    return c.op == c.op_end ? 0 : HB_SNAPPY_LENGTH;
}
