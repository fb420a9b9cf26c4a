/* moe_backward.c: gradients of routed experts whose weights are frozen. No intrinsics here, and no knowledge of formats.
 *
 * With the letters of moe.c, e the expert of a pair, dY[t] the gradient of out[t], ' for transposed:
 *
 *   for each expert, 256 of I:  g, u      = gate_e, up_e @ x[tokens of e]       as moe.c computes them
 *                               t         = dY[tokens of e] @ down_e            transposed.c
 *                               dw[pos]   = sum of t * m, m = act(g) * u        the weight's: <dY, down m> = <down' dY, m>
 *                               dg, du    = gradients of act(g) * u, that of m being weight * t
 *   for each expert, 256 of H:  dx[pos]   = dg @ gate_e + du @ up_e
 *   for each token:             d_hidden  = sum over slots, in order, of dx
 *
 * Adapters add z = s x A' and what B makes of it to g and u (first) and to y (down); of the latter zd = s dY B comes
 * before t, which gets zd A. From dg and du comes q = s (dg, du) B, from m s m A'; dx gets q A. Then
 * dA += q' x, dB += (dg, du)' z, and for down dA += (w zd)' m, dB += (w dY)' (s m A'): sums over an expert's tokens.
 *
 * REGULARITIES
 *  - Every line is a job set whose jobs write disjoint memory, and every sum has one owner and one order: see moe.c.
 *  - Experts of many tokens are cut into shares of them, of a size that does not depend on the threads.
 *  - Nothing is kept of the forward call but what it was given. */
#include <stdlib.h>
#include <string.h>

#include "../../include/kt_native.h"
#include "adapter.h"
#include "experts.h"
#include "pairs.h"

enum { CHUNK_TOKENS = 4096, SIDE = KT_BLOCK_COLS };

struct thread {
    struct kt_scratch s;
    uint32_t *panel;
    float *t;              /* [KT_SHARE_TOKENS][SIDE] */
    struct kt_acts turned; /* [rank][tokens of an expert] */
    float *sum;            /* [rank][SIDE] */
};

/* One call, for a chunk of tokens. */
struct backward {
    const struct kt_experts *e;
    const struct kt_kernels *k;
    const void *hidden, *d_out;
    const float *weights;
    const kt_lora *first, *down; /* NULL: none */
    void *d_hidden;
    float *d_weights;            /* or NULL */
    int dtype, per_job;          /* tokens of a job */
    struct kt_sorted p;
    int forms_x, forms_d, forms_g, forms_u;
    struct kt_acts x, d;         /* [T, H] hidden, d_out */
    struct kt_acts g, u;         /* [pairs, I] their gradients, when the first job set is done */
    struct kt_acts m;            /* [pairs, I], for an adapter of down */
    struct kt_acts z, q;         /* [pairs, rank], for one of gate and up */
    struct kt_acts zd, zm;       /* [pairs, rank], for one of down */
    float *dx;                   /* [pairs, dx_stride] */
    float *weight;               /* [pairs] by pos */
    float *dw;                   /* [pairs, blocks] parts of its gradient */
    int64_t dx_stride;
    int32_t *each;               /* [rank] 0, 1, 2, ... */
    int32_t blocks, outer_blocks; /* of I, of H */
    int32_t grad_blocks;          /* of all matrices of adapters */
    int threads;
    struct thread *thread;
};

/* ---- products ---------------------------------------------------------------------------------------- */

/* What products with the tokens of a share have in common. */
static struct kt_transposed transposed(const struct backward *b, const struct thread *mine, const struct kt_group *g,
                                       const struct kt_matrix *w, const struct kt_acts *d) {
    return (struct kt_transposed){.k = b->k, .w = w, .cols = (int)kt_min(w->cols, SIDE), .d = d,
                                  .token = (d == &b->d ? b->p.token : b->p.row) + g->begin, .tokens = g->tokens,
                                  .s = &mine->s, .panel = mine->panel};
}

/* Columns first .. first + SIDE of d @ w, in addition to c where `add` is set. */
static void product(struct kt_transposed t, const struct backward *b, int64_t first, float *c, int64_t ldc, int add) {
    t.first = first;
    t.cols = (int)kt_min(t.w->cols - first, SIDE);
    t.forms = kt_transposed_forms(b->k, t.w, b->dtype);
    t.c = c;
    t.ldc = ldc;
    t.add = add;
    kt_transposed_block(&t);
}

