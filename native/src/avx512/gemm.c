/* The panel GEMMs for AVX-512. Two tiles (32 weight rows) meet up to six tokens: twelve accumulators hide the
 * latency of the multiply-add, and each broadcast activation serves two tiles. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "../../include/kt_native.h"
#include "common.h"

enum { TOKENS = 6 };

INLINE __m512i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

INLINE void store_tile(float *out, __m512 v, int add) {
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), v) : v);
}

/* Columns k .. k+n of a panel meet up to six tokens. */
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    const int8_t *q[TOKENS]; /* at column k */
    const struct kt_group *g[TOKENS];
    float *c;
    int64_t ldc;
    int add;
};

/* c[N tokens][R tiles] (+)= the slice. `wide`: codes exceed 7 bits and have zero point 128, and there is no
 * VNNI: they are made signed instead of corrected by 128 * sum. */
INLINE void micro_q8(const int R, const int N, const int group, const int has_min, const int has_zero, const int wide,
                     const struct slice *s, int tile) {
    const struct kt_panel *p = s->p;
    const int64_t tile_dwords = p->k / 4 * KT_TILE, tile_groups = p->k / group * KT_TILE, groups = s->n / group;
    const uint32_t *data = p->data + tile * tile_dwords + s->k / 4 * KT_TILE;
    const int64_t at = tile * tile_groups + s->k / group * KT_TILE;
    const float *scales = p->scales + at, *mins = has_min ? p->mins + at : NULL;
    const __m512i zero = _mm512_set1_epi32(p->zero);
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        const int64_t ag = group == 32 ? g : g / 2;
        __m512i sum[2][TOKENS];
        for (int n = 0; n < N; n++) {
            __m512i start = _mm512_setzero_si512();
            if (has_zero && !wide) {
                const struct kt_group *x = &s->g[n][ag];
                start = _mm512_set1_epi32(x->minus[group == 32 ? 0 : g & 1]);
                if (group == 32) start = _mm512_add_epi32(start, _mm512_set1_epi32(x->minus[1]));
                start = _mm512_mullo_epi32(start, zero);
            }
            for (int r = 0; r < R; r++) sum[r][n] = start;
        }
#pragma GCC unroll 8
        for (int j = 0; j < group / 4; j++) {
            __m512i u[2];
            for (int r = 0; r < R; r++) {
                u[r] = _mm512_load_si512(data + j * KT_TILE + r * tile_dwords);
                if (wide) u[r] = _mm512_xor_si512(u[r], _mm512_set1_epi8(-128));
            }
            for (int n = 0; n < N; n++) {
                __m512i b = broadcast4(s->q[n] + g * group + 4 * j);
                for (int r = 0; r < R; r++) sum[r][n] = wide ? dot4_signed(sum[r][n], u[r], b) : dot4(sum[r][n], u[r], b);
            }
        }
        data += group / 4 * KT_TILE;
        for (int r = 0; r < R; r++) {
            __m512 scale = _mm512_load_ps(scales + r * tile_groups + g * KT_TILE);
            for (int n = 0; n < N; n++)
                acc[r][n] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][n]), scale),
                                            _mm512_set1_ps(s->g[n][ag].d), acc[r][n]);
            if (!has_min) continue;
            __m512 min = _mm512_load_ps(mins + r * tile_groups + g * KT_TILE);
            for (int n = 0; n < N; n++)
                acc[r][n] = _mm512_fnmadd_ps(min, _mm512_set1_ps(s->g[n][ag].ds), acc[r][n]);
        }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) store_tile(s->c + n * s->ldc + (tile + r) * KT_TILE, acc[r][n], s->add);
}

#ifdef __AVX512VNNI__
#define WIDE(p) 0
#else
#define WIDE(p) ((p)->zero == 128)
#endif

/* All tiles of the panel for N tokens, in one of the few variants that exist. */
#define VARIANT(group, has_min, has_zero, wide)                                                     \
    do {                                                                                            \
        int tile = 0;                                                                               \
        for (; tile + 2 <= s->p->tiles; tile += 2)                                                  \
            micro_q8(2, N, group, has_min, has_zero, wide, s, tile);                                \
        if (tile < s->p->tiles) micro_q8(1, N, group, has_min, has_zero, wide, s, tile);            \
    } while (0)

INLINE void tiles_q8(const int N, const struct slice *s) {
    if (s->p->group == 16)
        VARIANT(16, 0, 1, 0); /* no format with groups of 16 has mins yet */
    else if (s->p->mins)
        VARIANT(32, 1, 0, 0); /* nor does one have both a zero point and mins */
    else if (WIDE(s->p))
        VARIANT(32, 0, 1, 1);
    else
        VARIANT(32, 0, 1, 0);
}

static void tokens6(const struct slice *s) { tiles_q8(6, s); }
static void tokens4(const struct slice *s) { tiles_q8(4, s); }
static void tokens3(const struct slice *s) { tiles_q8(3, s); }
static void tokens2(const struct slice *s) { tiles_q8(2, s); }
static void tokens1(const struct slice *s) { tiles_q8(1, s); }

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    for (int64_t k = 0; k < p->k; k += KT_CACHE_BYTES)
        for (int t = 0, n; t < tokens; t += n) {
            const int left = tokens - t;
            n = left >= 6 && left != 7 && left != 8 ? 6 : left >= 4 ? 4 : left; /* 7 = 4 + 3, 8 = 4 + 4 */
            struct slice s = {.p = p, .k = k, .n = p->k - k < KT_CACHE_BYTES ? p->k - k : KT_CACHE_BYTES,
                              .c = c + t * ldc, .ldc = ldc, .add = add || k};
            for (int i = 0; i < n; i++) {
                s.q[i] = a->q + token[t + i] * a->stride + k0 + k;
                s.g[i] = a->g + (token[t + i] * a->stride + k0 + k) / KT_ACT_GROUP;
            }
            (n == 6 ? tokens6 : n == 4 ? tokens4 : n == 3 ? tokens3 : n == 2 ? tokens2 : tokens1)(&s);
        }
}

/* ---- fp32 ------------------------------------------------------------------------------------------- */

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
