/* attend_rows.h: scores and values of attention on rows as they lie in the cache, converted in registers, and softmax.
 * Needs a dot_vec.h, and of the file that includes it: SCORE_TOKENS by SCORE_ROWS sums at once, VALUE_ROWS by
 * VALUE_VECTORS, and some more v_ functions.
 *
 * Scores: some tokens meet some rows, a vector of columns at a time. Values: some vectors of columns stay in registers
 * for all tokens of the call. What is read again, for more rows or columns, is in the first-level cache by then. */
#ifndef KT_ATTEND_ROWS_H
#define KT_ATTEND_ROWS_H

#include "attend.h"

enum { FLOATS = VECTOR / 4 };

/* FLOATS columns of a row, from column c on. */
INLINE vfloat f32_at(const uint8_t *row, int64_t c) { return v_load_f32(row + c * 4); }
INLINE vfloat f16_at_column(const uint8_t *row, int64_t c) { return v_load_f16(row + c * 2); }
INLINE vfloat bf16_at(const uint8_t *row, int64_t c) { return v_load_bf16(row + c * 2); }
INLINE vfloat q8_0_at(const uint8_t *row, int64_t c) {
    const uint8_t *block = row + c / 32 * (int64_t)sizeof(kt_block_q8_0);
    return v_mul(v_floats(f16_at(block)), v_signed8(block + 2 + c % 32));
}

/* The last n < FLOATS columns, filled up with zeros. */
#define PART(name, size, at)                                                \
    INLINE vfloat name##_part(const uint8_t *row, int64_t c, int64_t n) {   \
        uint8_t some[VECTOR] = {0};                                         \
        memcpy(some, row + c * size, (size_t)(n * size));                   \
        return at(some, 0);                                                 \
    }
PART(f32, 4, f32_at)
PART(f16, 2, f16_at_column)
PART(bf16, 2, bf16_at)
INLINE vfloat q8_0_part(const uint8_t *row, int64_t c, int64_t n) { return (void)n, q8_0_at(row, c); } /* never */

/* s[r * lds + t] for R rows and T tokens. */
#define SCORES_SOME(name, at)                                                                                       \
    INLINE void name##_scores_some(const int T, const int R, const float *q, const struct kt_acts *a,               \
                                   const uint8_t *keys, size_t key_row, float *s, int64_t lds) {                    \
        vfloat sum[16];                                                                                             \
        float out[16];                                                                                              \
        int64_t c = 0;                                                                                              \
        for (int i = 0; i < 16; i++) sum[i] = v_zero();                                                             \
        for (; c + FLOATS <= a->cols; c += FLOATS) {                                                                \
            vfloat w[SCORE_TOKENS];                                                                                 \
            for (int t = 0; t < T; t++) w[t] = at(keys + (size_t)t * key_row, c);                                   \
            for (int r = 0; r < R; r++) {                                                                           \
                const vfloat x = v_load_f32(q + r * a->stride + c);                                                 \
                for (int t = 0; t < T; t++) sum[r * T + t] = v_fma(w[t], x, sum[r * T + t]);                        \
            }                                                                                                       \
        }                                                                                                           \
        if (c < a->cols)                                                                                            \
            for (int t = 0; t < T; t++) {                                                                           \
                const vfloat w = name##_part(keys + (size_t)t * key_row, c, a->cols - c);                           \
                for (int r = 0; r < R; r++)                                                                         \
                    sum[r * T + t] = v_fma(w, v_load_f32(q + r * a->stride + c), sum[r * T + t]);                   \
            }                                                                                                       \
        v_sums(sum, T * R, out);                                                                                    \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int t = 0; t < T; t++) s[r * lds + t] = out[r * T + t];                                            \
    }

