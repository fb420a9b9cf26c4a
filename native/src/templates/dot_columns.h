/* templates/dot_columns.h: decode of types whose memory runs along rows, for AVX-512: sixteen rows a vector, which
 * meet a broadcast dword of activations. GPTQ: a line's dword of each row holds its columns, and nothing is
 * transposed. AWQ: bytes of four lines come together in a dword, whose nibbles are rows 32 apart from lane to lane;
 * scales take that order. */
#ifndef KT_DOT_COLUMNS_IMPL_H
#define KT_DOT_COLUMNS_IMPL_H

#include "dot_scales.h"

/* Lines that are fetched before they are needed. GPTQ at T=1: 8 beside 32 read 12 % faster, 128 no better than 32. */
enum { COLUMN_VECTORS = KT_DOT_ROWS / 16, LINES_AHEAD = 8, AWQ_LINES_AHEAD = 64 };

INLINE __m512 two_float8s(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

/* Of the sixteen rows from `row` on, those in the mask. */
INLINE __m512 column_scales(const struct kt_matrix *w, int64_t line, int64_t row, __mmask16 rows) {
    const uint8_t *p = w->scales + (size_t)line * w->scale_stride;
    _Alignas(16) uint8_t bytes[16];
    __m512 s;
    switch (w->scale_type) {
    case KT_SCALE_F32: s = _mm512_maskz_loadu_ps(rows, p + 4 * row); break;
    case KT_SCALE_F16: s = load_f16_mask(rows, p + 2 * row); break;
    case KT_SCALE_BF16: s = load_bf16_mask(rows, p + 2 * row); break;
    default:
        _mm_store_si128((__m128i *)bytes, _mm_maskz_loadu_epi8(rows, p + row));
        s = w->scale_type == KT_SCALE_E8M0 ? two_float8s(e8m0_8(bytes), e8m0_8(bytes + 8))
                                           : two_float8s(e4m3_8(bytes), e4m3_8(bytes + 8));
    }
    return _mm512_mul_ps(s, _mm512_set1_ps(w->scale));
}

/* Their zero points; row is a multiple of 8. */
INLINE __m512i column_zeros(const struct kt_matrix *w, int64_t line, int64_t row, __mmask16 rows, const int bits) {
    if (!w->zeros) return _mm512_set1_epi32(w->zero);
    const uint8_t *p = w->zeros + (size_t)line * w->zero_stride + row * bits / 8;
    const __m512i bias = _mm512_set1_epi32(w->zero_bias);
    if (bits == 8) return _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(rows, p)), bias);
    const __mmask8 words = (__mmask8)((rows & 0xff ? 1 : 0) | (rows & 0xff00 ? 2 : 0));
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i z = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(words, p));
    z = _mm512_permutexvar_epi32(_mm512_srli_epi32(lane, 3), z);
    z = _mm512_srlv_epi32(z, _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 2));
    return _mm512_add_epi32(_mm512_and_si512(z, _mm512_set1_epi32(15)), bias);
}

/* Activations of a group in the order in which a line's dwords hold their columns: of 4 bits, first the even ones of
 * 8. */
INLINE void column_acts(const int8_t *q, const int bits, const int group, int8_t *out) {
    const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int i = 0; i < group; i += 16) {
        __m128i v = load128(q + i);
        _mm_store_si128((__m128i *)(out + i), bits == 4 ? _mm_shuffle_epi8(v, even_odd) : v);
    }
}

INLINE __m512i four_acts(const int8_t *q) { return _mm512_set1_epi32((int)kt_load32(q)); }

