/* The index: 64-bit key to 32-bit slot. Compiled once for each instruction set, with -DHBKIT_ISA=<name>.
 *
 * A bucket is one cache line: five keys, their slots, and a count. A find compares five keys at once and mostly takes
 * one cache miss; batches prefetch a group of buckets before they look into any. At load 0.8 a key costs
 * 64 / (5 * 0.8) = 16 bytes.
 *
 *   mix64(key) = [ leading bits: which shard | ......... | low 32 bits: where in the shard, as a fraction ]
 *
 *   dir[leading bits] -> shard {n, k, depth, part[k]} -> part: 2^shift buckets
 *
 * Within its shard a key belongs to bucket floor(fraction * buckets), its home, and lies in the first bucket from there
 * that had room (after the last comes the first). Each full bucket that it went past counts it: a find
 * ends at the first bucket that no key went past. Erasing pulls a later key into the hole if one went past it, so only
 * full buckets are ever passed: there are no tombstones, and age does not slow a find. No key is reserved: a place
 * without a key holds one that belongs to the other half of the shards, which nobody looks for here.
 *
 * Growing. A shard at its limit gets two more parts, and its keys are laid out anew; buckets follow the order of
 * fractions, so both sides are gone through front to back. With MOST_PARTS it becomes two shards instead, by one more
 * leading bit (extendible hashing: Fagin et al., TODS 1979). One shard at a time is in memory twice, and the load stays
 * near 0.6 to 0.9. Lest all shards grow in the same batch, half of them grow by 4, 6, 4 + 4 parts and half by 5, 7,
 * 5 + 5, and their limits differ. All parts have one size: what one shard lets go of, the next takes, its
 * pages touched already. Erasing shrinks and merges likewise. While the index is small its parts are too, and all are
 * replaced by larger ones now and then.
 *
 * Keys made to share their leading bits (mix64 is no secret) would split shards in vain. So the directory never has
 * more entries than there are parts, and beyond that a shard grows by fourths: slower, but nothing is lost.
 *
 * Memory: what a step needs is allocated before the step changes anything, and a batch that fails in the middle takes
 * back the keys it has inserted.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* madvise, pthread_rwlock_t */
#endif
#include "index.h"
#include "kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define RARELY(x) __builtin_expect(!!(x), 0)

enum {
    SHIFT = 10,     /* a part has 2^SHIFT buckets (64 KiB), once the index is not small */
    FIRST_SHIFT = 2, /* the same of an empty index */
    MOST_PARTS = 7,  /* of a shard that may split instead */
    REGION = 32,     /* parts allocated at once at the most: one huge page */
    GROUP = 2048,    /* keys looked for before those that went past their home are looked for further on */
    AHEAD = 64,      /* buckets fetched before the first is read */
};
#define MAX_SLOTS 0xFFFFFFFEu
#define HUGE ((size_t)2 << 20)

/* ---- memory ---- */

struct hb_region {
    hb_region *next;
    void *memory;
    size_t nbytes;
};

static void *grab(hb_index *t, size_t align, size_t nbytes) {
    void *p;
    if (t->countdown && __atomic_load_n(t->countdown, __ATOMIC_RELAXED) > 0 &&
        __atomic_sub_fetch(t->countdown, 1, __ATOMIC_RELAXED) == 0)
        return NULL;
    if (posix_memalign(&p, align, nbytes) != 0) return NULL;
    t->nbytes += (int64_t)nbytes;
    return p;
}

static void let_go(hb_index *t, void *p, size_t nbytes) {
    if (!p) return;
    free(p);
    t->nbytes -= (int64_t)nbytes;
}

static inline size_t part_nbytes(const hb_index *t) { return sizeof(hb_bucket) << t->shift; }

static int add_region(hb_index *t) {
    int64_t n = t->shift == SHIFT && t->n_parts >= REGION ? REGION : t->n_parts / 8 < 1 ? 1 : t->n_parts / 8;
    size_t nbytes = (size_t)n * part_nbytes(t);
    if (t->n_parts + n > t->room_idle) {
        int64_t room = t->room_idle ? 2 * t->room_idle + n : 8;
        hb_bucket **idle = grab(t, 64, (size_t)room * sizeof *idle);
        if (!idle) return -1;
        if (t->n_idle) memcpy(idle, t->idle, (size_t)t->n_idle * sizeof *idle);
        let_go(t, t->idle, (size_t)t->room_idle * sizeof *idle);
        t->idle = idle, t->room_idle = room;
    }
    hb_region *r = grab(t, 64, sizeof *r);
    if (!r) return -1;
    if (!(r->memory = grab(t, nbytes >= HUGE ? HUGE : nbytes >= 65536 ? 4096 : 64, nbytes))) {
        let_go(t, r, sizeof *r);
        return -1;
    }
#ifdef MADV_HUGEPAGE
    if (nbytes >= HUGE) madvise(r->memory, nbytes, MADV_HUGEPAGE);
#endif
    r->nbytes = nbytes, r->next = t->regions, t->regions = r;
    for (int64_t i = n - 1; i >= 0; i--)
        t->idle[t->n_idle++] = (hb_bucket *)((char *)r->memory + (size_t)i * part_nbytes(t));
    t->n_parts += n;
    return 0;
}

