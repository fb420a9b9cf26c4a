/* queue.c: calls in order on a thread of their own. It computes nothing itself and knows no weights.
 *
 * Calls lie in a ring; number n is at n % capacity from its submission until it is done. The thread copies a call out
 * before it runs it, so that the ring may grow meanwhile.
 *
 * Closing wakes everybody who waits and returns when they have left and the thread has ended: what they waited for and
 * was dropped is an error of theirs, KT_ERR_CLOSED. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "../../include/kt_native.h"
#include "../threads/threads.h"

struct entry {
    kt_call call;
    kt_weight weight; /* what call.weight pointed to */
};

struct kt_queue {
    kt_pool *pool;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t more, fewer, left; /* a call came; one is done; somebody left a queue that is being closed */
    struct entry *ring; /* [capacity], a power of two */
    int64_t capacity;
    int64_t submitted, done;
    int64_t failed, tag; /* the number of a call and its tag */
    int status;          /* of `failed`, KT_OK if none */
    int started, closed;
    int inside; /* threads that wait, and the queue's own */
    pthread_t id;
    struct kt_queue *next; /* all queues, for fork */
};

/* ---- the thread ------------------------------------------------------------------------------------- */

static int compute(kt_pool *pool, const struct entry *e) {
    const kt_call *c = &e->call;
    if (c->experts)
        return kt_experts_forward(c->experts, pool, c->input, c->dtype, c->tokens, c->ids, c->per_token, c->weights,
                                  c->out);
    return kt_linear(pool, c->weight ? &e->weight : NULL, c->bias, c->input, c->dtype, c->tokens, c->out);
}

/* Functions without kt_ in their name are called with the lock held, but for compute and queue_main. */
static void fail(struct kt_queue *q, int status, int64_t number, int64_t tag) {
    if (!status || q->status) return;
    q->status = status;
    q->failed = number;
    q->tag = tag;
}

static void leave(struct kt_queue *q) {
    q->inside--;
    if (q->closed) pthread_cond_broadcast(&q->left);
}

static void *queue_main(void *arg) {
    struct kt_queue *q = arg;
    kt_pool_adopt(q->pool);
    pthread_mutex_lock(&q->lock);
    for (;;) {
        while (q->done == q->submitted && !q->closed) pthread_cond_wait(&q->more, &q->lock);
        if (q->closed) break;
        const struct entry e = q->ring[(q->done + 1) & (q->capacity - 1)];
        pthread_mutex_unlock(&q->lock);
        int status = compute(q->pool, &e);
        pthread_mutex_lock(&q->lock);
        fail(q, status, ++q->done, e.call.tag);
        pthread_cond_broadcast(&q->fewer);
    }
    leave(q);
    pthread_mutex_unlock(&q->lock);
    return NULL;
}

static int start(struct kt_queue *q) {
    if (q->started) return KT_OK;
    sigset_t all, old;
    sigfillset(&all); /* signals belong to the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    q->started = !pthread_create(&q->id, NULL, queue_main, q);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    q->inside += q->started;
    return q->started ? KT_OK : KT_ERR_THREADS;
}

/* ---- fork ------------------------------------------------------------------------------------------- */

/* fork() copies the caller's thread only. All locks are held across it, so that the child finds every queue whole; it
 * computes what is pending anew, the call that was under way included, once somebody submits or waits. */
static pthread_mutex_t queues_lock = PTHREAD_MUTEX_INITIALIZER;
static struct kt_queue *queues;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void init_sync(struct kt_queue *q) {
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->more, NULL);
    pthread_cond_init(&q->fewer, NULL);
    pthread_cond_init(&q->left, NULL);
    q->started = q->inside = 0;
}

static void before_fork(void) {
    pthread_mutex_lock(&queues_lock);
    for (struct kt_queue *q = queues; q; q = q->next) pthread_mutex_lock(&q->lock);
}
static void after_fork_parent(void) {
    for (struct kt_queue *q = queues; q; q = q->next) pthread_mutex_unlock(&q->lock);
    pthread_mutex_unlock(&queues_lock);
}
static void after_fork_child(void) {
    for (struct kt_queue *q = queues; q; q = q->next) init_sync(q);
    pthread_mutex_unlock(&queues_lock);
}
static void watch_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* ---- the queue -------------------------------------------------------------------------------------- */

int kt_queue_create(kt_pool *pool, kt_queue **queue) {
    if (!queue) return KT_ERR_NULL;
    *queue = NULL;
    if (!pool) return KT_ERR_NULL;
    pthread_once(&fork_once, watch_fork);
    struct kt_queue *q = calloc(1, sizeof *q);
    if (!q) return KT_ERR_MEMORY;
    q->pool = pool;
    init_sync(q);
    pthread_mutex_lock(&queues_lock);
    q->next = queues;
    queues = q;
    pthread_mutex_unlock(&queues_lock);
    *queue = q;
    return KT_OK;
}

