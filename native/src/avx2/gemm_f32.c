/* The fp32 panel GEMM for AVX2: a tile (16 weight rows, two registers) by six tokens, which sixteen registers hold. */
#include "common.h"

INLINE void micro_f32(const int N, const struct kt_panel *p, int64_t k0, int64_t n_k, int tile, const float *const *x,
                      float *c, int64_t ldc, int add) {
    const float *data = (const float *)p->data + (tile * p->k + k0) * KT_TILE;
    __m256 acc[6][2];
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < n_k; k++, data += KT_TILE) {
        __m256 low = load_f32(data), high = load_f32(data + 8);
        for (int n = 0; n < N; n++) {
            __m256 b = _mm256_set1_ps(x[n][k]);
            acc[n][0] = _mm256_fmadd_ps(low, b, acc[n][0]);
            acc[n][1] = _mm256_fmadd_ps(high, b, acc[n][1]);
        }
    }
    for (int n = 0; n < N; n++) store_tile(c + n * ldc + tile * KT_TILE, acc[n][0], acc[n][1], add);
}

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    const int64_t step = KT_CACHE_BYTES / 4;
    for (int64_t k = 0; k < p->k; k += step)
        for (int t = 0, n; t < tokens; t += n) {
            const int64_t n_k = p->k - k < step ? p->k - k : step;
            const float *x[6];
            n = tokens - t >= 6 ? 6 : tokens - t >= 2 ? 2 : 1;
            for (int i = 0; i < n; i++) x[i] = a->f + token[t + i] * a->stride + k0 + k;
            for (int tile = 0; tile < p->tiles; tile++) {
                if (n == 6) micro_f32(6, p, k, n_k, tile, x, c + t * ldc, ldc, add || k);
                else if (n == 2) micro_f32(2, p, k, n_k, tile, x, c + t * ldc, ldc, add || k);
                else micro_f32(1, p, k, n_k, tile, x, c + t * ldc, ldc, add || k);
            }
        }
}

void kt_fill_gemm_f32_avx2(struct kt_kernels *k) { k->gemm_f32 = gemm_f32; }
