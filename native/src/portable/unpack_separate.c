/* Unpacking in portable C of types with separate scales. */
#include <string.h>

#include "../templates/scales_zeros.h"
#include "../kernels.h"
#include "../formats/quants.h"

static void unpack_f8(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    for (int64_t i = 0; i < n; i++) out[i] = kt_e4m3_to_f32(w[i]);
}

static void unpack_f4(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    static const uint8_t code[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* 2 * e2m1 + 12 */
    uint8_t *u = data;
    for (int64_t i = 0; i < n / 2; i++) {
        u[2 * i] = code[w[i] & 15];
        u[2 * i + 1] = code[w[i] >> 4];
    }
}

static void unpack_i4(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / 2; i++) {
        u[2 * i] = w[i] & 15;
        u[2 * i + 1] = w[i] >> 4;
    }
}

static void unpack_i8(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    uint8_t *u = data;
    for (int64_t i = 0; i < n; i++) u[i] = w[i] ^ 128;
}

static void unpack_u8(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    memcpy(data, w, (size_t)n);
}

static void scale_tile(float *v, int64_t n, int group, const float *scales) {
    for (int64_t c = 0; c < n; c++)
        for (int r = 0; r < KT_TILE; r++) v[c * KT_TILE + r] *= scales[c / group * KT_TILE + r];
}

void kt_fill_unpack_separate_portable(struct kt_kernels *k) {
    k->read_scales = read_scales;
    k->scale_tile = scale_tile;
    k->unpack[KT_FMT_F8_E4M3] = unpack_f8;
    k->unpack[KT_FMT_F4_E2M1] = unpack_f4;
    k->unpack[KT_FMT_I8] = unpack_i8;
    k->unpack[KT_FMT_I4] = unpack_i4;
    k->unpack[KT_FMT_U8] = unpack_u8;
}
