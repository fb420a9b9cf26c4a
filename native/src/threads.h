/* threads.h: a persistent pool. kt_pool_run splits a job set over the workers and the calling thread. */
#ifndef KT_THREADS_H
#define KT_THREADS_H

#include <stddef.h>
#include <stdint.h>

#include "../include/kt_native.h"

/* A job: `index` of the set, `thread` in 0..threads-1 (0 is the caller), for per-thread scratch. */
typedef void (*kt_job_fn)(void *ctx, int32_t index, int thread);

/* Run fn(ctx, i, thread) for every i < jobs; returns when all are done. Call between lock and unlock. */
void kt_pool_run(kt_pool *pool, kt_job_fn fn, void *ctx, int32_t jobs);

/* One public call at a time owns the pool and its memory. */
void kt_pool_lock(kt_pool *pool);
void kt_pool_unlock(kt_pool *pool);

/* The pool's scratch memory, 64-byte aligned, at least `bytes`; grown, never shrunk: contents are lost when
 * it grows. NULL when out of memory. */
void *kt_pool_shared(kt_pool *pool, size_t bytes);

#endif