static struct kt_block block_of(const struct backward *b, const struct thread *mine, const struct kt_group *g,
                                const struct kt_acts *a) {
    return (struct kt_block){.k = b->k, .a = a, .token = (a == &b->x ? b->p.token : b->p.row) + g->begin,
                             .tokens = g->tokens, .s = &mine->s};
}

static float *row_of(const struct kt_acts *a, int64_t row) { return a->f + row * a->stride; }

static int64_t first_rows(const struct kt_experts *e) { return e->gate ? 2 * e->inner : e->inner; }

/* Sixteen partial sums: compilers keep them in vector registers. */
static float dot(const float *x, const float *y, int64_t n) {
    float sums[16] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * y[i + j];
    for (; i < n; i++) sum += x[i] * y[i];
    for (int j = 0; j < 16; j++) sum += sums[j];
    return sum;
}

/* ---- jobs -------------------------------------------------------------------------------------------- */

static void prepare(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct backward *b = ctx;
    const int64_t H = b->e->hidden;
    for (int64_t t = (int64_t)job * b->per_job; t < kt_min((int64_t)(job + 1) * b->per_job, b->p.tokens); t++) {
        kt_load_row(b->k, b->hidden, b->dtype, t * H, H, row_of(&b->x, t));
        kt_acts_derive(b->k, &b->x, t, b->forms_x);
        kt_load_row(b->k, b->d_out, b->dtype, t * H, H, row_of(&b->d, t));
        kt_acts_derive(b->k, &b->d, t, b->forms_d);
    }
}

/* rows of z *= scale */
static void scale_rows(const struct backward *b, const struct kt_group *g, float scale, struct kt_acts *z) {
    for (int32_t p = g->begin; p < g->begin + g->tokens; p++)
        b->k->scale_add(scale, row_of(z, p), row_of(z, p), z->cols, 0);
}

/* z (+)= rows of d @ w, all columns, w being a matrix of an adapter. */
static void all_columns(const struct backward *b, const struct thread *mine, const struct kt_group *g,
                        const struct kt_matrix *w, const struct kt_acts *d, struct kt_acts *z, int add) {
    const struct kt_transposed t = transposed(b, mine, g, w, d);
    for (int64_t c = 0; c < w->cols; c += SIDE) product(t, b, c, row_of(z, g->begin) + c, z->stride, add);
}

/* z and zd, before all else. */
static void narrow(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    const struct thread *mine = &b->thread[thread];
    const struct kt_group *g = &b->p.share[job];
    if (b->first) {
        const struct kt_block of_x = block_of(b, mine, g, &b->x);
        kt_lora_narrow(b->first, b->e->hidden, g->expert, &of_x, row_of(&b->z, g->begin), b->z.stride);
    }
    if (!b->down) return;
    const struct kt_matrix w = kt_lora_b(b->down, b->e->hidden, g->expert, 0, b->e->hidden);
    all_columns(b, mine, g, &w, &b->d, &b->zd, 0);
    scale_rows(b, g, b->down->scale, &b->zd);
}

/* q and zm, when dg, du and m are there. */
static void narrow_again(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    const struct thread *mine = &b->thread[thread];
    const struct kt_group *g = &b->p.share[job];
    const int64_t inner = b->e->inner, rows = first_rows(b->e);
    if (b->first) {
        const struct kt_matrix of_gate = kt_lora_b(b->first, rows, g->expert, 0, inner);
        const struct kt_matrix of_up = kt_lora_b(b->first, rows, g->expert, rows - inner, inner);
        if (b->e->gate) all_columns(b, mine, g, &of_gate, &b->g, &b->q, 0);
        all_columns(b, mine, g, &of_up, &b->u, &b->q, b->e->gate != NULL);
        scale_rows(b, g, b->first->scale, &b->q);
    }
    if (!b->down) return;
    const struct kt_block of_m = block_of(b, mine, g, &b->m);
    kt_lora_narrow(b->down, inner, g->expert, &of_m, row_of(&b->zm, g->begin), b->zm.stride);
}

/* gate and up of columns first .. first + n of I, as the forward call has them before the activation, where their
 * gradients will be. */
