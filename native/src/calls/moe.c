/* moe.c: routed experts. No intrinsics here, and no knowledge of formats.
 *
 *   sort the (token, slot) pairs by expert                        counting sort; `pos` is where a pair lands
 *   for each token:             x[t]   = fp32, int8 or bf16 form of hidden[t]
 *   for each expert, 128 rows:  g      = gate_e @ x[tokens of e]         decode or panel path, by their number
 *                               u      = up_e   @ x[tokens of e]
 *                               m[pos] = act(g) * u, and the same in the form that down wants
 *   for each expert, 128 rows:  y[pos] = down_e @ m[pos of e]
 *   for each token:             out[t] = sum over slots k, in order, of weights[t,k] * y[pos(t,k)]
 *
 * One token alone goes another way, to the same bits: decode.c.
 *
 * REGULARITIES
 *  - Each line is one job set; between two of them all threads meet. Jobs are independent and write disjoint
 *    memory, and every sum has one owner and one order: the result does not depend on the threads.
 *  - Decode has one token, so each expert meets one token and every weight byte is read once: bandwidth.
 *  - Prefill gives an expert T*K/E tokens: 48 for T=512, K=6, E=64. Panels are unpacked once for all of them.
 *  - On several NUMA nodes each has a share of every expert's gate and up rows, and of its down rows: threads compute
 * the    rows whose pages lie near them (placement.c), and m, small against the weights, crosses between nodes.
 *  - Some experts get no token at all and cost nothing; one may get them all.
 *
 * EXAMPLE (H=2048, I=1408, E=64, K=6, T=512): 3072 pairs; 64 x 11 gate/up jobs of up to 128 rows x 2048 columns
 * for about 48 tokens each; m is [3072, 1408]; 64 x 16 down jobs; y is [3072, 2048]. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../../include/kt_native.h"
#include "adapter.h"
#include "decode.h"
#include "experts.h"
#include "pairs.h"

enum { CHUNK_TOKENS = 4096 }; /* at most */

/* One call, for a chunk of tokens. */
struct forward {
    const struct kt_experts *e;
    const struct kt_kernels *k;
    const void *hidden;
    const float *weights;   /* NULL: 1 */
    const float *start;     /* what the sums begin with, or NULL */
    void *out;
    int dtype, out_dtype;
    struct kt_sorted p;
    struct kt_acts x, m;
    float *y;               /* [pairs, y_stride] */
    int64_t y_stride;
    int forms_x, forms_m;   /* of the activations of gate and up, of down: KT_NEED_... */
    _Atomic(uint8_t) nonfinite[CHUNK_TOKENS]; /* whether a token meets infinities or NaNs, which int8 cannot hold */
    int rows;                                 /* of a job */
    struct kt_shards by_inner, by_hidden;     /* which expert and rows a job is: gate and up, down */
    int32_t per_job_x;
    struct kt_scratch *scratch;
    const kt_lora *first, *down; /* adapters of gate and up, and of down, or NULL */
    struct kt_acts z, z_down;    /* [pairs, rank]: see adapter.h */
};

/* ---- creation --------------------------------------------------------------------------------------- */

static int check_expert(struct kt_experts *e, int64_t i) {
    const struct kt_matrix *g = e->gate ? &e->gate[i] : NULL, *u = &e->up[i], *d = &e->down[i];
    if (i == 0) {
        e->hidden = u->cols;
        e->inner = u->rows;
    }
    int fits = u->cols == e->hidden && u->rows == e->inner && d->cols == e->inner && d->rows == e->hidden;
    if (g) fits = fits && g->cols == e->hidden && g->rows == e->inner;
    return fits ? KT_OK : KT_ERR_SHAPE;
}

static int check_glu(const kt_glu *glu, int has_gate) {
    if (glu->activation < KT_SILU || glu->activation > KT_SWIGLU_OAI) return KT_ERR_ACTIVATION;
    if (glu->activation == KT_SWIGLU_OAI && !has_gate) return KT_ERR_ACTIVATION;
    if (!(glu->limit > 0.0f) || glu->alpha != glu->alpha) return KT_ERR_ACTIVATION; /* NaN, or nothing would pass */
    return glu->gate_bias && !has_gate ? KT_ERR_NULL : KT_OK;
}

