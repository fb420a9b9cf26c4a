/* templates/dot_scales.h: the scales of a row of a matrix with separate scales, as fp32, one for each 32 or 16 columns:
 * what a decode kernel multiplies without asking how the checkpoint stores them. */
#ifndef KT_DOT_SCALES_H
#define KT_DOT_SCALES_H

#include "../../include/kt_native.h"

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

/* Which scales some columns of a row meet, worked out once for all rows: divisions cost more than the scales. */
struct scales {
    const struct kt_matrix *m;
    int64_t from, count;       /* scales of a line */
    int64_t groups, up_to;     /* of columns; zeros follow up to 256 columns, and at least 8 */
    int64_t each;              /* groups that share a scale, 0: not the same number throughout */
    int64_t first;             /* column */
    int group;
    float factor;
    int64_t left;              /* rows that meet the scales at hand */
};

/* Columns c .. c + n, in groups of `group`; c is a multiple of 256. Scales are multiplied by m->scale and by
 * `factor`. */
SHARED struct scales scales_of_columns(const struct kt_matrix *m, int64_t c, int64_t n, const int group, float factor) {
    struct scales s = {
        .m = m, .from = c / m->scale_cols, .groups = (n + group - 1) / group, .first = c, .group = group};
    s.count = (c + n - 1) / m->scale_cols + 1 - s.from;
    s.up_to = s.groups + 8 > 256 / group ? s.groups + 8 : 256 / group;
    s.each = s.count == 1 ? s.groups : m->scale_cols % group ? 0 : m->scale_cols / group;
    if (s.each > 8 ? s.each % 8 != 0 && s.count > 1 : s.each && 8 % s.each != 0) s.each = 0;
    s.factor = m->scale * factor;
    return s;
}

/* out[i] = scale from + i of a line. */
INLINE void load_line(const struct scales *s, int64_t line, float *out) {
    const uint8_t *p = s->m->scales + (size_t)line * s->m->scale_stride;
    const __m256 factor = _mm256_set1_ps(s->factor);
    const size_t ahead = KT_SCALES_AHEAD * s->m->scale_stride;
    int64_t i = 0;
    PREFETCH(p, ahead);
    for (size_t b = 64; b < s->m->scale_stride; b += 64) PREFETCH(p + b, ahead);
    for (; i + 8 <= s->count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_mul_ps(scales_at(s->m->scale_type, p, s->from + i), factor));
    for (; i < s->count; i++) out[i] = scale_at(s->m->scale_type, p, s->from + i) * s->factor;
}

/* out[g] = the scale of group g, from a line; may write up to 7 more. */
INLINE void spread_line(const struct scales *s, const float *line, float *out) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    if (s->each == 0) {
        for (int64_t g = 0; g < s->groups; g++) out[g] = line[(s->first + g * s->group) / s->m->scale_cols - s->from];
    } else if (s->each >= 8) {
        for (int64_t g = 0; g < s->groups; line++)
            for (const int64_t end = s->count == 1 ? s->groups : g + s->each; g < end; g += 8)
                _mm256_storeu_ps(out + g, _mm256_set1_ps(*line));
    } else { /* 2 or 4 */
        const __m256i at = _mm256_srlv_epi32(lane, _mm256_set1_epi32(s->each == 2 ? 1 : 2));
        const int64_t step = s->each == 2 ? 4 : 2;
        for (int64_t g = 0; g < s->groups; g += 8, line += step)
            _mm256_storeu_ps(out + g, _mm256_permutevar8x32_ps(_mm256_loadu_ps(line), at));
    }
}

/* The scales of a row, unless they are those of the row before. out and line have room for up_to groups and 16 more. */
SHARED void scales_of_row(struct scales *s, int64_t row, float *line, float *out) {
    if (s->left-- > 0) return;
    const int64_t rows = s->m->scale_rows, at = rows == 1 ? row : row / rows;
    s->left = rows == 1 ? 0 : rows - row % rows - 1;
    if (s->each == 1) {
        load_line(s, at, out);
    } else {
        load_line(s, at, line);
        spread_line(s, line, out);
    }
    for (int64_t g = s->groups; g < s->up_to; g++) out[g] = 0.0f;
}

/* out[g] = scale * (zero point - of) of group g: what packed zero points of `bits` bits take away from a row beyond
 * `of`. scale: of the row, as scales_of_row left them in its `out` (each is 1) or `line`. own: room for a line. */
SHARED void minus_of_row(const struct scales *s, int64_t row, const int bits, const int of, const float *scale,
                         float *own, float *out) {
    const struct kt_matrix *m = s->m;
    const uint8_t *p = m->zeros + (size_t)(row / (32 / bits)) * m->zero_stride + 4 * s->from;
    const uint32_t shift = (uint32_t)(row % (32 / bits) * bits), mask = (1u << bits) - 1;
    const int less = m->zero_bias - of;
    float *to = s->each == 1 ? out : own;
    for (int64_t i = 0; i < s->count; i++)
        to[i] = scale[i] * (float)((int)(kt_load32(p + 4 * i) >> shift & mask) + less);
    if (s->each != 1) spread_line(s, own, out);
    for (int64_t g = s->groups; g < s->up_to; g++) out[g] = 0.0f;
}

#endif
