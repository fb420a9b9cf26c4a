/* races.c: the pool, sharded job sets, the queue and gradients from many threads at once, for ThreadSanitizer. Built
 * and run by ../sanitize.py --threads. No fork, which that sanitizer cannot follow; tests/native/test_threads.py forks.
 *
 * With the argument "cost" it measures instead what a job set and a queue cost beyond their work. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../src/threads/threads.h"

enum { JOBS = 97, CALLERS = 4, NODES = KT_MAX_NODES };

static _Atomic(int) failures;

static void check(int ok, const char *what) {
    if (ok) return;
    failures++;
    fprintf(stderr, "FAILED: %s\n", what);
}

static kt_pool *new_pool(int threads, const char *nodes) {
    kt_pool *pool = NULL;
    check(kt_pool_create_on(threads, 1, nodes, &pool) == KT_OK, "create");
    return pool;
}

/* ---- job sets --------------------------------------------------------------------------------------- */

/* Plain, not atomic: a job that two threads run, or a set that ends too early, is a race that the sanitizer sees. */
struct tally {
    int count[JOBS];
    int sum;
};

static void count(void *ctx, int32_t i, int thread) {
    struct tally *t = ctx;
    check(thread >= 0, "thread");
    t->count[i]++;
    if (i % 31 == 30) usleep(50); /* one thread is late, and others may fall asleep */
}

/* Cut `jobs` over the pool's nodes, as its shares say or all to one. */
static void cut(const kt_pool *pool, int32_t jobs, int round, int32_t *jobs_of_node) {
    int64_t begin[NODES + 1];
    const int nodes = kt_pool_nodes(pool);
    kt_pool_shard(pool, jobs, round % 5 + 1, begin);
    check(begin[0] == 0 && begin[nodes] == jobs, "shards cover everything");
    for (int n = 0; n < nodes; n++) {
        check(begin[n] <= begin[n + 1], "shards in order");
        jobs_of_node[n] = round % 4 ? (int32_t)(begin[n + 1] - begin[n]) : n == round % nodes ? jobs : 0;
    }
}

static void run_often(kt_pool *pool, int rounds) {
    for (int r = 0; r < rounds; r++) {
        struct tally t = {0};
        int32_t jobs = r * 7 % (JOBS + 1), jobs_of_node[NODES];
        kt_pool_lock(pool);
        cut(pool, jobs, r, jobs_of_node);
        if (r % 2)
            kt_pool_run_sharded(pool, count, &t, jobs_of_node);
        else
            kt_pool_run(pool, count, &t, jobs);
        int *shared = kt_pool_shared(pool, (size_t)(r + 1) * sizeof *shared);
        if (shared) shared[r] = r;
        kt_pool_unlock(pool);
        for (int32_t i = 0; i < JOBS; i++) check(t.count[i] == (i < jobs), "every job once");
        if (r % 16 == 0) usleep(500); /* long enough for the workers to fall asleep */
    }
}

static void *caller(void *pool) {
    run_often(pool, 60);
    return NULL;
}

static void *owner(void *nodes) {
    for (int threads = 1; threads < 7; threads++) {
        kt_pool *pool = new_pool(threads, nodes);
        check(kt_pool_threads(pool) == threads, "threads");
        run_often(pool, 20);
        if (threads % 2) usleep(1000); /* destroyed while its workers sleep, and while they do not */
        kt_pool_destroy(pool);
    }
    return NULL;
}

