/* Attention for AVX-512: thirty-two registers hold sixteen sums, four vectors of keys or values, and what they meet. */
#include "dot_vec.h"

enum { SCORE_TOKENS = 4, SCORE_ROWS = 4, VALUE_ROWS = 4, VALUE_VECTORS = 4 };

INLINE vfloat v_signed8(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p))); }
INLINE void v_store_f32(float *p, vfloat v) { _mm512_storeu_ps(p, v); }

#include "../templates/attend_rows.h"

void kt_fill_attend_avx512(struct kt_kernels *k) { fill_attend_rows(k); }
