/* templates/dot_f8.h: decode of FP8 (e4m3), which has separate scales; after dot_float.h, for x86. */
#ifndef KT_DOT_F8_IMPL_H
#define KT_DOT_F8_IMPL_H

#include <math.h>

#include "dot_scales.h"

/* Bits seeeemmm, spread to sign, low half of the exponent and high end of the mantissa of a float, are 2^-120 of the
 * value, subnormals included: shifts and a mask in place of a conversion. Activations are moved up by a power of two
 * that keeps products of such numbers in range, and the scales take both powers back. */

/* Columns of a row at once: their activations, rearranged, are half of a small first-level cache. */
enum { F8_CHUNK = 4096, F8_ROOM = F8_CHUNK + VECTOR, F8_EXPONENT = 120 };

/* The power of two by which the activations may be multiplied. Infinities and NaNs, which stay what they are, count
 * as 0. */
INLINE int room_above(const float *x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = kt_float_bits(x[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    const int exponent = (int)(most >> 23);
    return exponent == 255 ? 0 : exponent < 133 ? 120 : 253 - exponent;
}

INLINE float power_of_two(int n) { return kt_bits_float((uint32_t)(n + 127) << 23); }

/* n activations times 2^power: of each VECTOR columns those of the first bytes of dwords, then of the second ..
 * fourth. */
INLINE void part_dwords(const float *x, int64_t n, int power, float *out) {
    const float factor = power_of_two(power);
    int64_t c = 0;
    for (; c + VECTOR <= n; c += VECTOR)
        for (int j = 0; j < EACH; j++)
            for (int b = 0; b < 4; b++) out[c + b * EACH + j] = x[c + 4 * j + b] * factor;
    if (c == n) return;
    memset(out + c, 0, VECTOR * sizeof *out);
    for (int64_t i = 0; i < n - c; i++) out[c + i % 4 * EACH + i / 4] = x[c + i] * factor;
}

/* What a row has come to: sums of each token, and the largest magnitude of a code, of which 127 is NaN. */
struct f8_sums {
    vfloat s[DOT_TOKENS][2];
    vint most;
};

/* Token i's activations start i * F8_ROOM after x. */
INLINE void f8_vector(struct f8_sums *sums, const int T, const int chain, vint v, const float *x, const float *scale) {
    vfloat w[4];
    const vfloat of = v_halves_of(scale);
    for (int b = 0; b < 4; b++) w[b] = v_e4m3_byte(v, b);
    for (int t = 0; t < T; t++, x += F8_ROOM) {
        vfloat sum = v_mul(w[0], v_load_f32(x));
        for (int b = 1; b < 4; b++) sum = v_fma(w[b], v_load_f32(x + b * EACH), sum);
        sums->s[t][chain] = v_fma(sum, of, sums->s[t][chain]);
    }
    sums->most = v_max(sums->most, v_and(v, v_bytes(127)));
}

INLINE void f8_row(struct f8_sums *t, const int T, const uint8_t *p, size_t ahead, const float *x, int64_t n,
                   const float *scale) {
    int64_t c = 0;
    for (; c + 2 * VECTOR <= n; c += 2 * VECTOR) {
        for (int i = 0; i < 2 * VECTOR; i += 64) PREFETCH(p + c + i, ahead);
        for (int i = 0; i < 2; i++)
            f8_vector(t, T, i, v_once(v_load(p + c + i * VECTOR)), x + c + i * VECTOR, scale + (c + i * VECTOR) / 32);
    }
    for (; c < n; c += VECTOR) {
        uint8_t rest[VECTOR] = {0};
        memcpy(rest, p + c, (size_t)(n - c < VECTOR ? n - c : VECTOR));
        f8_vector(t, T, 0, v_load(rest), x + c, scale + c / 32);
    }
}

/* The scales hold one power of two for all tokens: the least that any of them allows. */
INLINE void f8_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a,
                    size_t ahead, float *out, int64_t ldc) {
    _Alignas(64) float x[DOT_TOKENS * F8_ROOM], scale[F8_CHUNK / 32 + 32], line[F8_CHUNK / 32 + 32];
    struct f8_sums t[KT_DOT_ROWS];
    memset(t, 0, sizeof t);
    for (int64_t c = 0; c < m->cols; c += F8_CHUNK) {
        const int64_t n = m->cols - c < F8_CHUNK ? m->cols - c : F8_CHUNK;
        int power = 120;
        for (int i = 0; i < T; i++) {
            const int room = room_above(a[i].f + c, n);
            power = room < power ? room : power;
        }
        struct scales at = scales_of_columns(m, c, n, 32, power_of_two(F8_EXPONENT - power));
        for (int i = 0; i < T; i++) part_dwords(a[i].f + c, n, power, x + i * F8_ROOM);
        for (int r = 0; r < rows; r++) {
            scales_of_row(&at, first + r, line, scale);
            f8_row(&t[r], T, m->data + (size_t)(first + r) * m->stride + c, ahead, x, n, scale);
        }
    }
    for (int r = 0; r < rows; r++) {
        const int nan = v_any_byte_is(t[r].most, 127);
        for (int i = 0; i < T; i++) out[i * ldc + r] = nan ? NAN : v_sum(v_add(t[r].s[i][0], t[r].s[i][1]));
    }
}
DOT_FOR_TOKENS(f8)

#endif
