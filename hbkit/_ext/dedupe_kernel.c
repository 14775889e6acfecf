/* Distinct keys of a batch. Compiled once for each instruction set, with -DHBKIT_ISA=<name>.
 *
 * A table of 32-bit numbers, by open addressing with linear probing: 0, or u for the u-th distinct key, unique[u]. It
 * has six to twelve places a key, since what costs time is the processor's wrong guess that a place is not taken by
 * another key. Numbers alone keep it within the second-level cache, or near it, for batches of 65,536.
 *
 * There are two loops. Where most keys are alike, new or seen before, the processor guesses which, and need not wait
 * for the table (`guess`). Where they are mixed, as in real batches, many guesses would be wrong, so all is computed
 * (`compute`): an empty place leads to unique[0], which is set to the key itself, so that one comparison ends the
 * probing either way, and what is written for a new key is written for an old one too, where nothing reads it. Each
 * block of keys takes the loop that suited the last one; the result is the same.
 */
#include "index.h"
#include "kernels.h"

#include <string.h>

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)

enum { BLOCK = 64 };

/* Both take keys[0..m), whose homes in the table are at[0..m), replace these by the numbers of the keys, and return how
 * many distinct keys there are now. */
static inline uint32_t guess(const int64_t *keys, int m, uint32_t *at, uint32_t *table, uint32_t mask, int64_t *unique,
                             uint32_t n) {
    for (int j = 0; j < m; j++) {
        uint32_t p = at[j], u;
        while ((u = table[p]) && unique[u] != keys[j]) p = (p + 1) & mask;
        if (!u) {
            table[p] = u = ++n;
            unique[u] = keys[j];
        }
        at[j] = u;
    }
    return n;
}

static inline uint32_t compute(const int64_t *keys, int m, uint32_t *at, uint32_t *table, uint32_t mask,
                               int64_t *unique, uint32_t n) {
    for (int j = 0; j < m; j++) {
        uint32_t p = at[j], u, is_new;
        unique[0] = keys[j];
        while (unique[u = table[p]] != keys[j]) p = (p + 1) & mask;
        is_new = u == 0;
        u |= (n + 1) & -is_new;
        table[p] = u;
        unique[n + 1] = keys[j];
        n += is_new;
        at[j] = u;
    }
    return n;
}

/* unique: n + 1 elements, the first of no meaning. Of inverse, int32 or int64 as `wide` says, the first is 0. */
int64_t PASTE(hb_dedupe_, HBKIT_ISA)(const int64_t *keys, int64_t n, uint32_t *table, int bits, int64_t *unique,
                                     void *inverse, int wide, int64_t *counts) {
    uint32_t found = 0, mask = (uint32_t)(((uint64_t)1 << bits) - 1), at[BLOCK];
    int mixed = 0;
    memset(table, 0, sizeof *table << bits);
    for (int64_t g = 0; g < n; g += BLOCK) {
        int m = n - g < BLOCK ? (int)(n - g) : BLOCK;
        uint32_t before = found;
        for (int j = 0; j < m; j++) at[j] = (uint32_t)(hb_mix64((uint64_t)keys[g + j]) >> (64 - bits));
        for (int j = 0; j < m; j++) __builtin_prefetch(table + at[j], 0, 2);
        found = (mixed ? compute : guess)(keys + g, m, at, table, mask, unique, found);
        mixed = found - before > BLOCK / 16 && found - before < BLOCK - BLOCK / 16;
        if (wide)
            for (int j = 0; j < m; j++) ((int64_t *)inverse)[g + j] = (int64_t)at[j] - 1;
        else
            for (int j = 0; j < m; j++) ((int32_t *)inverse)[g + j] = (int32_t)(at[j] - 1);
    }
    if (counts) {
        memset(counts, 0, sizeof *counts * found);
        if (wide)
            for (int64_t i = 0; i < n; i++) counts[((int64_t *)inverse)[i]]++;
        else
            for (int64_t i = 0; i < n; i++) counts[((int32_t *)inverse)[i]]++;
    }
    return found;
}
