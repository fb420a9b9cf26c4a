/* pairs.h: what the int8 and the bf16 GEMM share. A matrix multiply instruction takes two weight rows and two tokens,
 * eight bytes of each, and adds 2 x 2 sums [row][token]: twice what a dot product does. So two dwords of four rows of a
 * tile are zipped into two pairs of rows, tokens are laid out in pairs beforehand, and sums stay as they come out until
 * a slice is done. Eight rows meet up to four pairs of tokens: sixteen sums, four pairs and the weights on their
 * way. */
#ifndef KT_NEON_PAIRS_H
#define KT_NEON_PAIRS_H

#include "../neon_dotprod/common.h"

enum { PAIRS = 4, TOKENS = 2 * PAIRS, ROWS = 8, CHUNKS = KT_CACHE_BYTES / 8 };

/* Columns k .. k + n of a panel meet up to eight tokens. */
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    uint8_t x[CHUNKS][PAIRS][2][8]; /* of each eight bytes: pairs of tokens */
    float *c;
    int64_t ldc;
    int add, tokens;
};

/* Token n of the slice: `bytes`, rounded up to whole chunks (activations are padded that far). */
INLINE void take_token(struct slice *s, int n, const void *from, int64_t bytes) {
    const uint8_t *b = from;
    for (int64_t i = 0; i < (bytes + 7) / 8; i++) memcpy(s->x[i][n / 2][n % 2], b + 8 * i, 8);
}

/* Two dwords of four rows as two pairs of rows. */
struct rows4 {
    uint8x16_t pair[2];
};
INLINE struct rows4 zip(uint32x4_t first, uint32x4_t second) {
    return (struct rows4){
        {vreinterpretq_u8_u32(vzip1q_u32(first, second)), vreinterpretq_u8_u32(vzip2q_u32(first, second))}};
}

/* Numbers of eight rows as they meet the 2 x 2 sums: rows 0 0 1 1, then 2 2 3 3, ... */
INLINE void twice(const float *v, float32x4_t out[4]) {
    for (int i = 0; i < 2; i++) {
        const float32x4_t x = vld1q_f32(v + 4 * i);
        out[2 * i] = vzip1q_f32(x, x);
        out[2 * i + 1] = vzip2q_f32(x, x);
    }
}

/* c[2 P tokens][8 rows] (+)= acc[pair of rows][pair of tokens]. */
INLINE void store_rows(const int P, const struct slice *s, int64_t row, float32x4_t acc[4][PAIRS]) {
    for (int n = 0; n < P; n++)
        for (int t = 0; t < 2 && 2 * n + t < s->tokens; t++) {
            float *out = s->c + (2 * n + t) * s->ldc + row;
            for (int i = 0; i < 2; i++) {
                const float32x4_t a = acc[2 * i][n], b = acc[2 * i + 1][n];
                const float32x4_t v = t ? vuzp2q_f32(a, b) : vuzp1q_f32(a, b);
                vst1q_f32(out + 4 * i, s->add ? vaddq_f32(vld1q_f32(out + 4 * i), v) : v);
            }
        }
}

void kt_fill_gemm_bf16_neon_i8mm(struct kt_kernels *k);

#endif
