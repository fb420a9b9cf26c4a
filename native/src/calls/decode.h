/* decode.h: one token through a block of experts. */
#ifndef KT_DECODE_H
#define KT_DECODE_H

#include "experts.h"
#include "router.h"

struct kt_decode {
    const void *hidden; /* [H] of `dtype` */
    int dtype, out_dtype;
    const float *start; /* [H] that the sum begins with, or NULL */
    void *out;          /* [H] of out_dtype */
    const struct kt_experts *e;
    int32_t slots;        /* K */
    const int64_t *ids;   /* [K], and weights; NULL: expert 0 with weight 1, or the router's choice where there is one */
    const float *weights;
    const struct kt_router *router; /* or NULL; without a norm */
    float *chosen_weights;          /* [K] takes the router's weights; or NULL */
    float factor;                   /* of its weights */
    const struct kt_experts *shared; /* or NULL; of one expert */
    const struct kt_matrix *gate;    /* [1, H] whose sigmoid weighs the shared expert, or NULL */
    float shared_factor;
};

/* Within a call that holds the pool's lock, at its level of scratch memory. *finite is 0 where the token, or what
 * becomes of it, holds an infinity or a NaN that int8 cannot: then out is not written, and the caller computes the
 * token in fp32 throughout. */
int kt_decode_run(const struct kt_decode *d, kt_pool *pool, int *finite);

#endif
