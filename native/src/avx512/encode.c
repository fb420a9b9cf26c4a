/* Encoding (encode.h) in vectors of 64 bytes: the sixteen groups at once. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include <immintrin.h>
#include <stdint.h>

#include "../avx2/transpose4.h"

#define V_BYTES 64
typedef float v_f __attribute__((vector_size(V_BYTES)));
typedef int32_t v_i __attribute__((vector_size(V_BYTES)));
typedef int16_t v_s __attribute__((vector_size(V_BYTES)));

static inline v_f v_if_less(v_f p, v_f q, v_f a, v_f b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(p, q, _CMP_LT_OQ), b, a);
}
static inline v_f v_min(v_f a, v_f b) { return _mm512_min_ps(a, b); }
static inline v_f v_max(v_f a, v_f b) { return _mm512_max_ps(a, b); }

static inline v_s v_scaled(v_s a, v_s b) { return (v_s)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
static inline v_s v_least(v_s a, v_s b) { return (v_s)_mm512_min_epi16((__m512i)a, (__m512i)b); }
static inline v_s v_most(v_s a, v_s b) { return (v_s)_mm512_max_epi16((__m512i)a, (__m512i)b); }
static inline v_s v_above(v_s a, v_s b) { return (v_s)_mm512_subs_epu16((__m512i)a, (__m512i)b); }
static inline v_i v_add_pairs(v_i sum, v_s a, v_s b) {
#ifdef __AVX512VNNI__
    return (v_i)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return sum + (v_i)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

/* Bytes of a table by indices 0 .. 31. */
static inline v_s v_lookup(const uint8_t *table, v_s index) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)table));
    return (v_s)_mm512_permutexvar_epi16((__m512i)index, words);
}

#include "../templates/encode.h"

void KT_JOIN(kt_fill_encode_, KT_ISA)(struct kt_kernels *k) { fill_encode(k); }
