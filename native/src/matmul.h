/* matmul.h: what linear.c and moe.c share: checked matrices, prepared activations, one block of W @ x.
 *
 * Which path, decode or prefill, is decided per matrix from the number of tokens that meet it. */
#ifndef KT_MATMUL_H
#define KT_MATMUL_H

#include "../include/kt_native.h"
#include "kernels.h"
#include "threads.h"

#define KT_BLOCK_ROWS 64 /* weight rows of a panel and of a job */

/* A kt_weight that passed its checks. */
struct kt_matrix {
    int format;
    const struct kt_traits *traits;
    int64_t rows, cols;
    size_t stride; /* bytes of a row */
    const uint8_t *data;
};

int kt_matrix_check(const kt_weight *w, struct kt_matrix *out);

/* Largest rows, cols or tokens accepted: keeps every later product of two of them inside 63 bits. */
#define KT_MAX_DIM ((int64_t)1 << 30)

/* ---- memory: lay out twice, first with base NULL to learn the size ---- */

struct kt_arena {
    uint8_t *base;
    size_t used;
    int overflow;
};
/* count * size bytes, 64-byte aligned; NULL while base is NULL. */
void *kt_arena_take(struct kt_arena *arena, int64_t count, size_t size);

/* Scratch of one thread. */
struct kt_scratch {
    uint32_t *data;             /* panel: 64 rows */
    float *scales, *mins;
    uint32_t *stage;            /* 16 rows, row-major, before interleaving */
    float *stage_scales, *stage_mins;
    float *c;                   /* [tokens, 64] results on their way elsewhere */
};
void kt_scratch_take(struct kt_arena *arena, int64_t tokens, struct kt_scratch *s);

/* ---- activations ---- */

enum { KT_NEED_Q8 = 1, KT_NEED_BF16 = 2 }; /* fp32 is always there */

/* The forms that a matrix of this format asks for. bf16 only where the caller's activations, of `dtype`, are bf16
 * themselves: a form never costs precision that the caller had. */
int kt_forms_needed(const struct kt_kernels *k, int format, int panel, int dtype);

/* Room for `tokens` rows of `cols` values in the forms of `need`. */
void kt_acts_take(struct kt_arena *arena, int64_t tokens, int64_t cols, int need, struct kt_acts *a);

/* Fill the other forms of row t from its fp32 form. */
void kt_acts_derive(const struct kt_kernels *k, struct kt_acts *a, int64_t t, int need);

/* fp32 <- `dtype`, and back. */
void kt_load_row(const struct kt_kernels *k, const void *x, int dtype, int64_t offset, int64_t n, float *out);
void kt_store_row(const struct kt_kernels *k, const float *x, int64_t n, int dtype, void *out, int64_t offset);
size_t kt_dtype_size(int dtype); /* 0 if unknown */

/* ---- the product ---- */

/* Whether `tokens` tokens take the panel path for this format. */
int kt_use_panel(int format, int64_t tokens);

/* c[i, r] = row (first + r) of w . token[i], r < rows <= KT_BLOCK_ROWS; c needs rows rounded up to 16. */
void kt_matmul_block(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows,
                     const struct kt_acts *a, const int32_t *token, int tokens, int panel,
                     const struct kt_scratch *s, float *c, int64_t ldc);

/* Rows of a job so that `rows_total` rows make several jobs a thread. Does not change any result. */
int kt_job_rows(const kt_pool *pool, int64_t rows_total);

static inline int64_t kt_round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t kt_min(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