static void pools(void) {
    kt_pool *shared = new_pool(3, "0;1-2");
    pthread_t id[CALLERS + 3];
    const char *nodes[3] = {NULL, "0-1;2-5", "0;1;2;3"};
    for (int i = 0; i < CALLERS; i++) pthread_create(&id[i], NULL, caller, shared);
    for (int i = 0; i < 3; i++) pthread_create(&id[CALLERS + i], NULL, owner, (void *)nodes[i]);
    for (int i = 0; i < 40; i++) {
        check(kt_pool_resize(shared, 1 + i % 5) == KT_OK && kt_pool_threads(shared) == 1 + i % 5, "resize");
        int threads = 0;
        for (int n = 0; n < kt_pool_nodes(shared); n++) threads += kt_pool_node_threads(shared, n);
        check(threads == 1 + i % 5, "every thread has a node");
        usleep(300);
    }
    for (int i = 0; i < CALLERS + 3; i++) pthread_join(id[i], NULL);

    enum { BYTES = 40 << 20 };
    uint8_t *data = calloc(BYTES, 1);
    const struct kt_range ranges[] = {{data, BYTES / 2, 0}, {data + BYTES / 2, BYTES / 2 - 1, 1}, {data, 1, 7}};
    kt_pool_lock(shared);
    check(kt_pool_touch(shared, ranges, 3) == BYTES / 4096 + 1, "touch");
    kt_pool_unlock(shared);
    free(data);
    kt_pool_destroy(shared);
    kt_pool_destroy(new_pool(5, NULL)); /* never used */

    kt_pool *none = shared;
    check(kt_pool_create_on(2, 1, "0-", &none) == KT_ERR_THREADS && !none, "no list");
    check(kt_pool_create_on(-1, 1, NULL, &none) == KT_ERR_THREADS, "threads");
    check(kt_pool_resize(NULL, 1) == KT_ERR_NULL && !kt_pool_nodes(NULL), "null");
    kt_pool_destroy(NULL);
}

/* ---- the queue -------------------------------------------------------------------------------------- */

enum { ROWS = 40, COLS = 32, CALLS = 60 };

struct layer {
    float w[ROWS * COLS], x[COLS];
    kt_weight weight;
    kt_queue *queue;
};

static void init_layer(struct layer *l, kt_queue *queue) {
    for (int i = 0; i < ROWS * COLS; i++) l->w[i] = (float)(i % 7);
    for (int i = 0; i < COLS; i++) l->x[i] = 1.0f;
    l->weight = (kt_weight){.type = KT_TYPE_F32, .rows = ROWS, .cols = COLS, .data = l->w, .bytes = sizeof l->w};
    l->queue = queue;
}

static kt_call call_of(struct layer *l, float *out) {
    return (kt_call){.queue = l->queue, .weight = &l->weight, .input = l->x, .dtype = KT_F32, .tokens = 1, .out = out};
}

/* Submit and wait in turns; what was waited for is there. */
static void *producer(void *arg) {
    struct layer *l = arg;
    float out[CALLS][ROWS] = {{0}};
    int64_t number = 0, before = 0, failed;
    for (int i = 0; i < CALLS; i++) {
        kt_weight weight = l->weight; /* copied by kt_submit: gone before it is used */
        kt_call call = call_of(l, out[i]);
        call.weight = &weight;
        check(kt_submit(&call, &number) == KT_OK && number > before, "numbers grow");
        memset(&weight, 0xff, sizeof weight);
        before = number;
        if (i % 10 == 9) {
            check(kt_sync(l->queue, i % 3, &failed, NULL) == KT_OK && failed == 0, "sync");
            check(kt_queue_done(l->queue) >= number - i % 3, "done");
        }
    }
    check(kt_sync(l->queue, 0, NULL, NULL) == KT_OK, "sync");
    for (int i = 0; i < CALLS; i++) check(out[i][0] != 0 && !memcmp(out[i], out[0], sizeof out[0]), "computed");
    return NULL;
}

