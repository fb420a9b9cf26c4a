/* delta_net.c: one new token a sequence through a gated delta net, in one call. No intrinsics here.
 *
 *   for each sequence:              x    = hidden in the forms that the matrices want
 *   for each matrix, 128 rows:      r    = W_in @ x: q, k, v, z, b, a               one job set for all
 *   for each sequence, key head:    q, k, v = silu(convolved with what came before); q and k of length 1
 *   for each sequence, value head:  S    = decay S + k (beta (v - decay S^T k))^T;  y = norm(S^T q) * silu(z)
 *   for each sequence:              y    in the forms that W_out wants
 *   for W_out, 128 rows:            out  = W_out @ y
 *
 * The rule is that of Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule". S [K, V] is one value
 * head's memory; it is read from main memory once and stays in the cache for the second pass over it.
 * Letters: G key heads, A value heads, R = A / G, K and V their sizes. */
#include "delta_net.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "piece.h"

enum {
    PIECE = 1024, /* sequences at once: bounds the scratch memory */
    INPUTS = 4,
    ROOM = 1024,  /* values of the convolution at once */
    MAX_WIDTH = 64,
    MAX_HEADS = 1 << 16,
    MAX_SIZE = 1 << 14
};

/* Where something is in a token's row of results: that of the first key head, and from there to the next one's. */
struct place {
    int64_t first, step;
};

struct kt_delta_net {
    kt_delta_net_desc d;
    struct kt_matrix in[INPUTS], out;
    int64_t first[INPUTS], width; /* where a matrix begins in a token's row of results, and how long that row is */
    int64_t shared, keys, channels; /* R, G * K, 2 * G * K + A * V */
    struct place q, k, v, z, b, a;
};

/* ---- creation --------------------------------------------------------------------------------------- */

static int check_sizes(const kt_delta_net_desc *d) {
    if (d->key_heads < 1 || d->key_heads > MAX_HEADS || d->value_heads < 1 || d->value_heads > MAX_HEADS)
        return KT_ERR_SHAPE;
    if (d->value_heads % d->key_heads || d->width < 1 || d->width > MAX_WIDTH) return KT_ERR_SHAPE;
    if (d->key_size < 1 || d->key_size > MAX_SIZE || d->value_size < 1 || d->value_size > MAX_SIZE) return KT_ERR_SHAPE;
    return d->order == KT_DELTA_SPLIT || d->order == KT_DELTA_BY_HEAD ? KT_OK : KT_ERR_SHAPE;
}

static int check_matrices(const struct kt_delta_net *n) {
    const kt_delta_net_desc *d = &n->d;
    const int64_t values = d->value_heads * d->value_size, heads = d->value_heads;
    const int64_t split[INPUTS] = {n->channels, values, heads, heads};
    const int64_t joined[INPUTS] = {n->channels + values, 2 * heads};
    const int64_t *rows = d->order == KT_DELTA_SPLIT ? split : joined;
    for (int i = 0; i < INPUTS; i++)
        if (n->in[i].rows != rows[i] || (rows[i] && n->in[i].cols != n->out.rows)) return KT_ERR_SHAPE;
    return n->out.cols == values ? KT_OK : KT_ERR_SHAPE;
}

static void place(struct kt_delta_net *n) {
    const int64_t K = n->d.key_size, R = n->shared, values = R * n->d.value_size, *first = n->first;
    for (int i = 0; i < INPUTS; i++) {
        n->first[i] = n->width; /* a kernel writes rows in sixteens */
        n->width += kt_round_up(n->in[i].rows, KT_TILE);
    }
    if (n->d.order == KT_DELTA_BY_HEAD) {
        const int64_t step = 2 * (K + values);
        n->q = (struct place){0, step};
        n->k = (struct place){K, step};
        n->v = (struct place){2 * K, step};
        n->z = (struct place){2 * K + values, step};
        n->b = (struct place){first[1], 2 * R};
        n->a = (struct place){first[1] + R, 2 * R};
    } else {
        n->q = (struct place){0, K};
        n->k = (struct place){n->keys, K};
        n->v = (struct place){2 * n->keys, values};
        n->z = (struct place){first[1], values};
        n->b = (struct place){first[2], R};
        n->a = (struct place){first[3], R};
    }
}

