/* The fp32 panel GEMM for AVX2: a tile (16 weight rows, two registers) by up to six tokens, which sixteen registers
 * hold. */
#include "common.h"

enum {
    TOKENS = 6,
    COLUMNS = KT_CACHE_BYTES / 4, /* a slice */
    FETCH_COLUMNS = 16,           /* between two fetches of the next weights */
};

/* Columns k .. k + n of a panel meet up to six tokens. */
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    const float *x[TOKENS]; /* at column k */
    float *c;
    int64_t ldc;
    int add;
};

INLINE void micro_f32(const int N, const struct slice *s, int tile) {
    const float *data = (const float *)s->p->data + (tile * s->p->k + s->k) * KT_TILE;
    __m256 acc[TOKENS][2];
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < s->n; k++, data += KT_TILE) {
        if (k % FETCH_COLUMNS == 0) kt_ahead_step(s->p->ahead);
        const __m256 low = load_f32(data), high = load_f32(data + 8);
        for (int n = 0; n < N; n++) {
            const __m256 b = _mm256_set1_ps(s->x[n][k]);
            acc[n][0] = _mm256_fmadd_ps(low, b, acc[n][0]);
            acc[n][1] = _mm256_fmadd_ps(high, b, acc[n][1]);
        }
    }
    for (int n = 0; n < N; n++) store_tile(s->c + n * s->ldc + tile * KT_TILE, acc[n][0], acc[n][1], s->add);
}

#define TOKENS_OF(n)                                                        \
    static void tokens##n(const struct slice *s) {                          \
        for (int tile = 0; tile < s->p->tiles; tile++) micro_f32(n, s, tile); \
    }
TOKENS_OF(1) TOKENS_OF(2) TOKENS_OF(3) TOKENS_OF(4) TOKENS_OF(5) TOKENS_OF(6)

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    static void (*const meet[TOKENS])(const struct slice *s) = {tokens1, tokens2, tokens3, tokens4, tokens5, tokens6};
    const int blocks = (tokens + TOKENS - 1) / TOKENS; /* of equal size, or one less: seven tokens are 4 + 3 */
    kt_ahead_spread(p->ahead, (int64_t)blocks * ((p->k + FETCH_COLUMNS - 1) / FETCH_COLUMNS) * p->tiles);
    for (int64_t k = 0; k < p->k; k += COLUMNS)
        for (int b = 0, t = 0; b < blocks; b++) {
            const int n = (tokens - t + blocks - b - 1) / (blocks - b);
            struct slice s = {.p = p, .k = k, .n = p->k - k < COLUMNS ? p->k - k : COLUMNS,
                              .c = c + t * ldc, .ldc = ldc, .add = add || k};
            for (int i = 0; i < n; i++) s.x[i] = a->f + token[t + i] * a->stride + k0 + k;
            meet[n - 1](&s);
            t += n;
        }
}

void kt_fill_gemm_f32_avx2(struct kt_kernels *k) { k->gemm_f32 = gemm_f32; }
