/* bench.c: the machine's limits, measured with the same threads that do the work. */
#include <stdatomic.h>
#include <stdint.h>

#include "../../include/kt_native.h"
#include "../kernels.h"
#include "../threads/threads.h"

enum { READ_BLOCK = 256 * 1024 };

struct read_job {
    const struct kt_kernels *k;
    const uint8_t *data;
    size_t bytes;
    int64_t blocks, per_job;
    _Atomic(uint64_t) mix;
};

/* A job reads one contiguous stretch, as a worker on weights does. */
static void read_stretch(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct read_job *r = ctx;
    size_t stretch = (size_t)r->per_job * READ_BLOCK, at = (size_t)job * stretch;
    size_t n = r->bytes - at < stretch ? r->bytes - at : stretch;
    atomic_fetch_xor(&r->mix, r->k->read(r->data + at, n));
}

uint64_t kt_bench_read(kt_pool *pool, const void *data, size_t bytes) {
    if (!pool || !data || !bytes) return 0;
    struct read_job r = {.k = kt_kernels(), .data = data, .bytes = bytes};
    r.blocks = (int64_t)((bytes + READ_BLOCK - 1) / READ_BLOCK);
    r.per_job = 1 + r.blocks / 1000000;
    kt_pool_lock(pool);
    kt_pool_run(pool, read_stretch, &r, (int32_t)((r.blocks + r.per_job - 1) / r.per_job));
    kt_pool_unlock(pool);
    return r.mix;
}

enum { PEAK_PIECES = 16 }; /* jobs a thread: on a busy machine the free core takes more of them */

struct peak_job {
    const struct kt_kernels *k;
    int kind;
    int64_t iterations;
    double operations; /* of one job, the same for all */
};

static void peak_once(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct peak_job *p = ctx;
    double done = p->k->peak(p->kind, p->iterations);
    if (job == 0) p->operations = done;
}

double kt_bench_peak(kt_pool *pool, int kind, int64_t iterations) {
    if (!pool || iterations < 1 || kind < KT_PEAK_INT8 || kind > KT_PEAK_F32) return 0;
    struct peak_job p = {.k = kt_kernels(), .kind = kind, .iterations = (iterations + PEAK_PIECES - 1) / PEAK_PIECES};
    const int jobs = kt_pool_threads(pool) * PEAK_PIECES;
    kt_pool_lock(pool);
    kt_pool_run(pool, peak_once, &p, jobs);
    kt_pool_unlock(pool);
    return p.operations * jobs;
}
