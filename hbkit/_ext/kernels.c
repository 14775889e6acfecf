/* Compiled once for each instruction set, with -DHBKIT_ISA=<name>; see kernels.h for the rules all must keep. */
#include "kernels.h"
#include "lanes.h"
#include "snappy.h"

#include <math.h>
#include <string.h>

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)

/* A body is compiled for the dims that are common, as constants, and for any other. */
#define BY_DIM(dim, call) \
    switch (dim) {        \
    case 16: call(16);    \
    case 32: call(32);    \
    case 64: call(64);    \
    case 128: call(128);  \
    default: call(dim);   \
    }

/* ---- memory: slots are random, so every pass asks for its lines ahead of their use ---- */

/* Into the second-level cache, for reading or writing: the first has too few places for lines on their way. */
INLINE void fetch(const void *p, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch((const char *)p + i, 0, 2);
}

/* How many rows ahead: 32, or what about 32 KiB hold. */
INLINE int64_t ahead(int64_t row_nbytes) {
    return row_nbytes <= 1024 ? 32 : row_nbytes <= 16384 ? 32768 / row_nbytes : 2;
}

INLINE int64_t item_nbytes(const hb_slabs *s) { return s->dtype == HB_FLOAT32 ? 4 : 2; }

/* ---- rows out and in ---- */

INLINE int64_t slot_at(const int64_t *slots, const int64_t *index, int64_t i) { return slots[index ? index[i] : i]; }

/* A row on its way into the cache, NULL where there is none. */
INLINE const float *coming(const hb_slabs *s, int64_t slot, int64_t nbytes) {
    if (slot < 0) return NULL;
    const float *row = hb_row(s, slot);
    fetch(row, nbytes);
    return row;
}

enum { COMING = 32 }; /* at the most; a power of two */

INLINE void gather_as(const hb_slabs *s, const int64_t *slots, const int64_t *index, int64_t n, int64_t width,
                      float *restrict out) {
    const float *rows[COMING];
    int64_t d = ahead(width * 4), i = 0;
    for (; i < d && i < n; i++) rows[i & (COMING - 1)] = coming(s, slot_at(slots, index, i), width * 4);
    for (i = 0; i < n; i++) {
        const float *row = rows[i & (COMING - 1)];
        if (i + d < n) rows[(i + d) & (COMING - 1)] = coming(s, slot_at(slots, index, i + d), width * 4);
        if (row)
            memcpy(out + i * width, row, (size_t)width * sizeof(float));
        else
            memset(out + i * width, 0, (size_t)width * sizeof(float));
    }
}

static void gather(const hb_slabs *s, const int64_t *slots, const int64_t *index, int64_t n, int64_t width,
                   float *restrict out) {
    if (s->dtype == HB_FLOAT32 && width <= s->dim) {
#define GATHER(dim) gather_as(s, slots, index, n, dim, out); return
        BY_DIM(width, GATHER)
    }
    int64_t columns = width < s->dim ? width : s->dim, d = ahead(width * 4);
    for (int64_t i = 0; i < n; i++) {
        float *to = out + i * width;
        int64_t slot = slot_at(slots, index, i), later = i + d < n ? slot_at(slots, index, i + d) : -1;
        if (later >= 0) {
            fetch(hb_row(s, later), columns * item_nbytes(s));
            if (width > columns) fetch(hb_state(s, later), (width - columns) * 4);
        }
        if (slot < 0) {
            memset(to, 0, (size_t)width * sizeof(float));
            continue;
        }
        if (s->dtype == HB_FLOAT32)
            memcpy(to, hb_row(s, slot), (size_t)columns * sizeof(float));
        else
            widen_row(s->dtype, hb_row(s, slot), columns, to);
        memcpy(to + columns, hb_state(s, slot), (size_t)(width - columns) * sizeof(float));
    }
}

static void locate(const hb_slabs *s, const int64_t *slots, int64_t n, const float **rows) {
    for (int64_t i = 0; i < n; i++) rows[i] = slots[i] < 0 ? NULL : (const float *)hb_row(s, slots[i]);
}

/* Into the first-level cache, to be used at once. */
INLINE void fetch_near(const void *p, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch((const void *)((uintptr_t)p + (uintptr_t)i), 0, 3);
}

/* How many rows ahead, where some features stand side by side: about as many as the CPU looks ahead by itself. */
INLINE int64_t rows_ahead(int64_t n_features) { return 1 + 24 / n_features; }

/* Row after row, so that what is written comes in order; the tables' hot rows stay in the cache. */
INLINE void gather_together_as(const hb_feature *f, int64_t n_features, int64_t first, int64_t last, int64_t dim,
                               float *restrict out, int64_t stride) {
    int64_t d = rows_ahead(n_features);
    for (int64_t b = first; b < last; b++)
        for (int64_t k = 0; k < n_features; k++) {
            const float *row = f[k].rows[f[k].inverse[b]];
            float *to = out + b * stride + f[k].at;
            if (b + d < last) fetch_near(f[k].rows[f[k].inverse[b + d]], dim * 4); /* of NULL, it does nothing */
            if (row)
                memcpy(to, row, (size_t)dim * sizeof(float));
            else
                memset(to, 0, (size_t)dim * sizeof(float));
        }
}

static void gather_together(const hb_feature *f, int64_t n_features, int64_t first, int64_t last, int64_t dim,
                            float *restrict out, int64_t stride) {
#define GATHER_TOGETHER(dim) gather_together_as(f, n_features, first, last, dim, out, stride); break
    BY_DIM(dim, GATHER_TOGETHER)
}

static void scatter(const hb_slabs *s, const int64_t *slots, int64_t n, int64_t column, int64_t width,
                    const float *lines, int64_t stride) {
    int64_t columns = column >= s->dim ? 0 : column + width < s->dim ? width : s->dim - column;
    int64_t first = column > s->dim ? column - s->dim : 0; /* of the state */
    for (int64_t i = 0; i < n; i++) {
        const float *from = lines + i * stride;
        if (i + 8 < n && slots[i + 8] >= 0) {
            fetch(hb_row(s, slots[i + 8]), columns * item_nbytes(s));
            fetch(hb_state(s, slots[i + 8]) + first, (width - columns) * 4);
        }
        if (slots[i] < 0) continue;
        if (s->dtype == HB_FLOAT32)
            memcpy((float *)hb_row(s, slots[i]) + column, from, (size_t)columns * sizeof(float));
        else
            narrow_row(s->dtype, from, NULL, columns, (uint16_t *)hb_row(s, slots[i]) + column);
        memcpy(hb_state(s, slots[i]) + first, from + columns, (size_t)(width - columns) * sizeof(float));
    }
}

