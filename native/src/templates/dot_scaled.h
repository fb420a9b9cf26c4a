/* templates/dot_scaled.h: decode of types with separate scales, compiled for AVX2 and AVX-512 alike: the
 * includer brings dot_vec.h. GPTQ and AWQ, which have no rows in memory, are in dot_columns.h. */
#include "dot_rows.h"
#include "dot_scales.h"

enum { ROW_SCALES = CHUNK / 16 + 32 };

/* One vector or chain after the other, `order` and `group` saying which scales it meets. s: the row's scales. */
#define SCALED_ROW(kind, name, order, group, zero, bytes)                                                             \
    INLINE void name##_##group##_row(const uint8_t *w, size_t ahead, const struct ready *a, const float *s,           \
                                     const int T, struct sums *t) {                                                   \
        EACH_WINDOW(a, T, w, bytes) {                                                                                 \
            const float *scale = s + (x == at ? a->last / group : (x - a->window) / T * (WINDOW / group));            \
            fetch(p, ahead, bytes);                                                                                   \
            if (group == 32) {                                                                                        \
                __m256 both[DOT_TOKENS];                                                                              \
                for (int k = 0; k < T; k++) both[k] = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_loadu_ps(x[k].d)); \
                kind(name, zero, scales_of(order, both[k], i))                                                        \
            } else {                                                                                                  \
                float16s both[DOT_TOKENS];                                                                            \
                for (int k = 0; k < T; k++) both[k] = f16s_mul(f16s_load(scale), f16s_load(x[k].d));                  \
                kind(name, zero, scales16_of(order, both[k], i))                                                      \
            }                                                                                                         \
        }                                                                                                             \
    }

/* Nibbles: two vectors of a chain. */
#define CHAIN(name, zero, scale)                                                                                       \
    for (int i = 0; i < VECTORS / 2; i++) {                                                                            \
        const vint v = v_once(v_load(p + i * VECTOR)), low = name##_codes(v_low4(v)), high = name##_codes(v_high4(v)); \
        for (int k = 0; k < T; k++) {                                                                                  \
            const int8_t *q = x[k].q + 2 * i * VECTOR;                                                                 \
            const vint sum = v_dot_two(start_of(x + k, i, zero), low, v_load(q), high, v_load(q + VECTOR));            \
            t[k].s[i % 2] = v_scaled(t[k].s[i % 2], sum, scale);                                                       \
        }                                                                                                              \
    }

/* A code a byte: a chain is first and second halves of 32 columns. */
#define BYTES(name, zero, scale)                                                                   \
    for (int i = 0; i < VECTORS / 2; i++) {                                                        \
        const vint a = v_load(p + 2 * i * VECTOR), b = v_load(p + (2 * i + 1) * VECTOR);           \
        const vint low = name##_codes(v_even_lanes(a, b)), high = name##_codes(v_odd_lanes(a, b)); \
        for (int k = 0; k < T; k++) {                                                              \
            const int8_t *q = x[k].q + 2 * i * VECTOR;                                             \
            const vint half = v_dot_wide(start_of(x + k, i, zero), low, v_load(q));                \
            const vint sum = v_dot_wide(half, high, v_load(q + VECTOR));                           \
            t[k].s[i % 2] = v_scaled(t[k].s[i % 2], sum, scale);                                   \
        }                                                                                          \
    }

/* The same for groups of 16, which share no sum. */
#define BYTES_16(name, zero, scale)                                                                                  \
    for (int i = 0; i < VECTORS; i++) {                                                                              \
        const vint u = name##_codes(v_load(p + i * VECTOR));                                                         \
        for (int k = 0; k < T; k++) {                                                                                \
            const vint sum = v_dot_wide(start_of(x + k, i, zero), u, v_load(x[k].q + i * VECTOR));                   \
            t[k].s[i % 2] = v_scaled(t[k].s[i % 2], sum, scale);                                                     \
        }                                                                                                            \
    }

/* Less what packed zero points take away: minus[g] * scale * sum of activations, see fill_window. */
INLINE vfloat less_zeros(vfloat acc, const struct ready *a, const int T, const int k, const float *minus) {
    __m256 sum = _mm256_setzero_ps();
    for (int w = 0; w < a->windows; w++) {
        const float *of = minus + (w == a->moved ? a->last / 32 : w * (WINDOW / 32));
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(of), _mm256_loadu_ps(a->window[w * T + k].d + 8), sum);
    }
    return v_add8(acc, sum);
}

INLINE vint i4_codes(vint v) { return v; }
INLINE vint f4_codes(vint v) { return v_look_up(kt_fp4_codes, v); }
INLINE vint i8_codes(vint v) { return v_wide_signed(v); }
INLINE vint u8_codes(vint v) { return v_wide_unsigned(v); }

/* A pass of a type; bytes: of 256 columns; own_zero: what its packed zero points are counted from. The last window of
 * a chunk may start before it, but not before the first column of a row, so that scales are read from 256 columns
 * before the chunk on. */
