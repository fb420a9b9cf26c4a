/* templates/act.h: the kernels that work on activations, in C on vector types.
 *
 * Every instruction set compiles this same text (src/<isa>/act.c), so their results agree bit for bit:
 * each operation below is one IEEE operation, no contraction (-ffp-contract=off), no float-to-int
 * conversion (undefined for NaN), only the addition of 1.5*2^23 and a look at the bits. */
#ifndef KT_ACT_IMPL_H
#define KT_ACT_IMPL_H

#include <math.h>

#include "../../include/kt_native.h"
#include "../kernels.h"
#include "../formats/quants.h"

#define KT_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
#define KT_MAGIC_BITS 0x4b400000u

/* Vectors that the instruction set has: of wider ones compilers make traffic with memory, and loops over scalars stay
 * scalar where they choose or sum. AVX-512 too is faster with eight lanes (quantizing by a quarter, Xeon, gcc 12.2). */
#ifdef __AVX__
enum { KT_LANES = 8 };
#else
enum { KT_LANES = 4 };
#endif
typedef float kt_floats __attribute__((vector_size(4 * KT_LANES)));
typedef int32_t kt_ints __attribute__((vector_size(4 * KT_LANES)));
typedef uint32_t kt_words __attribute__((vector_size(4 * KT_LANES)));

static inline kt_floats load_floats(const float *x) {
    kt_floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* The same number in all lanes, whatever it is. */
static inline kt_floats all_lanes(float x) { return x + (kt_floats){0}; }

/* where ? a : b, lane by lane */
static inline kt_words choose_words(kt_ints where, kt_words a, kt_words b) {
    return ((kt_words)where & a) | (~(kt_words)where & b);
}
static inline kt_floats choose(kt_ints where, kt_floats a, kt_floats b) {
    return (kt_floats)choose_words(where, (kt_words)a, (kt_words)b);
}

/* ---- int8 activations -------------------------------------------------------------------------------- */

/* Half a group: sixteen lanes, whatever a vector has, so that sums have one order. */
enum { KT_PARTS = 16 / KT_LANES };
typedef float kt_float4 __attribute__((vector_size(16)));
typedef int32_t kt_int4 __attribute__((vector_size(16)));
typedef uint32_t kt_word4 __attribute__((vector_size(16)));
typedef union kt_sixteen {
    kt_floats f[KT_PARTS];
    kt_words w[KT_PARTS];
    kt_float4 f4[4];
    kt_word4 w4[4];
} kt_sixteen;

static inline float sum_floats(const kt_sixteen *v) {
    const kt_float4 s = (v->f4[0] + v->f4[2]) + (v->f4[1] + v->f4[3]);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

static inline int32_t sum_words(const kt_sixteen *v) {
    const kt_word4 s = (v->w4[0] + v->w4[1]) + (v->w4[2] + v->w4[3]);
    return (int32_t)((s[0] + s[1]) + (s[2] + s[3]));
}

/* The bits of the largest magnitude of a group: they order like it, and inf and NaN come out on top. */
static inline uint32_t largest(const float *x) {
    kt_sixteen most;
    for (int i = 0; i < KT_PARTS; i++) {
        const kt_words a = (kt_words)load_floats(x + i * KT_LANES) & 0x7fffffffu;
        const kt_words b = (kt_words)load_floats(x + i * KT_LANES + 16) & 0x7fffffffu;
        most.w[i] = choose_words((kt_ints)a > (kt_ints)b, a, b);
    }
    for (int i = 2; i > 0; i--)
        for (int j = 0; j < i; j++) {
            const kt_word4 a = most.w4[j], b = most.w4[j + i], more = (kt_word4)((kt_int4)a > (kt_int4)b);
            most.w4[j] = (a & more) | (b & ~more);
        }
    const kt_word4 s = most.w4[0];
    const uint32_t a = s[0] > s[1] ? s[0] : s[1], b = s[2] > s[3] ? s[2] : s[3];
    return a > b ? a : b;
}

static inline kt_floats rounded(kt_floats x) { return (x + KT_MAGIC) - KT_MAGIC; }

/* A group times `factor` as whole numbers: sums of activation * number and of number^2. */
static inline void fit_group(const float *x, float factor, float *product, float *square) {
    kt_sixteen p, s;
    for (int i = 0; i < KT_PARTS; i++) {
        const kt_floats t = load_floats(x + i * KT_LANES) * factor, c = rounded(t);
        const kt_floats u = load_floats(x + i * KT_LANES + 16) * factor, e = rounded(u);
        p.f[i] = t * c + u * e;
        s.f[i] = c * c + e * e;
    }
    *product = sum_floats(&p);
    *square = sum_floats(&s);
}

/* A group's codes and the sums of its halves. */
static inline void put_codes(const float *x, float factor, int8_t *q, int32_t *low, int32_t *high) {
    kt_sixteen half[2];
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < KT_PARTS; i++) {
            const kt_floats moved = rounded(load_floats(x + 16 * h + i * KT_LANES) * factor) + KT_MAGIC;
            half[h].w[i] = (kt_words)moved - KT_MAGIC_BITS;
        }
    int32_t codes[KT_ACT_GROUP];
    memcpy(codes, half, sizeof codes);
    for (int i = 0; i < KT_ACT_GROUP; i++) q[i] = (int8_t)codes[i];
    *low = sum_words(half);
    *high = sum_words(half + 1);
}

/* The better of two fits, each with the scale of least squares. Beside amax / 127 alone the error of a group falls by
 * 5 % (normally distributed values) and 3 % (products of silu and a normal value), which keeps a whole layer's below
 * 1.2 %; a third scale would bring 1 % more. Step by step for eight groups: each step waits for the one before. */
static void quantize(const float *x, int64_t n, int8_t *q, float *d, float *ds, int32_t *low, int32_t *high) {
    enum { GROUPS = 8, N = KT_ACT_GROUP };
    const float less = 126.0f / 127.0f, unit[2] = {1.0f / 127.0f, 1.0f / (127.0f * less)};
    for (int64_t left = n / N, count; left > 0; left -= count, x += count * N, q += count * N) {
        uint32_t most[GROUPS];
        float factor[2][GROUPS], product[2][GROUPS], square[2][GROUPS];
        count = left < GROUPS ? left : GROUPS;
        for (int i = 0; i < count; i++) most[i] = largest(x + i * N);
        for (int i = 0; i < count; i++) {
            factor[0][i] = 127.0f / (most[i] ? kt_bits_float(most[i]) : 1.0f);
            factor[1][i] = factor[0][i] * less;
        }
        for (int i = 0; i < count; i++)
            for (int k = 0; k < 2; k++) fit_group(x + i * N, factor[k][i], product[k] + i, square[k] + i);
        for (int i = 0; i < count; i++, d++, ds++, low++, high++) {
            const float amax = kt_bits_float(most[i]), a = product[0][i], b = product[1][i];
            const int finite = most[i] < 0x7f800000u;
            /* Whether the second, whose numbers are `less` times as large, explains more of the sum of squares. */
            const int best = b * b * square[0][i] > a * a * square[1][i] * (less * less);
            put_codes(x + i * N, factor[best][i], q + i * N, low, high);
            *d = product[best][i] / square[best][i] * (amax * unit[best]);
            if (!finite || amax < 1e-36f) { /* rarely: the codes are of no use */
                memset(q + i * N, 0, N);
                *d = finite ? 0.0f : NAN;
                *low = *high = 0;
            }
            *ds = *d * (float)(*low + *high);
        }
    }
}

/* ---- other forms ------------------------------------------------------------------------------------- */

static void to_bf16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = kt_f32_to_bf16(x[i]);
}