INLINE void columns_dot(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, const int tokens,
                        size_t ahead, float *out, int64_t ldc, const int bits, const int group) {
    const int vectors = (rows + 15) / 16, each = 32 / bits, lines = group / each;
    const int64_t all = w->cols / each;
    const __m512i low4 = _mm512_set1_epi8(15);
    __m512 sum[KT_DOT_TOKENS][COLUMN_VECTORS], scale[COLUMN_VECTORS];
    __m512i zero[COLUMN_VECTORS];
    for (int i = 0; i < tokens; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t c = 0, line = 0, same = 0; c < w->cols; c += group, same -= group) {
        _Alignas(16) int8_t q[KT_DOT_TOKENS][32];
        __m512i minus[KT_DOT_TOKENS]; /* the group's sum of activations */
        for (int i = 0; i < tokens; i++) {
            const int32_t low = a[i].low[c / 32], high = a[i].high[c / 32];
            column_acts(a[i].q + c, bits, group, q[i]);
            minus[i] = _mm512_set1_epi32(-(group == 32 ? low + high : c % 32 ? high : low));
        }
        const uint8_t *p = w->data + (size_t)(c / each) * w->stride + (size_t)first * 4;
        const int64_t then = c / each + LINES_AHEAD;
        const size_t far = then < all ? LINES_AHEAD * w->stride : (LINES_AHEAD - (size_t)all) * w->stride + ahead;
        for (int v = 0; v < vectors; v++, p += 64) {
            const __mmask16 m = (__mmask16)(rows - 16 * v >= 16 ? 0xffff : (1 << (rows - 16 * v)) - 1);
            if (same == 0) {
                scale[v] = column_scales(w, line, first + 16 * v, m);
                zero[v] = column_zeros(w, line, first + 16 * v, m, bits);
            }
            __m512i dot[KT_DOT_TOKENS];
            for (int i = 0; i < tokens; i++) dot[i] = _mm512_mullo_epi32(zero[v], minus[i]);
#pragma GCC unroll 8
            for (int l = 0; l < lines; l++) {
                const uint8_t *at = p + (size_t)l * w->stride;
                __m512i u = _mm512_maskz_loadu_epi32(m, at);
                PREFETCH(at, far);
                if (bits == 8) {
                    for (int i = 0; i < tokens; i++) dot[i] = dot4(dot[i], u, four_acts(q[i] + 4 * l));
                    continue;
                }
                const __m512i even = _mm512_and_si512(u, low4), odd = _mm512_and_si512(_mm512_srli_epi16(u, 4), low4);
                for (int i = 0; i < tokens; i++) {
                    dot[i] = dot4(dot[i], even, four_acts(q[i] + 8 * l));
                    dot[i] = dot4(dot[i], odd, four_acts(q[i] + 8 * l + 4));
                }
            }
            for (int i = 0; i < tokens; i++)
                sum[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]),
                                            _mm512_mul_ps(scale[v], _mm512_set1_ps(a[i].d[c / 32])), sum[i][v]);
        }
        if (same == 0) {
            line++;
            same = w->scale_cols;
        }
    }
    for (int i = 0; i < tokens; i++)
        for (int v = 0; v < vectors; v++) {
            const __mmask16 m = (__mmask16)(rows - 16 * v >= 16 ? 0xffff : (1 << (rows - 16 * v)) - 1);
            _mm512_mask_storeu_ps(out + i * ldc + 16 * v, m, sum[i][v]);
        }
}

/* ---- AWQ --------------------------------------------------------------------------------------------- */

/* Sums of 128 rows are eight vectors: number 2v + h holds, in lane l, rows 32l + 8v + 0, 4, 1, 5 (low nibbles of
 * bytes 4v .. 4v + 3 of the lane) or, h = 1, 2, 6, 3, 7 (high nibbles). */
_Static_assert(KT_DOT_ROWS == 128, "eight sums of sixteen rows");
enum { AWQ_SUMS = 8, AWQ_TOKENS = 2 /* of a pass: sixteen sums */ };

