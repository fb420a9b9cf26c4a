/* The bf16 panel GEMM: two tiles (32 weight rows) by six tokens, two columns an instruction.
 * Everything else of this instruction set is inherited from AVX-512 VNNI. */
#define KT_ISA avx512_bf16
#include "../../include/kt_native.h"
#include "../avx512/common.h"

enum { TOKENS = 6 };

INLINE __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

INLINE __m512bh broadcast2(const uint16_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return as_bf16(_mm512_set1_epi32(v));
}

INLINE void micro(const int R, const int N, const struct kt_panel *p, int tile, const uint16_t *const *q, float *c,
                  int64_t ldc, int add) {
    const int64_t pairs = (p->k + 1) / 2; /* an odd last column is paired with a zero on both sides */
    const uint32_t *data = p->data + tile * pairs * KT_TILE;
    const uint16_t *x[TOKENS];
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++) {
        x[n] = q[n];
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh w[2];
        for (int r = 0; r < R; r++) w[r] = as_bf16(_mm512_load_si512(data + (k + r * pairs) * KT_TILE));
        for (int n = 0; n < N; n++) {
            __m512bh b = broadcast2(x[n] + 2 * k);
            for (int r = 0; r < R; r++) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], w[r], b);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) {
            float *out = c + n * ldc + (tile + r) * KT_TILE;
            _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), acc[r][n]) : acc[r][n]);
        }
}

INLINE void tiles(const int N, const struct kt_panel *p, const uint16_t *const *x, float *c, int64_t ldc, int add) {
    int tile = 0;
    for (; tile + 2 <= p->tiles; tile += 2) micro(2, N, p, tile, x, c, ldc, add);
    if (tile < p->tiles) micro(1, N, p, tile, x, c, ldc, add);
}

static void gemm_bf16(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                      float *c, int64_t ldc, int add) {
    const uint16_t *x[TOKENS];
    while (tokens > 0) {
        int n = tokens >= 6 ? 6 : tokens >= 2 ? 2 : 1;
        for (int i = 0; i < n; i++) x[i] = a->h + token[i] * a->stride + k0;
        if (n == 6) tiles(6, p, x, c, ldc, add);
        else if (n == 2) tiles(2, p, x, c, ldc, add);
        else tiles(1, p, x, c, ldc, add);
        tokens -= n;
        token += n;
        c += n * ldc;
    }
}

static double (*peak_below)(int kind, int64_t iterations);

static double peak(int kind, int64_t iterations) {
    if (kind != KT_PEAK_BF16) return peak_below(kind, iterations);
    __m512 acc[12];
    __m512bh x = as_bf16(_mm512_set1_epi16(0x3f80)), y = as_bf16(_mm512_set1_epi16(0x3c00));
    for (int i = 0; i < 12; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            acc[i] = _mm512_dpbf16_ps(acc[i], x, y);
        }
    }
    for (int i = 0; i < 12; i++) __asm__ volatile("" : : "v"(acc[i]));
    return 12.0 * 64.0 * (double)iterations;
}

void kt_fill_gemm_avx512_bf16(struct kt_kernels *k) {
    k->gemm_bf16 = gemm_bf16;
    peak_below = k->peak;
    k->peak = peak;
}
