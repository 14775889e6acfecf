/* Compiled once for each instruction set, with -DHBKIT_ISA=<name>; see kernels.h for the rules all must keep. */
#include "kernels.h"
#include "snappy.h"

#include <math.h>
#include <string.h>

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)

enum { AHEAD = 16 }; /* lines prefetched before use: hides one memory access behind sixteen */

static void gather(const hb_slabs *s, const int64_t *slots, int64_t n, int64_t dim, float *restrict out) {
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n && slots[i + AHEAD] >= 0) __builtin_prefetch(hb_line(s, slots[i + AHEAD]));
        if (slots[i] >= 0)
            memcpy(out + i * dim, hb_line(s, slots[i]), (size_t)dim * sizeof(float));
        else
            memset(out + i * dim, 0, (size_t)dim * sizeof(float));
    }
}

static void pool(const float *rows, const int64_t *inverse, const int64_t *splits, const float *weight,
                 const float *row_scale, int64_t n_out, int64_t dim, float *restrict out) {
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

enum { TILE = 256 }; /* columns of a block sum held on the stack */

static void segment_sum(const float *values, const int64_t *rows, const float *scale, const int64_t *order,
                        const int64_t *starts, int64_t n_segments, int64_t dim, float *restrict out) {
    float block[TILE];
    for (int64_t s = 0; s < n_segments; s++) {
        float *restrict total = out + s * dim;
        int64_t begin = starts[s], end = starts[s + 1];
        if (begin == end) memset(total, 0, (size_t)dim * sizeof(float));
        for (int64_t first = begin; first < end; first += HB_SUM_BLOCK) {
            int64_t last = first + HB_SUM_BLOCK < end ? first + HB_SUM_BLOCK : end;
            for (int64_t t = 0; t < dim; t += TILE) {
                int64_t w = dim - t < TILE ? dim - t : TILE;
                for (int64_t i = first; i < last; i++) {
                    int64_t p = order[i];
                    const float *restrict v = values + (rows ? rows[p] : p) * dim + t;
                    float k = scale ? scale[p] : 1.0f; /* times 1 is exact */
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
}

/* Sum of squares by 16 partial sums added as a tree: the one order that every vector width can follow. */
static inline float sum_squares(const float *x, int64_t n) {
    float p[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) p[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < n; j++) p[j] += x[i + j] * x[i + j];
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) p[j] += p[j + half];
    return p[0];
}

/* Rules: row and state are updated in place by the gradient g summed per key. The order of operations is part of the
 * contract (other implementations must follow it). h: the hyper-parameters that optimizers.py packs. */

static inline void sgd(float *restrict row, float *restrict momentum, const float *restrict g, int64_t dim,
                       const float *h) {
    float lr = h[0], mu = h[1];
    if (mu == 0.0f) {
        for (int64_t j = 0; j < dim; j++) row[j] -= lr * g[j];
        return;
    }
    for (int64_t j = 0; j < dim; j++) {
        momentum[j] = mu * momentum[j] + g[j];
        row[j] -= lr * momentum[j];
    }
}

static inline void adagrad(float *restrict row, float *restrict sum, const float *restrict g, int64_t dim,
                           const float *h) {
    float lr = h[0], eps = h[1];
    for (int64_t j = 0; j < dim; j++) {
        sum[j] += g[j] * g[j];
        row[j] -= lr * (g[j] / (sqrtf(sum[j]) + eps));
    }
}

static inline void rowwise_adagrad(float *restrict row, float *restrict sum, const float *restrict g, int64_t dim,
                                   const float *h) {
    sum[0] += sum_squares(g, dim) / (float)dim;
    float step = h[0] / (sqrtf(sum[0]) + h[1]);
    for (int64_t j = 0; j < dim; j++) row[j] -= step * g[j];
}

/* h: lr / (1 - beta1^t), 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, 1 - lr * weight_decay */
static inline void adam(float *restrict row, float *restrict m, const float *restrict g, int64_t dim, const float *h) {
    float *restrict v = m + dim;
    for (int64_t j = 0; j < dim; j++) {
        m[j] += (g[j] - m[j]) * h[1];
        v[j] = h[2] * v[j] + (h[3] * g[j]) * g[j];
        row[j] = row[j] * h[6] - h[0] * (m[j] / (sqrtf(v[j]) / h[4] + h[5]));
    }
}

static inline void rowwise_adam(float *restrict row, float *restrict m, const float *restrict g, int64_t dim,
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
static inline void ftrl(float *restrict row, float *restrict z, const float *restrict g, int64_t dim, const float *h) {
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

static int apply(int rule, const hb_slabs *s, const int64_t *slots, int64_t n, int64_t dim, const float *grads,
                 const float *hyper) {
    static void (*const rules[])(float *restrict, float *restrict, const float *restrict, int64_t, const float *) = {
        [HB_SGD] = sgd,   [HB_ADAGRAD] = adagrad,           [HB_ROWWISE_ADAGRAD] = rowwise_adagrad,
        [HB_ADAM] = adam, [HB_ROWWISE_ADAM] = rowwise_adam, [HB_FTRL] = ftrl};
    if (rule < 0 || rule > HB_FTRL) return -1;
    for (int64_t i = 0; i < n; i++) {
        if (i + AHEAD < n && slots[i + AHEAD] >= 0) __builtin_prefetch(hb_line(s, slots[i + AHEAD]), 1);
        if (slots[i] < 0) continue;
        float *line = hb_line(s, slots[i]);
        rules[rule](line, line + dim, grads + i * dim, dim, hyper);
    }
    return 0;
}

/* Natural logarithm of x > 0, normal, from +, *, / alone: libm differs between machines, this does not. */
static double portable_log(double x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int64_t e = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    double m;
    memcpy(&m, &bits, 8); /* [1, 2) */
    if (m > 1.4142135623730951) m *= 0.5, e++;
    double s = (m - 1) / (m + 1), s2 = s * s, sum = 0;
    for (int k = 23; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k; /* atanh series; |s| < 0.172, so the tail is < 1e-19 */
    return (double)e * 0.6931471805599453 + 2 * s * sum;
}

#define POLY8(r, k0, k1, k2, k3, k4, k5, k6, k7) \
    (((((((k7 * r + k6) * r + k5) * r + k4) * r + k3) * r + k2) * r + k1) * r + k0)

/* Quantile of the standard normal, 0 < p < 1: Wichura, algorithm AS 241 (PPND16), relative accuracy 1e-16. */
static double normal_quantile(double p) {
    double q = p - 0.5;
    if (fabs(q) <= 0.425) {
        double r = 0.180625 - q * q;
        return q *
               POLY8(r, 3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
                     1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                     3.3430575583588128105e4, 2.5090809287301226727e3) /
               POLY8(r, 1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
                     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
                     5.2264952788528545610e3);
    }
    double r = sqrt(-portable_log(q < 0 ? p : 1 - p)), x;
    if (r <= 5) {
        r -= 1.6;
        x = POLY8(r, 1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
                  3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
                  2.27238449892691845833e-2, 7.74545014278341407640e-4) /
            POLY8(r, 1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
                  1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
                  1.05075007164441684324e-9);
    } else {
        r -= 5;
        x = POLY8(r, 6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
                  2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
                  2.71155556874348757815e-5, 2.01033439929228813265e-7) /
            POLY8(r, 1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
                  7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
                  2.04426310338993978564e-15);
    }
    return q < 0 ? -x : x;
}

static int initialize(int kind, double a, double b, uint64_t seed, const int64_t *keys, int64_t n, int64_t dim,
                      float *restrict out) {
    const double low = 0.022750131948179195, high = 0.9772498680518208; /* the normal CDF at -2 and 2 */
    uint32_t philox_key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    if (kind < HB_UNIFORM || kind > HB_CONSTANT) return -1;
    for (int64_t i = 0; i < n; i++) {
        uint32_t counter[4] = {0, 0, (uint32_t)(uint64_t)keys[i], (uint32_t)((uint64_t)keys[i] >> 32)}, draw[4];
        for (int64_t j = 0; j < dim; j++) {
            if (kind == HB_CONSTANT) {
                out[i * dim + j] = (float)a;
                continue;
            }
            if (j % 4 == 0) {
                counter[0] = (uint32_t)(j / 4);
                hb_philox(counter, philox_key, draw);
            }
            double u = ((double)draw[j % 4] + 0.5) * 0x1p-32; /* (0, 1), never an end */
            double x = kind == HB_UNIFORM  ? a + (b - a) * u
                       : kind == HB_NORMAL ? a + b * normal_quantile(u)
                                           : a + b * normal_quantile(low + (high - low) * u);
            out[i * dim + j] = (float)x;
        }
    }
    return 0;
}

extern const hb_decoders PASTE(hb_decoders_, HBKIT_ISA); /* decode.c */
HB_SNAPPY_DECLARE(PASTE(hb_snappy_, HBKIT_ISA)); /* snappy_kernel.c */
extern const hb_indexers PASTE(hb_indexers_, HBKIT_ISA); /* index_kernel.c */

const hb_kernels PASTE(hb_kernels_, HBKIT_ISA) = {
    TEXT(HBKIT_ISA), gather, pool, segment_sum, apply, initialize, &PASTE(hb_decoders_, HBKIT_ISA), PASTE(hb_snappy_, HBKIT_ISA),
    &PASTE(hb_indexers_, HBKIT_ISA)};