#define SCALED_PASS(name, order, group, zero, own_zero, bytes)                                                    \
    INLINE void name##_##group##_pass(const int T, const struct kt_matrix *m, int64_t first, int rows,            \
                                      const struct kt_act *a, size_t ahead, float *out, int64_t ldc) {            \
        struct ready x;                                                                                           \
        vfloat sum[DOT_TOKENS][16];                                                                               \
        float line[ROW_SCALES], scales[ROW_SCALES], own[ROW_SCALES], minus[ROW_SCALES];                           \
        for (int64_t c = 0; c < m->cols; c += CHUNK) {                                                            \
            const int64_t n = m->cols - c < CHUNK ? m->cols - c : CHUNK, before = c ? WINDOW : 0;                 \
            struct scales at = scales_of_columns(m, c - before, n + before, group, 1.0f);                         \
            for (int i = 0; i < T; i++) make_ready_##order##_##group(&x, T, i, zero, a + i, c, n);                \
            for (int r = 0; r < rows; r++) {                                                                      \
                const uint8_t *p = m->data + (size_t)(first + r) * m->stride + offset_of(c, bytes);               \
                uint8_t padded[(bytes) + 64];                                                                     \
                if (m->cols < WINDOW) p = pad(padded, sizeof padded, p, (size_t)offset_of(m->cols, bytes));       \
                scales_of_row(&at, first + r, line, scales);                                                      \
                struct sums t[DOT_TOKENS];                                                                        \
                for (int i = 0; i < T; i++) t[i] = (struct sums){{v_zero(), v_zero()}, v_zero()};                 \
                name##_##group##_row(p, ahead, &x, scales + before / group, T, t);                                \
                for (int i = 0; i < T; i++) sum[i][r % 16] = v_add(t[i].s[0], t[i].s[1]);                         \
                if (group == 32 && m->zeros) {                                                                    \
                    const float *by_scale = at.each == 1 ? scales : line;                                         \
                    minus_of_row(&at, first + r, (bytes) == WINDOW ? 8 : 4, own_zero, by_scale, own, minus);      \
                    for (int i = 0; i < T; i++)                                                                   \
                        sum[i][r % 16] = less_zeros(sum[i][r % 16], &x, T, i, minus + before / group);            \
                }                                                                                                 \
                if (r % 16 == 15 || r == rows - 1)                                                                \
                    for (int i = 0; i < T; i++) put_sums(sum[i], r % 16 + 1, out + i * ldc + r / 16 * 16, c > 0); \
            }                                                                                                     \
        }                                                                                                         \
    }

/* Both group sizes. tokens16: whether several tokens of groups of 16 share a pass. NVFP4 has such groups; of integers
 * hardly any checkpoint does, and they take their tokens one by one rather than their share of the time to compile. */
#define BOTH(name, kind, order, kind16, order16, zero, own_zero, bytes, tokens16)                                    \
    SCALED_ROW(kind, name, order, 32, zero, bytes)                                                                   \
    SCALED_ROW(kind16, name, order16, 16, zero, bytes)                                                               \
    SCALED_PASS(name, order, 32, zero, own_zero, bytes)                                                              \
    SCALED_PASS(name, order16, 16, zero, own_zero, bytes)                                                            \
    SHARED void name##_16_one(const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a,            \
                              size_t ahead, float *out, int64_t ldc) {                                               \
        name##_16_pass(1, m, first, rows, a, ahead, out, ldc);                                                       \
    }                                                                                                                \
    INLINE void name##_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, \
                            size_t ahead, float *out, int64_t ldc) {                                                 \
        if (m->group == 32) name##_32_pass(T, m, first, rows, a, ahead, out, ldc);                                   \
        else if (tokens16) name##_16_pass(T, m, first, rows, a, ahead, out, ldc);                                    \
        else for (int i = 0; i < T; i++) name##_16_one(m, first, rows, a + i, ahead, out + i * ldc, ldc);            \
    }                                                                                                                \
    DOT_FOR_TOKENS(name)

BOTH(i4, CHAIN, EVENS, CHAIN, EVENS, 8, 8, WINDOW / 2, 0)
BOTH(f4, CHAIN, EVENS, CHAIN, EVENS, 12, 0, WINDOW / 2, 1)
BOTH(i8, BYTES, HALVES, BYTES_16, IN_ORDER, WIDE_ZERO, 0, WINDOW, 0)
BOTH(u8, BYTES, HALVES, BYTES_16, IN_ORDER, WIDE_ZERO, 128, WINDOW, 0)

static void fill_dot_scaled(struct kt_kernels *k) {
    DOT_FILL(k, I4, i4);
    DOT_FILL(k, F4_E2M1, f4);
    DOT_FILL(k, I8, i8);
    DOT_FILL(k, U8, u8);
}
