/* The fp32 panel GEMM for AVX-512: two tiles (32 weight rows) by up to six tokens. */
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

INLINE void columns(const int R, const int N, const struct slice *s, const float *data, int64_t k, const int64_t n,
                    __m512 acc[2][TOKENS]) {
#pragma GCC unroll 4
    for (int64_t j = k; j < k + n; j++) {
        __m512 w[2];
        for (int r = 0; r < R; r++) w[r] = _mm512_load_ps(data + (j + r * s->p->k) * KT_TILE);
        for (int i = 0; i < N; i++) {
            __m512 b = _mm512_set1_ps(s->x[i][j]);
            for (int r = 0; r < R; r++) acc[r][i] = _mm512_fmadd_ps(w[r], b, acc[r][i]);
        }
    }
}

INLINE void micro_f32(const int R, const int N, const struct slice *s, int tile) {
    const float *data = (const float *)s->p->data + (tile * s->p->k + s->k) * KT_TILE;
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < s->n; k += FETCH_COLUMNS) {
        kt_ahead_step(s->p->ahead);
        if (s->n - k >= FETCH_COLUMNS) columns(R, N, s, data, k, FETCH_COLUMNS, acc);
        else columns(R, N, s, data, k, s->n - k, acc);
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) store_tile(s->c + n * s->ldc + (tile + r) * KT_TILE, acc[r][n], s->add);
}

INLINE void tiles_f32(const int N, const struct slice *s) {
    int tile = 0;
    for (; tile + 2 <= s->p->tiles; tile += 2) micro_f32(2, N, s, tile);
    if (tile < s->p->tiles) micro_f32(1, N, s, tile);
}

static void tokens6(const struct slice *s) { tiles_f32(6, s); }
static void tokens5(const struct slice *s) { tiles_f32(5, s); }
static void tokens4(const struct slice *s) { tiles_f32(4, s); }
static void tokens3(const struct slice *s) { tiles_f32(3, s); }
static void tokens2(const struct slice *s) { tiles_f32(2, s); }
static void tokens1(const struct slice *s) { tiles_f32(1, s); }

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    static void (*const meet[TOKENS])(const struct slice *s) = {tokens1, tokens2, tokens3, tokens4, tokens5, tokens6};
    const int blocks = (tokens + TOKENS - 1) / TOKENS; /* of equal size, or one less: seven tokens are 4 + 3 */
    kt_ahead_spread(p->ahead, (int64_t)blocks * ((p->k + FETCH_COLUMNS - 1) / FETCH_COLUMNS) * ((p->tiles + 1) / 2));
    for (int64_t k = 0; k < p->k; k += COLUMNS)
        for (int b = 0, t = 0; b < blocks; b++) {
            const int n = (tokens - t + blocks - b - 1) / (blocks - b);
            struct slice s = {.p = p, .k = k, .n = p->k - k < COLUMNS ? p->k - k : COLUMNS,
                              .c = c + t * ldc, .ldc = ldc, .add = add || k};
            for (int i = 0; i < n; i++) s.x[i] = a->f + token[t + i] * a->stride + k0 + k;
            for (int i = n; i < 2 * n && t + i < tokens; i++) /* what the next block multiplies */
                for (int j = 0; j < COLUMNS; j += 16)
                    _mm_prefetch((const char *)(a->f + token[t + i] * a->stride + k0 + k + j), _MM_HINT_T0);
            meet[n - 1](&s);
            t += n;
        }
}

void kt_fill_gemm_f32_avx512(struct kt_kernels *k) { k->gemm_f32 = gemm_f32; }
