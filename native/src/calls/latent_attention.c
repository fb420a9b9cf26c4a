/* latent_attention.c: multi-head latent attention (DeepSeek-V2, section 2.1). No intrinsics here.
 *
 *   for each token:            q = W_q x, or W_qb norm(W_qa x); latent, key = W_kva x; the latent normed
 *                              q's and the key's part with a position turned; [latent | key] goes to the cache: one row
 *   absorbed, few queries:     query[h] = [W_UK[h]^T q[h] | turned]              a head of L + R
 *                              context  = softmax(query . row) latent            one head of keys for all of queries
 *                              mixed[h] = W_UV[h] context[h]
 *   expanded, many queries:    key[h] = [W_UK[h] latent | key], value[h] = W_UV[h] latent, of all cached tokens
 *                              mixed[h] = softmax(q[h] . key[h]) value[h]
 *
 * Both are the same sum in another order; the one with fewer multiplications is taken. kv_b holds for each head the
 * rows of W_UK, then those of W_UV, and serves both: W_UK^T q is a sum of rows, as attention sums values, and W_UV
 * times a context is a dot product with each row, as attention scores keys. So their kernels compute it, from one copy.
 *
 * Expanded keys and values are made for so many heads at a time as BUDGET bytes hold, and live in scratch memory that
 * is laid out as pages.
 *
 * Letters: A heads, L size of a latent, N and R sizes of a query's parts without and with a position, V value size. */
#include <stdlib.h>
#include <string.h>

#include "piece.h"

enum {
    ABSORBED = 256,     /* tokens of a piece: queries are long, A * (L + R) each */
    EXPANDED = 1024,    /* the same, where each piece expands the context again */
    BUDGET = 64 << 20,  /* bytes of expanded keys and values */
    ROWS = 16,          /* of W_UK at a time: while they are summed up, the next are fetched */
    OUT_ROWS = 32,      /* of W_UV in a job */
    MANY_HEADS = 64,    /* they make jobs enough; of fewer, a job is COLUMNS of a head's */
    COLUMNS = 128,
};

/* ---- creation --------------------------------------------------------------------------------------- */

/* kv_b as attention's kernels name types, -1 for one that they do not read. */
static int cache_type(const struct kt_matrix *w) {
    switch (w->format) {
    case KT_FMT_F32: return KT_F32;
    case KT_FMT_F16: return KT_F16;
    case KT_FMT_BF16: return KT_BF16;
    case KT_FMT_Q8_0: return KT_CACHE_Q8_0;
    }
    return -1;
}

static int check_sizes(const struct kt_latent_desc *d) {
    const int64_t most = 1 << 14, sizes[] = {d->heads, d->latent, d->plain, d->rotary, d->value_size};
    for (int i = 0; i < 5; i++)
        if (sizes[i] < (i == 3 ? 0 : 1) || sizes[i] > most) return KT_ERR_SHAPE;
    return d->latent % KT_TILE || d->rotary % 2 || d->window < 0 ? KT_ERR_SHAPE : KT_OK;
}

static int has_gate_matrix(const kt_latent_desc *d) {
    return d->gate == KT_GATE_ELEMENTS || d->gate == KT_GATE_HEADS;
}

static int check_matrices(const struct kt_attention *a, const kt_latent_desc *d) {
    const struct kt_latent *l = a->latent;
    const struct kt_matrix *q = l->q_b.rows ? &l->q_b : &a->part[KT_Q];
    const int64_t hidden = a->part[KT_Q].cols, mixed = d->heads * d->value_size;
    const int64_t gated = d->gate == KT_GATE_IN_Q ? d->value_size : 0, rank = a->part[KT_Q].rows;
    if (q->rows != d->heads * (d->plain + d->rotary + gated)) return KT_ERR_SHAPE;
    if (l->q_b.rows && l->q_b.cols != rank && l->q_b.cols != 2 * rank) return KT_ERR_SHAPE;
    if (a->part[KT_K].rows != d->latent + d->rotary || a->part[KT_K].cols != hidden) return KT_ERR_SHAPE;
    if (l->kv_b.rows != d->heads * (d->plain + d->value_size) || l->kv_b.cols != d->latent) return KT_ERR_SHAPE;
    if (a->out.rows != hidden || a->out.cols != mixed) return KT_ERR_SHAPE;
    if (!has_gate_matrix(d)) return KT_OK;
    const int64_t gates = d->gate == KT_GATE_HEADS ? d->heads : mixed;
    return a->part[KT_G].rows != gates || a->part[KT_G].cols != hidden ? KT_ERR_SHAPE : KT_OK;
}