static hb_bucket *take_part(hb_index *t) {
    if (t->n_idle == 0 && add_region(t)) return NULL;
    if (t->n_idle == t->n_cold) t->n_cold--, t->nbytes += (int64_t)part_nbytes(t);
    return t->idle[--t->n_idle];
}

static void leave_part(hb_index *t, hb_bucket *part) {
    t->idle[t->n_idle++] = part;
#ifdef __linux__ /* elsewhere the advice may leave the pages where they are */
    int64_t most = REGION + (t->n_parts - t->n_idle) / 32;
    if (t->shift == SHIFT && t->n_idle - t->n_cold > most &&
        madvise(t->idle[t->n_cold], part_nbytes(t), MADV_DONTNEED) == 0)
        t->n_cold++, t->nbytes -= (int64_t)part_nbytes(t);
#endif
}

/* ---- shards ---- */

/* A key of the other half: the mixes of 0 and 2 begin with the bits 0 and 1. */
static inline uint64_t vacant(uint64_t mix) { return mix >> 63 ? 0 : 2; }

static inline uint32_t prefix_of(uint64_t mix, uint32_t depth) { return (uint32_t)(mix >> (64 - depth)); }

static inline uint64_t places(const hb_index *t, uint32_t k) { return ((uint64_t)HB_WAYS * k) << t->shift; }

static uint32_t limit_of(const hb_index *t, uint32_t k, uint32_t prefix) {
    uint64_t limit = places(t, k) * (3328 + (prefix * 37 & 63) * 6) / 4096; /* 0.81 to 0.90, neighbours far apart */
    return limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX;
}

/* The fewest parts, at least `least`, that hold n keys and have room for some more; even for half the shards, odd for
 * the other half, unless there are very few. */
static uint32_t parts_for(const hb_index *t, uint64_t n, uint32_t least, uint32_t depth, uint64_t mix) {
    uint32_t k = least, prefix = prefix_of(mix, depth);
    while (limit_of(t, k, prefix) - limit_of(t, k, prefix) / 32 <= n || (k > 3 && (k ^ mix >> 63) & 1)) k++;
    return k;
}

static size_t shard_nbytes(uint32_t k) { return sizeof(hb_shard) + k * sizeof(hb_bucket *); }

static void free_shard(hb_index *t, hb_shard *s) {
    if (!s) return;
    for (uint32_t i = 0; i < s->k; i++) leave_part(t, s->part[i]);
    let_go(t, s, shard_nbytes(s->k));
}

/* An empty shard of the keys whose mix begins as `mix` does, for `depth` bits. */
static hb_shard *new_shard(hb_index *t, uint32_t k, uint32_t depth, uint64_t mix) {
    hb_shard *s = grab(t, 64, shard_nbytes(k));
    if (!s) return NULL;
    s->n = 0, s->k = k, s->depth = depth;
    for (uint32_t i = 0; i < k; i++) {
        if (!(s->part[i] = take_part(t))) {
            while (i) leave_part(t, s->part[--i]);
            let_go(t, s, shard_nbytes(k));
            return NULL;
        }
        uint64_t nobody = vacant(mix);
        hb_bucket empty = {{nobody, nobody, nobody, nobody, nobody}, {0}, 0};
        for (hb_bucket *b = s->part[i], *end = b + ((size_t)1 << t->shift); b < end; b++) *b = empty;
    }
    return s;
}

static inline hb_shard *shard_of(const hb_index *t, uint64_t mix) { return t->dir[mix >> (64 - t->depth)]; }

static inline uint32_t n_buckets(const hb_index *t, const hb_shard *s) { return (uint32_t)s->k << t->shift; }

static inline uint32_t home_of(const hb_index *t, const hb_shard *s, uint64_t mix) {
    return (uint32_t)(((mix & 0xFFFFFFFFu) * n_buckets(t, s)) >> 32);
}

static inline hb_bucket *bucket_at(const hb_index *t, const hb_shard *s, uint32_t pos) {
    return s->part[pos >> t->shift] + (pos & (((uint32_t)1 << t->shift) - 1));
}

static inline uint32_t next_pos(const hb_index *t, const hb_shard *s, uint32_t pos) {
    return pos + 1 == n_buckets(t, s) ? 0 : pos + 1;
}

/* A bit for each of the five places that hold key. */
static inline uint32_t match(const hb_bucket *b, uint64_t key) {
#if defined(__AVX512F__)
    return _mm512_mask_cmpeq_epi64_mask(0x1F, _mm512_load_si512(b), _mm512_set1_epi64((long long)key));
#elif defined(__AVX2__)
    __m256i four = _mm256_cmpeq_epi64(_mm256_load_si256((const __m256i *)b), _mm256_set1_epi64x((long long)key));
    return (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(four)) | (uint32_t)(b->keys[4] == key) << 4;
#else /* two at a time, SSE4.1 or NEON, is no faster than this */
    uint32_t m = 0;
    for (int i = 0; i < HB_WAYS; i++) m |= (uint32_t)(b->keys[i] == key) << i;
    return m;
#endif
}

static inline uint32_t used(const hb_bucket *b) { return b->state % 8; }
/* How many keys lie further on because this bucket was full. */
static inline uint32_t passed(const hb_bucket *b) { return b->state / 8; }

/* Put a key that is absent into s, which is not full. Counts rather than looks for the free place: a line that was
 * written to a moment ago cannot be read whole without waiting for the write. */
