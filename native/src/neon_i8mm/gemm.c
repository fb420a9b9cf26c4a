/* The int8 panel GEMM for NEON with matrix multiplies (i8mm of ARMv8.6): usmmla takes codes as they are, unsigned. See
 * pairs.h. Everything else of this instruction set but gemm_bf16.c is inherited from neon_dotprod. */
#include "pairs.h"

enum { GROUPS = KT_CACHE_BYTES / KT_ACT_GROUP };

/* What a group needs of its tokens, as in ../neon_dotprod/gemm.c. */
struct groups {
    float d[GROUPS][PAIRS][2];
    int32_t start[GROUPS][2][PAIRS][2];
    float ds[GROUPS][2][PAIRS][2];
};

/* What a micro kernel is compiled for. */
struct variant {
    int group;     /* 32 or 16 */
    int min_group; /* 32, 16 or 0 */
};

static void prepare(struct slice *s, struct groups *to, int token, const struct kt_acts *a, int64_t at) {
    const int64_t first = at / KT_ACT_GROUP;
    const int halves = s->p->group == 16, min_halves = s->p->min_group == 16, n = token / 2, t = token % 2;
    take_token(s, token, a->q + at, s->n);
    for (int64_t g = 0; g < s->n / KT_ACT_GROUP; g++) {
        const float d = a->d[first + g];
        const int32_t low = a->low[first + g], high = a->high[first + g];
        to->d[g][n][t] = d;
        to->start[g][0][n][t] = -s->p->zero * (halves ? low : low + high);
        to->start[g][1][n][t] = -s->p->zero * high;
        to->ds[g][0][n][t] = d * (float)(min_halves ? low : low + high);
        to->ds[g][1][n][t] = d * (float)high;
    }
}

/* The numbers of two tokens, for both rows of a pair. */
INLINE float32x4_t both_f32(const float v[2]) { return vcombine_f32(vld1_f32(v), vld1_f32(v)); }
INLINE int32x4_t both_s32(const int32_t v[2]) { return vcombine_s32(vld1_s32(v), vld1_s32(v)); }

/* sum[pair of rows][pair of tokens] += `columns` columns, from chunk `chunk` of the slice on. */
INLINE void products(const int P, const int columns, const uint32_t *data, const struct slice *s, int64_t chunk,
                     int32x4_t sum[4][PAIRS]) {
#pragma GCC unroll 4
    for (int j = 0; j < columns / 8; j++, data += 2 * KT_TILE) {
        int8x16_t x[PAIRS];
        for (int n = 0; n < P; n++) x[n] = vreinterpretq_s8_u8(load128(s->x[chunk + j][n]));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const struct rows4 w = zip(vld1q_u32(data + 4 * i), vld1q_u32(data + KT_TILE + 4 * i));
            for (int n = 0; n < P; n++) {
                sum[2 * i][n] = vusmmlaq_s32(sum[2 * i][n], w.pair[0], x[n]);
                sum[2 * i + 1][n] = vusmmlaq_s32(sum[2 * i + 1][n], w.pair[1], x[n]);
            }
        }
    }
}

/* c[2 P tokens][8 rows from `row` on] (+)= the slice; as micro_q8 of ../neon_dotprod/gemm.c. */
INLINE void micro(const int P, const struct variant v, const struct slice *s, const struct groups *of, int tile,
                  int row) {
    const struct kt_panel *p = s->p;
    const int64_t k = tile * p->k + s->k;
    const uint32_t *data = p->data + k / 4 * KT_TILE + row;
    const float *scales = p->scales + k / v.group * KT_TILE + row;
    const float *mins = v.min_group ? p->mins + k / v.min_group * KT_TILE + row : NULL;
    float32x4_t acc[4][PAIRS], per_row[4];
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < P; n++) acc[i][n] = vdupq_n_f32(0);
    for (int64_t g = 0; g < s->n / KT_ACT_GROUP; g++) {
        float32x4_t scaled[4][PAIRS];
        kt_ahead_step(p->ahead);
        for (int half = 0; half < 32 / v.group; half++, scales += KT_TILE, data += v.group / 4 * KT_TILE) {
            int32x4_t sum[4][PAIRS];
            for (int i = 0; i < 4; i++)
                for (int n = 0; n < P; n++) sum[i][n] = both_s32(of->start[g][half][n]);
            products(P, v.group, data, s, 4 * g + 2 * half, sum);
            twice(scales, per_row);
            for (int i = 0; i < 4; i++)
                for (int n = 0; n < P; n++) {
                    const float32x4_t x = vcvtq_f32_s32(sum[i][n]);
                    scaled[i][n] = half ? vfmaq_f32(scaled[i][n], x, per_row[i]) : vmulq_f32(x, per_row[i]);
                }
        }
        for (int n = 0; n < P; n++) {
            const float32x4_t d = both_f32(of->d[g][n]);
            for (int i = 0; i < 4; i++) acc[i][n] = vfmaq_f32(acc[i][n], scaled[i][n], d);
        }
        for (int half = 0; v.min_group && half < 32 / v.min_group; half++, mins += KT_TILE) {
            twice(mins, per_row);
            for (int n = 0; n < P; n++) {
                const float32x4_t ds = both_f32(of->ds[g][half][n]);
                for (int i = 0; i < 4; i++) acc[i][n] = vfmsq_f32(acc[i][n], per_row[i], ds);
            }
        }
    }
    store_rows(P, s, tile * KT_TILE + row, acc);
}

