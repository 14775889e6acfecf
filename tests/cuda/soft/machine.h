/* The machine that kernels translated from PTX run on: threads, warps, barriers, checked memory.
 *
 * Each thread has a stack of its own and runs until it waits, ends or is sent to the back of the queue; one runs at a
 * time. With seed 0 they run in order and change places only where they wait. With another seed, some blocks are alive
 * at once, whoever is ready runs next at random, and threads change places at memory accesses too.
 *
 * Every access is checked. With `race_check`, each word that a launch touches remembers who wrote and who read it last,
 * and when. The clock of a block ticks when threads meet; so an access is ordered before another of the same block if
 * they passed a barrier since, and never before one of another block. Lanes of a warp need bar.warp.sync after a write,
 * any meeting after a read (the vote or shuffle has waited for it). Atomics do not race with atomics. Two kinds of races
 * do no harm, and are reported only with `race_check` 2: a word that is read plainly and changed atomically (either
 * value may be read: with a seed, what another block changed is read as it was before now and then, as from a cache),
 * and one that several write the same value to.
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

struct launch {
    uint32_t grid[3], block[3];
    void *const *params; /* as cuLaunchKernel's: a pointer to each value */
    uint64_t seed;       /* order of threads; 0: plain order */
    int race_check;      /* 0: none, 1, or 2: harmless ones too */
    int (*reach)(uint64_t at, uint64_t n, int write); /* is [at, at + n) inside one live allocation? */
    char report[512];                                 /* what went wrong, by name and place */
};

struct kernel {
    const char *name;
    int n_params;
    const uint32_t *param_nbytes;
    int (*run)(struct launch *); /* 0 or one of CUDA's errors */
};

enum { ILLEGAL_ADDRESS = 700, MISALIGNED = 716, LAUNCH_FAILED = 719 };
enum { READ, WRITE, ATOMIC, ATOMIC_READ };
enum { FRESH, READY, IN_WARP, AT_BAR, ENDED };
enum { SYNC, BALLOT, ANY, ALL, UNI, MATCH_B32, MATCH_B64, SHFL_IDX, SHFL_UP, SHFL_DOWN, SHFL_BFLY };
enum { WARP = 32, STACK = 60000, PAGE_BITS = 12, NEAR = 1024, BUCKETS = 1 << 14 };
#define PATIENCE (1u << 28) /* accesses and meetings without a thread's end, after which none is expected */

typedef void *context[5];

struct stack {
    context context; /* where it waits for a thread to begin */
    struct stack *next_free, *made_before;
};

/* Who touched a word: `who` is ATOMICALLY | level | block | thread; a level says who else did. `when` 0: nobody. */
enum { ALONE = 0, LANES = 1u << 30, WARPS = 2u << 30, BLOCKS = 3u << 30 };
#define ATOMICALLY (1u << 29)
#define LEVEL (3u << 30)
#define BLOCK_OF 0x1ffffc00u
#define WARP_OF 0x1fffffe0u
struct word {
    uint32_t wrote, written, read_by, read; /* who and when */
    uint32_t before;                        /* what was there before the last atomic change */
    uint16_t write_line, read_line;
};

struct page {
    uint64_t number; /* address >> PAGE_BITS */
    int whole;       /* bits: all of it may be read, written */
    int shift;       /* its words are of 1 << shift bytes: 4, or 1 where smaller ones were touched */
    struct word *words;
    struct page *next;
};

struct warp {
    struct thread *lanes;
    uint32_t live, waiting;
    uint32_t met, fenced; /* when its lanes last met, and did so by bar.warp.sync */
};

struct block {
    uint32_t index[3], number;
    uint32_t live, arrived, clock, passed; /* `passed`: when its threads last met at bar.sync */
    unsigned char *shared;
    struct page shared_page;
    struct thread *threads;
    struct warp *warps;
};

struct thread {
    struct machine *m;
    struct block *block;
    struct warp *warp;
    context context;
    uint32_t tid[3], lane, who;
    int state, line;
    /* what it brings to a meeting, and takes away */
    int op;
    uint32_t mask, b, c, passes;
    uint64_t value, result;
    uint32_t old[4]; /* what it reads, where that is no longer in memory */
};

