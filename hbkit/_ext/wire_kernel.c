/* Rows as bytes on the wire. Compiled once for each instruction set, with -DHBKIT_ISA=<name>; see kernels.h for the
 * rules all must keep, and hbkit/shuffle/quantize.py for what the bytes mean.
 *
 * An int8 row is read twice: for its largest magnitude, and, now from the first-level cache or from registers, to be
 * rounded. Sixteen columns go at once; where dim is no multiple of that, the last sixteen overlap those before.
 */
#include "kernels.h"
#include "lanes.h"

#include <math.h>
#include <string.h>

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)

#define A_STEP 0x1.02042p-7f /* a little more than 1/127, so that no quotient is beyond 127 */
enum {
    NO_SCALE = 0x7F000000, /* bits of the magnitude from which on there is none: 2^127, infinity, NaN */
    LEAST = 0x0080,        /* the least scale, 2^-126: its inverse is finite */
    NO_NUMBER = 0x7FC0,    /* scale of a row that has none */
    PAST_CACHE = 1 << 24,  /* values from which on rows are written past the cache */
    POINT = 15,            /* bits behind the point of what is rounded at random */
};

/* ---- sixteen columns: the bits of the largest magnitude; to int8 by the inverse of a step; and back ---- */

#if defined(__SSE4_1__)
typedef __m128i one; /* the same number in all lanes */

#if defined(__AVX512F__)
typedef __m512i many;
INLINE many none(void) { return _mm512_setzero_si512(); }
INLINE many larger(many most, const float *x) {
    return _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
INLINE one largest(many most) {
    __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    one m = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
}
INLINE void round16(const float *x, one inverse, const uint16_t *noise, int8_t *to) {
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_broadcastss_ps(_mm_castsi128_ps(inverse)));
    __m512i q;
    if (noise) {
        __m512i random = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)noise));
        random = _mm512_and_si512(random, _mm512_set1_epi32((1 << POINT) - 1));
        q = _mm512_cvtps_epi32(_mm512_mul_ps(y, _mm512_set1_ps(1 << POINT)));
        q = _mm512_srai_epi32(_mm512_add_epi32(q, random), POINT);
    } else {
        q = _mm512_cvtps_epi32(y);
    }
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(q));
}
INLINE void widen16(const int8_t *q, float step, float *to, int past_cache) {
    __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q));
    __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(step));
    if (past_cache)
        _mm512_stream_ps(to, x);
    else
        _mm512_storeu_ps(to, x);
}

#elif defined(__AVX2__)
typedef __m256i many;
INLINE many none(void) { return _mm256_setzero_si256(); }
INLINE many larger(many most, const float *x) {
    __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), mask));
    return _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + 8)), mask));
}
INLINE one largest(many most) {
    one m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
}
INLINE __m256i round8(const float *x, one inverse, const uint16_t *noise) {
    __m256 y = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_broadcastss_ps(_mm_castsi128_ps(inverse)));
    if (!noise) return _mm256_cvtps_epi32(y);
    __m256i random = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)noise));
    random = _mm256_and_si256(random, _mm256_set1_epi32((1 << POINT) - 1));
    __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(y, _mm256_set1_ps(1 << POINT)));
    return _mm256_srai_epi32(_mm256_add_epi32(q, random), POINT);
}
INLINE void round16(const float *x, one inverse, const uint16_t *noise, int8_t *to) {
    /* Low bytes, as what is not a number must become 0: NaN converts to 0x80000000. */
    __m256i low = _mm256_set1_epi32(0xFF);
    __m256i a = _mm256_and_si256(round8(x, inverse, noise), low);
    __m256i b = _mm256_and_si256(round8(x + 8, inverse, noise ? noise + 8 : NULL), low);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}
INLINE void widen16(const int8_t *q, float step, float *to, int past_cache) {
    for (int j = 0; j < 16; j += 8) {
        __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(q + j)));
        __m256 x = _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(step));
        if (past_cache)
            _mm256_stream_ps(to + j, x);
        else
            _mm256_storeu_ps(to + j, x);
    }
}

