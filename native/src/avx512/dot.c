/* Decode for AVX-512 (F, BW, VL, DQ): one pass over packed bytes, four rows at a time so that they share the
 * activations and keep four streams of memory in flight. Compiled a second time with VNNI by ../avx512_vnni.
 *
 * A zmm of 64 codes meets 64 activations; dot4 leaves 16 int32 lanes, four products each, so a group of 32
 * owns 8 lanes and a group of 16 owns 4. Lanes become fp32, are scaled by s * s_a of their group, and
 * accumulate; lanes are only added up at the end of the row. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "common.h"

static inline const uint8_t *row_at(const uint8_t *w, size_t stride, int r) { return w + (size_t)r * stride; }

/* Expand each `name`_rows(…, R, …) for four rows, and for one when fewer are left. */
#define DOT(name)                                                                                                    \
    static void dot_##name(const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, float *out) { \
        const size_t stride = m->stride;                                                                             \
        const uint8_t *w = m->data + (size_t)first * stride;                                                         \
        const int64_t cols = m->cols;                                                                                \
        if (rows == 4) {                                                                                             \
            name##_rows(w, stride, 4, cols, a, out);                                                                 \
            return;                                                                                                  \
        }                                                                                                            \
        for (int r = 0; r < rows; r++) name##_rows(row_at(w, stride, r), stride, 1, cols, a, out + r);               \
    }

/* ---- floats ----------------------------------------------------------------------------------------- */

/* Two accumulators a row: eight chains hide the latency of the multiply-add. */
#define FLOAT_ROWS(name, size, load, load_mask)                                                                       \
    INLINE void name##_rows(const uint8_t *w, size_t stride, const int R, int64_t cols, const struct kt_act *a,       \
                            float *out) {                                                                             \
        __m512 even[4], odd[4];                                                                                       \
        const size_t next = next_rows(stride, R);                                                                         \
        int64_t c = 0;                                                                                                \
        for (int r = 0; r < R; r++) even[r] = odd[r] = _mm512_setzero_ps();                                           \
        for (; c + 32 <= cols; c += 32) {                                                                             \
            __m512 x = _mm512_loadu_ps(a->f + c), y = _mm512_loadu_ps(a->f + c + 16);                                 \
            for (int r = 0; r < R; r++) {                                                                             \
                const uint8_t *p = row_at(w, stride, r) + c * size;                                                   \
                PREFETCH(p, next);                                                                                          \
                if (size == 4) PREFETCH(p + 64, next);                                                                      \
                even[r] = _mm512_fmadd_ps(load(p), x, even[r]);                                                       \
                odd[r] = _mm512_fmadd_ps(load(p + 16 * size), y, odd[r]);                                             \
            }                                                                                                         \
        }                                                                                                             \
        for (; c < cols; c += 16) {                                                                                   \
            __mmask16 m = (__mmask16)(cols - c >= 16 ? 0xffff : (1u << (cols - c)) - 1);                              \
            __m512 x = _mm512_maskz_loadu_ps(m, a->f + c);                                                            \
            for (int r = 0; r < R; r++)                                                                               \
                even[r] = _mm512_fmadd_ps(load_mask(m, row_at(w, stride, r) + c * size), x, even[r]);                 \
        }                                                                                                             \
        for (int r = 0; r < R; r++) out[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));                    \
    }                                                                                                                 \
    DOT(name)

FLOAT_ROWS(f32, 4, _mm512_loadu_ps, _mm512_maskz_loadu_ps)
FLOAT_ROWS(f16, 2, load_f16, load_f16_mask)
FLOAT_ROWS(bf16, 2, load_bf16, load_bf16_mask)

/* ---- Q8_0 ------------------------------------------------------------------------------------------- */

/* [s0 x 8, s1 x 8] */
INLINE __m512 pair_ps(float s0, float s1) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(s0), 0xff00, _mm_set_ss(s1));
}

/* The codes of two blocks, without the scales between them. */
INLINE __m512i two_blocks(const uint8_t *p) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load256(p + 2)), load256(p + 36), 1);
}

/* The scales of eight blocks. */
INLINE __m256 q8_0_scales(const uint8_t *p) {
    uint64_t low = kt_load16(p) | (uint64_t)kt_load16(p + 34) << 16 | (uint64_t)kt_load16(p + 68) << 32;
    uint64_t high = kt_load16(p + 136) | (uint64_t)kt_load16(p + 170) << 16 | (uint64_t)kt_load16(p + 204) << 32;
    low |= (uint64_t)kt_load16(p + 102) << 48;
    high |= (uint64_t)kt_load16(p + 238) << 48;
    return _mm256_cvtph_ps(_mm_set_epi64x((int64_t)high, (int64_t)low));
}