struct place {
    int line;
    const char *text;
};

struct code {
    const char *name;
    void (*body)(struct thread *);
    uint32_t shared_nbytes;
    const struct place *places; /* its instructions that touch memory or meet, by line, up to line 0 */
    int (*own)(uint64_t at, uint64_t n); /* inside a variable of the module? */
};

struct machine {
    struct launch *launch;
    const struct code *code;
    uint64_t random;
    uint32_t n_threads, n_alive, patience, interval, n_changes;
    int32_t fuse;
    int result;
    struct block *blocks;
    uint64_t n_blocks, next_block;
    uint32_t *order; /* of blocks */
    struct thread **ready; /* a ring */
    uint32_t room, head, n_ready;
    struct thread *starts;
    struct stack *free_stacks, *stacks;
    context host;
    struct page *near[NEAR], *buckets[BUCKETS];
};

static __thread struct machine *running; /* only where a stack begins */

/* ---- who runs ---- */

__attribute__((noinline, noreturn)) static void leap(void **to) { __builtin_longjmp(to, 1); }

static uint64_t draw(struct machine *m)
{
    uint64_t x = m->random += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static void make_ready(struct thread *t)
{
    struct machine *m = t->m;
    uint32_t end = m->head + m->n_ready++;
    m->ready[end < m->room ? end : end - m->room] = t;
}

static struct thread *pick(struct machine *m)
{
    if (!m->n_ready)
        return NULL;
    if (m->launch->seed) {
        uint32_t i = m->head + (uint32_t)((draw(m) >> 32) * m->n_ready >> 32);
        struct thread **at = &m->ready[i < m->room ? i : i - m->room], *t = *at;
        *at = m->ready[m->head];
        m->ready[m->head] = t;
    }
    struct thread *t = m->ready[m->head];
    m->head = m->head + 1 < m->room ? m->head + 1 : 0;
    m->n_ready--;
    return t;
}

static void ended(struct thread *t);

static void work(void)
{
    struct machine *m = running;
    struct stack *here = m->stacks;
    for (;;) {
        struct thread *t = m->starts;
        t->state = READY;
        m->code->body(t);
        ended(t);
        if (!(t = pick(m)))
            leap(m->host);
        if (t->state == FRESH) {
            m->starts = t;
            continue;
        }
        here->next_free = m->free_stacks;
        m->free_stacks = here;
        if (!__builtin_setjmp(here->context))
            leap(t->context);
    }
}

__attribute__((noinline, noreturn)) static void resume(struct machine *m, struct thread *t)
{
    if (t->state != FRESH)
        leap(t->context);
    m->starts = t;
    struct stack *stack = m->free_stacks;
    if (stack) {
        m->free_stacks = stack->next_free;
        leap(stack->context);
    }
    stack = malloc(sizeof *stack + STACK);
    ucontext_t begin;
    if (!stack || getcontext(&begin))
        abort();
    stack->made_before = m->stacks;
    m->stacks = stack;
    begin.uc_stack.ss_sp = stack + 1;
    begin.uc_stack.ss_size = STACK;
    begin.uc_link = NULL;
    makecontext(&begin, work, 0);
    setcontext(&begin);
    abort();
}

__attribute__((noinline)) static void change(struct thread *from, struct thread *to)
{
    if (!__builtin_setjmp(from->context))
        resume(from->m, to);
}

/* Let others run; this one is ready, or somebody will make it so. */
static void wait_turn(struct thread *t)
{
    struct thread *next = pick(t->m);
    if (!next)
        leap(t->m->host);
    if (next != t)
        change(t, next);
}

static void give_way(struct thread *t)
{
    make_ready(t);
    wait_turn(t);
}

/* ---- what went wrong ---- */

static const char *text_of(const struct code *code, int line)
{
    for (const struct place *p = code->places; p->line; p++)
        if (p->line == line)
            return p->text;
    return "?";
}

__attribute__((format(printf, 3, 4), cold)) static void report(struct thread *t, int line, const char *what, ...)
{
    struct launch *l = t->m->launch;
    va_list args;
    char why[300];
    va_start(args, what);
    vsnprintf(why, sizeof why, what, args);
    va_end(args);
    snprintf(l->report, sizeof l->report, "%.60s, line %d `%.80s`, thread (%u, %u, %u) of block (%u, %u, %u): %s",
             t->m->code->name, line, text_of(t->m->code, line), t->tid[0], t->tid[1], t->tid[2], t->block->index[0],
             t->block->index[1], t->block->index[2], why);
}

__attribute__((noreturn)) static void fail(struct machine *m, int result)
{
    m->result = result;
    leap(m->host);
}

__attribute__((noreturn, cold)) static void in_vain(struct thread *t, int line)
{
    report(t, line, "no end: no thread has ended in %u accesses and meetings", PATIENCE);
    fail(t->m, LAUNCH_FAILED);
}

/* ---- meetings ---- */

static void passed_bar(struct block *block, struct thread *self)
{
    struct machine *m = block->threads->m;
    for (uint32_t i = 0; i < m->n_threads; i++) {
        struct thread *t = &block->threads[i], *other = &block->threads[i & ~(WARP - 1u)];
        while (other->state == ENDED)
            other++;
        if (t->state != ENDED && t->line != other->line) {
            report(t, t->line, "its warp waits at another barrier, line %d", other->line);
            fail(m, LAUNCH_FAILED);
        }
    }
    for (uint32_t i = 0; i < m->n_threads; i++)
        if (block->threads[i].state == AT_BAR) {
            block->threads[i].state = READY;
            if (&block->threads[i] != self)
                make_ready(&block->threads[i]);
        }
    block->arrived = 0;
    block->passed = ++block->clock;
}

static void bar_sync(struct thread *t, int line)
{
    struct block *block = t->block;
    t->line = line;
    t->state = AT_BAR;
    if (++block->arrived == block->live) {
        passed_bar(block, t);
        if (!t->m->launch->seed)
            return;
        make_ready(t);
    }
    wait_turn(t);
}

static void shuffle(struct thread *t, uint32_t met)
{
    uint32_t lane = t->lane, b = t->b & 31, segment = t->c >> 8 & 31;
    uint32_t low = lane & segment, high = low | (t->c & 31 & ~segment), from;
    switch (t->op) {
    case SHFL_UP: from = lane - b, t->passes = (int32_t)from >= (int32_t)high; break;
    case SHFL_DOWN: from = lane + b, t->passes = from <= high; break;
    case SHFL_BFLY: from = lane ^ b, t->passes = from <= high; break;
    default: from = low | (b & ~segment), t->passes = from <= high; break;
    }
    if (!t->passes)
        from = lane;
    /* what a lane that isn't there gives is undefined */
    t->result = met >> from & 1 ? t->warp->lanes[from].value : 0x5A5A5A5A;
}

/* Whether all lanes that `t` waits for are there too; then they get their results and go on.
 * They may be at different places of the program, but do the same with the same mask.
 */
static int meet(struct thread *t, struct thread *self)
{
    struct warp *warp = t->warp;
    struct thread *lanes = warp->lanes;
    uint32_t met = t->mask & warp->live, ballot = 0;
    if ((warp->waiting & met) != met)
        return 0;
    for (uint32_t left = met; left; left &= left - 1) {
        struct thread *o = &lanes[__builtin_ctz(left)];
        if (o->op != t->op || o->mask != t->mask)
            return 0;
        ballot |= (uint32_t)(o->value != 0) << o->lane;
    }
    for (uint32_t left = met; left; left &= left - 1) {
        struct thread *o = &lanes[__builtin_ctz(left)];
        switch (o->op) {
        case SYNC: break;
        case BALLOT: o->result = ballot; break;
        case ANY: o->result = ballot != 0; break;
        case ALL: o->result = ballot == met; break;
        case UNI: o->result = ballot == 0 || ballot == met; break;
        case MATCH_B32:
        case MATCH_B64:
            o->result = 0;
            for (uint32_t other = met; other; other &= other - 1)
                o->result |= (uint64_t)(lanes[__builtin_ctz(other)].value == o->value) << __builtin_ctz(other);
            break;
        default: shuffle(o, met);
        }
        o->state = READY;
        if (o != self)
            make_ready(o);
    }
    warp->waiting &= ~met;
    warp->met = ++t->block->clock;
    if (t->op == SYNC)
        warp->fenced = warp->met;
    return 1;
}

static uint64_t together(struct thread *t, int op, uint32_t mask, uint64_t value, uint32_t b, uint32_t c, int line)
{
    if (!(mask >> t->lane & 1)) {
        report(t, line, "its own lane %u is not in its mask %#x", t->lane, mask);
        fail(t->m, LAUNCH_FAILED);
    }
    if (!--t->m->patience)
        in_vain(t, line);
    t->op = op, t->mask = mask, t->value = value, t->b = b, t->c = c, t->line = line;
    t->state = IN_WARP;
    t->warp->waiting |= 1u << t->lane;
    if (meet(t, t)) {
        if (!t->m->launch->seed)
            return t->result;
        make_ready(t);
    }
    wait_turn(t);
    return t->result;
}

/* ---- blocks ---- */

static int next_block(struct machine *m, struct block *block)
{
    if (m->next_block == m->n_blocks)
        return 0;
    const uint32_t *grid = m->launch->grid, *dim = m->launch->block;
    uint64_t i = m->next_block++;
    if (m->order) { /* shuffled as far as it is used */
        uint64_t j = i + draw(m) % (m->n_blocks - i);
        uint32_t chosen = m->order[j];
        m->order[j] = m->order[i];
        i = chosen;
    }
    block->number = (uint32_t)i;
    block->index[0] = (uint32_t)(i % grid[0]);
    block->index[1] = (uint32_t)(i / grid[0] % grid[1]);
    block->index[2] = (uint32_t)(i / grid[0] / grid[1]);
    block->live = m->n_threads;
    block->arrived = block->passed = 0;
    block->clock = 1;
    uint32_t nbytes = m->code->shared_nbytes;
    memset(block->shared, 0x5A, nbytes);
    if (block->shared_page.words)
        memset(block->shared_page.words, 0, ((size_t)nbytes + 4) * sizeof(struct word));
    for (uint32_t k = 0; k < m->n_threads; k++) {
        struct thread *t = &block->threads[k];
        struct warp *warp = &block->warps[k / WARP];
        t->m = m, t->block = block, t->warp = warp;
        t->tid[0] = k % dim[0], t->tid[1] = k / dim[0] % dim[1], t->tid[2] = k / dim[0] / dim[1];
        t->lane = k % WARP;
        t->who = (block->number << 10 & BLOCK_OF) | k;
        t->state = FRESH;
        if (!t->lane)
            *warp = (struct warp){.lanes = t};
        warp->live |= 1u << t->lane;
        make_ready(t);
    }
    m->n_alive++;
    return 1;
}

static void ended(struct thread *t)
{
    struct block *block = t->block;
    struct warp *warp = t->warp;
    t->state = ENDED;
    t->m->patience = PATIENCE;
    warp->live &= ~(1u << t->lane);
    block->live--;
    for (uint32_t left = warp->waiting; left; left &= left - 1)
        if (warp->waiting >> __builtin_ctz(left) & 1) /* nobody has met it yet */
            meet(&warp->lanes[__builtin_ctz(left)], NULL);
    if (block->live && block->arrived == block->live)
        passed_bar(block, NULL);
    if (!block->live) {
        t->m->n_alive--;
        next_block(t->m, block);
    }
}

static void dead_lock(struct machine *m, uint32_t n_slots)
{
    struct thread *first = NULL, *second = NULL;
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_slots; i++)
        for (uint32_t k = 0; k < m->n_threads; k++) {
            struct thread *t = &m->blocks[i].threads[k];
            if (t->m && (t->state == IN_WARP || t->state == AT_BAR)) {
                n++;
                if (!first)
                    first = t;
                else if (!second && (t->line != first->line || t->mask != first->mask))
                    second = t;
            }
        }
    if (second)
        report(first, first->line, "deadlock: %u threads wait; thread (%u, %u, %u) does so at line %d `%.80s`", n,
               second->tid[0], second->tid[1], second->tid[2], second->line, text_of(m->code, second->line));
    else
        report(first, first->line, "deadlock: %u threads wait for others, which do not come", n);
    m->result = LAUNCH_FAILED;
}