static void to_f16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = kt_f32_to_f16(x[i]);
}

/* ---- activation functions ---------------------------------------------------------------------------- */

/* e^x for finite results, clamped outside; relative error about 1e-7. A NaN stays a NaN. */
static inline kt_floats exp_clamped(kt_floats x) {
    x = choose(x > 88.0f, all_lanes(88.0f), x);
    x = choose(x < -87.0f, all_lanes(-87.0f), x);
    const kt_floats t = x * 1.44269504f + KT_MAGIC, n = t - KT_MAGIC;
    kt_floats r = x - n * 0.693359375f; /* ln 2 in two parts: the first times n is exact */
    r = r + n * 2.12194440e-4f;
    kt_floats p = r * 1.9875691500e-4f + 1.3981999507e-3f; /* Cephes expf polynomial for e^r, |r| <= ln(2)/2 */
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (kt_floats)(((kt_words)t - KT_MAGIC_BITS + 127u) << 23);
}

static inline kt_floats sigmoid(kt_floats x) { return 1.0f / (1.0f + exp_clamped(-x)); }

static inline kt_floats erf_of(kt_floats x) {
    for (int i = 0; i < KT_LANES; i++) x[i] = erff(x[i]);
    return x;
}

/* NaN stays NaN in both. */
static inline kt_floats at_most(kt_floats x, float limit) { return choose(x > limit, all_lanes(limit), x); }
static inline kt_floats within(kt_floats x, float limit) {
    return choose(x > limit, all_lanes(limit), choose(x < -limit, all_lanes(-limit), x));
}

/* The first `some` lanes, at most KT_LANES; others are zero. */
static inline kt_floats load_some(const float *x, int64_t some) {
    kt_floats v = {0};
    if (some >= KT_LANES) return load_floats(x);
    memcpy(&v, x, (size_t)some * sizeof *x);
    return v;
}
static inline void store_some(float *x, kt_floats v, int64_t some) {
    if (some >= KT_LANES) memcpy(x, &v, sizeof v);
    else memcpy(x, &v, (size_t)some * sizeof *x);
}

