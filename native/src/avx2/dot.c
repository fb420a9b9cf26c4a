/* Decode for AVX2: one pass over packed bytes, two rows at a time (sixteen registers allow no more). */
#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include "common.h"

static inline const uint8_t *row_at(const uint8_t *w, size_t stride, int r) { return w + (size_t)r * stride; }

#define DOT(name)                                                                                                    \
    static void one_##name(const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, size_t ahead, float *out) { \
        (void)ahead; /* the next rows */\
        const size_t stride = m->stride;                                                                             \
        const uint8_t *w = m->data + (size_t)first * stride;                                                         \
        const int64_t cols = m->cols;                                                                                \
        int r = 0;                                                                                                   \
        for (; r + 2 <= rows; r += 2) name##_rows(row_at(w, stride, r), stride, 2, cols, a, out + r);                \
        if (r < rows) name##_rows(row_at(w, stride, r), stride, 1, cols, a, out + r);                                \
    }                                                                                                                          \
    KT_DOT_EACH(name)

/* ---- floats ----------------------------------------------------------------------------------------- */

#define FLOAT_ROWS(name, size, load, scalar)                                                                    \
    INLINE void name##_rows(const uint8_t *w, size_t stride, const int R, int64_t cols, const struct kt_act *a, \
                            float *out) {                                                                       \
        __m256 acc[2][4];                                                                                       \
        const size_t next = next_rows(stride, R);                                                               \
        int64_t c = 0;                                                                                          \
        for (int i = 0; i < 4; i++) acc[0][i] = acc[1][i] = _mm256_setzero_ps();                                \
        for (; c + 32 <= cols; c += 32)                                                                         \
            for (int r = 0; r < R; r++) {                                                                       \
                const uint8_t *p = row_at(w, stride, r) + c * size;                                             \
                PREFETCH(p, next);                                                                                    \
                if (size == 4) PREFETCH(p + 64, next);                                                                \
                for (int i = 0; i < 4; i++)                                                                     \
                    acc[r][i] = _mm256_fmadd_ps(load(p + 8 * i * size), load_f32(a->f + c + 8 * i), acc[r][i]); \
            }                                                                                                   \
        for (int r = 0; r < R; r++) {                                                                           \
            float rest = 0;                                                                                     \
            for (int64_t i = c; i < cols; i++) rest += scalar(row_at(w, stride, r) + i * size) * a->f[i];       \
            __m256 x = _mm256_add_ps(acc[r][0], acc[r][1]), y = _mm256_add_ps(acc[r][2], acc[r][3]);            \
            out[r] = sum_ps(_mm256_add_ps(x, y)) + rest;                                                        \
        }                                                                                                       \
    }                                                                                                           \
    DOT(name)

INLINE float f32_at(const void *p) {
    float f;
    memcpy(&f, p, 4);
    return f;
}
INLINE float bf16_at(const void *p) { return kt_bf16_to_f32(kt_load16(p)); }
FLOAT_ROWS(f32, 4, load_f32, f32_at)
FLOAT_ROWS(f16, 2, load_f16, f16_at)
FLOAT_ROWS(bf16, 2, load_bf16, bf16_at)

/* ---- blocks ----------------------------------------------------------------------------------------- */

/* acc += scale * the lanes of one group of 32. */
INLINE __m256 add_group(__m256 acc, __m256i pairs, float scale) {
    __m256 p = _mm256_cvtepi32_ps(add4(_mm256_setzero_si256(), pairs));
    return _mm256_fmadd_ps(p, _mm256_set1_ps(scale), acc);
}

INLINE __m256 q8_0_block(__m256 acc, const uint8_t *p, const struct kt_act *a, int64_t c) {
    return add_group(acc, dot2_signed(load256(p + 2), load256(a->q + c)), f16_at(p) * a->d[c / 32]);
}

INLINE __m256 k4_start(__m256 acc, const uint8_t *p, const struct kt_act *a, int64_t c, float s[8]) {
    __m256 scales, mins;
    k4_scales(p, &scales, &mins);
    _mm256_storeu_ps(s, _mm256_mul_ps(scales, load_f32(a->d + c / 32)));
    return _mm256_fnmadd_ps(mins, load_f32(a->ds + c / 32), acc);
}

