/* The kernels whose speed depends on the instruction set, and what they share.
 *
 * kernels.c and snappy_kernel.c are compiled once for each instruction set into a table of functions (hb_kernels);
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

/* Lines [row | state] of `width` floats in chunks that never move: line s is chunks[s >> shift] + (s & mask) * width. */
typedef struct {
    float **chunks;
    int64_t width;
    int32_t shift;
} hb_slabs;

static inline float *hb_line(const hb_slabs *s, int64_t slot) {
    return s->chunks[slot >> s->shift] + (slot & (((int64_t)1 << s->shift) - 1)) * s->width;
}

enum { HB_UNIFORM = 0, HB_NORMAL = 1, HB_TRUNCATED_NORMAL = 2, HB_CONSTANT = 3 };
enum { HB_SGD = 0, HB_ADAGRAD = 1, HB_ROWWISE_ADAGRAD = 2, HB_ADAM = 3, HB_ROWWISE_ADAM = 4, HB_FTRL = 5 };
enum { HB_HYPER = 8 };        /* floats of hyper-parameters that a rule may take */
enum { HB_SUM_BLOCK = 64 };   /* duplicate gradients are summed in blocks of this many, then the blocks in order */

typedef struct {
    const char *name;
    /* out[i, :dim] = first dim floats of line slots[i]; zeros where slots[i] < 0. */
    void (*gather)(const hb_slabs *s, const int64_t *slots, int64_t n, int64_t dim, float *out);
    /* out[b] = row_scale[b] * sum over p in [splits[b], splits[b+1]) of weight[p] * rows[inverse[p]]; weight and
     * row_scale may be NULL (1). */
    void (*pool)(const float *rows, const int64_t *inverse, const int64_t *splits, const float *weight,
                 const float *row_scale, int64_t n_out, int64_t dim, float *out);
    /* out[s] = sum over the positions p = order[starts[s]..starts[s+1]) of scale[p] * values[rows[p]], in blocks of
     * HB_SUM_BLOCK; rows may be NULL (p itself), scale may be NULL (1). Zeros where a segment is empty. */
    void (*segment_sum)(const float *values, const int64_t *rows, const float *scale, const int64_t *order,
                        const int64_t *starts, int64_t n_segments, int64_t dim, float *out);
    /* One optimizer step of rule on the lines slots[i] (skipped where < 0) with the summed gradients grads[i, :dim]. */
    int (*apply)(int rule, const hb_slabs *s, const int64_t *slots, int64_t n, int64_t dim, const float *grads,
                 const float *hyper);
    /* out[i, j] = initial value of (seed, key i, column j); see random.pyx. */
    int (*initialize)(int kind, double a, double b, uint64_t seed, const int64_t *keys, int64_t n, int64_t dim,
                      float *out);
    const hb_decoders *decode; /* of decode.c */
    /* Snappy's raw format, decompressed; see snappy.h. */
    int (*snappy)(const uint8_t *src, int64_t n, uint8_t *dst, int64_t dst_n);
    const hb_indexers *index; /* of index_kernel.c */
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
