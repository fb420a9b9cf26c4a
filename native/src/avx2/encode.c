/* Encoding (encode.h) in vectors of 32 bytes. */
#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include <immintrin.h>
#include <stdint.h>

#include "transpose4.h"

#define V_BYTES 32
typedef float v_f __attribute__((vector_size(V_BYTES)));
typedef int32_t v_i __attribute__((vector_size(V_BYTES)));
typedef int16_t v_s __attribute__((vector_size(V_BYTES)));

static inline v_f v_if_less(v_f p, v_f q, v_f a, v_f b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(p, q, _CMP_LT_OQ));
}
static inline v_f v_min(v_f a, v_f b) { return _mm256_min_ps(a, b); }
static inline v_f v_max(v_f a, v_f b) { return _mm256_max_ps(a, b); }

static inline v_s v_scaled(v_s a, v_s b) { return (v_s)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
static inline v_s v_least(v_s a, v_s b) { return (v_s)_mm256_min_epi16((__m256i)a, (__m256i)b); }
static inline v_s v_most(v_s a, v_s b) { return (v_s)_mm256_max_epi16((__m256i)a, (__m256i)b); }
static inline v_s v_above(v_s a, v_s b) { return (v_s)_mm256_subs_epu16((__m256i)a, (__m256i)b); }
static inline v_i v_add_pairs(v_i sum, v_s a, v_s b) {
#ifdef __AVXVNNI__
    return (v_i)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    return sum + (v_i)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

/* Bytes of a table by indices 0 .. 31. A shuffle takes 16 of them, and gives 0 where an index has its highest bit. */
static inline v_s v_lookup(const uint8_t *table, v_s index) {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16)));
    const __m256i i = _mm256_or_si256((__m256i)index, _mm256_set1_epi16((short)0xff00));
    return (v_s)_mm256_or_si256(_mm256_shuffle_epi8(low, _mm256_adds_epu8(i, _mm256_set1_epi8(0x70))),
                                _mm256_shuffle_epi8(high, _mm256_sub_epi8(i, _mm256_set1_epi8(16))));
}

#include "../templates/encode.h"

void KT_JOIN(kt_fill_encode_, KT_ISA)(struct kt_kernels *k) { fill_encode(k); }
