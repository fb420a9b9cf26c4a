/* Unpacking for AVX2: rows of 16-bit floats, and tiles of everything that has no grid. */
#include "tile_vec.h"

#include "../templates/scales_zeros.h"
#include "../templates/tile_k.h"

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_f16(w + 2 * i));
    for (; i < n; i++) out[i] = f16_at(w + 2 * i);
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_bf16(w + 2 * i));
    for (; i < n; i++) out[i] = kt_bf16_to_f32(kt_load16(w + 2 * i));
}

void kt_fill_unpack_avx2(struct kt_kernels *k) {
    k->unpack[KT_FMT_F16] = unpack_f16;
    k->unpack[KT_FMT_BF16] = unpack_bf16;
    k->interleave = interleave;
    k->read_scales = read_scales;
    fill_tiles(k);
}
