/* threads.h: a persistent pool. A job set is split over the workers and the calling thread. */
#ifndef KT_THREADS_H
#define KT_THREADS_H

#include <stddef.h>
#include <stdint.h>

#include "../../include/kt_native.h"

enum {
    KT_MAX_NODES = 64,
    KT_POOL_LEVELS = 8 /* of scratch memory: a layer, its block of experts, their router, its product, and some to spare */
};

/* A job: `index` of the set, `thread` in 0..threads-1 (0 is the caller), for per-thread scratch. */
typedef void (*kt_job_fn)(void *ctx, int32_t index, int thread);

/* Run fn(ctx, i, thread) for every i < jobs; returns when all are done. Call between lock and unlock. */
void kt_pool_run(kt_pool *pool, kt_job_fn fn, void *ctx, int32_t jobs);

/* The same with jobs that belong to nodes: the first jobs_of_node[0] indices to node 0, the next to node 1, and so on
 * for kt_pool_nodes(pool) nodes. A thread takes its own node's jobs first and then helps the others. The sum must
 * fit an int32_t. With one node this is kt_pool_run. */
void kt_pool_run_sharded(kt_pool *pool, kt_job_fn fn, void *ctx, const int32_t *jobs_of_node);

/* Cut `total` things, in whole multiples of `unit`, into one range a node, by its share of the threads: node n has
 * begin[n] .. begin[n + 1]. A node may get none. */
void kt_pool_shard(const kt_pool *pool, int64_t total, int64_t unit, int64_t *begin);

/* The jobs of several matrices of equal shape: each node has the same blocks of rows in every one of them, and jobs are
 * numbered node by node, then matrix by matrix. */
struct kt_shards {
    int32_t jobs_of_node[KT_MAX_NODES], threads_of_node[KT_MAX_NODES];
    int32_t first_job[KT_MAX_NODES + 1], first_block[KT_MAX_NODES + 1];
};

/* Blocks have `block` rows; nodes meet at multiples of `unit` rows, which `block` divides, so that a node's rows do not
 * change with the size of a block. matrices * blocks must fit an int32_t. */
void kt_pool_shard_jobs(const kt_pool *pool, int64_t rows, int64_t unit, int block, int32_t matrices,
                        struct kt_shards *shards);

/* Which matrix and which block a job is; returns its node. */
static inline int kt_shard_job(const struct kt_shards *s, int32_t job, int32_t *matrix, int32_t *block) {
    int n = 0;
    while (job >= s->first_job[n + 1]) n++;
    const int32_t blocks = s->first_block[n + 1] - s->first_block[n];
    *matrix = (job - s->first_job[n]) / blocks;
    *block = s->first_block[n] + (job - s->first_job[n]) % blocks;
    return n;
}

/* One public call at a time owns the pool and its memory. */
void kt_pool_lock(kt_pool *pool);
void kt_pool_unlock(kt_pool *pool);

/* Let the calling thread run wherever the pool's threads may, whatever its creator was bound to. */
void kt_pool_adopt(kt_pool *pool);

/* The pool's scratch memory at this level, 64-byte aligned, at least `bytes`; grown, never shrunk: contents are lost
 * when it grows. NULL when out of memory. */
void *kt_pool_shared(kt_pool *pool, size_t bytes);

/* What runs inside another call (kt_..._run) takes its scratch memory one level deeper, so that the piece its caller
 * holds stays. Every enter has its leave; no deeper than KT_POOL_LEVELS - 1. */
void kt_pool_enter(kt_pool *pool);
void kt_pool_leave(kt_pool *pool);

/* Bytes that a node's threads will read. */
struct kt_range {
    const void *data;
    size_t bytes;
    int node;
};

/* Read one byte of every page of every range from a CPU of its node. Pages that are not in memory yet get
 * there by that, and the kernel puts them on the node of the thread that asks. Returns the number of pages. */
int64_t kt_pool_touch(kt_pool *pool, const struct kt_range *ranges, int32_t count);

#endif