static int set_up(struct kt_delta_net *n) {
    const kt_delta_net_desc *d = &n->d;
    int status = check_sizes(d);
    const int inputs = d->order == KT_DELTA_SPLIT ? 4 : 2;
    for (int i = 0; i < inputs && !status; i++) status = kt_matrix_check(&d->inputs[i], &n->in[i]);
    if (!status) status = kt_matrix_check(&d->out, &n->out);
    if (status) return status;
    n->shared = d->value_heads / d->key_heads;
    n->keys = d->key_heads * d->key_size;
    n->channels = 2 * n->keys + d->value_heads * d->value_size;
    status = check_matrices(n);
    if (!status) place(n);
    return status;
}

int kt_delta_net_create(const kt_delta_net_desc *desc, kt_delta_net **net) {
    if (!net) return KT_ERR_NULL;
    *net = NULL;
    if (!desc || !desc->conv || !desc->rate || !desc->dt_bias || !desc->norm) return KT_ERR_NULL;
    struct kt_delta_net *n = calloc(1, sizeof *n);
    if (!n) return KT_ERR_MEMORY;
    n->d = *desc;
    const int status = set_up(n);
    if (status) free(n);
    else *net = n;
    return status;
}

void kt_delta_net_destroy(kt_delta_net *net) { free(net); }

/* ---- one piece -------------------------------------------------------------------------------------- */

struct step {
    struct kt_piece p; /* what products need: kernels, activations, lists */
    const struct kt_delta_net *n;
    const kt_delta_net_call *c;
    const struct kt_rows *in;
    const struct kt_sum *out;
    int64_t from; /* the first sequence of the piece */
    float *y;     /* [sequences, y_stride]: what W_out gave */
    int64_t y_stride;
};

static const kt_glu silu = {.activation = KT_SILU, .limit = INFINITY};

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); } /* the same to a float from there on */

static void load(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct step *s = ctx;
    struct kt_piece *p = &s->p;
    kt_rows_load(p->k, s->in, s->from + job, p->x.cols, p->x.f + job * p->x.stride);
    p->nonfinite[job] = !kt_acts_derive(p->k, &p->x, job, p->forms_x);
}

/* Values of `count` channels become the newest that the convolution keeps; x: what it makes of them. What is kept has
 * a dtype, and the convolution sees the newest value as it is kept, as it will see it in the next step. */
static void some_channels(const struct step *s, int64_t sequence, int64_t channel, int64_t count, float *x) {
    const kt_delta_net_desc *d = &s->n->d;
    const int64_t W = d->width, at = (sequence * s->n->channels + channel) * W;
    const float *weight = d->conv + channel * W;
    float room[ROOM];
    kt_load_row(s->p.k, s->c->conv, s->c->conv_dtype, at, count * W, room);
    for (int64_t i = 0; i < count; i++) {
        float *kept = room + i * W;
        for (int64_t j = 0; j + 1 < W; j++) kept[j] = kept[j + 1];
        kept[W - 1] = x[i];
    }
    kt_store_row(s->p.k, room, count * W, s->c->conv_dtype, s->c->conv, at);
    kt_load_row(s->p.k, s->c->conv, s->c->conv_dtype, at, count * W, room);
    for (int64_t i = 0; i < count; i++) {
        x[i] = d->conv_bias ? d->conv_bias[channel + i] : 0.0f;
        for (int64_t j = 0; j < W; j++) x[i] += room[i * W + j] * weight[i * W + j];
    }
    s->p.k->activate(&silu, NULL, x, count);
}

static void convolve(const struct step *s, int64_t sequence, int64_t channel, int64_t n, float *x) {
    const int64_t most = ROOM / s->n->d.width;
    for (int64_t i = 0; i < n; i += most) some_channels(s, sequence, channel + i, kt_min(n - i, most), x + i);
}