/* ---- memory ---- */

static int unordered(const struct thread *t, uint32_t who, uint32_t when, uint32_t met)
{
    uint32_t level = who & LEVEL, apart = who ^ t->who;
    if (level == BLOCKS || apart & BLOCK_OF)
        return 1;
    if (when < t->block->passed)
        return 0;
    if (level == WARPS || apart & WARP_OF)
        return 1;
    return (level == LANES || apart & 31) && when >= met;
}

/* `t` and those who did the same before. */
static uint32_t joined(const struct thread *t, uint32_t who, uint32_t when, uint32_t met)
{
    if (!when || !unordered(t, who, when, met))
        return t->who;
    uint32_t apart = who ^ t->who, old = who & LEVEL;
    uint32_t level = apart & BLOCK_OF ? BLOCKS : apart & WARP_OF ? WARPS : LANES;
    return t->who | (level > old ? level : old);
}

__attribute__((noreturn, cold)) static void race(struct thread *t, const struct word *x, int with_read, int how,
                                                 uint64_t at, int line)
{
    static const char *const did[] = {"reads", "writes", "changes"};
    uint32_t who = with_read ? x->read_by : x->wrote, before = with_read ? x->read_line : x->write_line;
    uint32_t level = who & LEVEL, k = who & 1023;
    const char *whom = level == BLOCKS ? "one of several blocks" : level == WARPS ? "one of several warps of block"
                     : level == LANES  ? "one of several lanes of block"
                                       : "thread";
    report(t, line, "race: %s %#llx, which %s (%u of block %u) %s before, line %u `%.60s`, and no barrier lies between",
           did[how], (unsigned long long)at, whom, k, (who & BLOCK_OF) >> 10,
           with_read ? "read" : who & ATOMICALLY ? "changed" : "wrote", before, text_of(t->m->code, (int)before));
    fail(t->m, LAUNCH_FAILED);
}

