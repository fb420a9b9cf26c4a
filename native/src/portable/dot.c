/* Decode of floats in portable C, one row at a time. Quantized formats decode through tiles. */
#include "../kernels.h"
#include "../quants.h"

void kt_fill_unpack_portable(struct kt_kernels *k);

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

#define DOT(name)                                                                                                        \
    static void dot_##name(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, float *out) {     \
        for (int r = 0; r < rows; r++)                                                                                   \
            out[r] = dot_float_row(KT_FMT_##name, w->data + (size_t)(first + r) * w->stride, w->cols, a);                \
    }
DOT(F32)
DOT(F16)
DOT(BF16)

void kt_fill_dot_portable(struct kt_kernels *k) {
    k->dot[KT_FMT_F32] = dot_F32;
    k->dot[KT_FMT_F16] = dot_F16;
    k->dot[KT_FMT_BF16] = dot_BF16;
}