/* ---- whole lines for a device's memory, or from there, which the CPU does not ask for: past the cache ---- */

#if defined(__AVX2__)
typedef uint32_t eight __attribute__((vector_size(32), may_alias));
typedef uint16_t eight_narrow __attribute__((vector_size(16), may_alias));

/* Both halves of a cache line at once, lest it go to memory in two. */
INLINE void put_past(char *to, eight a, eight b) {
    _mm256_stream_si256((__m256i *)to, (__m256i)a);
    _mm256_stream_si256((__m256i *)to + 1, (__m256i)b);
}

INLINE eight eight_at(const char *p) { return (eight)_mm256_loadu_si256((const __m256i *)p); }

INLINE void copy_past(char *to, const char *from, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) put_past(to + i, eight_at(from + i), eight_at(from + i + 32));
}

INLINE void widen_past(char *to, const char *from, int64_t n) { /* of bfloat16 */
    for (int64_t i = 0; i < n; i += 16) {
        eight all = eight_at(from + 2 * i);
        eight a = __builtin_convertvector((eight_narrow)_mm256_castsi256_si128((__m256i)all), eight);
        eight b = __builtin_convertvector((eight_narrow)_mm256_extracti128_si256((__m256i)all, 1), eight);
        put_past(to + 4 * i, a << 16, b << 16);
    }
}

/* Loops with little in them: what the compiler then puts on the stack would cost half as much again as all of it. */
#define PAST static __attribute__((noinline)) void

PAST read_past(const hb_slabs *s, const int64_t *slots, int64_t n, char *out) {
    int64_t nbytes = s->row_stride, d = ahead(nbytes);
    for (int64_t i = 0; i < n; i++, out += nbytes) {
        if (i + d < n) fetch(hb_row(s, slots[i + d]), nbytes);
        copy_past(out, hb_row(s, slots[i]), nbytes);
    }
}

INLINE void read_narrow_as(const hb_slabs *s, const int64_t *slots, int64_t n, char *out, int64_t dim) {
    int64_t nbytes = s->row_stride, d = ahead(nbytes);
    for (int64_t i = 0; i < n; i++, out += nbytes + 2 * dim) {
        if (i + d < n) fetch(hb_row(s, slots[i + d]), nbytes);
        const char *row = hb_row(s, slots[i]);
        widen_past(out, row, dim);
        copy_past(out + 4 * dim, row + 2 * dim, nbytes - 2 * dim);
    }
}

PAST read_narrow_past(const hb_slabs *s, const int64_t *slots, int64_t n, char *out) {
#define READ(dim) read_narrow_as(s, slots, n, out, dim); break
    BY_DIM(s->dim, READ)
}

enum { TLB_AHEAD = 8 }; /* a line that is overwritten is not read, but its page is to be known */

PAST write_past(const hb_slabs *s, const int64_t *slots, int64_t n, const char *lines) {
    int64_t nbytes = s->row_stride;
    for (int64_t i = 0; i < n; i++, lines += nbytes) {
        if (i + TLB_AHEAD < n && slots[i + TLB_AHEAD] >= 0) fetch_near(hb_row(s, slots[i + TLB_AHEAD]), 1);
        if (slots[i] < 0) continue;
        copy_past(hb_row(s, slots[i]), lines, nbytes);
    }
}

/* Narrowed, a row is stored as usual: held in registers until it is all there, it takes longer. */
INLINE void write_narrow_as(const hb_slabs *s, const int64_t *slots, int64_t n, const char *lines, int64_t dim) {
    int64_t nbytes = s->row_stride;
    for (int64_t i = 0; i < n; i++, lines += nbytes + 2 * dim) {
        if (i + TLB_AHEAD < n && slots[i + TLB_AHEAD] >= 0) fetch(hb_row(s, slots[i + TLB_AHEAD]), 2 * dim);
        if (slots[i] < 0) continue;
        char *row = hb_row(s, slots[i]);
        narrow_row(s->dtype, (const float *)lines, NULL, dim, (uint16_t *)row);
        copy_past(row + 2 * dim, lines + 4 * dim, nbytes - 2 * dim);
    }
}

PAST write_narrow_past(const hb_slabs *s, const int64_t *slots, int64_t n, const char *lines) {
#define WRITE(dim) write_narrow_as(s, slots, n, lines, dim); break
    BY_DIM(s->dim, WRITE)
}

/* Whether rows and states are cache lines side by side. */
INLINE int past(const hb_slabs *s) {
    int64_t row_nbytes = s->dim * item_nbytes(s);
    return (s->state_at == row_nbytes || s->n_state == 0) && row_nbytes % 64 == 0 && s->n_state % 16 == 0;
}
#endif

static void read_lines(const hb_slabs *s, const int64_t *slots, int64_t n, float *out) {
#if defined(__AVX2__)
    int64_t all = 0;
    for (int64_t i = 0; i < n; i++) all |= slots[i];
    if (all >= 0 && s->dtype != HB_FLOAT16 && (uintptr_t)out % 64 == 0 && past(s)) {
        (s->dtype == HB_FLOAT32 ? read_past : read_narrow_past)(s, slots, n, (char *)out);
        _mm_sfence();
        return;
    }
#endif
    gather(s, slots, NULL, n, s->dim + s->n_state, out);
}

static void write_lines(const hb_slabs *s, const int64_t *slots, int64_t n, const float *lines) {
    int64_t width = s->dim + s->n_state;
#if defined(__AVX2__)
    if (past(s)) {
        (s->dtype == HB_FLOAT32 ? write_past : write_narrow_past)(s, slots, n, (const char *)lines);
        _mm_sfence();
        return;
    }
#endif
    scatter(s, slots, n, 0, width, lines, width);
}

