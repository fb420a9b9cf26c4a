/* The bf16 panel GEMM: two tiles (32 weight rows) by up to six tokens, two columns an instruction.
 * Everything else of this instruction set is inherited from AVX-512 VNNI. */
#define KT_ISA avx512_bf16
#include "../../include/kt_native.h"
#include "../avx512/common.h"

enum {
    TOKENS = 6,
    PAIRS = KT_CACHE_BYTES / 4, /* of columns, a slice */
    GROUP_PAIRS = 16,           /* of columns that share a scale, and between two fetches of the next weights */
};

INLINE __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

INLINE __m512bh broadcast2(const uint16_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return as_bf16(_mm512_set1_epi32(v));
}

/* Pairs k .. k + n of a panel's columns meet up to six tokens. An odd last column is paired with a zero on both
 * sides. */
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    const uint16_t *x[TOKENS]; /* at pair k */
    float *c;
    int64_t ldc;
    int add;
};

/* sum[R tiles][N tokens] += pairs k .. k + n of the slice. */
INLINE void pairs(const int R, const int N, const struct slice *s, const uint32_t *data, int64_t tile_dwords, int64_t k,
                  const int64_t n, __m512 sum[2][TOKENS]) {
#pragma GCC unroll 4
    for (int64_t j = k; j < k + n; j++) {
        __m512bh w[2];
        for (int r = 0; r < R; r++) w[r] = as_bf16(_mm512_load_si512(data + j * KT_TILE + r * tile_dwords));
        for (int i = 0; i < N; i++) {
            __m512bh b = broadcast2(s->x[i] + 2 * j);
            for (int r = 0; r < R; r++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], w[r], b);
        }
    }
}

INLINE void clear(const int R, const int N, __m512 v[2][TOKENS]) {
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) v[r][n] = _mm512_setzero_ps();
}

/* c[N tokens][R tiles] (+)= the slice. `scaled`: a group's sums meet its scales. */
INLINE void micro(const int R, const int N, const int scaled, const struct slice *s, int tile) {
    const struct kt_panel *p = s->p;
    const int64_t tile_dwords = (p->k + 1) / 2 * KT_TILE, tile_scales = scaled ? (p->k + 31) / 32 * KT_TILE : 0;
    const uint32_t *data = p->data + tile * tile_dwords + s->k * KT_TILE;
    const float *scales = scaled ? p->scales + tile * tile_scales + s->k / GROUP_PAIRS * KT_TILE : NULL;
    __m512 acc[2][TOKENS], sum[2][TOKENS];
    clear(R, N, acc);
    for (int64_t k = 0; k < s->n; k += GROUP_PAIRS) {
        kt_ahead_step(p->ahead);
        if (scaled) clear(R, N, sum);
        if (s->n - k >= GROUP_PAIRS) pairs(R, N, s, data, tile_dwords, k, GROUP_PAIRS, scaled ? sum : acc);
        else pairs(R, N, s, data, tile_dwords, k, s->n - k, scaled ? sum : acc);
        for (int r = 0; scaled && r < R; r++) {
            const __m512 scale = _mm512_load_ps(scales + k / GROUP_PAIRS * KT_TILE + r * tile_scales);
            for (int n = 0; n < N; n++) acc[r][n] = _mm512_fmadd_ps(sum[r][n], scale, acc[r][n]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) store_tile(s->c + n * s->ldc + (tile + r) * KT_TILE, acc[r][n], s->add);
}

INLINE void tiles_of(const int N, const int scaled, const struct slice *s) {
    int tile = 0;
    for (; tile + 2 <= s->p->tiles; tile += 2) micro(2, N, scaled, s, tile);
    if (tile < s->p->tiles) micro(1, N, scaled, s, tile);
}

#define TOKENS_OF(n)                                                                    \
    static void tokens##n(const struct slice *s) {                                      \
        if (s->p->group) tiles_of(n, 1, s);                                             \
        else tiles_of(n, 0, s);                                                         \
    }
TOKENS_OF(1) TOKENS_OF(2) TOKENS_OF(3) TOKENS_OF(4) TOKENS_OF(5) TOKENS_OF(6)

static void gemm_bf16(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                      float *c, int64_t ldc, int add) {
    static void (*const meet[TOKENS])(const struct slice *s) = {tokens1, tokens2, tokens3, tokens4, tokens5, tokens6};
    const int64_t all = (p->k + 1) / 2;
    const int blocks = (tokens + TOKENS - 1) / TOKENS; /* of equal size, or one less: seven tokens are 4 + 3 */
    kt_ahead_spread(p->ahead, (int64_t)blocks * ((all + GROUP_PAIRS - 1) / GROUP_PAIRS) * ((p->tiles + 1) / 2));
    for (int64_t k = 0; k < all; k += PAIRS)
        for (int b = 0, t = 0; b < blocks; b++) {
            const int n = (tokens - t + blocks - b - 1) / (blocks - b);
            struct slice s = {
                .p = p, .k = k, .n = all - k < PAIRS ? all - k : PAIRS, .c = c + t * ldc, .ldc = ldc, .add = add || k};
            for (int i = 0; i < n; i++) s.x[i] = a->h + token[t + i] * a->stride + k0 + 2 * k;
            for (int i = n; i < 2 * n && t + i < tokens; i++) /* what the next block multiplies */
                for (int j = 0; j < 2 * PAIRS; j += 32)
                    _mm_prefetch((const char *)(a->h + token[t + i] * a->stride + k0 + 2 * k + j), _MM_HINT_T0);
            meet[n - 1](&s);
            t += n;
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
