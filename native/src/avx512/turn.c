/* Codes as fp32 rows. */
#include "turn.h"

INLINE void turn(const struct kt_panel *p, const int rows, const int with_mins, float *out, int64_t tile) {
    const __m512i zero = _mm512_set1_epi32(p->zero);
    for (int64_t c = 0; c < p->k; c += KT_TILE, out += tile) {
        _Alignas(64) turned_codes codes;
        const float *scales = scales_at(p, c), *mins = with_mins ? mins_at(p, c) : NULL;
        turn_lines(p->data + c / 4 * KT_TILE, codes);
        for (int r = 0; r < rows; r++) _mm512_store_ps(out + r * KT_TILE, turned_row(codes, r, zero, scales, mins));
    }
}

static void turn_codes(const struct kt_panel *p, int rows, float *out, int64_t tile) {
    if (rows < KT_TILE) turn(p, rows, p->mins != NULL, out, tile);
    else if (p->mins) turn(p, KT_TILE, 1, out, tile);
    else turn(p, KT_TILE, 0, out, tile);
}

void kt_fill_turn_avx512(struct kt_kernels *k) { k->turn_codes = turn_codes; }