INLINE void q8_0_rows(const uint8_t *w, size_t stride, const int R, int64_t cols, const struct kt_act *a, float *out) {
    __m512 acc[4];
    const size_t next = next_rows(stride, R);
    for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + 256 <= cols; c += 256) { /* eight blocks, whose scales become one vector */
        __m512i q[4], start[4];
        for (int i = 0; i < 4; i++) q[i] = _mm512_loadu_si512(a->q + c + 64 * i), start[i] = signed_start(q[i]);
        const __m256 d = _mm256_loadu_ps(a->d + c / 32);
        for (int r = 0; r < R; r++) {
            const uint8_t *p = row_at(w, stride, r) + c / 32 * 34;
            for (int i = 0; i < 5; i++) PREFETCH(p + 64 * i, next);
            __m512 s = _mm512_castps256_ps512(_mm256_mul_ps(q8_0_scales(p), d));
            for (int i = 0; i < 4; i++) {
                const __m512i lanes = _mm512_inserti64x4(_mm512_set1_epi32(2 * i), _mm256_set1_epi32(2 * i + 1), 1);
                __m512 sum = _mm512_cvtepi32_ps(dot4_signed(start[i], two_blocks(p + 68 * i), q[i]));
                acc[r] = _mm512_fmadd_ps(sum, _mm512_permutexvar_ps(lanes, s), acc[r]);
            }
        }
    }
    for (; c + 64 <= cols; c += 64) {
        __m512i q = _mm512_loadu_si512(a->q + c), start = signed_start(q);
        const float *d = a->d + c / 32;
        for (int r = 0; r < R; r++) {
            const uint8_t *p = row_at(w, stride, r) + c / 32 * 34;
            __m512 s = pair_ps(f16_at(p) * d[0], f16_at(p + 34) * d[1]);
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot4_signed(start, two_blocks(p), q)), s, acc[r]);
        }
    }
    if (c < cols) { /* one block left */
        __m512i q = _mm512_zextsi256_si512(load256(a->q + c)), start = signed_start(q);
        for (int r = 0; r < R; r++) {
            const uint8_t *p = row_at(w, stride, r) + c / 32 * 34;
            __m512i v = _mm512_zextsi256_si512(load256(p + 2));
            __m512 s = _mm512_set1_ps(f16_at(p) * a->d[c / 32]);
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot4_signed(start, v, q)), s, acc[r]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = _mm512_reduce_add_ps(acc[r]);
}
DOT(q8_0)

/* ---- Q4_K and Q5_K ---------------------------------------------------------------------------------- */

/* A 64-byte load of qs holds two pairs of groups, so its low nibbles are groups 0 and 2, its high nibbles 1
 * and 3; the activations are arranged once for all rows to match. */
struct k4_acts {
    __m512i q[4]; /* groups {0,2} {1,3} {4,6} {5,7} */
    __m512 d;     /* s_a of 8 groups, then minus s_a * sum */
};

INLINE struct k4_acts k4_load(const struct kt_act *a, int64_t c) {
    struct k4_acts x;
    for (int i = 0; i < 2; i++) {
        __m512i first = _mm512_loadu_si512(a->q + c + 128 * i), second = _mm512_loadu_si512(a->q + c + 128 * i + 64);
        x.q[2 * i] = _mm512_shuffle_i64x2(first, second, 0x44);
        x.q[2 * i + 1] = _mm512_shuffle_i64x2(first, second, 0xee);
    }
    __m256 minus = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_loadu_ps(a->ds + c / 32));
    x.d = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a->d + c / 32)), minus, 1);
    return x;
}

/* acc += the 64 codes u of groups (g, g + 2), scaled. s: 8 scales in the low half. */
INLINE __m512 k4_add(__m512 acc, __m512i u, __m512i q, __m512 s, const int g) {
    const __m512i lanes = _mm512_inserti64x4(_mm512_set1_epi32(g), _mm256_set1_epi32(g + 2), 1);
    __m512 p = _mm512_cvtepi32_ps(dot4(_mm512_setzero_si512(), u, q));
    return _mm512_fmadd_ps(p, _mm512_permutexvar_ps(lanes, s), acc);
}