static int fill(struct kt_attention *a, const kt_latent_desc *d) {
    struct kt_latent *l = a->latent;
    const int two = d->q_a.data != NULL;
    int status = kt_matrix_check(two ? &d->q_a : &d->q, &a->part[KT_Q]);
    if (!status && two) status = kt_matrix_check(&d->q, &l->q_b);
    if (!status) status = kt_matrix_check(&d->kv_a, &a->part[KT_K]);
    if (!status && has_gate_matrix(d)) status = kt_matrix_check(&d->g, &a->part[KT_G]);
    if (!status) status = kt_matrix_check(&d->kv_b, &l->kv_b);
    if (!status) status = kt_matrix_check(&d->o, &a->out);
    if (!status) status = check_matrices(a, d);
    if (status) return status;
    if (!d->kv_norm || (two && !d->q_norm)) return KT_ERR_NULL;
    l->type = cache_type(&l->kv_b);
    return l->type < 0 ? KT_ERR_TYPE : KT_OK;
}

int kt_latent_attention_create(const kt_latent_desc *desc, kt_attention **attention) {
    if (!attention) return KT_ERR_NULL;
    *attention = NULL;
    if (!desc) return KT_ERR_NULL;
    if (desc->gate < KT_GATE_NONE || desc->gate > KT_GATE_HEADS) return KT_ERR_ACTIVATION;
    if (desc->gate_by < KT_GATE_SIGMOID || desc->gate_by > KT_GATE_SOFTPLUS) return KT_ERR_ACTIVATION;
    int status = check_sizes(desc);
    if (status) return status;
    struct kt_attention *a = calloc(1, sizeof *a);
    if (a) a->latent = calloc(1, sizeof *a->latent);
    if (!a || !a->latent) {
        free(a);
        return KT_ERR_MEMORY;
    }
    status = fill(a, desc);
    if (status) {
        kt_attention_destroy(a);
        return status;
    }
    struct kt_latent *l = a->latent;
    l->q_norm = desc->q_norm;
    l->kv_norm = desc->kv_norm;
    l->key_norm = desc->key_norm;
    l->q_eps = desc->q_eps;
    l->kv_eps = desc->kv_eps;
    l->key_eps = desc->key_eps;
    l->latent = desc->latent;
    l->plain = desc->plain;
    l->rotary = desc->rotary;
    a->d = (kt_attention_desc){.sinks = desc->sinks, .gate = desc->gate, .gate_by = desc->gate_by,
                               .rotary_pairs = desc->rotary_pairs, .scale = desc->scale, .heads = desc->heads, .kv_heads = 1, .size = kt_latent_row(a),
                               .value_size = desc->value_size, .window = desc->window};
    memcpy(a->d.bias, desc->bias, sizeof a->d.bias);
    kt_attention_place(a);
    *attention = a;
    return KT_OK;
}

/* ---- which form ------------------------------------------------------------------------------------- */

/* Compares multiplications per head. With DeepSeek-V3's sizes and a long cache, 170 queries are the limit. */
static int absorbing_is_cheaper(const struct kt_attention *a, int64_t queries, int64_t cached) {
    const struct kt_latent *l = a->latent;
    const double q = (double)queries, t = (double)cached, into = (double)(l->latent * (l->plain + a->d.value_size));
    const double absorbed = q * into + q * t * (double)(2 * l->latent + l->rotary);
    const double expanded = t * into + q * t * (double)(l->plain + l->rotary + a->d.value_size);
    return absorbed <= expanded;
}