static void again(const struct backward *b, const struct thread *mine, const struct kt_group *g, int64_t first, int n) {
    for (int r = 0; r < n; r += KT_BLOCK_ROWS) {
        struct kt_block some = block_of(b, mine, g, &b->x);
        some.first = first + r;
        some.rows = (int)kt_min(n - r, KT_BLOCK_ROWS);
        some.c = row_of(&b->u, g->begin) + some.first;
        some.ldc = b->u.stride;
        float *gate = b->e->gate ? row_of(&b->g, g->begin) + some.first : NULL;
        kt_expert_products(b->e, g->expert, some, (struct kt_next){0}, gate, b->g.stride);
        const struct kt_widening z = {b->first, &b->z, b->p.row + g->begin};
        if (b->first) kt_expert_widen(b->e, g->expert, &some, &z, gate, b->g.stride);
    }
}

static void inner(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    const struct thread *mine = &b->thread[thread];
    const struct kt_experts *e = b->e;
    const struct kt_group *g = &b->p.share[job / b->blocks];
    const int32_t block = job % b->blocks;
    const int64_t first = (int64_t)block * SIDE;
    const int n = (int)kt_min(e->inner - first, SIDE);
    again(b, mine, g, first, n);
    product(transposed(b, mine, g, &e->down[g->expert], &b->d), b, first, mine->t, SIDE, 0);
    if (b->down) {
        const struct kt_matrix a = kt_lora_a(b->down, e->inner, g->expert);
        product(transposed(b, mine, g, &a, &b->zd), b, first, mine->t, SIDE, 1);
    }
    for (int64_t p = g->begin; p < g->begin + g->tokens; p++) {
        const float *t = mine->t + (p - g->begin) * SIDE;
        float some[SIDE], *m = b->down ? row_of(&b->m, p) + first : some;
        float *gate = e->gate ? row_of(&b->g, p) + first : NULL;
        b->k->activate_back(&e->glu, b->weight[p], t, gate, row_of(&b->u, p) + first, m, n);
        b->dw[p * b->blocks + block] = dot(t, m, n);
        kt_acts_derive_part(b->k, &b->u, p, first, n, b->forms_u);
        if (gate) kt_acts_derive_part(b->k, &b->g, p, first, n, b->forms_g);
    }
}

/* What this thread reads after `job`, when the threads take turns. */
static struct kt_ahead next_outer(const struct backward *b, int32_t job) {
    const struct kt_experts *e = b->e;
    const int64_t next = (int64_t)job + b->threads;
    if (next >= (int64_t)b->p.shares * b->outer_blocks) return (struct kt_ahead){0};
    const int64_t first = next % b->outer_blocks * SIDE;
    return kt_transposed_ahead(&(e->gate ? e->gate : e->up)[b->p.share[next / b->outer_blocks].expert], first,
                               (int)kt_min(e->hidden - first, SIDE));
}

static void outer(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    const struct thread *mine = &b->thread[thread];
    const struct kt_experts *e = b->e;
    const struct kt_group *g = &b->p.share[job / b->outer_blocks];
    const int64_t first = (int64_t)(job % b->outer_blocks) * SIDE;
    float *dx = b->dx + g->begin * b->dx_stride + first;
    const struct kt_matrix *up = &e->up[g->expert];
    if (e->gate) {
        struct kt_transposed t = transposed(b, mine, g, &e->gate[g->expert], &b->g);
        t.next = kt_transposed_ahead(up, first, (int)kt_min(e->hidden - first, SIDE));
        product(t, b, first, dx, b->dx_stride, 0);
    }
    struct kt_transposed t = transposed(b, mine, g, up, &b->u);
    t.next = next_outer(b, job);
    product(t, b, first, dx, b->dx_stride, e->gate != NULL);
    if (!b->first) return;
    const struct kt_matrix a = kt_lora_a(b->first, e->hidden, g->expert);
    product(transposed(b, mine, g, &a, &b->q), b, first, dx, b->dx_stride, 1);
}

/* The gradient of weight i, of token t. */
static float of_weight(const struct backward *b, int64_t i, int64_t t) {
    if (b->p.pos[i] < 0) return 0.0f;
    const int64_t id = b->p.ids[i], H = b->e->hidden;
    const float *part = b->dw + b->p.pos[i] * (int64_t)b->blocks, *bias = b->e->glu.down_bias;
    float sum = bias ? dot(row_of(&b->d, t), bias + id * H, H) : 0.0f;
    for (int32_t n = 0; n < b->blocks; n++) sum += part[n];
    return sum;
}

