/* The int8 panel GEMM for NEON with dot products (ARMv8.2). A tile (16 weight rows) is four registers; up to four
 * tokens meet it, sixteen columns of a token in one register: sixteen sums, four tokens and the weights on their way
 * fill the 32 registers. The products of sdot are signed: codes of eight bits lose 128 on the way, which is their
 * zero point or is given back with the start of each sum; smaller codes are signed as they are. */
#include "common.h"

enum { TOKENS = 4, GROUPS = KT_CACHE_BYTES / KT_ACT_GROUP };

/* Columns k .. k + n of a panel meet up to four tokens. What a group needs of its tokens lies in one register each. */
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    const int8_t *q[TOKENS]; /* at column k */
    float d[GROUPS][TOKENS];
    /* Minus zero point times sum of activations: of the group, or of its two halves */
    int32_t start[GROUPS][2][TOKENS];
    float ds[GROUPS][2][TOKENS];      /* scale times sum of activations: likewise */
    float *c;
    int64_t ldc;
    int add;
};

/* What a micro kernel is compiled for. */
struct variant {
    int group;     /* 32 or 16 */
    int min_group; /* 32, 16 or 0 */
    int wide;      /* whether codes have 8 bits */
};

INLINE int is_wide(const struct kt_panel *p) { return p->max_abs > 127; }

static void prepare(struct slice *s, int n, const struct kt_acts *a, int64_t at) {
    const int64_t first = at / KT_ACT_GROUP;
    const int halves = s->p->group == 16, min_halves = s->p->min_group == 16,
              zero = s->p->zero - (is_wide(s->p) ? 128 : 0);
    s->q[n] = a->q + at;
    for (int64_t g = 0; g < s->n / KT_ACT_GROUP; g++) {
        const float d = a->d[first + g];
        const int32_t low = a->low[first + g], high = a->high[first + g];
        s->d[g][n] = d;
        s->start[g][0][n] = -zero * (halves ? low : low + high);
        s->start[g][1][n] = -zero * high;
        s->ds[g][0][n] = d * (float)(min_halves ? low : low + high);
        s->ds[g][1][n] = d * (float)high;
    }
}

/* Four columns of four rows times the columns 4 i .. 4 i + 3 of x. */
INLINE int32x4_t dot_lane(int32x4_t sum, int8x16_t w, int8x16_t x, const int i) {
    return i == 0 ? vdotq_laneq_s32(sum, w, x, 0)
         : i == 1 ? vdotq_laneq_s32(sum, w, x, 1)
         : i == 2 ? vdotq_laneq_s32(sum, w, x, 2)
                  : vdotq_laneq_s32(sum, w, x, 3);
}

/* sum[N tokens] += 16 columns of 16 rows. data: the four dwords of each row. */
INLINE void dots16(const int N, const int wide, const uint32_t *data, const int8_t *const *q, int64_t k,
                   int32x4_t sum[TOKENS][4]) {
    int8x16_t x[TOKENS];
    for (int n = 0; n < N; n++) x[n] = vld1q_s8(q[n] + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            uint8x16_t w = load128(data + j * KT_TILE + 4 * i);
            if (wide) w = veorq_u8(w, vdupq_n_u8(128));
            for (int n = 0; n < N; n++) sum[n][i] = dot_lane(sum[n][i], vreinterpretq_s8_u8(w), x[n], j);
        }
}

/* c[N tokens][16 rows] (+)= the slice. Two halves with a scale each are scaled before they are added, so that the
 * activation's scale is applied once. */
INLINE void micro_q8(const int N, const struct variant v, const struct slice *s, int tile) {
    const struct kt_panel *p = s->p;
    const uint32_t *data = p->data + (tile * p->k + s->k) / 4 * KT_TILE;
    const float *scales = p->scales + (tile * p->k + s->k) / v.group * KT_TILE;
    const float *mins = v.min_group ? p->mins + (tile * p->k + s->k) / v.min_group * KT_TILE : NULL;
    float32x4_t acc[TOKENS][4];
    for (int n = 0; n < N; n++)
        for (int i = 0; i < 4; i++) acc[n][i] = vdupq_n_f32(0);
    for (int64_t g = 0; g < s->n / KT_ACT_GROUP; g++) {
        float32x4_t scaled[TOKENS][4];
        kt_ahead_step(p->ahead);
        for (int half = 0; half < 32 / v.group; half++, scales += KT_TILE) {
            int32x4_t sum[TOKENS][4];
            for (int n = 0; n < N; n++)
                for (int i = 0; i < 4; i++) sum[n][i] = vdupq_n_s32(s->start[g][half][n]);
            for (int c = 0; c < v.group; c += 16, data += 4 * KT_TILE)
                dots16(N, v.wide, data, s->q, 32 * g + 16 * half + c, sum);
            for (int i = 0; i < 4; i++) {
                const float32x4_t scale = vld1q_f32(scales + 4 * i);
                for (int n = 0; n < N; n++) {
                    const float32x4_t x = vcvtq_f32_s32(sum[n][i]);
                    scaled[n][i] = half ? vfmaq_f32(scaled[n][i], x, scale) : vmulq_f32(x, scale);
                }
            }
        }
        const float32x4_t d = vld1q_f32(s->d[g]);
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 4; i++) acc[n][i] = fma_lane(acc[n][i], scaled[n][i], d, n);
        for (int half = 0; v.min_group && half < 32 / v.min_group; half++, mins += KT_TILE) {
            const float32x4_t ds = vnegq_f32(vld1q_f32(s->ds[g][half]));
            for (int i = 0; i < 4; i++) {
                const float32x4_t min = vld1q_f32(mins + 4 * i);
                for (int n = 0; n < N; n++) acc[n][i] = fma_lane(acc[n][i], min, ds, n);
            }
        }
    }
    for (int n = 0; n < N; n++) store_tile(s->c + n * s->ldc + tile * KT_TILE, acc[n], s->add);
}

