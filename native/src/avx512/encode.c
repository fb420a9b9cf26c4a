/* Encoding (encode.h) in vectors of 64 bytes: the sixteen groups at once. */
#include <immintrin.h>
#include <stdint.h>

#define V_BYTES 64
typedef float v_f __attribute__((vector_size(V_BYTES)));
typedef int32_t v_i __attribute__((vector_size(V_BYTES)));

static inline v_f v_if_less(v_f p, v_f q, v_f a, v_f b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(p, q, _CMP_LT_OQ), b, a);
}
static inline v_f v_min(v_f a, v_f b) { return _mm512_min_ps(a, b); }
static inline v_f v_max(v_f a, v_f b) { return _mm512_max_ps(a, b); }

#include "../templates/encode.h"

void kt_fill_encode_avx512(struct kt_kernels *k) { fill_encode(k); }
