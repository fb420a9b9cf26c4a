/* Attention for AVX-512: thirty-two registers hold sixteen sums, four vectors of keys or values, and what they meet. */
#include "dot_vec.h"

enum { SCORE_TOKENS = 4, SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_VECTORS = 4 };

INLINE vfloat v_signed8(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p))); }
INLINE void v_store_f32(float *p, vfloat v) { _mm512_storeu_ps(p, v); }
INLINE vfloat v_sub(vfloat a, vfloat b) { return _mm512_sub_ps(a, b); }
INLINE vfloat v_most(vfloat a, vfloat b) { return _mm512_max_ps(a, b); } /* b where either is a NaN */
INLINE float v_largest(vfloat v) { return _mm512_reduce_max_ps(v); }

/* p * 2^n; t is n + 1.5 * 2^23. */
INLINE vfloat v_times_power(vfloat p, vfloat t) {
    const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(0x4b400000 - 127));
    return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(n, 23)));
}
INLINE vfloat v_unless_below(vfloat x, float low, vfloat y) { /* or 0 */
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, v_floats(low), _CMP_NLT_UQ), y);
}
INLINE void v_pair_line(const uint8_t *first, const uint8_t *second, uint32_t *line) {
    const __m512i a = _mm512_cvtepu16_epi32(load256(first)), b = _mm512_cvtepu16_epi32(load256(second));
    _mm512_storeu_si512(line, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

#include "../templates/attend_rows.h"

void kt_fill_attend_avx512(struct kt_kernels *k) { fill_attend_rows(k); }