/* `same`: the word holds already what is to be written. */
static void trace(struct thread *t, struct word *x, int how, int same, uint64_t at, int line)
{
    struct warp *warp = t->warp;
    uint32_t now = t->block->clock;
    if (how == ATOMIC_READ)
        how = ATOMIC;
    int strict = t->m->launch->race_check > 1, atomic = how == ATOMIC && x->wrote & ATOMICALLY;
    int harmless = how == READ && !strict && x->wrote & ATOMICALLY;
    if (x->written && !atomic && !harmless && unordered(t, x->wrote, x->written, warp->fenced)) {
        if (same && !strict)
            return;
        race(t, x, 0, how, at, line);
    }
    if (how == READ) {
        if ((x->read_by & LEVEL) == BLOCKS && x->read)
            return; /* nothing orders that */
        x->read_by = joined(t, x->read_by, x->read, warp->met);
        x->read = now;
        x->read_line = (uint16_t)line;
        return;
    }
    if (how == WRITE || strict) {
        if (x->read && unordered(t, x->read_by, x->read, warp->met)) {
            if (same && !strict)
                return;
            race(t, x, 1, how, at, line);
        }
        x->read = 0;
    }
    /* what this thread wrote plainly before is still not ordered with what others change */
    if (how == ATOMIC && x->written && x->wrote == t->who && x->written >= t->block->passed)
        return;
    x->wrote = atomic ? joined(t, x->wrote, x->written, warp->fenced) : t->who;
    if (how == ATOMIC)
        x->wrote |= ATOMICALLY;
    x->written = now;
    x->write_line = (uint16_t)line;
}