INLINE void expand_as(const float *rows, const int64_t *index, int64_t n, int64_t dim, float *restrict out) {
    int64_t d = ahead(dim * 4);
    for (int64_t i = 0; i < n; i++) {
        if (i + d < n) fetch(rows + index[i + d] * dim, dim * 4);
        memcpy(out + i * dim, rows + index[i] * dim, (size_t)dim * sizeof(float));
    }
}

static void expand(const float *rows, const int64_t *index, int64_t n, int64_t dim, float *restrict out) {
#define EXPAND(dim) expand_as(rows, index, n, dim, out); break
    BY_DIM(dim, EXPAND)
}

/* ---- sums ---- */

/* Row of value p of what is pooled, on its way: of rows by inverse, or of slots by inverse, or of slots. */
INLINE const float *pooled_row(const float *rows, const hb_slabs *s, const int64_t *slots, const int64_t *inverse,
                               int64_t p, int64_t dim) {
    static const float absent[128];
    int64_t at = inverse ? inverse[p] : p;
    const float *row = rows ? rows + at * dim : coming(s, slots[at], dim * 4);
    if (rows) fetch(row, dim * 4);
    return row ? row : absent;
}

INLINE void pool_wide(const float *rows, const hb_slabs *s, const int64_t *slots, const int64_t *inverse,
                      const int64_t *splits, const float *weight, const float *row_scale, int64_t n_out, int64_t dim,
                      float *restrict out) {
    const float *at[COMING];
    int64_t begin = splits[0], end = splits[n_out], d = ahead(dim * 4);
    for (int64_t p = begin; p < begin + d && p < end; p++)
        at[p & (COMING - 1)] = pooled_row(rows, s, slots, inverse, p, dim);
    for (int64_t b = 0; b < n_out; b++) {
        vec sum[128 / LANES];
        for (int64_t k = 0; k < dim / LANES; k++) sum[k] = (vec){0};
        for (int64_t p = splits[b]; p < splits[b + 1]; p++) {
            const vec *row = (const vec *)at[p & (COMING - 1)];
            if (p + d < end) at[(p + d) & (COMING - 1)] = pooled_row(rows, s, slots, inverse, p + d, dim);
            if (weight)
                for (int64_t k = 0; k < dim / LANES; k++) sum[k] += weight[p] * row[k];
            else
                for (int64_t k = 0; k < dim / LANES; k++) sum[k] += row[k];
        }
        vec *to = (vec *)(out + b * dim);
        for (int64_t k = 0; k < dim / LANES; k++) to[k] = sum[k];
        if (row_scale)
            for (int64_t k = 0; k < dim / LANES; k++) to[k] *= row_scale[b];
    }
}

#define POOL_WIDE(dim) pool_wide(rows, s, slots, inverse, splits, weight, row_scale, n_out, dim, out)

INLINE int pool_slots_by(const hb_slabs *s, const int64_t *slots, const int64_t *inverse, const int64_t *splits,
                         const float *weight, const float *row_scale, int64_t n_out, float *restrict out) {
    const float *const rows = NULL;
    if (s->dtype != HB_FLOAT32) return -1;
    switch (s->dim) {
    case 16: POOL_WIDE(16); return 0;
    case 32: POOL_WIDE(32); return 0;
    case 64: POOL_WIDE(64); return 0;
    case 128: POOL_WIDE(128); return 0;
    }
    return -1;
}

static int pool_slots(const hb_slabs *s, const int64_t *slots, const int64_t *inverse, const int64_t *splits,
                      const float *weight, const float *row_scale, int64_t n_out, float *restrict out) {
    if (inverse) return pool_slots_by(s, slots, inverse, splits, weight, row_scale, n_out, out);
    return pool_slots_by(s, slots, NULL, splits, weight, row_scale, n_out, out);
}

static void pool(const float *rows, const int64_t *inverse, const int64_t *splits, const float *weight,
                 const float *row_scale, int64_t n_out, int64_t dim, float *restrict out) {
    const hb_slabs *const s = NULL;
    const int64_t *const slots = NULL;
    switch (rows ? dim : 0) { /* no rows: nothing to sum, but zeros to write */
    case 16: POOL_WIDE(16); return;
    case 32: POOL_WIDE(32); return;
    case 64: POOL_WIDE(64); return;
    case 128: POOL_WIDE(128); return;
    }
    for (int64_t b = 0; b < n_out; b++) {
        float *restrict to = out + b * dim;
        memset(to, 0, (size_t)dim * sizeof(float));
        for (int64_t p = splits[b]; p < splits[b + 1]; p++) {
            const float *restrict row = rows + inverse[p] * dim;
            if (weight)
                for (int64_t j = 0; j < dim; j++) to[j] += weight[p] * row[j];
            else
                for (int64_t j = 0; j < dim; j++) to[j] += row[j];
        }
        if (row_scale)
            for (int64_t j = 0; j < dim; j++) to[j] *= row_scale[b];
    }
}

INLINE const float *term(const hb_gradients *g, int64_t p, int64_t dim) {
    return g->values + (g->rows ? g->rows[p] : p) * dim;
}

/* Asks for the gradient of the position that comes `d` later in the order, whatever its segment. */
INLINE void fetch_term(const hb_gradients *g, int64_t i, int64_t d, int64_t end, int64_t dim) {
    if (i + d < end) fetch(term(g, g->order[i + d], dim), dim * 4);
}

enum { TILE = 256 }; /* columns of a block sum held on the stack */

INLINE void sum_any(const hb_gradients *g, int64_t begin, int64_t end, int64_t dim, float *restrict total) {
    float block[TILE];
    if (begin == end) memset(total, 0, (size_t)dim * sizeof(float));
    for (int64_t first = begin; first < end; first += HB_SUM_BLOCK) {
        int64_t last = first + HB_SUM_BLOCK < end ? first + HB_SUM_BLOCK : end;
        for (int64_t t = 0; t < dim; t += TILE) {
            int64_t w = dim - t < TILE ? dim - t : TILE;
            for (int64_t i = first; i < last; i++) {
                const float *restrict v = term(g, g->order[i], dim) + t;
                float k = g->scale ? g->scale[g->order[i]] : 1.0f; /* times 1 is exact */
                if (i == first)
                    for (int64_t j = 0; j < w; j++) block[j] = k * v[j];
                else
                    for (int64_t j = 0; j < w; j++) block[j] += k * v[j];
            }
            if (first == begin)
                for (int64_t j = 0; j < w; j++) total[t + j] = block[j];
            else
                for (int64_t j = 0; j < w; j++) total[t + j] += block[j];
        }
    }
}

