/* Codes as bf16 rows, two a line. */
#include "../avx512/turn.h"

/* A line of two rows. Subnormal numbers become zeros, as they would be to the multiplier. */
INLINE __m512i pair(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

INLINE void turn(const struct kt_panel *p, const int rows, const int with_mins, uint32_t *out, int64_t tile) {
    const __m512i zero = _mm512_set1_epi32(p->zero);
    for (int64_t c = 0; c < p->k; c += KT_TILE, out += tile) {
        _Alignas(64) turned_codes codes;
        const float *scales = scales_at(p, c), *mins = with_mins ? mins_at(p, c) : NULL;
        turn_lines(p->data + c / 4 * KT_TILE, codes);
        for (int r = 0; r < rows; r += 2) {
            const __m512 low = turned_row(codes, r, zero, scales, mins);
            const __m512 high = r + 1 < rows ? turned_row(codes, r + 1, zero, scales, mins) : _mm512_setzero_ps();
            _mm512_store_si512(out + r / 2 * KT_TILE, pair(low, high));
        }
    }
}

static void turn_codes_bf16(const struct kt_panel *p, int rows, uint32_t *out, int64_t tile) {
    if (rows < KT_TILE) turn(p, rows, p->mins != NULL, out, tile);
    else if (p->mins) turn(p, KT_TILE, 1, out, tile);
    else turn(p, KT_TILE, 0, out, tile);
}

void kt_fill_turn_avx512_bf16(struct kt_kernels *k) { k->turn_codes_bf16 = turn_codes_bf16; }
