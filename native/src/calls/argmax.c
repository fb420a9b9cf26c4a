/* argmax.c: the largest of many numbers, such as the logits of a vocabulary. One thread: it reads less than a megabyte. */
#include "../../include/kt_native.h"

#include <math.h>

#include "../matmul/matmul.h"

enum { PIECE = 1024, LANES = 16 /* independent, so that compilers keep them in vector registers */ };

/* The largest of PIECE numbers; NaN where one is. */
static float largest(const float *x) {
    float most[LANES], sum[LANES] = {0};
    for (int j = 0; j < LANES; j++) most[j] = x[j];
    for (int i = 0; i < PIECE; i += LANES)
        for (int j = 0; j < LANES; j++) {
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
            sum[j] += x[i + j] * 0.0f; /* NaN of an infinity, too: then each is looked at */
        }
    float all = 0.0f;
    for (int j = 0; j < LANES; j++) {
        all += sum[j];
        most[0] = most[j] > most[0] ? most[j] : most[0];
    }
    for (int i = 0; all != 0.0f && i < PIECE; i++)
        if (isnan(x[i])) return x[i];
    return most[0];
}

int kt_argmax(const void *x, int dtype, int64_t count, int64_t *at) {
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (count < 1 || count > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (!x || !at) return KT_ERR_NULL;
    const struct kt_kernels *k = kt_kernels();
    float piece[PIECE], best = -INFINITY;
    *at = 0;
    for (int64_t from = 0; from < count; from += PIECE) {
        const int64_t n = kt_min(count - from, PIECE);
        kt_load_row(k, x, dtype, from, n, piece);
        for (int64_t i = n; i < PIECE; i++) piece[i] = -INFINITY;
        const float most = largest(piece);
        if (!(most > best) && !isnan(most)) continue;
        best = most;
        *at = from;
        while (isnan(most) ? !isnan(piece[*at - from]) : piece[*at - from] != most) ++*at;
        if (isnan(most)) break;
    }
    return KT_OK;
}