static void queue_errors(struct layer *l) {
    float out[4][ROWS] = {{0}};
    int64_t numbers[4], failed = -1;
    for (int i = 0; i < 4; i++) {
        kt_call call = call_of(l, out[i]);
        if (i == 1) call.dtype = 9;
        if (i == 2) call.weight = NULL;
        check(kt_submit(&call, &numbers[i]) == KT_OK, "submit");
    }
    check(kt_sync(l->queue, 0, &failed, NULL) == KT_ERR_DTYPE && failed == numbers[1], "the first failure");
    check(kt_sync(l->queue, 0, &failed, NULL) == KT_OK && failed == 0, "told once");
    check(out[0][1] != 0 && out[3][1] != 0, "the others are computed");
    check(kt_submit(NULL, NULL) == KT_ERR_NULL && kt_sync(NULL, 0, NULL, NULL) == KT_ERR_NULL, "null");
    kt_call nowhere = {0};
    check(kt_submit(&nowhere, NULL) == KT_ERR_NULL, "no queue");
    kt_submit_host(NULL);
    kt_submit_host(&nowhere);
    kt_sync_host(NULL);

    void (*submit)(void *) = kt_submit_host, (*sync)(void *) = kt_sync_host; /* as a CUDA stream calls them */
    kt_call call = call_of(l, out[2]);
    kt_wait wait = {l->queue, 0};
    for (int i = 0; i < 3; i++) {
        memset(out[2], 0, sizeof out[2]);
        submit(&call);
        sync(&wait);
        check(out[2][1] != 0, "host functions");
    }
    call.tokens = -1;
    submit(&call);
    sync(&wait);
    check(kt_sync(l->queue, 5, &failed, NULL) == KT_ERR_SHAPE && failed > numbers[3], "a host function's failure is kept");
}

/* ---- the end of a queue while others wait ------------------------------------------------------------- */

enum { WAITERS = 4 };

struct waiter {
    kt_queue *queue;
    int host; /* waits as a CUDA stream does */
    int status;
};

static void *wait_for_all(void *arg) {
    struct waiter *w = arg;
    kt_wait wait = {w->queue, 0};
    if (w->host) kt_sync_host(&wait);
    else w->status = kt_sync(w->queue, 0, NULL, NULL);
    return NULL;
}

/* Calls are submitted until the queue is closed. */
static void *submit_for_ever(void *arg) {
    struct layer *l = arg;
    static float out[ROWS]; /* written by one thread, the queue's */
    kt_call call = call_of(l, out);
    while (kt_submit(&call, NULL) == KT_OK) sched_yield();
    return NULL;
}

/* Everybody leaves, with KT_ERR_CLOSED where calls were dropped; whoever comes later finds the queue closed. */
static void closing(void) {
    kt_pool *pool = new_pool(2, NULL);
    kt_queue *queue;
    struct layer l;
    struct waiter w[WAITERS];
    pthread_t id[WAITERS], submitter;
    check(kt_queue_create(pool, &queue) == KT_OK, "queue");
    init_layer(&l, queue);
    pthread_create(&submitter, NULL, submit_for_ever, &l);
    usleep(500);
    for (int i = 0; i < WAITERS; i++) {
        w[i] = (struct waiter){queue, i % 2, KT_OK};
        pthread_create(&id[i], NULL, wait_for_all, &w[i]);
    }
    usleep(500);
    kt_queue_close(queue);
    kt_queue_close(queue);
    kt_queue_close(NULL);
    for (int i = 0; i < WAITERS; i++) pthread_join(id[i], NULL);
    pthread_join(submitter, NULL);
    for (int i = 0; i < WAITERS; i++) check(w[i].status == KT_OK || w[i].status == KT_ERR_CLOSED, "woken");
    kt_call call = {.queue = queue};
    check(kt_submit(&call, NULL) == KT_ERR_CLOSED, "closed to calls");
    kt_queue_destroy(queue);
    kt_pool_destroy(pool);
}