__attribute__((noinline)) static void to_bytes(struct page *p, uint32_t nbytes)
{
    struct word *bytes = malloc(nbytes * sizeof *bytes);
    if (!bytes)
        abort();
    for (uint32_t i = 0; i < nbytes; i++)
        bytes[i] = p->words[i >> 2];
    free(p->words);
    p->words = bytes;
    p->shift = 0;
}

static inline void trace_all(struct thread *t, struct page *p, uint32_t offset, uint32_t n, int how, const char *there,
                             const char *value, int line)
{
    uint32_t size = 1u << p->shift;
    for (uint32_t i = 0; i < n; i += size) {
        struct word *x = &p->words[(offset + i) >> p->shift];
        trace(t, x, how, value && !memcmp(there + i, value + i, size), (uint64_t)there + i, line);
        if (how == ATOMIC && size == 4)
            memcpy(&x->before, there + i, 4);
    }
}

/* What a plain read of words gives: now and then, what was there before other blocks changed it. */
static void *as_read(struct thread *t, const struct word *x, uint32_t n, void *there)
{
    uint32_t changed = 0;
    for (uint32_t i = 0; i < n / 4; i++)
        changed |= (x[i].written && x[i].wrote & ATOMICALLY && (x[i].wrote ^ t->who) & BLOCK_OF) << i;
    if (!changed || draw(t->m) & 3)
        return there;
    memcpy(t->old, there, n);
    for (uint32_t i = 0; i < n / 4; i++)
        if (changed >> i & 1)
            t->old[i] = x[i].before;
    return t->old;
}

