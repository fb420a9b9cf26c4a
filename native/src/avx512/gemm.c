/* The int8 panel GEMM for AVX-512. Two tiles (32 weight rows) meet up to six tokens: twelve accumulators hide the
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

/* Columns k .. k+n of a panel meet up to six tokens. What a group needs of a token lies in one small array each,
 * prepared once for all tiles: [token][group of 32]. */
enum { GROUPS = KT_CACHE_BYTES / KT_ACT_GROUP };
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    const int8_t *q[TOKENS]; /* at column k */
    float d[TOKENS][GROUPS];
    /* Minus (what is left of the) zero point times sum of codes: of the group, or of its halves */
    int32_t start[2][TOKENS][GROUPS];
    float ds[2][TOKENS][GROUPS];      /* scale times sum of codes: likewise */
    float *c;
    int64_t ldc;
    int add;
};

_Static_assert(GROUPS == 16, "a token's groups are one register");

/* Codes that exceed 7 bits are made signed where there is no VNNI, and so move by 128. */
INLINE int wide(const struct kt_panel *p) {
#ifdef __AVX512VNNI__
    (void)p;
    return 0;
#else
    return p->max_abs > 127;
#endif
}

INLINE void prepare(struct slice *s, const int n, const struct kt_acts *a, int64_t at) {
    const int64_t g = at / KT_ACT_GROUP;
    const int halves = s->p->group == 16, min_halves = s->p->min_group == 16;
    const __m512i zero = _mm512_set1_epi32((wide(s->p) ? 128 : 0) - s->p->zero);
    const __m512 d = _mm512_loadu_ps(a->d + g);
    __m512i low = _mm512_loadu_si512(a->low + g), high = _mm512_loadu_si512(a->high + g);
    const __m512i both = _mm512_add_epi32(low, high);
    s->q[n] = a->q + at;
    _mm512_storeu_ps(s->d[n], d);
    _mm512_storeu_si512(s->start[0][n], _mm512_mullo_epi32(zero, halves ? low : both));
    _mm512_storeu_si512(s->start[1][n], _mm512_mullo_epi32(zero, high));
    _mm512_storeu_ps(s->ds[0][n], _mm512_mul_ps(d, _mm512_cvtepi32_ps(min_halves ? low : both)));
    _mm512_storeu_ps(s->ds[1][n], _mm512_mul_ps(d, _mm512_cvtepi32_ps(high)));
}

/* Bring what the next block will prepare from the second-level cache. */
INLINE void fetch(const struct kt_acts *a, int64_t at) {
    const int64_t g = at / KT_ACT_GROUP;
    _mm_prefetch((const char *)(a->d + g), _MM_HINT_T0);
    _mm_prefetch((const char *)(a->low + g), _MM_HINT_T0);
    _mm_prefetch((const char *)(a->high + g), _MM_HINT_T0);
    for (int i = 0; i < KT_CACHE_BYTES; i += 64) _mm_prefetch((const char *)(a->q + at + i), _MM_HINT_T0);
}

/* What a micro kernel is compiled for. */
struct variant {
    int group;     /* 32 or 16 */
    int min_group; /* 32, 16 or 0 */
    int zero;      /* whether sums start from `start` */
    int wide;      /* see wide() */
};

enum { R = 2 }; /* tiles at once */

/* Of the eight dwords of a group. Without VNNI all eight take 40 % longer to compile, and 10 % longer to run. */
#ifdef __AVX512VNNI__
enum { UNROLL = 8 };
#else
enum { UNROLL = 4 };
#endif

/* sum[R tiles][N tokens] = start + dot products over `columns` columns from column k of the slice on. */
INLINE void dots(const int N, const struct variant v, const struct slice *s, const uint32_t *data,
                 int64_t tile_dwords, int64_t k, const int columns, const int32_t start[TOKENS][GROUPS], int64_t g,
                 __m512i sum[2][TOKENS]) {
    for (int n = 0; n < N; n++) {
        __m512i first = v.zero ? _mm512_set1_epi32(start[n][g]) : _mm512_setzero_si512();
        for (int r = 0; r < R; r++) sum[r][n] = first;
    }
#pragma GCC unroll UNROLL
    for (int j = 0; j < columns / 4; j++) {
        __m512i u[2];
        for (int r = 0; r < R; r++) {
            u[r] = _mm512_load_si512(data + (k / 4 + j) * KT_TILE + r * tile_dwords);
            if (v.wide) u[r] = _mm512_xor_si512(u[r], _mm512_set1_epi8(-128));
        }
        for (int n = 0; n < N; n++) {
            __m512i b = broadcast4(s->q[n] + k + 4 * j);
            for (int r = 0; r < R; r++) sum[r][n] = v.wide ? dot4_signed(sum[r][n], u[r], b) : dot4(sum[r][n], u[r], b);
        }
    }
}

/* c[N tokens][R tiles] (+)= the slice. Two halves with a scale each are scaled before they are added, so that the
 * activation's scale is applied once. A last tile without a second one is its own second, whose results are dropped:
 * rows of models are multiples of 32, so that kernels of one tile would only cost time to compile. */
