/* block.h: one block of W @ x, as it is handed from the calls down to the kernels. */
#ifndef KT_BLOCK_H
#define KT_BLOCK_H

#include "arena.h"
#include "matrix.h"

/* Rows of a matrix that are likely to be read next by this thread: fetched while it computes. NULL w: unknown. */
struct kt_next {
    const struct kt_matrix *w;
    int64_t first;
};

/* c[i, r] = row (first + r) of w . token[i], r < rows, i < tokens. */
struct kt_block {
    const struct kt_kernels *k;
    const struct kt_matrix *w;
    int64_t first;
    int rows;             /* at most KT_BLOCK_ROWS */
    const struct kt_acts *a;
    const int32_t *token; /* [tokens] rows of a */
    int tokens;
    struct kt_next next;
    const struct kt_scratch *s; /* of this thread */
    float *c;                   /* needs rows rounded up to 16 */
    int64_t ldc;                /* floats from a token to the next */
};

#endif
