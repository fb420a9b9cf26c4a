/* turn.h: codes of a Q8 tile, which lie four columns of 16 rows side by side, as floats of a row. */
#ifndef KT_AVX512_TURN_H
#define KT_AVX512_TURN_H

#include "common.h"

/* Sixteen columns of 16 rows: row r at [r % 4][r / 4]. */
typedef uint8_t turned_codes[4][4][16];

/* Of four lines of a tile. The four dwords of a row come together within 128-bit lanes. */
INLINE void turn_lines(const uint32_t *line, turned_codes out) {
    const __m512i p = _mm512_load_si512(line), q = _mm512_load_si512(line + KT_TILE);
    const __m512i r = _mm512_load_si512(line + 2 * KT_TILE), s = _mm512_load_si512(line + 3 * KT_TILE);
    const __m512i a = _mm512_unpacklo_epi32(p, q), b = _mm512_unpackhi_epi32(p, q);
    const __m512i c = _mm512_unpacklo_epi32(r, s), d = _mm512_unpackhi_epi32(r, s);
    _mm512_store_si512(out[0], _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(out[1], _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(out[2], _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(out[3], _mm512_unpackhi_epi64(b, d));
}

/* s*(u - z) - m of 16 columns of row r. Not fused: the numbers that portable C gets. */
INLINE __m512 turned_row(const turned_codes codes, int r, __m512i zero, const float *scales, const float *mins) {
    const __m512i u = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)codes[r % 4][r / 4]));
    const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(u, zero)), _mm512_set1_ps(scales[r]));
    return mins ? _mm512_sub_ps(v, _mm512_set1_ps(mins[r])) : v;
}

/* What row numbers of a panel of one tile, columns c .. c + 16, meet. */
INLINE const float *scales_at(const struct kt_panel *p, int64_t c) { return p->scales + c / p->group * KT_TILE; }
INLINE const float *mins_at(const struct kt_panel *p, int64_t c) {
    return p->mins ? p->mins + c / p->min_group * KT_TILE : NULL;
}

#endif
