/* pool.c: the life of a pool: creation, size, NUMA shares, memory, fork. threads.c runs its job sets. */
#include "pool.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER; /* also held while a pool changes shape */
static struct kt_pool *pools;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

int kt_default_threads(void) {
    int n = kt_usable_cores("");
    return n > MAX_THREADS ? MAX_THREADS : n;
}

/* ---- seats ------------------------------------------------------------------------------------------ */

/* Threads of node n: its share of the cores, as long as there are no more threads than cores. */
static void take_seats(const struct kt_topology *m, int threads, struct seat *seats, _Atomic(int32_t) *seats_of) {
    int taken = 0;
    for (int n = 0; n < m->nodes; n++) {
        int upto = (int)(((int64_t)threads * m->first_core[n + 1] + m->cores / 2) / m->cores);
        int cores = m->first_core[n + 1] - m->first_core[n];
        seats_of[n] = upto - taken;
        for (int i = 0; taken < upto; i++, taken++)
            seats[taken] = (struct seat){.core = m->first_core[n] + i % cores, .node = n};
    }
}

/* Give the pool `threads` threads on today's machine; nothing changes on an error. */
static int reshape(struct kt_pool *p, int threads) {
    const int usable = kt_default_threads();
    struct kt_topology *machine = malloc(sizeof *machine);
    int status = machine ? kt_topology_read("", p->nodes_text, machine) : KT_ERR_MEMORY;
    if (!threads) threads = !status && machine->cores < usable ? machine->cores : usable;
    struct worker *workers = calloc((size_t)threads, sizeof *workers);
    struct seat *seats = calloc((size_t)threads, sizeof *seats);
    if (!status && (!workers || !seats)) status = KT_ERR_MEMORY;
    if (status) {
        free(machine);
        free(workers);
        free(seats);
        return status;
    }
    pthread_mutex_lock(&pools_lock);
    free(p->machine);
    free(p->workers);
    free(p->seats);
    p->machine = machine;
    p->workers = workers;
    p->seats = seats;
    p->nodes = machine->nodes;
    atomic_store(&p->threads, threads);
    p->looks = threads <= usable ? LOOKS : 0;
    take_seats(machine, threads, seats, p->seats_of);
    pthread_mutex_unlock(&pools_lock);
    return KT_OK;
}

/* ---- fork ------------------------------------------------------------------------------------------- */

static void init_sync(struct kt_pool *p) {
    pthread_mutex_init(&p->owner, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->done, NULL);
    for (int n = 0; n < KT_MAX_NODES; n++) atomic_store(&p->part[n].left, 0);
    atomic_store(&p->part->unfinished, 0);
    atomic_store(&p->sleepers, 0);
    atomic_store(&p->caller_sleeps, 0);
    atomic_store(&p->quit, 0);
    p->started = 0;
}

/* fork() copies the caller's thread only. In the child every pool forgets its workers and whatever call was
 * under way in another thread, and starts anew at its next job set. */
static void before_fork(void) { pthread_mutex_lock(&pools_lock); }
static void after_fork_parent(void) { pthread_mutex_unlock(&pools_lock); }
static void after_fork_child(void) {
    for (struct kt_pool *p = pools; p; p = p->next) {
        init_sync(p);
        memset(p->shared, 0, sizeof p->shared); /* the parent may have been about to replace one: let them go */
        p->level = 0;
    }
    pthread_mutex_unlock(&pools_lock);
}
static void watch_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* ---- the pool --------------------------------------------------------------------------------------- */

int kt_pool_create(int threads, kt_pool **pool) { return kt_pool_create_on(threads, 1, NULL, pool); }

int kt_pool_create_on(int threads, int bind, const char *nodes, kt_pool **pool) {
    if (!pool) return KT_ERR_NULL;
    *pool = NULL;
    if (threads < 0 || threads > MAX_THREADS) return KT_ERR_THREADS;
    pthread_once(&fork_once, watch_fork);
    struct kt_pool *p = aligned_alloc(_Alignof(struct kt_pool), sizeof *p);
    if (!p) return KT_ERR_MEMORY;
    memset(p, 0, sizeof *p);
    p->bind = bind;
    int status = KT_OK;
    if (nodes && !(p->nodes_text = strdup(nodes))) status = KT_ERR_MEMORY;
    if (!status) status = reshape(p, threads);
    if (status) {
        free(p->nodes_text);
        free(p);
        return status;
    }
    init_sync(p);
    pthread_mutex_lock(&pools_lock);
    p->next = pools;
    pools = p;
    pthread_mutex_unlock(&pools_lock);
    *pool = p;
    return KT_OK;
}

int kt_pool_resize(kt_pool *p, int threads) {
    if (!p) return KT_ERR_NULL;
    if (threads < 0 || threads > MAX_THREADS) return KT_ERR_THREADS;
    kt_pool_lock(p);
    kt_pool_stop(p);
    int status = reshape(p, threads);
    kt_pool_unlock(p);
    return status;
}

int kt_pool_threads(const kt_pool *p) { return p ? p->threads : 0; }

int kt_pool_nodes(const kt_pool *p) { return p ? p->nodes : 0; }

int kt_pool_node_threads(const kt_pool *p, int node) {
    return p && node >= 0 && node < p->nodes ? p->seats_of[node] : 0;
}

void kt_pool_destroy(kt_pool *p) {
    if (!p) return;
    kt_pool_lock(p); /* wait for a call under way */
    kt_pool_stop(p);
    kt_pool_unlock(p);
    pthread_mutex_lock(&pools_lock);
    for (struct kt_pool **at = &pools; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    pthread_mutex_unlock(&pools_lock);
    pthread_mutex_destroy(&p->owner);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->done);
    free(p->machine);
    free(p->workers);
    free(p->seats);
    free(p->nodes_text);
    for (int i = 0; i < KT_POOL_LEVELS; i++) free(p->shared[i].data);
    free(p);
}

