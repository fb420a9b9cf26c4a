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
            if (t->has_min) total -= mins[g] * a->ds[first / KT_ACT_GROUP]; /* such formats have groups of 32 */
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

#define DOT(name, format, row)                                                                              \
    static void name(const uint8_t *w, size_t stride, int rows, int64_t cols, const struct kt_act *a, float *out) { \
        for (int r = 0; r < rows; r++) out[r] = row(format, w + (size_t)r * stride, cols, a);               \
    }
DOT(dot_f32, KT_FMT_F32, dot_float_row)
DOT(dot_f16, KT_FMT_F16, dot_float_row)
DOT(dot_bf16, KT_FMT_BF16, dot_float_row)
DOT(dot_q8_0, KT_FMT_Q8_0, dot_q8_row)
DOT(dot_q4_k, KT_FMT_Q4_K, dot_q8_row)
DOT(dot_q5_k, KT_FMT_Q5_K, dot_q8_row)
DOT(dot_q6_k, KT_FMT_Q6_K, dot_q8_row)

void kt_fill_dot_portable(struct kt_kernels *k) {
    k->dot[KT_FMT_F32] = dot_f32;
    k->dot[KT_FMT_F16] = dot_f16;
    k->dot[KT_FMT_BF16] = dot_bf16;
    k->dot[KT_FMT_Q8_0] = dot_q8_0;
    k->dot[KT_FMT_Q4_K] = dot_q4_k;
    k->dot[KT_FMT_Q5_K] = dot_q5_k;
    k->dot[KT_FMT_Q6_K] = dot_q6_k;
}
