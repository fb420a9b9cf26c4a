/* Decode of floats for NEON, one row after the other: see ../dot_rows.h for why. Quantized formats decode through
 * tiles. */
#include "common.h"

enum { VECTOR = 16, DOT_TOKENS = 4 };
typedef float32x4_t vfloat;

#define PREFETCH(p, ahead) __builtin_prefetch((const void *)((uintptr_t)(p) + (ahead)))

INLINE vfloat v_zero(void) { return vdupq_n_f32(0); }
INLINE vfloat v_add(vfloat a, vfloat b) { return vaddq_f32(a, b); }
INLINE vfloat v_fma(vfloat a, vfloat b, vfloat c) { return vfmaq_f32(c, a, b); }
INLINE float v_sum(vfloat v) { return vaddvq_f32(v); }
INLINE vfloat v_load_f32(const void *p) { return load_f32(p); }
INLINE vfloat v_load_f16(const void *p) { return load_f16(p); }
INLINE vfloat v_load_bf16(const void *p) { return load_bf16(p); }

#include "../templates/dot_float.h"

/* The last columns of a row, fewer than a vector of floats. */
#define REST(name, size, value)                                                      \
    INLINE vfloat name##_rest(vfloat acc, const uint8_t *p, const float *x, int n) { \
        float w[4] = {0}, v[4] = {0};                                                \
        for (int i = 0; i < n; i++) {                                                \
            w[i] = value(p + size * i);                                              \
            v[i] = x[i];                                                             \
        }                                                                            \
        return v_fma(vld1q_f32(w), vld1q_f32(v), acc);                               \
    }                                                                                \
    FLOATS(name, size)

INLINE float bf16_at(const void *p) { return kt_bf16_to_f32(kt_load16(p)); }
REST(f32, 4, kt_load_f32)
REST(f16, 2, kt_load_f16)
REST(bf16, 2, bf16_at)

void kt_fill_dot_neon_dotprod(struct kt_kernels *k) { FILL_FLOATS(k); }
