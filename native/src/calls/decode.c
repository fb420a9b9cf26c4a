/* decode.c: one token through router, routed experts and shared expert, in three job sets:
 *
 *   first    rows of the router; rows of the shared expert's gate and up     [here the caller chooses the experts]
 *   second   rows of gate and up of the chosen experts
 *   third    rows of the result: for each of the experts, in order, down @ m, weighted and summed
 *
 * With experts given there is no first set but the shared expert's; a dense MLP has the last two. A job of gate and up
 * leaves its part of m in the form that down wants, and a row of the result has one owner and one order of sums: the
 * bits are those of moe.c, whatever the threads. */
#include "decode.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Experts of one shape. */
struct part {
    const struct kt_experts *e;
    int32_t slots, *expert, *row; /* row: 0, 1, 2, ... */
    float *weight;
    struct kt_acts m; /* [slots, I] */
    int forms_m, rows;
    struct kt_shards shards;
};

enum { SHARED, ROUTED };

struct decode {
    const struct kt_decode *d;
    const struct kt_kernels *k;
    struct part part[2];
    struct kt_acts x, x_router; /* the router's has only the forms that it asked for */
    int forms_x, forms_router;
    float *logit, *gate;        /* [E], and one; with room for a tile */
    struct kt_choice choice;
    int64_t *ids;
    float *weights;
    int router_rows, rows;     /* of a job */
    struct kt_shards by_router, by_hidden;
    int threads;
    struct kt_scratch *scratch;
    _Atomic(int) nonfinite;
};

/* ---- jobs ------------------------------------------------------------------------------------------- */

static const int32_t zero = 0;

/* One matrix and the token. */
static void multiply(const struct decode *f, const struct kt_matrix *w, int64_t first, int rows, const struct kt_acts *a,
                     struct kt_next next, int thread, float *out) {
    kt_matmul_block(&(struct kt_block){.k = f->k, .w = w, .first = first, .rows = rows, .a = a, .token = &zero,
                                       .tokens = 1, .next = next, .s = &f->scratch[thread], .c = out,
                                       .ldc = KT_BLOCK_ROWS});
}

static void route_rows(struct decode *f, int32_t job, int thread) {
    const struct kt_matrix *w = &f->d->router->w;
    int32_t at, block;
    kt_shard_job(&f->by_router, job, &at, &block);
    const int64_t first = (int64_t)block * f->router_rows, after = first + (int64_t)f->threads * f->router_rows;
    multiply(f, w, first, (int)kt_min(w->rows - first, f->router_rows), &f->x_router,
             (struct kt_next){after < w->rows ? w : NULL, after}, thread, f->logit + first);
}

/* What a thread reads after `job`, when the threads of its node take turns. */
static struct kt_next next_of(const struct part *p, int32_t job, int node) {
    const int64_t next = (int64_t)job + p->shards.threads_of_node[node];
    if (next >= p->shards.first_job[node + 1]) return (struct kt_next){0};
    int32_t at, block;
    kt_shard_job(&p->shards, (int32_t)next, &at, &block);
    const struct kt_matrix *w = p->e->gate ? p->e->gate : p->e->up;
    return (struct kt_next){&w[p->expert[at]], (int64_t)block * p->rows};
}

static void gate_up(struct decode *f, struct part *p, int32_t job, int thread) {
    int32_t at, block;
    const int node = kt_shard_job(&p->shards, job, &at, &block);
    const int64_t first = (int64_t)block * p->rows;
    const struct kt_block b = {.k = f->k, .first = first, .rows = (int)kt_min(p->e->inner - first, p->rows),
                               .a = &f->x, .token = &zero, .tokens = 1, .s = &f->scratch[thread],
                               .c = p->m.f + at * p->m.stride + first, .ldc = p->m.stride};
    kt_expert_gate_up(p->e, p->expert[at], b, next_of(p, job, node), NULL);
    if (!kt_acts_derive_part(f->k, &p->m, at, first, b.rows, p->forms_m)) atomic_store(&f->nonfinite, 1);
}

/* The shared expert's jobs of a node, then the router's. */
static void first_set(void *ctx, int32_t job, int thread) {
    struct decode *f = ctx;
    struct part *shared = &f->part[SHARED];
    int n = 0;
    int32_t own, begin = 0;
    while (job - begin >= (own = shared->shards.jobs_of_node[n] + f->by_router.jobs_of_node[n])) {
        begin += own;
        n++;
    }
    job -= begin;
    if (job < shared->shards.jobs_of_node[n]) gate_up(f, shared, shared->shards.first_job[n] + job, thread);
    else route_rows(f, f->by_router.first_job[n] + job - shared->shards.jobs_of_node[n], thread);
}