static void combine(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    const int64_t H = b->e->hidden, slots = b->p.slots;
    float *sum = b->thread[thread].sum;
    for (int64_t t = (int64_t)job * b->per_job; t < kt_min((int64_t)(job + 1) * b->per_job, b->p.tokens); t++) {
        memset(sum, 0, (size_t)H * sizeof *sum);
        for (int64_t i = t * slots; i < (t + 1) * slots; i++) {
            if (b->p.pos[i] >= 0) b->k->add(b->dx + b->p.pos[i] * b->dx_stride, sum, H);
            if (b->d_weights) b->d_weights[i] = of_weight(b, i, t);
        }
        kt_store_row(b->k, sum, H, b->dtype, b->d_hidden, t * H);
    }
}

/* ---- gradients of adapters --------------------------------------------------------------------------- */

/* One matrix: the sum over an expert's tokens of wide' narrow, [cols, rank], or its transpose. */
struct gradient {
    float *out;                     /* of expert 0 */
    const struct kt_acts *wide, *narrow;
    int64_t cols, rows_all, row;    /* cols of wide; rows of all parts of B, and its first here */
    int turned;                     /* out is [rank, cols], as A is */
    int weighed;                    /* a pair's part is multiplied by its weight */
};

/* The gradient that job `block` of an expert is part of; `block` becomes its block of columns. */
static struct gradient gradient_of(const struct backward *b, int32_t *block) {
    const int64_t H = b->e->hidden, inner = b->e->inner, rows = first_rows(b->e);
    struct gradient all[5] = {{0}};
    int n = 0;
    if (b->first) {
        all[n++] = (struct gradient){b->first->grad_a, &b->x, &b->q, H, b->first->rank, 0, 1, 0};
        all[n++] = (struct gradient){b->first->grad_b, &b->u, &b->z, inner, rows, rows - inner, 0, 0};
        if (b->e->gate) all[n++] = (struct gradient){b->first->grad_b, &b->g, &b->z, inner, rows, 0, 0, 0};
    }
    if (b->down) {
        all[n++] = (struct gradient){b->down->grad_a, &b->m, &b->zd, inner, b->down->rank, 0, 1, 1};
        all[n++] = (struct gradient){b->down->grad_b, &b->d, &b->zm, H, H, 0, 0, 1};
    }
    int i = 0;
    for (; i < n - 1; i++) {
        const int32_t blocks = (int32_t)((all[i].cols + SIDE - 1) / SIDE);
        if (*block < blocks) break;
        *block -= blocks;
    }
    return all[i];
}

/* narrow, of an expert's tokens, as rows of rank values become `rank` rows. */
static void turn(const struct backward *b, const struct kt_group *g, const struct gradient *d, struct kt_acts *to) {
    for (int32_t i = 0; i < g->tokens; i++) {
        const float *from = row_of(d->narrow, g->begin + i);
        const float weight = d->weighed ? b->weight[g->begin + i] : 1.0f;
        for (int64_t r = 0; r < d->narrow->cols; r++) to->f[r * to->stride + i] = weight * from[r];
    }
}

static void gradients(void *ctx, int32_t job, int thread) {
    struct backward *b = ctx;
    struct thread *mine = &b->thread[thread];
    const struct kt_group *g = &b->p.group[job / b->grad_blocks];
    int32_t block = job % b->grad_blocks;
    const struct gradient d = gradient_of(b, &block);
    const int64_t rank = d.narrow->cols, first = (int64_t)block * SIDE;
    const int n = (int)kt_min(d.cols - first, SIDE);
    const int by_token = d.wide == &b->x || d.wide == &b->d;
    const struct kt_matrix wide = kt_floats_matrix(by_token ? d.wide->f : row_of(d.wide, g->begin), g->tokens, d.cols,
                                                   d.wide->stride);
    turn(b, g, &d, &mine->turned);
    kt_transposed_block(&(struct kt_transposed){
        .k = b->k, .w = &wide, .row = by_token ? b->p.token + g->begin : NULL, .first = first, .cols = n,
        .d = &mine->turned, .token = b->each, .tokens = (int)rank, .s = &mine->s, .panel = mine->panel,
        .c = mine->sum, .ldc = SIDE});
    if (d.turned) {
        float *out = d.out + g->expert * rank * d.cols + first;
        for (int64_t r = 0; r < rank; r++) b->k->add(mine->sum + r * SIDE, out + r * d.cols, n);
        return;
    }
    float *out = d.out + (g->expert * d.rows_all + d.row + first) * rank;
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < rank; r++) out[i * rank + r] += mine->sum[r * SIDE + i];
}

/* ---- the call ---------------------------------------------------------------------------------------- */

