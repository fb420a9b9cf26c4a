/* adapter.h: y += scale * (x A') B' for some tokens of one expert: what is trained beside a frozen matrix.
 *
 * z = scale * x A' has `rank` values a token and is made once, for all rows of the matrix. */
#ifndef KT_ADAPTER_H
#define KT_ADAPTER_H

#include "../matmul/transposed.h"

enum { KT_MAX_RANK = 4096 };

int kt_lora_check(const kt_lora *l, int with_gradients);

/* A and some rows of B of one expert. in: columns of A. rows_all: rows of B. */
struct kt_matrix kt_lora_a(const kt_lora *l, int64_t in, int64_t expert);
struct kt_matrix kt_lora_b(const kt_lora *l, int64_t rows_all, int64_t expert, int64_t first, int64_t rows);

/* Rows z[token of b] = scale * A x. Of b: k, a, token, tokens, s. */
void kt_lora_narrow(const kt_lora *l, int64_t in, int64_t expert, const struct kt_block *b, float *z, int64_t ldz);

/* y += z B' for the rows of B that `b_rows` has, at most KT_BLOCK_ROWS. Of b: k, a (z), token, tokens, s. y has room for
 * a multiple of 16 rows. */
void kt_lora_widen(const struct kt_matrix *b_rows, const struct kt_block *b, float *y, int64_t ldy);

#endif
