/* rows.h: rows of hidden states on their way into a call and out of it. */
#ifndef KT_ROWS_H
#define KT_ROWS_H

#include "../matmul/matmul.h"

/* Rows [.., H] of some dtype, dense, each normed. */
struct kt_rows {
    const void *data;
    int dtype;
    kt_row_norm norm;
};

/* Where results go, dense rows of some dtype; `add`, fp32 only: `factor` times them is added to what is there. */
struct kt_sum {
    void *data;
    int dtype, add;
    float factor;
};

/* Row `row` of n values as fp32, normed. */
void kt_rows_load(const struct kt_kernels *k, const struct kt_rows *rows, int64_t row, int64_t n, float *out);

/* Values first .. first + count of row `row`, whose length is n. */
void kt_sum_store(const struct kt_kernels *k, const struct kt_sum *sum, int64_t row, int64_t n, int64_t first,
                  const float *x, int64_t count);

/* The mean of x^2, summed in an order of its own, whatever the machine. */
float kt_mean_square(const float *x, int64_t n);

/* out = x / sqrt(mean(x^2) + eps) * weight, over n values (Zhang and Sennrich 2019); out may be x. */
void kt_rms_norm(const float *x, const float *weight, float eps, int64_t n, float *out);

/* out = norm(x), over n values; out may be x. */
void kt_row_norm_run(const kt_row_norm *norm, const float *x, int64_t n, float *out);

#endif