static void needs(struct backward *b) {
    const struct kt_experts *e = b->e;
    b->forms_x = b->forms_d = b->forms_g = b->forms_u = 0;
    for (int64_t i = 0; i < e->count; i++) {
        const int32_t all = b->p.of_expert[i];
        if (!all) continue;
        const int32_t some[] = {(int32_t)kt_min(all, KT_SHARE_TOKENS), all % KT_SHARE_TOKENS};
        for (int j = 0; j < 2; j++) {
            if (!some[j]) continue;
            if (e->gate) b->forms_x |= kt_forms_needed(b->k, &e->gate[i], some[j], b->dtype);
            b->forms_x |= kt_forms_needed(b->k, &e->up[i], some[j], b->dtype);
        }
        if (e->gate) b->forms_g |= kt_transposed_forms(b->k, &e->gate[i], b->dtype);
        b->forms_u |= kt_transposed_forms(b->k, &e->up[i], b->dtype);
        b->forms_d |= kt_transposed_forms(b->k, &e->down[i], b->dtype);
    }
}

/* Of the larger adapter. */
static int64_t rank_of(const struct backward *b) {
    const int64_t first = b->first ? b->first->rank : 0, down = b->down ? b->down->rank : 0;
    return first > down ? first : down;
}

static void take_thread(const struct backward *b, struct kt_arena *arena, struct thread *t) {
    const int64_t rank = rank_of(b);
    kt_scratch_take(arena, 0, &t->s);
    t->panel = kt_transposed_take(arena);
    t->t = kt_arena_take(arena, KT_SHARE_TOKENS * SIDE, sizeof *t->t);
    t->sum = kt_arena_take(arena, b->e->hidden > rank * SIDE ? b->e->hidden : rank * SIDE, sizeof *t->sum);
    if (rank) kt_acts_take(arena, rank, b->p.busiest, 0, &t->turned);
}

static void layout(struct backward *b, struct kt_arena *arena) {
    const int64_t inner = b->e->inner, pairs = b->p.count;
    kt_pairs_take(&b->p, arena);
    b->thread = kt_arena_take(arena, b->threads, sizeof *b->thread);
    kt_acts_take(arena, b->p.tokens, b->e->hidden, b->forms_x, &b->x);
    kt_acts_take(arena, b->p.tokens, b->e->hidden, b->forms_d, &b->d);
    if (b->e->gate) kt_acts_take(arena, pairs, inner, b->forms_g, &b->g);
    kt_acts_take(arena, pairs, inner, b->forms_u, &b->u);
    if (b->down) kt_acts_take(arena, pairs, inner, 0, &b->m);
    if (b->first) kt_acts_take(arena, pairs, b->first->rank, 0, &b->z);
    if (b->first) kt_acts_take(arena, pairs, b->first->rank, 0, &b->q);
    if (b->down) kt_acts_take(arena, pairs, b->down->rank, 0, &b->zd);
    if (b->down) kt_acts_take(arena, pairs, b->down->rank, 0, &b->zm);
    b->each = kt_arena_take(arena, rank_of(b), sizeof *b->each);
    b->dx_stride = kt_round_up(b->e->hidden, KT_TILE);
    b->dx = kt_arena_take(arena, pairs * b->dx_stride, sizeof *b->dx);
    b->weight = kt_arena_take(arena, pairs, sizeof *b->weight);
    b->dw = kt_arena_take(arena, pairs * b->blocks, sizeof *b->dw);
    for (int i = 0; i < b->threads; i++) {
        struct thread t;
        take_thread(b, arena, &t);
        if (arena->base) b->thread[i] = t;
    }
}

/* As in moe.c: a count, the size, the layout. */
static int take_memory(struct backward *b, kt_pool *pool) {
    b->p.of_expert = kt_pool_shared(pool, (size_t)b->e->count * sizeof *b->p.of_expert);
    if (!b->p.of_expert) return KT_ERR_MEMORY;
    kt_pairs_count(&b->p);
    needs(b);
    struct kt_arena arena = {0};
    layout(b, &arena);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(b, &arena);
    kt_pairs_count(&b->p);
    return KT_OK;
}

static int32_t blocks_of(int64_t n) { return (int32_t)((n + SIDE - 1) / SIDE); }

