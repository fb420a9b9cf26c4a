/* self_attention.h: what a kt_attention is, and its call inside another. */
#ifndef KT_SELF_ATTENTION_H
#define KT_SELF_ATTENTION_H

#include "rows.h"

enum { KT_MAX_ROTARY = 1024 /* angles of a token */ };

struct kt_attention {
    kt_attention_desc d;
    struct kt_matrix part[4], out; /* what meets the input, by KT_Q, KT_K, KT_V, KT_G; and W_o */
    int parts;
    int64_t first[4], width; /* where a part begins in a token's row of results, and how long that row is */
};

/* kt_attention_forward with the pool locked by the caller, from any rows to any sum. */
int kt_attention_run(const struct kt_attention *a, kt_pool *pool, const kt_attention_call *c, const struct kt_rows *in,
                     const struct kt_sum *out);

/* The sequences of a call are longer by its tokens now. */
void kt_sequences_raise(const kt_attention_call *c);

#endif