INLINE void sum_wide(const hb_gradients *g, int64_t begin, int64_t end, int64_t n, int64_t dim, float *restrict out) {
    vec *total = (vec *)out;
    int64_t d = ahead(dim * 4);
    if (begin == end)
        for (int64_t k = 0; k < dim / LANES; k++) total[k] = (vec){0};
    for (int64_t first = begin; first < end; first += HB_SUM_BLOCK) {
        int64_t last = first + HB_SUM_BLOCK < end ? first + HB_SUM_BLOCK : end;
        vec block[128 / LANES];
        const vec *v = (const vec *)term(g, g->order[first], dim);
        fetch_term(g, first, d, n, dim);
        for (int64_t k = 0; k < dim / LANES; k++) block[k] = v[k];
        if (g->scale)
            for (int64_t k = 0; k < dim / LANES; k++) block[k] *= g->scale[g->order[first]];
        for (int64_t i = first + 1; i < last; i++) {
            v = (const vec *)term(g, g->order[i], dim);
            fetch_term(g, i, d, n, dim);
            if (g->scale)
                for (int64_t k = 0; k < dim / LANES; k++) block[k] += g->scale[g->order[i]] * v[k];
            else
                for (int64_t k = 0; k < dim / LANES; k++) block[k] += v[k];
        }
        if (first == begin)
            for (int64_t k = 0; k < dim / LANES; k++) total[k] = block[k];
        else
            for (int64_t k = 0; k < dim / LANES; k++) total[k] += block[k];
    }
}

INLINE void sum(const hb_gradients *g, int64_t s, int64_t dim, float *restrict to) {
    int64_t begin = g->starts[s], end = g->starts[s + 1];
    if (dim == 16 || dim == 32 || dim == 64 || dim == 128)
        sum_wide(g, begin, end, g->starts[g->n_segments], dim, to);
    else
        sum_any(g, begin, end, dim, to);
}

/* Segment s without a copy where it is one gradient as it stands, else summed into `to`. */
INLINE const float *gradient(const hb_gradients *g, int64_t s, int64_t dim, float *to) {
    if (!g->order) return g->values + s * dim;
    int64_t begin = g->starts[s];
    if (!g->scale && g->starts[s + 1] - begin == 1) {
        fetch_term(g, begin, ahead(dim * 4), g->starts[g->n_segments], dim);
        return term(g, g->order[begin], dim);
    }
    sum(g, s, dim, to);
    return to;
}

static void segment_sum(const hb_gradients *g, float *restrict out) {
#define SUM(dim)                                                               \
    for (int64_t s = 0; s < g->n_segments; s++) sum(g, s, dim, out + s * dim); \
    break
    BY_DIM(g->dim, SUM)
}

/* Values come row by row, so a sum's block is held until its HB_SUM_BLOCK values are there: the same additions as in
 * `sum`. A block starts from -0, which adds nothing to any value. Values that are not finite leave bits in `bad`. */
INLINE void add_to_sum(const hb_feature *f, int64_t s, const float *v, int64_t dim, ivec *bad, int32_t *bad1) {
    static const uint32_t minus0[16] = {1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31,
                                        1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31, 1u << 31};
    const int64_t wide = dim / LANES * LANES;
    int32_t seen = f->seen[s]++;
    float *sum = f->sums + s * dim;
    if (__builtin_expect(seen && seen % HB_SUM_BLOCK == 0, 0)) {
        float *block = f->blocks + s * dim;
        if (seen == HB_SUM_BLOCK)
            memcpy(block, sum, (size_t)dim * sizeof(float));
        else
            for (int64_t j = 0; j < dim; j++) block[j] += sum[j];
    }
    int old = seen % HB_SUM_BLOCK != 0;
    uintptr_t from = ((uintptr_t)sum & -(uintptr_t)old) | ((uintptr_t)minus0 & -(uintptr_t)!old);
    for (int64_t j = 0; j < wide; j += LANES) {
        vec x = *(const vec *)(v + j);
        ivec bits = (ivec)x & 0x7F800000;
        *bad |= bits == 0x7F800000;
        *(vec *)(sum + j) = *(const vec *)(from + (old ? j * 4 : 0)) + x;
    }
    for (int64_t j = wide; j < dim; j++) {
        *bad1 |= (to_bits(v[j]) & 0x7F800000) == 0x7F800000;
        sum[j] = old ? sum[j] + v[j] : v[j];
    }
}

INLINE int none_bad(ivec bad, int32_t bad1) {
    for (int k = 0; k < LANES; k++) bad1 |= bad[k];
    return bad1 == 0;
}

INLINE int sum_together_as(const hb_feature *f, int64_t n_features, int64_t n_rows, int64_t dim, const float *grads,
                           int64_t stride) {
    const int64_t d = rows_ahead(n_features);
    ivec bad = {0};
    int32_t bad1 = 0;
    for (int64_t b = 0; b < n_rows; b++)
        for (int64_t k = 0; k < n_features; k++) {
            const float *v = grads + b * stride + f[k].at;
            if (b + d < n_rows) {
                fetch_near(f[k].sums + f[k].inverse[b + d] * dim, dim * 4);
                if (d > 1) fetch_near(v + d * stride, dim * 4); /* else the CPU sees that they come in order */
            }
            add_to_sum(&f[k], f[k].inverse[b], v, dim, &bad, &bad1);
        }
    return none_bad(bad, bad1);
}

static int sum_together(const hb_feature *f, int64_t n_features, int64_t n_rows, int64_t dim, const float *grads,
                        int64_t stride) {
#define SUM_TOGETHER(dim) return sum_together_as(f, n_features, n_rows, dim, grads, stride)
    BY_DIM(dim, SUM_TOGETHER)
}

enum { ROWS = 512 }; /* that are looked through at once for those of some keys */