INLINE void micro_q8(const int N, const struct variant v, const struct slice *s, int tile) {
    const struct kt_panel *p = s->p;
    const int count = s->p->tiles - tile < R ? 1 : R;
    const uint32_t *data = p->data + (tile * p->k + s->k) / 4 * KT_TILE;
    const float *scales = p->scales + (tile * p->k + s->k) / v.group * KT_TILE;
    const float *mins = v.min_group ? p->mins + (tile * p->k + s->k) / v.min_group * KT_TILE : NULL;
    const int64_t next = count == R ? p->k * KT_TILE : 0; /* weights from a tile to its second */
    const int64_t tile_dwords = next / 4, tile_scales = next / v.group,
                  tile_mins = v.min_group ? next / v.min_group : 0;
    __m512 acc[2][TOKENS];
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) acc[r][n] = _mm512_setzero_ps();
    for (int64_t g = 0; g < s->n / KT_ACT_GROUP; g++) {
        __m512i sum[2][TOKENS];
        kt_ahead_step(p->ahead); /* a line or two at a time never fills the queue of outstanding misses */
        __m512 scaled[2][TOKENS];
        for (int half = 0; half < 32 / v.group; half++) {
            dots(N, v, s, data, tile_dwords, 32 * g + 16 * half, v.group, s->start[half], g, sum);
            for (int r = 0; r < R; r++) {
                __m512 scale = _mm512_load_ps(scales + r * tile_scales + (g * (32 / v.group) + half) * KT_TILE);
                for (int n = 0; n < N; n++) {
                    __m512 x = _mm512_cvtepi32_ps(sum[r][n]);
                    scaled[r][n] = half ? _mm512_fmadd_ps(x, scale, scaled[r][n]) : _mm512_mul_ps(x, scale);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++)
                acc[r][n] = _mm512_fmadd_ps(scaled[r][n], _mm512_set1_ps(s->d[n][g]), acc[r][n]);
        for (int half = 0; v.min_group && half < 32 / v.min_group; half++)
            for (int r = 0; r < R; r++) {
                __m512 min = _mm512_load_ps(mins + r * tile_mins + (g * (32 / v.min_group) + half) * KT_TILE);
                for (int n = 0; n < N; n++)
                    acc[r][n] = _mm512_fnmadd_ps(min, _mm512_set1_ps(s->ds[half][n][g]), acc[r][n]);
            }
    }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < count; r++) store_tile(s->c + n * s->ldc + (tile + r) * KT_TILE, acc[r][n], s->add);
}

INLINE void tiles_of(const int N, const struct variant v, const struct slice *s) {
    for (int tile = 0; tile < s->p->tiles; tile += R) micro_q8(N, v, s, tile);
}

/* The variants that some format needs. */
INLINE void tiles_q8(const int N, const struct slice *s) {
    const struct kt_panel *p = s->p;
    if (p->group == 16 && wide(p)) tiles_of(N, (struct variant){16, 0, 0, 1}, s); /* INT8 in groups of 16 */
    else if (p->group == 16) tiles_of(N, (struct variant){16, 0, 1, 0}, s);
    else if (p->min_group == 16) tiles_of(N, (struct variant){32, 16, 0, 0}, s);
    else if (p->min_group == 32 && wide(p)) tiles_of(N, (struct variant){32, 32, 1, 1}, s); /* GPTQ of 8 bits */
    else if (p->min_group == 32) tiles_of(N, (struct variant){32, 32, 0, 0}, s);
    else if (wide(p)) tiles_of(N, (struct variant){32, 0, 0, 1}, s); /* zero point 128: nothing is left of it */
    else tiles_of(N, (struct variant){32, 0, 1, 0}, s);
}

static void tokens6(const struct slice *s) { tiles_q8(6, s); }
static void tokens5(const struct slice *s) { tiles_q8(5, s); }
static void tokens4(const struct slice *s) { tiles_q8(4, s); }
static void tokens3(const struct slice *s) { tiles_q8(3, s); }
static void tokens2(const struct slice *s) { tiles_q8(2, s); }
static void tokens1(const struct slice *s) { tiles_q8(1, s); }

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    static void (*const meet[TOKENS])(const struct slice *s) = {tokens1, tokens2, tokens3, tokens4, tokens5, tokens6};
    const int blocks = (tokens + TOKENS - 1) / TOKENS; /* of equal size, or one less: seven tokens are 4 + 3 */
    kt_ahead_spread(p->ahead, (int64_t)blocks * (p->k / KT_ACT_GROUP) * ((p->tiles + 1) / 2));
    for (int64_t k = 0; k < p->k; k += KT_CACHE_BYTES)
        for (int b = 0, t = 0; b < blocks; b++) {
            const int n = (tokens - t + blocks - b - 1) / (blocks - b);
            struct slice s;
            s.p = p;
            s.k = k;
            s.n = p->k - k < KT_CACHE_BYTES ? p->k - k : KT_CACHE_BYTES;
            s.c = c + t * ldc;
            s.ldc = ldc;
            s.add = add || k;
            for (int i = 0; i < n; i++) prepare(&s, i, a, token[t + i] * a->stride + k0 + k);
            for (int i = n; i < 2 * n && t + i < tokens; i++) fetch(a, token[t + i] * a->stride + k0 + k);
            meet[n - 1](&s);
            t += n;
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
    k->peak = peak;
}
