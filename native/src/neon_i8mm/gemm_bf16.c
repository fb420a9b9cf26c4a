/* The bf16 panel GEMM for NEON with matrix multiplies (bf16 of ARMv8.6): bfmmla, four columns at a time. See
 * pairs.h. */
#include "pairs.h"

/* sum[pair of rows][pair of tokens] += `count` dwords of two columns each, from chunk `chunk` on. An odd last dword
 * is paired with zeros. */
INLINE void products(const int P, int64_t count, const uint32_t *data, const struct slice *s, int64_t chunk,
                     float32x4_t sum[4][PAIRS]) {
    for (int64_t j = 0; j < count; j += 2, chunk++, data += 2 * KT_TILE) {
        bfloat16x8_t x[PAIRS];
        for (int n = 0; n < P; n++) x[n] = vreinterpretq_bf16_u8(load128(s->x[chunk][n]));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const uint32x4_t second = j + 1 < count ? vld1q_u32(data + KT_TILE + 4 * i) : vdupq_n_u32(0);
            const struct rows4 w = zip(vld1q_u32(data + 4 * i), second);
            for (int n = 0; n < P; n++) {
                sum[2 * i][n] = vbfmmlaq_f32(sum[2 * i][n], vreinterpretq_bf16_u8(w.pair[0]), x[n]);
                sum[2 * i + 1][n] = vbfmmlaq_f32(sum[2 * i + 1][n], vreinterpretq_bf16_u8(w.pair[1]), x[n]);
            }
        }
    }
}

INLINE void clear(const int P, float32x4_t sum[4][PAIRS]) {
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < P; n++) sum[i][n] = vdupq_n_f32(0);
}

/* c[2 P tokens][8 rows from `row` on] (+)= the slice, whose k and n count dwords here. */
INLINE void micro(const int P, const int scaled, const struct slice *s, int tile, int row) {
    const struct kt_panel *p = s->p;
    const uint32_t *data = p->data + (tile * ((p->k + 1) / 2) + s->k) * KT_TILE + row;
    float32x4_t acc[4][PAIRS];
    clear(P, acc);
    if (scaled) { /* group by group */
        const int64_t group = p->group / 2, groups = (p->k + p->group - 1) / p->group;
        const float *scales = p->scales + (tile * groups + s->k / group) * KT_TILE + row;
        for (int64_t k = 0; k < s->n; k += group, data += group * KT_TILE, scales += KT_TILE) {
            float32x4_t sum[4][PAIRS], per_row[4];
            clear(P, sum);
            products(P, s->n - k < group ? s->n - k : group, data, s, k / 2, sum);
            twice(scales, per_row);
            for (int i = 0; i < 4; i++)
                for (int n = 0; n < P; n++) acc[i][n] = vfmaq_f32(acc[i][n], sum[i][n], per_row[i]);
        }
    } else {
        products(P, s->n, data, s, 0, acc);
    }
    store_rows(P, s, tile * KT_TILE + row, acc);
}

INLINE void tiles(const int P, const struct slice *s) {
    for (int tile = 0; tile < s->p->tiles; tile++)
        for (int row = 0; row < KT_TILE; row += ROWS) {
            if (s->p->group) micro(P, 1, s, tile, row);
            else micro(P, 0, s, tile, row);
        }
}

static void gemm_bf16(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                      float *c, int64_t ldc, int add) {
    const int64_t dwords = (p->k + 1) / 2, step = KT_CACHE_BYTES / 4;
    struct slice s;
    s.p = p;
    s.ldc = ldc;
    for (s.k = 0; s.k < dwords; s.k += step)
        for (int t = 0; t < tokens; t += TOKENS) {
            s.n = dwords - s.k < step ? dwords - s.k : step;
            s.c = c + t * ldc;
            s.add = add || s.k;
            s.tokens = tokens - t < TOKENS ? tokens - t : TOKENS;
            for (int i = 0; i < s.tokens + s.tokens % 2; i++) { /* an odd last token is its own partner */
                const int64_t of = token[t + (i < s.tokens ? i : s.tokens - 1)];
                take_token(&s, i, a->h + of * a->stride + k0 + 2 * s.k, 4 * s.n);
            }
            if (s.tokens > 6) tiles(4, &s);
            else if (s.tokens > 4) tiles(3, &s);
            else if (s.tokens > 2) tiles(2, &s);
            else tiles(1, &s);
        }
}

static double (*peak_below)(int kind, int64_t iterations);

static double peak(int kind, int64_t iterations) {
    enum { CHAINS = 16 };
    if (kind != KT_PEAK_BF16) return peak_below(kind, iterations);
    float32x4_t acc[CHAINS];
    uint16x8_t x = vdupq_n_u16(0x3f80);
    const bfloat16x8_t y = vreinterpretq_bf16_u16(vdupq_n_u16(0x3c00));
    for (int i = 0; i < CHAINS; i++) acc[i] = vdupq_n_f32(0);
    for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) acc[i] = vbfmmlaq_f32(acc[i], vreinterpretq_bf16_u16(x), y);
        __asm__("" : "+w"(x));
    }
    for (int i = 0; i < CHAINS; i++) __asm__ volatile("" : : "w"(acc[i]));
    return CHAINS * 32.0 * (double)iterations;
}

void kt_fill_gemm_bf16_neon_i8mm(struct kt_kernels *k) {
    peak_below = k->peak;
    k->gemm_bf16 = gemm_bf16;
    k->peak = peak;
}