static int absorbs(const struct kt_piece *p, int64_t sequence) {
    const kt_sequence *s = &p->c->sequences[sequence];
    const int64_t length = s->length + p->c->tokens;
    return absorbing_is_cheaper(p->a, p->c->tokens, s->start < length ? length - s->start : 1);
}

int64_t kt_latent_plan(struct kt_piece *p) {
    p->latent.absorbed = absorbs(p, p->sequence);
    p->sequences = 1;
    while (p->sequence + p->sequences < p->c->batch && absorbs(p, p->sequence + p->sequences) == p->latent.absorbed)
        p->sequences++;
    return p->latent.absorbed ? ABSORBED : EXPANDED;
}

/* ---- memory ----------------------------------------------------------------------------------------- */

static int64_t query_size(const struct kt_attention *a) { return a->latent->plain + a->latent->rotary; }

/* The first token of a sequence whose page is there. */
static int64_t first_held(const struct kt_attend_sequence *s) {
    return kt_min(s->start, s->length) / KT_PAGE * KT_PAGE;
}

/* Attention of `heads` expanded heads from number `from` on. */
static struct kt_attend attend_expanded(const struct kt_piece *p, const struct kt_attend_sequence *s, int64_t from,
                                        int64_t heads) {
    const struct kt_attention *a = p->a;
    const struct kt_latent_piece *own = &p->latent;
    return (struct kt_attend){
        .k = p->k, .type = own->type, .heads = heads, .kv_heads = heads, .size = query_size(a),
        .value_size = a->d.value_size, .scale = a->d.scale, .window = kt_window(p),
        .sinks = a->d.sinks ? a->d.sinks + from : NULL, .q = own->q ? own->q + from * query_size(a) : NULL,
        .q_stride = own->q_stride, .out = p->mixed ? p->mixed + from * a->d.value_size : NULL,
        .out_stride = p->mixed_stride, .sequence = s, .sequences = 1};
}

static size_t expanded_scratch(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    struct kt_latent_piece *own = &p->latent;
    own->type = p->c->dtype == KT_BF16 ? KT_BF16 : KT_F32;
    own->tokens = own->longest = 0;
    own->q = NULL;
    for (int64_t i = 0; i < p->sequences; i++) {
        const int64_t held = kt_round_up(p->seq[i].length - first_held(&p->seq[i]), KT_PAGE);
        if (held > own->tokens) own->tokens = held;
        if (p->seq[i].length > own->longest) own->longest = p->seq[i].length;
    }
    const size_t head = (size_t)own->tokens * kt_cache_row(own->type, query_size(a) + a->d.value_size);
    own->heads = kt_min(a->d.heads, head < BUDGET ? (int64_t)(BUDGET / (head + !head)) : 1);
    own->forms_l = kt_forms_needed(p->k, &a->latent->kv_b, KT_EXPAND, p->c->dtype);
    size_t most = 0;
    for (int64_t i = 0; i < p->sequences; i++)
        for (int last = 0; last < 2; last++) {
            const int64_t heads = last ? a->d.heads % own->heads : own->heads;
            if (!heads) continue;
            const struct kt_attend one = attend_expanded(p, &p->seq[i], 0, heads);
            const size_t bytes = kt_attend_scratch(&one, pool);
            if (bytes > most) most = bytes;
        }
    return most;
}

size_t kt_latent_scratch(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    struct kt_latent_piece *own = &p->latent;
    own->forms_qa = a->latent->q_b.rows ? kt_forms_needed(p->k, &a->latent->q_b, p->tokens, p->c->dtype) : 0;
    if (!own->absorbed) return expanded_scratch(p, pool);
    p->attend.value_size = a->latent->latent;
    p->attend.q_stride = a->d.heads * kt_latent_row(a);
    return kt_attend_scratch(&p->attend, pool);
}