INLINE int sum_some_as(const hb_feature *f, int64_t first, int64_t last, int64_t n_rows, int64_t dim,
                       const float *grads, int64_t stride) {
    const int64_t d = rows_ahead(1);
    ivec bad = {0};
    int32_t bad1 = 0, at[ROWS];
    for (int64_t begin = 0; begin < n_rows; begin += ROWS) {
        int64_t end = begin + ROWS < n_rows ? begin + ROWS : n_rows, n = 0;
        for (int64_t b = begin; b < end; b++) {
            at[n] = (int32_t)(b - begin);
            n += (uint64_t)(f->inverse[b] - first) < (uint64_t)(last - first);
        }
        const int32_t *inverse = f->inverse + begin;
        const float *v = grads + begin * stride + f->at;
        for (int64_t i = 0; i < n; i++) {
            if (i + d < n) {
                fetch_near(f->sums + inverse[at[i + d]] * dim, dim * 4);
                fetch_near(v + at[i + d] * stride, dim * 4);
            }
            add_to_sum(f, inverse[at[i]], v + at[i] * stride, dim, &bad, &bad1);
        }
    }
    return none_bad(bad, bad1);
}

static int sum_some(const hb_feature *f, int64_t first, int64_t last, int64_t n_rows, int64_t dim, const float *grads,
                    int64_t stride) {
#define SUM_SOME(dim) return sum_some_as(f, first, last, n_rows, dim, grads, stride)
    BY_DIM(dim, SUM_SOME)
}

static void finish_sums(const hb_feature *f, const int64_t *counts, int64_t n, int64_t dim) {
    for (int64_t s = 0; s < n; s++)
        if (counts[s] > HB_SUM_BLOCK)
            for (int64_t j = 0; j < dim; j++) f->sums[s * dim + j] = f->blocks[s * dim + j] + f->sums[s * dim + j];
}

/* Sum of squares by 16 partial sums added as a tree: the one order that every vector width can follow. */
INLINE float sum_squares(const float *x, int64_t n) {
    float p[16] __attribute__((aligned(64))) = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) p[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < n; j++) p[j] += x[i + j] * x[i + j];
    const quad *q = (const quad *)p;
    quad half = (q[0] + q[2]) + (q[1] + q[3]); /* p[j] + p[j + 8], then + 4 */
    return (half[0] + half[2]) + (half[1] + half[3]);
}

INLINE int finite(const float *x, int64_t n) {
    uint32_t most = 0;
    for (int64_t j = 0; j < n; j++) {
        uint32_t b = to_bits(x[j]) & 0x7FFFFFFF;
        most = b > most ? b : most;
    }
    return most < 0x7F800000u;
}

static int64_t count_bad(const float *rows, int64_t n, int64_t dim) {
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad += !finite(rows + i * dim, dim);
    return bad;
}

/* ---- rules ----
 * Row and state are updated in place by the gradient g summed per key. The order of operations is part of the contract
 * (other implementations must follow it). h: the hyper-parameters that optimizers.py packs. */

/* h: lr, momentum, 1 for Nesterov's */
INLINE void sgd(float *restrict row, float *restrict momentum, const float *restrict g, int64_t dim, const float *h) {
    float lr = h[0], mu = h[1];
    if (mu == 0.0f) {
        for (int64_t j = 0; j < dim; j++) row[j] -= lr * g[j];
    } else if (h[2] == 0.0f) {
        for (int64_t j = 0; j < dim; j++) {
            momentum[j] = mu * momentum[j] + g[j];
            row[j] -= lr * momentum[j];
        }
    } else {
        for (int64_t j = 0; j < dim; j++) {
            momentum[j] = mu * momentum[j] + g[j];
            row[j] -= lr * (g[j] + mu * momentum[j]);
        }
    }
}

/* h: lr, eps beside the root, eps under the root */
INLINE void adagrad(float *restrict row, float *restrict sum, const float *restrict g, int64_t dim, const float *h) {
    float lr = h[0], eps = h[1], under = h[2];
    for (int64_t j = 0; j < dim; j++) {
        sum[j] += g[j] * g[j];
        row[j] -= lr * (g[j] / (sqrtf(sum[j] + under) + eps));
    }
}

/* h: lr, eps */
INLINE void rowwise_adagrad(float *restrict row, float *restrict sum, const float *restrict g, int64_t dim,
                            const float *h) {
    sum[0] += sum_squares(g, dim) / (float)dim;
    float step = h[0] / (sqrtf(sum[0]) + h[1]);
    for (int64_t j = 0; j < dim; j++) row[j] -= step * g[j];
}

/* h: lr / (1 - beta1^t), 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, 1 - lr * weight_decay */
INLINE void adam(float *restrict row, float *restrict m, const float *restrict g, int64_t dim, const float *h) {
    float *restrict v = m + dim;
    for (int64_t j = 0; j < dim; j++) {
        m[j] += (g[j] - m[j]) * h[1];
        v[j] = h[2] * v[j] + (h[3] * g[j]) * g[j];
        row[j] = row[j] * h[6] - h[0] * (m[j] / (sqrtf(v[j]) / h[4] + h[5]));
    }
}

/* x^n by squaring: libm differs between machines, this does not. */
INLINE double power(double x, uint32_t n) {
    double out = 1;
    for (; n; n >>= 1, x *= x)
        if (n & 1) out *= x;
    return out;
}

/* adam, bias-corrected by the row's own count of updates, which follows its moments. h: lr, 1 - beta1, beta2,
 * 1 - beta2, 1 where eps is added before the correction, eps, 1 - lr * weight_decay */
INLINE void row_step_adam(float *restrict row, float *restrict m, const float *restrict g, int64_t dim,
                          const float *h) {
    float *t = m + 2 * dim, own[HB_OWN];
    if (t[0] < 16777216.0f) t[0] += 1.0f; /* corrected no more by then */
    uint32_t n = t[0] >= 0.0f && t[0] < 16777216.0f ? (uint32_t)(int32_t)t[0] : 16777216;
    memcpy(own, h, sizeof own);
    own[0] = (float)((double)h[0] / (1 - power(1 - (double)h[1], n)));
    own[4] = (float)sqrt(1 - power(1 - (double)h[3], n));
    if (h[4] != 0.0f) own[5] = h[5] / own[4];
    adam(row, m, g, dim, own);
}

