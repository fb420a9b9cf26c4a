/* templates/dot_float.h: decode of plain floats, compiled for AVX2, AVX-512 and NEON alike: the includer brings
 * dot_vec.h, and of each plain format what to do with the last columns. One row after the other: see dot_rows.h. */
#ifndef KT_DOT_FLOAT_IMPL_H
#define KT_DOT_FLOAT_IMPL_H

#include "dot_tokens.h"

enum { EACH = VECTOR / 4 }; /* floats of a vector */

/* Four chains a token hide the latency of the multiply-add. */
#define FLOATS(name, size)                                                                                           \
    INLINE void name##_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, \
                            size_t ahead, float *out, int64_t ldc) {                                                 \
        for (int r = 0; r < rows; r++) {                                                                             \
            const uint8_t *p = m->data + (size_t)(first + r) * m->stride;                                            \
            vfloat s[DOT_TOKENS][4];                                                                                 \
            int64_t c = 0;                                                                                           \
            for (int t = 0; t < T; t++) s[t][0] = s[t][1] = s[t][2] = s[t][3] = v_zero();                            \
            for (; c + 4 * EACH <= m->cols; c += 4 * EACH, p += 4 * EACH * size) {                                   \
                for (int i = 0; i < 4 * EACH * size; i += 64) PREFETCH(p + i, ahead);                                \
                for (int i = 0; i < 4; i++) {                                                                        \
                    const vfloat w = v_load_##name(p + i * EACH * size);                                             \
                    for (int t = 0; t < T; t++) s[t][i] = v_fma(w, v_load_f32(a[t].f + c + i * EACH), s[t][i]);      \
                }                                                                                                    \
            }                                                                                                        \
            for (; c + EACH <= m->cols; c += EACH, p += EACH * size)                                                 \
                for (int t = 0; t < T; t++) s[t][0] = v_fma(v_load_##name(p), v_load_f32(a[t].f + c), s[t][0]);      \
            for (int t = 0; t < T; t++) {                                                                            \
                if (c < m->cols) s[t][0] = name##_rest(s[t][0], p, a[t].f + c, (int)(m->cols - c));                  \
                out[t * ldc + r] = v_sum(v_add(v_add(s[t][0], s[t][1]), v_add(s[t][2], s[t][3])));                   \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DOT_FOR_TOKENS(name)

#define FILL_FLOATS(k) \
    ((k)->dot[KT_FMT_F32] = dot_f32, (k)->dot[KT_FMT_F16] = dot_f16, (k)->dot[KT_FMT_BF16] = dot_bf16)

#endif