static void layout_expanded(struct kt_piece *p, struct kt_arena *arena) {
    const struct kt_attention *a = p->a;
    struct kt_latent_piece *own = &p->latent;
    const int64_t rows = own->heads * own->tokens;
    own->keys = kt_arena_take(arena, rows, kt_cache_row(own->type, query_size(a)));
    own->values = kt_arena_take(arena, rows, kt_cache_row(own->type, a->d.value_size));
    for (int i = 0; i < 2; i++) own->pages[i] = kt_arena_take(arena, own->longest / KT_PAGE + 1, sizeof(uint8_t *));
    own->list = kt_arena_take(arena, KT_EXPAND, sizeof *own->list);
    own->l = kt_arena_take(arena, p->threads, sizeof *own->l);
    own->turned = kt_arena_take(arena, p->threads * KT_EXPAND * a->latent->rotary, sizeof(float));
    for (int i = 0; i < p->threads; i++) {
        struct kt_acts acts;
        kt_acts_take(arena, KT_EXPAND, a->latent->latent, own->forms_l, &acts);
        if (arena->base) own->l[i] = acts;
    }
}

void kt_latent_layout(struct kt_piece *p, struct kt_arena *arena) {
    const struct kt_attention *a = p->a;
    struct kt_latent_piece *own = &p->latent;
    const int64_t n = p->tokens;
    own->q_stride = a->width;
    if (a->latent->q_b.rows) {
        own->q_stride = kt_round_up(a->latent->q_b.rows, KT_TILE);
        kt_acts_take(arena, n, a->latent->q_b.cols, own->forms_qa, &own->qa);
        own->q = kt_arena_take(arena, n * own->q_stride, sizeof *own->q);
    }
    if (!own->absorbed) {
        layout_expanded(p, arena);
        return;
    }
    own->query = kt_arena_take(arena, n * p->attend.q_stride, sizeof *own->query);
    own->context = kt_arena_take(arena, n * a->d.heads * a->latent->latent, sizeof *own->context);
}

/* ---- queries, and the cache ------------------------------------------------------------------------- */

static int64_t job_end(const struct kt_piece *p, int32_t job) {
    return kt_min((int64_t)(job + 1) * p->per_job, p->tokens);
}

static void prepare_qa(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct kt_piece *p = ctx;
    const struct kt_latent *l = p->a->latent;
    struct kt_acts *qa = &p->latent.qa;
    const int64_t rank = p->a->part[KT_Q].rows;
    for (int64_t t = (int64_t)job * p->per_job; t < job_end(p, job); t++) {
        const float *r = p->r + t * p->a->width;
        float *to = qa->f + t * qa->stride;
        kt_rms_norm(r, l->q_norm, l->q_eps, rank, to);
        if (qa->cols > rank) memcpy(to + rank, r, (size_t)rank * sizeof *r);
        p->nonfinite[t] = !kt_acts_derive(p->k, qa, t, p->latent.forms_qa);
    }
}

/* Each head's queries and then its gate: the queries move together at the front. */
static void part_gates(const struct kt_piece *p, float *q, float *gates) {
    const struct kt_attention *a = p->a;
    const int64_t size = query_size(a), value = a->d.value_size;
    for (int64_t h = 0; h < a->d.heads; h++) {
        const float *head = q + h * (size + value);
        memcpy(gates + h * value, head + size, (size_t)value * sizeof *q);
        memmove(q + h * size, head, (size_t)size * sizeof *q);
    }
}

