/* act_impl.h: the kernels that work on activations, in plain C that the compiler vectorizes.
 *
 * Every instruction set compiles this same text (src/<isa>/act.c), so their results agree bit for bit:
 * each operation below is one IEEE operation, no contraction (-ffp-contract=off), no float-to-int
 * conversion (undefined for NaN), only the addition of 1.5*2^23 and a look at the bits. */
#ifndef KT_ACT_IMPL_H
#define KT_ACT_IMPL_H

#include <math.h>

#include "../include/kt_native.h"
#include "kernels.h"
#include "quants.h"

#define KT_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */

static void quantize(const float *x, int64_t n, int8_t *q, float *d, float *ds, int32_t *low, int32_t *high) {
    for (int64_t g = 0; g < n / KT_ACT_GROUP; g++, x += KT_ACT_GROUP, q += KT_ACT_GROUP) {
        uint32_t most = 0; /* bits of a magnitude order like the magnitude; inf and NaN come out on top */
        for (int i = 0; i < KT_ACT_GROUP; i++) {
            uint32_t b = kt_float_bits(x[i]) & 0x7fffffffu;
            most = b > most ? b : most;
        }
        float amax = kt_bits_float(most);
        int finite = most < 0x7f800000u, zero = amax < 1e-36f;
        float inverse = finite && !zero ? 127.0f / amax : 0.0f;
        int32_t code[KT_ACT_GROUP], sum[2] = {0, 0};
        if (!finite || zero) {
            memset(code, 0, sizeof code);
        } else {
            for (int i = 0; i < KT_ACT_GROUP; i++)
                code[i] = (int32_t)(kt_float_bits(x[i] * inverse + KT_MAGIC) - kt_float_bits(KT_MAGIC));
        }
        for (int i = 0; i < KT_ACT_GROUP; i++) q[i] = (int8_t)code[i];
        for (int i = 0; i < 16; i++) sum[0] += code[i];
        for (int i = 16; i < KT_ACT_GROUP; i++) sum[1] += code[i];
        d[g] = !finite ? NAN : zero ? 0.0f : amax / 127.0f;
        ds[g] = d[g] * (float)(sum[0] + sum[1]);
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
