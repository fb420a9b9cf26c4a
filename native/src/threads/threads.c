/* threads.c: how the worker pool runs job sets; pool.c makes and ends pools.
 *
 * A job set is, for each NUMA node, a count of jobs not yet taken. Workers and the caller take jobs by counting it
 * down, their own node's first, so whoever is awake works and a worker that sleeps delays nobody. The other fields of
 * a set may be read only by a thread that took a job and has not reported it: until then the set cannot end, nor its
 * fields change. A thread that wakes too late finds no job or one of the next set, and both are right.
 *
 * Waiting: a worker looks for jobs for a few microseconds (the gap between two job sets of one call), then sleeps on a
 * condition. Nobody looks at all when there are more threads than cores, because the time would be taken from the
 * thread that has the work.
 *
 * Where threads run: a pool with a thread for every core binds each worker to a core of its own, all but the core its
 * first caller was on. A smaller pool leaves the choice to the kernel, because two small pools, or two processes,
 * would choose the same cores; on several nodes each worker stays on its node. The caller is never bound. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pool.h"

#include <signal.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* ---- jobs ------------------------------------------------------------------------------------------- */

static void report(struct kt_pool *p, int32_t done) {
    if (atomic_fetch_sub(&p->part->unfinished, done) != done || !atomic_load(&p->caller_sleeps)) return;
    pthread_mutex_lock(&p->lock);
    pthread_cond_signal(&p->done);
    pthread_mutex_unlock(&p->lock);
}

/* Take jobs of the current set and run them until none is left, those of `node` first. A thread reports what it did
 * together, except near the end, when the others may already be waiting for it. */
static void work(struct kt_pool *p, int thread, int node) {
    int32_t done = 0;
    for (int n = 0; n < p->nodes; n++) {
        struct part *part = &p->part[node];
        int32_t left = atomic_load(&part->left);
        while (left > 0 && (left = atomic_fetch_sub(&part->left, 1)) > 0) {
            part->fn(part->ctx, part->end - left, thread);
            done++;
            if (left-- > p->threads) continue;
            report(p, done);
            done = 0;
            if (left) left = atomic_load(&part->left);
        }
        if (++node == p->nodes) node = 0;
    }
    if (done) report(p, done);
}

static int has_work(struct kt_pool *p) {
    for (int n = 0; n < p->nodes; n++)
        if (atomic_load(&p->part[n].left) > 0) return 1;
    return atomic_load(&p->quit);
}

/* See the top of the file. Where the kernel refuses, the worker runs where its creator might. */
static void bind_worker(const struct kt_pool *p, struct seat seat) {
    struct kt_cpus cpus;
    const int core = p->threads == p->machine->cores ? seat.core : -1;
    kt_bind_thread(kt_topology_cpus(p->machine, core, seat.node, &cpus) ? &cpus : &p->machine->usable);
}

static void *worker_main(void *arg) {
    struct worker *w = arg;
    struct kt_pool *p = w->pool;
    const int node = w->seat.node;
    if (p->bind) bind_worker(p, w->seat);
    while (!atomic_load(&p->quit)) {
        work(p, w->index, node);
        int found = 0;
        for (int i = 0; i < p->looks && !(found = has_work(p)); i++) PAUSE();
        if (found) continue;
        pthread_mutex_lock(&p->lock);
        atomic_fetch_add(&p->sleepers, 1);
        while (!has_work(p)) pthread_cond_wait(&p->work, &p->lock);
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->lock);
    }
    return NULL;
}

/* The core that the calling thread is on, or the first seat's. */
static int callers_core(const struct kt_pool *p) {
    int cpu = kt_current_cpu();
    int core = cpu >= 0 && cpu < KT_MAX_CPUS ? p->machine->core_of[cpu] : -1;
    return core < 0 ? p->seats[0].core : core;
}
static int callers_node(const struct kt_pool *p) { return p->machine->core[callers_core(p)].node; }

/* The seat that the workers leave to the caller: its core's, else one on its node, else the first. */
static int callers_seat(const struct kt_pool *p) {
    int core = callers_core(p), best = 0;
    for (int i = p->threads - 1; i >= 0; i--) {
        if (p->seats[i].node == p->machine->core[core].node) best = i;
        if (p->seats[i].core == core) return i;
    }
    return best;
}

/* Workers start with the first job set, not with the pool: a pool that is never used costs nothing. Fewer
 * than asked for is not an error: the caller can do all the work. */
static void start_workers(struct kt_pool *p) {
    sigset_t all, old;
    int kept = callers_seat(p);
    sigfillset(&all); /* signals belong to the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (p->started < p->threads - 1) {
        struct worker *w = &p->workers[p->started + 1];
        *w = (struct worker){.pool = p, .index = p->started + 1, .seat = p->seats[p->started + (p->started >= kept)]};
        if (pthread_create(&w->id, NULL, worker_main, w)) break;
        p->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void kt_pool_stop(struct kt_pool *p) {
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->quit, 1);
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (; p->started; p->started--) pthread_join(p->workers[p->started].id, NULL);
    atomic_store(&p->quit, 0);
}

/* Hand out the jobs, work with the others, and wait for the last of them. */
static void run(struct kt_pool *p, kt_job_fn fn, void *ctx, const int32_t *jobs_of_node, int nodes, int32_t jobs) {
    if (p->started < p->threads - 1) start_workers(p);
    atomic_store(&p->part->unfinished, jobs);
    int32_t end = 0;
    for (int n = 0; n < nodes; n++) {
        struct part *part = &p->part[n];
        part->fn = fn;
        part->ctx = ctx;
        part->end = end += jobs_of_node[n];
        atomic_store(&part->left, jobs_of_node[n]);
    }
    if (atomic_load(&p->sleepers)) { /* a worker counts itself before its last look for jobs */
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->work);
        pthread_mutex_unlock(&p->lock);
    }

    work(p, 0, nodes > 1 ? callers_node(p) : 0);
    for (int i = 0; i < p->looks; i++) {
        if (!atomic_load(&p->part->unfinished)) return;
        PAUSE();
    }
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_sleeps, 1);
    while (atomic_load(&p->part->unfinished)) pthread_cond_wait(&p->done, &p->lock);
    atomic_store(&p->caller_sleeps, 0);
    pthread_mutex_unlock(&p->lock);
}

void kt_pool_run(kt_pool *p, kt_job_fn fn, void *ctx, int32_t jobs) {
    if (jobs > 1 && p->threads > 1) {
        run(p, fn, ctx, &jobs, 1, jobs);
        return;
    }
    for (int32_t i = 0; i < jobs; i++) fn(ctx, i, 0);
}

void kt_pool_run_sharded(kt_pool *p, kt_job_fn fn, void *ctx, const int32_t *jobs_of_node) {
    int32_t jobs = 0;
    for (int n = 0; n < p->nodes; n++) jobs += jobs_of_node[n];
    if (p->nodes > 1 && jobs > 1 && p->threads > 1)
        run(p, fn, ctx, jobs_of_node, p->nodes, jobs);
    else
        kt_pool_run(p, fn, ctx, jobs);
}
