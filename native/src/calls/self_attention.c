/* self_attention.c: an attention module in one call. No intrinsics here.
 *
 *   for each token:             x      = hidden[t], normed where a norm comes with it, in the forms the matrices want
 *   for each matrix, 128 rows:  r      = W_q @ x, W_k @ x, W_v @ x                one job set for the three
 *   for each token and head:    q, k   = norm, rotary positions, factors; k and v go to their places in the cache
 *   for each piece of context:  mixed  = softmax(q . k) v                         attention/attend.c
 *   for each token:             mixed  times its gate, in the forms that W_o wants
 *   for W_o, 128 rows:          out    = W_o @ mixed (+ what out held)
 *
 * Tokens go in pieces: the keys of a piece are in the cache before its queries meet them, and what is ahead of a query
 * is not seen. The kind with latents (latent_attention.c) has its own steps between the first and the last matrices.
 * Letters: A heads, C heads of keys and values, D head size, V value size. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "piece.h"

enum { PIECE = 1024 /* tokens at once: bounds the scratch memory */ };

/* ---- creation --------------------------------------------------------------------------------------- */

static int check_shapes(const struct kt_attention *a) {
    const kt_attention_desc *d = &a->d;
    if (d->heads < 1 || d->heads > 1 << 16 || d->kv_heads < 1 || d->heads % d->kv_heads) return KT_ERR_SHAPE;
    if (d->size < 1 || d->size > 1 << 14 || d->value_size < 1 || d->value_size > 1 << 14) return KT_ERR_SHAPE;
    const int64_t hidden = a->part[KT_Q].cols, gated = d->gate == KT_GATE_IN_Q ? 2 : 1;
    if (a->part[KT_Q].rows != d->heads * d->size * gated || a->part[KT_K].rows != d->kv_heads * d->size)
        return KT_ERR_SHAPE;
    if (a->part[KT_V].rows != d->kv_heads * d->value_size || a->out.cols != d->heads * d->value_size)
        return KT_ERR_SHAPE;
    if (gated == 2 && d->size != d->value_size) return KT_ERR_SHAPE;
    for (int p = 0; p < KT_PARTS; p++)
        if (a->part[p].rows && a->part[p].cols != hidden) return KT_ERR_SHAPE;
    if (d->gate == KT_GATE_ELEMENTS && a->part[KT_G].rows != d->heads * d->value_size) return KT_ERR_SHAPE;
    if (d->gate == KT_GATE_HEADS && a->part[KT_G].rows != d->heads) return KT_ERR_SHAPE;
    return a->out.rows == hidden && d->window >= 0 ? KT_OK : KT_ERR_SHAPE;
}

void kt_attention_place(struct kt_attention *a) {
    for (int p = 0; p < KT_PARTS; p++) {
        a->first[p] = a->width; /* a kernel writes rows in sixteens */
        a->width += kt_round_up(a->part[p].rows, KT_TILE);
    }
}

int kt_attention_create(const kt_attention_desc *desc, kt_attention **attention) {
    if (!attention) return KT_ERR_NULL;
    *attention = NULL;
    if (!desc) return KT_ERR_NULL;
    if (desc->gate < KT_GATE_NONE || desc->gate > KT_GATE_HEADS) return KT_ERR_ACTIVATION;
    if (desc->gate_by < KT_GATE_SIGMOID || desc->gate_by > KT_GATE_SOFTPLUS) return KT_ERR_ACTIVATION;
    if (desc->rotary_pairs < KT_PAIRS_HALVES || desc->rotary_pairs > KT_PAIRS_NONE) return KT_ERR_SHAPE;
    struct kt_attention *a = calloc(1, sizeof *a);
    if (!a) return KT_ERR_MEMORY;
    a->d = *desc;
    const int gated = desc->gate == KT_GATE_ELEMENTS || desc->gate == KT_GATE_HEADS;
    const kt_weight *of[KT_PARTS] = {&desc->q, &desc->k, &desc->v, &desc->g};
    int status = KT_OK;
    for (int p = 0; p < (gated ? 4 : 3) && !status; p++) status = kt_matrix_check(of[p], &a->part[p]);
    if (!status) status = kt_matrix_check(&desc->o, &a->out);
    if (!status) status = check_shapes(a);
    if (status) {
        free(a);
        return status;
    }
    kt_attention_place(a);
    *attention = a;
    return KT_OK;
}