__attribute__((noinline)) static struct page *page_of(struct machine *m, uint64_t number)
{
    struct page **bucket = &m->buckets[number * 0x9E3779B97F4A7C15u >> 50], *p = *bucket;
    while (p && p->number != number)
        p = p->next;
    if (!p) {
        p = malloc(sizeof *p);
        if (!p)
            abort();
        *p = (struct page){.number = number, .shift = 2, .next = *bucket};
        uint64_t at = number << PAGE_BITS;
        for (int write = 0; write < 2; write++)
            p->whole |= (m->launch->reach(at, 1u << PAGE_BITS, write) != 0) << write;
        if (m->launch->race_check && !(p->words = calloc((1u << PAGE_BITS) >> 2, sizeof *p->words)))
            abort();
        *bucket = p;
    }
    return m->near[number % NEAR] = p;
}

__attribute__((noinline)) static void burnt(struct thread *t, int line)
{
    struct machine *m = t->m;
    uint32_t mean = m->interval;
    if (m->patience <= mean)
        in_vain(t, line);
    m->patience -= mean;
    if (!(++m->n_changes & 0x3fff) && mean < 4096) /* a long launch has seen enough of them */
        m->interval *= 2;
    m->fuse = (int32_t)(m->launch->seed ? 1 + draw(m) % (2 * mean) : mean);
    give_way(t);
}

static void check_aligned(struct thread *t, uint64_t at, uint32_t n, int line)
{
    if (__builtin_expect(!(at & (n - 1)), 1))
        return;
    report(t, line, "%#llx is not a multiple of %u", (unsigned long long)at, n);
    fail(t->m, MISALIGNED);
}

/* n bytes at an address of global memory, to be read, changed, or written (to `value`) by the instruction of a line. */
__attribute__((noinline)) static void *global(struct thread *t, uint64_t at, uint32_t n, int how, const void *value,
                                              int line)
{
    struct machine *m = t->m;
    if (__builtin_expect(--m->fuse <= 0, 0))
        burnt(t, line);
    check_aligned(t, at, n, line);
    uint64_t number = at >> PAGE_BITS;
    struct page *p = m->near[number % NEAR];
    if (__builtin_expect(!p || p->number != number, 0))
        p = page_of(m, number);
    int write = how == WRITE || how == ATOMIC;
    if (!(p->whole >> write & 1) && !m->launch->reach(at, n, write) && !m->code->own(at, n)) {
        report(t, line, "%s %u bytes at %#llx, where no live allocation is", write ? "writes" : "reads", n,
               (unsigned long long)at);
        fail(m, ILLEGAL_ADDRESS);
    }
    if (p->words) {
        if (n < 4 && p->shift)
            to_bytes(p, 1u << PAGE_BITS);
        uint32_t offset = at & ((1u << PAGE_BITS) - 1);
        trace_all(t, p, offset, n, how, (const char *)at, value, line);
        if (how == READ && p->shift && m->launch->seed)
            return as_read(t, &p->words[offset >> 2], n, (void *)at);
    }
    return value ? memcpy((void *)at, value, n) : (void *)at;
}

