/* avx2/transpose4.h: between rows and columns, for templates/encode.h. */
#ifndef KT_TRANSPOSE4_H
#define KT_TRANSPOSE4_H

#include <immintrin.h>

/* 4x4 numbers of 32 bits, rows becoming columns; `from` and `to` are 4 bytes each from row to row. */
static inline void transpose4(const void *in, int from, void *out, int to) {
    const float *p = in;
    float *q = out;
    __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + from);
    __m128 c = _mm_loadu_ps(p + 2 * from), d = _mm_loadu_ps(p + 3 * from);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(q, a);
    _mm_storeu_ps(q + to, b);
    _mm_storeu_ps(q + 2 * to, c);
    _mm_storeu_ps(q + 3 * to, d);
}

#endif
