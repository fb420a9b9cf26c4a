/* Decode of floats for AVX-512, one row after the other: see ../dot_rows.h for why. */
#include "dot_vec.h"
#include "../templates/dot_float.h"
#include "../templates/dot_f8.h"

/* The last columns of a row, fewer than a vector of floats. */
#define REST(name, size, load)                                                                    \
    INLINE vfloat name##_rest(vfloat acc, const uint8_t *p, const float *x, int n) {              \
        const __mmask16 m = (__mmask16)((1u << n) - 1);                                           \
        return _mm512_fmadd_ps(load(m, p), _mm512_maskz_loadu_ps(m, x), acc);                     \
    }                                                                                             \
    FLOATS(name, size)
REST(f32, 4, _mm512_maskz_loadu_ps)
REST(f16, 2, load_f16_mask)
REST(bf16, 2, load_bf16_mask)

void kt_fill_dot_float_avx512(struct kt_kernels *k) {
    FILL_FLOATS(k);
    k->dot[KT_FMT_F8_E4M3] = dot_f8;
}
