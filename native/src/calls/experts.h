/* experts.h: what a kt_experts is, and how a call that holds the pool runs one. */
#ifndef KT_EXPERTS_H
#define KT_EXPERTS_H

#include "../matmul/matmul.h"

struct kt_experts {
    int64_t count, hidden, inner; /* E, H, I */
    kt_glu glu;
    struct kt_matrix *gate, *up, *down; /* [E] each, one allocation; gate NULL: there is none */
    int32_t *kinds; /* [kind_count] an expert for each combination of formats that there is */
    int32_t kind_count;
};

/* out[T, H] of out_dtype = start + sum over slots of weights * expert(hidden[T, H] of dtype); the others are fp32.
 * ids NULL: every token goes through expert 0 with weight 1 (a dense MLP is one expert), and per_token is 1. */
struct kt_experts_call {
    const void *hidden;
    int dtype;
    int64_t tokens;
    const int64_t *ids;
    int64_t per_token;
    const float *weights;
    const float *start; /* [T, H], or NULL for nothing */
    void *out;
    int out_dtype;
    const kt_lora *first, *down; /* NULL: none */
};

/* Within a call that holds the pool's lock, whose scratch memory stays as it is. Arguments have been checked. */
int kt_experts_run(const struct kt_experts *e, kt_pool *pool, const struct kt_experts_call *c);

/* Some rows of gate and up of one expert for the tokens that meet it: their products with x and the biases. `b.c` and
 * `b.ldc` are of up, `gate` and `ld_gate` of gate; `b.a` and `b.token` of x; rows past I, up to 16, may be overwritten.
 * `b.w` and `b.next` are set here. */
void kt_expert_products(const struct kt_experts *e, int64_t expert, struct kt_block b, struct kt_next next, float *gate,
                        int64_t ld_gate);

/* m = act(gate x) * up x, likewise; `b.c` and `b.ldc` are of m. z: what an adapter (adapter.h) makes of x, NULL for
 * none; pos: its rows. */
struct kt_widening {
    const kt_lora *lora;
    const struct kt_acts *z;
    const int32_t *pos;
};
void kt_expert_gate_up(const struct kt_experts *e, int64_t expert, struct kt_block b, struct kt_next next,
                       const struct kt_widening *z);

/* gate and up [tokens, rows], without the adapter, become with it. */
void kt_expert_widen(const struct kt_experts *e, int64_t expert, const struct kt_block *b, const struct kt_widening *z,
                     float *gate, int64_t ld_gate);

#endif
