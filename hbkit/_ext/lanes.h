/* What kernels.c and wire_kernel.c share: registers as wide as the instruction set has them, narrow rows, and random
 * numbers by counter. */
#ifndef HBKIT_LANES_H
#define HBKIT_LANES_H

#include "kernels.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Registers as wide as the instruction set has them; element by element, so the width changes no bit. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), may_alias));

INLINE float from_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

INLINE uint32_t to_bits(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

/* ---- narrow rows ---- */

INLINE float widen(int dtype, uint16_t h) {
    if (dtype == HB_BFLOAT16) return from_bits((uint32_t)h << 16);
    /* Times 2^112 moves the exponent to float32's range, denormals included; infinity and NaN need their own. */
    float x = from_bits((uint32_t)(h & 0x7FFF) << 13) * 0x1p112f;
    uint32_t b = to_bits(x);
    b = (h & 0x7C00) == 0x7C00 ? b | 0x7F800000u : b;
    return from_bits(b | (uint32_t)(h & 0x8000) << 16);
}

/* Rounds x up or down by 16 random bits (stochastic), or to the nearest value, ties to even. What the narrow type can
 * hold stays as it is, and what is finite stays finite. */
INLINE uint16_t narrow(int dtype, float x, int stochastic, uint32_t random) {
    uint32_t b = to_bits(x), sign = b >> 16 & 0x8000, out;
    b &= 0x7FFFFFFF;
    if (dtype == HB_BFLOAT16) {
        uint32_t r = stochastic ? random & 0xFFFF : 0x7FFF + (b >> 16 & 1);
        out = (b + r) >> 16;
        out = out >= 0x7F80 ? 0x7F7F : out;
        out = b > 0x7F800000u ? 0x7FC0 : b == 0x7F800000u ? 0x7F80 : out;
    } else {
        uint32_t r = stochastic ? random & 0x1FFF : 0xFFF + (b >> 13 & 1);
        out = ((b + r) >> 13) - (112 << 10);
        out = out >= 0x7C00 ? 0x7BFF : out;
        /* Below 2^-14 the step is 2^-24: count steps instead. */
        float steps = from_bits(b < 0x38800000u ? b : 0) * 0x1p24f;
        uint32_t few = stochastic ? (uint32_t)(int32_t)(steps + (float)(int32_t)(random & 0x1FFF) * 0x1p-13f)
                                  : to_bits(steps + 0x1p23f) & 0x7FFFFF;
        out = b < 0x38800000u ? few : out;
        out = b > 0x7F800000u ? 0x7E00 : b == 0x7F800000u ? 0x7C00 : out;
    }
    return (uint16_t)(out | sign);
}

INLINE void widen_as(int dtype, const uint16_t *restrict from, int64_t n, float *restrict to) {
    for (int64_t j = 0; j < n; j++) to[j] = widen(dtype, from[j]);
}

static inline void widen_row(int dtype, const uint16_t *from, int64_t n, float *to) {
    if (dtype == HB_BFLOAT16)
        widen_as(HB_BFLOAT16, from, n, to);
    else
        widen_as(HB_FLOAT16, from, n, to);
}

INLINE void narrow_as(int dtype, const float *restrict from, const uint16_t *restrict noise, int64_t n,
                      uint16_t *restrict to) {
    if (noise)
        for (int64_t j = 0; j < n; j++) to[j] = narrow(dtype, from[j], 1, noise[j]);
    else
        for (int64_t j = 0; j < n; j++) to[j] = narrow(dtype, from[j], 0, 0);
}

static inline void narrow_row(int dtype, const float *from, const uint16_t *noise, int64_t n, uint16_t *to) {
    if (dtype == HB_BFLOAT16)
        narrow_as(HB_BFLOAT16, from, noise, n, to);
    else
        narrow_as(HB_FLOAT16, from, noise, n, to);
}

/* ---- random numbers by counter ---- */

enum { BLOCKS = 64 }; /* of Philox at once */

/* Products of the low halves of 64-bit lanes with m. */
typedef uint64_t wide __attribute__((vector_size(LANES * 4), may_alias));
#if defined(__AVX512F__)
INLINE wide low_times(wide a, uint32_t m) { return (wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m)); }
#elif defined(__AVX2__)
INLINE wide low_times(wide a, uint32_t m) { return (wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m)); }
#elif defined(__SSE2__)
INLINE wide low_times(wide a, uint32_t m) { return (wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m)); }
#else
INLINE wide low_times(wide a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }
#endif

/* Philox4x32-10 of `n` counters, their words in the low halves of c[0..3]; see hb_philox. High halves are ignored, which
 * saves putting halves back together after each product. */
static inline void philox_blocks(uint64_t c[4][BLOCKS], int n, uint64_t seed) {
    for (int at = 0; at < n; at += LANES / 2) {
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        wide c0 = *(wide *)&c[0][at], c1 = *(wide *)&c[1][at], c2 = *(wide *)&c[2][at], c3 = *(wide *)&c[3][at];
        for (int round = 0; round < 10; round++) {
            wide p0 = low_times(c0, 0xD2511F53u), p1 = low_times(c2, 0xCD9E8D57u);
            c0 = (p1 >> 32) ^ c1 ^ (uint64_t)k0;
            c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
            c1 = p1, c3 = p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        *(wide *)&c[0][at] = c0, *(wide *)&c[1][at] = c1, *(wide *)&c[2][at] = c2, *(wide *)&c[3][at] = c3;
    }
}

/* 16 random bits a column of the rows of some keys, 8 * blocks a row: of (seed, key, step, column). */
static inline void noise_of(const int64_t *keys, int64_t n_rows, uint64_t seed, uint32_t step, int64_t blocks,
                            uint16_t *out) {
    enum { STEP = LANES / 2 };
    static const uint64_t upwards[8] __attribute__((aligned(64))) = {0, 1, 2, 3, 4, 5, 6, 7};
    uint64_t c[4][BLOCKS] __attribute__((aligned(64)));
    int64_t n = n_rows * blocks, row = 0, block = 0;
    for (int64_t first = 0; first < n; first += 16) {
        if (blocks % STEP == 0) { /* a register is of one row: stored whole, it is loaded again without waiting */
            for (int b = 0; b < 16; b += STEP) {
                uint64_t key = row < n_rows ? (uint64_t)keys[row] : 0;
                wide none = {0};
                *(wide *)&c[0][b] = *(const wide *)upwards + (uint64_t)block;
                *(wide *)&c[1][b] = none + (uint64_t)(step + 1); /* 0 is the initializers' */
                *(wide *)&c[2][b] = none + key, *(wide *)&c[3][b] = none + (key >> 32);
                if ((block += STEP) == blocks) block = 0, row++;
            }
        } else {
            for (int b = 0; b < 16; b++) {
                uint64_t key = row < n_rows ? (uint64_t)keys[row] : 0;
                c[0][b] = (uint64_t)block, c[1][b] = step + 1, c[2][b] = key, c[3][b] = key >> 32;
                if (++block == blocks) block = 0, row++;
            }
        }
        philox_blocks(c, 16, seed);
        uint64_t words[32]; /* each of four columns, the first in its lowest bits */
        for (int b = 0; b < 16; b++) {
            words[2 * b] = (c[0][b] & 0xFFFFFFFFu) | c[1][b] << 32;
            words[2 * b + 1] = (c[2][b] & 0xFFFFFFFFu) | c[3][b] << 32;
        }
        memcpy(out + first * 8, words, sizeof words);
    }
}

#endif