INLINE void tiles_of(const int P, const struct variant v, const struct slice *s, const struct groups *of) {
    for (int tile = 0; tile < s->p->tiles; tile++)
        for (int row = 0; row < KT_TILE; row += ROWS) micro(P, v, s, of, tile, row);
}

/* The variants that some format needs. */
INLINE void tiles(const int P, const struct slice *s, const struct groups *of) {
    if (s->p->group == 16) tiles_of(P, (struct variant){16, 0}, s, of);
    else if (s->p->min_group == 16) tiles_of(P, (struct variant){32, 16}, s, of);
    else if (s->p->min_group == 32) tiles_of(P, (struct variant){32, 32}, s, of);
    else tiles_of(P, (struct variant){32, 0}, s, of);
}

static void pairs4(const struct slice *s, const struct groups *of) { tiles(4, s, of); }
static void pairs3(const struct slice *s, const struct groups *of) { tiles(3, s, of); }
static void pairs2(const struct slice *s, const struct groups *of) { tiles(2, s, of); }
static void pairs1(const struct slice *s, const struct groups *of) { tiles(1, s, of); }

static kt_gemm_fn gemm_below;

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    if (tokens == 1) { /* nothing to pair */
        gemm_below(p, a, token, tokens, k0, c, ldc, add);
        return;
    }
    struct slice s;
    struct groups of;
    s.p = p;
    s.ldc = ldc;
    kt_ahead_spread(p->ahead, (tokens + TOKENS - 1) / TOKENS * (p->k / KT_ACT_GROUP) * p->tiles * (KT_TILE / ROWS));
    for (s.k = 0; s.k < p->k; s.k += KT_CACHE_BYTES)
        for (int t = 0; t < tokens; t += TOKENS) {
            s.n = p->k - s.k < KT_CACHE_BYTES ? p->k - s.k : KT_CACHE_BYTES;
            s.c = c + t * ldc;
            s.add = add || s.k;
            s.tokens = tokens - t < TOKENS ? tokens - t : TOKENS;
            for (int i = 0; i < s.tokens; i++) prepare(&s, &of, i, a, token[t + i] * a->stride + k0 + s.k);
            if (s.tokens & 1) /* an odd last token is its own partner */
                prepare(&s, &of, s.tokens, a, token[t + s.tokens - 1] * a->stride + k0 + s.k);
            (s.tokens > 6 ? pairs4 : s.tokens > 4 ? pairs3 : s.tokens > 2 ? pairs2 : pairs1)(&s, &of);
        }
}

/* ---- limits ----------------------------------------------------------------------------------------- */

enum { CHAINS = 16 }; /* independent sums: four pipes of latency four */

static double (*peak_below)(int kind, int64_t iterations);

static double peak(int kind, int64_t iterations) {
    if (kind != KT_PEAK_INT8) return peak_below(kind, iterations);
    int32x4_t acc[CHAINS];
    uint8x16_t x = vdupq_n_u8(3);
    for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_s32(0);
    for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) acc[i] = vusmmlaq_s32(acc[i], x, vdupq_n_s8(5));
        __asm__("" : "+w"(x)); /* a new value each time, or products would leave the loop */
    }
    for (int i = 0; i < CHAINS; i++) __asm__ volatile("" : : "w"(acc[i]));
    return CHAINS * 64.0 * (double)iterations;
}

void kt_fill_gemm_neon_i8mm(struct kt_kernels *k) {
    gemm_below = k->gemm_q8;
    peak_below = k->peak;
    k->gemm_q8 = gemm_q8;
    k->peak = peak;
    kt_fill_gemm_bf16_neon_i8mm(k);
}
