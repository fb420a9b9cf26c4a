/* layer.c: decoder layers, one after the other, in one call.
 *
 *   x   = hidden, in fp32 until the last layer is done
 *   for each layer:   x = keep * x + factor * after(attention(before(x)))   or delta_net(before(x))
 *                     x = keep * x + factor * after(mlp(before(x)))         routed experts, or one dense MLP
 *   out = norm(x)
 *
 * Every norm may be none. In parallel layers the MLP is given what the attention is. Attention adds to x as it computes
 * where no more than that is to be done with what it gives; else that waits in z. What a layer's second half is given is rounded to the model's dtype, as its matrices expect. Tokens of it go in
 * pieces, for how much memory it takes; a piece is large enough that unpacking weights is repaid. */
#include "../../include/kt_native.h"

#include <stdlib.h>

#include "block.h"
#include "delta_net.h"
#include "rows.h"
#include "self_attention.h"

enum { PIECE = 2048 /* tokens of the second half at once */, MAX_LAYERS = 4096 };

struct kt_layer {
    kt_layer_desc d;
    int64_t hidden;
};

int kt_layer_create(const kt_layer_desc *desc, kt_layer **layer) {
    if (!layer) return KT_ERR_NULL;
    *layer = NULL;
    if (!desc || !desc->attention == !desc->delta_net || !desc->moe == !desc->mlp) return KT_ERR_NULL;
    const int64_t hidden = desc->attention ? desc->attention->out.rows : kt_delta_net_hidden(desc->delta_net);
    const int64_t other = desc->moe ? desc->moe->experts->hidden : desc->mlp->hidden;
    if (other != hidden || (desc->mlp && desc->mlp->count != 1)) return KT_ERR_SHAPE;
    struct kt_layer *made = malloc(sizeof *made);
    if (!made) return KT_ERR_MEMORY;
    *made = (struct kt_layer){.d = *desc, .hidden = hidden};
    *layer = made;
    return KT_OK;
}

void kt_layer_destroy(kt_layer *layer) { free(layer); }

static kt_delta_net_call net_call_of(const kt_stack *of, int64_t i) {
    const kt_attention_call *own = &of->calls[of->calls[i].like];
    kt_delta_net_call c = of->nets[i];
    c.dtype = own->dtype;
    c.batch = own->batch;
    return c;
}

struct stack {
    const struct kt_kernels *k;
    const kt_stack *of;
    const struct kt_layer *layer;
    int64_t hidden, tokens;
    int dtype;
    float *x;     /* [tokens, H] */
    float *z;     /* the same: what attention gave, where it waits */
    int waits;    /* whether it does in any layer */
    void *normed; /* [PIECE, H] of dtype */
    float *y;     /* [PIECE, H] */
    float *room;  /* [threads, H] */
    int64_t from; /* of the piece */
    int32_t in_piece, per_job;
    const void *in;
    void *out;
};

static int64_t job_end(const struct stack *s, int32_t job, int64_t tokens) {
    return kt_min((int64_t)(job + 1) * s->per_job, tokens);
}

static void load(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct stack *s = ctx;
    for (int64_t t = (int64_t)job * s->per_job; t < job_end(s, job, s->tokens); t++)
        kt_load_row(s->k, s->in, s->dtype, t * s->hidden, s->hidden, s->x + t * s->hidden);
}

static void store(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct stack *s = ctx;
    for (int64_t t = (int64_t)job * s->per_job; t < job_end(s, job, s->tokens); t++) {
        float *x = s->x + t * s->hidden;
        kt_row_norm_run(&s->of->norm, x, s->hidden, x);
        kt_store_row(s->k, x, s->hidden, s->dtype, s->out, t * s->hidden);
    }
}