static void second_set(void *ctx, int32_t job, int thread) {
    struct decode *f = ctx;
    gate_up(f, &f->part[ROUTED], job, thread);
}

/* Rows of one part's down matrices, weighted and added to `sum`. Returns whether sum holds something. */
static int add_down(struct decode *f, const struct part *p, int64_t first, int rows, int thread, float *sum, int add) {
    float *y = f->scratch[thread].c;
    for (int32_t i = 0; i < p->slots; i++, add = 1) {
        const struct kt_matrix *w = &p->e->down[p->expert[i]];
        struct kt_next next = {0};
        if (i + 1 < p->slots) next = (struct kt_next){&p->e->down[p->expert[i + 1]], first};
        kt_matmul_block(&(struct kt_block){.k = f->k, .w = w, .first = first, .rows = rows, .a = &p->m,
                                           .token = p->row + i, .tokens = 1, .next = next,
                                           .s = &f->scratch[thread], .c = y, .ldc = KT_BLOCK_ROWS});
        const float *bias = p->e->glu.down_bias;
        if (bias) f->k->add(bias + p->expert[i] * p->e->hidden + first, y, rows);
        f->k->scale_add(p->weight[i], y, sum, rows, add);
    }
    return add;
}

static void third_set(void *ctx, int32_t job, int thread) {
    struct decode *f = ctx;
    const struct kt_decode *d = f->d;
    int32_t at, block;
    kt_shard_job(&f->by_hidden, job, &at, &block);
    const int64_t first = (int64_t)block * f->rows;
    const int rows = (int)kt_min(d->e->hidden - first, f->rows);
    float *sum = f->scratch[thread].c + KT_BLOCK_ROWS;
    int add = d->start != NULL;
    if (add) memcpy(sum, d->start + first, (size_t)rows * sizeof *sum);
    add = add_down(f, &f->part[SHARED], first, rows, thread, sum, add);
    if (!add_down(f, &f->part[ROUTED], first, rows, thread, sum, add)) memset(sum, 0, (size_t)rows * sizeof *sum);
    kt_store_row(f->k, sum, rows, d->out_dtype, d->out, first);
}

/* ---- the call --------------------------------------------------------------------------------------- */

static int forms_of(const struct decode *f, const struct kt_matrix *w) {
    return kt_forms_needed(f->k, w, 1, f->d->dtype);
}

/* Of all kinds of experts there are: whom the router chooses is not known yet. */
static void part_forms(struct decode *f, struct part *p) {
    for (int32_t i = 0; p->e && i < p->e->kind_count; i++) {
        const int32_t e = p->e->kinds[i];
        if (p->e->gate) f->forms_x |= forms_of(f, &p->e->gate[e]);
        f->forms_x |= forms_of(f, &p->e->up[e]);
        p->forms_m |= forms_of(f, &p->e->down[e]);
    }
}

static void needs(struct decode *f) {
    const struct kt_decode *d = f->d;
    part_forms(f, &f->part[SHARED]);
    part_forms(f, &f->part[ROUTED]);
    if (d->gate) f->forms_router |= forms_of(f, d->gate);
    if (d->router) f->forms_router |= forms_of(f, &d->router->w);
    f->forms_x |= f->forms_router;
}

static void part_layout(struct part *p, struct kt_arena *arena, int32_t slots) {
    p->expert = kt_arena_take(arena, slots, sizeof *p->expert);
    p->row = kt_arena_take(arena, slots, sizeof *p->row);
    p->weight = kt_arena_take(arena, slots, sizeof *p->weight);
    kt_acts_take(arena, slots, p->e ? p->e->inner : 1, p->forms_m, &p->m);
}

static void layout(struct decode *f, struct kt_arena *arena) {
    const struct kt_decode *d = f->d;
    f->scratch = kt_arena_take(arena, f->threads, sizeof *f->scratch);
    kt_acts_take(arena, 1, d->e->hidden, f->forms_x, &f->x);
    part_layout(&f->part[SHARED], arena, d->shared != NULL);
    part_layout(&f->part[ROUTED], arena, d->slots);
    f->gate = kt_arena_take(arena, KT_TILE, sizeof *f->gate);
    if (d->router) {
        f->logit = kt_arena_take(arena, kt_round_up(d->router->w.rows, KT_TILE), sizeof *f->logit);
        f->ids = kt_arena_take(arena, d->slots, sizeof *f->ids);
        f->weights = kt_arena_take(arena, d->slots, sizeof *f->weights);
        kt_choice_take(arena, d->router, &f->choice);
    }
    for (int i = 0; i < f->threads; i++) {
        struct kt_scratch s;
        kt_scratch_take(arena, 2, &s); /* a product and a sum */
        if (arena->base) f->scratch[i] = s;
    }
}

