/* Scores and values of attention in portable C: 32 columns of a token at a time become floats and meet all rows. */
#include "../templates/attend.h"

enum { PIECE = 32 };

/* Columns c .. c + n of a row of each cache type. */
static void at_f32(const uint8_t *row, int64_t c, int n, float *v) { memcpy(v, row + c * 4, (size_t)n * 4); }
static void at_f16(const uint8_t *row, int64_t c, int n, float *v) {
    for (int i = 0; i < n; i++) v[i] = kt_load_f16(row + (c + i) * 2);
}
static void at_bf16(const uint8_t *row, int64_t c, int n, float *v) {
    for (int i = 0; i < n; i++) v[i] = kt_bf16_to_f32(kt_load16(row + (c + i) * 2));
}
static void at_q8_0(const uint8_t *row, int64_t c, int n, float *v) {
    load_q8_0(row + c / 32 * (int64_t)sizeof(kt_block_q8_0), n, v);
}

/* Sixteen partial sums: they become vectors, and are closer to the true sum than one. */
static float dot(const float *v, const float *x, int n) {
    float sum[16] = {0};
    if (n == PIECE)
        for (int i = 0; i < 16; i++) sum[i] = v[i] * x[i] + v[i + 16] * x[i + 16];
    else
        for (int i = 0; i < n; i++) sum[i % 16] += v[i] * x[i];
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

#define CACHE(type)                                                                                                 \
    static void scores_##type(const struct kt_acts *q, int rows, const uint8_t *keys, size_t key_row, int tokens,   \
                              float *s, int64_t lds, struct kt_ahead *ahead) {                                      \
        (void)ahead;                                                                                                \
        for (int t = 0; t < tokens; t++, keys += key_row)                                                           \
            for (int64_t c = 0; c < q->cols; c += PIECE) {                                                          \
                const int n = (int)(q->cols - c < PIECE ? q->cols - c : PIECE);                                     \
                float v[PIECE];                                                                                     \
                at_##type(keys, c, n, v);                                                                           \
                for (int r = 0; r < rows; r++) {                                                                    \
                    const float part = dot(v, q->f + r * q->stride + c, n);                                         \
                    s[r * lds + t] = c ? s[r * lds + t] + part : part;                                              \
                }                                                                                                   \
            }                                                                                                       \
    }                                                                                                               \
    static void values_##type(const float *p, int64_t ldp, int rows, const float *keep, const uint8_t *values,      \
                              size_t value_row, int tokens, int64_t size, float *out, int64_t ldo,                  \
                              struct kt_ahead *ahead) {                                                             \
        (void)ahead;                                                                                                \
        for (int r = 0; r < rows; r++) rescale(keep[r], out + r * ldo, size);                                       \
        for (int t = 0; t < tokens; t++, values += value_row)                                                       \
            for (int64_t c = 0; c < size; c += PIECE) {                                                             \
                const int n = (int)(size - c < PIECE ? size - c : PIECE);                                           \
                float v[PIECE];                                                                                     \
                at_##type(values, c, n, v);                                                                         \
                for (int r = 0; r < rows; r++)                                                                      \
                    for (int i = 0; i < n; i++) out[r * ldo + c + i] += p[r * ldp + t] * v[i];                      \
            }                                                                                                       \
    }
CACHE(f32)
CACHE(f16)
CACHE(bf16)
CACHE(q8_0)

void kt_fill_attend_portable(struct kt_kernels *k) {
    static const kt_scores_fn scores[KT_CACHES] = {scores_f32, scores_f16, scores_bf16, scores_q8_0};
    static const kt_values_fn values[KT_CACHES] = {values_f32, values_f16, values_bf16, values_q8_0};
    fill_attend(k);
    memcpy(k->scores, scores, sizeof scores);
    memcpy(k->values, values, sizeof values);
    k->scores_bf16 = NULL;
}
