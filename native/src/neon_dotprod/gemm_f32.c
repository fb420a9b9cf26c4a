/* The fp32 panel GEMM for NEON: a tile (16 weight rows) is four registers; up to four tokens meet it, four columns of
 * a token in one register. */
#include "common.h"

enum { TOKENS = 4 };

/* One column of 16 rows: column i of the four in x. */
INLINE void column(const int N, const float *data, const float32x4_t x[TOKENS], const int i,
                   float32x4_t acc[TOKENS][4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const float32x4_t w = vld1q_f32(data + 4 * j);
        for (int n = 0; n < N; n++) acc[n][j] = fma_lane(acc[n][j], w, x[n], i);
    }
}

INLINE void micro(const int N, const struct kt_panel *p, int64_t k0, int64_t n_k, int tile, const float *const *x,
                  float *c, int64_t ldc, int add) {
    const float *data = (const float *)p->data + (tile * p->k + k0) * KT_TILE;
    float32x4_t acc[TOKENS][4], v[TOKENS];
    for (int n = 0; n < N; n++)
        for (int j = 0; j < 4; j++) acc[n][j] = vdupq_n_f32(0);
    int64_t k = 0;
    for (; k + 4 <= n_k; k += 4, data += 4 * KT_TILE) {
        for (int n = 0; n < N; n++) v[n] = vld1q_f32(x[n] + k);
        column(N, data, v, 0, acc);
        column(N, data + KT_TILE, v, 1, acc);
        column(N, data + 2 * KT_TILE, v, 2, acc);
        column(N, data + 3 * KT_TILE, v, 3, acc);
    }
    for (; k < n_k; k++, data += KT_TILE) {
        for (int n = 0; n < N; n++) v[n] = vdupq_n_f32(x[n][k]);
        column(N, data, v, 0, acc);
    }
    for (int n = 0; n < N; n++) store_tile(c + n * ldc + tile * KT_TILE, acc[n], add);
}

INLINE void tiles(const int N, const struct kt_panel *p, int64_t k, int64_t n_k, const float *const *x, float *c,
                  int64_t ldc, int add) {
    for (int tile = 0; tile < p->tiles; tile++) micro(N, p, k, n_k, tile, x, c, ldc, add);
}

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    const int64_t step = KT_CACHE_BYTES / 4;
    for (int64_t k = 0; k < p->k; k += step)
        for (int t = 0, n; t < tokens; t += n) {
            const int64_t n_k = p->k - k < step ? p->k - k : step;
            const float *x[TOKENS];
            n = tokens - t < TOKENS ? tokens - t : TOKENS;
            for (int i = 0; i < n; i++) x[i] = a->f + token[t + i] * a->stride + k0 + k;
            float *out = c + t * ldc;
            if (n == 4) tiles(4, p, k, n_k, x, out, ldc, add || k);
            else if (n == 3) tiles(3, p, k, n_k, x, out, ldc, add || k);
            else if (n == 2) tiles(2, p, k, n_k, x, out, ldc, add || k);
            else tiles(1, p, k, n_k, x, out, ldc, add || k);
        }
}

void kt_fill_gemm_f32_neon_dotprod(struct kt_kernels *k) { k->gemm_f32 = gemm_f32; }
