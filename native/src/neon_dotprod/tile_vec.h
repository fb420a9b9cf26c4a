/* tile_vec.h: the vocabulary of ../tile_impl.h in NEON: a dword of each of 4 rows. Static inline only. */
#ifndef KT_NEON_TILE_VEC_H
#define KT_NEON_TILE_VEC_H

#include "common.h"

enum { W = 4 }; /* rows of a vector */

typedef uint32_t vec __attribute__((vector_size(16)));
typedef float fvec __attribute__((vector_size(16)));

#define LANES(a, b, c, d) ((vec){a, b, c, d})

struct rows {
    const uint8_t *base;
    size_t stride;
};

INLINE struct rows rows_of(const uint8_t *p, size_t stride) { return (struct rows){p, stride}; }
INLINE const uint8_t *row_at(const struct rows *rows, const int r, size_t at) { return rows->base + (size_t)r * rows->stride + at; }

/* v[i] = dword i of the 16 bytes at `at` of each row. */
INLINE void columns4(const struct rows *rows, size_t at, vec v[4]) {
    uint32x4_t t[4];
    for (int r = 0; r < 4; r++) t[r] = vreinterpretq_u32_u8(load128(row_at(rows, r, at)));
    transpose(t);
    for (int i = 0; i < 4; i++) v[i] = (vec)t[i];
}

/* The same of 8 bytes, two dwords. */
INLINE void columns2(const struct rows *rows, size_t at, vec v[2]) {
    uint32x2_t t[4];
    for (int r = 0; r < 4; r++) t[r] = vreinterpret_u32_u8(vld1_u8(row_at(rows, r, at)));
    const uint32x4_t a = vcombine_u32(t[0], t[1]), b = vcombine_u32(t[2], t[3]);
    v[0] = (vec)vuzp1q_u32(a, b), v[1] = (vec)vuzp2q_u32(a, b);
}

/* Byte i of v becomes its byte index[i], or 0 where bit 7 of the index is set. */
INLINE vec shuffle8(vec v, vec index) { return (vec)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)index); }
INLINE vec table16(const uint8_t t[16]) { return (vec)load128(t); }

/* Dwords 0 and 1, or 2 and 3, of a, then those of b. */
INLINE vec join_low(vec a, vec b) { return (vec)vzip1q_u64((uint64x2_t)a, (uint64x2_t)b); }
INLINE vec join_high(vec a, vec b) { return (vec)vzip2q_u64((uint64x2_t)a, (uint64x2_t)b); }

INLINE vec average8(vec a, vec b) { return (vec)vrhaddq_u8((uint8x16_t)a, (uint8x16_t)b); }
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

/* q[j] is rows 4j .. 4j + 3 of a dword of a tile. */
INLINE void store_quads(uint32_t *p, const vec q[4]) {
    for (int j = 0; j < 4; j++) store(p + 4 * j, q[j]);
}

#endif
