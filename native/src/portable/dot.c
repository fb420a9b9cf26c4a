/* Decode of floats in portable C, one row at a time. Quantized formats decode through tiles. */
#include "../kernels.h"
#include "../formats/quants.h"

void kt_fill_unpack_portable(struct kt_kernels *k);

/* 16 partial sums: they become vectors, and are closer to the true sum than one. */
static float dot_float_row(kt_unpack_fn unpack, int bytes, const uint8_t *w, int64_t cols, const float *x) {
    enum { PIECE = 64, SUMS = 16 };
    float v[PIECE], sum[SUMS] = {0}, total = 0;
    int64_t c = 0;
    for (; c + PIECE <= cols; c += PIECE, x += PIECE, w += PIECE * bytes) {
        unpack(w, PIECE, v, NULL, NULL);
        _Pragma("GCC unroll 1") for (int s = 0; s < SUMS; s++)
            sum[s] += v[s] * x[s] + v[s + 16] * x[s + 16] + v[s + 32] * x[s + 32] + v[s + 48] * x[s + 48];
    }
    unpack(w, cols - c, v, NULL, NULL);
    for (int i = 0; c + i < cols; i++) sum[i % SUMS] += v[i] * x[i];
    for (int s = 0; s < SUMS; s++) total += sum[s];
    return total;
}

#define DOT(name)                                                                                                    \
    static void dot_##name(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,   \
                           size_t ahead, float *out, int64_t ldc) {                                                  \
        struct kt_kernels k;                                                                                         \
        (void)ahead;                                                                                                 \
        kt_fill_unpack_portable(&k);                                                                                 \
        for (int i = 0; i < tokens; i++)                                                                             \
            for (int r = 0; r < rows; r++)                                                                           \
                out[i * ldc + r] = dot_float_row(k.unpack[KT_FMT_##name], w->traits->bytes,                          \
                                                 w->data + (size_t)(first + r) * w->stride, w->cols, a[i].f);        \
    }
DOT(F32)
DOT(F16)
DOT(BF16)

void kt_fill_dot_portable(struct kt_kernels *k) {
    k->dot[KT_FMT_F32] = dot_F32;
    k->dot[KT_FMT_F16] = dot_F16;
    k->dot[KT_FMT_BF16] = dot_BF16;
}
