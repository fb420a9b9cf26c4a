/* dot_scales.h: the scales of a row of a matrix that has them beside its codes, as fp32, one for each 32 or 16 columns:
 * what a decode kernel multiplies without asking how the checkpoint stores them. */
#ifndef KT_DOT_SCALES_H
#define KT_DOT_SCALES_H

#include "../include/kt_native.h"

INLINE float scale_at(int type, const uint8_t *p, int64_t i) {
    switch (type) {
    case KT_SCALE_F32: return kt_load_f32(p + 4 * i);
    case KT_SCALE_F16: return kt_load_f16(p + 2 * i);
    case KT_SCALE_BF16: return kt_bf16_to_f32(kt_load16(p + 2 * i));
    case KT_SCALE_E8M0: return kt_e8m0_to_f32(p[i]);
    default: return kt_e4m3_to_f32(p[i]);
    }
}

INLINE __m256i bytes8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i_u *)p)); }

/* As kt_e8m0_to_f32: code 0 is subnormal, 255 is NaN. */
INLINE __m256 e8m0_8(const uint8_t *p) {
    const __m256i e = bytes8(p), bits = _mm256_max_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, nan));
}

/* As kt_e4m3_to_f32, by way of fp16, in which the same bits mean 2^-8 of it. */
INLINE __m256 e4m3_8(const uint8_t *p) {
    const __m128i v = _mm_loadl_epi64((const __m128i_u *)p), low = _mm_and_si128(v, _mm_set1_epi8(127));
    const __m128i nan = _mm_cmpeq_epi8(low, _mm_set1_epi8(127));
    __m128i half = _mm_srai_epi16(_mm_unpacklo_epi8(_mm_setzero_si128(), v), 1);
    half = _mm_or_si128(_mm_and_si128(half, _mm_set1_epi16((short)0xbf80)), _mm_unpacklo_epi8(nan, nan));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

INLINE __m256 scales_at(int type, const uint8_t *p, int64_t i) {
    switch (type) {
    case KT_SCALE_F32: return _mm256_loadu_ps((const float *)(const void *)(p + 4 * i));
    case KT_SCALE_F16: return _mm256_cvtph_ps(load128(p + 2 * i));
    case KT_SCALE_BF16: return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 2 * i)), 16));
    case KT_SCALE_E8M0: return e8m0_8(p + i);
    default: return e4m3_8(p + i);
    }
}

/* out[i] = scale from + i of a line times m->scale, i < n; may write up to 7 more. */
static void load_line(const struct kt_matrix *m, int64_t line, int64_t from, int64_t n, float *out) {
    const uint8_t *p = m->scales + (size_t)line * m->scale_stride;
    const __m256 all = _mm256_set1_ps(m->scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(scales_at(m->scale_type, p, from + i), all));
    for (; i < n; i++) out[i] = scale_at(m->scale_type, p, from + i) * m->scale;
}

/* out[g] = the scale of columns c + g * group .. of a row, as many groups as n columns have. out has room for 16 more,
 * and `line` for n / 16 + 16. c is a multiple of 256. */
static void row_scales(const struct kt_matrix *m, int64_t row, int64_t c, int64_t n, const int group, float *line, float *out) {
    const int64_t each = m->scale_cols, from = c / each, count = (c + n - 1) / each + 1 - from, groups = (n + group - 1) / group;
    const int64_t times = each / group; /* groups that share a scale */
    for (int64_t g = groups; g * group < 256; g++) out[g] = 0.0f; /* rows narrower than a window */
    if (each == group) {
        load_line(m, row / m->scale_rows, from, count, out);
        return;
    }
    load_line(m, row / m->scale_rows, from, count, line);
    if (count == 1) {
        for (int64_t g = 0; g < groups; g += 8) _mm256_storeu_ps(out + g, _mm256_set1_ps(line[0]));
    } else if (each % group == 0 && times % 8 == 0) {
        for (int64_t g = 0; g < groups; g += 8) _mm256_storeu_ps(out + g, _mm256_set1_ps(line[(c + g * group) / each - from]));
    } else if (each % group == 0 && 8 % times == 0) { /* times is 2 or 4, and c a multiple of each */
        const __m256i at = _mm256_srlv_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(times == 2 ? 1 : 2));
        for (int64_t g = 0; g < groups; g += 8)
            _mm256_storeu_ps(out + g, _mm256_permutevar8x32_ps(_mm256_loadu_ps(line + g / times), at));
    } else {
        for (int64_t g = 0; g < groups; g++) out[g] = line[(c + g * group) / each - from];
    }
}

#endif