/* Experts whose formats no expert before them has: what activations have to be prepared for, whoever is chosen. */
static void find_kinds(struct kt_experts *e) {
    for (int32_t i = 0; i < e->count; i++) {
        int known = 0;
        for (int32_t j = 0; j < e->kind_count && !known; j++) {
            const int32_t other = e->kinds[j];
            known = e->up[i].format == e->up[other].format && e->down[i].format == e->down[other].format &&
                    e->up[i].kind == e->up[other].kind && e->down[i].kind == e->down[other].kind &&
                    (!e->gate || (e->gate[i].format == e->gate[other].format && e->gate[i].kind == e->gate[other].kind));
        }
        if (!known) e->kinds[e->kind_count++] = i;
    }
}

int kt_experts_create(int64_t count, const kt_weight *gate, const kt_weight *up, const kt_weight *down,
                      const kt_glu *glu, kt_experts **experts) {
    if (!experts) return KT_ERR_NULL;
    *experts = NULL;
    if (!up || !down || !glu) return KT_ERR_NULL;
    if (count < 1 || count > 1 << 20) return KT_ERR_SHAPE;
    int status = check_glu(glu, gate != NULL);
    if (status) return status;
    struct kt_experts *e = calloc(1, sizeof *e);
    struct kt_matrix *all = calloc((size_t)count * 3, sizeof *all);
    int32_t *kinds = malloc((size_t)count * sizeof *kinds);
    status = e && all && kinds ? KT_OK : KT_ERR_MEMORY;
    if (!status) *e = (struct kt_experts){.count = count, .glu = *glu, .up = all, .down = all + count,
                                          .gate = gate ? all + 2 * count : NULL, .kinds = kinds};
    for (int64_t i = 0; i < count && !status; i++) {
        if (gate) status = kt_matrix_check(&gate[i], &e->gate[i]);
        if (!status) status = kt_matrix_check(&up[i], &e->up[i]);
        if (!status) status = kt_matrix_check(&down[i], &e->down[i]);
        if (!status) status = check_expert(e, i);
    }
    if (status) {
        free(all);
        free(kinds);
        free(e);
        return status;
    }
    find_kinds(e);
    *experts = e;
    return KT_OK;
}

void kt_experts_destroy(kt_experts *e) {
    if (!e) return;
    free(e->up); /* the one allocation of matrices */
    free(e->kinds);
    free(e);
}

/* ---- jobs ------------------------------------------------------------------------------------------- */

/* Several pairs of a token may. */
static void mark_nonfinite(struct forward *f, int64_t token) {
    atomic_store_explicit(&f->nonfinite[token], 1, memory_order_relaxed);
}

static void prepare_x(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct forward *f = ctx;
    for (int64_t t = (int64_t)job * f->per_job_x; t < kt_min((int64_t)(job + 1) * f->per_job_x, f->p.tokens); t++) {
        kt_load_row(f->k, f->hidden, f->dtype, t * f->e->hidden, f->e->hidden, f->x.f + t * f->x.stride);
        if (!kt_acts_derive(f->k, &f->x, t, f->forms_x)) mark_nonfinite(f, t);
    }
}

/* What this thread will read after `job`, when the threads of its node take turns. */
static struct kt_next next_block(const struct forward *f, const struct kt_shards *shards, int32_t job, int node,
                                 const struct kt_matrix *w) {
    int64_t next = (int64_t)job + shards->threads_of_node[node];
    if (next >= shards->first_job[node + 1]) return (struct kt_next){0};
    int32_t expert, block;
    kt_shard_job(shards, (int32_t)next, &expert, &block);
    return (struct kt_next){&w[f->p.group[expert].expert], (int64_t)block * f->rows};
}