static inline void place(const hb_index *t, hb_shard *s, uint64_t mix, uint64_t key, uint32_t slot) {
    uint32_t pos = home_of(t, s, mix);
    hb_bucket *b = bucket_at(t, s, pos);
    while (used(b) == HB_WAYS) {
        b->state += 8;
        pos = next_pos(t, s, pos);
        b = bucket_at(t, s, pos);
    }
    b->keys[used(b)] = key;
    b->slots[used(b)] = slot;
    b->state++;
}

#define EACH_BUCKET(t, s, b) \
    for (uint32_t part_ = 0; part_ < (s)->k; part_++) \
        for (hb_bucket *b = (s)->part[part_], *end_ = b + ((size_t)1 << (t)->shift); b < end_; b++)

/* Lay the keys of s out in low or, where bit (1 or 0) of their mix is set, in high, which belong to `to`. */
static void move(const hb_index *t, const hb_shard *s, const hb_index *to, hb_shard *low, hb_shard *high,
                 uint32_t bit) {
    enum { LOT = 256 };
    uint64_t keys[LOT + HB_WAYS], h[LOT + HB_WAYS];
    uint32_t slots[LOT + HB_WAYS], n_high = 0;
    int n = 0;
    for (uint32_t pos = 0, end = n_buckets(t, s); pos < end; pos++) {
        const hb_bucket *b = bucket_at(t, s, pos);
        for (uint32_t i = 0; i < HB_WAYS; i++) {
            keys[n] = b->keys[i], slots[n] = b->slots[i];
            n += i < used(b);
        }
        if (n < LOT && pos + 1 < end) continue;
        for (int i = 0; i < n; i++) h[i] = hb_mix64(keys[i]);
        for (int i = 0; i < n; i++) {
            uint32_t up = (h[i] >> bit) & 1;
            place(to, up ? high : low, h[i], keys[i], slots[i]);
            n_high += up;
        }
        n = 0;
    }
    low->n += s->n - n_high;
    high->n += n_high;
}

/* Let the entries of the directory for the keys that begin as `mix` does, for `depth` bits, point to s. */
static void point(hb_index *t, uint64_t mix, uint32_t depth, hb_shard *s) {
    uint64_t n = (uint64_t)1 << (t->depth - (int32_t)depth), first = (mix >> (64 - depth)) * n;
    for (uint64_t i = 0; i < n; i++) t->dir[first + i] = s;
}

static int double_directory(hb_index *t) {
    size_t n = (size_t)1 << t->depth;
    hb_shard **dir = grab(t, 64, 2 * n * sizeof *dir);
    if (!dir) return -1;
    for (size_t i = 0; i < 2 * n; i++) dir[i] = t->dir[i / 2];
    let_go(t, t->dir, n * sizeof *dir);
    t->dir = dir;
    t->depth++;
    return 0;
}

/* Replace the shard of mix by one of k parts. */
static int resize(hb_index *t, uint64_t mix, uint32_t k) {
    hb_shard *old = shard_of(t, mix), *s = new_shard(t, k, old->depth, mix);
    if (!s) return -1;
    move(t, old, t, s, s, 0);
    point(t, mix, old->depth, s);
    free_shard(t, old);
    return 0;
}

static int split(hb_index *t, uint64_t mix) {
    hb_shard *old = shard_of(t, mix), *child[2] = {NULL, NULL};
    uint32_t depth = old->depth + 1, n[2] = {0, 0}, bit = 64 - depth;
    uint64_t begin[2];
    begin[0] = mix & ~((uint64_t)1 << bit), begin[1] = mix | (uint64_t)1 << bit;
    if (old->depth == (uint32_t)t->depth && double_directory(t)) return -1;
    EACH_BUCKET(t, old, b)
        for (uint32_t i = 0; i < HB_WAYS; i++) n[1] += (hb_mix64(b->keys[i]) >> bit) & (i < used(b));
    n[0] = old->n - n[1];
    for (int i = 0; i < 2; i++) {
        uint32_t k = parts_for(t, n[i], old->k / 2 + 1, depth, begin[i]);
        if (!(child[i] = new_shard(t, k, depth, begin[i]))) {
            free_shard(t, child[0]);
            return -1;
        }
    }
    move(t, old, t, child[0], child[1], bit);
    for (int i = 0; i < 2; i++) point(t, begin[i], depth, child[i]);
    free_shard(t, old);
    return 0;
}

static void free_parts(hb_index *t) {
    for (hb_region *r = t->regions, *next; r; r = next) {
        next = r->next;
        let_go(t, r->memory, r->nbytes);
        let_go(t, r, sizeof *r);
    }
    let_go(t, t->idle, (size_t)t->room_idle * sizeof *t->idle);
    t->nbytes += t->n_cold * (int64_t)part_nbytes(t);
    t->regions = NULL, t->idle = NULL;
    t->n_parts = t->room_idle = t->n_idle = t->n_cold = 0;
}