static void to_length(float *x, int64_t n, float eps, float length) {
    const float factor = length / sqrtf(kt_mean_square(x, n) * (float)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

/* A job is a key head of a sequence, with the values of the heads that share it. */
static void mix(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct step *s = ctx;
    const struct kt_delta_net *n = s->n;
    const int64_t K = n->d.key_size, V = n->shared * n->d.value_size;
    const int64_t t = job / n->d.key_heads, g = job % n->d.key_heads;
    float *row = s->p.r + t * n->width, *q = row + n->q.first + g * n->q.step, *k = row + n->k.first + g * n->k.step;
    convolve(s, s->from + t, g * K, K, q);
    convolve(s, s->from + t, n->keys + g * K, K, k);
    convolve(s, s->from + t, 2 * n->keys + g * V, V, row + n->v.first + g * n->v.step);
    to_length(q, K, n->d.l2_eps, 1.0f / sqrtf((float)K));
    to_length(k, K, n->d.l2_eps, 1.0f);
}

/* What one value head's memory [K, V] meets in a step: what k finds in it is corrected towards v, and q reads. */
struct meeting {
    const float *q, *k;
    float *v; /* becomes the correction */
    int64_t key_size, value_size;
    float decay, beta;
};

/* y += sum of k[i] * row i */
static void find(const struct meeting *m, const float *restrict state, float *restrict y) {
    for (int64_t i = 0; i < m->key_size; i++, state += m->value_size) {
        const float k = m->k[i];
        for (int64_t j = 0; j < m->value_size; j++) y[j] += state[j] * k;
    }
}

/* Each row decays and takes its part of the correction; y += sum of q[i] * row i */
static void correct(const struct meeting *m, float *restrict state, const float *restrict v, float *restrict y) {
    const float decay = m->decay;
    for (int64_t i = 0; i < m->key_size; i++, state += m->value_size) {
        const float k = m->k[i], q = m->q[i];
        for (int64_t j = 0; j < m->value_size; j++) {
            state[j] = state[j] * decay + k * v[j];
            y[j] += state[j] * q;
        }
    }
}

static void remember(const struct meeting *m, float *state, float *y) {
    const size_t bytes = (size_t)m->value_size * sizeof *y;
    memset(y, 0, bytes);
    find(m, state, y);
    for (int64_t j = 0; j < m->value_size; j++) m->v[j] = (m->v[j] - m->decay * y[j]) * m->beta;
    memset(y, 0, bytes);
    correct(m, state, m->v, y);
}

/* A job is a value head of a sequence. */
static void recur(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct step *s = ctx;
    const struct kt_delta_net *n = s->n;
    const kt_delta_net_desc *d = &n->d;
    const int64_t K = d->key_size, V = d->value_size, t = job / d->value_heads, h = job % d->value_heads;
    const int64_t g = h / n->shared, r = h % n->shared;
    float *row = s->p.r + t * n->width;
    const float *z = row + n->z.first + g * n->z.step + r * V;
    const float a = row[n->a.first + g * n->a.step + r], b = row[n->b.first + g * n->b.step + r];
    const struct meeting m = {
        .q = row + n->q.first + g * n->q.step, .k = row + n->k.first + g * n->k.step,
        .v = row + n->v.first + g * n->v.step + r * V, .key_size = K, .value_size = V,
        .decay = expf(-d->rate[h] * softplus(a + d->dt_bias[h])), .beta = sigmoid(b)};
    float *y = s->p.m.f + t * s->p.m.stride + h * V;
    remember(&m, s->c->state + ((s->from + t) * d->value_heads + h) * K * V, y);
    kt_rms_norm(y, d->norm, d->norm_eps, V, y);
    s->p.k->activate(&silu, z, y, V);
}

static void derive(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct step *s = ctx;
    s->p.nonfinite[job] = !kt_acts_derive(s->p.k, &s->p.m, job, s->p.forms_m);
}

static void store(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct step *s = ctx;
    const int64_t H = s->n->out.rows;
    kt_sum_store(s->p.k, s->out, s->from + job, H, 0, s->y + job * s->y_stride, H);
}

static void layout(struct step *s, struct kt_arena *arena) {
    struct kt_piece *p = &s->p;
    const struct kt_delta_net *n = s->n;
    p->list = kt_arena_take(arena, p->tokens, sizeof *p->list);
    p->nonfinite = kt_arena_take(arena, p->tokens, 1);
    p->scratch = kt_arena_take(arena, p->threads, sizeof *p->scratch);
    kt_acts_take(arena, p->tokens, n->out.rows, p->forms_x, &p->x);
    kt_acts_take(arena, p->tokens, n->out.cols, p->forms_m, &p->m);
    p->r = kt_arena_take(arena, p->tokens * n->width, sizeof *p->r);
    s->y = kt_arena_take(arena, p->tokens * s->y_stride, sizeof *s->y);
    for (int i = 0; i < p->threads; i++) {
        struct kt_scratch scratch;
        kt_scratch_take(arena, p->tokens, &scratch);
        if (arena->base) p->scratch[i] = scratch;
    }
}

static int run_piece(struct step *s, kt_pool *pool) {
    struct kt_piece *p = &s->p;
    const struct kt_delta_net *n = s->n;
    p->forms_x = 0;
    for (int i = 0; i < INPUTS; i++)
        if (n->in[i].rows) p->forms_x |= kt_forms_needed(p->k, &n->in[i], p->tokens, s->c->dtype);
    p->forms_m = kt_forms_needed(p->k, &n->out, p->tokens, s->c->dtype);
    s->y_stride = kt_round_up(n->out.rows, KT_TILE);
    struct kt_arena arena = {0};
    layout(s, &arena);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(s, &arena);
    kt_pool_run(pool, load, s, p->tokens);
    kt_project(p, pool, &(struct kt_projection){n->in, n->d.in_bias, n->first, INPUTS, &p->x, p->r, n->width});
    kt_pool_run(pool, mix, s, (int32_t)(p->tokens * n->d.key_heads));
    kt_pool_run(pool, recur, s, (int32_t)(p->tokens * n->d.value_heads));
    kt_pool_run(pool, derive, s, p->tokens);
    kt_project(p, pool, &(struct kt_projection){&n->out, &n->d.out_bias, &(int64_t){0}, 1, &p->m, s->y, s->y_stride});
    kt_pool_run(pool, store, s, p->tokens);
    return KT_OK;
}

/* ---- the call --------------------------------------------------------------------------------------- */

int64_t kt_delta_net_hidden(const kt_delta_net *net) { return net->out.rows; }

int kt_delta_net_check(const kt_delta_net_call *c) {
    if (c->batch < 0 || c->batch > 1 << 20) return KT_ERR_SHAPE;
    if (!kt_dtype_size(c->dtype) || !kt_dtype_size(c->conv_dtype)) return KT_ERR_DTYPE;
    return c->batch && (!c->conv || !c->state) ? KT_ERR_NULL : KT_OK;
}

int kt_delta_net_run(const kt_delta_net *net, kt_pool *pool, const kt_delta_net_call *call, const struct kt_rows *in,
                     const struct kt_sum *out) {
    int status = KT_OK;
    struct step s = {.n = net, .c = call, .in = in, .out = out};
    const int64_t most = kt_min(PIECE, INT32_MAX / net->d.value_heads); /* jobs of a set have 32-bit numbers */
    kt_pool_enter(pool);
    s.p.k = kt_kernels();
    s.p.threads = kt_pool_threads(pool);
    for (; s.from < call->batch && !status; s.from += s.p.tokens) { /* memory fails at the first piece, or not at all */
        s.p.tokens = (int32_t)kt_min(call->batch - s.from, most);
        status = run_piece(&s, pool);
    }
    kt_pool_leave(pool);
    return status;
}

int kt_delta_net_forward(const kt_delta_net *net, kt_pool *pool, const kt_delta_net_call *call, const void *hidden,
                         void *out) {
    if (!net || !pool || !call) return KT_ERR_NULL;
    const int wrong = kt_delta_net_check(call);
    if (wrong) return wrong;
    if (call->batch && (!hidden || !out)) return KT_ERR_NULL;
    const struct kt_rows in = {.data = hidden, .dtype = call->dtype};
    const struct kt_sum sum = {.data = out, .dtype = call->dtype};
    kt_pool_lock(pool);
    const int status = kt_delta_net_run(net, pool, call, &in, &sum);
    kt_pool_unlock(pool);
    return status;
}