INLINE void rowwise_adam(float *restrict row, float *restrict m, const float *restrict g, int64_t dim,
                         const float *h) {
    float *v = m + dim;
    v[0] = h[2] * v[0] + h[3] * (sum_squares(g, dim) / (float)dim);
    float denominator = sqrtf(v[0]) / h[4] + h[5];
    for (int64_t j = 0; j < dim; j++) {
        m[j] += (g[j] - m[j]) * h[1];
        row[j] = row[j] * h[6] - h[0] * (m[j] / denominator);
    }
}

/* h: lr, l1, 2 * l2 + beta / lr. McMahan et al., Ad click prediction (KDD 2013), with power -1/2. */
INLINE void ftrl(float *restrict row, float *restrict z, const float *restrict g, int64_t dim, const float *h) {
    float *restrict n = z + dim;
    float lr = h[0], l1 = h[1], l2 = h[2];
    for (int64_t j = 0; j < dim; j++) {
        float total = n[j] + g[j] * g[j], root = sqrtf(total);
        z[j] += g[j] - (root - sqrtf(n[j])) / lr * row[j];
        n[j] = total;
        float clipped = z[j] > l1 ? l1 : (z[j] < -l1 ? -l1 : z[j]);
        row[j] = (clipped - z[j]) / (root / lr + l2);
    }
}

/* h: lr, decays due by now, rate, floor. The count of decays done follows the sums; one is made up for at a time. */
INLINE void adagrad_decay(float *restrict row, float *restrict sum, const float *restrict g, int64_t dim,
                          const float *h) {
    float lr = h[0], rate = 1.0f, least = 0.0f;
    if (h[1] > sum[dim]) {
        rate = h[2], least = h[3];
        sum[dim] += 1.0f;
    }
    for (int64_t j = 0; j < dim; j++) {
        float kept = sum[j] * rate;
        kept = kept < least ? least : kept;
        sum[j] = kept + g[j] * g[j];
        row[j] -= lr * (g[j] / sqrtf(sum[j]));
    }
}

INLINE void step(int64_t rule, float *restrict row, float *restrict state, const float *restrict g, int64_t dim,
                 const float *h) {
    switch (rule) {
    case HB_SGD: sgd(row, state, g, dim, h); break;
    case HB_ADAGRAD: adagrad(row, state, g, dim, h); break;
    case HB_ROWWISE_ADAGRAD: rowwise_adagrad(row, state, g, dim, h); break;
    case HB_ADAM: adam(row, state, g, dim, h); break;
    case HB_ROWWISE_ADAM: rowwise_adam(row, state, g, dim, h); break;
    case HB_FTRL: ftrl(row, state, g, dim, h); break;
    case HB_ADAGRAD_DECAY: adagrad_decay(row, state, g, dim, h); break;
    case HB_ROW_STEP_ADAM: row_step_adam(row, state, g, dim, h); break;
    }
}

static void step_any(int64_t rule, float *row, float *state, const float *g, int64_t dim, const float *h) {
    step(rule, row, state, g, dim, h);
}

/* ---- one update ---- */

INLINE void fetch_line(const hb_slabs *s, const hb_update *u, int64_t i, int64_t d, int64_t row_nbytes,
                       int64_t state_nbytes) {
    if (i + d < u->g.n_segments && u->slots[i + d] >= 0) {
        fetch(hb_row(s, u->slots[i + d]), row_nbytes);
        fetch(hb_state(s, u->slots[i + d]), state_nbytes);
    }
}

/* Whole float32 rows and nothing but their rule. Some gradients are summed, then as many rows stepped: how many terms a
 * sum has is hard to foresee, and a branch gone wrong amid the steps would undo what the CPU does ahead of time. */
INLINE void run(const hb_slabs *s, const hb_update *u, int64_t rule, int64_t dim) {
    int64_t d = ahead(dim * 4), state_nbytes = s->n_state * 4, n = u->g.n_segments;
    const float *h = u->parts[0].hyper, *g[HB_TOGETHER];
    float *sums = u->scratch;
    for (int64_t first = 0; first < n; first += HB_TOGETHER) {
        int64_t some = n - first < HB_TOGETHER ? n - first : HB_TOGETHER;
        for (int64_t k = 0; k < some; k++) g[k] = gradient(&u->g, first + k, dim, sums + k * dim);
        for (int64_t k = 0; k < some; k++) {
            int64_t slot = u->slots[first + k];
            fetch_line(s, u, first + k, d, dim * 4, state_nbytes);
            if (slot >= 0) step(rule, hb_row(s, slot), hb_state(s, slot), g[k], dim, h);
        }
    }
}

/* run() of row-wise Adagrad: its roots and quotients, one a row, are taken for several rows at once. */
INLINE void run_rowwise(const hb_slabs *s, const hb_update *u, int64_t dim) {
    int64_t d = dim <= 32 ? 2 * HB_TOGETHER : HB_TOGETHER, n = u->g.n_segments;
    const float lr = u->parts[0].hyper[0], eps = u->parts[0].hyper[1], *g[HB_TOGETHER];
    float *sums = u->scratch, step[HB_TOGETHER], none = 0, *total[HB_TOGETHER];
    for (int64_t first = 0; first < n; first += HB_TOGETHER) {
        int64_t some = n - first < HB_TOGETHER ? n - first : HB_TOGETHER;
        for (int64_t k = 0; k < some; k++) {
            fetch_line(s, u, first + k, d, dim * 4, 4);
            g[k] = gradient(&u->g, first + k, dim, sums + k * dim);
        }
        for (int64_t k = 0; k < some; k++) {
            int64_t slot = u->slots[first + k];
            total[k] = slot >= 0 ? hb_state(s, slot) : &none;
            step[k] = *total[k] + sum_squares(g[k], dim) / (float)dim;
            *total[k] = step[k];
        }
        for (int64_t k = some; k < HB_TOGETHER; k++) step[k] = 1.0f;
        for (int64_t k = 0; k < HB_TOGETHER; k++) step[k] = lr / (sqrtf(step[k]) + eps);
        for (int64_t k = 0; k < some; k++) {
            int64_t slot = u->slots[first + k];
            if (slot < 0) continue;
            float *restrict row = hb_row(s, slot);
            int64_t whole = dim / LANES * LANES;
            for (int64_t j = 0; j < whole; j += LANES) *(vec *)(row + j) -= step[k] * *(const vec *)(g[k] + j);
            for (int64_t j = whole; j < dim; j++) row[j] -= step[k] * g[k][j];
        }
    }
}

