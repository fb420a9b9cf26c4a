/* product.h: x @ W^T in fp32 for a matrix of few rows (a router, a gate), as a step of a larger call. */
#ifndef KT_PRODUCT_H
#define KT_PRODUCT_H

#include "../matmul/matmul.h"

/* What becomes of a token before it meets the matrix: x * rsqrt(mean(x^2) + eps) * weight * factor. With `round` each
 * of the three products is rounded to the input's dtype, as a model of that dtype does it. */
struct kt_norm {
    const float *weight; /* [H] */
    float eps, factor;
    int round;
};

struct kt_product {
    const struct kt_matrix *w; /* [rows, H] */
    const struct kt_norm *norm; /* or NULL */
    const void *x;             /* [T, H] of `dtype` */
    int dtype;
    int32_t tokens;
    float *out; /* [T, ldo]; ldo is rows rounded up to 16 or more */
    int64_t ldo;
};

/* Within a call that holds the pool's lock, whose scratch memory stays as it is. Tokens with infinities or NaNs go
 * where IEEE arithmetic takes them. */
int kt_product_run(const struct kt_product *p, kt_pool *pool);

/* `x` rounded to dtype, as fp32. */
float kt_rounded(float x, int dtype);

#endif
