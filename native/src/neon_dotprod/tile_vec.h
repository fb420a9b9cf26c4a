/* tile_vec.h: the vocabulary of ../tile.h in NEON: a dword of each of 4 rows. Static inline only. */
#ifndef KT_NEON_TILE_VEC_H
#define KT_NEON_TILE_VEC_H

#include "common.h"

enum { W = 4 }; /* rows of a vector */

typedef uint32_t vec __attribute__((vector_size(16)));
typedef uint16_t vec16 __attribute__((vector_size(16)));
typedef float fvec __attribute__((vector_size(16)));

#define LANES(a, b, c, d) ((vec){a, b, c, d})

struct rows {
    const uint8_t *base;
    size_t stride;
};

INLINE struct rows rows_of(const uint8_t *p, size_t stride) { return (struct rows){p, stride}; }
INLINE const uint8_t *row_at(const struct rows *rows, const int r, size_t at) {
    return rows->base + (size_t)r * rows->stride + at;
}

/* v[i] = dword i of the 16 bytes at `at` of each row. */
INLINE void columns4(const struct rows *rows, size_t at, vec v[4]) {
    uint32x4_t t[4];
    for (int r = 0; r < 4; r++) t[r] = vreinterpretq_u32_u8(load128(row_at(rows, r, at)));
    transpose(t);
    for (int i = 0; i < 4; i++) v[i] = (vec)t[i];
}

/* The 8 bytes at p, then those at q. */
INLINE vec two_times8(const uint8_t *p, const uint8_t *q) { return (vec)vcombine_u8(vld1_u8(p), vld1_u8(q)); }

/* Byte i of v becomes its byte index[i], or 0 where bit 7 of the index is set. */
INLINE vec shuffle8(vec v, vec index) { return (vec)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)index); }
INLINE vec table16(const uint8_t t[16]) { return (vec)load128(t); }

/* Upper halves of products. */
INLINE vec16 times_high16(vec16 a, vec16 b) {
    const uint32x4_t low = vmull_u16(vget_low_u16((uint16x8_t)a), vget_low_u16((uint16x8_t)b));
    const uint32x4_t high = vmull_high_u16((uint16x8_t)a, (uint16x8_t)b);
    return (vec16)vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
}

/* A constant that the compiler does not know: it would make shifts and sums of a product. */
INLINE vec16 hidden16(vec16 v) {
    __asm__("" : "+w"(v));
    return v;
}

INLINE vec min8(vec a, vec b) { return (vec)vminq_u8((uint8x16_t)a, (uint8x16_t)b); }
INLINE vec larger(vec a, vec b) { return (vec)vmaxq_s32((int32x4_t)a, (int32x4_t)b); } /* signed */

INLINE fvec to_float(vec v) { return (fvec)vcvtq_f32_s32((int32x4_t)v); } /* signed */

/* fp16 in the low (0) or high (1) half of each dword. */
INLINE fvec halves(vec v, const int high) {
    const uint16x4_t h = high ? vshrn_n_u32((uint32x4_t)v, 16) : vmovn_u32((uint32x4_t)v);
    return (fvec)vcvt_f32_f16(vreinterpret_f16_u16(h));
}

INLINE vec load(const void *p) { return (vec)load128(p); }
INLINE void store(uint32_t *p, vec v) { vst1q_u32(p, (uint32x4_t)v); }
INLINE void store_f(float *p, fvec v) { vst1q_f32(p, (float32x4_t)v); }

#endif
