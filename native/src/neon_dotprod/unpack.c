/* Unpacking for NEON: rows of small floats, and tiles of everything that has no grid. */
#include "tile_vec.h"

#include "../templates/scales_zeros.h"
#include "../templates/tile_k.h"

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, load_f16(w + 2 * i));
    for (; i < n; i++) out[i] = kt_load_f16(w + 2 * i);
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, load_bf16(w + 2 * i));
    for (; i < n; i++) out[i] = kt_bf16_to_f32(kt_load16(w + 2 * i));
}

/* kt_e4m3_to_f32: as fp16 the same bits mean 2^-8 of it, and a number of all ones is NaN. */
static void unpack_f8(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const int16x8_t v = vshll_n_s8(vld1_s8((const int8_t *)w + i), 7); /* the sign twice: in bits 15 and 14 */
        const uint16x8_t nan = vcgeq_u16(vshlq_n_u16(vreinterpretq_u16_s16(v), 2), vdupq_n_u16(0x7f << 9));
        const uint16x8_t half = vandq_u16(vreinterpretq_u16_s16(v), vdupq_n_u16(0xbf80));
        const float16x8_t h = vreinterpretq_f16_u16(vbslq_u16(nan, vdupq_n_u16(0x7e00), half));
        vst1q_f32(out + i, vmulq_n_f32(vcvt_f32_f16(vget_low_f16(h)), 256.0f));
        vst1q_f32(out + i + 4, vmulq_n_f32(vcvt_high_f32_f16(h), 256.0f));
    }
    for (; i < n; i++) out[i] = kt_e4m3_to_f32(w[i]);
}

void kt_fill_unpack_neon_dotprod(struct kt_kernels *k) {
    k->unpack[KT_FMT_F16] = unpack_f16;
    k->unpack[KT_FMT_BF16] = unpack_bf16;
    k->unpack[KT_FMT_F8_E4M3] = unpack_f8;
    k->interleave = interleave;
    k->read_scales = read_scales;
    fill_tiles(k);
}