/* While the index is small it has two shards: lay both out in parts four times as large, with room for more keys. */
static int enlarge_parts(hb_index *t) {
    hb_index to = *t;
    hb_shard *s[2] = {NULL, NULL};
    to.regions = NULL, to.idle = NULL;
    to.n_parts = to.room_idle = to.n_idle = to.n_cold = 0;
    to.shift = t->shift + 2 < SHIFT ? t->shift + 2 : SHIFT;
    for (uint64_t i = 0; i < 2; i++)
        if (!(s[i] = new_shard(&to, parts_for(&to, t->dir[i]->n, 1, 1, i << 63), 1, i << 63))) {
            free_shard(&to, s[0]);
            free_parts(&to);
            t->nbytes = to.nbytes;
            return -1;
        }
    for (uint64_t i = 0; i < 2; i++) {
        move(t, t->dir[i], &to, s[i], s[i], 0);
        let_go(&to, t->dir[i], shard_nbytes(t->dir[i]->k));
        t->dir[i] = s[i];
    }
    t->nbytes = to.nbytes;
    free_parts(t);
    to.nbytes = t->nbytes;
    *t = to;
    return 0;
}

/* Make room for another key in the shard of mix, which is at its limit. */
static int grow(hb_index *t, uint64_t mix) {
    hb_shard *s = shard_of(t, mix);
    if (s->k < MOST_PARTS - 1) return resize(t, mix, s->k + (s->k < 4 ? 1 : 2));
    if (t->shift < SHIFT) return enlarge_parts(t);
    if (s->depth < (uint32_t)t->depth || (int64_t)2 << t->depth <= t->n_parts) return split(t, mix);
    return resize(t, mix, s->k + s->k / 4);
}

/* Give memory back after erasing from the shard of mix, if there is enough to give. Without memory, all stays. */
static void shrink(hb_index *t, uint64_t mix) {
    hb_shard *s = shard_of(t, mix);
    if (s->depth > 1) {
        hb_shard *other = shard_of(t, mix ^ (uint64_t)1 << (64 - s->depth)), *both;
        uint32_t depth = s->depth - 1, k = parts_for(t, (uint64_t)s->n + other->n, 1, depth, mix);
        if (other->depth == s->depth && k <= MOST_PARTS && k < (uint32_t)s->k + other->k) {
            if (!(both = new_shard(t, k, depth, mix))) return;
            move(t, s, t, both, both, 0);
            move(t, other, t, both, both, 0);
            point(t, mix, depth, both);
            free_shard(t, s);
            free_shard(t, other);
            return;
        }
    }
    uint32_t k = parts_for(t, s->n, 1, s->depth, mix);
    if (k < s->k) resize(t, mix, k);
}

static inline int roomy(const hb_index *t, const hb_shard *s) { return 5 * (uint64_t)s->n < 3 * places(t, s->k); }

/* ---- slots of erased keys ---- */

/* Make it possible to free the slot. */
static int page_for(hb_index *t, int64_t slot) {
    int64_t page = slot / HB_PAGE;
    if (page >= t->room_pages) {
        size_t room = (size_t)(page + 1 + t->room_pages), had = (size_t)t->room_pages;
        uint64_t **bits = grab(t, 64, room * sizeof *bits);
        uint32_t *counts = bits ? grab(t, 64, room * sizeof *counts) : NULL;
        if (!counts) {
            let_go(t, bits, room * sizeof *bits);
            return -1;
        }
        memset(bits, 0, room * sizeof *bits);
        memset(counts, 0, room * sizeof *counts);
        if (had) memcpy(bits, t->free_bits, had * sizeof *bits);
        if (had) memcpy(counts, t->free_counts, had * sizeof *counts);
        let_go(t, t->free_bits, had * sizeof *bits);
        let_go(t, t->free_counts, had * sizeof *counts);
        t->free_bits = bits, t->free_counts = counts, t->room_pages = (int64_t)room;
    }
    if (!t->free_bits[page]) {
        if (!(t->free_bits[page] = grab(t, 64, HB_PAGE / 8))) return -1;
        memset(t->free_bits[page], 0, HB_PAGE / 8);
    }
    return 0;
}

static void free_slot(hb_index *t, int64_t slot) {
    int64_t word = slot / 64;
    t->free_bits[slot / HB_PAGE][word % (HB_PAGE / 64)] |= (uint64_t)1 << (slot % 64);
    t->free_counts[slot / HB_PAGE]++;
    t->n_free++;
    if (word < t->first_word) t->first_word = word;
}

/* The least free slot; only when there is one. */
static int64_t take_free(hb_index *t) {
    int64_t w = t->first_word;
    for (;;) {
        int64_t page = w / (HB_PAGE / 64);
        if (t->free_counts[page] == 0)
            w = (page + 1) * (HB_PAGE / 64);
        else if (t->free_bits[page][w % (HB_PAGE / 64)] == 0)
            w++;
        else
            break;
    }
    uint64_t *bits = &t->free_bits[w / (HB_PAGE / 64)][w % (HB_PAGE / 64)];
    int64_t slot = w * 64 + __builtin_ctzll(*bits);
    *bits &= *bits - 1;
    t->free_counts[slot / HB_PAGE]--;
    t->n_free--;
    t->first_word = w;
    return slot;
}

/* ---- batches ---- */

/* Where the search for a key begins: its bucket, fetched into the second-level cache, as the first has too few places
 * for lines on their way. */
static inline hb_bucket *aim(const hb_index *t, uint64_t mix) {
    const hb_shard *s = shard_of(t, mix);
    hb_bucket *b = bucket_at(t, s, home_of(t, s, mix));
    __builtin_prefetch(b, 0, 2);
    return b;
}