void kt_expert_products(const struct kt_experts *e, int64_t expert, struct kt_block b, struct kt_next next, float *gate,
                        int64_t ld_gate) {
    const struct kt_matrix *up = &e->up[expert];
    const struct kt_block of_up = b;
    const int64_t bias = expert * e->inner + b.first;
    if (e->gate) {
        b.w = &e->gate[expert];
        b.next = (struct kt_next){up, b.first};
        b.c = gate;
        b.ldc = ld_gate;
        kt_matmul_block(&b);
    }
    b = of_up;
    b.w = up;
    b.next = next;
    kt_matmul_block(&b);
    for (int64_t i = 0; i < b.tokens; i++) {
        if (e->glu.gate_bias) b.k->add(e->glu.gate_bias + bias, gate + i * ld_gate, b.rows);
        if (e->glu.up_bias) b.k->add(e->glu.up_bias + bias, b.c + i * b.ldc, b.rows);
    }
}

void kt_expert_widen(const struct kt_experts *e, int64_t expert, const struct kt_block *b, const struct kt_widening *z,
                     float *gate, int64_t ld_gate) {
    const int64_t out = e->gate ? 2 * e->inner : e->inner;
    const struct kt_block of_z = {.k = b->k, .a = z->z, .token = z->pos, .tokens = b->tokens, .s = b->s};
    if (e->gate) {
        const struct kt_matrix rows = kt_lora_b(z->lora, out, expert, b->first, b->rows);
        kt_lora_widen(&rows, &of_z, gate, ld_gate);
    }
    const struct kt_matrix rows = kt_lora_b(z->lora, out, expert, out - e->inner + b->first, b->rows);
    kt_lora_widen(&rows, &of_z, b->c, b->ldc);
}

void kt_expert_gate_up(const struct kt_experts *e, int64_t expert, struct kt_block b, struct kt_next next,
                       const struct kt_widening *z) {
    float *gate = b.s->c;
    kt_expert_products(e, expert, b, next, gate, KT_BLOCK_ROWS);
    if (z) kt_expert_widen(e, expert, &b, z, gate, KT_BLOCK_ROWS);
    for (int64_t i = 0; i < b.tokens; i++)
        b.k->activate(&e->glu, e->gate ? gate + i * KT_BLOCK_ROWS : NULL, b.c + i * b.ldc, b.rows);
}

static void gate_up(void *ctx, int32_t job, int thread) {
    struct forward *f = ctx;
    const struct kt_experts *e = f->e;
    int32_t at, block;
    const int node = kt_shard_job(&f->by_inner, job, &at, &block);
    const struct kt_group *g = &f->p.group[at];
    const int64_t first = (int64_t)block * f->rows;
    const int rows = (int)kt_min(e->inner - first, f->rows);
    const struct kt_block b = {.k = f->k, .first = first, .rows = rows, .a = &f->x, .token = f->p.token + g->begin,
                               .tokens = g->tokens, .s = &f->scratch[thread], .c = f->m.f + g->begin * f->m.stride + first,
                               .ldc = f->m.stride};
    const struct kt_widening z = {f->first, &f->z, f->p.row + g->begin};
    kt_expert_gate_up(e, g->expert, b, next_block(f, &f->by_inner, job, node, e->gate ? e->gate : e->up),
                      f->first ? &z : NULL);
    for (int32_t p = g->begin; p < g->begin + g->tokens; p++)
        if (!kt_acts_derive_part(f->k, &f->m, p, first, rows, f->forms_m)) mark_nonfinite(f, f->p.token[p]);
}

/* z of the adapter of gate and up, and of down, for a share of an expert's tokens. */
static void narrow_x(void *ctx, int32_t job, int thread) {
    struct forward *f = ctx;
    const struct kt_group *g = &f->p.share[job];
    const struct kt_block b = {.k = f->k, .a = &f->x, .token = f->p.token + g->begin, .tokens = g->tokens,
                               .s = &f->scratch[thread]};
    kt_lora_narrow(f->first, f->e->hidden, g->expert, &b, f->z.f + g->begin * f->z.stride, f->z.stride);
}

static void narrow_m(void *ctx, int32_t job, int thread) {
    struct forward *f = ctx;
    const struct kt_group *g = &f->p.share[job];
    const struct kt_block b = {.k = f->k, .a = &f->m, .token = f->p.row + g->begin, .tokens = g->tokens,
                               .s = &f->scratch[thread]};
    kt_lora_narrow(f->down, f->e->inner, g->expert, &b, f->z_down.f + g->begin * f->z_down.stride, f->z_down.stride);
}