/* The same of the block's shared memory, which lies from 0 on. */
__attribute__((noinline)) static void *shared(struct thread *t, uint64_t at, uint32_t n, int how, const void *value,
                                              int line)
{
    struct machine *m = t->m;
    if (__builtin_expect(--m->fuse <= 0, 0))
        burnt(t, line);
    check_aligned(t, at, n, line);
    uint32_t nbytes = m->code->shared_nbytes;
    if (at > nbytes || n > nbytes - at) {
        report(t, line, "%u bytes at %#llx of %u in shared memory", n, (unsigned long long)at, nbytes);
        fail(m, ILLEGAL_ADDRESS);
    }
    struct page *p = &t->block->shared_page;
    void *there = t->block->shared + at;
    if (p->words) {
        if (n < 4 && p->shift)
            to_bytes(p, nbytes);
        trace_all(t, p, (uint32_t)at, n, how, there, value, line);
    }
    return value ? memcpy(there, value, n) : there;
}

/* ---- a launch ---- */

__attribute__((noinline)) static void go(struct machine *m)
{
    struct thread *first = pick(m);
    if (first && !__builtin_setjmp(m->host))
        resume(m, first);
}

static int run(struct launch *l, const struct code *code)
{
    struct machine *m = calloc(1, sizeof *m);
    uint64_t n_threads = (uint64_t)l->block[0] * l->block[1] * l->block[2];
    l->report[0] = 0;
    if (!m || !n_threads || n_threads > 1024)
        abort(); /* the driver has checked it */
    m->launch = l, m->code = code;
    m->random = l->seed;
    m->n_threads = (uint32_t)n_threads;
    m->n_blocks = (uint64_t)l->grid[0] * l->grid[1] * l->grid[2];
    m->patience = PATIENCE;
    m->interval = 1u << 20;
    uint32_t n_slots = 1;
    if (l->seed) {
        n_slots = 1 + draw(m) % 4;
        if (n_slots > m->n_blocks)
            n_slots = (uint32_t)m->n_blocks;
        m->interval = 2u << 3 * (draw(m) % 4); /* accesses between two changes: 2, 16, 128, 1024 */
        m->order = malloc(m->n_blocks * sizeof *m->order);
        if (!m->order)
            abort();
        for (uint64_t i = 0; i < m->n_blocks; i++)
            m->order[i] = (uint32_t)i;
    }
    m->fuse = (int32_t)m->interval;
    m->room = n_slots * m->n_threads;
    m->ready = malloc(m->room * sizeof *m->ready);
    m->blocks = calloc(n_slots, sizeof *m->blocks);
    if (!m->ready || !m->blocks)
        abort();
    for (uint32_t i = 0; i < n_slots; i++) {
        struct block *b = &m->blocks[i];
        b->threads = calloc(m->n_threads, sizeof *b->threads);
        b->warps = calloc((m->n_threads + WARP - 1) / WARP, sizeof *b->warps);
        b->shared = malloc((size_t)code->shared_nbytes + 16);
        b->shared_page.shift = 2;
        if (l->race_check && code->shared_nbytes)
            b->shared_page.words = calloc((size_t)code->shared_nbytes + 4, sizeof(struct word));
        if (!b->threads || !b->warps || !b->shared)
            abort();
        next_block(m, b);
    }
    running = m;
    go(m);
    if (!m->result && m->n_alive)
        dead_lock(m, n_slots);
    int result = m->result;
    for (uint32_t i = 0; i < n_slots; i++) {
        struct block *b = &m->blocks[i];
        free(b->threads), free(b->warps), free(b->shared), free(b->shared_page.words);
    }
    for (struct stack *s = m->stacks, *before; s; s = before) {
        before = s->made_before;
        free(s);
    }
    for (uint32_t i = 0; i < BUCKETS; i++)
        for (struct page *p = m->buckets[i], *next; p; p = next) {
            next = p->next;
            free(p->words), free(p);
        }
    free(m->blocks), free(m->ready), free(m->order), free(m);
    return result;
}

/* ---- arithmetic ---- */

#define BITS(name, to, from)                \
    static inline to name(from x)           \
    {                                       \
        to y;                               \
        memcpy(&y, &x, sizeof y);           \
        return y;                           \
    }
BITS(f32_of, float, uint32_t)
BITS(u32_of, uint32_t, float)
BITS(f64_of, double, uint64_t)
BITS(u64_of, uint64_t, double)

