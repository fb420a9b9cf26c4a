/* Attention for AVX2: sixteen registers hold eight sums, two vectors of keys or values, and what they meet. */
#include "dot_vec.h"

enum { SCORE_TOKENS = 2, SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_VECTORS = 2 };

INLINE vfloat v_signed8(const uint8_t *p) { return signed8(_mm_loadl_epi64((const __m128i_u *)p)); }
INLINE void v_store_f32(float *p, vfloat v) { _mm256_storeu_ps(p, v); }

#include "../templates/attend_rows.h"

void kt_fill_attend_avx2(struct kt_kernels *k) { fill_attend_rows(k); }
