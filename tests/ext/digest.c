/* Runs every kernel of one instruction set on the same pseudo-random inputs and prints a digest of all results. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "snappy.h"

extern const hb_kernels KERNELS; /* -DKERNELS=hb_kernels_<isa> */

enum { N = 500, SEGMENTS = 40, ROWS = 50, LINES = 64 };

static uint64_t digest = 1469598103934665603u; /* FNV-1a */

static void add(const float *x, int64_t n) {
    const unsigned char *bytes = (const unsigned char *)x;
    for (size_t i = 0; i < (size_t)n * sizeof(float); i++) digest = (digest ^ bytes[i]) * 1099511628211u;
}

static uint64_t seed = 42;

static uint64_t draw(void) { return seed = hb_mix64(seed + 0x9E3779B97F4A7C15u); }

static float number(void) {
    uint64_t bits = draw();
    return (float)(int32_t)(bits >> 32) / 2147483648.0f * (float)(1 + (bits & 7) * 100);
}

static void run(int64_t dim) {
    int64_t width = 3 * dim + 1, segment[N], keys[N], splits[ROWS + 1], slots[SEGMENTS];
    int32_t starts[SEGMENTS + 1] = {0}, next[SEGMENTS], order[N];
    float *values = malloc(sizeof(float) * N * (size_t)dim), *out = malloc(sizeof(float) * N * (size_t)dim);
    float *lines = malloc(sizeof(float) * LINES * (size_t)width), scale[N];
    void *scratch = malloc(HB_SCRATCH(dim) + HB_WIRE_SCRATCH(dim));
    const float plain[HB_HYPER] = {0.05f, 0.5f, 0.9f, 0.1f, 0.7f, 1e-8f, 0.99f, 0};
    const float all[HB_HYPER] = {0.05f, 0.5f, 0.9f, 0.1f, 0.7f, 1e-8f, 0.99f, 0, 0.01f, 5.0f, 2.0f};
    for (int64_t i = 0; i < N * dim; i++) values[i] = number();
    for (int i = 0; i < N; i++) {
        scale[i] = number();
        keys[i] = (int64_t)draw();
        segment[i] = (int64_t)(draw() % SEGMENTS);
        starts[segment[i] + 1]++;
    }
    for (int i = 0; i < SEGMENTS; i++) {
        next[i] = starts[i];
        starts[i + 1] += starts[i];
        slots[i] = i * 7 % SEGMENTS;
    }
    for (int i = 0; i < N; i++) order[next[segment[i]]++] = i;
    for (int i = 0; i <= ROWS; i++) splits[i] = i * (N / ROWS);

    hb_gradients g = {.values = values, .dim = dim, .n_segments = SEGMENTS, .order = order, .starts = starts,
                      .scale = scale};
    KERNELS.segment_sum(&g, out);
    add(out, SEGMENTS * dim);
    KERNELS.pool(values, segment, splits, scale, scale, ROWS, dim, out);
    add(out, ROWS * dim);
    KERNELS.expand(values, segment, N, dim, out);
    add(out, N * dim);
    for (int kind = HB_UNIFORM; kind <= HB_CONSTANT; kind++) {
        hb_draw drawn = {.kind = kind, .dim = dim, .a = 0.1, .b = 0.7, .seed = 99};
        KERNELS.initialize(&drawn, keys, N, out, dim);
        add(out, N * dim);
    }
    for (int dtype = HB_FLOAT32; dtype <= HB_BFLOAT16; dtype++) {
        int64_t row_nbytes = dtype == HB_FLOAT32 ? dim * 4 : (dim + 1) / 2 * 4, stride = row_nbytes + (width - dim) * 4;
        char *chunk = calloc(LINES, (size_t)stride);
        hb_slabs slabs = {.chunks = &chunk, .dim = dim, .n_state = width - dim, .row_stride = stride,
                          .state_stride = stride, .state_at = row_nbytes, .shift = 6, .dtype = dtype};
        int64_t everyone[LINES];
        for (int i = 0; i < LINES; i++) everyone[i] = i;
        for (int rule = 0; rule < 2 * HB_RULES; rule++) {
            for (int64_t i = 0; i < LINES * width; i++) lines[i] = number() < 0 ? 0.25f : number() * number();
            for (int64_t i = 0; i < LINES; i++)
                for (int64_t j = dim; j < width; j++) lines[i * width + j] *= lines[i * width + j]; /* sums of squares */
            KERNELS.scatter(&slabs, everyone, LINES, 0, width, lines, width);
            hb_part part = {.rule = rule / 2, .dim = dim, .hyper = rule & 1 ? all : plain};
            hb_update update = {.slots = slots, .g = g, .parts = &part, .n_parts = 1, .skip = rule & 1, .keys = keys,
                                .seed = 7, .step = 3, .scratch = scratch};
            if (rule / 2 % 2) update.g.order = NULL; /* values as they are */
            KERNELS.apply(&slabs, &update);
            KERNELS.gather(&slabs, everyone, NULL, LINES, width, lines);
            add(lines, LINES * width);
        }
        KERNELS.gather(&slabs, slots, segment, N, dim, out);
        add(out, N * dim);
        if (KERNELS.pool_slots(&slabs, slots, segment, splits, scale, scale, ROWS, out) == 0) add(out, ROWS * dim);
        free(chunk);
    }
    float *left = calloc(N, sizeof(float) * (size_t)dim);
    for (int wire = HB_FLOAT32; wire <= HB_INT8; wire++)
        for (int kind = 0; kind < 3; kind++) { /* to the nearest, at random, with a residual */
            hb_packing packing = {.rows = values, .n = N, .dim = dim, .wire = wire, .keys = kind ? keys : NULL,
                                  .residual = kind == 2 ? left : NULL, .seed = 7, .step = 3, .scratch = scratch};
            uint8_t *block = calloc(N, (size_t)dim * 4 + 2);
            KERNELS.wire->pack(&packing, block);
            KERNELS.wire->unpack(block, N, dim, wire, out);
            add(out, N * dim), add(left, N * dim);
            free(block);
        }
    free(values), free(out), free(lines), free(scratch), free(left);
}

