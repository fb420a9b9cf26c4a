/* Decode of floats for AVX2, one row after the other: see ../dot_rows.h for why. */
#include "dot_vec.h"
#include "../templates/dot_float.h"
#include "../templates/dot_f8.h"

/* The last columns of a row, fewer than a vector of floats. */
#define REST(name, size)                                                             \
    INLINE vfloat name##_rest(vfloat acc, const uint8_t *p, const float *x, int n) { \
        uint8_t w[EACH * size] = {0};                                                \
        float v[EACH] = {0};                                                         \
        memcpy(w, p, (size_t)(n * size));                                            \
        memcpy(v, x, (size_t)n * sizeof *x);                                         \
        return v_fma(v_load_##name(w), v_load_f32(v), acc);                          \
    }                                                                                \
    FLOATS(name, size)
REST(f32, 4)
REST(f16, 2)
REST(bf16, 2)

void kt_fill_dot_float_avx2(struct kt_kernels *k) {
    FILL_FLOATS(k);
    k->dot[KT_FMT_F8_E4M3] = dot_f8;
}
