/* XXH64: the seeded 64-bit hash that turns strings and integers into keys (github.com/Cyan4973/xxHash, spec 0.2). */
#ifndef HBKIT_XXH64_H
#define HBKIT_XXH64_H

#include <stdint.h>
#include <string.h>

static const uint64_t HB_P1 = 11400714785074694791u, HB_P2 = 14029467366897019727u, HB_P3 = 1609587929392839161u,
                      HB_P4 = 9650029242287828579u, HB_P5 = 2870177450012600261u;

static inline uint64_t hb_rotate(uint64_t x, int r) { return (x << r) | (x >> (64 - r)); }

static inline uint64_t hb_round(uint64_t acc, uint64_t lane) { return hb_rotate(acc + lane * HB_P2, 31) * HB_P1; }

static inline uint64_t hb_load64(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static inline uint64_t hb_xxh64(const uint8_t *p, int64_t n, uint64_t seed) {
    const uint8_t *end = p + n;
    uint64_t h;
    if (n >= 32) {
        uint64_t a = seed + HB_P1 + HB_P2, b = seed + HB_P2, c = seed, d = seed - HB_P1;
        for (; end - p >= 32; p += 32) {
            a = hb_round(a, hb_load64(p));
            b = hb_round(b, hb_load64(p + 8));
            c = hb_round(c, hb_load64(p + 16));
            d = hb_round(d, hb_load64(p + 24));
        }
        h = hb_rotate(a, 1) + hb_rotate(b, 7) + hb_rotate(c, 12) + hb_rotate(d, 18);
        h = (h ^ hb_round(0, a)) * HB_P1 + HB_P4;
        h = (h ^ hb_round(0, b)) * HB_P1 + HB_P4;
        h = (h ^ hb_round(0, c)) * HB_P1 + HB_P4;
        h = (h ^ hb_round(0, d)) * HB_P1 + HB_P4;
    } else {
        h = seed + HB_P5;
    }
    h += (uint64_t)n;
    for (; end - p >= 8; p += 8) h = hb_rotate(h ^ hb_round(0, hb_load64(p)), 27) * HB_P1 + HB_P4;
    if (end - p >= 4) {
        uint32_t word;
        memcpy(&word, p, 4);
        h = hb_rotate(h ^ (word * HB_P1), 23) * HB_P2 + HB_P3;
        p += 4;
    }
    for (; p < end; p++) h = hb_rotate(h ^ (*p * HB_P5), 11) * HB_P1;
    h = (h ^ (h >> 33)) * HB_P2;
    h = (h ^ (h >> 29)) * HB_P3;
    return h ^ (h >> 32);
}

#endif