INLINE __m512 q4_k_block(__m512 acc, const uint8_t *p, const struct k4_acts *x) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512 s = _mm512_mul_ps(k4_scales(load128(p)), x->d);
    acc = _mm512_mask_add_ps(acc, 0xff00, acc, s); /* the mins */
    for (int i = 0; i < 2; i++) {
        __m512i v = _mm512_loadu_si512(p + 16 + 64 * i);
        acc = k4_add(acc, _mm512_and_si512(v, low), x->q[2 * i], s, 4 * i);
        acc = k4_add(acc, _mm512_and_si512(_mm512_srli_epi16(v, 4), low), x->q[2 * i + 1], s, 4 * i + 1);
    }
    return acc;
}

INLINE __m512 q5_k_block(__m512 acc, const uint8_t *p, const struct k4_acts *x) {
    __m512 s = _mm512_mul_ps(k4_scales(load128(p)), x->d);
    acc = _mm512_mask_add_ps(acc, 0xff00, acc, s);
    __m512i high = _mm512_broadcast_i64x4(load256(p + 16));
    for (int i = 0; i < 2; i++) {
        __m512i v = _mm512_loadu_si512(p + 48 + 64 * i);
        acc = k4_add(acc, q5_low(v, high, 4 * i), x->q[2 * i], s, 4 * i);
        acc = k4_add(acc, q5_high(v, high, 4 * i), x->q[2 * i + 1], s, 4 * i + 1);
    }
    return acc;
}

#define K4_ROWS(name, bytes, lines)                                                                             \
    INLINE void name##_rows(const uint8_t *w, size_t stride, const int R, int64_t cols, const struct kt_act *a, \
                            float *out) {                                                                       \
        __m512 acc[4];                                                                                          \
        const size_t next = next_rows(stride, R);                                                                   \
        for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();                                               \
        for (int64_t c = 0; c < cols; c += KT_QK) {                                                             \
            const struct k4_acts x = k4_load(a, c);                                                             \
            for (int r = 0; r < R; r++) {                                                                       \
                const uint8_t *p = row_at(w, stride, r) + c / KT_QK * (bytes);                                  \
                for (int i = 0; i < (lines); i++) PREFETCH(p + 64 * i, next);                                         \
                acc[r] = name##_block(acc[r], p, &x);                                                           \
            }                                                                                                   \
        }                                                                                                       \
        for (int r = 0; r < R; r++) out[r] = _mm512_reduce_add_ps(acc[r]);                                      \
    }                                                                                                           \
    DOT(name)
K4_ROWS(q4_k, 144, 3)
K4_ROWS(q5_k, 176, 3)

/* ---- Q6_K ------------------------------------------------------------------------------------------- */

INLINE void q6_k_rows(const uint8_t *w, size_t stride, const int R, int64_t cols, const struct kt_act *a, float *out) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i quads = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 acc[4];
    const size_t next = next_rows(stride, R);
    for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < cols; c += KT_QK) {
        __m512i q[4], start[4];
        for (int i = 0; i < 4; i++) {
            q[i] = _mm512_loadu_si512(a->q + c + 64 * i);
            start[i] = _mm512_sub_epi32(_mm512_setzero_si512(), dot4(_mm512_setzero_si512(), _mm512_set1_epi8(32), q[i]));
        }
        __m512 d = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(a->d + c / 32)));
        for (int r = 0; r < R; r++) {
            const uint8_t *p = row_at(w, stride, r) + c / KT_QK * 210;
            for (int i = 0; i < 4; i++) PREFETCH(p + 64 * i, next);
            __m512 s = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p + 192))), d);
            s = _mm512_mul_ps(s, _mm512_set1_ps(f16_at(p + 208)));
            for (int i = 0; i < 4; i++) { /* 64 codes, four groups of 16 */
                __m512i u = q6_codes(p, i);
                __m512 lanes = _mm512_permutexvar_ps(_mm512_add_epi32(quads, _mm512_set1_epi32(4 * i)), s);
                acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot4(start[i], u, q[i])), lanes, acc[r]);
            }
        }
    }
    for (int r = 0; r < R; r++) out[r] = _mm512_reduce_add_ps(acc[r]);
}
DOT(q6_k)

void KT_JOIN(kt_fill_dot_, KT_ISA)(struct kt_kernels *k) {
    k->dot[KT_FMT_F32] = dot_f32;
    k->dot[KT_FMT_F16] = dot_f16;
    k->dot[KT_FMT_BF16] = dot_bf16;
    k->dot[KT_FMT_Q8_0] = dot_q8_0;
    k->dot[KT_FMT_Q4_K] = dot_q4_k;
    k->dot[KT_FMT_Q5_K] = dot_q5_k;
    k->dot[KT_FMT_Q6_K] = dot_q6_k;
}
