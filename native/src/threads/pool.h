/* pool.h: the pool from inside, for threads.c and pool.c alone. */
#ifndef KT_POOL_H
#define KT_POOL_H

#include <pthread.h>
#include <stdatomic.h>

#include "threads.h"
#include "topology.h"

enum { MAX_THREADS = 1024, LOOKS = 2000 /* about 20-50 us of pauses */ };

/* Where a thread belongs. */
struct seat {
    int32_t core, node;
};

struct worker {
    struct kt_pool *pool;
    pthread_t id;
    int index;
    struct seat seat;
};

/* A node's part of the job set, in one cache line: all that a thread touches to take a job and report it. */
struct part {
    _Alignas(64) _Atomic(int32_t) left; /* jobs not yet taken; below zero when threads asked in vain */
    _Atomic(int32_t) unfinished; /* the first part's counts for the whole set */
    int32_t end;                 /* one past the part's last job */
    kt_job_fn fn;
    void *ctx;
};

struct kt_pool {
    struct part part[KT_MAX_NODES];

    /* Read while waiting, changed with the pool's shape only. */
    _Alignas(64) _Atomic(int) nodes;
    int looks;   /* polls before sleeping */
    int started; /* workers running; 0 until the first job set, and again after fork */
    _Atomic(int) threads; /* the caller included */

    _Alignas(64) pthread_mutex_t lock; /* guards the two conditions */
    pthread_cond_t work, done;
    _Atomic(int) sleepers, caller_sleeps, quit;

    pthread_mutex_t owner; /* held for a whole public call */
    struct {
        void *data;
        size_t bytes;
    } shared[KT_POOL_LEVELS]; /* scratch memory, one piece a level */
    int level;                /* of the run under way; 0 between calls */
    struct worker *workers; /* [threads], the first unused */
    struct seat *seats;     /* [threads], by node; the caller has one of them */
    struct kt_topology *machine;
    _Atomic(int32_t) seats_of[KT_MAX_NODES]; /* threads of each node */
    int bind;
    char *nodes_text;     /* of kt_pool_create_on, or NULL */
    struct kt_pool *next; /* all pools, for fork */
};

/* End the workers; the next job set starts them anew. Call with `owner` held. */
void kt_pool_stop(struct kt_pool *pool);

#endif
