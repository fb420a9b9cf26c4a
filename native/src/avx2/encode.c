/* Encoding (encode.h) in vectors of 32 bytes. */
#include <immintrin.h>
#include <stdint.h>

#define V_BYTES 32
typedef float v_f __attribute__((vector_size(V_BYTES)));
typedef int32_t v_i __attribute__((vector_size(V_BYTES)));

static inline v_f v_if_less(v_f p, v_f q, v_f a, v_f b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(p, q, _CMP_LT_OQ));
}
static inline v_f v_min(v_f a, v_f b) { return _mm256_min_ps(a, b); }
static inline v_f v_max(v_f a, v_f b) { return _mm256_max_ps(a, b); }

#include "../templates/encode.h"

void kt_fill_encode_avx2(struct kt_kernels *k) { fill_encode(k); }