/* All rows, for T tokens. */
#define SCORES_TOKENS(name)                                                                                         \
    INLINE void name##_scores_tokens(const int T, const struct kt_acts *a, int rows, const uint8_t *keys,           \
                                     size_t key_row, float *s, int64_t lds) {                                       \
        int r = 0;                                                                                                  \
        for (; r + SCORE_ROWS <= rows; r += SCORE_ROWS)                                                             \
            name##_scores_some(T, SCORE_ROWS, a->f + r * a->stride, a, keys, key_row, s + r * lds, lds); \
        for (; r + 2 <= rows; r += 2)                                                                               \
            name##_scores_some(T, 2, a->f + r * a->stride, a, keys, key_row, s + r * lds, lds);       \
        for (; r < rows; r++)                                                                                       \
            name##_scores_some(T, 1, a->f + r * a->stride, a, keys, key_row, s + r * lds, lds);       \
    }                                                                                                               \
    static void scores_##name(const struct kt_acts *a, int rows, const uint8_t *keys, size_t key_row, int tokens,   \
                              float *s, int64_t lds, struct kt_ahead *ahead) {                                      \
        int t = 0;                                                                                                  \
        kt_ahead_spread(ahead, tokens / SCORE_TOKENS + 1);                                                          \
        for (; t + SCORE_TOKENS <= tokens; t += SCORE_TOKENS) {                                                     \
            kt_ahead_step(ahead);                                                                                   \
            name##_scores_tokens(SCORE_TOKENS, a, rows, keys + (size_t)t * key_row, key_row, s + t, lds);           \
        }                                                                                                           \
        for (; t < tokens; t++) name##_scores_tokens(1, a, rows, keys + (size_t)t * key_row, key_row, s + t, lds);  \
    }

/* R rows of out by N vectors of columns; `part`: of the last columns, so many. */
#define VALUES_SOME(name, at)                                                                                       \
    INLINE void name##_values_some(const int R, const int N, const float *p, int64_t ldp, const float *keep,        \
                                   const uint8_t *values, size_t value_row, int tokens, int64_t c, int64_t part,    \
                                   float *out, int64_t ldo) {                                                       \
        vfloat sum[VALUE_ROWS][VALUE_VECTORS];                                                                      \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int j = 0; j < N; j++)                                                                             \
                sum[r][j] = v_mul(v_floats(keep[r]), v_load_f32(out + r * ldo + c + j * FLOATS));                   \
        for (int t = 0; t < tokens; t++, values += value_row) {                                                     \
            vfloat w[VALUE_VECTORS];                                                                                \
            for (int j = 0; j < N; j++) w[j] = part ? name##_part(values, c, part) : at(values, c + j * FLOATS);    \
            for (int r = 0; r < R; r++) {                                                                           \
                const vfloat x = v_floats(p[r * ldp + t]);                                                          \
                for (int j = 0; j < N; j++) sum[r][j] = v_fma(w[j], x, sum[r][j]);                                  \
            }                                                                                                       \
        }                                                                                                           \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int j = 0; j < N; j++) v_store_f32(out + r * ldo + c + j * FLOATS, sum[r][j]);                     \
    }                                                                                                               \
    INLINE void name##_values_rows(const int R, const float *p, int64_t ldp, const float *keep,                     \
                                   const uint8_t *values, size_t value_row, int tokens, int64_t size, float *out,   \
                                   int64_t ldo, struct kt_ahead *ahead) {                                           \
        int64_t c = 0;                                                                                              \
        for (; c + VALUE_VECTORS * FLOATS <= size; c += VALUE_VECTORS * FLOATS) {                                   \
            kt_ahead_step(ahead);                                                                                   \
            name##_values_some(R, VALUE_VECTORS, p, ldp, keep, values, value_row, tokens, c, 0, out, ldo);          \
        }                                                                                                           \
        for (; c + FLOATS <= size; c += FLOATS)                                                                     \
            name##_values_some(R, 1, p, ldp, keep, values, value_row, tokens, c, 0, out, ldo);                      \
        if (c < size) name##_values_some(R, 1, p, ldp, keep, values, value_row, tokens, c, size - c, out, ldo);     \
    }                                                                                                               \
    static void values_##name(const float *p, int64_t ldp, int rows, const float *keep, const uint8_t *values,      \
                              size_t value_row, int tokens, int64_t size, float *out, int64_t ldo,                  \
                              struct kt_ahead *ahead) {                                                             \
        int r = 0;                                                                                                  \
        kt_ahead_spread(ahead, (rows + VALUE_ROWS - 1) / VALUE_ROWS * (size / (VALUE_VECTORS * FLOATS) + 1));       \
        for (; r + VALUE_ROWS <= rows; r += VALUE_ROWS)                                                             \
            name##_values_rows(VALUE_ROWS, p + r * ldp, ldp, keep + r, values, value_row, tokens, size,             \
                               out + r * ldo, ldo, ahead);                                                          \
        for (; r + 2 <= rows; r += 2)                                                                               \
            name##_values_rows(2, p + r * ldp, ldp, keep + r, values, value_row, tokens, size, out + r * ldo, ldo,  \
                               ahead);                                                                              \
        for (; r < rows; r++)                                                                                       \
            name##_values_rows(1, p + r * ldp, ldp, keep + r, values, value_row, tokens, size, out + r * ldo, ldo,  \
                               ahead);                                                                              \
    }

