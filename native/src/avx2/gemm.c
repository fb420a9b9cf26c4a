/* The int8 panel GEMM for AVX2. A tile (16 weight rows) is two registers; two tokens at a time are what
 * sixteen registers hold without spilling. */
#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include "../../include/kt_native.h"
#include "common.h"

INLINE __m256i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

/* What the inner loop needs of a token. */
struct token_q8 {
    const int8_t *q;
    const float *d, *ds;
    const int32_t *low, *high;
};

/* `wide`: codes exceed 7 bits and have zero point 128, so they are made signed (see dot2_signed) and need no
 * correction; other codes stay unsigned and start from minus zero * sum. */
INLINE void micro_q8(const int N, const int group, const int min_group, const int wide, const struct kt_panel *p, int64_t k,
                     int64_t n_k, int tile, const struct token_q8 *x, float *c, int64_t ldc, int add) {
    const int64_t groups = n_k / group, at = (tile * (p->k / group) + k / group) * KT_TILE;
    const uint8_t *data = (const uint8_t *)(p->data + (tile * p->k + k) / 4 * KT_TILE);
    const float *scales = p->scales + at;
    const float *mins = min_group ? p->mins + (tile * (p->k / min_group) + k / min_group) * KT_TILE : NULL;
    __m256 acc[2][2];
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++, scales += KT_TILE) {
        __m256i sum[2][2];
        for (int n = 0; n < N; n++) {
            const int64_t ag = g * group / KT_ACT_GROUP;
            int32_t total = group == 16 ? (g & 1 ? x[n].high : x[n].low)[ag] : x[n].low[ag] + x[n].high[ag];
            sum[n][0] = sum[n][1] = _mm256_set1_epi32(wide ? 0 : -p->zero * total);
        }
        for (int j = 0; j < group / 4; j++, data += 64) {
            __m256i u[2] = {load256(data), load256(data + 32)};
            if (wide)
                for (int i = 0; i < 2; i++) u[i] = _mm256_xor_si256(u[i], _mm256_set1_epi8(-128));
            for (int n = 0; n < N; n++) {
                __m256i b = broadcast4(x[n].q + g * group + 4 * j);
                for (int i = 0; i < 2; i++) sum[n][i] = add4(sum[n][i], wide ? dot2_signed(u[i], b) : dot2(u[i], b));
            }
        }
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 2; i++) {
                const int64_t ag = g * group / KT_ACT_GROUP;
                __m256 s = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[n][i]), load_f32(scales + 8 * i));
                acc[n][i] = _mm256_fmadd_ps(s, _mm256_set1_ps(x[n].d[ag]), acc[n][i]);
            }
    }
    for (int64_t g = 0; min_group && g < n_k / min_group; g++, mins += KT_TILE)
        for (int n = 0; n < N; n++) {
            const int64_t ag = g * min_group / KT_ACT_GROUP;
            __m256 ds = _mm256_set1_ps(min_group == 32 ? x[n].ds[ag] : x[n].d[ag] * (float)(g & 1 ? x[n].high : x[n].low)[ag]);
            for (int i = 0; i < 2; i++) acc[n][i] = _mm256_fnmadd_ps(load_f32(mins + 8 * i), ds, acc[n][i]);
        }
    for (int n = 0; n < N; n++) store_tile(c + n * ldc + tile * KT_TILE, acc[n][0], acc[n][1], add);
}

INLINE void tiles_q8(const int N, const struct kt_panel *p, int64_t k, int64_t n_k, const struct token_q8 *x, float *c,
                     int64_t ldc, int add) {
    for (int tile = 0; tile < p->tiles; tile++) {
        if (p->group == 16) micro_q8(N, 16, 0, 0, p, k, n_k, tile, x, c, ldc, add);
        else if (p->min_group == 16) micro_q8(N, 32, 16, 0, p, k, n_k, tile, x, c, ldc, add);
        else if (p->min_group) micro_q8(N, 32, 32, 0, p, k, n_k, tile, x, c, ldc, add);
        else if (p->zero == 128) micro_q8(N, 32, 0, 1, p, k, n_k, tile, x, c, ldc, add);
        else micro_q8(N, 32, 0, 0, p, k, n_k, tile, x, c, ldc, add);
    }
}

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    for (int64_t k = 0; k < p->k; k += KT_CACHE_BYTES)
        for (int t = 0; t < tokens; t += 2) {
            const int64_t n_k = p->k - k < KT_CACHE_BYTES ? p->k - k : KT_CACHE_BYTES;
            struct token_q8 x[2];
            for (int n = 0; n < 2 && t + n < tokens; n++) {
                int64_t at = token[t + n] * a->stride + k0 + k;
                const int64_t g = at / KT_ACT_GROUP;
                x[n] = (struct token_q8){a->q + at, a->d + g, a->ds + g, a->low + g, a->high + g};
            }
            if (t + 1 < tokens) tiles_q8(2, p, k, n_k, x, c + t * ldc, ldc, add || k);
            else tiles_q8(1, p, k, n_k, x, c + t * ldc, ldc, add || k);
        }
}

/* ---- limits ----------------------------------------------------------------------------------------- */

static double peak(int kind, int64_t iterations) {
    if (kind == KT_PEAK_INT8) {
        __m256i acc[8], u = _mm256_set1_epi8(3), a = _mm256_set1_epi8(5);
        for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_si256();
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                acc[i] = add4(acc[i], dot2(u, a));
                __asm__("" : "+x"(u)); /* a new value each time, or products would leave the loop */
            }
        }
        for (int i = 0; i < 8; i++) __asm__ volatile("" : : "x"(acc[i]));
        return 8.0 * 64.0 * (double)iterations;
    }
    if (kind == KT_PEAK_F32) {
        __m256 acc[12], x = _mm256_set1_ps(1.5f), y = _mm256_set1_ps(1e-3f);
        for (int i = 0; i < 12; i++) acc[i] = _mm256_setzero_ps();
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) {
                acc[i] = _mm256_fmadd_ps(x, y, acc[i]);
            }
        }
        for (int i = 0; i < 12; i++) __asm__ volatile("" : : "x"(acc[i]));
        return 12.0 * 16.0 * (double)iterations;
    }
    return 0;
}

void KT_JOIN(kt_fill_gemm_, KT_ISA)(struct kt_kernels *k) {
    k->gemm_q8 = gemm_q8;
    k->peak = peak;
}
