/* Many reads at once: through io_uring by raw system calls, or one after the other by pread. Linux 5.6 and later have
 * the former; where it is missing or forbidden, hb_ring_open says so.
 *
 * Read i takes `length[i]` bytes at `offset[i]` of file `fd[i]` to `out + at[i]`. Both end with 0, or with an errno and
 * the number of the read that failed; HB_END is the file's end. Nothing is in flight when they return. */
#ifndef HBKIT_URING_H
#define HBKIT_URING_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { HB_END = -1, HB_DEPTH = 64, HB_MOST = 1 << 30 };

typedef struct {
    const int32_t *fd;
    const int64_t *offset, *length, *at;
    int64_t n;
    uint8_t *out;
} hb_reads;

static inline uint32_t hb_at_most(int64_t n) { return n < HB_MOST ? (uint32_t)n : HB_MOST; }

static int hb_pread_all(const hb_reads *r, int64_t *failed) {
    for (int64_t i = 0; i < r->n; i++)
        for (int64_t done = 0; done < r->length[i];) {
            ssize_t got = pread(r->fd[i], r->out + r->at[i] + done, hb_at_most(r->length[i] - done), r->offset[i] + done);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                *failed = i;
                return got < 0 ? errno : HB_END;
            }
            done += got;
        }
    return 0;
}

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>

typedef struct {
    int fd;
    uint32_t *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_nbytes, sqes_nbytes;
} hb_ring;

static void hb_ring_close(hb_ring *r) {
    if (r->rings) munmap(r->rings, r->rings_nbytes);
    if (r->sqes) munmap(r->sqes, r->sqes_nbytes);
    if (r->fd > 0) close(r->fd);
    memset(r, 0, sizeof *r);
}

static int hb_ring_open(hb_ring *r) {
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    memset(r, 0, sizeof *r);
    r->fd = (int)syscall(__NR_io_uring_setup, HB_DEPTH, &p);
    if (r->fd < 0) {
        r->fd = 0;
        return errno;
    }
    /* The second came with Linux 5.6, as IORING_OP_READ did. */
    if (!(p.features & IORING_FEAT_SINGLE_MMAP) || !(p.features & IORING_FEAT_RW_CUR_POS)) {
        hb_ring_close(r);
        return ENOSYS;
    }
    size_t sq = p.sq_off.array + p.sq_entries * sizeof(uint32_t), cq = p.cq_off.cqes + p.cq_entries * sizeof *r->cqes;
    r->rings_nbytes = sq > cq ? sq : cq;
    r->sqes_nbytes = p.sq_entries * sizeof *r->sqes;
    void *rings = mmap(NULL, r->rings_nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, IORING_OFF_SQ_RING);
    void *sqes = mmap(NULL, r->sqes_nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, IORING_OFF_SQES);
    int failed = errno;
    r->rings = rings == MAP_FAILED ? NULL : rings;
    r->sqes = sqes == MAP_FAILED ? NULL : sqes;
    if (!r->rings || !r->sqes) {
        hb_ring_close(r);
        return failed;
    }
    char *base = rings;
    r->sq_tail = (uint32_t *)(void *)(base + p.sq_off.tail);
    r->sq_mask = (uint32_t *)(void *)(base + p.sq_off.ring_mask);
    r->sq_array = (uint32_t *)(void *)(base + p.sq_off.array);
    r->cq_head = (uint32_t *)(void *)(base + p.cq_off.head);
    r->cq_tail = (uint32_t *)(void *)(base + p.cq_off.tail);
    r->cq_mask = (uint32_t *)(void *)(base + p.cq_off.ring_mask);
    r->cqes = (struct io_uring_cqe *)(void *)(base + p.cq_off.cqes);
    return 0;
}

/* Put a read, or what is left of it, in the queue. */
static void hb_ring_queue(hb_ring *r, const hb_reads *q, uint32_t place, int64_t i, int64_t done) {
    uint32_t tail = *r->sq_tail, at = tail & *r->sq_mask;
    struct io_uring_sqe *s = &r->sqes[at];
    memset(s, 0, sizeof *s);
    s->opcode = IORING_OP_READ, s->fd = q->fd[i], s->user_data = place;
    s->off = (uint64_t)(q->offset[i] + done), s->len = hb_at_most(q->length[i] - done);
    s->addr = (uint64_t)(uintptr_t)(q->out + q->at[i] + done);
    r->sq_array[at] = at;
    __atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

/* One thread at a time. */
static int hb_ring_read(hb_ring *r, const hb_reads *q, int64_t *failed) {
    int64_t read[HB_DEPTH], done[HB_DEPTH], next = 0;
    uint32_t idle[HB_DEPTH], n_idle = HB_DEPTH, queued = 0;
    int error = 0, broken = 0;
    for (uint32_t k = 0; k < HB_DEPTH; k++) idle[k] = k;
    for (;;) {
        while (!error && n_idle && next < q->n) {
            uint32_t k = idle[--n_idle];
            read[k] = next++, done[k] = 0;
            hb_ring_queue(r, q, k, read[k], 0);
            queued++;
        }
        if (n_idle == HB_DEPTH) return error;
        if (broken) { /* what the kernel has accepted still writes to memory: wait for it without its help */
            sched_yield();
        } else {
            long got = syscall(__NR_io_uring_enter, r->fd, queued, 1, IORING_ENTER_GETEVENTS, NULL, 0);
            if (got >= 0) {
                queued -= (uint32_t)got;
            } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
                error = broken = errno, *failed = 0;
                uint32_t tail = *r->sq_tail;
                for (; queued; queued--) idle[n_idle++] = (uint32_t)r->sqes[--tail & *r->sq_mask].user_data;
                __atomic_store_n(r->sq_tail, tail, __ATOMIC_RELEASE);
            }
        }
        uint32_t head = *r->cq_head;
        for (; head != __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE); head++) {
            int32_t res = r->cqes[head & *r->cq_mask].res;
            uint32_t k = (uint32_t)r->cqes[head & *r->cq_mask].user_data;
            done[k] += res > 0 ? res : 0;
            if (done[k] < q->length[read[k]] && !error) {
                if (res > 0 || res == -EINTR || res == -EAGAIN) { /* the rest of a short read */
                    hb_ring_queue(r, q, k, read[k], done[k]);
                    queued++;
                    continue;
                }
                error = res < 0 ? -res : HB_END;
                *failed = read[k];
            }
            idle[n_idle++] = k;
        }
        __atomic_store_n(r->cq_head, head, __ATOMIC_RELEASE);
    }
}
#else
typedef struct {
    int fd;
} hb_ring;
static int hb_ring_open(hb_ring *r) { return r->fd = 0, ENOSYS; }
static void hb_ring_close(hb_ring *r) { r->fd = 0; }
static int hb_ring_read(hb_ring *r, const hb_reads *q, int64_t *failed) { return (void)r, *failed = (void)q, 0, ENOSYS; }
#endif

#endif
