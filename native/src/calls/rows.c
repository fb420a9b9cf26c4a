/* rows.c: hidden states into fp32 and back, and the norm that goes with them. */
#include "rows.h"

#include <math.h>
#include <string.h>

enum { SUMS = 16 }; /* independent, so that compilers keep them in vector registers */

/* As kt_mean_square sums. */
static float mean(const float *x, int64_t n) {
    float sums[SUMS] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + SUMS <= n; i += SUMS)
        for (int j = 0; j < SUMS; j++) sums[j] += x[i + j];
    for (; i < n; i++) sum += x[i];
    for (int j = 0; j < SUMS; j++) sum += sums[j];
    return sum / (float)n;
}

float kt_mean_square(const float *x, int64_t n) {
    float sums[SUMS] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + SUMS <= n; i += SUMS)
        for (int j = 0; j < SUMS; j++) sums[j] += x[i + j] * x[i + j];
    for (; i < n; i++) sum += x[i] * x[i];
    for (int j = 0; j < SUMS; j++) sum += sums[j];
    return sum / (float)n;
}

void kt_rms_norm(const float *x, const float *weight, float eps, int64_t n, float *out) {
    const float scale = 1.0f / sqrtf(kt_mean_square(x, n) + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

void kt_row_norm_run(const kt_row_norm *norm, const float *x, int64_t n, float *out) {
    if (!norm->weight) {
        if (out != x) memcpy(out, x, (size_t)n * sizeof *x);
        return;
    }
    if (norm->centered) {
        const float middle = mean(x, n);
        for (int64_t i = 0; i < n; i++) out[i] = x[i] - middle;
        x = out;
    }
    kt_rms_norm(x, norm->weight, norm->eps, n, out);
}

void kt_rows_load(const struct kt_kernels *k, const struct kt_rows *rows, int64_t row, int64_t n, float *out) {
    kt_load_row(k, rows->data, rows->dtype, row * n, n, out);
    kt_row_norm_run(&rows->norm, out, n, out);
}

void kt_sum_store(const struct kt_kernels *k, const struct kt_sum *sum, int64_t row, int64_t n, int64_t first,
                  const float *x, int64_t count) {
    const int64_t at = row * n + first;
    if (sum->add) k->scale_add(sum->factor, x, (float *)sum->data + at, count, 1);
    else kt_store_row(k, x, count, sum->dtype, sum->data, at);
}
