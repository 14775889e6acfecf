/* The kernels whose speed depends on the instruction set, and what they share.
 *
 * kernels.c and the files it names are compiled once for each instruction set into a table of functions (hb_kernels);
 * isa.pyx picks one table when it is imported. All tables give the same bits (docs/design: Promise 1), by these rules:
 *   - no fused multiply-add (-ffp-contract=off), no reassociation (no -ffast-math);
 *   - a sum over a row uses 16 partial sums, added as a fixed tree (sum_squares);
 *   - denormals are kept: every entry point runs between hb_fp_enter and hb_fp_leave, since TensorFlow's threads flush.
 */
#ifndef HBKIT_KERNELS_H
#define HBKIT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "decode.h"
#include "index.h"

enum { HB_FLOAT32 = 0, HB_FLOAT16 = 1, HB_BFLOAT16 = 2, HB_INT8 = 3 }; /* the last only on the wire */

/* Lines [row | state] in chunks that never move. A row's `dim` columns have the type `dtype`, state is float32. Strides
 * and places are in bytes: state lies beside its row, or all of a chunk's states behind its rows (see slabs.pyx). */
typedef struct {
    char **chunks;
    int64_t dim, n_state;
    int64_t row_stride, state_stride, state_at;
    int32_t shift, dtype;
} hb_slabs;

static inline int64_t hb_within(const hb_slabs *s, int64_t slot) { return slot & (((int64_t)1 << s->shift) - 1); }
static inline void *hb_row(const hb_slabs *s, int64_t slot) {
    return s->chunks[slot >> s->shift] + hb_within(s, slot) * s->row_stride;
}
static inline float *hb_state(const hb_slabs *s, int64_t slot) {
    return (float *)(void *)(s->chunks[slot >> s->shift] + s->state_at + hb_within(s, slot) * s->state_stride);
}

enum { HB_UNIFORM = 0, HB_NORMAL = 1, HB_TRUNCATED_NORMAL = 2, HB_CONSTANT = 3 };
enum {
    HB_SGD = 0,
    HB_ADAGRAD = 1,
    HB_ROWWISE_ADAGRAD = 2,
    HB_ADAM = 3,
    HB_ROWWISE_ADAM = 4,
    HB_FTRL = 5,
    HB_ADAGRAD_DECAY = 6,
    HB_ROW_STEP_ADAM = 7,
    HB_RULES = 8
};
/* Hyper-parameters: HB_OWN of the rule itself, then what any rule may take (0: none). */
enum { HB_OWN = 8, HB_WEIGHT_DECAY = 8, HB_CLIP_VALUE = 9, HB_CLIP_NORM = 10, HB_HYPER = 12 };
enum { HB_SUM_BLOCK = 64 };   /* duplicate gradients are summed in blocks of this many, then the blocks in order */

/* Gradients by segment: segment s is the sum over the positions p = order[starts[s]..starts[s + 1]), in blocks of
 * HB_SUM_BLOCK, of scale[p] * values[rows[p]]. rows may be NULL (p itself), scale may be NULL (1); where order is NULL,
 * segment s is values[s]. Empty segments are zero. */
typedef struct {
    const float *values;
    int64_t dim, n_segments;
    const int32_t *order, *starts;
    const int64_t *rows;
    const float *scale;
} hb_gradients;

/* Columns [column, column + dim) of a row, their rule, and where their state begins among the line's state. */
typedef struct {
    int64_t rule, column, dim, state;
    const float *hyper; /* HB_HYPER */
} hb_part;

/* One optimizer step on the lines slots[i] (none where < 0) by segment i of the gradients. */
typedef struct {
    const int64_t *slots;
    hb_gradients g;
    const hb_part *parts;
    int64_t n_parts;
    int32_t skip;           /* leave a line whose gradient is not finite, and count it */
    const int64_t *keys;    /* of the rounding of narrow rows, with seed and step */
    uint64_t seed;
    uint32_t step;
    void *scratch;          /* HB_SCRATCH(g.dim) bytes */
} hb_update;
enum { HB_TOGETHER = 32 }; /* gradients summed before as many rows are stepped */
#define HB_SCRATCH(dim) ((size_t)(dim) * HB_TOGETHER * sizeof(float) + ((size_t)(dim) + 256) * sizeof(uint16_t) + 192)

/* Rows of new lines: columns [column, column + dim) drawn by `kind` under `seed`. */
typedef struct {
    int64_t kind, column, dim;
    double a, b;
    uint64_t seed;
} hb_draw;

/* Rows to be packed for the wire. */
typedef struct {
    const float *rows; /* [n, dim] */
    int64_t n, dim;
    int32_t wire;
    float *residual;     /* [n, dim], added to the rows before and what is lost of them after; or NULL */
    const int64_t *keys; /* of the rounding at random, with seed and step; NULL: to the nearest */
    uint64_t seed;
    uint32_t step;
    void *scratch; /* HB_WIRE_SCRATCH(dim) bytes, for a residual or keys */
} hb_packing;
#define HB_WIRE_SCRATCH(dim) ((size_t)(dim) * 12 + 512)

/* See wire_kernel.c. A block is the values of all rows, then for HB_INT8 their scales. */
typedef struct {
    void (*pack)(const hb_packing *p, uint8_t *out);
    void (*unpack)(const uint8_t *data, int64_t n, int64_t dim, int wire, float *out);
} hb_wires;

/* One feature of several that stand side by side: row b is of distinct key inverse[b], its floats lie from `at` on. What
 * it points to begins in another set of the first-level cache than the next feature's: they are gone through together. */
