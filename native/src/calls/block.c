/* block.c: hidden -> factor * experts(hidden, router(hidden)) + shared_factor * gate(hidden) * shared(hidden).
 *
 * One token goes through decode.c, in three job sets. Several go step by step: the router, the shared expert into an
 * fp32 sum, the routed experts on top of it; weights are unpacked once for all tokens there, and steps are cheap. */
#include "block.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int kt_moe_create(const kt_moe_desc *d, kt_moe **moe) {
    if (!moe) return KT_ERR_NULL;
    *moe = NULL;
    if (!d || !d->router || !d->experts || (d->shared_gate && !d->shared)) return KT_ERR_NULL;
    struct kt_moe made = {.router = d->router, .experts = d->experts, .shared = d->shared,
                          .has_gate = d->shared_gate != NULL, .factor = d->factor, .shared_factor = d->shared_factor};
    const int64_t H = d->experts->hidden;
    int status = d->shared_gate ? kt_matrix_check(d->shared_gate, &made.shared_gate) : KT_OK;
    if (status) return status;
    if (d->router->w.cols != H) return KT_ERR_SHAPE;
    if (d->shared && (d->shared->count != 1 || d->shared->hidden != H)) return KT_ERR_SHAPE;
    if (d->shared_gate && (made.shared_gate.rows != 1 || made.shared_gate.cols != H)) return KT_ERR_SHAPE;
    struct kt_moe *m = malloc(sizeof *m);
    if (!m) return KT_ERR_MEMORY;
    *m = made;
    *moe = m;
    return KT_OK;
}

void kt_moe_destroy(kt_moe *m) { free(m); }

/* Some tokens of a call. */
struct chunk {
    const void *hidden;
    int dtype, out_dtype;
    int32_t tokens;
    void *out;
    int64_t *ids;               /* [T, K] */
    float *weights;             /* [T, K] */
    float *chosen_weights;      /* [T, K] for the caller, or NULL */
    float *sum;                 /* [T, H] of the shared expert */
    float *gate, *shared_weight; /* [T, 16] products, of which the first counts; [T] */
    int64_t *zeros;             /* [T] */
};

static void layout(const struct kt_moe *m, struct chunk *c, struct kt_arena *arena) {
    const int64_t pairs = (int64_t)c->tokens * m->router->d.top_k, shared = m->shared ? c->tokens : 0;
    c->ids = kt_arena_take(arena, pairs, sizeof *c->ids);
    c->weights = kt_arena_take(arena, pairs, sizeof *c->weights);
    c->sum = kt_arena_take(arena, shared * m->experts->hidden, sizeof *c->sum);
    c->gate = kt_arena_take(arena, m->has_gate ? shared * KT_TILE : 0, sizeof *c->gate);
    c->shared_weight = kt_arena_take(arena, shared, sizeof *c->shared_weight);
    c->zeros = kt_arena_take(arena, shared, sizeof *c->zeros);
}

/* The shared expert's part, with its factor and gate, into c->sum. */
static int run_shared(const struct kt_moe *m, kt_pool *pool, const struct chunk *c) {
    const struct kt_product gate = {.w = &m->shared_gate, .x = c->hidden, .dtype = c->dtype, .tokens = c->tokens,
                                    .out = c->gate, .ldo = KT_TILE};
    int status = m->has_gate ? kt_product_run(&gate, pool) : KT_OK;
    if (status) return status;
    for (int32_t t = 0; t < c->tokens; t++) {
        c->zeros[t] = 0;
        c->shared_weight[t] = m->shared_factor;
        if (m->has_gate) c->shared_weight[t] *= 1.0f / (1.0f + expf(-c->gate[t * KT_TILE]));
    }
    return kt_experts_run(m->shared, pool,
                          &(struct kt_experts_call){.hidden = c->hidden, .dtype = c->dtype, .tokens = c->tokens,
                                                    .ids = c->zeros, .per_token = 1, .weights = c->shared_weight,
                                                    .out = c->sum, .out_dtype = KT_F32});
}

