/* A CUDA driver in software: what Numba CUDA, cuda.bindings and cuda.core ask of libcuda.so.1, for tests without a GPU.

   Device memory is host memory out of one reserved range of addresses, in which nothing is ever given out twice: fresh
   memory is full of 0x5A, and freed memory is out of reach of kernels, copies and (by a fault) of the host.

   Asynchronous work is late on purpose. A stream is a queue of operations, and they run when somebody waits: then
   operations that may run are taken in a seeded random order from all streams, until what is waited for is done. What
   may run is what CUDA orders: the first of each stream, not before what its stream was told to wait for, and not past
   the legacy default stream where the stream is a blocking one. So whoever forgets to order two streams, or reuses a
   pinned buffer too early, gets wrong bytes. Now and then an operation runs as soon as it is queued, too. With seed 0
   every operation runs at once.

   One lock for all. Kernels are objects that `translate` names (see __init__.py); without it, launches do nothing. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
    ILLEGAL_ADDRESS = 700, MISALIGNED = 716, LAUNCH_FAILED = 719, UNKNOWN = 999,
};
static const struct { int code; const char *name, *text; } ERRORS[] = {
    {OK, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {MISALIGNED, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

/* The seam to translated kernels; machine.h has the same. */
struct launch {
    uint32_t grid[3], block[3];
    void *const *params;
    uint64_t seed;
    int race_check;
    int (*reach)(uint64_t at, uint64_t n, int write);
    char report[512];
};
struct kernel { const char *name; int n_params; const uint32_t *param_nbytes; int (*run)(struct launch *); };

#define EXPORT __attribute__((visibility("default")))
#define MOST_DEVICES 8
#define MOST_NESTED 64
#define PAGE 4096ull
#define RANGE (1ull << 40)
#define FRESH 0x5A

struct stream;
struct device {
    int number, lost; /* an error code after which all calls fail */
    uint64_t used;    /* bytes of its memory that are allocated */
    int retained;
    struct stream *legacy, *per_thread;
};

enum kind { COPY, FILL, LAUNCH, RECORD, WAIT, FREE };
struct op {
    struct op *next;
    uint64_t seq; /* calls of the process, in order */
    enum kind kind;
    uint64_t to, from, n; /* COPY, FILL (n values), FREE (to) */
    void *staged;         /* COPY: bytes of pageable memory, taken when it was queued */
    uint32_t value;       /* FILL */
    int width;
    const struct function *function; /* LAUNCH */
    struct launch launch;
    struct event *event;   /* RECORD */
    struct stream *waits;  /* WAIT: for the operation of this number there */
    uint64_t waits_seq;
};

struct stream {
    struct stream *next; /* in the list of those that live or have something queued */
    struct device *device;
    unsigned flags;
    int priority, live;
    struct op *head, *tail;
    uint64_t last, done; /* numbers of the last operation queued, and of the last that ran */
};

struct event {
    uint32_t magic;
    int live;
    unsigned flags;
    struct device *device;
    struct stream *stream; /* of the last record; NULL: never recorded */
    uint64_t seq;
    double at; /* seconds, when that record ran */
};
enum { NO_TIMING = 2, EVENT = 0xE7E27, LIBRARY = 0x11B, FUNCTION = 0xF27C };

struct library {
    uint32_t magic;
    int live;
    char *ptx;
    void *object;
    const struct kernel *kernels;
    int n_kernels;
    struct function *functions;
};
struct function {
    uint32_t magic;
    struct function *next;
    struct library *library;
    char *name;
    const struct kernel *kernel; /* NULL: its launches do nothing */
};

struct block {
    uint64_t at, n, page, n_pages;
    struct device *device; /* NULL: pinned host memory */
    int live, registered;
};

static struct {
    int n_devices, race_check, started, log;
    uint64_t memory, seed, random;
    int (*translate)(const char *ptx, char *path, int n);
} config = {.n_devices = 1, .memory = 16ull << 30, .seed = 1, .random = 1, .race_check = 1};

static pthread_mutex_t lock;
static struct device devices[MOST_DEVICES];
static struct stream *streams;
static uint64_t calls; /* numbers of operations */
static char last_report[700];
static __thread struct device *stack[MOST_NESTED];
static __thread int depth;

static uint64_t range_at, range_used; /* the reserved addresses, and how many bytes of them were given out */
static uint32_t *page_block;          /* of each page of the range: the number of its block + 1 */
static struct block *blocks;
static uint32_t n_blocks, room_for_blocks;
static struct device *running; /* whose kernel runs */

__attribute__((constructor)) static void begin(void) {
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &recursive);
    config.log = getenv("SOFT_CUDA_LOG") != NULL;
}

