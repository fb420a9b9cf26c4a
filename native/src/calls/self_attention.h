/* self_attention.h: what a kt_attention is, and its call inside another. */
#ifndef KT_SELF_ATTENTION_H
#define KT_SELF_ATTENTION_H

#include "rows.h"

enum { KT_MAX_ROTARY = 1024 /* angles of a token */, KT_PARTS = 4 /* matrices that meet the input, at most */ };

/* What attention on latents has besides; see latent_attention.c. */
struct kt_latent {
    struct kt_matrix q_b, kv_b; /* q_b has no rows where part[KT_Q] gives queries itself */
    int type;                   /* of kv_b, as caches count types */
    const float *q_norm, *kv_norm, *key_norm;
    float q_eps, kv_eps, key_eps;
    int64_t latent, plain, rotary; /* sizes: of a latent, and of a query's parts without positions and with them */
};

struct kt_attention {
    kt_attention_desc d; /* with latents: what of it those need; value_size is what W_o meets of a head */
    struct kt_matrix part[KT_PARTS], out; /* what meets the input, by KT_Q, KT_K, KT_V, KT_G, without rows where there
                                             is none; and W_o */
    int64_t first[KT_PARTS], width; /* where a part begins in a token's row of results, and how long that row is */
    struct kt_latent *latent;       /* NULL: grouped queries */
};

/* kt_attention_forward with the pool locked by the caller, from any rows to any sum. */
int kt_attention_run(const struct kt_attention *a, kt_pool *pool, const kt_attention_call *c, const struct kt_rows *in,
                     const struct kt_sum *out);

/* The sequences of a call are longer by its tokens now. */
void kt_sequences_raise(const kt_attention_call *c);

#endif