void kt_attention_destroy(kt_attention *attention) {
    if (attention) free(attention->latent);
    free(attention);
}

/* ---- one piece -------------------------------------------------------------------------------------- */

/* Where token t of the piece is among the call's [batch, tokens]. */
static int64_t place_of(const struct kt_piece *p, int64_t t) {
    return (p->sequence + t / p->each) * p->c->tokens + p->token + t % p->each;
}

static void prepare_x(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct kt_piece *p = ctx;
    for (int64_t t = (int64_t)job * p->per_job; t < kt_min((int64_t)(job + 1) * p->per_job, p->tokens); t++) {
        kt_rows_load(p->k, p->in, place_of(p, t), p->x.cols, p->x.f + t * p->x.stride);
        p->nonfinite[t] = !kt_acts_derive(p->k, &p->x, t, p->forms_x);
    }
}

/* A job is a block of rows of one of the matrices that meet the same activations. */
static void project(void *ctx, int32_t job, int thread) {
    struct kt_piece *p = ctx;
    const struct kt_projection *now = p->now;
    int part = 0;
    int64_t block = job, blocks = 0;
    for (; part < now->count; part++, block -= blocks) {
        blocks = (now->w[part].rows + p->rows - 1) / p->rows;
        if (block < blocks) break;
    }
    const struct kt_matrix *w = &now->w[part];
    const int64_t first = block * p->rows, after = first + (int64_t)p->threads * p->rows;
    const int rows = (int)kt_min(w->rows - first, p->rows);
    float *r = now->out + now->first[part] + first;
    const int direct = p->listed == p->tokens;
    const struct kt_scratch *s = &p->scratch[thread];
    kt_matmul_block(&(struct kt_block){
        .k = p->k, .w = w, .first = first, .rows = rows, .a = now->x, .token = p->list, .tokens = p->listed,
        .next = {after < w->rows ? w : NULL, after}, .s = s, .c = direct ? r : s->c,
        .ldc = direct ? now->stride : KT_BLOCK_ROWS});
    const float *bias = now->bias[part];
    for (int32_t i = 0; i < p->listed; i++) {
        float *row = r + p->list[i] * now->stride;
        if (!direct) memcpy(row, s->c + (int64_t)i * KT_BLOCK_ROWS, (size_t)rows * sizeof *row);
        if (bias) p->k->add(bias + first, row, rows);
    }
}

/* Pairs of x, which lie half of `width` apart or side by side, turn by their angles. */
static void rotate(float *x, const float *cos, const float *sin, int64_t width, int pairs) {
    const int64_t half = width / 2, step = pairs ? 2 : 1, apart = pairs ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        float *a = x + i * step, *b = a + apart;
        const float u = *a, v = *b;
        *a = u * cos[i] - v * sin[i];
        *b = v * cos[i] + u * sin[i];
    }
}

/* Side by side becomes half apart: how families with pairs keep keys. */
static void part_pairs(float *x, int64_t width, float *room) {
    memcpy(room, x, (size_t)width * sizeof *x);
    for (int64_t i = 0; i < width / 2; i++) {
        x[i] = room[2 * i];
        x[width / 2 + i] = room[2 * i + 1];
    }
}

void kt_turn(const struct kt_piece *p, float *x, struct kt_angles *at) {
    if (!p->c->cos || p->a->d.rotary_pairs == KT_PAIRS_NONE) return;
    rotate(x, at->cos, at->sin, p->c->rotary, p->a->d.rotary_pairs != KT_PAIRS_HALVES);
    if (p->a->d.rotary_pairs == KT_PAIRS_PARTED) part_pairs(x, p->c->rotary, at->room);
}

/* The angles of a token; only the first half of a row of whole width counts, the other is the same again. */
void kt_load_angles(const struct kt_piece *p, int64_t t, struct kt_angles *at) {
    const kt_attention_call *c = p->c;
    if (!c->cos || p->a->d.rotary_pairs == KT_PAIRS_NONE) return;
    const int64_t offset = (p->sequence + t / p->each) * c->rotary_batch + (p->token + t % p->each) * c->rotary_row;
    kt_load_row(p->k, c->cos, c->rotary_dtype, offset, c->rotary / 2, at->cos);
    kt_load_row(p->k, c->sin, c->rotary_dtype, offset, c->rotary / 2, at->sin);
}