void kt_queue_close(kt_queue *q) {
    if (!q) return;
    pthread_mutex_lock(&q->lock);
    q->closed = 1;
    pthread_cond_broadcast(&q->more);
    pthread_cond_broadcast(&q->fewer);
    while (q->inside) pthread_cond_wait(&q->left, &q->lock);
    const pthread_t id = q->id;
    const int join = q->started; /* the first of several that close */
    q->started = 0;
    pthread_mutex_unlock(&q->lock);
    if (join) pthread_join(id, NULL);
}

static void forget(const struct kt_queue *q) {
    pthread_mutex_lock(&queues_lock);
    for (struct kt_queue **at = &queues; *at; at = &(*at)->next)
        if (*at == q) {
            *at = q->next;
            break;
        }
    pthread_mutex_unlock(&queues_lock);
}

void kt_queue_destroy(kt_queue *q) {
    if (!q) return;
    kt_queue_close(q);
    forget(q);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->more);
    pthread_cond_destroy(&q->fewer);
    pthread_cond_destroy(&q->left);
    free(q->ring);
    free(q);
}

/* Room for one more. */
static int grow(struct kt_queue *q) {
    if (q->submitted - q->done < q->capacity) return KT_OK;
    int64_t capacity = q->capacity ? 2 * q->capacity : 16;
    struct entry *ring = malloc((size_t)capacity * sizeof *ring);
    if (!ring) return KT_ERR_MEMORY;
    for (int64_t n = q->done + 1; n <= q->submitted; n++) ring[n & (capacity - 1)] = q->ring[n & (q->capacity - 1)];
    free(q->ring);
    q->ring = ring;
    q->capacity = capacity;
    return KT_OK;
}

static int append(struct kt_queue *q, const kt_call *call, int64_t *number) {
    if (q->closed) return KT_ERR_CLOSED;
    int status = grow(q);
    if (!status) status = start(q);
    if (status) return status;
    struct entry *e = &q->ring[++q->submitted & (q->capacity - 1)];
    *e = (struct entry){.call = *call};
    if (call->weight) e->weight = *call->weight;
    if (number) *number = q->submitted;
    pthread_cond_signal(&q->more);
    return KT_OK;
}

int kt_submit(const kt_call *call, int64_t *number) {
    if (number) *number = 0;
    if (!call || !call->queue) return KT_ERR_NULL;
    pthread_mutex_lock(&call->queue->lock);
    int status = append(call->queue, call, number);
    pthread_mutex_unlock(&call->queue->lock);
    return status;
}

static int wait_for(struct kt_queue *q, int64_t allow_pending) {
    const int64_t until = q->submitted - (allow_pending > 0 ? allow_pending : 0);
    if (q->done < until && !q->closed && start(q)) return KT_ERR_THREADS;
    q->inside++;
    while (q->done < until && !q->closed) pthread_cond_wait(&q->fewer, &q->lock);
    leave(q);
    return q->done < until ? KT_ERR_CLOSED : KT_OK;
}

int kt_sync(kt_queue *q, int64_t allow_pending, int64_t *failed, int64_t *tag) {
    if (failed) *failed = 0;
    if (tag) *tag = 0;
    if (!q) return KT_ERR_NULL;
    pthread_mutex_lock(&q->lock);
    int status = wait_for(q, allow_pending);
    if (!status && q->status) {
        status = q->status;
        if (failed) *failed = q->failed;
        if (tag) *tag = q->tag;
        q->status = KT_OK;
    }
    pthread_mutex_unlock(&q->lock);
    return status;
}

int64_t kt_queue_done(kt_queue *q) {
    if (!q) return 0;
    pthread_mutex_lock(&q->lock);
    int64_t done = q->done;
    pthread_mutex_unlock(&q->lock);
    return done;
}

void kt_submit_host(void *user) {
    const kt_call *call = user;
    if (!call || !call->queue) return;
    pthread_mutex_lock(&call->queue->lock);
    fail(call->queue, append(call->queue, call, NULL), 0, call->tag);
    pthread_mutex_unlock(&call->queue->lock);
}

void kt_sync_host(void *user) {
    const kt_wait *wait = user;
    if (!wait || !wait->queue) return;
    pthread_mutex_lock(&wait->queue->lock);
    fail(wait->queue, wait_for(wait->queue, wait->allow_pending), 0, 0);
    pthread_mutex_unlock(&wait->queue->lock);
}