static void queues(void) {
    kt_pool *pool[2] = {new_pool(3, NULL), new_pool(2, "0;1")};
    kt_queue *queue[3], *none;
    struct layer l[3];
    pthread_t id[6];
    check(kt_queue_create(NULL, &none) == KT_ERR_NULL && !none && kt_queue_create(pool[0], NULL) == KT_ERR_NULL,
          "null");
    for (int i = 0; i < 3; i++) {
        check(kt_queue_create(pool[i % 2], &queue[i]) == KT_OK, "queue");
        init_layer(&l[i], queue[i]);
    }
    for (int i = 0; i < 6; i++) pthread_create(&id[i], NULL, producer, &l[i % 3]);
    for (int i = 0; i < 10; i++) {
        usleep(200);
        kt_pool_resize(pool[0], 1 + i % 3);
    }
    for (int i = 0; i < 6; i++) pthread_join(id[i], NULL);
    queue_errors(&l[0]);

    static float out[CALLS][ROWS];
    for (int i = 0; i < CALLS; i++) { /* destroyed with calls pending */
        kt_call call = call_of(&l[1], out[i]);
        check(kt_submit(&call, NULL) == KT_OK, "submit");
    }
    for (int i = 0; i < 3; i++) kt_queue_destroy(queue[i]);
    kt_queue_create(pool[0], &none);
    kt_queue_destroy(none);
    kt_queue_destroy(NULL);
    for (int i = 0; i < 2; i++) kt_pool_destroy(pool[i]);
}

#include "races_backward.h"

/* ---- what it costs ---------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Both threads are in the set at once: the least time in which two threads can meet. */
struct meeting {
    _Atomic(int64_t) came;
    int64_t all;
};
static void meet(void *ctx, int32_t i, int thread) {
    (void)i;
    (void)thread;
    struct meeting *m = ctx;
    atomic_fetch_add(&m->came, 1);
    while (atomic_load(&m->came) < m->all) {}
}
static void nothing(void *ctx, int32_t i, int thread) { (void)ctx, (void)i, (void)thread; }

static void print_sorted(const char *what, double *us, int n) {
    qsort(us, (size_t)n, sizeof *us, ascending);
    printf("%-44s %8.3f us (median; 5 %%: %.3f, 95 %%: %.3f)\n", what, us[n / 2], us[n / 20], us[n - n / 20]);
}

static void cost(void) {
    enum { ROUNDS = 300, SETS = 300 };
    double us[ROUNDS];
    kt_pool *pool = new_pool(2, NULL);
    struct meeting m = {0};
    for (int r = 0; r < ROUNDS; r++) {
        us[r] = now();
        for (int i = 0; i < SETS; i++) {
            m.all += 2;
            kt_pool_run(pool, meet, &m, 2);
        }
        us[r] = (now() - us[r]) / SETS;
    }
    print_sorted("a set of 2 jobs that wait for each other", us, ROUNDS);
    for (int r = 0; r < ROUNDS; r++) {
        us[r] = now();
        for (int i = 0; i < SETS; i++) kt_pool_run(pool, nothing, NULL, 16);
        us[r] = (now() - us[r]) / SETS;
    }
    print_sorted("a set of 16 empty jobs", us, ROUNDS);
    for (int r = 0; r < ROUNDS; r++) {
        usleep(1000);
        us[r] = now();
        m.all += 2;
        kt_pool_run(pool, meet, &m, 2);
        us[r] = now() - us[r];
    }
    print_sorted("2 jobs that wait, workers asleep", us, ROUNDS);
    kt_queue *queue;
    struct layer l;
    float out[ROWS];
    kt_queue_create(pool, &queue);
    init_layer(&l, queue);
    kt_call call = call_of(&l, out);
    for (int r = 0; r < ROUNDS; r++) {
        us[r] = now();
        kt_linear(pool, &l.weight, NULL, l.x, KT_F32, 1, out);
        us[r] = now() - us[r];
    }
    print_sorted("a small kt_linear", us, ROUNDS);
    for (int r = 0; r < ROUNDS; r++) {
        us[r] = now();
        kt_submit(&call, NULL);
        kt_sync(queue, 0, NULL, NULL);
        us[r] = now() - us[r];
    }
    print_sorted("the same through a queue", us, ROUNDS);
    kt_queue_destroy(queue);
    kt_pool_destroy(pool);
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "cost")) {
        cost();
        return 0;
    }
    for (int i = 0; i < 20; i++) {
        pools();
        queues();
        closing();
    }
    gradients_of_two_sets();
    fprintf(stderr, failures ? "%d failures\n" : "pools, queues, gradients: no failures\n", (int)failures);
    return failures != 0;
}