static int run_chunk(const struct kt_moe *m, kt_pool *pool, struct chunk *c) {
    const int64_t K = m->router->d.top_k;
    struct kt_arena arena = {0};
    layout(m, c, &arena);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(m, c, &arena);
    int status = kt_router_run(m->router, pool, c->hidden, c->dtype, c->tokens, c->ids, c->weights, NULL);
    if (!status && m->shared) status = run_shared(m, pool, c);
    if (status) return status;
    if (c->chosen_weights) memcpy(c->chosen_weights, c->weights, (size_t)(c->tokens * K) * sizeof *c->weights);
    for (int64_t i = 0; i < c->tokens * K; i++) c->weights[i] *= m->factor;
    return kt_experts_run(m->experts, pool,
                          &(struct kt_experts_call){.hidden = c->hidden, .dtype = c->dtype, .tokens = c->tokens,
                                                    .ids = c->ids, .per_token = K, .weights = c->weights,
                                                    .start = m->shared ? c->sum : NULL, .out = c->out,
                                                    .out_dtype = c->out_dtype});
}

/* Where a block's call writes: the result, and the weights that the router gave, or NULL. */
struct target {
    void *out;
    int dtype;
    float *weights; /* [T, K] */
};

/* One token, unless it holds infinities or NaNs; then *finite is 0 and nothing is computed. */
static int run_one(const struct kt_moe *m, kt_pool *pool, const void *hidden, int dtype, const struct target *to,
                   int *finite) {
    struct kt_decode d = {.hidden = hidden, .dtype = dtype, .out = to->out, .out_dtype = to->dtype, .e = m->experts,
                          .slots = m->router->d.top_k, .router = m->router, .chosen_weights = to->weights,
                          .factor = m->factor, .shared = m->shared,
                          .gate = m->has_gate ? &m->shared_gate : NULL, .shared_factor = m->shared_factor};
    return kt_decode_run(&d, pool, finite);
}

/* At the level of scratch memory where the caller is. */
static int run(const struct kt_moe *m, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
               const struct target *to) {
    const int64_t H = m->experts->hidden, K = m->router->d.top_k;
    const int64_t chunk = kt_min(4096, 16 + ((int64_t)128 << 20) / (4 * H));
    const size_t row = (size_t)H * kt_dtype_size(dtype), out_row = (size_t)H * kt_dtype_size(to->dtype);
    int status = KT_OK, done = 0;
    if (tokens == 1 && !m->router->d.norm) status = run_one(m, pool, hidden, dtype, to, &done);
    if (done) return status;
    for (int64_t t = 0; t < tokens && !status; t += chunk) {
        struct chunk c = {.dtype = dtype, .out_dtype = to->dtype, .tokens = (int32_t)kt_min(tokens - t, chunk)};
        c.hidden = (const uint8_t *)hidden + (size_t)t * row;
        c.out = (uint8_t *)to->out + (size_t)t * out_row;
        c.chosen_weights = to->weights ? to->weights + t * K : NULL;
        status = run_chunk(m, pool, &c);
    }
    return status;
}

int kt_moe_run(const struct kt_moe *m, kt_pool *pool, const void *hidden, int dtype, int64_t tokens, void *out,
               int out_dtype) {
    kt_pool_enter(pool);
    int status = run(m, pool, hidden, dtype, tokens, &(struct target){out, out_dtype, NULL});
    kt_pool_leave(pool);
    return status;
}

int kt_moe_forward(const kt_moe *m, kt_pool *pool, const void *hidden, int dtype, int64_t tokens, void *out,
                   float *weights) {
    if (!m || !pool) return KT_ERR_NULL;
    if (tokens < 0 || tokens > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (tokens == 0) return KT_OK;
    if (!hidden || !out) return KT_ERR_NULL;
    kt_pool_lock(pool);
    int status = run(m, pool, hidden, dtype, tokens, &(struct target){out, dtype, weights});
    kt_pool_unlock(pool);
    return status;
}
