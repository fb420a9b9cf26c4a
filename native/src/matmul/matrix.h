/* matrix.h: checked weight matrices. */
#ifndef KT_MATRIX_H
#define KT_MATRIX_H

#include "../../include/kt_native.h"
#include "../kernels.h"

/* Largest rows, cols or tokens accepted: keeps every later product of two of them inside 63 bits. */
#define KT_MAX_DIM ((int64_t)1 << 30)

int kt_matrix_check(const kt_weight *w, struct kt_matrix *out);

static inline int64_t kt_round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t kt_min(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