/* Positions of a token's queries and its key, which goes to the cache behind its latent. */
static void finish(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct kt_piece *p = ctx;
    const struct kt_attention *a = p->a;
    const struct kt_latent *l = a->latent;
    const struct kt_latent_piece *own = &p->latent;
    struct kt_angles at;
    for (int64_t t = (int64_t)job * p->per_job; t < job_end(p, job); t++) {
        float *q = own->q + t * own->q_stride + l->plain, *row = p->r + t * a->width + a->first[KT_K];
        if (a->d.gate == KT_GATE_IN_Q) part_gates(p, q - l->plain, p->m.f + t * p->m.stride);
        kt_load_angles(p, t, &at);
        for (int64_t h = 0; h < a->d.heads; h++, q += query_size(a)) {
            kt_turn(p, q, &at);
            if (!own->absorbed) continue;
            float *query = own->query + t * p->attend.q_stride + h * kt_latent_row(a);
            memcpy(query + l->latent, q, (size_t)l->rotary * sizeof *q);
        }
        kt_rms_norm(row, l->kv_norm, l->kv_eps, l->latent, row);
        if (l->key_norm) kt_rms_norm(row + l->latent, l->key_norm, l->key_eps, l->rotary, row + l->latent);
        kt_turn(p, row + l->latent, &at);
        const kt_sequence *s = &p->c->sequences[p->sequence + t / p->each];
        const int64_t pos = s->length + p->token + t % p->each;
        uint8_t *to = (uint8_t *)s->keys[pos / KT_PAGE] + pos % KT_PAGE * p->c->layout.key_row;
        kt_cache_store(p->k, row, kt_latent_row(a), p->c->layout.type, to);
    }
}

/* ---- absorbed --------------------------------------------------------------------------------------- */

/* Row `row` of head h of kv_b: W_UK from 0, W_UV from N on. */
static const uint8_t *kv_row(const struct kt_attention *a, int64_t h, int64_t row) {
    const struct kt_matrix *w = &a->latent->kv_b;
    return w->data + (size_t)(h * (a->latent->plain + a->d.value_size) + row) * w->stride;
}

static int64_t columns_of(const struct kt_attention *a) {
    return a->d.heads < MANY_HEADS ? kt_min(COLUMNS, a->latent->latent) : a->latent->latent;
}

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* What of the matrix is fetched while `rows` rows before it are computed with. */
static struct kt_ahead fetch(const uint8_t *row, size_t stride, size_t bytes, int64_t rows) {
    return (struct kt_ahead){.row = row, .stride = stride, .bytes = bytes, .rows = rows > 0 ? (int)rows : 0};
}

/* query[h] = W_UK[h]^T q[h], some columns of it. */
static void absorb(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct kt_piece *p = ctx;
    const struct kt_attention *a = p->a;
    const struct kt_latent *l = a->latent;
    const int64_t width = columns_of(a), parts = divide_up(l->latent, width), h = job / parts;
    const int64_t first = job % parts * width, columns = kt_min(width, l->latent - first);
    const size_t bytes = kt_cache_row(l->type, columns), at = kt_cache_row(l->type, first);
    float *query = p->latent.query + h * kt_latent_row(a) + first, keep[ABSORBED];
    for (int32_t t = 0; t < p->tokens; t++) {
        keep[t] = 1.0f;
        memset(query + t * p->attend.q_stride, 0, (size_t)columns * sizeof *query);
    }
    for (int64_t n = 0; n < l->plain; n += ROWS) {
        const int64_t rows = kt_min(l->plain - n, ROWS), next = kt_min(l->plain - n - rows, ROWS);
        struct kt_ahead ahead = fetch(kv_row(a, h, n + rows) + at, l->kv_b.stride, bytes, next);
        p->k->values[l->type](p->latent.q + h * query_size(a) + n, p->latent.q_stride, p->tokens, keep,
                              kv_row(a, h, n) + at, l->kv_b.stride, (int)rows, columns, query, p->attend.q_stride,
                              &ahead);
    }
}