/* ---- powers of e ------------------------------------------------------------------------------------ */

/* e^x for x <= 0, as portable/attend.c computes it, fused: relative error about 1e-7, below -87 exactly 0. */
INLINE vfloat v_exp_negative(vfloat x) {
    const vfloat magic = v_floats(12582912.0f), t = v_fma(x, v_floats(1.44269504f), magic), n = v_sub(t, magic);
    vfloat r = v_fma(n, v_floats(-0.693359375f), x);
    r = v_fma(n, v_floats(2.12194440e-4f), r);
    vfloat p = v_fma(v_floats(1.9875691500e-4f), r, v_floats(1.3981999507e-3f));
    p = v_fma(p, r, v_floats(8.3334519073e-3f));
    p = v_fma(p, r, v_floats(4.1665795894e-2f));
    p = v_fma(p, r, v_floats(1.6666665459e-1f));
    p = v_fma(p, r, v_floats(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_floats(1.0f));
    return v_unless_below(x, -87.0f, v_times_power(p, t));
}

/* The last n < FLOATS scores, filled up with what is -infinity once scaled. */
INLINE vfloat last_scores(const float *s, int n, float scale) {
    float some[FLOATS];
    for (int i = 0; i < FLOATS; i++) some[i] = i < n ? s[i] * scale : -INFINITY;
    return v_load_f32(some);
}

static float softmax(float *s, int n, float scale, float *max) {
    const vfloat by = v_floats(scale);
    vfloat most = v_floats(*max), sum = v_zero(), last = v_zero();
    int i = 0;
    for (; i + FLOATS <= n; i += FLOATS) most = v_most(v_mul(v_load_f32(s + i), by), most);
    if (i < n) {
        last = last_scores(s + i, n - i, scale);
        most = v_most(last, most);
    }
    *max = v_largest(most);
    const vfloat base = v_floats(*max == -INFINITY ? 0.0f : *max);
    for (i = 0; i + FLOATS <= n; i += FLOATS) {
        const vfloat e = v_exp_negative(v_sub(v_mul(v_load_f32(s + i), by), base));
        v_store_f32(s + i, e);
        sum = v_add(sum, e);
    }
    if (i < n) {
        float some[FLOATS];
        last = v_exp_negative(v_sub(last, base));
        v_store_f32(some, last);
        memcpy(s + i, some, (size_t)(n - i) * 4);
        sum = v_add(sum, last);
    }
    return v_sum(sum);
}

static void pair_rows(const uint8_t *values, size_t value_row, int tokens, int64_t n, uint32_t *data, int64_t tile) {
    pair_rows_by(v_pair_line, values, value_row, tokens, n, data, tile);
}

#define ATTEND_ROWS(name, at) SCORES_SOME(name, at) SCORES_TOKENS(name) VALUES_SOME(name, at)
ATTEND_ROWS(f32, f32_at)
ATTEND_ROWS(f16, f16_at_column)
ATTEND_ROWS(bf16, bf16_at)
ATTEND_ROWS(q8_0, q8_0_at)

static void fill_attend_rows(struct kt_kernels *k) {
    static const kt_scores_fn scores[KT_CACHES] = {scores_f32, scores_f16, scores_bf16, scores_q8_0};
    static const kt_values_fn values[KT_CACHES] = {values_f32, values_f16, values_bf16, values_q8_0};
    fill_attend(k);
    k->softmax = softmax;
    k->pair_rows = pair_rows;
    memcpy(k->scores, scores, sizeof scores);
    memcpy(k->values, values, sizeof values);
}

#endif
