/* Codes of a Q8 tile, which lie four columns of 16 rows side by side, as fp32 rows. */
#include "common.h"

/* Sixteen columns of eight rows: row r at [r % 4][r / 4]. */
typedef uint8_t turned_codes[4][2][16];

/* Of half of four lines of a tile. The four dwords of a row come together within 128-bit lanes. */
INLINE void turn_lines(const uint32_t *line, turned_codes out) {
    const __m256i p = load256(line), q = load256(line + KT_TILE);
    const __m256i r = load256(line + 2 * KT_TILE), s = load256(line + 3 * KT_TILE);
    const __m256i a = _mm256_unpacklo_epi32(p, q), b = _mm256_unpackhi_epi32(p, q);
    const __m256i c = _mm256_unpacklo_epi32(r, s), d = _mm256_unpackhi_epi32(r, s);
    _mm256_store_si256((__m256i *)out[0], _mm256_unpacklo_epi64(a, c));
    _mm256_store_si256((__m256i *)out[1], _mm256_unpackhi_epi64(a, c));
    _mm256_store_si256((__m256i *)out[2], _mm256_unpacklo_epi64(b, d));
    _mm256_store_si256((__m256i *)out[3], _mm256_unpackhi_epi64(b, d));
}

/* s*(u - z) - m of eight columns. Not fused: the numbers that portable C gets. */
INLINE __m256 turned_half(const uint8_t *codes, __m256i zero, __m256 scale, const float *min) {
    const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i_u *)codes));
    const __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(u, zero)), scale);
    return min ? _mm256_sub_ps(v, _mm256_set1_ps(*min)) : v;
}

/* Rows half .. half + rows of 16 columns. */
INLINE void turn(const uint32_t *line, const int rows, __m256i zero, const float *scales, const float *mins, float *out) {
    _Alignas(32) turned_codes codes;
    turn_lines(line, codes);
    for (int r = 0; r < rows; r++, out += KT_TILE) {
        const __m256 scale = _mm256_set1_ps(scales[r]);
        const uint8_t *row = codes[r % 4][r / 4];
        _mm256_storeu_ps(out, turned_half(row, zero, scale, mins ? mins + r : NULL));
        _mm256_storeu_ps(out + 8, turned_half(row + 8, zero, scale, mins ? mins + r : NULL));
    }
}

static void turn_codes(const struct kt_panel *p, int rows, float *out, int64_t tile) {
    enum { HALF = KT_TILE / 2 };
    const __m256i zero = _mm256_set1_epi32(p->zero);
    for (int64_t c = 0; c < p->k; c += KT_TILE, out += tile)
        for (int half = 0; half < rows; half += HALF) {
            const uint32_t *line = p->data + c / 4 * KT_TILE + half;
            const float *scales = p->scales + c / p->group * KT_TILE + half;
            const float *mins = p->mins ? p->mins + c / p->min_group * KT_TILE + half : NULL;
            float *to = out + half * KT_TILE;
            if (rows - half < HALF) turn(line, rows - half, zero, scales, mins, to);
            else if (mins) turn(line, HALF, zero, scales, mins, to);
            else turn(line, HALF, zero, scales, NULL, to);
        }
}

void kt_fill_turn_avx2(struct kt_kernels *k) { k->turn_codes = turn_codes; }
