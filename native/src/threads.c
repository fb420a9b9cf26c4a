/* threads.c: the worker pool.
 *
 * A job set is one 64-bit ticket: generation (high half) and jobs not yet taken (low half). Workers and the
 * caller take jobs by compare-and-swap, so whoever is awake works and a worker that sleeps delays nobody.
 * A job's fields may be read only by a thread that holds an unfinished job of it: the set cannot end, and so
 * the fields cannot change, before that thread reports.
 *
 * Waiting: a worker looks at the ticket for a few microseconds (the gap between two job sets of one call),
 * then sleeps on a condition. Nobody looks at all when there are more threads than cores, because the time
 * would be taken from the thread that has the work. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

enum { MAX_THREADS = 1024, LOOKS = 2000 /* about 20-50 us of pauses */ };

struct worker {
    struct kt_pool *pool;
    pthread_t id;
    int index;
};

struct kt_pool {
    pthread_mutex_t owner; /* held for a whole public call */
    int threads;           /* the caller included */
    int started;           /* workers running; 0 until the first job set, and again after fork */
    int looks;             /* polls before sleeping */

    _Atomic(uint64_t) ticket;
    _Atomic(int32_t) unfinished;
    kt_job_fn fn;
    void *ctx;
    int32_t jobs;

    pthread_mutex_t lock; /* guards the two conditions */
    pthread_cond_t work, done;
    _Atomic(int) sleepers, caller_sleeps, quit;

    void *shared;
    size_t shared_bytes;
    struct worker *workers;
    struct kt_pool *next; /* all pools, for fork */
};

/* ---- jobs ------------------------------------------------------------------------------------------- */

/* Take one job of the current set and run it; 0 when none is left. */
static int work_once(struct kt_pool *p, int thread) {
    uint64_t t = atomic_load(&p->ticket);
    do {
        if (!(uint32_t)t) return 0;
    } while (!atomic_compare_exchange_weak(&p->ticket, &t, t - 1));
    p->fn(p->ctx, p->jobs - (int32_t)(uint32_t)t, thread);
    if (atomic_fetch_sub(&p->unfinished, 1) == 1 && atomic_load(&p->caller_sleeps)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_signal(&p->done);
        pthread_mutex_unlock(&p->lock);
    }
    return 1;
}

static int has_work(struct kt_pool *p) { return (uint32_t)atomic_load(&p->ticket) || atomic_load(&p->quit); }

static void *worker_main(void *arg) {
    struct worker *w = arg;
    struct kt_pool *p = w->pool;
    while (!atomic_load(&p->quit)) {
        while (work_once(p, w->index)) {}
        for (int i = 0; i < p->looks && !has_work(p); i++) PAUSE();
        if (has_work(p)) continue;
        pthread_mutex_lock(&p->lock);
        atomic_fetch_add(&p->sleepers, 1);
        while (!has_work(p)) pthread_cond_wait(&p->work, &p->lock);
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->lock);
    }
    return NULL;
}

/* Workers start with the first job set, not with the pool: a pool that is never used costs nothing. Fewer
 * than asked for is not an error: the caller can do all the work. */
static void start_workers(struct kt_pool *p) {
    sigset_t all, old;
    sigfillset(&all); /* signals belong to the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (p->started < p->threads - 1) {
        struct worker *w = &p->workers[p->started];
        *w = (struct worker){.pool = p, .index = p->started + 1};
        if (pthread_create(&w->id, NULL, worker_main, w)) break;
        p->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void kt_pool_run(kt_pool *p, kt_job_fn fn, void *ctx, int32_t jobs) {
    if (jobs == 1 || p->threads == 1) {
        for (int32_t i = 0; i < jobs; i++) fn(ctx, i, 0);
        return;
    }
    if (jobs <= 0) return;
    if (p->started < p->threads - 1) start_workers(p);

    p->fn = fn;
    p->ctx = ctx;
    p->jobs = jobs;
    atomic_store(&p->unfinished, jobs);
    uint64_t generation = (atomic_load(&p->ticket) >> 32) + 1;
    atomic_store(&p->ticket, generation << 32 | (uint64_t)jobs);
    if (atomic_load(&p->sleepers)) { /* a worker counts itself before its last look at the ticket */
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->work);
        pthread_mutex_unlock(&p->lock);
    }

    while (work_once(p, 0)) {}
    for (int i = 0; i < p->looks && atomic_load(&p->unfinished); i++) PAUSE();
    if (!atomic_load(&p->unfinished)) return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_sleeps, 1);
    while (atomic_load(&p->unfinished)) pthread_cond_wait(&p->done, &p->lock);
    atomic_store(&p->caller_sleeps, 0);
    pthread_mutex_unlock(&p->lock);
}

/* ---- fork ------------------------------------------------------------------------------------------- */

