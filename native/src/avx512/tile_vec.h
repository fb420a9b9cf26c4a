/* tile_vec.h: the vocabulary of ../tile.h in AVX-512: a dword of each of 16 rows. Static inline only. */
#ifndef KT_AVX512_TILE_VEC_H
#define KT_AVX512_TILE_VEC_H

#include "common.h"

enum { W = 16 }; /* rows of a vector */

typedef uint32_t vec __attribute__((vector_size(64)));
typedef uint16_t vec16 __attribute__((vector_size(64)));
typedef float fvec __attribute__((vector_size(64)));

/* The same four dwords in each 16 bytes. */
#define LANES(a, b, c, d) ((vec){a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d})

/* Row r lies at base[r / 4] + (r % 4) * stride: four registers and two strides address them all. */
struct rows {
    const uint8_t *base[4];
    size_t stride, stride3;
};

INLINE struct rows rows_of(const uint8_t *p, size_t stride) {
    return (struct rows){{p, p + 4 * stride, p + 8 * stride, p + 12 * stride}, stride, 3 * stride};
}

INLINE const uint8_t *row_at(const struct rows *rows, const int r, size_t at) {
    const uint8_t *p = rows->base[r / 4] + at;
    return (r & 3) == 0 ? p : (r & 3) == 1 ? p + rows->stride : (r & 3) == 2 ? p + 2 * rows->stride : p + rows->stride3;
}

/* v[i] = dword i of the 16 bytes at `at` of each row. Rows r, 4 + r, 8 + r and 12 + r share a register from the load
 * on, so that only the transpose within 128-bit lanes is left. */
INLINE void columns4(const struct rows *rows, size_t at, vec v[4]) {
    __m512i t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_castsi128_si512(load128(row_at(rows, i, at)));
        t[i] = _mm512_mask_broadcast_i32x4(t[i], 0x00f0, load128(row_at(rows, 4 + i, at)));
        t[i] = _mm512_mask_broadcast_i32x4(t[i], 0x0f00, load128(row_at(rows, 8 + i, at)));
        t[i] = _mm512_mask_broadcast_i32x4(t[i], 0xf000, load128(row_at(rows, 12 + i, at)));
    }
    __m512i a = _mm512_unpacklo_epi32(t[0], t[1]), b = _mm512_unpackhi_epi32(t[0], t[1]);
    __m512i c = _mm512_unpacklo_epi32(t[2], t[3]), d = _mm512_unpackhi_epi32(t[2], t[3]);
    v[0] = (vec)_mm512_unpacklo_epi64(a, c);
    v[1] = (vec)_mm512_unpackhi_epi64(a, c);
    v[2] = (vec)_mm512_unpacklo_epi64(b, d);
    v[3] = (vec)_mm512_unpackhi_epi64(b, d);
}

/* In each 16 bytes the 8 bytes at p, then those at q. */
INLINE vec two_times8(const uint8_t *p, const uint8_t *q) {
    __m512i a = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i_u *)p));
    return (vec)_mm512_mask_broadcastq_epi64(a, 0xaa, _mm_loadl_epi64((const __m128i_u *)q));
}

/* Byte i of each 16 bytes of v becomes its byte index[i], or 0 where bit 7 of the index is set. */
INLINE vec shuffle8(vec v, vec index) { return (vec)_mm512_shuffle_epi8((__m512i)v, (__m512i)index); }
INLINE vec table16(const uint8_t t[16]) { return (vec)_mm512_broadcast_i32x4(load128(t)); }

/* Upper halves of products. */
INLINE vec16 times_high16(vec16 a, vec16 b) { return (vec16)_mm512_mulhi_epu16((__m512i)a, (__m512i)b); }

/* A constant that the compiler does not know: it would make shifts and sums of a product. */
INLINE vec16 hidden16(vec16 v) {
    __asm__("" : "+v"(v));
    return v;
}

INLINE vec min8(vec a, vec b) { return (vec)_mm512_min_epu8((__m512i)a, (__m512i)b); }
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_epi32((__m512i)a, (__m512i)b); } /* signed */

INLINE fvec to_float(vec v) { return (fvec)_mm512_cvtepi32_ps((__m512i)v); } /* signed */

/* fp16 in the low (0) or high (1) half of each dword. */
INLINE fvec halves(vec v, const int high) {
    return (fvec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(high ? v >> 16 : v)));
}

INLINE vec load(const void *p) { return (vec)_mm512_loadu_si512(p); }
INLINE void store(uint32_t *p, vec v) { _mm512_store_si512(p, (__m512i)v); }
INLINE void store_f(float *p, fvec v) { _mm512_store_ps(p, (__m512)v); }

#endif
