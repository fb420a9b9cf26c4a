/* common.h: loads, sums and stores that the NEON files share. Static inline only. No store or load needs alignment
 * and none needs more than ARMv8.0; what needs more (dot products) is in gemm.c. */
#ifndef KT_NEON_COMMON_H
#define KT_NEON_COMMON_H

#include <arm_neon.h>

#include "../kernels.h"
#include "../formats/quants.h"

#define INLINE static inline __attribute__((always_inline))

INLINE uint8x16_t load128(const void *p) { return vld1q_u8(p); }
INLINE float32x4_t load_f32(const void *p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
INLINE float32x4_t load_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE float32x4_t load_bf16(const void *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}

/* a += w * lane `i` of x. The lane is part of the instruction, so it must be a constant where this is used. */
INLINE float32x4_t fma_lane(float32x4_t a, float32x4_t w, float32x4_t x, const int i) {
    return i == 0 ? vfmaq_laneq_f32(a, w, x, 0)
         : i == 1 ? vfmaq_laneq_f32(a, w, x, 1)
         : i == 2 ? vfmaq_laneq_f32(a, w, x, 2)
                  : vfmaq_laneq_f32(a, w, x, 3);
}

/* out[16 rows of a tile] (+)= v */
INLINE void store_tile(float *out, const float32x4_t v[4], int add) {
    for (int i = 0; i < 4; i++) vst1q_f32(out + 4 * i, add ? vaddq_f32(vld1q_f32(out + 4 * i), v[i]) : v[i]);
}

/* Transpose 4 x 4 dwords. */
INLINE void transpose(uint32x4_t v[4]) {
    const uint32x4_t a = vzip1q_u32(v[0], v[2]), b = vzip2q_u32(v[0], v[2]);
    const uint32x4_t c = vzip1q_u32(v[1], v[3]), d = vzip2q_u32(v[1], v[3]);
    v[0] = vzip1q_u32(a, c);
    v[1] = vzip2q_u32(a, c);
    v[2] = vzip1q_u32(b, d);
    v[3] = vzip2q_u32(b, d);
}

#endif