static inline int64_t slot_in(const hb_bucket *b, int64_t key) {
    uint32_t found = match(b, (uint64_t)key);
    return (int64_t)b->slots[__builtin_ctz(found | 1u << (HB_WAYS - 1))] | -(int64_t)!found;
}

/* The slots of at most GROUP keys, and where each search ended. Keys that went past their home wait until the next
 * bucket has been fetched for all of them. No branch depends on whether a key is found or where. `more`: the state from
 * which on a search goes to the next bucket, PASSED, or FULL to reach, for an absent key, the one where it will go. */
enum { FULL = HB_WAYS, PASSED = 8 };
static inline void find_group(const hb_index *t, const int64_t *keys, int m, uint32_t more, int64_t *restrict slots,
                              hb_bucket **restrict end) {
    uint64_t h[GROUP];
    int32_t again[GROUP];
    uint32_t pos[GROUP];
    int n = 0, left;
    for (int j = 0; j < m; j++) h[j] = hb_mix64((uint64_t)keys[j]);
    for (int j = 0; j < m && j < AHEAD; j++) end[j] = aim(t, h[j]);
    for (int j = 0; j < m; j++) {
        if (j + AHEAD < m) end[j + AHEAD] = aim(t, h[j + AHEAD]);
        const hb_bucket *b = end[j];
        uint32_t found = match(b, (uint64_t)keys[j]);
        slots[j] = (int64_t)b->slots[__builtin_ctz(found | 1u << (HB_WAYS - 1))] | -(int64_t)!found;
        again[n] = j;
        n += !found & (b->state >= more);
    }
    for (int i = 0; i < n; i++) pos[i] = home_of(t, shard_of(t, h[again[i]]), h[again[i]]);
    for (; n; n = left) {
        for (int i = 0; i < n; i++) {
            const hb_shard *s = shard_of(t, h[again[i]]);
            pos[i] = next_pos(t, s, pos[i]);
            end[again[i]] = bucket_at(t, s, pos[i]);
            __builtin_prefetch(end[again[i]], 0, 2);
            __builtin_prefetch(end[again[i]] + 1, 0, 2); /* few are left to wait for each other */
        }
        left = 0;
        for (int i = 0; i < n; i++) {
            int j = again[i];
            slots[j] = slot_in(end[j], keys[j]);
            again[left] = j, pos[left] = pos[i];
            left += (slots[j] < 0) & (end[j]->state >= more);
        }
    }
}

static void find_all(const hb_index *t, const int64_t *keys, int64_t n, int64_t *restrict slots) {
    hb_bucket *end[GROUP];
    for (int64_t g = 0; g < n; g += GROUP)
        find_group(t, keys + g, n - g < GROUP ? (int)(n - g) : GROUP, PASSED, slots + g, end);
}

/* The bucket that holds key, from bucket *at on, and the place in it; or NULL. */
static inline hb_bucket *look(const hb_index *t, const hb_shard *s, uint64_t key, uint32_t *at, uint32_t *place) {
    for (;;) {
        hb_bucket *b = bucket_at(t, s, *at);
        uint32_t found = match(b, key);
        *place = (uint32_t)__builtin_ctz(found | 1u << (HB_WAYS - 1));
        if (found) return b;
        if (!passed(b)) return NULL;
        *at = next_pos(t, s, *at);
    }
}

/* Erase a key if it is there: its slot, or -1. */
static int64_t erase_one(hb_index *t, uint64_t key) {
    uint64_t mix = hb_mix64(key);
    hb_shard *s = shard_of(t, mix);
    uint32_t home = home_of(t, s, mix), at = home, i;
    hb_bucket *hole = look(t, s, key, &at, &i);
    if (!hole) return -1;
    int64_t slot = hole->slots[i];
    for (uint32_t pos = home; pos != at; pos = next_pos(t, s, pos)) bucket_at(t, s, pos)->state -= 8;
    /* While keys behind went past the bucket of the hole: the first such moves into it, and leaves another hole. */
    for (uint32_t pos = at, back = 0; passed(hole);) {
        pos = next_pos(t, s, pos), back++;
        hb_bucket *b = bucket_at(t, s, pos);
        for (uint32_t j = 0; j < used(b); j++) {
            uint32_t from = home_of(t, s, hb_mix64(b->keys[j]));
            if ((pos >= from ? pos - from : pos + n_buckets(t, s) - from) < back) continue;
            hole->keys[i] = b->keys[j], hole->slots[i] = b->slots[j];
            for (; at != pos; at = next_pos(t, s, at)) bucket_at(t, s, at)->state -= 8;
            hole = b, i = j, back = 0;
            break;
        }
    }
    hole->state--;
    hole->keys[i] = hole->keys[used(hole)], hole->slots[i] = hole->slots[used(hole)];
    hole->keys[used(hole)] = vacant(mix);
    s->n--;
    t->n--;
    return slot;
}

/* Undo an insert before which next_slot was as given. The last slots first: those that were new are given back as if
 * they had never been, the others are free again. So it needs no memory, but to let go of some. */