static int take_memory(struct decode *f, kt_pool *pool) {
    struct kt_arena arena = {0};
    layout(f, &arena);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(f, &arena);
    f->x_router = f->x;
    if (!(f->forms_router & KT_NEED_BF16)) f->x_router.h = NULL;
    return KT_OK;
}

/* The chosen experts in order; ids of none are skipped. */
static void fill_slots(struct part *p, const int64_t *ids, const float *weights, int32_t slots, float factor) {
    for (int32_t i = 0; i < slots; i++) {
        const int64_t id = ids ? ids[i] : 0;
        if (id < 0 || id >= p->e->count) continue;
        p->expert[p->slots] = (int32_t)id;
        p->row[p->slots] = p->slots;
        p->weight[p->slots++] = (weights ? weights[i] : 1.0f) * factor;
    }
}

static void cut_part(struct part *p, const kt_pool *pool) {
    p->rows = kt_job_rows(pool, p->slots * p->e->inner);
    if (p->rows < KT_ACT_GROUP) p->rows = KT_ACT_GROUP; /* a job quantizes what it makes */
    kt_pool_shard_jobs(pool, p->e->inner, KT_SHARD_ROWS, p->rows, p->slots, &p->shards);
}

static void run_first(struct decode *f, kt_pool *pool) {
    const struct kt_decode *d = f->d;
    struct part *shared = &f->part[SHARED];
    if (d->shared) {
        fill_slots(shared, NULL, NULL, 1, d->shared_factor);
        cut_part(shared, pool);
    }
    if (d->router) {
        f->router_rows = kt_job_rows(pool, d->router->w.rows);
        kt_pool_shard_jobs(pool, d->router->w.rows, KT_SHARD_ROWS, f->router_rows, 1, &f->by_router);
    }
    int32_t jobs[KT_MAX_NODES];
    for (int n = 0; n < kt_pool_nodes(pool); n++)
        jobs[n] = shared->shards.jobs_of_node[n] + f->by_router.jobs_of_node[n];
    kt_pool_run_sharded(pool, first_set, f, jobs);
    if (!d->gate) return;
    multiply(f, d->gate, 0, 1, &f->x_router, (struct kt_next){0}, 0, f->gate);
    shared->weight[0] *= 1.0f / (1.0f + expf(-f->gate[0]));
}

int kt_decode_run(const struct kt_decode *d, kt_pool *pool, int *finite) {
    struct decode f = {.d = d, .k = kt_kernels(), .threads = kt_pool_threads(pool)};
    struct part *routed = &f.part[ROUTED];
    routed->e = d->e;
    f.part[SHARED].e = d->shared;
    needs(&f);
    int status = take_memory(&f, pool);
    if (status) return status;
    kt_load_row(f.k, d->hidden, d->dtype, 0, d->e->hidden, f.x.f);
    *finite = kt_acts_derive(f.k, &f.x, 0, f.forms_x);
    if (!*finite) return KT_OK;
    if (d->router || d->shared) run_first(&f, pool);
    if (d->router) kt_router_choose(d->router, d->dtype, f.logit, &f.choice, f.ids, f.weights);
    if (d->chosen_weights) memcpy(d->chosen_weights, f.weights, (size_t)d->slots * sizeof *f.weights);
    fill_slots(routed, d->router ? f.ids : d->ids, d->router ? f.weights : d->weights, d->slots,
               d->router ? d->factor : 1.0f);
    if (routed->slots) {
        cut_part(routed, pool);
        kt_pool_run_sharded(pool, second_set, &f, routed->shards.jobs_of_node);
    }
    *finite = !atomic_load(&f.nonfinite);
    if (!*finite) return KT_OK;
    f.rows = kt_job_rows(pool, d->e->hidden);
    kt_pool_shard_jobs(pool, d->e->hidden, KT_SHARD_ROWS, f.rows, 1, &f.by_hidden);
    kt_pool_run_sharded(pool, third_set, &f, f.by_hidden.jobs_of_node);
    return KT_OK;
}