#else
typedef __m128i many;
INLINE many none(void) { return _mm_setzero_si128(); }
INLINE many larger(many most, const float *x) {
    for (int j = 0; j < 16; j += 4) {
        __m128i bits = _mm_loadu_si128((const __m128i *)(x + j));
        most = _mm_max_epi32(most, _mm_and_si128(bits, _mm_set1_epi32(0x7FFFFFFF)));
    }
    return most;
}
INLINE one largest(many m) {
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
}
INLINE __m128i round4(const float *x, one inverse, const uint16_t *noise) {
    __m128 y = _mm_mul_ps(_mm_loadu_ps(x), _mm_castsi128_ps(inverse));
    __m128i q = _mm_cvtps_epi32(y);
    if (noise) {
        __m128i random = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)noise));
        random = _mm_and_si128(random, _mm_set1_epi32((1 << POINT) - 1));
        q = _mm_cvtps_epi32(_mm_mul_ps(y, _mm_set1_ps(1 << POINT)));
        q = _mm_srai_epi32(_mm_add_epi32(q, random), POINT);
    }
    return _mm_and_si128(q, _mm_set1_epi32(0xFF)); /* what is not a number becomes 0: NaN converts to 0x80000000 */
}
INLINE void round16(const float *x, one inverse, const uint16_t *noise, int8_t *to) {
    __m128i q[4];
    for (int j = 0; j < 4; j++) q[j] = round4(x + 4 * j, inverse, noise ? noise + 4 * j : NULL);
    __m128i bytes = _mm_packus_epi16(_mm_packus_epi32(q[0], q[1]), _mm_packus_epi32(q[2], q[3]));
    _mm_storeu_si128((__m128i *)to, bytes);
}
INLINE void widen16(const int8_t *q, float step, float *to, int past_cache) {
    for (int j = 0; j < 16; j += 4) {
        int32_t four;
        memcpy(&four, q + j, 4);
        __m128 x = _mm_mul_ps(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four))), _mm_set1_ps(step));
        if (past_cache)
            _mm_stream_ps(to + j, x);
        else
            _mm_storeu_ps(to + j, x);
    }
}
#endif

/* The scale of a row by the bits of its largest magnitude, and the scale's inverse, 0 where there is none. */
INLINE uint16_t scale_of(one most, one *inverse) {
    one bad = _mm_cmpgt_epi32(most, _mm_set1_epi32(NO_SCALE - 1));
    one up = _mm_castps_si128(_mm_mul_ps(_mm_castsi128_ps(most), _mm_set1_ps(A_STEP)));
    up = _mm_srli_epi32(_mm_add_epi32(up, _mm_set1_epi32(0xFFFF)), 16); /* up to a bfloat16 */
    up = _mm_max_epi32(up, _mm_set1_epi32(LEAST));
    __m128 step = _mm_castsi128_ps(_mm_slli_epi32(up, 16));
    *inverse = _mm_andnot_si128(bad, _mm_castps_si128(_mm_div_ps(_mm_set1_ps(1), step)));
    return (uint16_t)_mm_cvtsi128_si32(_mm_blendv_epi8(up, _mm_set1_epi32(NO_NUMBER), bad));
}
INLINE void past_cache_done(void) { _mm_sfence(); } /* another thread may read it next */

#else /* what the compiler makes vectors of */
typedef uint32_t many;
typedef float one;
INLINE many none(void) { return 0; }
INLINE many larger(many most, const float *x) {
    for (int j = 0; j < 16; j++) {
        uint32_t size = to_bits(x[j]) & 0x7FFFFFFF;
        most = size > most ? size : most;
    }
    return most;
}
INLINE many largest(many most) { return most; }
INLINE uint16_t scale_of(many most, one *inverse) {
    if (most >= NO_SCALE) {
        *inverse = 0;
        return NO_NUMBER;
    }
    uint32_t up = (to_bits(from_bits(most) * A_STEP) + 0xFFFF) >> 16; /* up to a bfloat16 */
    up = up < LEAST ? LEAST : up;
    *inverse = 1.0f / from_bits(up << 16);
    return (uint16_t)up;
}
INLINE void round16(const float *x, one inverse, const uint16_t *noise, int8_t *to) {
    for (int j = 0; j < 16; j++) {
        float y = inverse == 0 ? 0 : x[j] * inverse;
        if (noise) {
            int32_t random = noise[j] & ((1 << POINT) - 1);
            to[j] = (int8_t)(((int32_t)rintf(y * (1 << POINT)) + random) >> POINT);
        } else {
            to[j] = (int8_t)(int32_t)rintf(y);
        }
    }
}
INLINE void widen16(const int8_t *q, float step, float *to, int past_cache) {
    (void)past_cache;
    for (int j = 0; j < 16; j++) to[j] = (float)q[j] * step;
}
INLINE void past_cache_done(void) {}
#endif