#define RUN(name, rule)                                         \
    static void name(const hb_slabs *s, const hb_update *u) {   \
        BY_DIM(u->g.dim, CALL_##rule)                           \
    }
#define CALL_HB_SGD(dim) run(s, u, HB_SGD, dim); break
#define CALL_HB_ADAGRAD(dim) run(s, u, HB_ADAGRAD, dim); break
#define CALL_HB_ROWWISE_ADAGRAD(dim) run_rowwise(s, u, dim); break
#define CALL_HB_ADAM(dim) run(s, u, HB_ADAM, dim); break
RUN(run_sgd, HB_SGD)
RUN(run_adagrad, HB_ADAGRAD)
RUN(run_rowwise_adagrad, HB_ROWWISE_ADAGRAD)
RUN(run_adam, HB_ADAM)

/* Anything: narrow rows, parts, clipping, weight decay, gradients to be left out. */
static int64_t run_any(const hb_slabs *s, const hb_update *u) {
    int64_t dim = u->g.dim, d = ahead(dim * 4), skipped = 0;
    int64_t blocks = (dim + 7) / 8, together = blocks <= 16 ? 16 / blocks : 1; /* rows whose noise is drawn at once */
    float *sum_at = u->scratch, *changed = sum_at + dim, *wide = changed + dim;
    uint16_t *noise = (uint16_t *)(wide + dim);
    for (int64_t i = 0; i < u->g.n_segments; i++) {
        if (s->dtype != HB_FLOAT32 && i % together == 0) {
            int64_t left = u->g.n_segments - i;
            noise_of(u->keys + i, left < together ? left : together, u->seed, u->step, blocks, noise);
        }
        fetch_line(s, u, i, d, dim * item_nbytes(s), s->n_state * 4);
        if (u->slots[i] < 0) continue;
        const float *g = gradient(&u->g, i, dim, sum_at);
        if (u->skip && !finite(g, dim)) {
            skipped++;
            continue;
        }
        float *row = s->dtype == HB_FLOAT32 ? hb_row(s, u->slots[i]) : wide, *state = hb_state(s, u->slots[i]);
        if (row == wide) widen_row(s->dtype, hb_row(s, u->slots[i]), dim, wide);
        for (int64_t k = 0; k < u->n_parts; k++) {
            const hb_part *part = &u->parts[k];
            const float *h = part->hyper, *from = g + part->column;
            float most = h[HB_CLIP_VALUE], norm = h[HB_CLIP_NORM], decay = h[HB_WEIGHT_DECAY], *w = row + part->column;
            if (most > 0 || norm > 0 || decay != 0) {
                for (int64_t j = 0; j < part->dim; j++) changed[j] = from[j];
                if (most > 0)
                    for (int64_t j = 0; j < part->dim; j++)
                        changed[j] = changed[j] > most ? most : changed[j] < -most ? -most : changed[j];
                float length = norm > 0 ? sqrtf(sum_squares(changed, part->dim)) : 0;
                if (norm > 0 && length > norm)
                    for (int64_t j = 0; j < part->dim; j++) changed[j] *= norm / length;
                if (decay != 0)
                    for (int64_t j = 0; j < part->dim; j++) changed[j] += decay * w[j];
                from = changed;
            }
            step_any(part->rule, w, state + part->state, from, part->dim, h);
        }
        if (row == wide) narrow_row(s->dtype, wide, noise + i % together * blocks * 8, dim, hb_row(s, u->slots[i]));
    }
    return skipped;
}

static int64_t apply(const hb_slabs *s, const hb_update *u) {
    int plain = u->n_parts == 1 && u->parts[0].dim == u->g.dim && u->parts[0].state == 0 && !u->skip &&
                s->dtype == HB_FLOAT32;
    for (int64_t k = 0; k < u->n_parts; k++) {
        const float *h = u->parts[k].hyper;
        if (u->parts[k].rule < 0 || u->parts[k].rule >= HB_RULES) return -1;
        plain &= h[HB_CLIP_VALUE] == 0 && h[HB_CLIP_NORM] == 0 && h[HB_WEIGHT_DECAY] == 0;
    }
    switch (plain ? u->parts[0].rule : -1) {
    case HB_SGD: run_sgd(s, u); return 0;
    case HB_ADAGRAD: run_adagrad(s, u); return 0;
    case HB_ROWWISE_ADAGRAD: run_rowwise_adagrad(s, u); return 0;
    case HB_ADAM: run_adam(s, u); return 0;
    default: return run_any(s, u);
    }
}

/* ---- initial values ---- */

/* Natural logarithm of x in (0, 2), normal, from + and * alone: libm differs between machines, this does not. */
INLINE float portable_log(float x) {
    int32_t b = (int32_t)to_bits(x) - 0x3F3504F3; /* sqrt(1/2): the exponent that leaves [sqrt(1/2), sqrt(2)) */
    float e = (float)(b >> 23), f = from_bits((uint32_t)(b & 0x7FFFFF) + 0x3F3504F3u) - 1.0f;
    float p = -0.0745119676f;
    p = p * f + 0.128066286f, p = p * f + -0.132660359f, p = p * f + 0.141996473f, p = p * f + -0.166083679f;
    p = p * f + 0.200009391f, p = p * f + -0.250015795f, p = p * f + 0.333333462f, p = p * f + -0.499999881f;
    return e * 0.693147182f + (p * f + 1.0f) * f;
}

/* Of a word: the middle of one of 2^23 equal parts of (0, 1). */
INLINE float uniform_of(uint32_t word) { return (float)(int32_t)(word >> 9) * 0x1p-23f + 0x1p-24f; }

/* Box and Muller: the normal numbers r cos t and r sin t of two words. Sine and cosine by polynomials within an eighth
 * of a turn of the nearest quarter. */
INLINE void normals_of(uint32_t radius, uint32_t angle, float *restrict a, float *restrict b) {
    float u = (float)(int32_t)(radius >> 1) * 0x1p-31f + 0x1p-32f; /* (0, 1], fine near 0 */
    float r = sqrtf(-2.0f * portable_log(u));
    uint32_t quarter = (angle + 0x20000000u) >> 30;
    float x = (float)(int32_t)(angle - (quarter << 30)) * 0x1p-29f, y = x * x; /* [-1, 1] eighths */
    float s = 3.08996675e-07f, c = 3.52979714e-06f;
    s = s * y + -3.65723936e-05f, s = s * y + 0.00249039312f, s = s * y + -0.0807455108f, s = s * y + 0.785398185f;
    c = c * y + -0.000325938599f, c = c * y + 0.0158543251f, c = c * y + -0.308425128f, c = c * y + 1.0f;
    uint32_t sine = to_bits(s * x), cosine = to_bits(c), swap = 0u - (quarter & 1);
    uint32_t first = (cosine & ~swap) | (sine & swap), second = (sine & ~swap) | (cosine & swap);
    first ^= ((quarter + 1) & 2) << 30; /* cos is negative in quarters 1 and 2, sin in 2 and 3 */
    second ^= (quarter & 2) << 30;
    *a = r * from_bits(first), *b = r * from_bits(second);
}

/* Quantile of the normal cut at two standard deviations, fitted in -log(1 - s^2) after Giles (GPU Computing Gems,
 * 2011), for s = erf(x / sqrt(2)). */
INLINE float cut_normal_of(uint32_t word) {
    float s = (uniform_of(word) * 2.0f - 1.0f) * 0.9544997f, w = 0.0f - portable_log((1.0f - s) * (1.0f + s));
    float p = -4.99041448e-07f;
    p = p * w + -2.26948578e-06f, p = p * w + 7.75767767e-05f, p = p * w + -0.000194927314f;
    p = p * w + -0.00329360249f, p = p * w + 0.0163305625f, p = p * w + 0.328117192f, p = p * w + 1.25331414f;
    float x = p * s;
    return x > 2.0f ? 2.0f : x < -2.0f ? -2.0f : x;
}

/* Values of BLOCKS blocks, four each; a Box-Muller pair is columns 0 and 2, or 1 and 3. */
INLINE void values_of(const hb_draw *d, uint64_t words[4][BLOCKS], float *restrict out) {
    uint32_t c[4][BLOCKS];
    float v[4][BLOCKS], a = (float)d->a, b = (float)d->b, range = (float)(d->b - d->a);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < BLOCKS; i++) c[k][i] = (uint32_t)words[k][i];
    if (d->kind == HB_NORMAL) {
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < BLOCKS; i++) normals_of(c[k][i], c[k + 2][i], &v[k][i], &v[k + 2][i]);
    } else if (d->kind == HB_TRUNCATED_NORMAL) {
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < BLOCKS; i++) v[k][i] = cut_normal_of(c[k][i]);
    } else {
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < BLOCKS; i++) v[k][i] = uniform_of(c[k][i]);
        b = range;
    }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < BLOCKS; i++) v[k][i] = a + b * v[k][i];
    for (int i = 0; i < BLOCKS; i++)
        for (int k = 0; k < 4; k++) out[4 * i + k] = v[k][i];
}

