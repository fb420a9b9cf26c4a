/* Scores of a BF16 cache and queries in bf16: two columns a product. Values stay with AVX-512's fp32: pairing tokens
 * would cost what it saves. */
#include "../avx512/dot_vec.h"

enum { SCORE_TOKENS = 4, SCORE_ROWS = 4, COLUMNS = 32 };

INLINE __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

/* s[r * lds + t] for R rows and T tokens. */
INLINE void scores_some(const int T, const int R, const struct kt_acts *a, int row, const uint8_t *keys, size_t key_row,
                        float *s, int64_t lds) {
    const uint16_t *q = a->h + row * a->stride;
    vfloat sum[16];
    float out[16];
    for (int i = 0; i < 16; i++) sum[i] = v_zero();
    for (int64_t c = 0; c < a->cols; c += COLUMNS) {
        const int64_t left = a->cols - c;
        const __mmask32 m = left < COLUMNS ? (__mmask32)((1u << left) - 1) : ~(__mmask32)0;
        __m512bh w[SCORE_TOKENS];
        for (int t = 0; t < T; t++) w[t] = as_bf16(_mm512_maskz_loadu_epi16(m, keys + (size_t)t * key_row + c * 2));
        for (int r = 0; r < R; r++) {
            const __m512bh x = as_bf16(_mm512_loadu_si512(q + r * a->stride + c));
            for (int t = 0; t < T; t++) sum[r * T + t] = _mm512_dpbf16_ps(sum[r * T + t], w[t], x);
        }
    }
    v_sums(sum, T * R, out);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) s[(row + r) * lds + t] = out[r * T + t];
}

INLINE void scores_tokens(const int T, const struct kt_acts *a, int rows, const uint8_t *keys, size_t key_row, float *s,
                          int64_t lds) {
    int r = 0;
    for (; r + SCORE_ROWS <= rows; r += SCORE_ROWS) scores_some(T, SCORE_ROWS, a, r, keys, key_row, s, lds);
    for (; r + 2 <= rows; r += 2) scores_some(T, 2, a, r, keys, key_row, s, lds);
    for (; r < rows; r++) scores_some(T, 1, a, r, keys, key_row, s, lds);
}

static void scores_bf16(const struct kt_acts *a, int rows, const uint8_t *keys, size_t key_row, int tokens, float *s,
                        int64_t lds, struct kt_ahead *ahead) {
    int t = 0;
    kt_ahead_spread(ahead, tokens / SCORE_TOKENS + 1);
    for (; t + SCORE_TOKENS <= tokens; t += SCORE_TOKENS) {
        kt_ahead_step(ahead);
        scores_tokens(SCORE_TOKENS, a, rows, keys + (size_t)t * key_row, key_row, s + t, lds);
    }
    for (; t < tokens; t++) scores_tokens(1, a, rows, keys + (size_t)t * key_row, key_row, s + t, lds);
}

void kt_fill_attend_avx512_bf16(struct kt_kernels *k) { k->scores_bf16 = scores_bf16; }