/* ---- int8 ---- */

/* noise: 16 random bits a column, or NULL: to the nearest. */
INLINE uint16_t pack_row(const float *x, int64_t dim, const uint16_t *noise, int8_t *to) {
    float wide[16] = {0};
    int8_t short_row[16];
    int64_t n = dim < 16 ? 16 : dim;
    int8_t *at = dim < 16 ? short_row : to;
    if (dim < 16) x = memcpy(wide, x, (size_t)dim * sizeof(float));
    many most = none();
    for (int64_t j = 0; j + 16 <= n; j += 16) most = larger(most, x + j);
    if (n % 16) most = larger(most, x + n - 16);
    one inverse;
    uint16_t scale = scale_of(largest(most), &inverse);
    for (int64_t j = 0; j + 16 <= n; j += 16) round16(x + j, inverse, noise ? noise + j : NULL, at + j);
    if (n % 16) round16(x + n - 16, inverse, noise ? noise + n - 16 : NULL, at + n - 16);
    if (dim < 16) memcpy(to, short_row, (size_t)dim);
    return scale;
}

INLINE void unpack_row(const int8_t *q, float step, int64_t dim, float *to, int past_cache) {
    if (dim < 16) {
        for (int64_t j = 0; j < dim; j++) to[j] = (float)q[j] * step;
        return;
    }
    for (int64_t j = 0; j + 16 <= dim; j += 16) widen16(q + j, step, to + j, past_cache);
    if (dim % 16) widen16(q + dim - 16, step, to + dim - 16, 0);
}

INLINE float step_at(const uint8_t *scales, int64_t i) {
    uint16_t scale;
    memcpy(&scale, scales + 2 * i, 2); /* they lie at any address */
    return from_bits((uint32_t)scale << 16);
}

#define BY_DIM(dim, call)  \
    switch (dim) {         \
    case 16: call(16);     \
    case 32: call(32);     \
    case 64: call(64);     \
    case 128: call(128);   \
    default: call(dim);    \
    }

INLINE void pack_int8_as(const float *rows, int64_t n, int64_t dim, int8_t *values, uint8_t *scales) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t scale = pack_row(rows + i * dim, dim, NULL, values + i * dim);
        memcpy(scales + 2 * i, &scale, 2);
    }
}

static void pack_int8(const float *rows, int64_t n, int64_t dim, int8_t *values, uint8_t *scales) {
#define PACK(dim) pack_int8_as(rows, n, dim, values, scales); return
    BY_DIM(dim, PACK)
}

INLINE void unpack_int8_as(const int8_t *values, const uint8_t *scales, int64_t n, int64_t dim, float *out, int past) {
    for (int64_t i = 0; i < n; i++) unpack_row(values + i * dim, step_at(scales, i), dim, out + i * dim, past);
}

static void unpack_int8(const int8_t *values, const uint8_t *scales, int64_t n, int64_t dim, float *out) {
#define UNPACK(dim) unpack_int8_as(values, scales, n, dim, out, 0); return
    BY_DIM(dim, UNPACK)
}

static void unpack_int8_past_cache(const int8_t *values, const uint8_t *scales, int64_t n, int64_t dim, float *out) {
#define UNPACK_PAST(dim) unpack_int8_as(values, scales, n, dim, out, 1); break
    BY_DIM(dim, UNPACK_PAST)
    past_cache_done();
}

/* ---- any wire ---- */

/* float16 has infinity for what is beyond it; of narrow rows in memory what is finite stays finite. */
INLINE void overflow_row(const float *restrict x, int64_t n, uint16_t *restrict to) {
    for (int64_t j = 0; j < n; j++) {
        uint32_t b = to_bits(x[j]) & 0x7FFFFFFF;
        to[j] = b - 0x477FF000u <= 0x7F800000u - 0x477FF000u ? (to[j] & 0x8000) | 0x7C00 : to[j];
    }
}

static void pack_narrow(int wire, const float *x, int64_t n, const uint16_t *noise, uint16_t *to) {
    narrow_row(wire, x, noise, n, to);
    if (wire == HB_FLOAT16) overflow_row(x, n, to);
}

