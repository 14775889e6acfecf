/* BLAKE3: see blake3_kernel.c. */
#ifndef HBKIT_BLAKE3_H
#define HBKIT_BLAKE3_H

#include <stdint.h>

enum { HB_BLAKE3_CHUNK = 1024, HB_BLAKE3_DEPTH = 55 }; /* 2^64 bytes */

/* Begins as zeros. */
typedef struct {
    uint32_t stack[HB_BLAKE3_DEPTH][8];
    uint8_t tail[HB_BLAKE3_CHUNK];
    int64_t n_tail;
    uint64_t n_chunks;
    int depth;
} hb_blake3;

typedef struct {
    void (*update)(hb_blake3 *, const uint8_t *data, int64_t n);
    void (*finish)(const hb_blake3 *, uint8_t out[32]); /* changes nothing */
} hb_blake3s;

#endif