INLINE void tiles_of(const int N, const struct variant v, const struct slice *s) {
    for (int tile = 0; tile < s->p->tiles; tile++) micro_q8(N, v, s, tile);
}

/* The variants that some format needs. */
INLINE void tiles_q8(const int N, const struct slice *s) {
    const struct kt_panel *p = s->p;
    const int wide = is_wide(p);
    if (p->group == 16) {
        if (wide) tiles_of(N, (struct variant){16, 0, 1}, s);
        else tiles_of(N, (struct variant){16, 0, 0}, s);
    } else if (p->min_group == 16) {
        tiles_of(N, (struct variant){32, 16, 0}, s);
    } else if (p->min_group == 32) {
        if (wide) tiles_of(N, (struct variant){32, 32, 1}, s);
        else tiles_of(N, (struct variant){32, 32, 0}, s);
    } else {
        if (wide) tiles_of(N, (struct variant){32, 0, 1}, s);
        else tiles_of(N, (struct variant){32, 0, 0}, s);
    }
}

static void tokens4(const struct slice *s) { tiles_q8(4, s); }
static void tokens3(const struct slice *s) { tiles_q8(3, s); }
static void tokens2(const struct slice *s) { tiles_q8(2, s); }
static void tokens1(const struct slice *s) { tiles_q8(1, s); }

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    const int64_t blocks = (tokens + TOKENS - 1) / TOKENS;
    kt_ahead_spread(p->ahead, blocks * (p->k / KT_ACT_GROUP) * p->tiles);
    for (int64_t k = 0; k < p->k; k += KT_CACHE_BYTES)
        for (int t = 0, n; t < tokens; t += n) {
            n = tokens - t < TOKENS ? tokens - t : TOKENS;
            struct slice s;
            s.p = p;
            s.k = k;
            s.n = p->k - k < KT_CACHE_BYTES ? p->k - k : KT_CACHE_BYTES;
            s.c = c + t * ldc;
            s.ldc = ldc;
            s.add = add || k;
            for (int i = 0; i < n; i++) prepare(&s, i, a, token[t + i] * a->stride + k0 + k);
            (n == 4 ? tokens4 : n == 3 ? tokens3 : n == 2 ? tokens2 : tokens1)(&s);
        }
}

/* ---- limits ----------------------------------------------------------------------------------------- */

enum { CHAINS = 16 }; /* independent sums: four pipes of latency four */

static double peak(int kind, int64_t iterations) {
    if (kind == KT_PEAK_INT8) {
        int32x4_t acc[CHAINS];
        int8x16_t x = vdupq_n_s8(3), y = vdupq_n_s8(5);
        for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_s32(0);
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; i++) acc[i] = vdotq_s32(acc[i], x, y);
            __asm__("" : "+w"(x)); /* a new value each time, or products would leave the loop */
        }
        for (int i = 0; i < CHAINS; i++) __asm__ volatile("" : : "w"(acc[i]));
        return CHAINS * 32.0 * (double)iterations;
    }
    if (kind == KT_PEAK_F32) {
        float32x4_t acc[CHAINS], x = vdupq_n_f32(1.5f), y = vdupq_n_f32(1e-3f);
        for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_f32(0);
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; i++) acc[i] = vfmaq_f32(acc[i], x, y);
            __asm__("" : "+w"(x));
        }
        for (int i = 0; i < CHAINS; i++) __asm__ volatile("" : : "w"(acc[i]));
        return CHAINS * 8.0 * (double)iterations;
    }
    return 0;
}

void kt_fill_gemm_neon_dotprod(struct kt_kernels *k) {
    k->gemm_q8 = gemm_q8;
    k->peak = peak;
}