static void cut_jobs(struct backward *b, const kt_pool *pool) {
    b->threads = kt_pool_threads(pool);
    const int64_t H = b->e->hidden, inner = b->e->inner;
    b->blocks = blocks_of(inner);
    b->outer_blocks = blocks_of(H);
    b->grad_blocks = (b->first ? blocks_of(H) + (b->e->gate ? 2 : 1) * blocks_of(inner) : 0) +
                     (b->down ? blocks_of(H) + blocks_of(inner) : 0);
    b->per_job = (int)(1 + 16384 / H);
}

static int run_chunk(struct backward *b, kt_pool *pool) {
    cut_jobs(b, pool);
    const int status = take_memory(b, pool);
    if (status) return status;
    kt_pairs_sort(&b->p);
    for (int64_t i = 0; i < (int64_t)b->p.tokens * b->p.slots; i++)
        if (b->p.pos[i] >= 0) b->weight[b->p.pos[i]] = b->weights[i];
    const int64_t most = (int64_t)b->p.shares * (b->blocks + b->outer_blocks) + (int64_t)b->p.groups * b->grad_blocks;
    if (most > INT32_MAX) return KT_ERR_SHAPE;
    const int adapted = b->first || b->down;
    for (int32_t r = 0; r < rank_of(b); r++) b->each[r] = r;
    const int32_t token_jobs = (b->p.tokens + b->per_job - 1) / b->per_job;
    kt_pool_run(pool, prepare, b, token_jobs);
    if (adapted) kt_pool_run(pool, narrow, b, b->p.shares);
    kt_pool_run(pool, inner, b, b->p.shares * b->blocks);
    if (adapted) kt_pool_run(pool, narrow_again, b, b->p.shares);
    kt_pool_run(pool, outer, b, b->p.shares * b->outer_blocks);
    kt_pool_run(pool, combine, b, token_jobs);
    if (adapted) kt_pool_run(pool, gradients, b, b->p.groups * b->grad_blocks);
    return KT_OK;
}

/* Tokens at once: as many as keep what belongs to pairs within half a gigabyte. */
static int64_t chunk_tokens(const struct kt_experts *e, int64_t slots) {
    const int64_t bytes = slots * 4 * (4 * e->inner + e->hidden) + 12 * e->hidden;
    const int64_t n = ((int64_t)512 << 20) / bytes;
    return n < 16 ? 16 : n > CHUNK_TOKENS ? CHUNK_TOKENS : n;
}

static int run(struct backward b, kt_pool *pool, int64_t tokens) {
    const size_t row = (size_t)b.e->hidden * kt_dtype_size(b.dtype);
    const int64_t chunk = chunk_tokens(b.e, b.p.slots);
    int status = KT_OK;
    for (int64_t t = 0; t < tokens && !status; t += chunk) {
        struct backward some = b;
        some.p.tokens = (int32_t)kt_min(tokens - t, chunk);
        some.hidden = (const uint8_t *)b.hidden + (size_t)t * row;
        some.d_out = (const uint8_t *)b.d_out + (size_t)t * row;
        some.d_hidden = (uint8_t *)b.d_hidden + (size_t)t * row;
        some.p.ids = b.p.ids + t * b.p.slots;
        some.weights = b.weights + t * b.p.slots;
        some.d_weights = b.d_weights ? b.d_weights + t * b.p.slots : NULL;
        status = run_chunk(&some, pool);
    }
    return status;
}

int kt_experts_backward(const kt_experts *e, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                        const int64_t *ids, int64_t per_token, const float *weights, const void *d_out,
                        const kt_lora *first, const kt_lora *down, void *d_hidden, float *d_weights) {
    if (!e || !pool) return KT_ERR_NULL;
    int status = kt_lora_check(first, 1);
    if (!status) status = kt_lora_check(down, 1);
    if (status) return status;
    if (tokens < 0 || tokens > KT_MAX_DIM || per_token < 0 || per_token > 1 << 16) return KT_ERR_SHAPE;
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (tokens == 0) return KT_OK;
    if (!hidden || !d_out || !d_hidden || (per_token && (!ids || !weights))) return KT_ERR_NULL;
    kt_pool_lock(pool);
    status = run((struct backward){.e = e, .k = kt_kernels(), .hidden = hidden, .d_out = d_out, .weights = weights,
                                   .first = first, .down = down, .d_hidden = d_hidden, .d_weights = d_weights,
                                   .dtype = dtype,
                                   .p = {.ids = ids, .experts = e->count, .slots = (int32_t)per_token}},
                 pool, tokens);
    kt_pool_unlock(pool);
    return status;
}