static void normalize(void *ctx, int32_t job, int thread) {
    const struct stack *s = ctx;
    float *room = s->room + thread * s->hidden;
    for (int64_t t = (int64_t)job * s->per_job; t < job_end(s, job, s->in_piece); t++) {
        kt_row_norm_run(&s->layer->d.second.before, s->x + (s->from + t) * s->hidden, s->hidden, room);
        kt_store_row(s->k, room, s->hidden, s->dtype, s->normed, t * s->hidden);
    }
}

static int waits(const kt_layer_desc *d) { return d->parallel || d->first.after.weight || d->first.keep != 1.0f; }

/* The row that a part gave joins the sum x; it is spent afterwards. */
static void join(const struct stack *s, const kt_joining *how, float *gave, float *x) {
    kt_row_norm_run(&how->after, gave, s->hidden, gave);
    if (how->keep != 1.0f)
        for (int64_t i = 0; i < s->hidden; i++) x[i] *= how->keep;
    s->k->scale_add(how->factor, gave, x, s->hidden, 1);
}

static void join_first(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct stack *s = ctx;
    for (int64_t t = (int64_t)job * s->per_job; t < job_end(s, job, s->tokens); t++)
        join(s, &s->layer->d.first, s->z + t * s->hidden, s->x + t * s->hidden);
}

static void join_second(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct stack *s = ctx;
    const kt_layer_desc *d = &s->layer->d;
    for (int64_t t = (int64_t)job * s->per_job; t < job_end(s, job, s->in_piece); t++) {
        float *x = s->x + (s->from + t) * s->hidden;
        if (d->parallel) join(s, &d->first, s->z + (s->from + t) * s->hidden, x);
        join(s, &d->second, s->y + t * s->hidden, x);
    }
}

static int jobs_of(const struct stack *s, int64_t tokens) { return (int)((tokens + s->per_job - 1) / s->per_job); }

static kt_attention_call call_of(const kt_stack *of, int64_t i) {
    const kt_attention_call *own = &of->calls[i];
    kt_attention_call c = of->calls[own->like];
    c.sequences = own->sequences;
    c.layout = own->layout;
    c.window = own->window;
    return c;
}

static int first_half(struct stack *s, kt_pool *pool, int64_t i) {
    const kt_layer_desc *d = &s->layer->d;
    const int later = waits(d);
    const struct kt_rows in = {.data = s->x, .dtype = KT_F32, .norm = d->first.before};
    const struct kt_sum sum = {.data = later ? s->z : s->x, .dtype = KT_F32, .add = !later, .factor = d->first.factor};
    int status;
    if (d->attention) {
        const kt_attention_call call = call_of(s->of, i);
        status = kt_attention_run(d->attention, pool, &call, &in, &sum);
    } else {
        const kt_delta_net_call call = net_call_of(s->of, i);
        status = kt_delta_net_run(d->delta_net, pool, &call, &in, &sum);
    }
    if (!status && later && !d->parallel) kt_pool_run(pool, join_first, s, jobs_of(s, s->tokens));
    return status;
}

static int second_half(struct stack *s, kt_pool *pool) {
    const kt_layer_desc *d = &s->layer->d;
    int status = KT_OK;
    for (s->from = 0; s->from < s->tokens && !status; s->from += PIECE) {
        s->in_piece = (int32_t)kt_min(s->tokens - s->from, PIECE);
        const int jobs = jobs_of(s, s->in_piece);
        kt_pool_run(pool, normalize, s, jobs);
        if (d->moe) status = kt_moe_run(d->moe, pool, s->normed, s->dtype, s->in_piece, s->y, KT_F32);
        else
            status = kt_experts_run(d->mlp, pool,
                                    &(struct kt_experts_call){.hidden = s->normed, .dtype = s->dtype,
                                                              .tokens = s->in_piece, .per_token = 1, .out = s->y,
                                                              .out_dtype = KT_F32});
        if (!status) kt_pool_run(pool, join_second, s, jobs);
    }
    return status;
}

