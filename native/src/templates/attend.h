/* templates/attend.h: what attention needs beside products, in plain C with vectors of whatever width there is. Every
 * instruction set compiles this same text (src/<isa>/attend.c), and gets the same bits: see act.h. */
#ifndef KT_ATTEND_IMPL_H
#define KT_ATTEND_IMPL_H

#include <math.h>

#include "../kernels.h"
#include "../formats/quants.h"

typedef float kt_vec __attribute__((vector_size(64)));
typedef int32_t kt_ivec __attribute__((vector_size(64)));

/* x = e^x for x <= 0, relative error about 1e-7: the polynomial of exp_clamped in act.h. Below -87, where results would
 * be subnormal, exactly 0. A NaN stays one. By pointer: vectors of 64 bytes have no one calling convention. */
static inline __attribute__((always_inline)) void exp_negative(kt_vec *x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    const kt_vec t = *x * 1.44269504f + magic, n = t - magic;
    kt_vec r = *x - n * 0.693359375f; /* ln 2 in two parts: the first times n is exact */
    r = r + n * 2.12194440e-4f;
    kt_vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const kt_ivec power = ((kt_ivec)t - (int32_t)0x4b400000 + 127) << 23; /* what magic added, less its own bits */
    const kt_ivec gone = *x < -87.0f;
    *x = (kt_vec)((kt_ivec)(p * (kt_vec)power) & ~gone);
}

static inline float sum_of(const kt_vec *v) {
    float a[16];
    memcpy(a, v, sizeof a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
}

static inline float most_of(const kt_vec *v) {
    float a[16], most;
    memcpy(a, v, sizeof a);
    most = a[0];
    for (int i = 1; i < 16; i++) most = a[i] > most ? a[i] : most;
    return most;
}

/* The last n < 16 scores, scaled, and filled up with -infinity, which changes neither maximum nor sum. */
static inline __attribute__((always_inline)) void load_last(const float *s, int n, float scale, kt_vec *v) {
    float a[16];
    for (int i = 0; i < 16; i++) a[i] = i < n ? s[i] * scale : -INFINITY;
    memcpy(v, a, sizeof *v);
}

static float softmax(float *s, int n, float scale, float *max) {
    const int whole = n / 16 * 16;
    kt_vec v, most, sum, last;
    memset(&sum, 0, sizeof sum);
    most = sum + *max;
    for (int i = 0; i < whole; i += 16) {
        memcpy(&v, s + i, sizeof v);
        v *= scale;
        memcpy(s + i, &v, sizeof v);
        const kt_ivec above = v > most; /* no NaN is above anything: it shows in its own e^x */
        most = (kt_vec)(((kt_ivec)v & above) | ((kt_ivec)most & ~above));
    }
    if (whole < n) {
        load_last(s + whole, n - whole, scale, &last);
        const kt_ivec above = last > most;
        most = (kt_vec)(((kt_ivec)last & above) | ((kt_ivec)most & ~above));
    }
    *max = most_of(&most);
    const float base = *max == -INFINITY ? 0.0f : *max;
    for (int i = 0; i < whole; i += 16) {
        memcpy(&v, s + i, sizeof v);
        v -= base;
        exp_negative(&v);
        memcpy(s + i, &v, sizeof v);
        sum += v;
    }
    if (whole < n) {
        last -= base;
        exp_negative(&last);
        memcpy(s + whole, &last, (size_t)(n - whole) * 4);
        sum += last;
    }
    return sum_of(&sum);
}

static void rescale(float factor, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

/* Sixteen columns of two tokens as a line of a tile; `second` NULL: an odd last token. */
static inline void pair_line(const uint8_t *first, const uint8_t *second, int n, uint32_t *line) {
    uint16_t a[KT_TILE] = {0}, b[KT_TILE] = {0};
    memcpy(a, first, (size_t)n * 2);
    if (second) memcpy(b, second, (size_t)n * 2);
    for (int i = 0; i < KT_TILE; i++) line[i] = a[i] | (uint32_t)b[i] << 16;
}

static void pair_rows(const uint8_t *values, size_t value_row, int tokens, int64_t n, uint32_t *data, int64_t tile) {
    for (int t = 0; t < tokens; t += 2, values += 2 * value_row, data += KT_TILE) {
        const uint8_t *second = t + 1 < tokens ? values + value_row : NULL;
        int64_t c = 0;
        for (; second && c + KT_TILE <= n; c += KT_TILE)
            pair_line(values + c * 2, second + c * 2, KT_TILE, data + c / KT_TILE * tile);
        for (; c < n; c += KT_TILE)
            pair_line(values + c * 2, second ? second + c * 2 : NULL, (int)(n - c < KT_TILE ? n - c : KT_TILE),
                      data + c / KT_TILE * tile);
    }
}

static void load_q8_0(const uint8_t *p, int64_t n, float *out) {
    for (int64_t i = 0; i < n / 32; i++, p += sizeof(kt_block_q8_0), out += 32) {
        const float d = kt_load_f16(p);
        int8_t q[32];
        memcpy(q, p + 2, sizeof q);
        for (int j = 0; j < 32; j++) out[j] = d * (float)q[j];
    }
}

static void fill_attend(struct kt_kernels *k) {
    k->softmax = softmax;
    k->rescale = rescale;
    k->pair_rows = pair_rows;
    k->load_q8_0 = load_q8_0;
}

#endif
