/* router.c: which experts a token goes to, and with which weights: one formula with parameters for all families.
 *
 *   logit  = norm(x) @ W^T + bias, rounded to x's dtype where the model computes it so; cap * tanh(logit / cap)
 *   score  = logit | softmax(logit) | sigmoid(logit) | sqrt(softplus(logit))
 *   key    = score, score + b or logit + b; experts outside the best groups: -inf or 0
 *   ids    = the K largest keys; the lowest id first among equals; a NaN counts as larger than all numbers
 *   weight = score of the chosen | softmax or sigmoid of their logits
 *            divided by (their sum + eps) or max(their sum, eps); times factor; times factors[id]
 *
 * The product is a job set (product.c), the choice of a token a job: about a microsecond for 128 experts, scalar. */
#include "router.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../formats/quants.h"

enum { CHUNK_TOKENS = 4096 };

/* ---- creation --------------------------------------------------------------------------------------- */

static int in_range(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

static int check_choice(const kt_router_desc *d, int64_t experts) {
    if (!in_range(d->top_k, 1, experts) || d->groups < 0 || d->groups > experts) return KT_ERR_SHAPE;
    if (!in_range(d->score, KT_SCORE_NONE, KT_SCORE_SQRTSOFTPLUS) || !in_range(d->bias_on, KT_BIAS_ON_NONE, KT_BIAS_ON_LOGIT) ||
        !in_range(d->weigh, KT_WEIGH_SCORE, KT_WEIGH_SIGMOID) || !in_range(d->divide, KT_DIVIDE_NONE, KT_DIVIDE_CLAMP) ||
        !in_range(d->group_by, KT_GROUP_MAX, KT_GROUP_BEST2))
        return KT_ERR_ROUTER;
    if (d->bias_on != KT_BIAS_ON_NONE && !d->choice_bias) return KT_ERR_NULL;
    if (d->cap != d->cap || d->cap < 0.0f) return KT_ERR_ROUTER;
    if (!d->groups) return KT_OK;
    const int64_t size = experts / d->groups;
    if (experts % d->groups || !in_range(d->groups_kept, 1, d->groups)) return KT_ERR_SHAPE;
    if (d->group_by == KT_GROUP_BEST2 && size < 2) return KT_ERR_SHAPE;
    return d->top_k > size * d->groups_kept ? KT_ERR_SHAPE : KT_OK;
}

int kt_router_create(const kt_router_desc *d, kt_router **router) {
    if (!router) return KT_ERR_NULL;
    *router = NULL;
    if (!d) return KT_ERR_NULL;
    struct kt_router made = {.d = *d};
    int status = kt_matrix_check(d->weight, &made.w);
    if (!status && made.w.rows > 1 << 20) status = KT_ERR_SHAPE;
    if (!status) status = check_choice(d, made.w.rows);
    if (status) return status;
    made.d.weight = NULL;
    made.norm = (struct kt_norm){d->norm, d->norm_eps, d->norm_factor, d->round};
    struct kt_router *r = malloc(sizeof *r);
    if (!r) return KT_ERR_MEMORY;
    *r = made;
    *router = r;
    return KT_OK;
}

void kt_router_destroy(kt_router *r) { free(r); }

/* ---- the choice ------------------------------------------------------------------------------------- */

/* Whole numbers in the order of floats: -0 equals 0, a NaN of either sign is above infinity. */
static int32_t order_of(float x) {
    if (x != x) return INT32_MAX;
    const int32_t bits = (int32_t)kt_float_bits(x == 0.0f ? 0.0f : x);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

/* The k largest of n values, best first: each is sorted into those kept so far, behind its equals. */
static void best_of(const float *v, int32_t n, int32_t k, int32_t *best) {
    int32_t have = 0;
    for (int32_t i = 0; i < n; i++) {
        const int32_t order = order_of(v[i]);
        if (have == k && order_of(v[best[k - 1]]) >= order) continue;
        int32_t at = have < k ? have++ : k - 1;
        for (; at > 0 && order_of(v[best[at - 1]]) < order; at--) best[at] = best[at - 1];
        best[at] = i;
    }
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* As torch: the identity above 20. */
static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

static void softmax(const float *x, int64_t n, float *out) {
    float most = x[0], sum = 0.0f;
    for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < n; i++) sum += out[i] = expf(x[i] - most);
    for (int64_t i = 0; i < n; i++) out[i] /= sum;
}

static void scores_of(int kind, const float *logit, int64_t n, float *score) {
    switch (kind) {
    case KT_SCORE_NONE: memcpy(score, logit, (size_t)n * sizeof *score); break;
    case KT_SCORE_SOFTMAX: softmax(logit, n, score); break;
    case KT_SCORE_SIGMOID:
        for (int64_t i = 0; i < n; i++) score[i] = sigmoid(logit[i]);
        break;
    case KT_SCORE_SQRTSOFTPLUS:
        for (int64_t i = 0; i < n; i++) score[i] = sqrtf(softplus(logit[i]));
        break;
    }
}

/* Products become logits. */
static void finish_logits(const struct kt_router *r, int dtype, float *logit) {
    const kt_router_desc *d = &r->d;
    for (int64_t i = 0; i < r->w.rows; i++) {
        if (d->bias) logit[i] += d->bias[i];
        if (d->round) logit[i] = kt_rounded(logit[i], dtype);
        if (d->cap > 0.0f) logit[i] = d->cap * tanhf(logit[i] / d->cap);
    }
}

/* What experts are compared by. */
static void keys_of(const struct kt_router *r, const float *logit, const struct kt_choice *c) {
    const kt_router_desc *d = &r->d;
    const int64_t n = r->w.rows;
    const float *from = d->bias_on == KT_BIAS_ON_LOGIT ? logit : c->score;
    memcpy(c->key, from, (size_t)n * sizeof *from);
    for (int64_t i = 0; d->bias_on != KT_BIAS_ON_NONE && i < n; i++) c->key[i] += d->choice_bias[i];
}

/* Experts outside the best groups cannot be chosen, or count as 0. */
static void mask_groups(const struct kt_router *r, const struct kt_choice *c) {
    const kt_router_desc *d = &r->d;
    const int32_t size = (int32_t)(r->w.rows / d->groups);
    for (int32_t g = 0; g < d->groups; g++) {
        const float *key = c->key + (int64_t)g * size;
        int32_t *two = c->best;
        const int by_two = d->group_by == KT_GROUP_BEST2;
        best_of(key, size, 1 + by_two, two);
        c->group[g] = by_two ? key[two[0]] + key[two[1]] : key[two[0]];
    }
    best_of(c->group, d->groups, d->groups_kept, c->best);
    for (int32_t g = 0; g < d->groups; g++) {
        int kept = 0;
        for (int32_t i = 0; i < d->groups_kept; i++) kept |= c->best[i] == g;
        for (int32_t i = g * size; !kept && i < (g + 1) * size; i++) c->key[i] = d->masked;
    }
}

static void weights_of(const struct kt_router *r, const float *logit, const struct kt_choice *c, float *weights) {
    const kt_router_desc *d = &r->d;
    float sum = 0.0f;
    for (int32_t i = 0; i < d->top_k; i++) weights[i] = d->weigh == KT_WEIGH_SCORE ? c->score[c->best[i]] : logit[c->best[i]];
    if (d->weigh == KT_WEIGH_SOFTMAX) softmax(weights, d->top_k, weights);
    for (int32_t i = 0; d->weigh == KT_WEIGH_SIGMOID && i < d->top_k; i++) weights[i] = sigmoid(weights[i]);
    for (int32_t i = 0; i < d->top_k; i++) sum += weights[i];
    const float by = d->divide == KT_DIVIDE_CLAMP ? (sum < d->divide_by ? d->divide_by : sum) : sum + d->divide_by;
    for (int32_t i = 0; i < d->top_k; i++) {
        if (d->divide != KT_DIVIDE_NONE) weights[i] /= by;
        weights[i] *= d->factor;
        if (d->factors) weights[i] *= d->factors[c->best[i]];
    }
}

void kt_router_choose(const struct kt_router *r, int dtype, float *logits, const struct kt_choice *c, int64_t *ids,
                      float *weights) {
    finish_logits(r, dtype, logits);
    scores_of(r->d.score, logits, r->w.rows, c->score);
    keys_of(r, logits, c);
    if (r->d.groups) mask_groups(r, c);
    best_of(c->key, (int32_t)r->w.rows, r->d.top_k, c->best);
    for (int32_t i = 0; i < r->d.top_k; i++) ids[i] = c->best[i];
    weights_of(r, logits, c, weights);
}

void kt_choice_take(struct kt_arena *arena, const struct kt_router *r, struct kt_choice *c) {
    c->score = kt_arena_take(arena, r->w.rows, sizeof *c->score);
    c->key = kt_arena_take(arena, r->w.rows, sizeof *c->key);
    c->group = kt_arena_take(arena, r->w.rows, sizeof *c->group);
    c->best = kt_arena_take(arena, r->w.rows, sizeof *c->best);
}

/* ---- the call --------------------------------------------------------------------------------------- */

struct routing {
    const struct kt_router *r;
    const void *hidden;
    int64_t *ids;
    float *weights, *logits;
    int dtype, threads;
    int32_t tokens, per_job;
    float *product; /* [T, stride] */
    int64_t stride;
    struct kt_choice *choice; /* [threads] */
};

static void choose(void *ctx, int32_t job, int thread) {
    struct routing *g = ctx;
    const int64_t E = g->r->w.rows, K = g->r->d.top_k, end = kt_min((int64_t)(job + 1) * g->per_job, g->tokens);
    for (int64_t t = (int64_t)job * g->per_job; t < end; t++) {
        float *logits = g->product + t * g->stride;
        kt_router_choose(g->r, g->dtype, logits, &g->choice[thread], g->ids + t * K, g->weights + t * K);
        if (g->logits) memcpy(g->logits + t * E, logits, (size_t)E * sizeof *logits);
    }
}

static void layout(struct routing *g, struct kt_arena *arena) {
    g->product = kt_arena_take(arena, g->tokens * g->stride, sizeof *g->product);
    g->choice = kt_arena_take(arena, g->threads, sizeof *g->choice);
    for (int i = 0; i < g->threads; i++) {
        struct kt_choice c;
        kt_choice_take(arena, g->r, &c);
        if (arena->base) g->choice[i] = c;
    }
}

static int run_chunk(struct routing *g, kt_pool *pool) {
    struct kt_arena arena = {0};
    layout(g, &arena);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(g, &arena);
    const struct kt_product p = {.w = &g->r->w, .norm = g->r->d.norm ? &g->r->norm : NULL, .x = g->hidden,
                                 .dtype = g->dtype, .tokens = g->tokens, .out = g->product, .ldo = g->stride};
    int status = kt_product_run(&p, pool);
    if (!status) kt_pool_run(pool, choose, g, (g->tokens + g->per_job - 1) / g->per_job);
    return status;
}

/* At the level of scratch memory where the caller is. */
static int run(const struct kt_router *r, kt_pool *pool, const void *hidden, int dtype, int64_t tokens, int64_t *ids,
               float *weights, float *logits) {
    const int64_t E = r->w.rows, K = r->d.top_k, H = r->w.cols;
    struct routing g = {.r = r, .dtype = dtype, .threads = kt_pool_threads(pool), .stride = kt_round_up(E, KT_TILE)};
    g.per_job = (int32_t)(1 + 1024 / E);
    const int64_t chunk = kt_min(CHUNK_TOKENS, 1 + ((int64_t)64 << 20) / H);
    int status = KT_OK;
    for (int64_t t = 0; t < tokens && !status; t += chunk) {
        g.tokens = (int32_t)kt_min(tokens - t, chunk);
        g.hidden = (const uint8_t *)hidden + (size_t)(t * H) * kt_dtype_size(dtype);
        g.ids = ids + t * K;
        g.weights = weights + t * K;
        g.logits = logits ? logits + t * E : NULL;
        status = run_chunk(&g, pool);
    }
    return status;
}

int kt_router_run(const struct kt_router *r, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                  int64_t *ids, float *weights, float *logits) {
    kt_pool_enter(pool);
    int status = run(r, pool, hidden, dtype, tokens, ids, weights, logits);
    kt_pool_leave(pool);
    return status;
}

int kt_router_forward(const kt_router *r, kt_pool *pool, const void *hidden, int dtype, int64_t tokens, int64_t *ids,
                      float *weights, float *logits) {
    if (!r || !pool) return KT_ERR_NULL;
    if (tokens < 0 || tokens > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (tokens == 0) return KT_OK;
    if (!hidden || !ids || !weights) return KT_ERR_NULL;
    kt_pool_lock(pool);
    int status = run(r, pool, hidden, dtype, tokens, ids, weights, logits);
    kt_pool_unlock(pool);
    return status;
}
