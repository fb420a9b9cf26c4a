/* linear.c: out = x @ W^T + bias for one matrix. No intrinsics here. */
#include <string.h>

#include "../../include/kt_native.h"
#include "../matmul/matmul.h"

enum { CHUNK_TOKENS = 2048 }; /* at once: bounds the scratch memory; weights are read once a chunk */

struct linear {
    const struct kt_kernels *k;
    struct kt_matrix w;
    const float *bias;
    const void *x;
    void *out;
    int dtype, forms, rows, threads; /* forms: of activations, KT_NEED_... ; rows: of a job */
    int32_t tokens, per_job; /* of this chunk; per job while activations are prepared */
    struct kt_acts a;
    int32_t *token;                  /* 0, 1, 2, ... */
    struct kt_scratch *scratch;      /* one a thread */
    uint8_t nonfinite[CHUNK_TOKENS]; /* whether a token has infinities or NaNs, which int8 cannot hold */
};

static void prepare(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct linear *l = ctx;
    for (int64_t t = (int64_t)job * l->per_job; t < kt_min((int64_t)(job + 1) * l->per_job, l->tokens); t++) {
        kt_load_row(l->k, l->x, l->dtype, t * l->w.cols, l->w.cols, l->a.f + t * l->a.stride);
        l->nonfinite[t] = !kt_acts_derive(l->k, &l->a, t, l->forms);
    }
}

static void multiply(void *ctx, int32_t job, int thread) {
    struct linear *l = ctx;
    const struct kt_scratch *s = &l->scratch[thread];
    const int64_t first = (int64_t)job * l->rows;
    const int rows = (int)kt_min(l->w.rows - first, l->rows);
    const int64_t after = first + (int64_t)l->threads * l->rows; /* when the threads take turns */
    kt_matmul_block(&(struct kt_block){
        .k = l->k, .w = &l->w, .first = first, .rows = rows, .a = &l->a, .token = l->token, .tokens = l->tokens,
        .next = {after < l->w.rows ? &l->w : NULL, after}, .s = s, .c = s->c, .ldc = KT_BLOCK_ROWS});
    for (int64_t t = 0; t < l->tokens; t++) {
        float *c = s->c + t * KT_BLOCK_ROWS;
        for (int r = 0; l->bias && r < rows; r++) c[r] += l->bias[first + r];
        kt_store_row(l->k, c, rows, l->dtype, l->out, t * l->w.rows + first);
    }
}

static void layout(struct linear *l, struct kt_arena *arena, int threads) {
    l->scratch = kt_arena_take(arena, threads, sizeof *l->scratch);
    l->token = kt_arena_take(arena, l->tokens, sizeof *l->token);
    kt_acts_take(arena, l->tokens, l->w.cols, l->forms, &l->a);
    for (int i = 0; i < threads; i++) {
        struct kt_scratch s;
        kt_scratch_take(arena, l->tokens, &s);
        if (arena->base) l->scratch[i] = s;
    }
}

static int run_chunk(struct linear *l, kt_pool *pool) {
    struct kt_arena arena = {0};
    layout(l, &arena, kt_pool_threads(pool));
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(l, &arena, kt_pool_threads(pool));
    for (int32_t t = 0; t < l->tokens; t++) l->token[t] = t;
    kt_pool_run(pool, prepare, l, (l->tokens + l->per_job - 1) / l->per_job);
    struct kt_shards shards; /* of one matrix: its jobs are its blocks */
    kt_pool_shard_jobs(pool, l->w.rows, KT_SHARD_ROWS, l->rows, 1, &shards);
    kt_pool_run_sharded(pool, multiply, l, shards.jobs_of_node);
    return KT_OK;
}

/* Tokens with infinities or NaNs once more, each alone, in fp32: see moe.c. */
static int run_nonfinite(const struct linear *l, kt_pool *pool) {
    const size_t size = kt_dtype_size(l->dtype);
    int status = KT_OK;
    for (int32_t t = 0; t < l->tokens && !status; t++) {
        if (!l->nonfinite[t]) continue;
        struct linear one = *l;
        one.k = kt_exact_kernels();
        one.tokens = 1;
        one.forms = 0;
        one.x = (const uint8_t *)l->x + (size_t)(t * l->w.cols) * size;
        one.out = (uint8_t *)l->out + (size_t)(t * l->w.rows) * size;
        status = run_chunk(&one, pool);
    }
    return status;
}

int kt_linear(kt_pool *pool, const kt_weight *w, const float *bias, const void *x, int dtype, int64_t tokens,
              void *out) {
    struct linear l = {.bias = bias, .x = x, .out = out, .dtype = dtype};
    if (!pool) return KT_ERR_NULL;
    int status = kt_matrix_check(w, &l.w);
    if (status) return status;
    if (tokens < 0 || tokens > KT_MAX_DIM) return KT_ERR_SHAPE;
    size_t size = kt_dtype_size(dtype);
    if (!size) return KT_ERR_DTYPE;
    if (tokens == 0) return KT_OK;
    if (!x || !out) return KT_ERR_NULL;

    kt_pool_lock(pool);
    l.k = kt_kernels();
    l.threads = kt_pool_threads(pool);
    l.rows = kt_job_rows(pool, l.w.rows);
    l.per_job = (int32_t)(1 + 16384 / l.w.cols);
    for (int64_t t = 0; t < tokens && !status; t += CHUNK_TOKENS) {
        l.tokens = (int32_t)kt_min(tokens - t, CHUNK_TOKENS);
        l.x = (const uint8_t *)x + (size_t)(t * l.w.cols) * size;
        l.out = (uint8_t *)out + (size_t)(t * l.w.rows) * size;
        l.forms = kt_forms_needed(l.k, &l.w, l.tokens, dtype);
        status = run_chunk(&l, pool);
        if (!status) status = run_nonfinite(&l, pool);
    }
    kt_pool_unlock(pool);
    return status;
}
