/* BLAKE3 (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020), unkeyed, 32 bytes: as many chunks at once as a vector has
 * 32-bit lanes.
 *
 * The input is cut into chunks of 1024 bytes, the leaves of a binary tree whose left sides are full. Subtrees of up to
 * SUBTREE chunks are hashed whole, level by level, a node a lane; `stack` holds the roots of those that wait for their
 * right neighbour, largest first. The last chunk waits in `tail`, since only the end tells what is the root. */
#include <string.h>

#include "blake3.h"
#include "kernels.h"

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };
enum { BLOCK = 64, WORDS = 16, SUBTREE = 128 };

/* ZIP_LOW and ZIP_HIGH take lanes of two vectors in turns: of their first and of their second halves. */
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#if defined(__AVX512F__)
enum { LANES = 16 };
#define ZIP_LOW(a, b) ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(__AVX2__)
enum { LANES = 8 };
#define ZIP_LOW(a, b) ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
enum { LANES = 4 };
#define ZIP_LOW(a, b) ZIP(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) ZIP(a, b, 2, 6, 3, 7)
#endif
typedef uint32_t lanes __attribute__((vector_size(4 * LANES)));

static const uint32_t IV[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                               0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

#define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
#define G(a, b, c, d, x, y)                                                                                            \
    a += b + (x), d ^= a, d = ROTATE(d, 16), c += d, b ^= c, b = ROTATE(b, 12), a += b + (y), d ^= a,                   \
        d = ROTATE(d, 8), c += d, b ^= c, b = ROTATE(b, 7)
/* A round with the message words in this order; the next round's order is this one permuted by 2, 6, 3, 10, ... */
#define ROUND(m, i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15)                                 \
    G(v[0], v[4], v[8], v[12], m[i0], m[i1]);                                                                          \
    G(v[1], v[5], v[9], v[13], m[i2], m[i3]);                                                                          \
    G(v[2], v[6], v[10], v[14], m[i4], m[i5]);                                                                         \
    G(v[3], v[7], v[11], v[15], m[i6], m[i7]);                                                                         \
    G(v[0], v[5], v[10], v[15], m[i8], m[i9]);                                                                         \
    G(v[1], v[6], v[11], v[12], m[i10], m[i11]);                                                                       \
    G(v[2], v[7], v[8], v[13], m[i12], m[i13]);                                                                        \
    G(v[3], v[4], v[9], v[14], m[i14], m[i15])

/* Word w of each lane's block in m[w]: each pass of zips moves one bit of the lane's number into the word's. */
static inline void transpose(const uint8_t *const in[LANES], int64_t at, lanes m[WORDS]) {
    for (int part = 0; part < WORDS / LANES; part++) {
        lanes a[LANES], b[LANES];
        for (int i = 0; i < LANES; i++) memcpy(&a[i], in[i] + at + part * 4 * LANES, sizeof a[i]);
        for (int pass = 1; pass < LANES; pass *= 2) {
            for (int i = 0; i < LANES / 2; i++) {
                b[2 * i] = ZIP_LOW(a[i], a[i + LANES / 2]);
                b[2 * i + 1] = ZIP_HIGH(a[i], a[i + LANES / 2]);
            }
            memcpy(a, b, sizeof a);
        }
        memcpy(m + part * LANES, a, sizeof a);
    }
}

/* n <= LANES nodes, number i of the blocks at in + i * stride; their chaining values in out[i]. */
static void compress(const uint8_t *in, int64_t n, int64_t stride, int blocks, uint32_t last_nbytes, uint64_t counter,
                     uint64_t step, uint32_t first, uint32_t each, uint32_t last, uint32_t (*out)[8]) {
    const uint8_t *from[LANES];
    lanes h[8], v[16], m[WORDS], low, high;
    for (int i = 0; i < LANES; i++) {
        uint64_t c = counter + step * (uint64_t)i;
        low[i] = (uint32_t)c, high[i] = (uint32_t)(c >> 32);
        from[i] = in + (i < n ? i : 0) * stride; /* lanes beyond n repeat the first */
    }
    for (int i = 0; i < 8; i++) h[i] = (lanes){0} + IV[i];
    for (int b = 0; b < blocks; b++) {
        transpose(from, (int64_t)b * BLOCK, m);
        for (int i = 0; i < 8; i++) v[i] = h[i];
        for (int i = 0; i < 4; i++) v[8 + i] = (lanes){0} + IV[i];
        v[12] = low, v[13] = high;
        v[14] = (lanes){0} + (b == blocks - 1 ? last_nbytes : BLOCK);
        v[15] = (lanes){0} + (each | (b == 0 ? first : 0) | (b == blocks - 1 ? last : 0));
        ROUND(m, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        ROUND(m, 2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
        ROUND(m, 3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
        ROUND(m, 10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
        ROUND(m, 12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
        ROUND(m, 9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
        ROUND(m, 11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);
        for (int i = 0; i < 8; i++) h[i] = v[i] ^ v[i + 8];
    }
    for (int64_t l = 0; l < n; l++)
        for (int i = 0; i < 8; i++) out[l][i] = h[i][l];
}

static void parents(const uint32_t (*pairs)[8], int64_t n, uint32_t root, uint32_t (*out)[8]) {
    for (int64_t i = 0; i < n; i += LANES) /* out may be pairs: a lane reads ahead of where it writes */
        compress((const uint8_t *)pairs[2 * i], n - i < LANES ? n - i : LANES, 2 * sizeof *pairs, 1, BLOCK, 0, 0, 0,
                 PARENT | root, 0, out + i);
}

/* The chaining value of n chunks, a power of two <= SUBTREE, as the next on the stack. */
static void push(hb_blake3 *s, const uint8_t *data, int64_t n) {
    uint32_t nodes[SUBTREE][8];
    for (int64_t i = 0; i < n; i += LANES)
        compress(data + i * HB_BLAKE3_CHUNK, n - i < LANES ? n - i : LANES, HB_BLAKE3_CHUNK, HB_BLAKE3_CHUNK / BLOCK,
                 BLOCK, s->n_chunks + (uint64_t)i, 1, CHUNK_START, 0, CHUNK_END, nodes + i);
    for (int64_t width = n / 2; width; width /= 2) parents((const uint32_t(*)[8])nodes, width, 0, nodes);
    s->n_chunks += (uint64_t)n;
    memcpy(s->stack[s->depth++], nodes[0], sizeof nodes[0]);
    for (uint64_t whole = s->n_chunks / (uint64_t)n; !(whole & 1); whole /= 2, s->depth--)
        parents((const uint32_t(*)[8])s->stack + s->depth - 2, 1, 0, s->stack + s->depth - 2);
}

static void update(hb_blake3 *s, const uint8_t *data, int64_t n) {
    if (s->n_tail) {
        int64_t some = HB_BLAKE3_CHUNK - s->n_tail < n ? HB_BLAKE3_CHUNK - s->n_tail : n;
        memcpy(s->tail + s->n_tail, data, (size_t)some);
        s->n_tail += some, data += some, n -= some;
        if (n == 0) return;
        push(s, s->tail, 1);
        s->n_tail = 0;
    }
    while (n > HB_BLAKE3_CHUNK) {
        int64_t some = SUBTREE;
        while (some * HB_BLAKE3_CHUNK >= n || s->n_chunks % (uint64_t)some) some /= 2;
        push(s, data, some);
        data += some * HB_BLAKE3_CHUNK, n -= some * HB_BLAKE3_CHUNK;
    }
    memcpy(s->tail, data, (size_t)n);
    s->n_tail = n;
}

static void finish(const hb_blake3 *s, uint8_t out[32]) {
    uint32_t node[1][8], pair[2][8];
    uint8_t tail[HB_BLAKE3_CHUNK] = {0};
    int blocks = s->n_tail > BLOCK ? (int)((s->n_tail + BLOCK - 1) / BLOCK) : 1;
    memcpy(tail, s->tail, (size_t)s->n_tail);
    compress(tail, 1, 0, blocks, (uint32_t)(s->n_tail - (blocks - 1) * BLOCK), s->n_chunks, 0, CHUNK_START, 0,
             CHUNK_END | (s->depth ? 0 : ROOT), node);
    for (int i = s->depth - 1; i >= 0; i--) {
        memcpy(pair[0], s->stack[i], sizeof pair[0]);
        memcpy(pair[1], node[0], sizeof pair[1]);
        parents((const uint32_t(*)[8])pair, 1, i ? 0 : ROOT, node);
    }
    memcpy(out, node, 32); /* little-endian, as everywhere here */
}

const hb_blake3s PASTE(hb_blake3s_, HBKIT_ISA) = {.update = update, .finish = finish};