static void down(void *ctx, int32_t job, int thread) {
    struct forward *f = ctx;
    int32_t at, block;
    const int node = kt_shard_job(&f->by_hidden, job, &at, &block);
    const struct kt_group *g = &f->p.group[at];
    const struct kt_matrix *w = &f->e->down[g->expert];
    int64_t first = (int64_t)block * f->rows;
    int rows = (int)kt_min(f->e->hidden - first, f->rows);
    float *y = f->y + g->begin * f->y_stride + first;
    kt_matmul_block(&(struct kt_block){
        .k = f->k, .w = w, .first = first, .rows = rows, .a = &f->m, .token = f->p.row + g->begin, .tokens = g->tokens,
        .next = next_block(f, &f->by_hidden, job, node, f->e->down), .s = &f->scratch[thread], .c = y,
        .ldc = f->y_stride});
    const float *bias = f->e->glu.down_bias;
    for (int64_t i = 0; bias && i < g->tokens; i++)
        f->k->add(bias + g->expert * f->e->hidden + first, y + i * f->y_stride, rows);
    if (!f->down) return;
    const struct kt_matrix b = kt_lora_b(f->down, f->e->hidden, g->expert, first, rows);
    kt_lora_widen(&b, &(struct kt_block){.k = f->k, .a = &f->z_down, .token = f->p.row + g->begin, .tokens = g->tokens,
                                         .s = &f->scratch[thread]}, y, f->y_stride);
}

/* The row of x is no longer needed and takes the sum, before it is converted. */
static void combine(void *ctx, int32_t job, int thread) {
    (void)thread;
    struct forward *f = ctx;
    const int64_t H = f->e->hidden;
    for (int64_t t = (int64_t)job * f->per_job_x; t < kt_min((int64_t)(job + 1) * f->per_job_x, f->p.tokens); t++) {
        float *sum = f->x.f + t * f->x.stride;
        int add = f->start != NULL;
        if (add) memcpy(sum, f->start + t * H, (size_t)H * sizeof *sum);
        for (int64_t i = t * f->p.slots; i < (t + 1) * f->p.slots; i++)
            if (f->p.pos[i] >= 0) {
                f->k->scale_add(f->weights ? f->weights[i] : 1.0f, f->y + f->p.pos[i] * f->y_stride, sum, H, add);
                add = 1;
            }
        if (!add) memset(sum, 0, (size_t)H * sizeof *sum);
        kt_store_row(f->k, sum, H, f->out_dtype, f->out, t * H);
    }
}

/* ---- the call --------------------------------------------------------------------------------------- */

static void needs(struct forward *f) {
    f->forms_x = f->forms_m = 0;
    for (int64_t i = 0; i < f->e->count; i++) {
        int32_t tokens = f->p.of_expert[i];
        if (!tokens) continue;
        if (f->e->gate) f->forms_x |= kt_forms_needed(f->k, &f->e->gate[i], tokens, f->dtype);
        f->forms_x |= kt_forms_needed(f->k, &f->e->up[i], tokens, f->dtype);
        f->forms_m |= kt_forms_needed(f->k, &f->e->down[i], tokens, f->dtype);
    }
}

static void layout(struct forward *f, struct kt_arena *arena, int threads) {
    kt_pairs_take(&f->p, arena);
    f->scratch = kt_arena_take(arena, threads, sizeof *f->scratch);
    kt_acts_take(arena, f->p.tokens, f->e->hidden, f->forms_x, &f->x);
    kt_acts_take(arena, f->p.count, f->e->inner, f->forms_m, &f->m);
    f->y_stride = kt_round_up(f->e->hidden, KT_TILE);
    f->y = kt_arena_take(arena, f->p.count * f->y_stride, sizeof *f->y);
    if (f->first) kt_acts_take(arena, f->p.count, f->first->rank, 0, &f->z);
    if (f->down) kt_acts_take(arena, f->p.count, f->down->rank, 0, &f->z_down);
    for (int i = 0; i < threads; i++) {
        struct kt_scratch s;
        kt_scratch_take(arena, f->p.busiest, &s);
        if (arena->base) f->scratch[i] = s;
    }
}

