/* The fp32 panel GEMM for AVX-512: two tiles (32 weight rows) by six tokens. */
#include "common.h"

enum { TOKENS = 6 };

INLINE void micro_f32(const int R, const int N, const struct kt_panel *p, int64_t k0, int64_t n_k, int tile,
                      const float *const *x, float *c, int64_t ldc, int add) {
    const float *data = (const float *)p->data + (tile * p->k + k0) * KT_TILE;
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n_k; k++) {
        __m512 w[2];
        for (int r = 0; r < R; r++) w[r] = _mm512_load_ps(data + (k + r * p->k) * KT_TILE);
        for (int n = 0; n < N; n++) {
            __m512 b = _mm512_set1_ps(x[n][k]);
            for (int r = 0; r < R; r++) acc[r][n] = _mm512_fmadd_ps(w[r], b, acc[r][n]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) store_tile(c + n * ldc + (tile + r) * KT_TILE, acc[r][n], add);
}

INLINE void tiles_f32(const int N, const struct kt_panel *p, int64_t k, int64_t n_k, const float *const *x, float *c,
                      int64_t ldc, int add) {
    int tile = 0;
    for (; tile + 2 <= p->tiles; tile += 2) micro_f32(2, N, p, k, n_k, tile, x, c, ldc, add);
    if (tile < p->tiles) micro_f32(1, N, p, k, n_k, tile, x, c, ldc, add);
}

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    const int64_t step = KT_CACHE_BYTES / 4;
    for (int64_t k = 0; k < p->k; k += step)
        for (int t = 0, n; t < tokens; t += n) {
            const int64_t n_k = p->k - k < step ? p->k - k : step;
            const float *x[TOKENS];
            n = tokens - t >= 6 ? 6 : tokens - t >= 2 ? 2 : 1;
            for (int i = 0; i < n; i++) x[i] = a->f + token[t + i] * a->stride + k0 + k;
            if (n == 6) tiles_f32(6, p, k, n_k, x, c + t * ldc, ldc, add || k);
            else if (n == 2) tiles_f32(2, p, k, n_k, x, c + t * ldc, ldc, add || k);
            else tiles_f32(1, p, k, n_k, x, c + t * ldc, ldc, add || k);
        }
}

void kt_fill_gemm_f32_avx512(struct kt_kernels *k) { k->gemm_f32 = gemm_f32; }