static void take_back_all(hb_index *t, const int64_t *keys, int64_t n, const uint8_t *is_new, int64_t next_slot) {
    while (n-- > 0)
        if (is_new[n]) {
            uint64_t mix = hb_mix64((uint64_t)keys[n]);
            int64_t slot = erase_one(t, (uint64_t)keys[n]);
            if (slot >= next_slot)
                t->next_slot--;
            else
                free_slot(t, slot);
            if (roomy(t, shard_of(t, mix))) shrink(t, mix);
        }
}

static int insert_all(hb_index *t, const int64_t *keys, int64_t n, int64_t *slots, uint8_t *is_new) {
    enum { LOT = 256 }; /* their buckets stay in the first-level cache until keys are put there */
    int64_t next_slot = t->next_slot, done = 0;
    hb_bucket *end[LOT];
    memset(is_new, 0, (size_t)n);
    for (int64_t g = 0; g < n; g += LOT) {
        int m = n - g < LOT ? (int)(n - g) : LOT, absent[LOT], n_absent = 0;
        uint64_t moved = 0; /* a bit for the keys, by the top of their mix, whose shard has grown meanwhile */
        find_group(t, keys + g, m, FULL, slots + g, end);
        for (int j = 0; j < m; j++) {
            absent[n_absent] = j;
            n_absent += slots[g + j] < 0;
        }
        for (int a = 0; a < n_absent; a++) {
            done = g + absent[a];
            uint64_t key = (uint64_t)keys[done], mix = hb_mix64(key);
            hb_shard *s = shard_of(t, mix);
            hb_bucket *b = end[absent[a]];
            /* It was absent when the group began, and b had room. If b has room still, the key is in b or nowhere. */
            if (RARELY(moved >> (mix >> 58) & 1 || used(b) == HB_WAYS || match(b, key))) {
                uint32_t at = home_of(t, s, mix), i;
                if ((b = look(t, s, key, &at, &i))) {
                    slots[done] = b->slots[i];
                    continue;
                }
            }
            if (t->n_free == 0 && t->next_slot == MAX_SLOTS) goto failed;
            if (RARELY(s->n >= limit_of(t, s->k, prefix_of(mix, s->depth)))) {
                moved |= s->depth < 6 || t->shift < SHIFT ? ~(uint64_t)0 : (uint64_t)1 << (mix >> 58);
                if (grow(t, mix)) goto failed;
                s = shard_of(t, mix);
            }
            slots[done] = t->n_free ? take_free(t) : t->next_slot++;
            place(t, s, mix, key, (uint32_t)slots[done]);
            is_new[done] = 1;
            s->n++;
            t->n++;
        }
    }
    return 0;
failed:
    take_back_all(t, keys, done, is_new, next_slot);
    return -1;
}

static int erase_all(hb_index *t, const int64_t *keys, int64_t n, int64_t *slots) {
    find_all(t, keys, n, slots);
    for (int64_t i = 0; i < n; i++)
        if (slots[i] >= 0 && page_for(t, slots[i])) return -1;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i; i % AHEAD == 0 && j < i + AHEAD && j < n; j++) {
            uint64_t mix = hb_mix64((uint64_t)keys[j]);
            const hb_shard *s = shard_of(t, mix);
            __builtin_prefetch(bucket_at(t, s, home_of(t, s, mix)), 0, 2);
        }
        if (slots[i] < 0) continue;
        slots[i] = erase_one(t, (uint64_t)keys[i]); /* -1 for a key that is there twice in the batch */
        if (slots[i] < 0) continue;
        free_slot(t, slots[i]);
        uint64_t mix = hb_mix64((uint64_t)keys[i]);
        if (roomy(t, shard_of(t, mix))) shrink(t, mix);
    }
    return 0;
}

/* ---- slots that the caller gives (places.pyx): none is handed out or free, so next_slot counts the keys ---- */

static int put_all(hb_index *t, const int64_t *keys, int64_t n, const int64_t *slots, int64_t *before) {
    int64_t done = 0;
    for (; done < n; done++) {
        for (int64_t j = done; done % AHEAD == 0 && j < done + AHEAD && j < n; j++) {
            uint64_t mix = hb_mix64((uint64_t)keys[j]);
            const hb_shard *s = shard_of(t, mix);
            __builtin_prefetch(bucket_at(t, s, home_of(t, s, mix)), 1, 2);
        }
        uint64_t key = (uint64_t)keys[done], mix = hb_mix64(key);
        hb_shard *s = shard_of(t, mix);
        uint32_t at = home_of(t, s, mix), i;
        hb_bucket *b = look(t, s, key, &at, &i);
        before[done] = -1;
        if (b) {
            before[done] = b->slots[i];
            b->slots[i] = (uint32_t)slots[done];
            continue;
        }
        if (s->n >= limit_of(t, s->k, prefix_of(mix, s->depth))) {
            if (grow(t, mix)) goto failed;
            s = shard_of(t, mix);
        }
        place(t, s, mix, key, (uint32_t)slots[done]);
        s->n++, t->n++, t->next_slot++;
    }
    return 0;
failed:
    while (done-- > 0) {
        uint64_t key = (uint64_t)keys[done], mix = hb_mix64(key);
        hb_shard *s = shard_of(t, mix);
        uint32_t at = home_of(t, s, mix), i;
        if (before[done] < 0) {
            erase_one(t, key);
            t->next_slot--;
        } else {
            look(t, s, key, &at, &i)->slots[i] = (uint32_t)before[done];
        }
    }
    return -1;
}

