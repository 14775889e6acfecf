/* The index and dedupe: what index.pyx and index_kernel.c share. The essay is in index_kernel.c. */
#ifndef HBKIT_INDEX_H
#define HBKIT_INDEX_H

#include <stddef.h>
#include <stdint.h>

enum { HB_WAYS = 5 };

/* One cache line. The first state % 8 places are taken; state / 8 keys lie further on, since this bucket was full. */
typedef struct {
    uint64_t keys[HB_WAYS];
    uint32_t slots[HB_WAYS];
    uint32_t state;
} hb_bucket;

/* A hash table of its own: k parts of 2^shift buckets. */
typedef struct {
    uint32_t n;                  /* keys */
    uint32_t k : 24, depth : 8;  /* parts; leading bits of the mix that its keys share */
    hb_bucket *part[];           /* up to seven in the same line */
} hb_shard;

typedef struct hb_region hb_region;

typedef struct {
    hb_shard **dir; /* 2^depth, by the leading bits of the mix; neighbours may be the same shard */
    int32_t depth, shift;
    int64_t n, next_slot;
    int64_t nbytes; /* all memory held, but for this struct */
    /* Parts come from regions; those not in use are on a stack, the n_cold lowest of which have no pages. */
    hb_region *regions;
    hb_bucket **idle;
    int64_t n_parts, room_idle, n_idle, n_cold;
    /* Slots of erased keys: one bit each, in pages made when the first slot of the page is freed. */
    uint64_t **free_bits;
    uint32_t *free_counts;
    int64_t room_pages, n_free, first_word; /* no slot is free in the words of bits before first_word */
    void *lock;                             /* pthread_rwlock_t */
    int64_t *countdown;                     /* tests: the allocation that takes it from 1 to 0 fails */
} hb_index;

/* create, insert, erase: 0, or -1 without memory, and then the index holds what it held before. Those that only read
 * run side by side, the others alone. */
typedef struct {
    int (*create)(hb_index *, int64_t capacity); /* the struct is zeros, but for countdown */
    void (*destroy)(hb_index *);
    void (*find)(const hb_index *, const int64_t *keys, int64_t n, int64_t *slots);
    int (*insert)(hb_index *, const int64_t *keys, int64_t n, int64_t *slots, uint8_t *is_new);
    int (*erase)(hb_index *, const int64_t *keys, int64_t n, int64_t *slots);
    /* Undo the last change, an insert before which next_slot was as given. */
    void (*take_back)(hb_index *, const int64_t *keys, int64_t n, const uint8_t *is_new, int64_t next_slot);
    int64_t (*items)(const hb_index *, int64_t room, int64_t *keys, int64_t *slots); /* how many; none if no room */
    /* Keys whose mix lies in [first, last], both included; passes over their shards alone. With bits (may be NULL), only
     * those whose slot has its bit set. */
    int64_t (*part)(const hb_index *, uint64_t first, uint64_t last, const uint64_t *bits, int64_t n_bits,
                    int64_t room, int64_t *keys);
    const char *(*validate)(const hb_index *); /* what contradicts itself, or NULL */
    /* Distinct keys in unique[1..] by first appearance; returns how many. See dedupe_kernel.c. counts may be NULL. */
    int64_t (*dedupe)(const int64_t *keys, int64_t n, uint32_t *table, int bits, int64_t *unique, void *inverse,
                      int wide, int64_t *counts);
    /* Of an index whose slots the caller gives, which knows no find_or_insert and erase: see places.pyx. */
    int (*put)(hb_index *, const int64_t *keys, int64_t n, const int64_t *slots, int64_t *before);
    void (*drop)(hb_index *, const int64_t *keys, int64_t n, int64_t *before);
} hb_indexers;

enum { HB_PAGE = 1 << 15 }; /* slots of a page of free bits */

#endif