static int initialize(const hb_draw *d, const int64_t *keys, int64_t n, float *restrict out, int64_t stride) {
    uint64_t c[4][BLOCKS] __attribute__((aligned(64))) = {{0}};
    float v[4 * BLOCKS];
    int64_t per_row = (d->dim + 3) / 4, i = 0, j = 0; /* the next block's row and place in it */
    if (d->kind < HB_UNIFORM || d->kind > HB_CONSTANT) return -1;
    if (d->kind == HB_CONSTANT) {
        for (i = 0; i < n; i++)
            for (j = 0; j < d->dim; j++) out[i * stride + j] = (float)d->a;
        return 0;
    }
    while (i < n) {
        int64_t i0 = i, j0 = j;
        int some = 0;
        for (; some < BLOCKS && i < n; some++) {
            c[0][some] = (uint64_t)j, c[1][some] = 0;
            c[2][some] = (uint64_t)keys[i], c[3][some] = (uint64_t)keys[i] >> 32;
            if (++j == per_row) j = 0, i++;
        }
        philox_blocks(c, BLOCKS, d->seed);
        values_of(d, c, v);
        for (int b = 0; b < some; b++) {
            float *to = out + i0 * stride + 4 * j0;
            if (4 * j0 + 4 <= d->dim)
                memcpy(to, v + 4 * b, 16);
            else
                memcpy(to, v + 4 * b, (size_t)(d->dim - 4 * j0) * sizeof(float));
            if (++j0 == per_row) j0 = 0, i0++;
        }
    }
    return 0;
}

extern const hb_decoders PASTE(hb_decoders_, HBKIT_ISA); /* decode.c */
HB_SNAPPY_DECLARE(PASTE(hb_snappy_, HBKIT_ISA)); /* snappy_kernel.c */
extern const hb_indexers PASTE(hb_indexers_, HBKIT_ISA); /* index_kernel.c */
extern const hb_wires PASTE(hb_wires_, HBKIT_ISA);       /* wire_kernel.c */

const hb_kernels PASTE(hb_kernels_, HBKIT_ISA) = {
    .name = TEXT(HBKIT_ISA),
    .gather = gather,
    .scatter = scatter,
    .expand = expand,
    .pool = pool,
    .pool_slots = pool_slots,
    .segment_sum = segment_sum,
    .apply = apply,
    .count_bad = count_bad,
    .initialize = initialize,
    .decode = &PASTE(hb_decoders_, HBKIT_ISA),
    .snappy = PASTE(hb_snappy_, HBKIT_ISA),
    .index = &PASTE(hb_indexers_, HBKIT_ISA),
    .wire = &PASTE(hb_wires_, HBKIT_ISA),
    .locate = locate,
    .gather_together = gather_together,
    .sum_together = sum_together,
    .finish_sums = finish_sums,
    .read_lines = read_lines,
    .write_lines = write_lines,
    .sum_some = sum_some,
};
