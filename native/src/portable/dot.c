/* Decode in portable C: unpack a block, dot it, add it up. One row at a time. */
#include "../kernels.h"
#include "../quants.h"

void kt_fill_unpack_portable(struct kt_kernels *k);

/* One row of a quantized format: w = s*(u - z) - m against int8 activations with a scale per 32. */
static float dot_q8_row(int format, const uint8_t *w, int64_t cols, const struct kt_act *a) {
    const struct kt_traits *t = &kt_traits_table[format];
    struct kt_kernels k;
    kt_fill_unpack_portable(&k);
    uint8_t u[KT_QK];
    float scales[KT_QK / 16], mins[KT_QK / 16], total = 0;
    for (int64_t c = 0; c < cols; c += t->block, w += t->bytes) {
        k.unpack[format](w, t->block, u, scales, mins);
        for (int g = 0; g < t->block / t->group; g++) {
            int64_t first = c + g * t->group;
            int32_t sum = 0;
            for (int i = 0; i < t->group; i++) sum += (u[g * t->group + i] - t->zero) * a->q[first + i];
            total += a->d[first / KT_ACT_GROUP] * scales[g] * (float)sum;
            for (int m = g * t->group; t->min_group && m < (g + 1) * t->group; m += t->min_group) {
                int32_t codes = 0;
                for (int i = 0; i < t->min_group; i++) codes += a->q[c + m + i];
                total -= mins[m / t->min_group] * (a->d[first / KT_ACT_GROUP] * (float)codes);
            }
        }
    }
    return total;
}

static float dot_float_row(int format, const uint8_t *w, int64_t cols, const struct kt_act *a) {
    struct kt_kernels k;
    kt_fill_unpack_portable(&k);
    float v[64], part[16] = {0}, total = 0; /* 16 partial sums: vectorizable, and closer to the true sum */
    for (int64_t c = 0; c < cols; c += 64, w += 64 * kt_traits_table[format].bytes) {
        int n = cols - c < 64 ? (int)(cols - c) : 64;
        k.unpack[format](w, n, v, NULL, NULL);
        for (int i = 0; i < n; i++) part[i & 15] += v[i] * a->f[c + i];
    }
    for (int i = 0; i < 16; i++) total += part[i];
    return total;
}

#define DOT(name, row)                                                                                         \
    static void dot_##name(const uint8_t *w, size_t stride, int rows, int64_t cols, const struct kt_act *a,    \
                           float *out) {                                                                       \
        for (int r = 0; r < rows; r++) out[r] = row(KT_FMT_##name, w + (size_t)r * stride, cols, a);           \
    }
#define DOT_FLOAT(name) DOT(name, dot_float_row)
#define DOT_Q8(name) DOT(name, dot_q8_row)
#define FILL(name) k->dot[KT_FMT_##name] = dot_##name;

#define FLOATS(X) X(F32) X(F16) X(BF16)
#define QUANTIZED(X)                                      \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0)               \
    X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K)               \
    X(IQ1_S) X(IQ1_M) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S)       \
    X(IQ3_XXS) X(IQ3_S) X(IQ4_NL) X(IQ4_XS)               \
    X(TQ1_0) X(TQ2_0) X(MXFP4) X(NVFP4)

FLOATS(DOT_FLOAT)
QUANTIZED(DOT_Q8)

void kt_fill_dot_portable(struct kt_kernels *k) { FLOATS(FILL) QUANTIZED(FILL) }