void kt_pool_lock(kt_pool *p) { pthread_mutex_lock(&p->owner); }
void kt_pool_unlock(kt_pool *p) { pthread_mutex_unlock(&p->owner); }

void kt_pool_adopt(kt_pool *p) {
    kt_pool_lock(p); /* not while its shape changes */
    if (p->bind) kt_bind_thread(&p->machine->usable);
    kt_pool_unlock(p);
}

/* Large memory starts at a huge page and asks for more of them: activations of many tokens are read in no order that
 * the page walker could guess. */
static void *shared_memory(size_t bytes) {
    enum { HUGE = 2 << 20 };
    if (bytes < HUGE) return aligned_alloc(4096, bytes);
    void *memory = aligned_alloc(HUGE, (bytes + HUGE - 1) & ~(size_t)(HUGE - 1));
#ifdef MADV_HUGEPAGE
    if (memory) madvise(memory, bytes, MADV_HUGEPAGE); /* a wish: a kernel without them does as well */
#endif
    return memory;
}

void *kt_pool_shared(kt_pool *p, size_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL;
    if (bytes > p->shared[p->level].bytes) {
        bytes = (bytes + 4095) & ~(size_t)4095;
        free(p->shared[p->level].data);
        p->shared[p->level].data = shared_memory(bytes);
        p->shared[p->level].bytes = p->shared[p->level].data ? bytes : 0;
    }
    return p->shared[p->level].data;
}

void kt_pool_enter(kt_pool *p) { p->level++; }
void kt_pool_leave(kt_pool *p) { p->level--; }

size_t kt_pool_scratch_bytes(kt_pool *p) {
    if (!p) return 0;
    size_t bytes = 0;
    kt_pool_lock(p);
    for (int i = 0; i < KT_POOL_LEVELS; i++) bytes += p->shared[i].bytes;
    kt_pool_unlock(p);
    return bytes;
}

/* ---- NUMA shares ------------------------------------------------------------------------------------ */

void kt_pool_shard(const kt_pool *p, int64_t total, int64_t unit, int64_t *begin) {
    const int64_t units = total / unit, threads = p->threads;
    int64_t seats = 0;
    begin[0] = 0;
    for (int n = 0; n < p->nodes; n++) {
        seats += p->seats_of[n];
        begin[n + 1] = unit * ((units * seats + threads / 2) / threads);
    }
    begin[p->nodes] = total; /* a last part of a unit goes with the last node */
}

void kt_pool_shard_jobs(const kt_pool *p, int64_t rows, int64_t unit, int block, int32_t matrices,
                        struct kt_shards *s) {
    int64_t begin[KT_MAX_NODES + 1];
    kt_pool_shard(p, rows, unit, begin);
    s->first_job[0] = s->first_block[0] = 0;
    for (int n = 0; n < p->nodes; n++) {
        s->first_block[n + 1] = (int32_t)((begin[n + 1] + block - 1) / block);
        s->threads_of_node[n] = p->seats_of[n];
        s->jobs_of_node[n] = matrices * (s->first_block[n + 1] - s->first_block[n]);
        s->first_job[n + 1] = s->first_job[n] + s->jobs_of_node[n];
    }
}

enum { PAGE = 4096, STRETCH = 16 << 20 /* bytes of a job */ };

struct touch {
    struct kt_pool *pool;
    const struct kt_range *ranges;
    int32_t *first_job; /* [count + 1] */
    int32_t count;
    _Atomic(int64_t) pages;
};

/* The range that `job` is a part of. */
static int32_t range_of(const struct touch *t, int32_t job) {
    int32_t low = 0, high = t->count;
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (t->first_job[middle] <= job) low = middle;
        else high = middle;
    }
    return low;
}

/* Jobs lie in the order of the ranges, not of nodes, so the thread that took one may be of another node: it goes to
 * the range's node for the time of the job. Where that is not allowed it reads from where it is. */
static void touch_stretch(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct touch *t = ctx;
    const int32_t r = range_of(t, job);
    const struct kt_range *range = &t->ranges[r];
    struct kt_cpus own, cpus;
    int moved = t->pool->nodes > 1 && kt_thread_cpus(&own) &&
                kt_topology_cpus(t->pool->machine, -1, range->node, &cpus) && kt_bind_thread(&cpus);
    size_t at = (size_t)(job - t->first_job[r]) * STRETCH;
    const size_t end = range->bytes - at < STRETCH ? range->bytes : at + STRETCH;
    const volatile uint8_t *data = range->data;
    int64_t pages = 0;
    for (; at < end; at += PAGE, pages++) (void)data[at];
    (void)data[end - 1]; /* the data may begin in the middle of a page */
    atomic_fetch_add(&t->pages, pages);
    if (moved) kt_bind_thread(&own);
}

int64_t kt_pool_touch(kt_pool *p, const struct kt_range *ranges, int32_t count) {
    struct touch t = {.pool = p, .ranges = ranges, .count = count};
    t.first_job = malloc(((size_t)count + 1) * sizeof *t.first_job);
    if (!t.first_job) return 0;
    int64_t jobs = 0;
    for (int32_t i = 0; i < count; i++) {
        t.first_job[i] = (int32_t)jobs;
        jobs += (int64_t)((ranges[i].bytes + STRETCH - 1) / STRETCH);
    }
    t.first_job[count] = (int32_t)jobs;
    if (jobs <= INT32_MAX) kt_pool_run(p, touch_stretch, &t, (int32_t)jobs);
    free(t.first_job);
    return t.pages;
}
