/* tile_vec.h: the vocabulary of ../tile_impl.h in AVX2: a dword of each of 8 rows. Static inline only. */
#ifndef KT_AVX2_TILE_VEC_H
#define KT_AVX2_TILE_VEC_H

#include "common.h"

enum { W = 8 }; /* rows of a vector */

typedef uint32_t vec __attribute__((vector_size(32)));
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
    v[0] = (vec)_mm256_unpacklo_epi64(a, c), v[1] = (vec)_mm256_unpackhi_epi64(a, c);
    v[2] = (vec)_mm256_unpacklo_epi64(b, d), v[3] = (vec)_mm256_unpackhi_epi64(b, d);
}

INLINE __m256i load64(const void *p) { return _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i_u *)p)); }

/* The same of 8 bytes, two dwords. */
INLINE void columns2(const struct rows *rows, size_t at, vec v[2]) {
    __m256i t[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) { /* rows 2i and 2i + 1 of each four */
        __m256i a = load64(row_at(rows, 2 * i, at));
        __m256i b = load64(row_at(rows, 2 * i + 1, at));
        __m256i c = load64(row_at(rows, 2 * i + 4, at));
        __m256i d = load64(row_at(rows, 2 * i + 5, at));
        t[i] = _mm256_blend_epi32(_mm256_blend_epi32(a, b, 0x0c), _mm256_blend_epi32(c, d, 0xc0), 0xf0);
    }
    v[0] = (vec)_mm256_shuffle_ps((__m256)t[0], (__m256)t[1], 0x88);
    v[1] = (vec)_mm256_shuffle_ps((__m256)t[0], (__m256)t[1], 0xdd);
}

/* Byte i of each 16 bytes of v becomes its byte index[i], or 0 where bit 7 of the index is set. */
INLINE vec shuffle8(vec v, vec index) { return (vec)_mm256_shuffle_epi8((__m256i)v, (__m256i)index); }
INLINE vec table16(const uint8_t t[16]) { return (vec)_mm256_broadcastsi128_si256(load128(t)); }

/* Dwords 0 and 1, or 2 and 3, of each 16 bytes of a, then those of b. */
INLINE vec join_low(vec a, vec b) { return (vec)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
INLINE vec join_high(vec a, vec b) { return (vec)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }

INLINE vec average8(vec a, vec b) { return (vec)_mm256_avg_epu8((__m256i)a, (__m256i)b); }
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

/* 16 bytes i of q[j] are rows 4j .. 4j + 3 of the i-th of W / 4 dwords of a tile. */
INLINE void store_quads(uint32_t *p, const vec q[4]) {
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
        store(p + 4 * j, (vec)_mm256_permute2x128_si256((__m256i)q[j], (__m256i)q[j + 1], 0x20));
        store(p + 4 * j + KT_TILE, (vec)_mm256_permute2x128_si256((__m256i)q[j], (__m256i)q[j + 1], 0x31));
    }
}

#endif
