/* matmul.h: what linear.c and moe.c share: prepared activations, and one block of W @ x.
 *
 * Which path is decided per matrix from the number of tokens that meet it (path_of in matmul.c). */
#ifndef KT_MATMUL_H
#define KT_MATMUL_H

#include "panel.h"
#include "../threads/threads.h"

/* ---- activations ---- */

enum { KT_NEED_Q8 = 1, KT_NEED_BF16 = 2 }; /* fp32 is always there */

/* The forms that a matrix asks for when `tokens` tokens meet it. BF16 weights ask for bf16 only where the caller's
 * activations, of `dtype`, are bf16 themselves: that form never costs precision that the caller had. */
int kt_forms_needed(const struct kt_kernels *k, const struct kt_matrix *w, int64_t tokens, int dtype);

/* Room for `tokens` rows of `cols` values in the forms of `need`. */
void kt_acts_take(struct kt_arena *arena, int64_t tokens, int64_t cols, int need, struct kt_acts *a);

/* Fill the other forms of row t from its fp32 form. 0 where one cannot hold it: an infinity or a NaN has no int8. */
int kt_acts_derive(const struct kt_kernels *k, struct kt_acts *a, int64_t t, int need);

/* The same for n values from `first` on, both multiples of 32 (or n the rest of the row): groups know no neighbours. */
int kt_acts_derive_part(const struct kt_kernels *k, struct kt_acts *a, int64_t t, int64_t first, int64_t n, int need);

/* fp32 <- `dtype`, and back. */
void kt_load_row(const struct kt_kernels *k, const void *x, int dtype, int64_t offset, int64_t n, float *out);
void kt_store_row(const struct kt_kernels *k, const float *x, int64_t n, int dtype, void *out, int64_t offset);
size_t kt_dtype_size(int dtype); /* 0 if unknown */

/* ---- the product ---- */

/* What kt_set_panel_threshold says, or else `measured`. */
int kt_panel_threshold(int measured);

void kt_matmul_block(const struct kt_block *b);

/* The packed bytes of columns k0 .. k0 + n of `rows` rows, as far as the matrix has them. */
struct kt_ahead kt_packed_bytes(const struct kt_matrix *w, int64_t first, int64_t rows, int64_t k0, int64_t n);

/* Rows of a job so that `rows_total` rows make several jobs a thread. Does not change any result. */
int kt_job_rows(const kt_pool *pool, int64_t rows_total);

#endif