/* mixed[h] = W_UV[h] context[h], some rows of it. */
static void release(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct kt_piece *p = ctx;
    const struct kt_attention *a = p->a;
    const struct kt_latent *l = a->latent;
    const int64_t parts = divide_up(a->d.value_size, OUT_ROWS), h = job / parts, first = job % parts * OUT_ROWS;
    const int64_t rows = kt_min(OUT_ROWS, a->d.value_size - first);
    const int64_t next = kt_min(OUT_ROWS, a->d.value_size - first - rows);
    const struct kt_acts context = {.cols = l->latent, .stride = a->d.heads * l->latent,
                                    .f = p->latent.context + h * l->latent};
    const uint8_t *w = kv_row(a, h, l->plain + first);
    struct kt_ahead ahead = fetch(w + (size_t)rows * l->kv_b.stride, l->kv_b.stride, l->kv_b.stride, next);
    p->k->scores[l->type](&context, p->tokens, w, l->kv_b.stride, (int)rows,
                          p->mixed + h * a->d.value_size + first, p->mixed_stride, &ahead);
}

static void mix_absorbed(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    const int64_t heads = a->d.heads, latent = a->latent->latent;
    kt_pool_run(pool, absorb, p, (int32_t)(heads * divide_up(latent, columns_of(a))));
    p->attend.q = p->latent.query;
    p->attend.out = p->latent.context;
    p->attend.out_stride = heads * latent;
    kt_attend_run(&p->attend, pool, p->attend_scratch);
    kt_pool_run(pool, release, p, (int32_t)(heads * divide_up(a->d.value_size, OUT_ROWS)));
}

/* ---- expanded --------------------------------------------------------------------------------------- */

/* Latents of cached tokens begin .. begin + n, in the forms that kv_b wants, and the turned parts of their keys. 0:
 * some form cannot hold them. */
static int load_latents(const struct kt_piece *p, int64_t begin, int64_t n, struct kt_acts *acts, float *turned) {
    const struct kt_latent *l = p->a->latent;
    const struct kt_attend_sequence *s = &p->seq[p->latent.sequence];
    const int type = p->c->layout.type;
    int finite = 1;
    for (int64_t t = 0; t < n; t++) {
        const uint8_t *row = s->kv.keys[(begin + t) / KT_PAGE] + (size_t)((begin + t) % KT_PAGE) * s->kv.key_row;
        kt_cache_load(p->k, row, l->latent, type, acts->f + t * acts->stride);
        finite &= kt_acts_derive(p->k, acts, t, p->latent.forms_l);
        if (!l->rotary) continue;
        kt_cache_load(p->k, row + kt_cache_row(type, l->latent), l->rotary, type, turned + t * l->rotary);
    }
    return finite;
}

/* Rows of one head of kv_b, times the latents, become values at `to`, `row` bytes from a token to the next. */
static void expand_rows(const struct kt_piece *p, const struct kt_block *block, int64_t rows, uint8_t *to, size_t row) {
    const int type = p->latent.type;
    struct kt_block b = *block;
    for (int64_t r = 0; r < rows; r += KT_BLOCK_ROWS) {
        b.first = block->first + r;
        b.rows = (int)kt_min(rows - r, KT_BLOCK_ROWS);
        kt_matmul_block(&b);
        for (int t = 0; t < b.tokens; t++)
            kt_cache_store(p->k, b.c + (int64_t)t * b.ldc, b.rows, type, to + (size_t)t * row + kt_cache_row(type, r));
    }
}

