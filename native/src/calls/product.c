/* product.c: see product.h. Jobs: some tokens to prepare, then blocks of rows for all tokens. */
#include "product.h"

#include <math.h>
#include <string.h>

#include "../formats/quants.h"
#include "rows.h"

struct work {
    struct kt_product p;
    const struct kt_kernels *k;
    struct kt_acts a;
    int32_t *token;  /* 0, 1, 2, ... */
    uint8_t *finite; /* [T] */
    struct kt_scratch *scratch;
    int forms, rows, threads;
    int32_t per_job;
};

float kt_rounded(float x, int dtype) {
    if (dtype == KT_BF16) return kt_bf16_to_f32(kt_f32_to_bf16(x));
    return dtype == KT_F16 ? kt_f16_to_f32(kt_f32_to_f16(x)) : x;
}

static void normalize(const struct kt_norm *norm, int dtype, int64_t n, float *x) {
    const float scale = 1.0f / sqrtf(kt_mean_square(x, n) + norm->eps);
    const int as = norm->round ? dtype : KT_F32;
    for (int64_t i = 0; i < n; i++)
        x[i] = kt_rounded(kt_rounded(kt_rounded(x[i] * scale, as) * norm->weight[i], as) * norm->factor, as);
}

static void prepare(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct work *w = ctx;
    const int64_t H = w->p.w->cols, end = kt_min((int64_t)(job + 1) * w->per_job, w->p.tokens);
    for (int64_t t = (int64_t)job * w->per_job; t < end; t++) {
        float *x = w->a.f + t * w->a.stride;
        kt_load_row(w->k, w->p.x, w->p.dtype, t * H, H, x);
        if (w->p.norm) normalize(w->p.norm, w->p.dtype, H, x);
        w->finite[t] = (uint8_t)kt_acts_derive(w->k, &w->a, t, w->forms);
    }
}

static void multiply(void *ctx, int32_t job, int thread) {
    struct work *w = ctx;
    const int64_t first = (int64_t)job * w->rows, after = first + (int64_t)w->threads * w->rows;
    kt_matmul_block(&(struct kt_block){
        .k = w->k, .w = w->p.w, .first = first, .rows = (int)kt_min(w->p.w->rows - first, w->rows), .a = &w->a,
        .token = w->token, .tokens = w->p.tokens, .next = {after < w->p.w->rows ? w->p.w : NULL, after},
        .s = &w->scratch[thread], .c = w->p.out + first, .ldc = w->p.ldo});
}

static void layout(struct work *w, struct kt_arena *arena) {
    w->token = kt_arena_take(arena, w->p.tokens, sizeof *w->token);
    w->finite = kt_arena_take(arena, w->p.tokens, 1);
    w->scratch = kt_arena_take(arena, w->threads, sizeof *w->scratch);
    kt_acts_take(arena, w->p.tokens, w->p.w->cols, w->forms, &w->a);
    for (int i = 0; i < w->threads; i++) {
        struct kt_scratch s;
        kt_scratch_take(arena, 0, &s);
        if (arena->base) w->scratch[i] = s;
    }
}

static int run(struct work *w, kt_pool *pool) {
    const struct kt_matrix *m = w->p.w;
    w->threads = kt_pool_threads(pool);
    w->rows = kt_job_rows(pool, m->rows);
    w->per_job = (int32_t)(1 + 16384 / m->cols);
    const int exact = w->p.norm && !w->p.norm->round; /* what it gives has fp32's precision, whatever came in */
    w->forms = kt_forms_needed(w->k, m, w->p.tokens, exact ? KT_F32 : w->p.dtype);
    struct kt_arena arena = {0};
    layout(w, &arena);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(w, &arena);
    for (int32_t t = 0; t < w->p.tokens; t++) w->token[t] = t;
    kt_pool_run(pool, prepare, w, (w->p.tokens + w->per_job - 1) / w->per_job);
    struct kt_shards shards; /* of one matrix: its jobs are its blocks */
    kt_pool_shard_jobs(pool, m->rows, KT_SHARD_ROWS, w->rows, 1, &shards);
    kt_pool_run_sharded(pool, multiply, w, shards.jobs_of_node);
    return KT_OK;
}

/* Tokens that int8 cannot hold once more, each alone, in fp32: see moe.c. Their list is at the level of `w`. */
static int run_nonfinite(const struct work *w, kt_pool *pool) {
    int status = KT_OK;
    kt_pool_enter(pool);
    for (int32_t t = 0; t < w->p.tokens && !status; t++) {
        if (w->finite[t]) continue;
        struct work one = {.p = w->p, .k = kt_exact_kernels()};
        one.p.tokens = 1;
        one.p.x = (const uint8_t *)w->p.x + (size_t)(t * w->p.w->cols) * kt_dtype_size(w->p.dtype);
        one.p.out = w->p.out + t * w->p.ldo;
        status = run(&one, pool);
    }
    kt_pool_leave(pool);
    return status;
}

int kt_product_run(const struct kt_product *p, kt_pool *pool) {
    struct work w = {.p = *p, .k = kt_kernels()};
    kt_pool_enter(pool);
    int status = run(&w, pool);
    if (!status) status = run_nonfinite(&w, pool);
    kt_pool_leave(pool);
    return status;
}
