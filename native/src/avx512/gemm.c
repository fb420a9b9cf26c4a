/* The panel GEMMs for AVX-512. Two tiles (32 weight rows) meet up to six tokens: twelve accumulators hide the
 * latency of the multiply-add, and each broadcast activation serves two tiles. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "../../include/kt_native.h"
#include "common.h"

enum { TOKENS = 6 };

/* What a group of columns needs to know of six tokens, gathered once for all tiles of a panel. */
struct side {
    int32_t start[TOKENS]; /* minus zero point times sum of codes */
    float d[TOKENS], ds[TOKENS];
};

static void gather_side(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int n, int64_t k0,
                        struct side *side) {
#ifdef __AVX512VNNI__
    const int zero = p->zero;
#else
    const int zero = p->zero == 128 ? 0 : p->zero; /* codes of 8 bits are made signed instead: see step */
#endif
    const int64_t groups = p->k / p->group;
    for (int i = 0; i < n; i++) {
        const int64_t at = token[i] * a->stride + k0;
        const float *d = a->d + at / 32, *ds = a->ds + at / 32;
        const int32_t *sum = a->sum16 + at / 16;
        if (p->group == 32)
            for (int64_t g = 0; g < groups; g++) {
                side[g].start[i] = -zero * (sum[2 * g] + sum[2 * g + 1]);
                side[g].d[i] = d[g];
                side[g].ds[i] = ds[g];
            }
        else
            for (int64_t g = 0; g < groups; g++) {
                side[g].start[i] = -zero * sum[g];
                side[g].d[i] = d[g / 2];
                side[g].ds[i] = 0; /* formats with groups of 16 have no min yet */
            }
    }
}

INLINE __m512i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

/* c[N tokens][R tiles] (+)= all groups of the panel. `wide`: codes exceed 7 bits (their zero point is 128). */
INLINE void micro_q8(const int R, const int N, const int group, const int has_min, const int wide,
                     const struct kt_panel *p, int tile, const int8_t *const *q, const struct side *side, float *c,
                     int64_t ldc, int add) {
    const int64_t groups = p->k / group;
    const uint32_t *data = p->data + tile * (p->k / 4) * KT_TILE;
    const float *scales = p->scales + tile * groups * KT_TILE, *mins = has_min ? p->mins + tile * groups * KT_TILE : NULL;
    const int8_t *x[TOKENS];
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++) {
        x[n] = q[n];
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < groups; g++) {
        __m512i sum[2][TOKENS];
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) sum[r][n] = _mm512_set1_epi32(side[g].start[n]);
#pragma GCC unroll 8
        for (int j = 0; j < group / 4; j++) {
            __m512i u[2];
            for (int r = 0; r < R; r++) u[r] = _mm512_load_si512(data + j * KT_TILE + r * (p->k / 4) * KT_TILE);
            for (int n = 0; n < N; n++) {
                __m512i b = broadcast4(x[n] + 4 * j);
                for (int r = 0; r < R; r++)
                    sum[r][n] = wide ? dot4_signed(sum[r][n], _mm512_xor_si512(u[r], _mm512_set1_epi8(-128)), b)
                                     : dot4(sum[r][n], u[r], b);
            }
        }
        for (int n = 0; n < N; n++) x[n] += group;
        data += group / 4 * KT_TILE;
        for (int r = 0; r < R; r++) {
            __m512 s = _mm512_load_ps(scales + (r * groups + g) * KT_TILE);
            for (int n = 0; n < N; n++)
                acc[r][n] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][n]), s),
                                            _mm512_set1_ps(side[g].d[n]), acc[r][n]);
            if (!has_min) continue;
            __m512 m = _mm512_load_ps(mins + (r * groups + g) * KT_TILE);
            for (int n = 0; n < N; n++) acc[r][n] = _mm512_fnmadd_ps(m, _mm512_set1_ps(side[g].ds[n]), acc[r][n]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) {
            float *out = c + n * ldc + (tile + r) * KT_TILE;
            _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), acc[r][n]) : acc[r][n]);
        }
}

#ifdef __AVX512VNNI__
#define WIDE(p) 0
#else
#define WIDE(p) ((p)->zero == 128)
#endif

/* All tiles of the panel for N tokens, in one of the few variants that exist. */
#define VARIANT(group, has_min, wide)                                                             \
    do {                                                                                          \
        int tile = 0;                                                                             \
        for (; tile + 2 <= p->tiles; tile += 2)                                                   \
            micro_q8(2, N, group, has_min, wide, p, tile, q, side, c, ldc, add);                  \
        if (tile < p->tiles) micro_q8(1, N, group, has_min, wide, p, tile, q, side, c, ldc, add); \
    } while (0)

