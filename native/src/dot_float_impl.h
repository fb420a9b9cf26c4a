/* dot_float_impl.h: decode of plain floats, compiled for AVX2, AVX-512 and NEON alike: the includer brings dot_vec.h, and of each plain
 * format what to do with the last columns. One row after the other: see dot_rows.h. */
#ifndef KT_DOT_FLOAT_IMPL_H
#define KT_DOT_FLOAT_IMPL_H

enum { EACH = VECTOR / 4 }; /* floats of a vector */

/* Four chains hide the latency of the multiply-add. */
#define FLOATS(name, size)                                                                                           \
    static void one_##name(const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, size_t ahead, float *out) { \
        for (int r = 0; r < rows; r++) {                                                                             \
            const uint8_t *p = m->data + (size_t)(first + r) * m->stride;                                            \
            vfloat s[4] = {v_zero(), v_zero(), v_zero(), v_zero()};                                                  \
            int64_t c = 0;                                                                                           \
            for (; c + 4 * EACH <= m->cols; c += 4 * EACH, p += 4 * EACH * size) {                             \
                for (int i = 0; i < 4 * EACH * size; i += 64) PREFETCH(p + i, ahead);                           \
                for (int i = 0; i < 4; i++)                                                                          \
                    s[i] = v_fma(v_load_##name(p + i * EACH * size), v_load_f32(a->f + c + i * EACH), s[i]);     \
            }                                                                                                        \
            for (; c + EACH <= m->cols; c += EACH, p += EACH * size)                                           \
                s[0] = v_fma(v_load_##name(p), v_load_f32(a->f + c), s[0]);                                          \
            if (c < m->cols) s[0] = name##_rest(s[0], p, a->f + c, (int)(m->cols - c));                              \
            out[r] = v_sum(v_add(v_add(s[0], s[1]), v_add(s[2], s[3])));                                             \
        }                                                                                                            \
    }                                                                                                                          \
    KT_DOT_EACH(name)

#define FILL_FLOATS(k) ((k)->dot[KT_FMT_F32] = dot_f32, (k)->dot[KT_FMT_F16] = dot_f16, (k)->dot[KT_FMT_BF16] = dot_bf16)

#endif
