/* linear_backward.c: d_x = d_y @ W, the gradient of what a linear was given. No intrinsics here. */
#include "../../include/kt_native.h"
#include "../matmul/transposed.h"

enum {
    CHUNK_TOKENS = 2048, /* at once: bounds the scratch memory; weights are read once a chunk */
    JOB_TOKENS = 256,    /* many enough to repay unpacking the weights again for those after them */
};

struct backward {
    const struct kt_kernels *k;
    struct kt_matrix w;
    const void *d_y;
    void *d_x;
    int dtype, forms, cols; /* cols: of a job */
    int32_t tokens, per_job, pieces; /* of this chunk; per job while d_y is prepared; pieces of it, a job each */
    struct kt_acts d;
    int32_t *token;             /* 0, 1, 2, ... */
    struct thread {
        struct kt_scratch s;
        uint32_t *panel;
        float *c; /* [JOB_TOKENS][KT_BLOCK_COLS] */
    } *thread;
};

static void prepare(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct backward *b = ctx;
    for (int64_t t = (int64_t)job * b->per_job; t < kt_min((int64_t)(job + 1) * b->per_job, b->tokens); t++) {
        kt_load_row(b->k, b->d_y, b->dtype, t * b->w.rows, b->w.rows, b->d.f + t * b->d.stride);
        kt_acts_derive(b->k, &b->d, t, b->forms);
    }
}

static void multiply(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    const struct thread *mine = &b->thread[thread];
    const int64_t first = (int64_t)(job / b->pieces) * b->cols, from = (int64_t)(job % b->pieces) * JOB_TOKENS;
    const int cols = (int)kt_min(b->w.cols - first, b->cols), tokens = (int)kt_min(b->tokens - from, JOB_TOKENS);
    kt_transposed_block(&(struct kt_transposed){
        .k = b->k, .w = &b->w, .first = first, .cols = cols, .forms = b->forms, .d = &b->d, .token = b->token + from,
        .tokens = tokens, .s = &mine->s, .panel = mine->panel, .c = mine->c, .ldc = KT_BLOCK_COLS});
    for (int64_t t = 0; t < tokens; t++)
        kt_store_row(b->k, mine->c + t * KT_BLOCK_COLS, cols, b->dtype, b->d_x, (from + t) * b->w.cols + first);
}

static void layout(struct backward *b, struct kt_arena *arena, int threads) {
    b->thread = kt_arena_take(arena, threads, sizeof *b->thread);
    b->token = kt_arena_take(arena, b->tokens, sizeof *b->token);
    kt_acts_take(arena, b->tokens, b->w.rows, b->forms, &b->d);
    for (int i = 0; i < threads; i++) {
        struct thread t;
        kt_scratch_take(arena, 0, &t.s);
        t.panel = kt_transposed_take(arena);
        t.c = kt_arena_take(arena, JOB_TOKENS * KT_BLOCK_COLS, sizeof *t.c);
        if (arena->base) b->thread[i] = t;
    }
}

static int run_chunk(struct backward *b, kt_pool *pool) {
    const int threads = kt_pool_threads(pool);
    struct kt_arena arena = {0};
    layout(b, &arena, threads);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(b, &arena, threads);
    for (int32_t t = 0; t < b->tokens; t++) b->token[t] = t;
    b->pieces = (b->tokens + JOB_TOKENS - 1) / JOB_TOKENS;
    b->cols = kt_job_cols(pool, &b->w, b->pieces);
    const int64_t jobs = (b->w.cols + b->cols - 1) / b->cols * b->pieces;
    if (jobs > INT32_MAX) return KT_ERR_SHAPE;
    kt_pool_run(pool, prepare, b, (b->tokens + b->per_job - 1) / b->per_job);
    kt_pool_run(pool, multiply, b, (int32_t)jobs);
    return KT_OK;
}

int kt_linear_backward(kt_pool *pool, const kt_weight *w, const void *d_y, int dtype, int64_t tokens, void *d_x) {
    struct backward b = {.dtype = dtype};
    if (!pool) return KT_ERR_NULL;
    int status = kt_matrix_check(w, &b.w);
    if (status) return status;
    if (tokens < 0 || tokens > KT_MAX_DIM) return KT_ERR_SHAPE;
    const size_t size = kt_dtype_size(dtype);
    if (!size) return KT_ERR_DTYPE;
    if (tokens == 0) return KT_OK;
    if (!d_y || !d_x) return KT_ERR_NULL;

    kt_pool_lock(pool);
    b.k = kt_kernels();
    b.forms = kt_transposed_forms(b.k, &b.w, dtype);
    b.per_job = (int32_t)(1 + 16384 / b.w.rows);
    for (int64_t t = 0; t < tokens && !status; t += CHUNK_TOKENS) {
        b.tokens = (int32_t)kt_min(tokens - t, CHUNK_TOKENS);
        b.d_y = (const uint8_t *)d_y + (size_t)(t * b.w.rows) * size;
        b.d_x = (uint8_t *)d_x + (size_t)(t * b.w.cols) * size;
        status = run_chunk(&b, pool);
    }
    kt_pool_unlock(pool);
    return status;
}