static void clip(float *x, int64_t n, float most) {
    for (int64_t i = 0; i < n; i++) x[i] = x[i] < -most ? -most : x[i] > most ? most : x[i]; /* a NaN stays one */
}

static void finish_head(const struct kt_piece *p, const float *norm, float *x, struct kt_angles *at) {
    const kt_attention_desc *d = &p->a->d;
    if (norm && !d->norm_last && !d->norm_whole) kt_rms_norm(x, norm, d->eps, d->size, x);
    kt_turn(p, x, at);
    if (norm && d->norm_last) kt_rms_norm(x, norm, d->eps, d->size, x);
}

static void scale_by(float *x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

static float q_factor(const struct kt_piece *p, int64_t t) {
    const kt_attention_call *c = p->c;
    return c->q_factor[(p->sequence + t / p->each) * c->q_factor_batch + p->token + t % p->each];
}

/* Norms and positions of a token's queries and keys; keys and values to the cache. */
static void finish(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct kt_piece *p = ctx;
    const struct kt_attention *a = p->a;
    const kt_attention_desc *d = &a->d;
    const kt_kv_layout *l = &p->c->layout;
    struct kt_angles at;
    const int32_t per = p->per_job;
    for (int64_t t = (int64_t)job * per; t < kt_min((int64_t)(job + 1) * per, p->tokens); t++) {
        float *q = p->r + t * a->width, *k = q + a->first[KT_K], *v = q + a->first[KT_V];
        kt_load_angles(p, t, &at);
        if (d->gate == KT_GATE_IN_Q) { /* each head's queries, then its gate: the queries move together at the front */
            float *gates = p->m.f + t * p->m.stride;
            for (int64_t h = 0; h < d->heads; h++) {
                memcpy(gates + h * d->size, q + (2 * h + 1) * d->size, (size_t)d->size * sizeof *q);
                memmove(q + h * d->size, q + 2 * h * d->size, (size_t)d->size * sizeof *q);
            }
        }
        if (d->norm_whole && d->q_norm) kt_rms_norm(q, d->q_norm, d->eps, d->heads * d->size, q);
        if (d->norm_whole && d->k_norm) kt_rms_norm(k, d->k_norm, d->eps, d->kv_heads * d->size, k);
        if (d->clip > 0.0f) {
            clip(q, d->heads * d->size, d->clip);
            clip(k, d->kv_heads * d->size, d->clip);
            clip(v, d->kv_heads * d->value_size, d->clip);
        }
        for (int64_t h = 0; h < d->heads; h++) finish_head(p, d->q_norm, q + h * d->size, &at);
        if (p->c->q_factor) scale_by(q, d->heads * d->size, q_factor(p, t));
        for (int64_t h = 0; h < d->kv_heads && d->v_norm; h++)
            kt_rms_norm(v + h * d->value_size, d->v_norm, d->eps, d->value_size, v + h * d->value_size);
        if (d->value_factor != 0.0f) scale_by(v, d->kv_heads * d->value_size, d->value_factor);
        const kt_sequence *s = &p->c->sequences[p->sequence + t / p->each];
        const int64_t pos = s->length + p->token + t % p->each, row = pos % KT_PAGE;
        for (int64_t h = 0; h < d->kv_heads; h++) {
            finish_head(p, d->k_norm, k + h * d->size, &at);
            uint8_t *keys = (uint8_t *)s->keys[pos / KT_PAGE] + h * l->key_head + row * l->key_row;
            uint8_t *values = (uint8_t *)s->values[pos / KT_PAGE] + h * l->value_head + row * l->value_row;
            kt_cache_store(p->k, k + h * d->size, d->size, l->type, keys);
            kt_cache_store(p->k, v + h * d->value_size, d->value_size, l->type, values);
        }
    }
}

static float opened(float x, int by) {
    if (by == KT_GATE_SOFTPLUS) return x > 20.0f ? x : log1pf(expf(x)); /* the same to a float from there on */
    return 1.0f / (1.0f + expf(-x));
}

/* What attention gave, gated, in the forms that the last matrix wants. */
static void prepare_m(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct kt_piece *p = ctx;
    const kt_attention_desc *d = &p->a->d;
    const int64_t n = d->heads * d->value_size;
    for (int64_t t = (int64_t)job * p->per_job; t < kt_min((int64_t)(job + 1) * p->per_job, p->tokens); t++) {
        const float *mixed = p->mixed + t * p->mixed_stride;
        float *m = p->m.f + t * p->m.stride;
        const float *g = d->gate == KT_GATE_IN_Q ? m : p->r + t * p->a->width + p->a->first[KT_G];
        if (d->gate == KT_GATE_NONE) memcpy(m, mixed, (size_t)n * sizeof *m);
        else
            for (int64_t i = 0; i < n; i++)
                m[i] = mixed[i] * opened(g[d->gate == KT_GATE_HEADS ? i / d->value_size : i], d->gate_by);
        p->nonfinite[t] = !kt_acts_derive(p->k, &p->m, t, p->forms_m);
    }
}

static void last(void *ctx, int32_t job, int thread) {
    struct kt_piece *p = ctx;
    const struct kt_matrix *w = &p->a->out;
    const struct kt_scratch *s = &p->scratch[thread];
    const int64_t first = (int64_t)job * p->rows, after = first + (int64_t)p->threads * p->rows;
    const int rows = (int)kt_min(w->rows - first, p->rows);
    kt_matmul_block(&(struct kt_block){
        .k = p->k, .w = w, .first = first, .rows = rows, .a = &p->m, .token = p->list, .tokens = p->listed,
        .next = {after < w->rows ? w : NULL, after}, .s = s, .c = s->c, .ldc = KT_BLOCK_ROWS});
    for (int32_t i = 0; i < p->listed; i++) {
        float *c = s->c + (int64_t)i * KT_BLOCK_ROWS;
        if (p->a->d.bias[KT_O]) p->k->add(p->a->d.bias[KT_O] + first, c, rows);
        kt_sum_store(p->k, p->out, place_of(p, p->list[i]), w->rows, first, c, rows);
    }
}

/* Run `fn`, jobs jobs of all tokens, and then those with infinities or NaNs again in fp32: see moe.c. */
static void run_product(struct kt_piece *p, kt_pool *pool, kt_job_fn fn, int32_t jobs) {
    const struct kt_kernels *k = p->k;
    int32_t bad = 0;
    for (int32_t t = 0; t < p->tokens; t++) {
        p->list[t] = t;
        bad += p->nonfinite[t];
    }
    p->listed = p->tokens;
    if (bad && fn == last) { /* it adds to what is there, so each token goes once */
        p->listed = 0;
        for (int32_t t = 0; t < p->tokens; t++)
            if (!p->nonfinite[t]) p->list[p->listed++] = t;
    }
    if (p->listed) kt_pool_run(pool, fn, p, jobs);
    if (!bad) return;
    p->listed = 0;
    for (int32_t t = 0; t < p->tokens; t++)
        if (p->nonfinite[t]) p->list[p->listed++] = t;
    p->k = kt_exact_kernels();
    kt_pool_run(pool, fn, p, jobs);
    p->k = k;
}

static int32_t blocks_of(const struct kt_piece *p, int64_t rows) { return (int32_t)((rows + p->rows - 1) / p->rows); }

void kt_project(struct kt_piece *p, kt_pool *pool, const struct kt_projection *projection) {
    int64_t rows = 0;
    int32_t jobs = 0;
    for (int i = 0; i < projection->count; i++) rows += projection->w[i].rows;
    p->now = projection;
    p->rows = kt_job_rows(pool, rows);
    for (int i = 0; i < projection->count; i++) jobs += blocks_of(p, projection->w[i].rows);
    run_product(p, pool, project, jobs);
}

static void sequences_of(struct kt_piece *p) {
    const kt_attention_call *c = p->c;
    const kt_kv_layout *l = &c->layout;
    for (int64_t i = 0; i < p->sequences; i++) {
        const kt_sequence *s = &c->sequences[p->sequence + i];
        const int64_t length = s->length + p->token + p->each;
        p->seq[i] = (struct kt_attend_sequence){
            .kv = {(const uint8_t *const *)s->keys, (const uint8_t *const *)s->values, (size_t)l->key_head,
                   (size_t)l->value_head, (size_t)l->key_row, (size_t)l->value_row},
            .query = i * p->each, .queries = (int32_t)p->each, .start = s->start, .length = length};
        struct kt_kv *kv = &p->seq[i].kv;
        if (p->a->latent) { /* values are the first part of a key's row */
            kv->values = kv->keys;
            kv->value_head = kv->key_head;
            kv->value_row = kv->key_row;
        }
        if (!c->mask) continue;
        const uint8_t *mask = c->mask + (p->sequence + i) * c->mask_batch + p->token * c->mask_row;
        p->seq[i].start = s->start > c->mask_first ? s->start : c->mask_first;
        p->seq[i].mask = (const uint8_t *)((uintptr_t)mask - (uintptr_t)c->mask_first); /* by the key's own number */
        p->seq[i].mask_row = c->mask_row;
    }
}

static void layout(struct kt_piece *p, struct kt_arena *arena, size_t attend_bytes) {
    const struct kt_attention *a = p->a;
    const int64_t n = p->tokens;
    p->list = kt_arena_take(arena, n, sizeof *p->list);
    p->nonfinite = kt_arena_take(arena, n, 1);
    p->seq = kt_arena_take(arena, p->sequences, sizeof *p->seq);
    p->scratch = kt_arena_take(arena, p->threads, sizeof *p->scratch);
    kt_acts_take(arena, n, a->part[KT_Q].cols, p->forms_x, &p->x);
    kt_acts_take(arena, n, a->out.cols, p->forms_m, &p->m);
    p->r = kt_arena_take(arena, n * a->width, sizeof *p->r);
    p->mixed_stride = kt_round_up(a->out.cols, KT_TILE);
    p->mixed = kt_arena_take(arena, n * p->mixed_stride, sizeof(float));
    p->attend_scratch = kt_arena_take(arena, (int64_t)attend_bytes, 1);
    if (a->latent) kt_latent_layout(p, arena);
    for (int i = 0; i < p->threads; i++) {
        struct kt_scratch s;
        kt_scratch_take(arena, a->latent && n < KT_EXPAND ? KT_EXPAND : n, &s);
        if (arena->base) p->scratch[i] = s;
    }
}

static int take_memory(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    struct kt_attend_sequence *sequences = malloc((size_t)p->sequences * sizeof *sequences);
    if (!sequences) return KT_ERR_MEMORY;
    p->seq = sequences; /* how much the attention needs depends on lengths, and they need a place first */
    sequences_of(p);
    p->attend.sequence = p->seq;
    const size_t attend_bytes = a->latent ? kt_latent_scratch(p, pool) : kt_attend_scratch(&p->attend, pool);
    free(sequences);
    struct kt_arena arena = {0};
    layout(p, &arena, attend_bytes);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(p, &arena, attend_bytes);
    sequences_of(p);
    p->attend.sequence = p->seq;
    p->attend.q = p->r;
    p->attend.out = p->mixed;
    p->attend.out_stride = p->mixed_stride;
    return KT_OK;
}

static int run_piece(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    const kt_attention_desc *d = &a->d;
    p->tokens = (int32_t)(p->sequences * p->each);
    p->forms_x = 0;
    for (int i = 0; i < KT_PARTS; i++)
        if (a->part[i].rows) p->forms_x |= kt_forms_needed(p->k, &a->part[i], p->tokens, p->c->dtype);
    p->forms_m = kt_forms_needed(p->k, &a->out, p->tokens, p->c->dtype);
    p->attend = (struct kt_attend){
        .k = p->k, .type = p->c->layout.type, .heads = d->heads, .kv_heads = d->kv_heads, .size = d->size,
        .value_size = d->value_size, .scale = d->scale, .window = kt_window(p), .sinks = d->sinks,
        .q_stride = a->width, .sequences = (int32_t)p->sequences};
    const int status = take_memory(p, pool);
    if (status) return status;
    p->per_job = (int32_t)(1 + 16384 / a->width);
    const int32_t jobs = (p->tokens + p->per_job - 1) / p->per_job;
    kt_pool_run(pool, prepare_x, p, jobs);
    kt_project(p, pool, &(struct kt_projection){a->part, d->bias, a->first, KT_PARTS, &p->x, p->r, a->width});
    if (a->latent) kt_latent_mix(p, pool);
    else {
        kt_pool_run(pool, finish, p, jobs);
        kt_attend_run(&p->attend, pool, p->attend_scratch);
    }
    kt_pool_run(pool, prepare_m, p, jobs);
    p->rows = kt_job_rows(pool, a->out.rows);
    run_product(p, pool, last, blocks_of(p, a->out.rows));
    return KT_OK;
}

/* ---- the call --------------------------------------------------------------------------------------- */

/* Whether rows of keys and values of the cache's type fit into the layout; one row holds a token's latent and key. */
static int check_layout(const struct kt_attention *a, const kt_kv_layout *l) {
    const size_t key = kt_cache_row(l->type, a->latent ? kt_latent_row(a) : a->d.size);
    const size_t value = kt_cache_row(l->type, a->latent ? a->latent->latent : a->d.value_size);
    if (!key || !value) return KT_ERR_DTYPE;
    return l->key_row < (int64_t)key || (!a->latent && l->value_row < (int64_t)value) ? KT_ERR_SHAPE : KT_OK;
}

static int check_call(const struct kt_attention *a, const kt_attention_call *c) {
    if (c->batch < 0 || c->batch > 1 << 20 || c->tokens < 0 || c->tokens > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (c->window < 0) return KT_ERR_SHAPE;
    if (!kt_dtype_size(c->dtype)) return KT_ERR_DTYPE;
    const int status = check_layout(a, &c->layout);
    if (status) return status;
    if (c->cos && a->d.rotary_pairs != KT_PAIRS_NONE) {
        if (!c->sin || !kt_dtype_size(c->rotary_dtype)) return c->sin ? KT_ERR_DTYPE : KT_ERR_NULL;
        if (c->rotary < 2 || c->rotary % 2 || c->rotary / 2 > KT_MAX_ROTARY) return KT_ERR_SHAPE;
        if (c->rotary > (a->latent ? a->latent->rotary : a->d.size)) return KT_ERR_SHAPE;
    }
    if (c->q_factor && a->latent) return KT_ERR_SHAPE;
    return c->batch && c->tokens && !c->sequences ? KT_ERR_NULL : KT_OK;
}

static int run(const struct kt_attention *a, kt_pool *pool, const kt_attention_call *c, const struct kt_rows *in,
               const struct kt_sum *out) {
    const int status = check_call(a, c);
    if (status || !c->batch || !c->tokens) return status;
    for (int64_t b = 0; b < c->batch; b++) {
        const kt_sequence *s = &c->sequences[b];
        if (!s->keys || !s->values) return KT_ERR_NULL;
        if (s->length < 0 || s->start < 0 || s->length + c->tokens > KT_MAX_DIM) return KT_ERR_SHAPE;
    }
    struct kt_piece p = {.a = a, .k = kt_kernels(), .c = c, .in = in, .out = out, .threads = kt_pool_threads(pool)};
    for (p.sequence = 0; p.sequence < c->batch; p.sequence += p.sequences) {
        const int64_t most = a->latent ? kt_latent_plan(&p) : PIECE;
        p.sequences = a->latent ? p.sequences : c->batch - p.sequence;
        p.sequences = kt_min(p.sequences, c->tokens < most ? most / c->tokens : 1);
        for (p.token = 0; p.token < c->tokens; p.token += p.each) {
            p.each = kt_min(c->tokens - p.token, most);
            const int failed = run_piece(&p, pool);
            if (failed) return failed;
        }
    }
    return KT_OK;
}

void kt_sequences_raise(const kt_attention_call *c) {
    for (int64_t b = 0; b < c->batch; b++) c->sequences[b].length += c->tokens;
}

int kt_attention_run(const struct kt_attention *a, kt_pool *pool, const kt_attention_call *c, const struct kt_rows *in,
                     const struct kt_sum *out) {
    kt_pool_enter(pool);
    const int status = run(a, pool, c, in, out);
    kt_pool_leave(pool);
    return status;
}

int kt_attention_forward(const kt_attention *a, kt_pool *pool, const kt_attention_call *c, const void *hidden,
                         void *out) {
    if (!a || !pool || !c) return KT_ERR_NULL;
    if (c->batch && c->tokens && (!hidden || !out)) return KT_ERR_NULL;
    const struct kt_rows in = {.data = hidden, .dtype = c->dtype};
    const struct kt_sum sum = {.data = out, .dtype = c->dtype};
    kt_pool_lock(pool);
    const int status = run(a, pool, c, &in, &sum);
    if (!status) kt_sequences_raise(c);
    kt_pool_unlock(pool);
    return status;
}
