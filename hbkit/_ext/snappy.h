/* Snappy's raw format (as in Parquet's pages), decompressed. */
#ifndef HBKIT_SNAPPY_H
#define HBKIT_SNAPPY_H

#include <stdint.h>

enum { HB_SNAPPY_SLACK = 64 }; /* writable bytes that must follow dst */
enum { HB_SNAPPY_TRUNCATED = -1, HB_SNAPPY_OFFSET = -2, HB_SNAPPY_LENGTH = -3 };

/* Returns the position after the preamble and writes the length it declares; 0 if it is damaged. */
static inline int64_t hb_snappy_preamble(const uint8_t *src, int64_t n, int64_t *length) {
    uint64_t value = 0;
    for (int64_t i = 0; i < n && i < 5; i++) {
        value |= (uint64_t)(src[i] & 127) << (7 * i);
        if (src[i] < 128) {
            *length = (int64_t)value;
            return value <= UINT32_MAX ? i + 1 : 0;
        }
    }
    return 0;
}

/* Returns the length that the stream declares, or -1 if that is damaged. */
static inline int64_t hb_snappy_length(const uint8_t *src, int64_t n) {
    int64_t length;
    return hb_snappy_preamble(src, n, &length) ? length : -1;
}

/* One for each instruction set (kernels.h has them as `snappy`). dst holds the dst_n bytes that the stream must declare
 * and HB_SNAPPY_SLACK more; src is read only within [src, src + n). Returns 0 or a negative code. */
#define HB_SNAPPY_DECLARE(name) int name(const uint8_t *src, int64_t n, uint8_t *dst, int64_t dst_n)

#endif
