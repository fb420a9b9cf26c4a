/* Scores and values of attention in portable C: 32 columns of a token at a time become floats and meet all rows. */
#include "../templates/attend.h"

/* ---- powers of e ------------------------------------------------------------------------------------ */

/* Vectors that the compiler takes apart as the machine needs. */
typedef float kt_vec __attribute__((vector_size(64)));
typedef int32_t kt_ivec __attribute__((vector_size(64)));
typedef uint32_t kt_uvec __attribute__((vector_size(64)));

/* x = e^x for x <= 0, relative error about 1e-7: the polynomial of exp_clamped in act.h. Below -87, where results would
 * be subnormal, exactly 0. A NaN stays one. By pointer: vectors of 64 bytes have no one calling convention. */
static inline __attribute__((always_inline)) void exp_negative(kt_vec *x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    const kt_vec t = *x * 1.44269504f + magic, n = t - magic;
    kt_vec r = *x - n * 0.693359375f; /* ln 2 in two parts: the first times n is exact */
    r = r + n * 2.12194440e-4f;
    kt_vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const kt_uvec power = ((kt_uvec)t - 0x4b400000u + 127u) << 23; /* what magic added, less its own bits */
    const kt_ivec gone = *x < -87.0f;
    *x = (kt_vec)((kt_ivec)(p * (kt_vec)power) & ~gone);
}

static inline float sum_of(const kt_vec *v) {
    float a[16];
    memcpy(a, v, sizeof a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
}

static inline float most_of(const kt_vec *v) {
    float a[16], most;
    memcpy(a, v, sizeof a);
    most = a[0];
    for (int i = 1; i < 16; i++) most = a[i] > most ? a[i] : most;
    return most;
}

/* The last n < 16 scores, scaled, and filled up with -infinity, which changes neither maximum nor sum. */
static inline __attribute__((always_inline)) void load_last(const float *s, int n, float scale, kt_vec *v) {
    float a[16];
    for (int i = 0; i < 16; i++) a[i] = i < n ? s[i] * scale : -INFINITY;
    memcpy(v, a, sizeof *v);
}

static float softmax(float *s, int n, float scale, float *max) {
    const int whole = n / 16 * 16;
    kt_vec v, most, sum, last;
    memset(&sum, 0, sizeof sum);
    most = sum + *max;
    for (int i = 0; i < whole; i += 16) {
        memcpy(&v, s + i, sizeof v);
        v *= scale;
        memcpy(s + i, &v, sizeof v);
        const kt_ivec above = v > most; /* no NaN is above anything: it shows in its own e^x */
        most = (kt_vec)(((kt_ivec)v & above) | ((kt_ivec)most & ~above));
    }
    if (whole < n) {
        load_last(s + whole, n - whole, scale, &last);
        const kt_ivec above = last > most;
        most = (kt_vec)(((kt_ivec)last & above) | ((kt_ivec)most & ~above));
    }
    *max = most_of(&most);
    const float base = *max == -INFINITY ? 0.0f : *max;
    for (int i = 0; i < whole; i += 16) {
        memcpy(&v, s + i, sizeof v);
        v -= base;
        exp_negative(&v);
        memcpy(s + i, &v, sizeof v);
        sum += v;
    }
    if (whole < n) {
        last -= base;
        exp_negative(&last);
        memcpy(s + whole, &last, (size_t)(n - whole) * 4);
        sum += last;
    }
    return sum_of(&sum);
}

/* ---- products --------------------------------------------------------------------------------------- */

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

static inline void pair_line(const uint8_t *first, const uint8_t *second, uint32_t *line) {
    for (int i = 0; i < KT_TILE; i++) line[i] = kt_load16(first + 2 * i) | (uint32_t)kt_load16(second + 2 * i) << 16;
}
static void pair_rows(const uint8_t *values, size_t value_row, int tokens, int64_t n, uint32_t *data, int64_t tile) {
    pair_rows_by(pair_line, values, value_row, tokens, n, data, tile);
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
    k->softmax = softmax;
    k->pair_rows = pair_rows;
}
