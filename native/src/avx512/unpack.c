/* Unpacking for AVX-512: rows of 16-bit floats, and tiles of everything that has no grid. */
#include "tile_vec.h"

#include "../templates/scales_zeros.h"
#include "../templates/tile_k.h"

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        PREFETCH(w + 2 * i, UNPACK_AHEAD);
        _mm512_storeu_ps(out + i, load_f16(w + 2 * i));
    }
    __mmask16 m = (__mmask16)((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, m, load_f16_mask(m, w + 2 * i));
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        PREFETCH(w + 2 * i, UNPACK_AHEAD);
        _mm512_storeu_ps(out + i, load_bf16(w + 2 * i));
    }
    __mmask16 m = (__mmask16)((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, m, load_bf16_mask(m, w + 2 * i));
}

void kt_fill_unpack_avx512(struct kt_kernels *k) {
    k->unpack[KT_FMT_F16] = unpack_f16;
    k->unpack[KT_FMT_BF16] = unpack_bf16;
    k->interleave = interleave;
    k->read_scales = read_scales;
    fill_tiles(k);
}