/* fork() copies the caller's thread only. In the child every pool forgets its workers and whatever call was
 * under way in another thread, and starts anew at its next job set. */
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;
static struct kt_pool *pools;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void init_sync(struct kt_pool *p) {
    pthread_mutex_init(&p->owner, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->done, NULL);
    atomic_store(&p->ticket, 0);
    atomic_store(&p->unfinished, 0);
    atomic_store(&p->sleepers, 0);
    atomic_store(&p->caller_sleeps, 0);
    atomic_store(&p->quit, 0);
    p->started = 0;
}

static void before_fork(void) { pthread_mutex_lock(&pools_lock); }
static void after_fork_parent(void) { pthread_mutex_unlock(&pools_lock); }
static void after_fork_child(void) {
    for (struct kt_pool *p = pools; p; p = p->next) {
        init_sync(p);
        p->shared = NULL; /* the parent may have been about to replace it: let it go rather than free it twice */
        p->shared_bytes = 0;
    }
    pthread_mutex_unlock(&pools_lock);
}
static void watch_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* ---- how many threads ------------------------------------------------------------------------------- */

#if defined(__linux__)
/* The lowest-numbered hardware thread of the core that `cpu` belongs to, or `cpu` itself if unknown. */
static int core_of(int cpu) {
    char path[96];
    int first = cpu;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *f = fopen(path, "r");
    if (!f) return cpu;
    if (fscanf(f, "%d", &first) != 1 || first < 0) first = cpu;
    fclose(f);
    return first;
}

/* CPUs' worth of time that the cgroup grants, rounded up; a large number without a limit. */
static int cgroup_cpus(void) {
    double quota = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r"); /* version 2: "max 100000" or "200000 100000" */
    if (f) {
        if (fscanf(f, "%lf %lf", &quota, &period) != 2) quota = 0;
        fclose(f);
    } else {
        f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r"); /* version 1: -1 without a limit */
        if (f) {
            if (fscanf(f, "%lf", &quota) != 1) quota = 0;
            fclose(f);
        }
        f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r");
        if (f) {
            if (fscanf(f, "%lf", &period) != 1) period = 0;
            fclose(f);
        }
    }
    if (quota <= 0 || period <= 0) return MAX_THREADS;
    int cpus = (int)((quota + period - 1) / period);
    return cpus < 1 ? 1 : cpus;
}

/* Cores this process may run on; with one hardware thread each, since siblings share the units we saturate. */
static int allowed_cores(void) {
    cpu_set_t set, seen;
    CPU_ZERO(&seen);
    if (sched_getaffinity(0, sizeof set, &set)) return (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &set)) {
            int core = core_of(cpu);
            CPU_SET(core < CPU_SETSIZE ? core : cpu, &seen);
        }
    return CPU_COUNT(&seen);
}
#else
static int cgroup_cpus(void) { return MAX_THREADS; }
static int allowed_cores(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
#endif

int kt_default_threads(void) {
    int cores = allowed_cores(), granted = cgroup_cpus();
    int n = cores < granted ? cores : granted;
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

/* ---- the pool --------------------------------------------------------------------------------------- */

int kt_pool_create(int threads, kt_pool **pool) {
    if (!pool) return KT_ERR_NULL;
    *pool = NULL;
    int cores = kt_default_threads();
    if (threads == 0) threads = cores;
    if (threads < 0 || threads > MAX_THREADS) return KT_ERR_THREADS;
    pthread_once(&fork_once, watch_fork);
    struct kt_pool *p = calloc(1, sizeof *p);
    if (!p) return KT_ERR_MEMORY;
    p->workers = calloc((size_t)threads, sizeof *p->workers);
    if (!p->workers) {
        free(p);
        return KT_ERR_MEMORY;
    }
    p->threads = threads;
    p->looks = threads <= cores ? LOOKS : 0;
    init_sync(p);
    pthread_mutex_lock(&pools_lock);
    p->next = pools;
    pools = p;
    pthread_mutex_unlock(&pools_lock);
    *pool = p;
    return KT_OK;
}

int kt_pool_threads(const kt_pool *pool) { return pool ? pool->threads : 0; }

void kt_pool_destroy(kt_pool *p) {
    if (!p) return;
    pthread_mutex_lock(&p->owner); /* wait for a call under way */
    pthread_mutex_unlock(&p->owner);
    pthread_mutex_lock(&pools_lock);
    for (struct kt_pool **at = &pools; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    pthread_mutex_unlock(&pools_lock);
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->quit, 1);
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->started; i++) pthread_join(p->workers[i].id, NULL);
    pthread_mutex_destroy(&p->owner);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->done);
    free(p->workers);
    free(p->shared);
    free(p);
}

void kt_pool_lock(kt_pool *p) { pthread_mutex_lock(&p->owner); }
void kt_pool_unlock(kt_pool *p) { pthread_mutex_unlock(&p->owner); }

void *kt_pool_shared(kt_pool *p, size_t bytes) {
    if (bytes > SIZE_MAX - 4096) return NULL;
    if (bytes > p->shared_bytes) {
        bytes = (bytes + 4095) & ~(size_t)4095;
        free(p->shared);
        p->shared = aligned_alloc(4096, bytes);
        p->shared_bytes = p->shared ? bytes : 0;
    }
    return p->shared;
}