static void layout(struct stack *s, struct kt_arena *arena, int threads) {
    const int64_t piece = kt_min(s->tokens, PIECE) * s->hidden;
    s->x = kt_arena_take(arena, s->tokens * s->hidden, sizeof *s->x);
    s->z = kt_arena_take(arena, s->waits ? s->tokens * s->hidden : 0, sizeof *s->z);
    s->normed = kt_arena_take(arena, piece, kt_dtype_size(s->dtype));
    s->y = kt_arena_take(arena, piece, sizeof *s->y);
    s->room = kt_arena_take(arena, threads * s->hidden, sizeof *s->room);
}

static int run(struct stack *s, kt_pool *pool) {
    const int threads = kt_pool_threads(pool);
    for (int64_t i = 0; i < s->of->count; i++) s->waits |= waits(&s->of->layers[i]->d);
    struct kt_arena arena = {0};
    layout(s, &arena, threads);
    arena.base = arena.overflow ? NULL : kt_pool_shared(pool, arena.used);
    if (!arena.base) return KT_ERR_MEMORY;
    arena.used = 0;
    layout(s, &arena, threads);
    s->per_job = (int32_t)(1 + 16384 / s->hidden);
    kt_pool_run(pool, load, s, jobs_of(s, s->tokens));
    for (int64_t i = 0; i < s->of->count; i++) {
        s->layer = s->of->layers[i];
        int status = first_half(s, pool, i);
        if (!status) status = second_half(s, pool);
        if (status) return status;
    }
    kt_pool_run(pool, store, s, jobs_of(s, s->tokens));
    return KT_OK;
}

static int check_net(const kt_stack *of, int64_t i) {
    if (!of->nets) return KT_ERR_NULL;
    if (of->calls[of->calls[i].like].tokens != 1) return KT_ERR_SHAPE;
    const kt_delta_net_call call = net_call_of(of, i);
    return kt_delta_net_check(&call);
}

/* That layers fit together, and that all their calls are on the same rows. */
static int check_stack(const kt_stack *of) {
    if (!of->layers || !of->calls) return KT_ERR_NULL;
    if (of->count < 1 || of->count > MAX_LAYERS) return KT_ERR_SHAPE;
    for (int64_t i = 0; i < of->count; i++) {
        const int32_t like = of->calls[i].like;
        if (!of->layers[i]) return KT_ERR_NULL;
        if (of->layers[i]->hidden != of->layers[0]->hidden || like < 0 || like > i) return KT_ERR_SHAPE;
        const kt_attention_call *c = &of->calls[like], *first = of->calls;
        if (c->batch != first->batch || c->tokens != first->tokens || c->dtype != first->dtype) return KT_ERR_SHAPE;
        const int wrong = of->layers[i]->d.delta_net ? check_net(of, i) : KT_OK;
        if (wrong) return wrong;
    }
    const int64_t batch = of->calls->batch, each = of->calls->tokens;
    if (batch < 0 || each < 0 || batch > 1 << 20 || each > KT_MAX_DIM || batch * each > KT_MAX_DIM) return KT_ERR_SHAPE;
    return kt_dtype_size(of->calls->dtype) ? KT_OK : KT_ERR_DTYPE;
}

int kt_layers_forward(const kt_stack *of, kt_pool *pool, const void *hidden, void *out) {
    if (!of || !pool) return KT_ERR_NULL;
    const int wrong = check_stack(of);
    if (wrong) return wrong;
    struct stack s = {.of = of, .hidden = of->layers[0]->hidden, .tokens = of->calls->batch * of->calls->tokens,
                      .dtype = of->calls->dtype, .in = hidden, .out = out};
    if (!s.tokens) return KT_OK;
    if (!hidden || !out) return KT_ERR_NULL;
    kt_pool_lock(pool);
    s.k = kt_kernels();
    const int status = run(&s, pool);
    for (int64_t i = 0; i < of->count && !status; i++) {
        const kt_attention_call call = call_of(of, i);
        if (of->layers[i]->d.attention) kt_sequences_raise(&call);
    }
    kt_pool_unlock(pool);
    return status;
}