/* Short literals and copies of every kind, length and overlap, as no compressor mixes them. */
static void decompress(void) {
    enum { TAGS = 2000, START = 3 }; /* the length takes three bytes */
    static uint8_t src[START + 20 * TAGS];
    static float dst[16 * TAGS + HB_SNAPPY_SLACK];
    int64_t n = START, length = 0;
    for (int i = 0; i < TAGS; i++) {
        uint64_t bits = draw(), size = 1 + (bits >> 8) % (bits & 8 ? 18 : 64);
        uint64_t offset = 1 + (bits >> 32) % (bits & 16 ? 40 : 2000);
        if (i == 0 || (bits & 3) == 0) {
            size = 1 + size % 18;
            src[n++] = (uint8_t)((size - 1) << 2);
            for (uint64_t j = 0; j < size; j++) src[n++] = (uint8_t)draw();
        } else {
            if (offset > (uint64_t)length) offset = (uint64_t)length;
            if (bits & 1 && size >= 4 && size <= 11) {
                src[n++] = (uint8_t)(1 | (size - 4) << 2 | offset >> 8 << 5);
                src[n++] = (uint8_t)offset;
            } else {
                src[n++] = (uint8_t)(2 | (size - 1) << 2);
                src[n++] = (uint8_t)offset, src[n++] = (uint8_t)(offset >> 8);
            }
        }
        length += (int64_t)size;
    }
    for (int i = 0; i < START; i++) src[i] = (uint8_t)((length >> 7 * i & 127) | (i + 1 < START ? 128 : 0));
    if (KERNELS.snappy(src, n, (uint8_t *)dst, length)) abort();
    memset((uint8_t *)dst + length, 0, HB_SNAPPY_SLACK);
    add(dst, length / 4 + 1);
}

int main(void) {
    const int64_t dims[] = {1, 7, 16, 33, 300};
    hb_fp_state before = hb_fp_enter();
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) run(dims[i]);
    hb_fp_leave(before);
    decompress();
    printf("%016llx\n", (unsigned long long)digest);
    return 0;
}