INLINE void tiles_q8(const int N, const struct kt_panel *p, const int8_t *const *q, const struct side *side, float *c,
                     int64_t ldc, int add) {
    if (p->group == 16)
        VARIANT(16, 0, 0);
    else if (p->mins)
        VARIANT(32, 1, 0);
    else if (WIDE(p))
        VARIANT(32, 0, 1);
    else
        VARIANT(32, 0, 0);
}

/* Six tokens at a time, then two, then one: not every remainder is worth its own code. */
static void tokens6(const struct kt_panel *p, const int8_t *const *q, const struct side *s, float *c, int64_t ldc, int add) {
    tiles_q8(6, p, q, s, c, ldc, add);
}
static void tokens4(const struct kt_panel *p, const int8_t *const *q, const struct side *s, float *c, int64_t ldc, int add) {
    tiles_q8(4, p, q, s, c, ldc, add);
}
static void tokens2(const struct kt_panel *p, const int8_t *const *q, const struct side *s, float *c, int64_t ldc, int add) {
    tiles_q8(2, p, q, s, c, ldc, add);
}
static void tokens1(const struct kt_panel *p, const int8_t *const *q, const struct side *s, float *c, int64_t ldc, int add) {
    tiles_q8(1, p, q, s, c, ldc, add);
}

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    struct side side[KT_MAX_GROUPS];
    const int8_t *q[TOKENS];
    while (tokens > 0) {
        int n = tokens >= 6 ? 6 : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        gather_side(p, a, token, n, k0, side);
        for (int i = 0; i < n; i++) q[i] = a->q + token[i] * a->stride + k0;
        (n == 6 ? tokens6 : n == 4 ? tokens4 : n == 2 ? tokens2 : tokens1)(p, q, side, c, ldc, add);
        tokens -= n;
        token += n;
        c += n * ldc;
    }
}

/* ---- fp32 ------------------------------------------------------------------------------------------- */

INLINE void micro_f32(const int R, const int N, const struct kt_panel *p, int tile, const float *const *q, float *c,
                      int64_t ldc, int add) {
    const float *data = (const float *)p->data + tile * p->k * KT_TILE;
    const float *x[TOKENS];
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++) {
        x[n] = q[n];
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < p->k; k++) {
        __m512 w[2];
        for (int r = 0; r < R; r++) w[r] = _mm512_load_ps(data + (k + r * p->k) * KT_TILE);
        for (int n = 0; n < N; n++) {
            __m512 b = _mm512_set1_ps(x[n][k]);
            for (int r = 0; r < R; r++) acc[r][n] = _mm512_fmadd_ps(w[r], b, acc[r][n]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) {
            float *out = c + n * ldc + (tile + r) * KT_TILE;
            _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), acc[r][n]) : acc[r][n]);
        }
}

INLINE void tiles_f32(const int N, const struct kt_panel *p, const float *const *x, float *c, int64_t ldc, int add) {
    int tile = 0;
    for (; tile + 2 <= p->tiles; tile += 2) micro_f32(2, N, p, tile, x, c, ldc, add);
    if (tile < p->tiles) micro_f32(1, N, p, tile, x, c, ldc, add);
}

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    const float *x[TOKENS];
    while (tokens > 0) {
        int n = tokens >= 6 ? 6 : tokens >= 2 ? 2 : 1;
        for (int i = 0; i < n; i++) x[i] = a->f + token[i] * a->stride + k0;
        if (n == 6) tiles_f32(6, p, x, c, ldc, add);
        else if (n == 2) tiles_f32(2, p, x, c, ldc, add);
        else tiles_f32(1, p, x, c, ldc, add);
        tokens -= n;
        token += n;
        c += n * ldc;
    }
}

/* ---- limits ----------------------------------------------------------------------------------------- */

static double peak(int kind, int64_t iterations) {
    if (kind == KT_PEAK_INT8) {
        __m512i acc[12], u = _mm512_set1_epi8(3), a = _mm512_set1_epi8(5);
        for (int i = 0; i < 12; i++) acc[i] = _mm512_setzero_si512();
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) {
                acc[i] = dot4(acc[i], u, a);
                __asm__("" : "+v"(u)); /* a new value each time, or products would leave the loop */
            }
        }
        for (int i = 0; i < 12; i++) __asm__ volatile("" : : "v"(acc[i]));
        return 12.0 * 128.0 * (double)iterations;
    }
    if (kind == KT_PEAK_F32) {
        __m512 acc[12], x = _mm512_set1_ps(1.5f), y = _mm512_set1_ps(1e-3f);
        for (int i = 0; i < 12; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) {
                acc[i] = _mm512_fmadd_ps(x, y, acc[i]);
            }
        }
        for (int i = 0; i < 12; i++) __asm__ volatile("" : : "v"(acc[i]));
        return 12.0 * 32.0 * (double)iterations;
    }
    return 0;
}

void KT_JOIN(kt_fill_gemm_, KT_ISA)(struct kt_kernels *k) {
    k->gemm_q8 = gemm_q8;
    k->gemm_f32 = gemm_f32;
    k->peak = peak;
}
