/* encode.c: floats to a packed format. Each block is encoded alone, so that no result depends on how they are cut into
 * jobs. No intrinsics here. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "../../include/kt_native.h"
#include "../formats/quants.h"
#include "../matmul/matmul.h"

enum {
    STAGE = 4096,     /* weights that are floats at once, a multiple of every block; stays in L1 */
    JOB = 8 * STAGE,
    MAX_JOBS = 1 << 24
};

struct encode {
    const struct kt_kernels *k;
    int format, dtype;
    int64_t cols, total, job; /* weights of a row, of all, of a job */
    const void *x;
    const float *importance; /* [cols], the largest 1; or NULL */
    uint8_t *out;
    float limit;             /* magnitude from which on a block does not hold a weight */
    float *stage;            /* [threads][2][STAGE] */
    atomic_int nonfinite, too_large;
};

/* The largest magnitude that blocks hold at either end: the largest fp16 scale times what multiplies it. An affine
 * block has no more below zero than its minimum. Q8_0: what fp16 rounds to infinity. 0: the type is not encoded. */
static float limit_of(int type) {
    switch (type) {
    case KT_TYPE_F32: return INFINITY;
    case KT_TYPE_F16: return 65520.0f;
    case KT_TYPE_BF16: return 0x1.ffp127f;
    case KT_TYPE_Q8_0: return 65520.0f * 127.0f;
    case KT_TYPE_Q4_0: return 65504.0f * 7.0f;
    case KT_TYPE_IQ4_NL: return 65504.0f * 113.0f;
    case KT_TYPE_Q2_K: return 65504.0f * 15.0f;
    case KT_TYPE_Q3_K: return 65504.0f * 31.0f * 3.0f;
    case KT_TYPE_Q4_K:
    case KT_TYPE_Q5_K: return 65504.0f * 63.0f;
    case KT_TYPE_Q6_K: return 65504.0f * 127.0f * 31.0f;
    case KT_TYPE_IQ4_XS: return 65504.0f * 31.0f * 113.0f;
    }
    return 0.0f;
}

int kt_encodes(int type) { return limit_of(type) > 0.0f; }

/* Note what cannot be encoded; returns whether all can. Integers: magnitudes order as their bits do. */
static int check_values(struct encode *e, const float *x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    if (kt_bits_float((uint32_t)most) < e->limit) return 1;
    const int block = kt_traits_table[e->format].block > 1;
    int32_t nonfinite = 0, large = 0;
    for (int64_t i = 0; i < n; i++) {
        nonfinite |= !isfinite(x[i]);
        large |= isfinite(x[i]) && fabsf(x[i]) >= e->limit;
    }
    if (block && nonfinite) atomic_store_explicit(&e->nonfinite, 1, memory_order_relaxed);
    if (large) atomic_store_explicit(&e->too_large, 1, memory_order_relaxed);
    return !large && !(block && nonfinite);
}

/* Importances of weights from `first` on, which need not begin a row. */
static const float *importances(const struct encode *e, int64_t first, int64_t n, float *out) {
    if (!e->importance) return NULL;
    for (int64_t done = 0, c = first % e->cols; done < n; c = 0) {
        const int64_t some = kt_min(n - done, e->cols - c);
        memcpy(out + done, e->importance + c, (size_t)some * sizeof *out);
        done += some;
    }
    return out;
}

static void encode_some(struct encode *e, int64_t first, int64_t n, float *stage) {
    const struct kt_traits *t = &kt_traits_table[e->format];
    uint8_t *out = e->out + (size_t)(first / t->block) * (size_t)t->bytes;
    kt_load_row(e->k, e->x, e->dtype, first, n, stage);
    if (!check_values(e, stage, n)) return;
    if (t->id == KT_TYPE_F32) memcpy(out, stage, (size_t)n * 4);
    else if (t->id == KT_TYPE_F16) e->k->to_f16(stage, n, (uint16_t *)out);
    else if (t->id == KT_TYPE_BF16) e->k->to_bf16(stage, n, (uint16_t *)out);
    else e->k->encode[e->format](stage, importances(e, first, n, stage + STAGE), n / t->block, out);
}

static void run_job(void *ctx, int32_t job, int thread) {
    struct encode *e = ctx;
    const int64_t end = kt_min((job + 1) * e->job, e->total);
    for (int64_t i = job * e->job; i < end; i += STAGE)
        encode_some(e, i, kt_min(end - i, STAGE), e->stage + 2 * STAGE * (size_t)thread);
}

/* The largest becomes 1, so that no sum overflows; none is below 1e-6 of it, so that no group is without any. */
static int scale_importance(const float *given, int64_t cols, float *out) {
    float most = 0.0f;
    for (int64_t i = 0; i < cols; i++) {
        if (!(given[i] >= 0.0f && given[i] <= 3e38f)) return KT_ERR_VALUE;
        most = given[i] > most ? given[i] : most;
    }
    for (int64_t i = 0; i < cols; i++) {
        const float w = most > 1e-30f ? given[i] / most : 1.0f;
        out[i] = w > 1e-6f ? w : 1e-6f;
    }
    return KT_OK;
}

static int all_one(const float *importance, int64_t cols) {
    for (int64_t i = 0; i < cols; i++)
        if (importance[i] != 1.0f) return 0;
    return 1;
}

static int check_sizes(const struct encode *e, int64_t rows, size_t bytes) {
    if (rows < 0 || rows > KT_MAX_DIM || e->cols < 1 || e->cols > KT_MAX_DIM) return KT_ERR_SHAPE;
    const struct kt_traits *t = &kt_traits_table[e->format];
    if (e->cols % t->block) return KT_ERR_BLOCK;
    return bytes == (size_t)rows * (size_t)(e->cols / t->block) * (size_t)t->bytes ? KT_OK : KT_ERR_BYTES;
}

static int run(struct encode *e, kt_pool *pool, const float *importance) {
    const size_t stage = (size_t)kt_pool_threads(pool) * 2 * STAGE;
    const size_t cols = importance ? (size_t)e->cols : 0;
    e->stage = kt_pool_shared(pool, (stage + cols) * sizeof *e->stage);
    if (!e->stage) return KT_ERR_MEMORY;
    e->importance = importance ? e->stage + stage : NULL;
    const int status = importance ? scale_importance(importance, e->cols, e->stage + stage) : KT_OK;
    if (status) return status;
    if (importance && all_one(e->importance, e->cols)) e->importance = NULL; /* the search is quicker without */
    e->job = JOB;
    while (e->total / e->job >= MAX_JOBS) e->job *= 2;
    kt_pool_run(pool, run_job, e, (int32_t)((e->total + e->job - 1) / e->job));
    return e->nonfinite ? KT_ERR_VALUE : e->too_large ? KT_ERR_RANGE : KT_OK;
}

int kt_encode(kt_pool *pool, int type, const void *x, int dtype, int64_t rows, int64_t cols, const float *importance,
              void *out, size_t out_bytes) {
    struct encode e = {.x = x, .dtype = dtype, .cols = cols, .out = out, .limit = limit_of(type)};
    if (!pool) return KT_ERR_NULL;
    if (!kt_encodes(type)) return KT_ERR_TYPE;
    e.format = kt_format_of(type);
    const int status = check_sizes(&e, rows, out_bytes);
    if (status) return status;
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (rows == 0) return KT_OK;
    if (!x || !out) return KT_ERR_NULL;
    e.total = rows * cols;
    kt_pool_lock(pool);
    e.k = kt_kernels();
    const int done = run(&e, pool, importance);
    kt_pool_unlock(pool);
    return done;
}