enum { CHUNK = 512 }; /* narrow values go through memory of their own: on the wire they lie at any address */

static void pack_plain(const hb_packing *p, uint8_t *out) {
    uint16_t few[CHUNK];
    int64_t n = p->n * p->dim;
    if (p->wire == HB_INT8)
        pack_int8(p->rows, p->n, p->dim, (int8_t *)out, out + n);
    else if (p->wire == HB_FLOAT32)
        memcpy(out, p->rows, (size_t)n * sizeof(float));
    else
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t m = n - i < CHUNK ? n - i : CHUNK;
            pack_narrow(p->wire, p->rows + i, m, NULL, few);
            memcpy(out + 2 * i, few, (size_t)m * sizeof *few);
        }
}

/* One row; `half` has room for dim values. */
static void pack_any(int wire, const float *x, int64_t dim, const uint16_t *noise, uint16_t *half, uint8_t *to,
                     uint8_t *scale) {
    if (wire == HB_INT8) {
        uint16_t bits = pack_row(x, dim, noise, (int8_t *)to);
        memcpy(scale, &bits, 2);
    } else if (wire == HB_FLOAT32) {
        memcpy(to, x, (size_t)dim * sizeof *x);
    } else {
        pack_narrow(wire, x, dim, noise, half);
        memcpy(to, half, (size_t)dim * sizeof *half);
    }
}

static void unpack(const uint8_t *data, int64_t n, int64_t dim, int wire, float *out) {
    uint16_t few[CHUNK];
    const uint8_t *scales = data + n * dim;
    int past = n * dim >= PAST_CACHE && dim % 16 == 0 && ((uintptr_t)out & 63) == 0;
    if (wire == HB_INT8)
        (past ? unpack_int8_past_cache : unpack_int8)((const int8_t *)data, scales, n, dim, out);
    else if (wire == HB_FLOAT32)
        memcpy(out, data, (size_t)(n * dim) * sizeof(float));
    else
        for (int64_t i = 0; i < n * dim; i += CHUNK) {
            int64_t m = n * dim - i < CHUNK ? n * dim - i : CHUNK;
            memcpy(few, data + 2 * i, (size_t)m * sizeof *few);
            widen_row(wire, few, m, out + i);
        }
}

static void pack(const hb_packing *p, uint8_t *out) {
    if (!p->keys && !p->residual) {
        pack_plain(p, out);
        return;
    }
    int64_t dim = p->dim, blocks = (dim + 7) / 8, together = blocks <= 16 ? 16 / blocks : 1; /* rows drawn at once */
    int64_t size = p->wire == HB_INT8 ? dim : p->wire == HB_FLOAT32 ? 4 * dim : 2 * dim;
    float *sum = p->scratch, *back = sum + dim;
    uint16_t *half = (uint16_t *)(back + dim), *noise = half + dim;
    uint8_t row_scale[2], *scales = out + p->n * dim;
    for (int64_t i = 0; i < p->n; i++) {
        const float *x = p->rows + i * dim;
        uint8_t *to = out + i * size, *scale = p->wire == HB_INT8 ? scales + 2 * i : row_scale;
        int64_t left = p->n - i;
        if (p->keys && i % together == 0)
            noise_of(p->keys + i, left < together ? left : together, p->seed, p->step, blocks, noise);
        const uint16_t *own = p->keys ? noise + i % together * blocks * 8 : NULL;
        if (!p->residual) {
            pack_any(p->wire, x, dim, own, half, to, scale);
            continue;
        }
        float *residual = p->residual + i * dim;
        for (int64_t j = 0; j < dim; j++) sum[j] = x[j] + residual[j];
        pack_any(p->wire, sum, dim, own, half, to, scale);
        if (p->wire == HB_INT8)
            unpack_row((const int8_t *)to, step_at(scale, 0), dim, back, 0);
        else
            unpack(to, 1, dim, p->wire, back);
        uint32_t most = 0;
        for (int64_t j = 0; j < dim; j++) {
            residual[j] = sum[j] - back[j];
            uint32_t bits = to_bits(residual[j]) & 0x7FFFFFFF;
            most = bits > most ? bits : most;
        }
        if (most >= 0x7F800000) memset(residual, 0, (size_t)dim * sizeof(float));
    }
}

const hb_wires PASTE(hb_wires_, HBKIT_ISA) = {.pack = pack, .unpack = unpack};
