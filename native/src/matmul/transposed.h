/* transposed.h: one block of d @ w, the product that gradients need. */
#ifndef KT_TRANSPOSED_H
#define KT_TRANSPOSED_H

#include "matmul.h"
#include "panel.h"

/* c[i, j] (+)= sum over rows r of d[token[i], r] * w[r, first + j], j < cols, i < tokens: fp32 sums, in an order that
 * neither the other tokens nor the other columns change. */
struct kt_transposed {
    const struct kt_kernels *k;
    const struct kt_matrix *w;
    const int32_t *row;   /* of an F32 matrix: what stands for its row r is row[r]; NULL: r itself */
    int64_t first;        /* a multiple of the format's block */
    int cols;             /* the same, or the rest of the matrix; at most KT_BLOCK_COLS */
    int forms;            /* kt_transposed_forms */
    const struct kt_acts *d;
    const int32_t *token; /* [tokens] rows of d */
    int tokens;
    const struct kt_scratch *s; /* of this thread */
    uint32_t *panel;            /* of this thread: kt_transposed_take */
    float *c;                   /* needs cols rounded up to 16 */
    int64_t ldc;                /* floats from a token to the next */
    int add;
    struct kt_ahead next;       /* bytes that this thread is likely to read next: fetched while it computes */
};

void kt_transposed_block(const struct kt_transposed *b);

/* KT_NEED_BF16 where d and w meet in a bf16 multiplier: there is one, and neither the weights nor the caller's values,
 * of `dtype`, have more precision than the format computes with forward. */
int kt_transposed_forms(const struct kt_kernels *k, const struct kt_matrix *w, int dtype);

/* The bytes that a block of these columns reads first. */
struct kt_ahead kt_transposed_ahead(const struct kt_matrix *w, int64_t first, int cols);

uint32_t *kt_transposed_take(struct kt_arena *arena);

/* A dense matrix of floats, as one that the products of this library take. */
struct kt_matrix kt_floats_matrix(const float *data, int64_t rows, int64_t cols, int64_t stride);

/* Columns of a job, so that `jobs_each` jobs for every block of columns make several jobs a thread. Does not change
 * any result. */
int kt_job_cols(const kt_pool *pool, const struct kt_matrix *w, int64_t jobs_each);

#endif
