/* tile_vec.h: the vocabulary of ../tile.h in AVX2: a dword of each of 8 rows. Static inline only. */
#ifndef KT_AVX2_TILE_VEC_H
#define KT_AVX2_TILE_VEC_H

#include "common.h"

enum { W = 8 }; /* rows of a vector */

typedef uint32_t vec __attribute__((vector_size(32)));
typedef uint16_t vec16 __attribute__((vector_size(32)));
typedef float fvec __attribute__((vector_size(32)));

/* The same four dwords in each 16 bytes. */
#define LANES(a, b, c, d) ((vec){a, b, c, d, a, b, c, d})

/* Row r lies at base[r / 4] + (r % 4) * stride: two registers and two strides address them all. */
struct rows {
    const uint8_t *base[2];
    size_t stride, stride3;
};

INLINE struct rows rows_of(const uint8_t *p, size_t stride) {
    return (struct rows){{p, p + 4 * stride}, stride, 3 * stride};
}

INLINE const uint8_t *row_at(const struct rows *rows, const int r, size_t at) {
    const uint8_t *p = rows->base[r / 4] + at;
    return (r & 3) == 0 ? p : (r & 3) == 1 ? p + rows->stride : (r & 3) == 2 ? p + 2 * rows->stride : p + rows->stride3;
}

/* v[i] = dword i of the 16 bytes at `at` of each row. Rows r and 4 + r share a register from the load on, so that only
 * the transpose within 128-bit lanes is left. */
INLINE void columns4(const struct rows *rows, size_t at, vec v[4]) {
    __m256i t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m128i low = load128(row_at(rows, i, at)), high = load128(row_at(rows, 4 + i, at));
        t[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    __m256i a = _mm256_unpacklo_epi32(t[0], t[1]), b = _mm256_unpackhi_epi32(t[0], t[1]);
    __m256i c = _mm256_unpacklo_epi32(t[2], t[3]), d = _mm256_unpackhi_epi32(t[2], t[3]);
    v[0] = (vec)_mm256_unpacklo_epi64(a, c);
    v[1] = (vec)_mm256_unpackhi_epi64(a, c);
    v[2] = (vec)_mm256_unpacklo_epi64(b, d);
    v[3] = (vec)_mm256_unpackhi_epi64(b, d);
}

/* In each 16 bytes the 8 bytes at p, then those at q. */
INLINE vec two_times8(const uint8_t *p, const uint8_t *q) {
    __m256i a = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i_u *)p));
    __m256i b = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i_u *)q));
    return (vec)_mm256_blend_epi32(a, b, 0xcc);
}

/* Byte i of each 16 bytes of v becomes its byte index[i], or 0 where bit 7 of the index is set. */
INLINE vec shuffle8(vec v, vec index) { return (vec)_mm256_shuffle_epi8((__m256i)v, (__m256i)index); }
INLINE vec table16(const uint8_t t[16]) { return (vec)_mm256_broadcastsi128_si256(load128(t)); }

/* Upper halves of products. */
INLINE vec16 times_high16(vec16 a, vec16 b) { return (vec16)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }

/* A constant that the compiler does not know: it would make shifts and sums of a product. */
INLINE vec16 hidden16(vec16 v) {
    __asm__("" : "+x"(v));
    return v;
}

INLINE vec min8(vec a, vec b) { return (vec)_mm256_min_epu8((__m256i)a, (__m256i)b); }
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_epi32((__m256i)a, (__m256i)b); } /* signed */

INLINE fvec to_float(vec v) { return (fvec)_mm256_cvtepi32_ps((__m256i)v); } /* signed */

/* fp16 in the low (0) or high (1) half of each dword. */
INLINE fvec halves(vec v, const int high) {
    const vec pick = high ? LANES(0x07060302, 0x0f0e0b0a, -1, -1) : LANES(0x05040100, 0x0d0c0908, -1, -1);
    __m256i words = _mm256_permute4x64_epi64((__m256i)shuffle8(v, pick), 0x08);
    return (fvec)_mm256_cvtph_ps(_mm256_castsi256_si128(words));
}

INLINE vec load(const void *p) { return (vec)load256(p); }
INLINE void store(uint32_t *p, vec v) { _mm256_store_si256((__m256i *)p, (__m256i)v); }
INLINE void store_f(float *p, fvec v) { _mm256_store_ps(p, (__m256)v); }

#endif