/* Keys and values of some tokens, of some heads of the group. */
static void expand(void *ctx, int32_t job, int thread) {
    const struct kt_piece *p = ctx;
    const struct kt_attention *a = p->a;
    const struct kt_latent *l = a->latent;
    const struct kt_latent_piece *own = &p->latent;
    const int64_t parts = divide_up(own->some, own->each), end = kt_min(own->some, (job % parts + 1) * own->each);
    const int64_t length = p->seq[own->sequence].length, begin = own->from + job / parts * KT_EXPAND;
    const int64_t n = kt_min(KT_EXPAND, length - begin), size = query_size(a), both = l->plain + a->d.value_size;
    const size_t key = kt_cache_row(own->type, size), value = kt_cache_row(own->type, a->d.value_size);
    float *turned = own->turned + (int64_t)thread * KT_EXPAND * l->rotary;
    const int finite = load_latents(p, begin, n, &own->l[thread], turned);
    struct kt_block b = {.k = finite ? p->k : kt_exact_kernels(), .w = &l->kv_b, .a = &own->l[thread],
                         .token = own->list, .tokens = (int)n, .s = &p->scratch[thread], .c = p->scratch[thread].c,
                         .ldc = KT_BLOCK_ROWS};
    for (int64_t h = job % parts * own->each; h < end; h++) {
        const int64_t row = h * own->tokens + begin - own->from;
        uint8_t *keys = own->keys + (size_t)row * key;
        b.first = (own->head + h) * both;
        expand_rows(p, &b, l->plain, keys, key);
        b.first += l->plain;
        expand_rows(p, &b, a->d.value_size, own->values + (size_t)row * value, value);
        for (int64_t t = 0; t < n && l->rotary; t++)
            kt_cache_store(p->k, turned + t * l->rotary, l->rotary, own->type,
                           keys + (size_t)t * key + kt_cache_row(own->type, l->plain));
    }
}

/* A group of heads of one sequence. */
static void mix_group(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    struct kt_latent_piece *own = &p->latent;
    struct kt_attend_sequence s = p->seq[own->sequence];
    const int64_t chunks = divide_up(s.length - own->from, KT_EXPAND);
    const size_t key = kt_cache_row(own->type, query_size(a)), value = kt_cache_row(own->type, a->d.value_size);
    if (chunks) { /* else no token is seen */
        own->each = divide_up(own->some, divide_up(8 * (int64_t)p->threads, chunks)); /* does not change any result */
        kt_pool_run(pool, expand, p, (int32_t)(chunks * divide_up(own->some, own->each)));
    }
    for (int64_t page = own->from / KT_PAGE; page * KT_PAGE < s.length; page++) {
        const size_t row = (size_t)(page * KT_PAGE - own->from);
        own->pages[0][page] = own->keys + row * key;
        own->pages[1][page] = own->values + row * value;
    }
    s.kv = (struct kt_kv){own->pages[0], own->pages[1], (size_t)own->tokens * key, (size_t)own->tokens * value, key,
                          value};
    const struct kt_attend attend = attend_expanded(p, &s, own->head, own->some);
    kt_attend_run(&attend, pool, p->attend_scratch);
}

static void mix_expanded(struct kt_piece *p, kt_pool *pool) {
    struct kt_latent_piece *own = &p->latent;
    for (int32_t i = 0; i < KT_EXPAND; i++) own->list[i] = i;
    for (own->sequence = 0; own->sequence < p->sequences; own->sequence++) {
        own->from = first_held(&p->seq[own->sequence]);
        for (own->head = 0; own->head < p->a->d.heads; own->head += own->heads) {
            own->some = kt_min(own->heads, p->a->d.heads - own->head);
            mix_group(p, pool);
        }
    }
}

void kt_latent_mix(struct kt_piece *p, kt_pool *pool) {
    const struct kt_attention *a = p->a;
    struct kt_latent_piece *own = &p->latent;
    const int32_t jobs = (p->tokens + p->per_job - 1) / p->per_job;
    if (a->latent->q_b.rows) {
        static const int64_t first = 0;
        static const float *const none = NULL;
        kt_pool_run(pool, prepare_qa, p, jobs);
        kt_project(p, pool, &(struct kt_projection){&a->latent->q_b, &none, &first, 1, &own->qa, own->q,
                                                    own->q_stride});
    } else own->q = p->r + a->first[KT_Q];
    kt_pool_run(pool, finish, p, jobs);
    if (own->absorbed) mix_absorbed(p, pool);
    else mix_expanded(p, pool);
}