INLINE int awq_row(const int sum, const int i) {
    static const int8_t row[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
    return i / 4 * 32 + sum / 2 * 8 + row[sum % 2][i % 4];
}

INLINE __m512 awq_scales_of(const float *f, const int sum) {
    const __m512i lane = sum % 2 ? _mm512_set_epi32(31, 27, 30, 26, 23, 19, 22, 18, 15, 11, 14, 10, 7, 3, 6, 2)
                                 : _mm512_set_epi32(29, 25, 28, 24, 21, 17, 20, 16, 13, 9, 12, 8, 5, 1, 4, 0);
    f += sum / 2 * 8;
    return _mm512_permutex2var_ps(two_float8s(_mm256_loadu_ps(f), _mm256_loadu_ps(f + 32)), lane,
                                  two_float8s(_mm256_loadu_ps(f + 64), _mm256_loadu_ps(f + 96)));
}

INLINE void awq_scales(const struct kt_matrix *w, int64_t line, int64_t first, int rows, __m512 scale[AWQ_SUMS]) {
    float f[KT_DOT_ROWS];
    for (int v = 0; v < COLUMN_VECTORS; v++) {
        const int left = rows - 16 * v;
        const __mmask16 m = (__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
        _mm512_storeu_ps(f + 16 * v, column_scales(w, line, first + 16 * v, m));
    }
    for (int s = 0; s < AWQ_SUMS; s++) scale[s] = awq_scales_of(f, s);
}

INLINE void awq_zeros(const struct kt_matrix *w, int64_t line, int64_t first, __mmask16 words, __m512i zero[AWQ_SUMS]) {
    const __m512i low4 = _mm512_set1_epi32(15), bias = _mm512_set1_epi32(w->zero_bias);
    for (int v = 0; v < AWQ_SUMS / 2; v++) {
        zero[2 * v] = zero[2 * v + 1] = _mm512_set1_epi32(w->zero);
        if (!w->zeros) continue;
        const __m512i z = _mm512_maskz_loadu_epi32(words, w->zeros + (size_t)line * w->zero_stride + first / 2);
        const int at = (int)0x80808000 + 4 * v;
        const __m512i bytes = _mm512_shuffle_epi8(z, _mm512_set4_epi32(at + 3, at + 2, at + 1, at));
        zero[2 * v] = _mm512_add_epi32(_mm512_and_si512(bytes, low4), bias);
        zero[2 * v + 1] = _mm512_add_epi32(_mm512_srli_epi32(bytes, 4), bias);
    }
}

/* dot += four columns, whose lines start at p, of 128 rows. q: the activations of token i, 32 apart. */
INLINE void awq_four(const uint8_t *p, size_t stride, size_t far, __mmask16 words, const int T, const int8_t *q,
                     __m512i dot[AWQ_TOKENS][AWQ_SUMS]) {
    const __m512i low4 = _mm512_set1_epi8(15);
    __m512i line[4], v[4], four[AWQ_TOKENS];
    for (int j = 0; j < 4; j++) line[j] = _mm512_maskz_loadu_epi32(words, p + (size_t)j * stride);
    for (int j = 0; j < 4; j++) PREFETCH(p + (size_t)j * stride, far);
    const __m512i ab = _mm512_unpacklo_epi8(line[0], line[1]), AB = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i cd = _mm512_unpacklo_epi8(line[2], line[3]), CD = _mm512_unpackhi_epi8(line[2], line[3]);
    v[0] = _mm512_unpacklo_epi16(ab, cd);
    v[1] = _mm512_unpackhi_epi16(ab, cd);
    v[2] = _mm512_unpacklo_epi16(AB, CD);
    v[3] = _mm512_unpackhi_epi16(AB, CD);
    for (int t = 0; t < T; t++) four[t] = four_acts(q + 32 * t);
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_and_si512(v[j], low4), high = _mm512_and_si512(_mm512_srli_epi16(v[j], 4), low4);
        for (int t = 0; t < T; t++) {
            dot[t][2 * j] = dot4(dot[t][2 * j], low, four[t]);
            dot[t][2 * j + 1] = dot4(dot[t][2 * j + 1], high, four[t]);
        }
    }
}

INLINE void awq_dot(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, const int T,
                    size_t ahead, float *out, int64_t ldc, const int group) {
    const __mmask16 words = (__mmask16)((1u << (rows + 7) / 8) - 1);
    __m512 sum[AWQ_TOKENS][AWQ_SUMS], scale[AWQ_SUMS];
    __m512i zero[AWQ_SUMS], dot[AWQ_TOKENS][AWQ_SUMS];
    for (int t = 0; t < T; t++)
        for (int s = 0; s < AWQ_SUMS; s++) sum[t][s] = _mm512_setzero_ps();
    const uint8_t *p = w->data + first / 2;
    for (int64_t c = 0, line = 0, same = 0; c < w->cols; c += group, same -= group) {
        if (same == 0) {
            awq_scales(w, line, first, rows, scale);
            awq_zeros(w, line++, first, words, zero);
            same = w->scale_cols;
        }
        _Alignas(16) int8_t q[AWQ_TOKENS][32];
        for (int t = 0; t < T; t++) {
            const int32_t low = a[t].low[c / 32], high = a[t].high[c / 32];
            const __m512i minus = _mm512_set1_epi32(-(group == 32 ? low + high : c % 32 ? high : low));
            memcpy(q[t], a[t].q + c, (size_t)group);
            for (int s = 0; s < AWQ_SUMS; s++) dot[t][s] = _mm512_mullo_epi32(zero[s], minus);
        }
        const int64_t then = c + AWQ_LINES_AHEAD;
        const size_t far =
            then < w->cols ? AWQ_LINES_AHEAD * w->stride : (AWQ_LINES_AHEAD - (size_t)w->cols) * w->stride + ahead;
#pragma GCC unroll 1
        for (int l = 0; l < group; l += 4, p += 4 * w->stride) awq_four(p, w->stride, far, words, T, q[0] + l, dot);
        for (int t = 0; t < T; t++) {
            const __m512 d = _mm512_set1_ps(a[t].d[c / 32]);
            for (int s = 0; s < AWQ_SUMS; s++)
                sum[t][s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][s]), _mm512_mul_ps(scale[s], d), sum[t][s]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int s = 0; s < AWQ_SUMS; s++) {
            float of[16];
            _mm512_storeu_ps(of, sum[t][s]);
            for (int i = 0; i < 16; i++)
                if (awq_row(s, i) < rows) out[t * ldc + awq_row(s, i)] = of[i];
        }
}

static void dot_awq4(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,
                     size_t ahead, float *out, int64_t ldc) {
    for (; tokens > 0; tokens -= AWQ_TOKENS, a += AWQ_TOKENS, out += AWQ_TOKENS * ldc) {
        if (w->group == 16)
            for (int i = 0; i < tokens && i < AWQ_TOKENS; i++)
                awq_dot(w, first, rows, a + i, 1, ahead, out + i * ldc, ldc, 16);
        else if (tokens == 1) awq_dot(w, first, rows, a, 1, ahead, out, ldc, 32);
        else awq_dot(w, first, rows, a, 2, ahead, out, ldc, 32);
    }
}

/* ---- GPTQ -------------------------------------------------------------------------------------------- */

#define COLUMNS_DOT(name, bits)                                                                                    \
    static void dot_##name(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens, \
                           size_t ahead, float *out, int64_t ldc) {                                                \
        if (w->group == 16) {                                                                                      \
            for (int i = 0; i < tokens; i++)                                                                       \
                columns_dot(w, first, rows, a + i, 1, ahead, out + i * ldc, ldc, bits, 16);                        \
            return;                                                                                                \
        }                                                                                                          \
        switch (tokens) {                                                                                          \
        case 1: columns_dot(w, first, rows, a, 1, ahead, out, ldc, bits, 32); break;                               \
        case 2: columns_dot(w, first, rows, a, 2, ahead, out, ldc, bits, 32); break;                               \
        case 3: columns_dot(w, first, rows, a, 3, ahead, out, ldc, bits, 32); break;                               \
        default: columns_dot(w, first, rows, a, 4, ahead, out, ldc, bits, 32);                                     \
        }                                                                                                          \
    }

COLUMNS_DOT(gptq4, 4)
#ifdef __AVX512VNNI__ /* without, codes above 127 do not fit dot4 */
COLUMNS_DOT(gptq8, 8)
#endif

static void fill_dot_columns(struct kt_kernels *k) {
    DOT_FILL(k, GPTQ4, gptq4);
    DOT_FILL(k, AWQ4, awq4);
#ifdef __AVX512VNNI__
    DOT_FILL(k, GPTQ8, gptq8);
#endif
}

#endif
