/* dot_columns_impl.h: decode of types whose memory runs along rows (GPTQ), for AVX-512: sixteen rows a vector, so that a
 * line's dword of each row meets a broadcast dword of activations and neither codes nor scales are transposed. */
#ifndef KT_DOT_COLUMNS_IMPL_H
#define KT_DOT_COLUMNS_IMPL_H

#include "dot_scales.h"

enum { COLUMN_VECTORS = KT_DOT_ROWS / 16, LINES_AHEAD = 32 }; /* 32 lines of 64 dwords are 8 KiB, as far as rows fetch */

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
        s = w->scale_type == KT_SCALE_E8M0 ? two_float8s(e8m0_8(bytes), e8m0_8(bytes + 8)) : two_float8s(e4m3_8(bytes), e4m3_8(bytes + 8));
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

/* Activations of a group in the order in which a line's dwords hold their columns: of 4 bits, first the even ones of 8. */
INLINE void column_acts(const int8_t *q, const int bits, const int group, int8_t *out) {
    const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int i = 0; i < group; i += 16) {
        __m128i v = load128(q + i);
        _mm_store_si128((__m128i *)(out + i), bits == 4 ? _mm_shuffle_epi8(v, even_odd) : v);
    }
}

INLINE __m512i four_acts(const int8_t *q) { return _mm512_set1_epi32((int)kt_load32(q)); }

INLINE void columns_dot(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, const int tokens, size_t ahead,
                        float *out, int64_t ldc, const int bits, const int group) {
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
                sum[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), _mm512_mul_ps(scale[v], _mm512_set1_ps(a[i].d[c / 32])), sum[i][v]);
        }
        if (same == 0) line++, same = w->scale_cols;
    }
    for (int i = 0; i < tokens; i++)
        for (int v = 0; v < vectors; v++) {
            const __mmask16 m = (__mmask16)(rows - 16 * v >= 16 ? 0xffff : (1 << (rows - 16 * v)) - 1);
            _mm512_mask_storeu_ps(out + i * ldc + 16 * v, m, sum[i][v]);
        }
}

#define COLUMNS_DOT(name, bits)                                                                                            \
    static void dot_##name(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,         \
                           size_t ahead, float *out, int64_t ldc) {                                                        \
        if (w->group == 16) {                                                                                              \
            for (int i = 0; i < tokens; i++) columns_dot(w, first, rows, a + i, 1, ahead, out + i * ldc, ldc, bits, 16);   \
            return;                                                                                                        \
        }                                                                                                                  \
        switch (tokens) {                                                                                                  \
        case 1: columns_dot(w, first, rows, a, 1, ahead, out, ldc, bits, 32); break;                                       \
        case 2: columns_dot(w, first, rows, a, 2, ahead, out, ldc, bits, 32); break;                                       \
        case 3: columns_dot(w, first, rows, a, 3, ahead, out, ldc, bits, 32); break;                                       \
        default: columns_dot(w, first, rows, a, 4, ahead, out, ldc, bits, 32);                                             \
        }                                                                                                                  \
    }

COLUMNS_DOT(gptq4, 4)
#ifdef __AVX512VNNI__ /* without, codes above 127 do not fit dot4 */
COLUMNS_DOT(gptq8, 8)
#endif

static void fill_dot_columns(struct kt_kernels *k) {
    k->dot[KT_FMT_GPTQ4] = dot_gptq4;
#ifdef __AVX512VNNI__
    k->dot[KT_FMT_GPTQ8] = dot_gptq8;
#endif
}

#endif