INLINE __m256 q4_k_block(__m256 acc, const uint8_t *p, const struct kt_act *a, int64_t c) {
    float s[8];
    acc = k4_start(acc, p, a, c, s);
    for (int i = 0; i < 4; i++) {
        __m256i v = load256(p + 16 + 32 * i);
        acc = add_group(acc, dot2(low4(v), load256(a->q + c + 64 * i)), s[2 * i]);
        acc = add_group(acc, dot2(high4(v), load256(a->q + c + 64 * i + 32)), s[2 * i + 1]);
    }
    return acc;
}

INLINE __m256 q5_k_block(__m256 acc, const uint8_t *p, const struct kt_act *a, int64_t c) {
    float s[8];
    acc = k4_start(acc, p, a, c, s);
    __m256i qh = load256(p + 16);
    for (int i = 0; i < 4; i++) {
        __m256i v = load256(p + 48 + 32 * i);
        __m256i low = _mm256_or_si256(low4(v), q5_bit(qh, 2 * i)), high = _mm256_or_si256(high4(v), q5_bit(qh, 2 * i + 1));
        acc = add_group(acc, dot2(low, load256(a->q + c + 64 * i)), s[2 * i]);
        acc = add_group(acc, dot2(high, load256(a->q + c + 64 * i + 32)), s[2 * i + 1]);
    }
    return acc;
}

/* The 8-bit scale of each group of 16 multiplies the 16-bit pairs exactly; d and s_a follow in fp32. */
INLINE __m256 q6_k_block(__m256 acc, const uint8_t *p, const struct kt_act *a, int64_t c) {
    float d = f16_at(p + 208);
    for (int i = 0; i < 8; i++) {
        __m256i w = _mm256_sub_epi8(q6_codes(p, i), _mm256_set1_epi8(32));
        __m256i scales = _mm256_set_m128i(_mm_set1_epi16((int8_t)p[192 + 2 * i + 1]), _mm_set1_epi16((int8_t)p[192 + 2 * i]));
        __m256i sum = _mm256_madd_epi16(dot2_signed(w, load256(a->q + c + 32 * i)), scales);
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(d * a->d[c / 32 + i]), acc);
    }
    return acc;
}

#define BLOCK_ROWS(name, block, bytes)                                                                          \
    INLINE void name##_rows(const uint8_t *w, size_t stride, const int R, int64_t cols, const struct kt_act *a, \
                            float *out) {                                                                       \
        __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};                                             \
        const size_t next = next_rows(stride, R);                                                               \
        for (int64_t c = 0; c < cols; c += block)                                                               \
            for (int r = 0; r < R; r++) {                                                                       \
                const uint8_t *p = row_at(w, stride, r) + c / block * bytes;                                    \
                for (int i = 0; i < (bytes + 63) / 64; i++) PREFETCH(p + 64 * i, next);                               \
                acc[r] = name##_block(acc[r], p, a, c);                                                         \
            }                                                                                                   \
        for (int r = 0; r < R; r++) out[r] = sum_ps(acc[r]);                                                    \
    }                                                                                                           \
    DOT(name)
BLOCK_ROWS(q8_0, 32, 34)
BLOCK_ROWS(q4_k, 256, 144)
BLOCK_ROWS(q5_k, 256, 176)
BLOCK_ROWS(q6_k, 256, 210)

void KT_JOIN(kt_fill_dot_, KT_ISA)(struct kt_kernels *k) {
    k->dot[KT_FMT_F32] = dot_f32;
    k->dot[KT_FMT_F16] = dot_f16;
    k->dot[KT_FMT_BF16] = dot_bf16;
    k->dot[KT_FMT_Q8_0] = dot_q8_0;
    k->dot[KT_FMT_Q4_K] = dot_q4_k;
    k->dot[KT_FMT_Q5_K] = dot_q5_k;
    k->dot[KT_FMT_Q6_K] = dot_q6_k;
}