typedef struct {
    int64_t at;
    const int32_t *inverse;
    const float **rows;   /* of gather_together: of each distinct key, NULL where there is none */
    float *sums, *blocks; /* of sum_together, [u, dim]: the block in hand, and the blocks before it */
    int32_t *seen;        /* values added so far: 0 at the start */
} hb_feature;

typedef struct {
    const char *name;
    /* out[i, :width] = first columns of line slots[i], or slots[index[i]] where index is not NULL, as float32; zeros
     * where that slot is below 0. */
    void (*gather)(const hb_slabs *s, const int64_t *slots, const int64_t *index, int64_t n, int64_t width,
                   float *out);
    /* Line slots[i] from column `column` on = lines[i, :width], but for slots below 0; narrow rows round to the nearest
     * value. */
    void (*scatter)(const hb_slabs *s, const int64_t *slots, int64_t n, int64_t column, int64_t width,
                    const float *lines, int64_t stride);
    /* out[i] = rows[index[i]]. */
    void (*expand)(const float *rows, const int64_t *index, int64_t n, int64_t dim, float *out);
    /* out[b] = row_scale[b] * sum over p in [splits[b], splits[b+1]) of weight[p] * rows[inverse[p]]; weight and
     * row_scale may be NULL (1). */
    void (*pool)(const float *rows, const int64_t *inverse, const int64_t *splits, const float *weight,
                 const float *row_scale, int64_t n_out, int64_t dim, float *out);
    /* pool of the rows of slots, read where they are (zeros where slots[i] < 0); -1 where rows are not float32 or dim is
     * none that is common. Where inverse is NULL, value p is of slots[p]. */
    int (*pool_slots)(const hb_slabs *s, const int64_t *slots, const int64_t *inverse, const int64_t *splits,
                      const float *weight, const float *row_scale, int64_t n_out, float *out);
    void (*segment_sum)(const hb_gradients *g, float *out);
    /* Lines left out since their gradient was not finite, or -1 for a rule that does not exist. */
    int64_t (*apply)(const hb_slabs *s, const hb_update *u);
    /* How many of the rows [n, dim] have a value that is not finite. */
    int64_t (*count_bad)(const float *rows, int64_t n, int64_t dim);
    /* out[i * stride + j] = initial value of (seed, key i, column j); see random.pyx. */
    int (*initialize)(const hb_draw *d, const int64_t *keys, int64_t n, float *out, int64_t stride);
    const hb_decoders *decode; /* of decode.c */
    /* Snappy's raw format, decompressed; see snappy.h. */
    int (*snappy)(const uint8_t *src, int64_t n, uint8_t *dst, int64_t dst_n);
    const hb_indexers *index; /* of index_kernel.c */
    const hb_wires *wire;     /* of wire_kernel.c */
    /* Rows (float32) of slots, NULL where they are below 0. */
    void (*locate)(const hb_slabs *s, const int64_t *slots, int64_t n, const float **rows);
    /* For rows b in [first, last) and features k: out[b * stride + f[k].at ...] = its row; zeros where there is none. */
    void (*gather_together)(const hb_feature *f, int64_t n_features, int64_t first, int64_t last, int64_t dim, float *out,
                            int64_t stride);
    /* The other way: grads[b * stride + f[k].at ...] is added to sum number f[k].inverse[b]. In the end `finish` takes
     * its blocks together. 0 where a value is not finite. */
    int (*sum_together)(const hb_feature *f, int64_t n_features, int64_t n_rows, int64_t dim, const float *grads,
                        int64_t stride);
    void (*finish_sums)(const hb_feature *f, const int64_t *counts, int64_t n, int64_t dim);
    /* gather and scatter of whole lines, which the CPU does not ask for afterwards. */
    void (*read_lines)(const hb_slabs *s, const int64_t *slots, int64_t n, float *out);
    void (*write_lines)(const hb_slabs *s, const int64_t *slots, int64_t n, const float *lines);
    /* sum_together of one feature, of its keys number `first` to last - 1 alone. */
    int (*sum_some)(const hb_feature *f, int64_t first, int64_t last, int64_t n_rows, int64_t dim, const float *grads,
                    int64_t stride);
} hb_kernels;

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
typedef unsigned int hb_fp_state;
static inline hb_fp_state hb_fp_enter(void) {
    hb_fp_state old = _mm_getcsr();
    _mm_setcsr(0x1F80); /* round to nearest, exceptions masked, FTZ and DAZ off */
    return old;
}
static inline void hb_fp_leave(hb_fp_state old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
typedef uint64_t hb_fp_state;
static inline hb_fp_state hb_fp_enter(void) {
    hb_fp_state old, zero = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"(zero));
    return old;
}
static inline void hb_fp_leave(hb_fp_state old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
#error "hbkit supports x86-64 (v2 and later) and aarch64"
#endif

/* Philox4x32-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). */
static inline void hb_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* The finaliser of splitmix64: a bijection of 64 bits. vshard and the index use it. */
static inline uint64_t hb_mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

/* What this machine's CPU can run, best last; NULL-terminated. */
#if defined(__x86_64__) || defined(_M_X64)
extern const hb_kernels hb_kernels_v2, hb_kernels_v3, hb_kernels_v4;
static inline int hb_supported(const hb_kernels **out) {
    int n = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt")) out[n++] = &hb_kernels_v2;
    if (n == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma"))
        out[n++] = &hb_kernels_v3;
    if (n == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        out[n++] = &hb_kernels_v4;
    return n;
}
#else
extern const hb_kernels hb_kernels_neon;
static inline int hb_supported(const hb_kernels **out) {
    out[0] = &hb_kernels_neon;
    return 1;
}
#endif

#endif