static void drop_all(hb_index *t, const int64_t *keys, int64_t n, int64_t *before) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t mix = hb_mix64((uint64_t)keys[i]);
        before[i] = erase_one(t, (uint64_t)keys[i]);
        if (before[i] < 0) continue;
        t->next_slot--;
        if (roomy(t, shard_of(t, mix))) shrink(t, mix);
    }
}

/* ---- all of it ---- */

/* A mix of the keys of directory entry i. */
static inline uint64_t begin_of(const hb_index *t, uint64_t i) { return i << (64 - t->depth); }

static uint64_t n_entries(const hb_index *t, const hb_shard *s) {
    return (uint64_t)1 << (t->depth - (int32_t)s->depth);
}

static void destroy(hb_index *t) {
    if (!t->dir) return;
    for (uint64_t i = 0; i < (uint64_t)1 << t->depth && t->dir[i];) {
        hb_shard *s = t->dir[i];
        i += n_entries(t, s);
        let_go(t, s, shard_nbytes(s->k));
    }
    if (t->lock) pthread_rwlock_destroy(t->lock);
    let_go(t, t->lock, sizeof(pthread_rwlock_t));
    let_go(t, t->dir, sizeof *t->dir << t->depth);
    free_parts(t);
    for (int64_t i = 0; i < t->room_pages; i++) let_go(t, t->free_bits[i], HB_PAGE / 8);
    let_go(t, t->free_bits, (size_t)t->room_pages * sizeof *t->free_bits);
    let_go(t, t->free_counts, (size_t)t->room_pages * sizeof *t->free_counts);
    t->dir = NULL;
}

/* Room for `capacity` keys at load 0.8 or, where the sizes of shards do not allow that, a little less. */
static int create(hb_index *t, int64_t capacity) {
    if (capacity > MAX_SLOTS) return -1;
    t->depth = 1, t->shift = FIRST_SHIFT;
    while (t->shift < SHIFT && places(t, 2 * MOST_PARTS) * 4 / 5 < (uint64_t)capacity) t->shift += 2;
    uint64_t parts = (uint64_t)capacity * 5 / 4 / places(t, 1) + 1;
    while (parts >> t->depth > 2 * MOST_PARTS) t->depth++;
    uint32_t k = (uint32_t)((parts - 1) >> t->depth) + 1;
    if (!(t->dir = grab(t, 64, sizeof *t->dir << t->depth))) return -1;
    memset(t->dir, 0, sizeof *t->dir << t->depth);
    if (!(t->lock = grab(t, 64, sizeof(pthread_rwlock_t)))) {
        destroy(t);
        return -1;
    }
    pthread_rwlock_init(t->lock, NULL);
    for (uint64_t i = 0; i < (uint64_t)1 << t->depth; i++)
        if (!(t->dir[i] = new_shard(t, k, (uint32_t)t->depth, begin_of(t, i)))) {
            destroy(t);
            return -1;
        }
    return 0;
}

static void all_items(const hb_index *t, int64_t *keys, int64_t *slots) {
    for (uint64_t i = 0; i < (uint64_t)1 << t->depth; i += n_entries(t, t->dir[i]))
        EACH_BUCKET(t, t->dir[i], b) {
            for (uint32_t j = 0; j < used(b); j++) {
                *keys++ = (int64_t)b->keys[j];
                *slots++ = b->slots[j];
            }
        }
}

/* Recounts everything but the slots, which index.pyx looks through. */
static const char *check(const hb_index *t) {
    int64_t n = 0, parts = 0, n_free = 0, memory = 0;
    int64_t nbytes = (int64_t)((sizeof *t->dir << t->depth) + sizeof(pthread_rwlock_t));
    for (uint64_t e = 0; e < (uint64_t)1 << t->depth;) {
        const hb_shard *s = t->dir[e];
        uint64_t begin = begin_of(t, e), in_shard = 0, gone_by = 0, went = 0;
        if (s->depth < 1 || s->depth > (uint32_t)t->depth || e % n_entries(t, s))
            return "a shard is not where it belongs";
        for (uint64_t i = 0; i < n_entries(t, s); i++)
            if (t->dir[e + i] != s) return "a shard lacks an entry of the directory";
        for (uint32_t pos = 0; pos < n_buckets(t, s); pos++) {
            const hb_bucket *b = bucket_at(t, s, pos);
            if (passed(b) && used(b) < HB_WAYS) return "a key went past a bucket that is not full";
            for (uint32_t j = 0; j < HB_WAYS; j++)
                if ((b->keys[j] != vacant(begin)) != (j < used(b))) return "a bucket's free places are not its last";
            gone_by += passed(b);
            for (uint32_t j = 0; j < used(b); j++) {
                uint64_t mix = hb_mix64(b->keys[j]);
                uint32_t place, home = home_of(t, s, mix), at = home;
                if (shard_of(t, mix) != s) return "a key is in another shard than its own";
                if (look(t, s, b->keys[j], &at, &place) != b || place != j)
                    return "a key is not found from its home, or lies there twice";
                went += pos >= home ? pos - home : pos + n_buckets(t, s) - home;
                in_shard++;
            }
        }
        if (gone_by != went) return "keys passed are counted wrong";
        if (in_shard != s->n || s->n > limit_of(t, s->k, prefix_of(begin, s->depth)))
            return "the keys of a shard are counted wrong, or too many";
        n += s->n, parts += s->k, nbytes += (int64_t)shard_nbytes(s->k);
        e += n_entries(t, s);
    }
    if (n != t->n) return "keys are counted wrong";
    if (n + t->n_free != t->next_slot) return "a slot leaked";
    if (parts + t->n_idle != t->n_parts || t->n_cold > t->n_idle) return "a part leaked";
    for (const hb_region *r = t->regions; r; r = r->next) memory += (int64_t)r->nbytes, nbytes += (int64_t)sizeof *r;
    if (memory != t->n_parts * (int64_t)part_nbytes(t)) return "regions and parts differ";
    nbytes += memory - t->n_cold * (int64_t)part_nbytes(t) + t->room_idle * (int64_t)sizeof *t->idle;
    for (int64_t p = 0; p < t->room_pages; p++) {
        int64_t count = 0;
        for (int64_t w = 0; t->free_bits[p] && w < HB_PAGE / 64; w++) {
            count += __builtin_popcountll(t->free_bits[p][w]);
            if (t->free_bits[p][w] && p * (HB_PAGE / 64) + w < t->first_word) return "a free slot would never be found";
        }
        if (count != t->free_counts[p]) return "the free slots of a page are counted wrong";
        n_free += count;
        nbytes += t->free_bits[p] ? HB_PAGE / 8 : 0;
    }
    if (n_free != t->n_free) return "free slots are counted wrong";
    nbytes += t->room_pages * (int64_t)(sizeof *t->free_bits + sizeof *t->free_counts);
    return nbytes == t->nbytes ? NULL : "bytes are counted wrong";
}

