/* dot_beside_impl.h: decode of types whose scales lie beside their codes, compiled for AVX2 and AVX-512 alike: the
 * includer brings dot_vec.h. Packed zero points decode through tiles, and so do GPTQ and AWQ, which have no rows in memory. */
#include "dot_rows.h"
#include "dot_scales.h"

enum { ROW_SCALES = CHUNK / 16 + 32 };

/* codes(p, &low, &high): of two vectors of a chain. s: the row's scales. */
#define CHAIN(name, group, zero)                                                                                        \
    INLINE struct sums name##_row(const uint8_t *w, size_t ahead, const struct ready *a, const float *s) {              \
        struct sums t = no_sums();                                                                                      \
        EACH_WINDOW(a, w, WINDOW / 2) {                                                                          \
            const float *scale = s + (x == at ? a->last / group : (x - a->window) * (WINDOW / group));                                                         \
            fetch(p, ahead, WINDOW / 2);                                                                                \
            if (group == 32) {                                                                                          \
                const __m256 both = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_loadu_ps(x->d));              \
                CHAIN_SUMS(name, zero, scales_of(EVENS, both, i))                                                       \
            } else {                                                                                                    \
                const float16s both = f16s_mul(f16s_load(scale), f16s_load(x->d));                             \
                CHAIN_SUMS(name, zero, scales16_of(EVENS, both, i))                                                     \
            }                                                                                                           \
        }                                                                                                               \
        return t;                                                                                                       \
    }

#define CHAIN_SUMS(name, zero, scale)                                                                               \
    for (int i = 0; i < VECTORS / 2; i++) {                                                                         \
        const vint v = v_once(v_load(p + i * VECTOR)), low = name##_codes(v_low4(v)), high = name##_codes(v_high4(v)); \
        vint sum = v_dot_two(start_of(x, i, zero), low, v_load(x->q + (2 * i) * VECTOR), high, v_load(x->q + (2 * i + 1) * VECTOR));   \
        t.s[i % 2] = v_scaled(t.s[i % 2], sum, scale);                                                              \
    }

/* A code a byte. */
#define BYTES(name, group, zero)                                                                                       \
    INLINE struct sums name##_row(const uint8_t *w, size_t ahead, const struct ready *a, const float *s) {             \
        struct sums t = no_sums();                                                                                     \
        EACH_WINDOW(a, w, WINDOW) {                                                                         \
            const float *scale = s + (x == at ? a->last / group : (x - a->window) * (WINDOW / group));                                                        \
            fetch(p, ahead, WINDOW);                                                                                   \
            if (group == 32) {                                                                                         \
                const __m256 both = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_loadu_ps(x->d));             \
                BYTES_SUMS(name, zero, scales_of(IN_ORDER, both, v))                                                   \
            } else {                                                                                                   \
                const float16s both = f16s_mul(f16s_load(scale), f16s_load(x->d));                            \
                BYTES_SUMS(name, zero, scales16_of(IN_ORDER, both, v))                                                 \
            }                                                                                                          \
        }                                                                                                              \
        return t;                                                                                                      \
    }

#define BYTES_SUMS(name, zero, scale)                                                                                \
    for (int v = 0; v < VECTORS; v++) {                                                                              \
        vint sum = v_dot_wide(start_of(x, v, zero), name##_codes(v_load(p + v * VECTOR)), v_load(x->q + (v) * VECTOR));      \
        t.s[v % 2] = v_scaled(t.s[v % 2], sum, scale);                                                               \
    }

INLINE vint i4_codes(vint v) { return v; }
INLINE vint f4_codes(vint v) { return v_look_up(kt_fp4_codes, v); }
INLINE vint i8_codes(vint v) { return v_wide_signed(v); }
INLINE vint u8_codes(vint v) { return v_wide_unsigned(v); }

/* The dot kernel of a type; bytes: of 256 columns. The last window of a chunk may start before it, but not before the
 * first column of a row, so that scales are read from 256 columns before the chunk on. */
#define BESIDE_DOT(name, order, group, zero, bytes)                                                                      \
    static void one_##name##_##group(const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, size_t ahead, float *out) { \
        struct ready x;                                                                                                  \
        vfloat sum[KT_DOT_ROWS];                                                                                         \
        float line[ROW_SCALES], scales[ROW_SCALES];                                                                      \
        for (int64_t c = 0; c < m->cols; c += CHUNK) {                                                                   \
            const int64_t n = m->cols - c < CHUNK ? m->cols - c : CHUNK, before = c ? WINDOW : 0;                        \
            struct scales at = scales_of_columns(m, c - before, n + before, group, 1.0f);                                \
            make_ready(&x, order, zero, group, a, c, n);                                                                 \
            for (int r = 0; r < rows; r++) {                                                                             \
                const uint8_t *p = m->data + (size_t)(first + r) * m->stride + offset_of(c, bytes);                      \
                uint8_t padded[(bytes) + 64];                                                                            \
                if (m->cols < WINDOW) p = pad(padded, sizeof padded, p, (size_t)offset_of(m->cols, bytes));              \
                scales_of_row(&at, first + r, line, scales);                                                             \
                struct sums t = name##_##group##_row(p, ahead, &x, scales + before / group);                          \
                sum[r] = c ? v_add(sum[r], v_add(t.s[0], t.s[1])) : v_add(t.s[0], t.s[1]);                               \
            }                                                                                                            \
        }                                                                                                                \
        v_sums(sum, rows, out);                                                                                          \
    }

/* Both group sizes. */
#define BOTH(kind, name, order, zero, bytes)                                                                          \
    INLINE vint name##_32_codes(vint v) { return name##_codes(v); }                                                  \
    INLINE vint name##_16_codes(vint v) { return name##_codes(v); }                                                  \
    kind(name##_32, 32, zero) kind(name##_16, 16, zero)                                                              \
    BESIDE_DOT(name, order, 32, zero, bytes)                                                                         \
    BESIDE_DOT(name, order, 16, zero, bytes)                                                                         \
    static void one_##name(const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, size_t ahead, float *out) { \
        (m->group == 32 ? one_##name##_32 : one_##name##_16)(m, first, rows, a, ahead, out);                                \
    }                                                                                                                          \
    KT_DOT_EACH(name)

BOTH(CHAIN, i4, EVENS, 8, WINDOW / 2)
BOTH(CHAIN, f4, EVENS, 12, WINDOW / 2)
BOTH(BYTES, i8, IN_ORDER, WIDE_ZERO, WINDOW)
BOTH(BYTES, u8, IN_ORDER, WIDE_ZERO, WINDOW)

static void fill_dot_beside(struct kt_kernels *k) {
    k->dot[KT_FMT_I4] = dot_i4;
    k->dot[KT_FMT_F4_E2M1] = dot_f4;
    k->dot[KT_FMT_I8] = dot_i8;
    k->dot[KT_FMT_U8] = dot_u8;
}
