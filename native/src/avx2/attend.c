/* Attention for AVX2: sixteen registers hold eight sums, two vectors of keys or values, and what they meet. */
#include "dot_vec.h"

enum { SCORE_TOKENS = 2, SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_VECTORS = 2 };

INLINE vfloat v_signed8(const uint8_t *p) { return signed8(_mm_loadl_epi64((const __m128i_u *)p)); }
INLINE void v_store_f32(float *p, vfloat v) { _mm256_storeu_ps(p, v); }
INLINE vfloat v_sub(vfloat a, vfloat b) { return _mm256_sub_ps(a, b); }
INLINE vfloat v_most(vfloat a, vfloat b) { return _mm256_max_ps(a, b); } /* b where either is a NaN */
INLINE float v_largest(vfloat v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

/* p * 2^n; t is n + 1.5 * 2^23. */
INLINE vfloat v_times_power(vfloat p, vfloat t) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(0x4b400000 - 127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23)));
}
INLINE vfloat v_unless_below(vfloat x, float low, vfloat y) { /* or 0 */
    return _mm256_and_ps(_mm256_cmp_ps(x, v_floats(low), _CMP_NLT_UQ), y);
}
INLINE void v_pair_line(const uint8_t *first, const uint8_t *second, uint32_t *line) {
    for (int i = 0; i < KT_TILE; i += 8) {
        const __m128i a = load128(first + 2 * i), b = load128(second + 2 * i);
        v_store(line + i, _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b)));
    }
}

#include "../templates/attend_rows.h"

void kt_fill_attend_avx2(struct kt_kernels *k) { fill_attend_rows(k); }