/* ---- the same, each call under the lock ---- */

static void find(const hb_index *t, const int64_t *keys, int64_t n, int64_t *slots) {
    pthread_rwlock_rdlock(t->lock);
    find_all(t, keys, n, slots);
    pthread_rwlock_unlock(t->lock);
}

static int insert(hb_index *t, const int64_t *keys, int64_t n, int64_t *slots, uint8_t *is_new) {
    pthread_rwlock_wrlock(t->lock);
    int rc = insert_all(t, keys, n, slots, is_new);
    pthread_rwlock_unlock(t->lock);
    return rc;
}

static int erase(hb_index *t, const int64_t *keys, int64_t n, int64_t *slots) {
    pthread_rwlock_wrlock(t->lock);
    int rc = erase_all(t, keys, n, slots);
    pthread_rwlock_unlock(t->lock);
    return rc;
}

static int put(hb_index *t, const int64_t *keys, int64_t n, const int64_t *slots, int64_t *before) {
    pthread_rwlock_wrlock(t->lock);
    int rc = put_all(t, keys, n, slots, before);
    pthread_rwlock_unlock(t->lock);
    return rc;
}

static void drop(hb_index *t, const int64_t *keys, int64_t n, int64_t *before) {
    pthread_rwlock_wrlock(t->lock);
    drop_all(t, keys, n, before);
    pthread_rwlock_unlock(t->lock);
}

static void take_back(hb_index *t, const int64_t *keys, int64_t n, const uint8_t *is_new, int64_t next_slot) {
    pthread_rwlock_wrlock(t->lock);
    take_back_all(t, keys, n, is_new, next_slot);
    pthread_rwlock_unlock(t->lock);
}

static int64_t items(const hb_index *t, int64_t room, int64_t *keys, int64_t *slots) {
    pthread_rwlock_rdlock(t->lock);
    int64_t n = t->n;
    if (n <= room) all_items(t, keys, slots);
    pthread_rwlock_unlock(t->lock);
    return n;
}

static int64_t part(const hb_index *t, uint64_t first, uint64_t last, const uint64_t *bits, int64_t n_bits,
                    int64_t room, int64_t *keys) {
    int64_t n = 0;
    pthread_rwlock_rdlock(t->lock);
    for (uint64_t e = first >> (64 - t->depth); e <= last >> (64 - t->depth);) {
        const hb_shard *s = t->dir[e];
        EACH_BUCKET(t, s, b) {
            for (uint32_t j = 0; j < used(b); j++) {
                uint32_t slot = b->slots[j];
                if (bits && (slot >= n_bits || !(bits[slot / 64] >> slot % 64 & 1))) continue;
                uint64_t mix = hb_mix64(b->keys[j]);
                if (mix < first || mix > last) continue;
                if (n < room) keys[n] = (int64_t)b->keys[j];
                n++;
            }
        }
        e = (e / n_entries(t, s) + 1) * n_entries(t, s);
    }
    pthread_rwlock_unlock(t->lock);
    return n;
}

static const char *validate(const hb_index *t) {
    pthread_rwlock_rdlock(t->lock);
    const char *wrong = check(t);
    pthread_rwlock_unlock(t->lock);
    return wrong;
}

int64_t PASTE(hb_dedupe_, HBKIT_ISA)(const int64_t *, int64_t, uint32_t *, int, int64_t *, void *, int, int64_t *);

const hb_indexers PASTE(hb_indexers_, HBKIT_ISA) = {
    create, destroy, find, insert, erase, take_back, items, part, validate, PASTE(hb_dedupe_, HBKIT_ISA), put, drop};
