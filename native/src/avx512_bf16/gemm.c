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

/* first, count: pairs of columns. An odd last column is paired with a zero on both sides. */
INLINE void micro(const int R, const int N, const struct kt_panel *p, int64_t first, int64_t count, int tile,
                  const uint16_t *const *x, float *c, int64_t ldc, int add) {
    const int64_t pairs = (p->k + 1) / 2;
    const uint32_t *data = p->data + (tile * pairs + first) * KT_TILE;
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k++) {
        __m512bh w[2];
        for (int r = 0; r < R; r++) w[r] = as_bf16(_mm512_load_si512(data + (k + r * pairs) * KT_TILE));
        for (int n = 0; n < N; n++) {
            __m512bh b = broadcast2(x[n] + 2 * k);
            for (int r = 0; r < R; r++) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], w[r], b);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) store_tile(c + n * ldc + (tile + r) * KT_TILE, acc[r][n], add);
}

INLINE void tiles(const int N, const struct kt_panel *p, int64_t first, int64_t count, const uint16_t *const *x, float *c,
                  int64_t ldc, int add) {
    int tile = 0;
    for (; tile + 2 <= p->tiles; tile += 2) micro(2, N, p, first, count, tile, x, c, ldc, add);
    if (tile < p->tiles) micro(1, N, p, first, count, tile, x, c, ldc, add);
}

static void gemm_bf16(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                      float *c, int64_t ldc, int add) {
    const int64_t pairs = (p->k + 1) / 2, step = KT_CACHE_BYTES / 4;
    for (int64_t k = 0; k < pairs; k += step)
        for (int t = 0, n; t < tokens; t += n) {
            const int64_t count = pairs - k < step ? pairs - k : step;
            const uint16_t *x[TOKENS];
            n = tokens - t >= 6 ? 6 : tokens - t >= 2 ? 2 : 1;
            for (int i = 0; i < n; i++) x[i] = a->h + token[t + i] * a->stride + k0 + 2 * k;
            if (n == 6) tiles(6, p, k, count, x, c + t * ldc, ldc, add || k);
            else if (n == 2) tiles(2, p, k, count, x, c + t * ldc, ldc, add || k);
            else tiles(1, p, k, count, x, c + t * ldc, ldc, add || k);
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
