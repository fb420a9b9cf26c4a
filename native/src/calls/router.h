/* router.h: what a kt_router is, and its two steps for calls that hold the pool: a product and a choice. */
#ifndef KT_ROUTER_H
#define KT_ROUTER_H

#include "product.h"

struct kt_router {
    kt_router_desc d; /* d.weight is not kept */
    struct kt_matrix w;
    struct kt_norm norm;
};

/* Scratch of a choice. */
struct kt_choice {
    float *score, *key, *group; /* [E] each */
    int32_t *best;              /* [E] */
};
void kt_choice_take(struct kt_arena *arena, const struct kt_router *r, struct kt_choice *c);

/* The experts of one token, by descending score and then ascending id, and their weights, from its products [E], which
 * become the logits: with bias, rounded, capped. */
void kt_router_choose(const struct kt_router *r, int dtype, float *logits, const struct kt_choice *c, int64_t *ids,
                      float *weights);

/* kt_router_forward within a call that holds the pool's lock, whose scratch memory stays as it is. */
int kt_router_run(const struct kt_router *r, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                  int64_t *ids, float *weights, float *logits);

#endif
