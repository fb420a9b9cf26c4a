/* templates/act.h: the kernels that work on activations, in plain C that the compiler vectorizes.
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

/* Vectors of whatever width the instruction set has: the compiler's own loops over sums would stay scalar. */
typedef float kt_float16 __attribute__((vector_size(64)));
typedef float kt_float8 __attribute__((vector_size(32)));
typedef float kt_float4 __attribute__((vector_size(16)));
typedef union kt_lanes {
    kt_float16 all;
    kt_float8 eight[2];
    kt_float4 four[4];
} kt_lanes;

static inline float sum_lanes(kt_lanes *v) {
    v->eight[0] += v->eight[1];
    v->four[0] += v->four[1];
    return (v->four[0][0] + v->four[0][2]) + (v->four[0][1] + v->four[0][3]);
}

/* A group of activations as whole numbers, and sums over it: of activation * number and of number^2. */
struct kt_fit {
    kt_float16 code[KT_ACT_GROUP / 16];
    float product, square;
};

static inline void fit_group(const float *x, float factor, struct kt_fit *fit) {
    kt_lanes product, square;
    for (int h = 0; h < KT_ACT_GROUP / 16; h++) {
        kt_float16 t;
        memcpy(&t, x + 16 * h, sizeof t);
        t *= factor;
        const kt_float16 c = (t + KT_MAGIC) - KT_MAGIC;
        fit->code[h] = c;
        product.all = h ? product.all + t * c : t * c;
        square.all = h ? square.all + c * c : c * c;
    }
    fit->product = sum_lanes(&product);
    fit->square = sum_lanes(&square);
}

/* Whether b, whose numbers are `less` times as large, explains more of the group's sum of squares than a. */
static inline int is_better(const struct kt_fit *b, float less, const struct kt_fit *a) {
    return b->product * b->product * a->square > a->product * a->product * b->square * (less * less);
}

/* The better of two fits, each with the scale of least squares. Beside amax / 127 alone the error of a group falls by
 * 5 % (normally distributed values) and 3 % (products of silu and a normal value), which keeps a whole layer's below
 * 1.2 %; a third scale would bring 1 % more. */
static void quantize(const float *x, int64_t n, int8_t *q, float *d, float *ds, int32_t *low, int32_t *high) {
    for (int64_t g = 0; g < n / KT_ACT_GROUP; g++, x += KT_ACT_GROUP, q += KT_ACT_GROUP) {
        uint32_t most = 0; /* bits of a magnitude order like the magnitude; inf and NaN come out on top */
        for (int i = 0; i < KT_ACT_GROUP; i++) {
            uint32_t b = kt_float_bits(x[i]) & 0x7fffffffu;
            most = b > most ? b : most;
        }
        const float amax = kt_bits_float(most);
        const int finite = most < 0x7f800000u;
        if (!finite || amax < 1e-36f) {
            memset(q, 0, KT_ACT_GROUP);
            ds[g] = d[g] = finite ? 0.0f : NAN;
            low[g] = high[g] = 0;
            continue;
        }
        const float most_code = 127.0f, less = 126.0f / 127.0f, factor = most_code / amax;
        struct kt_fit one, other;
        fit_group(x, factor, &one);
        fit_group(x, factor * less, &other);
        const int second = is_better(&other, less, &one);
        const struct kt_fit *best = second ? &other : &one;
        const float scale = best->product / best->square * (amax * (1.0f / (second ? most_code * less : most_code)));
        float moved[KT_ACT_GROUP];
        int32_t code[KT_ACT_GROUP], sum[2] = {0, 0};
        for (int h = 0; h < KT_ACT_GROUP / 16; h++) {
            const kt_float16 v = best->code[h] + KT_MAGIC;
            memcpy(moved + 16 * h, &v, sizeof v);
        }
        for (int i = 0; i < KT_ACT_GROUP; i++) code[i] = (int32_t)(kt_float_bits(moved[i]) - kt_float_bits(KT_MAGIC));
        for (int i = 0; i < KT_ACT_GROUP; i++) q[i] = (int8_t)code[i];
        for (int i = 0; i < 16; i++) sum[0] += code[i];
        for (int i = 16; i < KT_ACT_GROUP; i++) sum[1] += code[i];
        d[g] = scale;
        ds[g] = scale * (float)(sum[0] + sum[1]);
        low[g] = sum[0];
        high[g] = sum[1];
    }
}

static void to_bf16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = kt_f32_to_bf16(x[i]);
}

static void to_f16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = kt_f32_to_f16(x[i]);
}

/* e^x for finite results, clamped outside; relative error about 1e-7. A NaN stays a NaN. */
static inline float exp_clamped(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float t = x * 1.44269504f + KT_MAGIC, n = t - KT_MAGIC;
    float r = x - n * 0.693359375f; /* ln 2 in two parts: the first times n is exact */
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f; /* Cephes expf polynomial for e^r, |r| <= ln(2)/2 */
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * kt_bits_float((kt_float_bits(t) - kt_float_bits(KT_MAGIC) + 127u) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_clamped(-x)); }

/* NaN stays NaN in both. */
static inline float at_most(float x, float limit) { return x > limit ? limit : x; }
static inline float within(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

/* up[i] = f(x) * up[i], or f(x) of up[i] itself without a gate. */
#define GLU(f)                                           \
    do {                                                 \
        if (gate)                                        \
            for (int64_t i = 0; i < n; i++) {            \
                const float x = at_most(gate[i], limit); \
                up[i] = within(up[i], limit) * (f);      \
            }                                            \
        else                                             \
            for (int64_t i = 0; i < n; i++) {            \
                const float x = within(up[i], limit);    \
                up[i] = (f);                             \
            }                                            \
    } while (0)

static void activate(const struct kt_glu *glu, const float *gate, float *up, int64_t n) {
    const float limit = glu->limit, alpha = glu->alpha;
    switch (glu->activation) {
    case KT_SILU: GLU(x * sigmoid(x)); break;
    case KT_GELU: GLU(0.5f * x * (1.0f + erff(x * 0.70710678f))); break;
    case KT_GELU_TANH: /* 0.5 x (1 + tanh u) = x sigmoid(2u) */
        GLU(x * sigmoid(1.59576912f * (x + 0.044715f * (x * x * x))));
        break;
    case KT_RELU: GLU(x < 0.0f ? 0.0f : x); break;
    case KT_RELU2: GLU(x < 0.0f ? 0.0f : x * x); break;
    case KT_SWIGLU_OAI: /* needs a gate */
        for (int64_t i = 0; i < n; i++) {
            const float x = at_most(gate[i], limit);
            up[i] = (within(up[i], limit) + 1.0f) * (x * sigmoid(alpha * x));
        }
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
    k->add = add;
    k->scale_add = scale_add;
}

#endif
