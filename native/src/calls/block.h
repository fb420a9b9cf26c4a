/* block.h: a block of router, routed experts and shared expert, for calls that hold the pool. */
#ifndef KT_BLOCK_OF_EXPERTS_H
#define KT_BLOCK_OF_EXPERTS_H

#include "decode.h"

struct kt_moe {
    const struct kt_router *router;
    const struct kt_experts *experts, *shared; /* shared: of one expert, or NULL */
    struct kt_matrix shared_gate;              /* [1, H], where has_gate */
    int has_gate;
    float factor, shared_factor;
};

/* out[T, H] of out_dtype = the block of hidden[T, H] of dtype; they may not overlap; T from 0 on. Takes no lock: within
 * a call that holds the pool's, whose scratch memory (kt_pool_shared) stays as it is. */
int kt_moe_run(const struct kt_moe *m, kt_pool *pool, const void *hidden, int dtype, int64_t tokens, void *out,
               int out_dtype);

#endif