/* The call's memory, from the pool's one piece. How much that is depends on how many pairs there are, which takes
 * memory to count (of_expert): so a count in what the pool has, then the layout's size, then the layout. When the
 * piece grows it loses what it held, the counts among it. */
static int take_memory(struct forward *f, kt_pool *pool) {
    const int threads = kt_pool_threads(pool);
    f->p.of_expert = kt_pool_shared(pool, (size_t)f->e->count * sizeof *f->p.of_expert);
    if (!f->p.of_expert) return KT_ERR_MEMORY;
    kt_pairs_count(&f->p);
    needs(f);
    struct kt_arena arena = {0};
    layout(f, &arena, threads);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(f, &arena, threads);
    kt_pairs_count(&f->p);
    return KT_OK;
}

/* How the work is cut into jobs. */
static int cut_jobs(struct forward *f, const kt_pool *pool) {
    const int64_t inner = f->e->inner, hidden = f->e->hidden, longer = inner > hidden ? inner : hidden;
    f->rows = kt_job_rows(pool, f->p.groups * kt_min(inner, hidden));
    if (f->rows < KT_ACT_GROUP) f->rows = KT_ACT_GROUP; /* a job of gate and up quantizes what it makes */
    f->per_job_x = (int32_t)(1 + 16384 / hidden);
    if (f->p.groups * ((longer + f->rows - 1) / f->rows) > INT32_MAX) return KT_ERR_SHAPE;
    kt_pool_shard_jobs(pool, inner, KT_SHARD_ROWS, f->rows, f->p.groups, &f->by_inner);
    kt_pool_shard_jobs(pool, hidden, KT_SHARD_ROWS, f->rows, f->p.groups, &f->by_hidden);
    return KT_OK;
}

/* The lines of the algorithm above, in order. */
static int run_chunk(struct forward *f, kt_pool *pool) {
    int status = take_memory(f, pool);
    if (status) return status;
    kt_pairs_sort(&f->p);
    status = cut_jobs(f, pool);
    if (status) return status;
    const int32_t token_jobs = (f->p.tokens + f->per_job_x - 1) / f->per_job_x;
    kt_pool_run(pool, prepare_x, f, token_jobs);
    if (f->first) kt_pool_run(pool, narrow_x, f, f->p.shares);
    kt_pool_run_sharded(pool, gate_up, f, f->by_inner.jobs_of_node);
    if (f->down) kt_pool_run(pool, narrow_m, f, f->p.shares);
    kt_pool_run_sharded(pool, down, f, f->by_hidden.jobs_of_node);
    kt_pool_run(pool, combine, f, token_jobs);
    return KT_OK;
}

/* Tokens with infinities or NaNs once more, each alone, in fp32: these go where IEEE arithmetic takes them then, and
 * the other tokens keep their bits. */
static int run_nonfinite(const struct forward *f, kt_pool *pool) {
    const size_t row = (size_t)f->e->hidden * kt_dtype_size(f->dtype);
    const size_t out_row = (size_t)f->e->hidden * kt_dtype_size(f->out_dtype);
    int status = KT_OK;
    for (int32_t t = 0; t < f->p.tokens && !status; t++) {
        if (!f->nonfinite[t]) continue;
        struct forward one = {.e = f->e, .k = kt_exact_kernels(), .dtype = f->dtype,
                              .out_dtype = f->out_dtype, .first = f->first, .down = f->down,
                              .p = {.experts = f->e->count, .slots = f->p.slots, .tokens = 1}};
        one.hidden = (const uint8_t *)f->hidden + (size_t)t * row;
        one.out = (uint8_t *)f->out + (size_t)t * out_row;
        one.p.ids = f->p.ids ? f->p.ids + (int64_t)t * f->p.slots : NULL;
        one.weights = f->weights ? f->weights + (int64_t)t * f->p.slots : NULL;
        one.start = f->start ? f->start + (int64_t)t * f->e->hidden : NULL;
        status = run_chunk(&one, pool);
    }
    return status;
}