/* Arithmetic makes no other NaN than these. */
static inline float num32(float x) { return x != x ? f32_of(0x7fffffffu) : x; }
static inline double num64(double x) { return x != x ? f64_of(0x7fffffffffffffffu) : x; }

#define MIN_MAX(name, T, num, less)                                                             \
    static inline T name(T a, T b)                                                              \
    {                                                                                           \
        if (a != a)                                                                             \
            return num(b);                                                                      \
        if (b != b)                                                                             \
            return a;                                                                           \
        if (a == b) /* -0 is below 0    */                                                       \
            return !!__builtin_signbit(a) less !!__builtin_signbit(b) ? a : b;                  \
        return a less b ? b : a;                                                                \
    }
MIN_MAX(max_f32, float, num32, <)
MIN_MAX(min_f32, float, num32, >)
MIN_MAX(max_f64, double, num64, <)
MIN_MAX(min_f64, double, num64, >)

/* A rounded float as an integer of so many bits: the nearest there is; NaN is 0, and 1 << 63 as 64 bits. */
static inline int64_t to_signed(double x, int bits, int from64)
{
    double end = bits == 64 ? 0x1p63 : (double)((int64_t)1 << (bits - 1));
    if (x != x)
        return bits == 64 ? INT64_MIN : from64 ? -((int64_t)1 << (bits - 1)) : 0;
    if (x >= end)
        return bits == 64 ? INT64_MAX : ((int64_t)1 << (bits - 1)) - 1;
    return x < -end ? (bits == 64 ? INT64_MIN : -((int64_t)1 << (bits - 1))) : (int64_t)x;
}

static inline uint64_t to_unsigned(double x, int bits, int from64)
{
    double end = bits == 64 ? 0x1p64 : (double)((uint64_t)1 << bits);
    if (x != x)
        return bits == 64 || from64 ? (uint64_t)1 << (bits - 1) : 0;
    if (x >= end)
        return bits == 64 ? UINT64_MAX : ((uint64_t)1 << bits) - 1;
    return x <= 0 ? 0 : (uint64_t)x;
}

/* Dividing by zero gives all ones, as it does on a GPU; PTX leaves it open. */
#define DIVIDE(T, U, name)                                                                          \
    static inline T div_##name(T a, T b) { return b == 0 ? (T)-1 : b == (T)-1 && (T)-1 < 0 ? (T)(0 - (U)a) : a / b; } \
    static inline T rem_##name(T a, T b) { return b == 0 ? a : b == (T)-1 && (T)-1 < 0 ? 0 : a % b; }
DIVIDE(int32_t, uint32_t, s32)
DIVIDE(uint32_t, uint32_t, u32)
DIVIDE(int64_t, uint64_t, s64)
DIVIDE(uint64_t, uint64_t, u64)

/* A field of `n` bits of a, from bit `at` on, put into b. */
static inline uint64_t insert(uint64_t a, uint64_t b, uint32_t at, uint32_t n, uint32_t bits)
{
    at &= 255, n &= 255;
    if (n > bits)
        n = bits;
    if (at >= bits || !n)
        return b;
    uint64_t field = (n == 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1) << at;
    return (b & ~field) | (a << at & field);
}

/* Four of the bytes of a and b, or their signs alone, as each of the last four digits of `how` says. */
static inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t how)
{
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t all = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t digit = how >> 4 * i & 15, byte = both >> 8 * (digit & 7) & 255;
        all |= (digit & 8 ? byte & 128 ? 255 : 0 : byte) << 8 * i;
    }
    return all;
}

static inline uint32_t brev32(uint32_t x)
{
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}

static inline uint64_t brev64(uint64_t x) { return (uint64_t)brev32((uint32_t)x) << 32 | brev32((uint32_t)(x >> 32)); }
static inline uint32_t clz32(uint32_t x) { return x ? (uint32_t)__builtin_clz(x) : 32; }
static inline uint32_t clz64(uint64_t x) { return x ? (uint32_t)__builtin_clzll(x) : 64; }
/* Where the highest bit is set (of a negative number: not set), counted from below or from above. */
static inline uint32_t found(uint64_t x, uint32_t bits, int from_above)
{
    if (!x)
        return 0xffffffffu;
    uint32_t at = 63 - clz64(x);
    return from_above ? bits - 1 - at : at;
}
