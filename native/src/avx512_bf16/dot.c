/* Decode of BF16 and FP8 (e4m3) weights that meet bf16 activations: two columns a multiply-add. Where there are none,
 * in fp32 as on the rung below. One row after the other: see ../dot_rows.h. */
#define KT_ISA avx512_bf16
#include <math.h>

#include "../avx512/dot_vec.h"
#include "../templates/dot_scales.h"
#include "../templates/dot_tokens.h"
#include "e4m3.h"

INLINE vfloat dot_pairs(vfloat sum, __m512i w, const uint16_t *x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
}

/* ---- BF16 ------------------------------------------------------------------------------------------- */

/* Activations are zero from the last column to a multiple of 64. */
INLINE void bf16_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a,
                      size_t ahead, float *out, int64_t ldc) {
    const int64_t cols = m->cols;
    vfloat sum[DOT_TOKENS][16];
    for (int r = 0; r < rows; r++) {
        const uint8_t *p = m->data + (size_t)(first + r) * m->stride;
        vfloat s[DOT_TOKENS][4];
        int64_t c = 0;
        for (int t = 0; t < T; t++) s[t][0] = s[t][1] = s[t][2] = s[t][3] = v_zero();
        for (; c + 128 <= cols; c += 128)
            for (int i = 0; i < 4; i++) {
                const uint8_t *at = p + 2 * c + 64 * i;
                PREFETCH(at, ahead);
                const __m512i w = v_once(v_load(at));
                for (int t = 0; t < T; t++) s[t][i] = dot_pairs(s[t][i], w, a[t].h + c + 32 * i);
            }
        for (; c < cols; c += 32) {
            const __mmask32 there = cols - c < 32 ? (1u << (cols - c)) - 1 : ~0u;
            const __m512i w = _mm512_maskz_loadu_epi16(there, p + 2 * c);
            for (int t = 0; t < T; t++) s[t][0] = dot_pairs(s[t][0], w, a[t].h + c);
        }
        for (int t = 0; t < T; t++) sum[t][r % 16] = v_add(v_add(s[t][0], s[t][1]), v_add(s[t][2], s[t][3]));
        if (r % 16 == 15 || r == rows - 1)
            for (int t = 0; t < T; t++) v_sums(sum[t], r % 16 + 1, out + t * ldc + r / 16 * 16);
    }
}
DOT_FOR_TOKENS(bf16)

/* ---- FP8 -------------------------------------------------------------------------------------------- */

enum { F8_CHUNK = 4096, F8_ROOM = F8_CHUNK + 64 };

/* Of each 64 activations those that meet the low vector of e4m3_to_bf16, then those of the high one. */
INLINE void part_lanes(const uint16_t *x, int64_t n, uint16_t *out) {
    for (int64_t c = 0; c < n; c += 64) {
        const __m512i a = v_load(x + c), b = v_load(x + c + 32);
        v_store(out + c, _mm512_shuffle_i32x4(a, b, 0x88));
        v_store(out + c + 32, _mm512_shuffle_i32x4(a, b, 0xdd));
    }
}

/* Token t's activations start t * F8_ROOM after x. */
INLINE void f8_vector(const int T, __m512i v, const uint16_t *x, const float *scale, vfloat *sum, __m512i *most) {
    const vfloat of = v_halves_of(scale);
    __m512i low, high;
    e4m3_to_bf16(v, &low, &high, most);
    for (int t = 0; t < T; t++, x += F8_ROOM)
        sum[t] = v_fma(dot_pairs(dot_pairs(v_zero(), low, x), high, x + 32), of, sum[t]);
}

INLINE void f8_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a,
                    size_t ahead, float *out, int64_t ldc) {
    _Alignas(64) uint16_t x[DOT_TOKENS * F8_ROOM];
    float scale[F8_CHUNK / 32 + 32], line[F8_CHUNK / 32 + 32];
    for (int64_t c = 0; c < m->cols; c += F8_CHUNK) {
        const int64_t n = m->cols - c < F8_CHUNK ? m->cols - c : F8_CHUNK;
        struct scales at = scales_of_columns(m, c, n, 32, 1.0f);
        for (int t = 0; t < T; t++) part_lanes(a[t].h + c, n, x + t * F8_ROOM);
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = m->data + (size_t)(first + r) * m->stride + c;
            vfloat sum[2][DOT_TOKENS];
            __m512i most = v_bytes(0);
            int64_t k = 0;
            for (int t = 0; t < T; t++) sum[0][t] = sum[1][t] = v_zero();
            scales_of_row(&at, first + r, line, scale);
            for (; k + 128 <= n; k += 128)
                for (int i = 0; i < 2; i++) {
                    const int64_t j = k + 64 * i;
                    PREFETCH(p + j, ahead);
                    f8_vector(T, v_once(v_load(p + j)), x + j, scale + j / 32, sum[i], &most);
                }
            for (; k < n; k += 64) {
                const __mmask64 there = n - k < 64 ? ((uint64_t)1 << (n - k)) - 1 : ~(uint64_t)0;
                f8_vector(T, _mm512_maskz_loadu_epi8(there, p + k), x + k, scale + k / 32, sum[0], &most);
            }
            const float nan = v_any_byte_is(most, 127) ? NAN : 0.0f;
            for (int t = 0; t < T; t++) {
                float *to = out + t * ldc + r;
                *to = (c ? *to : 0.0f) + v_sum(v_add(sum[0][t], sum[1][t])) + nan;
            }
        }
    }
}
DOT_FOR_TOKENS(f8)

/* ---- which -------------------------------------------------------------------------------------------- */

static kt_dot_fn bf16_below, f8_below;

static void either_bf16(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,
                        size_t ahead, float *out, int64_t ldc) {
    (a->h ? dot_bf16 : bf16_below)(w, first, rows, a, tokens, ahead, out, ldc);
}
static void either_f8(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,
                      size_t ahead, float *out, int64_t ldc) {
    (a->h ? dot_f8 : f8_below)(w, first, rows, a, tokens, ahead, out, ldc);
}

void kt_fill_dot_avx512_bf16(struct kt_kernels *k) {
    bf16_below = k->dot[KT_FMT_BF16];
    f8_below = k->dot[KT_FMT_F8_E4M3];
    k->dot[KT_FMT_BF16] = either_bf16;
    k->dot[KT_FMT_F8_E4M3] = either_f8;
    k->dot_bf16 = 1;
}
