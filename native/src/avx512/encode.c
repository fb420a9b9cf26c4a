/* Encoding (encode.h) in vectors of 64 bytes: the sixteen groups at once. */
#include <immintrin.h>
#include <stdint.h>

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
static inline v_i v_pairs(v_s a, v_s b) { return (v_i)_mm512_madd_epi16((__m512i)a, (__m512i)b); }

/* Bytes of a table by indices 0 .. 31. */
static inline v_s v_lookup(const uint8_t *table, v_s index) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)table));
    return (v_s)_mm512_permutexvar_epi16((__m512i)index, words);
}

/* 4x4 numbers of 32 bits, rows becoming columns; `from` and `to` are 4 bytes each from row to row. */
static inline void transpose4(const void *in, int from, void *out, int to) {
    const float *p = in;
    float *q = out;
    __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + from), c = _mm_loadu_ps(p + 2 * from), d = _mm_loadu_ps(p + 3 * from);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(q, a);
    _mm_storeu_ps(q + to, b);
    _mm_storeu_ps(q + 2 * to, c);
    _mm_storeu_ps(q + 3 * to, d);
}

#include "../templates/encode.h"

void kt_fill_encode_avx512(struct kt_kernels *k) { fill_encode(k); }
