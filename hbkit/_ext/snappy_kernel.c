/* Compiled once for each instruction set, with -DHBKIT_ISA=<name>. */
#include "snappy.h"

#include <string.h>

#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define HIDE(x) __asm__("" : "+r"(x))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

enum { LITERAL = 0, COPY1 = 1, COPY2 = 2, COPY4 = 3 }; /* the tag's low two bits */
enum { SHORT = 6, IN_MARGIN = 80, OUT_MARGIN = 144 };

static inline void copy16(uint8_t *to, const uint8_t *from) {
    uint8_t line[16];
    memcpy(line, from, 16);
    memcpy(to, line, 16);
}

/* to[i] = to[i - offset] for i < n <= 64, whatever the overlap; writes up to 15 bytes more. */
static inline void repeat(uint8_t *to, int64_t offset, int64_t n) {
    const uint8_t *from = to - offset;
    if (offset >= 16) {
        for (int64_t i = 0; i < n; i += 16) copy16(to + i, from + i);
        return;
    }
    static const uint8_t cycle[32] = {0};
    (void)cycle;
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

#define BY4(m, x) m(x), m(x + 1), m(x + 2), m(x + 3)
#define BY16(m, x) BY4(m, x), BY4(m, x + 4), BY4(m, x + 8), BY4(m, x + 12)
#define BY64(m, x) BY16(m, x), BY16(m, x + 16), BY16(m, x + 32), BY16(m, x + 48)
/* For each tag: a copy's length, and the offset's bits that a tag of COPY1 holds; too long to be short if no such copy. */
#define TAG(t) \
    (uint16_t)(((t) & 3) == COPY1 ? (4 + ((t) >> 2 & 7)) | ((t) >> 5 << 8) : ((t) & 3) == COPY2 ? ((t) >> 2) + 1 : 255)
static const uint16_t tags[256] = {BY64(TAG, 0), BY64(TAG, 64), BY64(TAG, 128), BY64(TAG, 192)};

HB_SNAPPY_DECLARE(PASTE(hb_snappy_, HBKIT_ISA)) {
    int64_t length, start = hb_snappy_preamble(src, n, &length);
    if (!start) return HB_SNAPPY_TRUNCATED;
    if (length != dst_n) return HB_SNAPPY_LENGTH;
    const uint8_t *ip = src + start, *end = src + n;
    uint8_t *op = dst, *op_end = dst + dst_n;
    const uint8_t *in_limit = n - start > IN_MARGIN ? end - IN_MARGIN : ip, *out_limit = dst_n > OUT_MARGIN ? op_end - OUT_MARGIN : op;
    while (ip < end) {
        while (ip < in_limit && op < out_limit) {
            uint64_t w;
            memcpy(&w, ip, 8);
            uint64_t twice = w + w;
            HIDE(twice);
            uint64_t second = (w >> 16) >> (twice & 63), lit = (w & 255) >> 2;
            const uint8_t *next = ip + lit + 3;
            HIDE(next);
            const uint8_t *next0 = ip + 1;
            lit += 1;
#if defined(__x86_64__)
            __asm__("testb $3, %b3\n\tcmovne %3, %0\n\tcmovne %5, %1\n\tcmovne %4, %2" : "+r"(second), "+r"(next), "+r"(lit) : "r"(w), "r"((uint64_t)0), "r"(next0) : "cc");
#else
            if (w & 3) second = w, next = next0, lit = 0;
#endif
            uint64_t bytes = second & 3;
            if (UNLIKELY(lit > SHORT)) {
                if (lit > 60) break;
                for (uint64_t i = 0; i < lit; i += 16) copy16(op + i, ip + 1 + i);
                ip += lit + 1, op += lit;
                continue;
            }
            uint32_t u;
            memcpy(&u, next - 1, 4);
            memcpy(op, ip + 1, 8);
            ip = next - 1;
            op += lit;
            uint32_t tag = tags[u & 255];
            uint64_t len = tag & 255;
            uint64_t offset = (tag >> 8 << 8) + ((u >> 8) & ((1u << 8 * bytes) - 1));
            if (UNLIKELY(len > 16) || UNLIKELY(offset < len)) {
                if (len > 64) break;
                if (offset == 0 || offset > (uint64_t)(op - dst)) return HB_SNAPPY_OFFSET;
                repeat(op, offset, len);
            } else {
                if (UNLIKELY(offset > (uint64_t)(op - dst))) return HB_SNAPPY_OFFSET;
                copy16(op, op - offset);
            }
            HIDE(next);
            ip = next + bytes;
            op += len;
        }
        /* One tag, with every check. */
        unsigned t = *ip++;
        int64_t len = t >> 2, offset = 0, bytes = (t & 3) == LITERAL ? (len < 60 ? 0 : len - 59) : 1 << ((t & 3) - 1);
        if (bytes > end - ip) return HB_SNAPPY_TRUNCATED;
        for (int64_t i = 0; i < bytes; i++) offset |= (int64_t)ip[i] << (8 * i);
        ip += bytes;
        if ((t & 3) == LITERAL) {
            len = 1 + (len < 60 ? len : offset);
            if (len > end - ip) return HB_SNAPPY_TRUNCATED;
            if (len > op_end - op) return HB_SNAPPY_LENGTH;
            memcpy(op, ip, (size_t)len);
            ip += len;
        } else {
            if ((t & 3) == COPY1) {
                offset |= (len & ~7) << 5;
                len = (len & 7) + 3;
            }
            len++;
            if (len > op_end - op) return HB_SNAPPY_LENGTH;
            if (offset == 0 || offset > op - dst) return HB_SNAPPY_OFFSET;
            repeat(op, offset, len);
        }
        op += len;
    }
    return op == op_end ? 0 : HB_SNAPPY_LENGTH;
}
