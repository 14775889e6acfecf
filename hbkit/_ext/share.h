/* Threads that share a call's work (docs/adr/0018). A call is cut into units, numbered from 0; whoever is free takes the
 * next number, so that a thread which is slow, or not given a CPU, keeps the others waiting for one unit at the most.
 * The caller works too, and needs nobody: with no other thread it does all units itself, in order.
 *
 *   caller:  job onto the list, two helpers woken ──▶ units ──▶ job off the list ──▶ waits for helpers still in a unit
 *   helper:  sleeps ──▶ takes a seat in the first job that has one, wakes two more ──▶ units ──▶ leaves it ──▶ ...
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

typedef void (*hb_unit)(void *what, int64_t unit, int64_t seat);

typedef struct hb_job {
    hb_unit run;
    void *what;
    int64_t n_units, next; /* atomic: the unit to be taken next */
    int64_t n_seats, seated, at_work; /* helpers: places for them and the caller, those taken, those not left yet */
    struct hb_job *later;
} hb_job;

enum { HB_WOKEN = 2 }; /* helpers that each who comes to a job wakes: all are there in log n steps */

static pthread_mutex_t hb_lock = PTHREAD_MUTEX_INITIALIZER; /* of all below, and of jobs but for `next` */
static pthread_cond_t hb_posted = PTHREAD_COND_INITIALIZER, hb_left = PTHREAD_COND_INITIALIZER;
static hb_job *hb_jobs; /* first come, first helped */
static int64_t hb_n_helpers;

static void hb_work(hb_job *job, int64_t seat) {
    hb_fp_state fp = hb_fp_enter();
    for (int64_t i; (i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->n_units;)
        job->run(job->what, i, seat);
    hb_fp_leave(fp);
}

static void hb_wake(int64_t n) {
    for (int64_t i = 0; i < HB_WOKEN && i < n; i++) pthread_cond_signal(&hb_posted);
}

static int hb_wants(const hb_job *job) {
    return job->seated < job->n_seats && __atomic_load_n(&job->next, __ATOMIC_RELAXED) < job->n_units;
}

static void *hb_help(void *nothing) {
    pthread_mutex_lock(&hb_lock);
    for (;;) {
        hb_job *job = hb_jobs;
        while (job && !hb_wants(job)) job = job->later;
        if (!job) {
            pthread_cond_wait(&hb_posted, &hb_lock);
            continue;
        }
        int64_t seat = job->seated++, left = job->n_seats - job->seated;
        job->at_work++;
        pthread_mutex_unlock(&hb_lock);
        hb_wake(left);
        hb_work(job, seat);
        pthread_mutex_lock(&hb_lock);
        if (--job->at_work == 0) pthread_cond_broadcast(&hb_left);
    }
    return nothing;
}

/* One helper more; 0 where the system gives none. */
static int hb_start(void) {
    pthread_t thread;
    pthread_attr_t detached;
    sigset_t all, before;
    if (pthread_attr_init(&detached)) return 0;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, &detached, hb_help, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
    hb_n_helpers += !failed;
    return !failed;
}

/* Run units 0..n_units-1 in at most n_seats threads. Each thread has a seat, 0..n_seats-1, for what it needs alone; the
 * caller's is 0. Units run between hb_fp_enter and hb_fp_leave. What the caller has written they see, and the reverse. */
static void hb_share(hb_unit run, void *what, int64_t n_units, int64_t n_seats) {
    hb_job job = {.run = run, .what = what, .n_units = n_units, .n_seats = n_seats < n_units ? n_seats : n_units};
    hb_job **at = &hb_jobs;
    job.seated = 1;
    if (job.n_seats <= 1) {
        hb_work(&job, 0);
        return;
    }
    pthread_mutex_lock(&hb_lock);
    while (hb_n_helpers < job.n_seats - 1 && hb_start()) {}
    while (*at) at = &(*at)->later;
    *at = &job;
    pthread_mutex_unlock(&hb_lock);
    hb_wake(job.n_seats - 1);
    hb_work(&job, 0);
    pthread_mutex_lock(&hb_lock);
    for (at = &hb_jobs; *at != &job;) at = &(*at)->later;
    *at = job.later;
    while (job.at_work) pthread_cond_wait(&hb_left, &hb_lock);
    pthread_mutex_unlock(&hb_lock);
}

static void hb_forked(void) {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    hb_lock = lock, hb_posted = hb_left = cond;
    hb_jobs = NULL, hb_n_helpers = 0;
}

#endif