/* up = f(x) * up, x being of the gate, or f(x) of up itself without a gate. */
#define GLU(f)                                                                                            \
    for (; n > 0; n -= KT_LANES, up += KT_LANES, gate += gate ? KT_LANES : 0) {                           \
        const kt_floats u = within(load_some(up, n), limit);                                              \
        const kt_floats x = gate ? at_most(load_some(gate, n), limit) : u, y = f;                         \
        store_some(up, gate ? u * y : y, n);                                                              \
    }

static void activate(const struct kt_glu *glu, const float *gate, float *up, int64_t n) {
    const float limit = glu->limit, alpha = glu->alpha;
    switch (glu->activation) {
    case KT_SILU: GLU(x * sigmoid(x)) break;
    case KT_GELU: GLU(0.5f * x * (1.0f + erf_of(x * 0.70710678f))) break;
    case KT_GELU_TANH: /* 0.5 x (1 + tanh u) = x sigmoid(2u) */
        GLU(x * sigmoid(1.59576912f * (x + 0.044715f * (x * x * x))))
        break;
    case KT_RELU: GLU(choose(x < 0.0f, all_lanes(0.0f), x)) break;
    case KT_RELU2: GLU(choose(x < 0.0f, all_lanes(0.0f), x * x)) break;
    case KT_SWIGLU_OAI: /* needs a gate; up + 1, times the rest */
        for (; n > 0; n -= KT_LANES, up += KT_LANES, gate += KT_LANES) {
            const kt_floats x = at_most(load_some(gate, n), limit), u = within(load_some(up, n), limit);
            store_some(up, (u + 1.0f) * (x * sigmoid(alpha * x)), n);
        }
        break;
    }
}

/* A gradient where nothing was cut, else zero. */
static inline kt_floats unless(kt_ints cut, kt_floats x) { return choose(cut, all_lanes(0.0f), x); }

/* `set` gives y = f(x) and its slope; then m, and the gradients of gate and up. `plus`: what the unit adds to up. */
#define GLU_BACK(set)                                                                                      \
    for (; n > 0; n -= KT_LANES, d += KT_LANES, up += KT_LANES, m += KT_LANES, gate += gate ? KT_LANES : 0) { \
        const kt_floats given = load_some(up, n), u = within(given, limit), v = u + plus;                  \
        const kt_floats g = gate ? load_some(gate, n) : u, x = gate ? at_most(g, limit) : u;               \
        const kt_floats dm = scale * load_some(d, n);                                                      \
        kt_floats y, slope;                                                                                \
        set;                                                                                               \
        store_some(m, gate ? v * y : y, n);                                                                \
        store_some(up, unless((given > limit) | (given < -limit), dm * (gate ? y : slope)), n);            \
        if (gate) store_some(gate, unless(g > limit, dm * v * slope), n);                                  \
    }

static void activate_back(const struct kt_glu *glu, float scale, const float *d, float *gate, float *up, float *m,
                          int64_t n) {
    const float limit = glu->limit, alpha = glu->alpha, plus = glu->activation == KT_SWIGLU_OAI ? 1.0f : 0.0f;
    switch (glu->activation) {
    case KT_SILU: GLU_BACK(const kt_floats s = sigmoid(x); y = x * s; slope = s + y * (1.0f - s)) break;
    case KT_GELU: /* x P(x), P of the normal distribution; 0.3989 = 1 / sqrt(2 pi) is its density at 0 */
        GLU_BACK(const kt_floats p = 0.5f * (1.0f + erf_of(x * 0.70710678f)); y = x * p;
                 slope = p + x * (0.39894228f * exp_clamped(-0.5f * (x * x))))
        break;
    case KT_GELU_TANH:
        GLU_BACK(const kt_floats s = sigmoid(1.59576912f * (x + 0.044715f * (x * x * x))); y = x * s;
                 slope = s + y * (1.0f - s) * (1.59576912f * (1.0f + 0.134145f * (x * x))))
        break;
    case KT_RELU: GLU_BACK(y = choose(x < 0.0f, all_lanes(0.0f), x); slope = unless(x <= 0.0f, all_lanes(1.0f))) break;
    case KT_RELU2: GLU_BACK(y = choose(x < 0.0f, all_lanes(0.0f), x * x); slope = unless(x <= 0.0f, 2.0f * x)) break;
    case KT_SWIGLU_OAI:
        GLU_BACK(const kt_floats s = sigmoid(alpha * x); y = x * s; slope = s + alpha * y * (1.0f - s))
        break;
    }
}

static void add(const float *x, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] += x[i];
}

static void scale_add(float scale, const float *x, float *out, int64_t n, int add) {
    if (add)
        for (int64_t i = 0; i < n; i++) out[i] = out[i] + scale * x[i];
    else
        for (int64_t i = 0; i < n; i++) out[i] = scale * x[i];
}

static void fill_act(struct kt_kernels *k) {
    k->quantize = quantize;
    k->to_bf16 = to_bf16;
    k->to_f16 = to_f16;
    k->activate = activate;
    k->activate_back = activate_back;
    k->add = add;
    k->scale_add = scale_add;
}

#endif
