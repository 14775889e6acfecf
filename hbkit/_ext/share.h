/* Threads that share a call's work (docs/adr/0018). A call is cut into units, numbered from 0. Each thread has a seat,
 * and with it a run of units, of which it takes one after the other; when they are gone it takes from the seats after its
 * own. So a thread that is slow, or not given a CPU, keeps the others waiting for one unit at the most, and what lies at
 * the same place in several calls is gone through by the same thread, in whose cache it is. The caller works too, and
 * needs nobody: with no other thread it does all units itself, in order.
 *
 *   caller:  job onto the list, two helpers woken ──▶ units ──▶ job off the list ──▶ waits for helpers still in a unit
 *   helper:  sleeps ──▶ its seat of the first job that has it, two more woken ──▶ units ──▶ job off the list ──▶ ...
 *
 * Helpers start when they are first needed and never end; all signals are blocked in them. They own nothing: a job is
 * on its caller's stack. A child of fork() has none of them, and starts its own. Units must not depend on each other's
 * order, nor fork; they may share. */
#ifndef HBKIT_SHARE_H
#define HBKIT_SHARE_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>

#include "kernels.h"

enum { HB_SEATS = 256 };

typedef void (*hb_unit)(void *what, int64_t unit, int64_t seat);

typedef struct hb_job {
    hb_unit run;
    void *what;
    int64_t n_units, n_seats;
    int64_t woken, at_work; /* the seat to be woken next; helpers that have not left yet */
    struct hb_job *later;
    struct {
        int64_t next; /* atomic: the unit to be taken next */
    } __attribute__((aligned(64))) seats[HB_SEATS];
} hb_job;

static pthread_mutex_t hb_lock = PTHREAD_MUTEX_INITIALIZER; /* of all below, and of jobs but for `next` */
static pthread_cond_t hb_left = PTHREAD_COND_INITIALIZER;   /* some job, by its last helper */
static hb_job *hb_jobs;                                     /* first come, first helped */
static int64_t hb_n_helpers;                                /* seats 1 to n have one */
static struct {
    pthread_cond_t wake;
    int idle;
} hb_helpers[HB_SEATS];

static int64_t hb_first(const hb_job *job, int64_t seat) { return job->n_units * seat / job->n_seats; }

static void hb_work(hb_job *job, int64_t seat) {
    hb_fp_state fp = hb_fp_enter();
    for (int64_t k = 0; k < job->n_seats; k++) {
        int64_t from = (seat + k) % job->n_seats, end = hb_first(job, from + 1), i;
        while ((i = __atomic_fetch_add(&job->seats[from].next, 1, __ATOMIC_RELAXED)) < end) job->run(job->what, i, seat);
    }
    hb_fp_leave(fp);
}

/* Lets go of the lock and wakes two helpers for the job: all are there after log n such steps. */
static void hb_wake_and_unlock(hb_job *job) {
    pthread_cond_t *wake[2];
    int n = 0;
    for (; n < 2 && job->woken < job->n_seats && job->woken <= hb_n_helpers; job->woken++)
        if (hb_helpers[job->woken].idle) wake[n++] = &hb_helpers[job->woken].wake;
    pthread_mutex_unlock(&hb_lock);
    while (n) pthread_cond_signal(wake[--n]);
}

static void hb_take_off(hb_job *job) {
    for (hb_job **at = &hb_jobs; *at; at = &(*at)->later)
        if (*at == job) {
            *at = job->later;
            break;
        }
}

static void *hb_help(void *number) {
    int64_t seat = (int64_t)(intptr_t)number;
    pthread_mutex_lock(&hb_lock);
    for (;;) {
        hb_job *job = hb_jobs;
        while (job && seat >= job->n_seats) job = job->later;
        if (!job) {
            hb_helpers[seat].idle = 1;
            pthread_cond_wait(&hb_helpers[seat].wake, &hb_lock);
            hb_helpers[seat].idle = 0;
            continue;
        }
        job->at_work++;
        hb_wake_and_unlock(job);
        hb_work(job, seat);
        pthread_mutex_lock(&hb_lock);
        hb_take_off(job); /* all its units are taken */
        if (--job->at_work == 0) pthread_cond_broadcast(&hb_left);
    }
    return NULL;
}

/* One helper more; 0 where the system gives none. */
static int hb_start(void) {
    pthread_t thread;
    pthread_attr_t detached;
    sigset_t all, before;
    intptr_t seat = (intptr_t)hb_n_helpers + 1;
    if (pthread_attr_init(&detached)) return 0;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_cond_init(&hb_helpers[seat].wake, NULL);
    hb_helpers[seat].idle = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, &detached, hb_help, (void *)seat);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
    hb_n_helpers += !failed;
    return !failed;
}

/* Run units 0..n_units-1 in at most n_seats threads, whose seats are 0..n_seats-1, for what each needs alone; the
 * caller's is 0. Units run between hb_fp_enter and hb_fp_leave. What the caller has written they see, and the reverse. */
static void hb_share(hb_unit run, void *what, int64_t n_units, int64_t n_seats) {
    hb_job job;
    job.run = run, job.what = what, job.n_units = n_units, job.n_seats = n_seats < n_units ? n_seats : n_units;
    if (job.n_seats <= 1) {
        hb_fp_state fp = hb_fp_enter();
        for (int64_t i = 0; i < n_units; i++) run(what, i, 0);
        hb_fp_leave(fp);
        return;
    }
    job.woken = 1, job.at_work = 0, job.later = NULL;
    for (int64_t seat = 0; seat < job.n_seats; seat++) job.seats[seat].next = hb_first(&job, seat);
    pthread_mutex_lock(&hb_lock);
    while (hb_n_helpers < job.n_seats - 1 && hb_start()) {}
    hb_job **at = &hb_jobs;
    while (*at) at = &(*at)->later;
    *at = &job;
    hb_wake_and_unlock(&job);
    hb_work(&job, 0);
    pthread_mutex_lock(&hb_lock);
    hb_take_off(&job);
    while (job.at_work) pthread_cond_wait(&hb_left, &hb_lock);
    pthread_mutex_unlock(&hb_lock);
}

static void hb_forked(void) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    hb_lock = lock, hb_left = cond;
    hb_jobs = NULL, hb_n_helpers = 0;
}

#endif