static uint64_t next_random(void) { /* splitmix64 */
    uint64_t z = (config.random += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

/* ---- faults on purpose: the k-th call of a function from now on fails ---- */

static struct fault { char name[64]; long left; int code; } faults[16];

static int sticky(int code) {
    return code == ILLEGAL_ADDRESS || code == MISALIGNED || code == LAUNCH_FAILED || code == UNKNOWN;
}

static int fault(const char *name) {
    for (int i = 0; i < 16; i++)
        if (faults[i].left > 0 && !strcmp(faults[i].name, name) && --faults[i].left == 0) return faults[i].code;
    return OK;
}

/* ---- calls ---- */

enum { ANY, OWN, HERE }; /* what a call needs: nothing, the device that its handle is of, the current device */

static struct device *current(void) { return depth ? stack[depth - 1] : NULL; }

static int enter(const char *name, int in_context) {
    pthread_mutex_lock(&lock);
    if (config.log) fprintf(stderr, "soft CUDA: %s\n", name);
    int code = fault(name);
    struct device *d = current();
    if (sticky(code) && d) d->lost = code;
    if (code) return code;
    if (!in_context) return OK;
    if (!config.started) return NOT_INITIALIZED;
    if (in_context == OWN) return OK;
    if (!d) return INVALID_CONTEXT;
    return d->lost;
}
static int leave(int code) {
    pthread_mutex_unlock(&lock);
    return code;
}
/* A call of the driver: its body gives the code. */
#define CALL(name, in_context, args, ...)                      \
    static int name##_body args;                               \
    EXPORT int name args {                                     \
        int code_ = enter(#name, in_context);                  \
        return leave(code_ ? code_ : name##_body __VA_ARGS__); \
    }                                                          \
    static int name##_body args

/* ---- memory ---- */

static struct block *find(uint64_t at) { /* the block whose pages `at` is in, live or not */
    if (at - range_at < RANGE && range_at) {
        uint32_t i = page_block[(at - range_at) / PAGE];
        return i ? &blocks[i - 1] : NULL;
    }
    for (uint32_t i = 0; i < n_blocks; i++)
        if (blocks[i].registered && blocks[i].live && at - blocks[i].at < blocks[i].n) return &blocks[i];
    return NULL;
}
static int inside(const struct block *b, uint64_t at, uint64_t n) {
    return b && b->live && at >= b->at && n <= b->n && at - b->at <= b->n - n;
}
/* For kernels: [at, at + n) is in one live allocation of the device that runs, or in pinned memory. */
static int reach(uint64_t at, uint64_t n, int write) {
    (void)write;
    const struct block *b = find(at);
    return inside(b, at, n) && (!b->device || b->device == running);
}

static struct block *new_block(void) {
    if (n_blocks == room_for_blocks) {
        room_for_blocks = room_for_blocks ? 2 * room_for_blocks : 1024;
        blocks = realloc(blocks, room_for_blocks * sizeof *blocks);
    }
    return memset(&blocks[n_blocks++], 0, sizeof *blocks);
}

static int allocate(struct device *device, uint64_t n, uint64_t *at) {
    if (!n) return INVALID_VALUE;
    if (device && (n > config.memory || device->used + n > config.memory)) return OUT_OF_MEMORY;
    if (!range_at) {
        void *range = mmap(NULL, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        void *table = mmap(NULL, RANGE / PAGE * sizeof *page_block, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED || table == MAP_FAILED) return OUT_OF_MEMORY;
        range_at = (uint64_t)range, page_block = table;
    }
    /* CUDA promises addresses that are multiples of 256 bytes, and no more. A page on each side stays out of reach. */
    uint64_t shift = config.seed ? next_random() % 8 * 256 : 0, n_pages = (shift + n + PAGE - 1) / PAGE;
    uint64_t page = range_used / PAGE + 1;
    if ((page + n_pages + 1) * PAGE > RANGE) return OUT_OF_MEMORY;
    void *pages = (void *)(range_at + page * PAGE);
    if (mprotect(pages, n_pages * PAGE, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    range_used = (page + n_pages) * PAGE;
    struct block *b = new_block();
    *b = (struct block){.at = (uint64_t)pages + shift, .n = n, .page = page,
                        .n_pages = n_pages, .device = device, .live = 1};
    for (uint64_t i = 0; i < n_pages; i++) page_block[page + i] = n_blocks;
    memset((void *)b->at, FRESH, n);
    if (device) device->used += n;
    *at = b->at;
    return OK;
}

static int release(uint64_t at, int pinned) {
    struct block *b = find(at);
    if (!b || !b->live || b->at != at || b->registered || (b->device == NULL) != pinned) return INVALID_VALUE;
    b->live = 0;
    if (b->device) b->device->used -= b->n;
    mmap((void *)(range_at + b->page * PAGE), b->n_pages * PAGE, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return OK;
}

/* ---- queues ---- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static struct stream *new_stream(struct device *device, unsigned flags, int priority) {
    struct stream *s = calloc(1, sizeof *s);
    *s = (struct stream){.next = streams, .device = device, .flags = flags, .priority = priority, .live = 1};
    return streams = s;
}

/* NULL: not a stream, or destroyed. The default streams are those of the current device. */
static struct stream *any_stream(void *handle) {
    struct device *d = current();
    if ((uint64_t)handle <= 2) return !d ? NULL : (uint64_t)handle == 2 ? d->per_thread : d->legacy;
    for (struct stream *s = streams; s; s = s->next)
        if (s == handle) return s->live ? s : NULL;
    return NULL;
}
static struct stream *stream_of(void *handle) { /* of the current device */
    struct stream *s = any_stream(handle);
    return s && s->device == current() ? s : NULL;
}

static int may_run(const struct stream *s) {
    const struct op *op = s->head;
    if (!op) return 0;
    if (op->kind == WAIT && op->waits->done < op->waits_seq) return 0;
    const struct stream *legacy = s->device->legacy;
    if (s != legacy) return (s->flags & 1) || !legacy->head || legacy->head->seq > op->seq;
    for (const struct stream *other = streams; other; other = other->next)
        if (other != s && other->device == s->device && !(other->flags & 1) && other->head &&
            other->head->seq < op->seq)
            return 0;
    return 1;
}

static void lose(struct device *device, int code, const char *what, const char *report) {
    device->lost = code;
    snprintf(last_report, sizeof last_report, "%s: error %d: %s", what, code, report);
    fprintf(stderr, "soft CUDA: %s\n", last_report);
}

/* Out of the list with a stream that is destroyed and empty; events may still point to it, so it is never freed. */
static void forget(struct stream *s) {
    if (s->live || s->head) return;
    struct stream **at = &streams;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
}

static void run(struct stream *s) {
    struct op *op = s->head;
    struct device *d = s->device;
    if (!d->lost) {
        int code = OK;
        switch (op->kind) {
        case COPY:
            if ((code = fault("copy"))) lose(d, code, "a copy", "on purpose");
            else memmove((void *)op->to, op->staged ? op->staged : (void *)op->from, op->n);
            break;
        case FILL:
            for (uint64_t i = 0; i < op->n; i++) memcpy((char *)op->to + i * op->width, &op->value, op->width);
            break;
        case LAUNCH:
            if ((code = fault("run"))) lose(d, code, "a kernel", "on purpose");
            else if (op->function->kernel) {
                running = d;
                code = op->function->kernel->run(&op->launch);
                running = NULL;
                if (code) lose(d, code, "a kernel", op->launch.report);
            }
            break;
        case RECORD:
            if (op->event->seq == op->seq) op->event->at = now();
            break;
        case FREE:
            release(op->to, 0);
            break;
        case WAIT:
            break;
        }
    }
    s->head = op->next;
    if (!s->head) s->tail = NULL;
    s->done = op->seq;
    forget(s);
    free(op->staged);
    free((void *)op->launch.params);
    free(op);
}

static int step(void) { /* run one operation that may run, whichever; 0: there is none */
    struct stream *chosen = NULL;
    uint64_t n = 0;
    for (struct stream *s = streams; s; s = s->next)
        if (may_run(s) && next_random() % ++n == 0) chosen = s;
    if (chosen) run(chosen);
    return chosen != NULL;
}

static int wait_for(struct stream *s, uint64_t seq) {
    while (s->done < seq && step()) {}
    return s->device->lost;
}

static int drain(struct device *d) {
    for (struct stream *s = streams; s;) /* from the first again: one that empties may leave the list */
        if (s->device == d && s->head) wait_for(s, s->last), s = streams;
        else s = s->next;
    return d->lost;
}

static int drain_all(void) {
    int lost = OK;
    for (int i = 0; i < config.n_devices; i++) lost = drain(&devices[i]) ? devices[i].lost : lost;
    return lost;
}

/* Queue it; OK. `op` is copied. */
static int queue(struct stream *s, struct op op) {
    struct op *kept = malloc(sizeof *kept);
    *kept = op;
    kept->seq = s->last = ++calls;
    if (op.kind == RECORD) op.event->stream = s, op.event->seq = kept->seq;
    if (s->tail) s->tail->next = kept;
    else s->head = kept;
    s->tail = kept;
    if (!config.seed) while (step()) {}
    else if (next_random() % 8 == 0) step();
    return OK;
}

/* ---- copies ---- */

enum where { NOWHERE, DEVICE, PINNED, PAGEABLE };
static enum where where(uint64_t at, uint64_t n) {
    const struct block *b = find(at);
    if (!b) return at - range_at < RANGE && range_at ? NOWHERE : at ? PAGEABLE : NOWHERE;
    return !inside(b, at, n) ? NOWHERE : b->device ? DEVICE : PINNED;
}

static int copy(uint64_t to, uint64_t from, uint64_t n, void *stream, int waits, int to_device, int from_device) {
    if (!n) return OK;
    struct stream *s = stream_of(stream);
    if (!s) return INVALID_HANDLE;
    enum where there = where(to, n), here = where(from, n);
    if (!there || !here) {
        fprintf(stderr, "soft CUDA: a copy of %llu bytes %s memory that is not there\n",
                (unsigned long long)n, there ? "from" : "into");
        return INVALID_VALUE;
    }
    if ((to_device >= 0 && to_device != (there == DEVICE)) || (from_device >= 0 && from_device != (here == DEVICE)))
        return INVALID_VALUE;
    struct op op = {.kind = COPY, .to = to, .from = from, .n = n};
    if (here == PAGEABLE && there == DEVICE) op.staged = memcpy(malloc(n), (void *)from, n);
    queue(s, op);
    /* As CUDA has it: a call without a stream waits, but for copies within the device, and for those out of pageable
       memory, whose bytes are taken; a call with a stream waits only for what it writes into pageable memory. */
    int asynchronous = here == DEVICE && there == DEVICE;
    if (there == PAGEABLE || (waits && !asynchronous && !op.staged)) return wait_for(s, s->last);
    return OK;
}

CALL(cuMemcpyHtoD, HERE, (uint64_t to, const void *from, size_t n), (to, from, n)) {
    return copy(to, (uint64_t)from, n, NULL, 1, 1, 0);
}
CALL(cuMemcpyDtoH, HERE, (void *to, uint64_t from, size_t n), (to, from, n)) {
    return copy((uint64_t)to, from, n, NULL, 1, 0, 1);
}
CALL(cuMemcpyDtoD, HERE, (uint64_t to, uint64_t from, size_t n), (to, from, n)) {
    return copy(to, from, n, NULL, 1, 1, 1);
}
CALL(cuMemcpy, HERE, (uint64_t to, uint64_t from, size_t n), (to, from, n)) {
    return copy(to, from, n, NULL, 1, -1, -1);
}
CALL(cuMemcpyHtoDAsync, HERE, (uint64_t to, const void *from, size_t n, void *s), (to, from, n, s)) {
    return copy(to, (uint64_t)from, n, s, 0, 1, 0);
}
CALL(cuMemcpyDtoHAsync, HERE, (void *to, uint64_t from, size_t n, void *s), (to, from, n, s)) {
    return copy((uint64_t)to, from, n, s, 0, 0, 1);
}
CALL(cuMemcpyDtoDAsync, HERE, (uint64_t to, uint64_t from, size_t n, void *s), (to, from, n, s)) {
    return copy(to, from, n, s, 0, 1, 1);
}
CALL(cuMemcpyAsync, HERE, (uint64_t to, uint64_t from, size_t n, void *s), (to, from, n, s)) {
    return copy(to, from, n, s, 0, -1, -1);
}

static int fill(uint64_t to, uint32_t value, uint64_t n, int width, void *stream) {
    struct stream *s = stream_of(stream);
    if (!s) return INVALID_HANDLE;
    if (!n) return OK;
    if (to % width || (where(to, n * width) != DEVICE && where(to, n * width) != PINNED)) return INVALID_VALUE;
    return queue(s, (struct op){.kind = FILL, .to = to, .value = value, .n = n, .width = width});
}
CALL(cuMemsetD8, HERE, (uint64_t to, unsigned char v, size_t n), (to, v, n)) { return fill(to, v, n, 1, NULL); }
CALL(cuMemsetD16, HERE, (uint64_t to, unsigned short v, size_t n), (to, v, n)) { return fill(to, v, n, 2, NULL); }
CALL(cuMemsetD32, HERE, (uint64_t to, unsigned v, size_t n), (to, v, n)) { return fill(to, v, n, 4, NULL); }
CALL(cuMemsetD8Async, HERE, (uint64_t to, unsigned char v, size_t n, void *s), (to, v, n, s)) {
    return fill(to, v, n, 1, s);
}
CALL(cuMemsetD16Async, HERE, (uint64_t to, unsigned short v, size_t n, void *s), (to, v, n, s)) {
    return fill(to, v, n, 2, s);
}
CALL(cuMemsetD32Async, HERE, (uint64_t to, unsigned v, size_t n, void *s), (to, v, n, s)) {
    return fill(to, v, n, 4, s);
}

/* ---- allocations ---- */

CALL(cuMemAlloc, HERE, (uint64_t *at, size_t n), (at, n)) { return allocate(current(), n, at); }
CALL(cuMemFree, OWN, (uint64_t at), (at)) {
    const struct block *b = find(at);
    if (!at) return OK;
    if (!b || !b->device) return INVALID_VALUE;
    int lost = drain(b->device); /* as hardware does: what is queued may still use it */
    return lost ? lost : release(at, 0);
}
CALL(cuMemAllocAsync, HERE, (uint64_t *at, size_t n, void *s), (at, n, s)) {
    return stream_of(s) ? allocate(current(), n, at) : INVALID_HANDLE;
}
CALL(cuMemFreeAsync, HERE, (uint64_t at, void *stream), (at, stream)) {
    struct stream *s = stream_of(stream);
    if (!s) return INVALID_HANDLE;
    if (where(at, 1) != DEVICE || find(at)->at != at) return INVALID_VALUE;
    return queue(s, (struct op){.kind = FREE, .to = at});
}
CALL(cuMemHostAlloc, HERE, (void **at, size_t n, unsigned flags), (at, n, flags)) {
    (void)flags;
    return allocate(NULL, n, (uint64_t *)at);
}
CALL(cuMemAllocHost, HERE, (void **at, size_t n), (at, n)) { return allocate(NULL, n, (uint64_t *)at); }
CALL(cuMemFreeHost, OWN, (void *at), (at)) {
    int lost = drain_all();
    return lost ? lost : release((uint64_t)at, 1);
}
CALL(cuMemHostRegister, HERE, (void *at, size_t n, unsigned flags), (at, n, flags)) {
    (void)flags;
    if (!n || where((uint64_t)at, n) != PAGEABLE) return INVALID_VALUE;
    *new_block() = (struct block){.at = (uint64_t)at, .n = n, .live = 1, .registered = 1};
    return OK;
}
CALL(cuMemHostUnregister, OWN, (void *at), (at)) {
    drain_all();
    struct block *b = find((uint64_t)at);
    if (!b || !b->registered || b->at != (uint64_t)at) return INVALID_VALUE;
    return b->live = b->registered = 0;
}
CALL(cuMemHostGetDevicePointer, HERE, (uint64_t *to, void *at, unsigned flags), (to, at, flags)) {
    (void)flags;
    if (where((uint64_t)at, 1) != PINNED) return INVALID_VALUE;
    *to = (uint64_t)at;
    return OK;
}
CALL(cuMemGetInfo, HERE, (size_t *left, size_t *total), (left, total)) {
    *total = config.memory, *left = config.memory - current()->used;
    return OK;
}
CALL(cuMemGetAddressRange, HERE, (uint64_t *base, size_t *n, uint64_t at), (base, n, at)) {
    const struct block *b = find(at);
    if (!inside(b, at, 1)) return INVALID_VALUE;
    if (base) *base = b->at;
    if (n) *n = b->n;
    return OK;
}
static int attribute_of(void *to, int attribute, uint64_t at) {
    const struct block *b = find(at);
    int there = inside(b, at, 1);
    switch (attribute) {
    case 1: return there ? (*(void **)to = b->device ? b->device : current(), OK) : INVALID_VALUE;
    case 2: return there ? (*(unsigned *)to = b->device ? 2 : 1, OK) : INVALID_VALUE;
    case 3: return there ? (*(uint64_t *)to = at, OK) : INVALID_VALUE;
    case 4: return there && !b->device ? (*(uint64_t *)to = at, OK) : INVALID_VALUE;
    case 8: *(unsigned *)to = 0; return there ? OK : INVALID_VALUE;
    case 9: *(int *)to = there && b->device ? b->device->number : -2; return there ? OK : INVALID_VALUE;
    case 11: return there ? (*(uint64_t *)to = b->at, OK) : INVALID_VALUE;
    case 12: return there ? (*(uint64_t *)to = b->n, OK) : INVALID_VALUE;
    default: return INVALID_VALUE;
    }
}
CALL(cuPointerGetAttribute, HERE, (void *to, int attribute, uint64_t at), (to, attribute, at)) {
    return attribute_of(to, attribute, at);
}
CALL(cuPointerGetAttributes, HERE, (unsigned n, const int *attributes, void **to, uint64_t at),
     (n, attributes, to, at)) {
    for (unsigned i = 0; i < n; i++)
        if (attribute_of(to[i], attributes[i], at)) *(uint64_t *)to[i] = 0; /* nulls for what is not CUDA's memory */
    return OK;
}

/* ---- streams and events ---- */

CALL(cuStreamCreateWithPriority, HERE, (void **s, unsigned flags, int priority), (s, flags, priority)) {
    *s = new_stream(current(), flags, priority);
    return OK;
}
CALL(cuStreamCreate, HERE, (void **s, unsigned flags), (s, flags)) {
    *s = new_stream(current(), flags, 0);
    return OK;
}
CALL(cuStreamDestroy, OWN, (void *stream), (stream)) { /* what is queued still runs */
    struct stream *s = any_stream(stream);
    if (!s || (uint64_t)stream <= 2) return INVALID_HANDLE;
    s->live = 0;
    forget(s);
    return s->device->lost;
}
CALL(cuStreamSynchronize, OWN, (void *stream), (stream)) {
    struct stream *s = any_stream(stream);
    return s ? wait_for(s, s->last) : INVALID_HANDLE;
}
CALL(cuStreamQuery, OWN, (void *stream), (stream)) {
    struct stream *s = any_stream(stream);
    if (!s) return INVALID_HANDLE;
    step();
    return s->device->lost ? s->device->lost : s->head ? NOT_READY : OK;
}
CALL(cuStreamGetFlags, HERE, (void *stream, unsigned *flags), (stream, flags)) {
    struct stream *s = stream_of(stream);
    return s ? (*flags = s->flags, OK) : INVALID_HANDLE;
}
CALL(cuStreamGetPriority, HERE, (void *stream, int *priority), (stream, priority)) {
    struct stream *s = stream_of(stream);
    return s ? (*priority = s->priority, OK) : INVALID_HANDLE;
}
CALL(cuStreamGetCtx, HERE, (void *stream, void **context), (stream, context)) {
    struct stream *s = stream_of(stream);
    return s ? (*context = s->device, OK) : INVALID_HANDLE;
}
CALL(cuStreamIsCapturing, HERE, (void *stream, int *status), (stream, status)) {
    return stream_of(stream) ? (*status = 0, OK) : INVALID_HANDLE;
}

static struct event *event_of(void *handle) {
    struct event *e = handle;
    return e && e->magic == EVENT && e->live ? e : NULL;
}
CALL(cuEventCreate, HERE, (void **event, unsigned flags), (event, flags)) {
    struct event *e = calloc(1, sizeof *e); /* never freed, so a stale handle is known for one */
    *e = (struct event){.magic = EVENT, .live = 1, .flags = flags, .device = current()};
    *event = e;
    return OK;
}
CALL(cuEventDestroy, OWN, (void *event), (event)) {
    struct event *e = event_of(event);
    return e ? (e->live = 0, e->device->lost) : INVALID_HANDLE;
}
CALL(cuEventRecord, HERE, (void *event, void *stream), (event, stream)) {
    struct event *e = event_of(event);
    struct stream *s = stream_of(stream);
    if (!e || !s || e->device != s->device) return INVALID_HANDLE;
    return queue(s, (struct op){.kind = RECORD, .event = e});
}
CALL(cuStreamWaitEvent, OWN, (void *stream, void *event, unsigned flags), (stream, event, flags)) {
    (void)flags;
    struct event *e = event_of(event);
    struct stream *s = any_stream(stream);
    if (!e || !s) return INVALID_HANDLE;
    if (!e->stream) return OK; /* never recorded: CUDA waits for nothing */
    return queue(s, (struct op){.kind = WAIT, .waits = e->stream, .waits_seq = e->seq});
}
CALL(cuEventSynchronize, OWN, (void *event), (event)) {
    struct event *e = event_of(event);
    if (!e) return INVALID_HANDLE;
    return e->stream ? wait_for(e->stream, e->seq) : e->device->lost;
}
CALL(cuEventQuery, OWN, (void *event), (event)) {
    struct event *e = event_of(event);
    if (!e) return INVALID_HANDLE;
    step();
    return e->device->lost ? e->device->lost : e->stream && e->stream->done < e->seq ? NOT_READY : OK;
}
CALL(cuEventElapsedTime, OWN, (float *ms, void *from, void *to), (ms, from, to)) {
    struct event *a = event_of(from), *b = event_of(to);
    if (!a || !b || !a->stream || !b->stream || (a->flags | b->flags) & NO_TIMING) return INVALID_HANDLE;
    if (a->stream->done < a->seq || b->stream->done < b->seq) return NOT_READY;
    *ms = 1e3 * (b->at - a->at);
    return OK;
}

/* ---- contexts: each device has its primary one, whose handle is the device ---- */

static struct device *device_of(void *handle) {
    for (int i = 0; i < config.n_devices; i++)
        if (handle == &devices[i]) return &devices[i];
    return NULL;
}
CALL(cuInit, ANY, (unsigned flags), (flags)) {
    if (flags) return INVALID_VALUE;
    if (!config.n_devices) return NO_DEVICE;
    for (int i = 0; i < config.n_devices && !config.started; i++) {
        devices[i].number = i;
        devices[i].legacy = new_stream(&devices[i], 0, 0);
        devices[i].per_thread = new_stream(&devices[i], 0, 0);
    }
    config.started = 1;
    return OK;
}
EXPORT int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
CALL(cuDevicePrimaryCtxRetain, ANY, (void **context, int i), (context, i)) {
    if ((unsigned)i >= (unsigned)config.n_devices) return INVALID_DEVICE;
    devices[i].retained++;
    *context = &devices[i];
    return devices[i].lost;
}
CALL(cuDevicePrimaryCtxRelease, ANY, (int i), (i)) {
    if ((unsigned)i >= (unsigned)config.n_devices) return INVALID_DEVICE;
    return devices[i].retained > 0 ? (devices[i].retained--, OK) : INVALID_CONTEXT;
}
CALL(cuDevicePrimaryCtxGetState, ANY, (int i, unsigned *flags, int *active), (i, flags, active)) {
    if ((unsigned)i >= (unsigned)config.n_devices) return INVALID_DEVICE;
    return *flags = 0, *active = devices[i].retained > 0, OK;
}
CALL(cuCtxGetCurrent, ANY, (void **context), (context)) { return *context = current(), OK; }
CALL(cuCtxSetCurrent, ANY, (void *context), (context)) {
    struct device *d = device_of(context);
    if (context && !d) return INVALID_CONTEXT;
    if (!context) return depth -= depth > 0, OK;
    if (!depth) depth = 1;
    stack[depth - 1] = d;
    return OK;
}
CALL(cuCtxPushCurrent, ANY, (void *context), (context)) {
    struct device *d = device_of(context);
    if (!d || depth == MOST_NESTED) return INVALID_CONTEXT;
    stack[depth++] = d;
    return OK;
}
CALL(cuCtxPopCurrent, ANY, (void **context), (context)) {
    if (!depth) return INVALID_CONTEXT;
    depth--;
    if (context) *context = stack[depth];
    return OK;
}
CALL(cuCtxGetDevice, ANY, (int *i), (i)) { return current() ? (*i = current()->number, OK) : INVALID_CONTEXT; }
CALL(cuCtxGetId, ANY, (void *context, unsigned long long *id), (context, id)) {
    struct device *d = context ? device_of(context) : current();
    return d ? (*id = d->number + 1, OK) : INVALID_CONTEXT;
}
CALL(cuCtxSynchronize, HERE, (void), ()) { return drain(current()); }
CALL(cuCtxGetStreamPriorityRange, HERE, (int *least, int *greatest), (least, greatest)) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}

/* ---- devices, like an H100 ---- */

CALL(cuDeviceGetCount, ANY, (int *n), (n)) { return config.started ? (*n = config.n_devices, OK) : NOT_INITIALIZED; }
CALL(cuDeviceGet, ANY, (int *device, int i), (device, i)) {
    return (unsigned)i < (unsigned)config.n_devices ? (*device = i, OK) : INVALID_DEVICE;
}
CALL(cuDeviceGetName, ANY, (char *name, int n, int i), (name, n, i)) {
    return snprintf(name, n, "Software device %d", i), OK;
}
CALL(cuDeviceGetUuid, ANY, (char *uuid, int i), (uuid, i)) { return memset(uuid, i + 1, 16), OK; }
CALL(cuDeviceTotalMem, ANY, (size_t *n, int i), (n, i)) { return (void)i, *n = config.memory, OK; }
CALL(cuDeviceCanAccessPeer, ANY, (int *can, int a, int b), (can, a, b)) { return (void)a, (void)b, *can = 0, OK; }
CALL(cuDeviceGetPCIBusId, ANY, (char *id, int n, int i), (id, n, i)) {
    return snprintf(id, n, "0000:%02x:00.0", i), OK;
}
CALL(cuDeviceGetAttribute, ANY, (int *value, int attribute, int i), (value, attribute, i)) {
    static const struct { int attribute, value; } have[] = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {9, 65536},
        {10, 32}, {11, 2147483647}, {12, 65536}, {13, 1980000}, {14, 512}, {15, 1}, {16, 132}, {19, 1}, {31, 1},
        {36, 2619000}, {37, 5120}, {38, 52428800}, {39, 2048}, {40, 3}, {41, 1}, {75, 9}, {76, 0}, {78, 1}, {79, 1},
        {80, 1}, {81, 233472}, {82, 65536}, {83, 1}, {87, 2}, {89, 1}, {90, 1}, {91, 1}, {95, 1}, {97, 232448},
        {99, 1}, {106, 32}, {111, 1024},
    };
    if ((unsigned)i >= (unsigned)config.n_devices) return INVALID_DEVICE;
    *value = attribute == 33 ? i : 0; /* PCI_BUS_ID */
    for (unsigned k = 0; k < sizeof have / sizeof *have; k++)
        if (have[k].attribute == attribute) *value = have[k].value;
    return OK;
}

/* ---- libraries, kernels, launches ---- */

static struct function *function_in(struct library *library, const char *name) {
    for (struct function *f = library->functions; f; f = f->next)
        if (!strcmp(f->name, name)) return f;
    const struct kernel *kernel = NULL;
    for (int i = 0; i < library->n_kernels; i++)
        if (!strcmp(library->kernels[i].name, name)) kernel = &library->kernels[i];
    char entry[4096];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    if (!kernel && (library->object || !strstr(library->ptx, entry))) return NULL;
    struct function *f = calloc(1, sizeof *f);
    *f = (struct function){.magic = FUNCTION, .next = library->functions, .library = library,
                           .name = strdup(name), .kernel = kernel};
    return library->functions = f;
}
EXPORT int cuLibraryLoadData(void **to, const char *ptx, const void *o1, const void *v1, unsigned n1,
                             const void *o2, const void *v2, unsigned n2) {
    (void)o1, (void)v1, (void)n1, (void)o2, (void)v2, (void)n2;
    int code = leave(enter("cuLibraryLoadData", ANY));
    if (code) return code;
    if (!ptx || !strstr(ptx, ".version")) return INVALID_PTX;
    struct library *library = calloc(1, sizeof *library);
    *library = (struct library){.magic = LIBRARY, .live = 1, .ptx = strdup(ptx)};
    char path[4096];
    if (config.translate) { /* without the lock: it is Python's */
        const int *n;
        if (config.translate(ptx, path, sizeof path)) return INVALID_PTX;
        if (!(library->object = dlopen(path, RTLD_NOW | RTLD_LOCAL)) ||
            !(library->kernels = dlsym(library->object, "soft_kernels")) ||
            !(n = dlsym(library->object, "soft_n_kernels"))) {
            fprintf(stderr, "soft CUDA: %s\n", dlerror());
            return INVALID_PTX;
        }
        library->n_kernels = *n;
    }
    *to = library;
    return OK;
}
CALL(cuLibraryUnload, OWN, (void *handle), (handle)) { /* its object stays, and with it stale handles are known */
    struct library *library = handle;
    if (!library || library->magic != LIBRARY || !library->live) return INVALID_HANDLE;
    library->live = 0;
    return drain_all();
}
CALL(cuLibraryGetKernel, ANY, (void **to, void *handle, const char *name), (to, handle, name)) {
    struct library *library = handle;
    if (!library || library->magic != LIBRARY || !library->live) return INVALID_HANDLE;
    return (*to = function_in(library, name)) ? OK : NOT_FOUND;
}
CALL(cuLibraryGetModule, ANY, (void **to, void *handle), (to, handle)) { return *to = handle, OK; }
CALL(cuLibraryGetGlobal, ANY, (uint64_t *at, size_t *n, void *handle, const char *name), (at, n, handle, name)) {
    return (void)at, (void)n, (void)handle, (void)name, NOT_FOUND;
}
CALL(cuModuleGetFunction, HERE, (void **to, void *handle, const char *name), (to, handle, name)) {
    return (*to = function_in(handle, name)) ? OK : NOT_FOUND;
}
static int attribute_of_function(int *value, int attribute) {
    switch (attribute) {
    case 0: return *value = 1024, OK;
    case 4: return *value = 32, OK;
    case 5: case 6: return *value = 90, OK;
    default: return *value = 0, OK;
    }
}
CALL(cuKernelGetAttribute, ANY, (int *value, int attribute, void *f, int device), (value, attribute, f, device)) {
    return (void)f, (void)device, attribute_of_function(value, attribute);
}
CALL(cuFuncGetAttribute, ANY, (int *value, int attribute, void *f), (value, attribute, f)) {
    return (void)f, attribute_of_function(value, attribute);
}
CALL(cuKernelGetFunction, HERE, (void **to, void *f), (to, f)) { return *to = f, OK; }
CALL(cuKernelGetLibrary, ANY, (void **to, void *f), (to, f)) { return *to = ((struct function *)f)->library, OK; }
CALL(cuKernelGetName, ANY, (const char **to, void *f), (to, f)) { return *to = ((struct function *)f)->name, OK; }
CALL(cuOccupancyMaxActiveBlocksPerMultiprocessor, HERE, (int *n, void *f, int block, size_t shared),
     (n, f, block, shared)) {
    return (void)f, (void)shared, *n = 2048 / block < 32 ? 2048 / block : 32, OK;
}

static int launch(void *handle, const unsigned *shape, unsigned shared, void *stream, void **params) {
    const struct function *f = handle;
    struct stream *s = stream_of(stream);
    if (!s || !f || f->magic != FUNCTION || !f->library->live) return INVALID_HANDLE;
    uint64_t threads = (uint64_t)shape[3] * shape[4] * shape[5];
    if (!shape[0] || !shape[1] || !shape[2] || !threads || threads > 1024 || shape[0] > 2147483647u ||
        shape[1] > 65535 || shape[2] > 65535 || shape[5] > 64 || shared)
        return INVALID_VALUE;
    struct op op = {.kind = LAUNCH, .function = f};
    memcpy(op.launch.grid, shape, 12);
    memcpy(op.launch.block, shape + 3, 12);
    op.launch.seed = config.seed ? next_random() | 1 : 0;
    op.launch.race_check = config.race_check;
    op.launch.reach = reach;
    if (f->kernel) { /* values are copied now, as CUDA does, behind the pointers to them */
        uint64_t n = 0, head = f->kernel->n_params * sizeof(void *);
        for (int i = 0; i < f->kernel->n_params; i++) n += (f->kernel->param_nbytes[i] + 15) & ~15ull;
        char **pointers = malloc(head + 16 + n), *at = (char *)pointers + ((head + 15) & ~15ull);
        for (int i = 0; i < f->kernel->n_params; at += (f->kernel->param_nbytes[i++] + 15) & ~15ull)
            pointers[i] = memcpy(at, params[i], f->kernel->param_nbytes[i]);
        op.launch.params = (void *const *)pointers;
    }
    return queue(s, op);
}
CALL(cuLaunchKernel, HERE,
     (void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *s,
      void **params, void **extra),
     (f, gx, gy, gz, bx, by, bz, shared, s, params, extra)) {
    return extra ? INVALID_VALUE : launch(f, (unsigned[]){gx, gy, gz, bx, by, bz}, shared, s, params);
}
struct launch_config { unsigned shape[6], shared; void *stream, *attributes; unsigned n_attributes; };
/* Counts as the other. */
EXPORT int cuLaunchKernelEx(const struct launch_config *c, void *f, void **params, void **extra) {
    const unsigned *n = c->shape;
    return cuLaunchKernel(f, n[0], n[1], n[2], n[3], n[4], n[5], c->shared, c->stream, params, extra);
}
CALL(cuProfilerStart, ANY, (void), ()) { return OK; }
CALL(cuProfilerStop, ANY, (void), ()) { return OK; }

/* ---- errors, and how functions are found ---- */

EXPORT int cuGetErrorName(int code, const char **name) {
    for (unsigned i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return *name = ERRORS[i].name, OK;
    return *name = NULL, INVALID_VALUE;
}
EXPORT int cuGetErrorString(int code, const char **text) {
    for (unsigned i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) return *text = ERRORS[i].text, OK;
    return *text = NULL, INVALID_VALUE;
}
EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
    if (config.log && !*function) fprintf(stderr, "soft CUDA: no %s\n", name);
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
EXPORT int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

/* The names of some in the library, where one does not go by cuGetProcAddress. */
#define ALIAS(name) extern __typeof(name) name##_v2 __attribute__((alias(#name), visibility("default")))
ALIAS(cuMemAlloc);
ALIAS(cuMemFree);
ALIAS(cuMemGetInfo);
ALIAS(cuMemcpyHtoD);
ALIAS(cuMemcpyDtoH);
ALIAS(cuMemcpyDtoD);
ALIAS(cuMemcpyHtoDAsync);
ALIAS(cuMemcpyDtoHAsync);
ALIAS(cuMemcpyDtoDAsync);
ALIAS(cuStreamDestroy);
ALIAS(cuEventDestroy);
ALIAS(cuCtxPushCurrent);
ALIAS(cuCtxPopCurrent);
ALIAS(cuDevicePrimaryCtxRelease);

/* ---- settings, for __init__.py ---- */

EXPORT void soft_configure(int n_devices, uint64_t memory, uint64_t seed, int race_check,
                           int (*translate)(const char *, char *, int)) {
    pthread_mutex_lock(&lock);
    config.n_devices = n_devices < MOST_DEVICES ? n_devices : MOST_DEVICES;
    config.memory = memory, config.seed = config.random = seed;
    config.race_check = race_check, config.translate = translate;
    pthread_mutex_unlock(&lock);
}
EXPORT void soft_fail(const char *name, long kth, int code) { /* kth 0: never; "copy" and "run" count what runs */
    pthread_mutex_lock(&lock);
    int to = -1;
    for (int i = 15; i >= 0; i--)
        if (!strcmp(faults[i].name, name)) to = i;
        else if (to < 0 && !faults[i].left) to = i;
    if (to >= 0) {
        snprintf(faults[to].name, sizeof faults[to].name, "%s", name);
        faults[to].left = kth, faults[to].code = code;
    }
    pthread_mutex_unlock(&lock);
}
EXPORT void soft_revive(void) { /* devices are as they were, less what was queued; no faults to come */
    pthread_mutex_lock(&lock);
    for (int i = 0; i < config.n_devices; i++) {
        devices[i].lost = devices[i].lost ? devices[i].lost : UNKNOWN;
        drain(&devices[i]);
        devices[i].lost = OK;
    }
    memset(faults, 0, sizeof faults);
    last_report[0] = 0;
    pthread_mutex_unlock(&lock);
}
EXPORT int soft_to_come(void) {
    int n = 0;
    for (int i = 0; i < 16; i++) n += faults[i].left > 0;
    return n;
}
EXPORT const char *soft_report(void) { return last_report; }
EXPORT uint64_t soft_used(int device) { return devices[device].used; }