/* Tokens at once: as many as keep m and y within half a gigabyte. More tokens amortize unpacking better. */
static int64_t chunk_tokens(const struct kt_experts *e, int64_t slots) {
    int64_t bytes = slots * 4 * (2 * e->inner + e->hidden) + 12 * e->hidden;
    int64_t n = ((int64_t)512 << 20) / bytes;
    return n < 16 ? 16 : n > CHUNK_TOKENS ? CHUNK_TOKENS : n;
}

/* One token, unless it holds infinities or NaNs; then *finite is 0 and nothing is computed. */
static int run_one(const struct kt_experts *e, kt_pool *pool, const struct kt_experts_call *c, int *finite) {
    struct kt_decode d = {.hidden = c->hidden, .dtype = c->dtype, .out_dtype = c->out_dtype, .start = c->start,
                          .out = c->out, .e = e,
                          .slots = (int32_t)c->per_token, .ids = c->ids, .weights = c->weights};
    return kt_decode_run(&d, pool, finite);
}

/* At the level of scratch memory where the caller is. */
static int run(const struct kt_experts *e, kt_pool *pool, const struct kt_experts_call *c) {
    const size_t size = kt_dtype_size(c->dtype), out_size = kt_dtype_size(c->out_dtype);
    struct forward f = {.e = e, .dtype = c->dtype, .out_dtype = c->out_dtype, .first = c->first, .down = c->down,
                        .p = {.experts = e->count, .slots = (int)c->per_token}};
    const int alone = c->tokens == 1 && !c->first && !c->down;
    int status = KT_OK, done = 0;
    if (alone) status = run_one(e, pool, c, &done);
    if (status || done) return status;
    f.k = alone ? kt_exact_kernels() : kt_kernels();
    const int64_t chunk = chunk_tokens(e, c->per_token);
    for (int64_t t = 0; t < c->tokens && !status; t += chunk) {
        f.p.tokens = (int32_t)kt_min(c->tokens - t, chunk);
        f.hidden = (const uint8_t *)c->hidden + (size_t)(t * e->hidden) * size;
        f.out = (uint8_t *)c->out + (size_t)(t * e->hidden) * out_size;
        f.p.ids = c->ids ? c->ids + t * c->per_token : NULL;
        f.weights = c->weights ? c->weights + t * c->per_token : NULL;
        f.start = c->start ? c->start + t * e->hidden : NULL;
        memset((void *)f.nonfinite, 0, (size_t)f.p.tokens);
        status = run_chunk(&f, pool);
        if (!status && !alone) status = run_nonfinite(&f, pool);
    }
    return status;
}

int kt_experts_run(const struct kt_experts *e, kt_pool *pool, const struct kt_experts_call *c) {
    kt_pool_enter(pool);
    int status = run(e, pool, c);
    kt_pool_leave(pool);
    return status;
}

int kt_experts_forward(const kt_experts *e, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                       const int64_t *ids, int64_t per_token, const float *weights, void *out) {
    return kt_experts_forward_lora(e, pool, hidden, dtype, tokens, ids, per_token, weights, NULL, NULL, out);
}

int kt_experts_forward_lora(const kt_experts *e, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                            const int64_t *ids, int64_t per_token, const float *weights, const kt_lora *first,
                            const kt_lora *down, void *out) {
    int status = kt_lora_check(first, 0);
    if (!status) status = kt_lora_check(down, 0);
    if (!e || !pool) return KT_ERR_NULL;
    if (status) return status;
    if (tokens < 0 || tokens > KT_MAX_DIM || per_token < 0 || per_token > 1 << 16) return KT_ERR_SHAPE;
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (tokens == 0) return KT_OK;
    if (!hidden || !out || (per_token && (!ids || !weights))) return KT_ERR_NULL;
    kt_pool_lock(pool);
    const struct kt_experts_call call = {.hidden = hidden, .dtype = dtype, .tokens = tokens, .ids = ids,
                                         .per_token = per_token, .weights = weights, .first = first, .down = down,
                                         .out = out, .out_dtype = dtype};
    status = run(e, pool, &call);
    kt_pool_unlock(pool);
    return status;
}
