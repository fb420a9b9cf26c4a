/* Unpacking in portable C: the IQ formats, whose values come from tables (iq_tables.h). See unpack.c. */
#include "../iq_tables.h"
#include "../kernels.h"
#include "../quants.h"

static void codebook(const uint8_t qs[16], uint8_t *u) {
    for (int i = 0; i < 16; i++) u[i] = kt_iq4_codes[qs[i] & 15], u[i + 16] = kt_iq4_codes[qs[i] >> 4];
}

static void unpack_iq4_nl(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq4_nl *b = (const kt_block_iq4_nl *)w;
    for (int64_t g = 0; g < n / 32; g++, b++) {
        scales[g] = kt_load_f16(b->d);
        codebook(b->qs, (uint8_t *)data + 32 * g);
    }
}

static void unpack_iq4_xs(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq4_xs *b = (const kt_block_iq4_xs *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8) {
        float d = kt_load_f16(b->d);
        for (int g = 0; g < 8; g++) {
            int low = b->scales_l[g / 2] >> (g & 1) * 4 & 15, high = kt_load16(b->scales_h) >> 2 * g & 3;
            scales[g] = d * (float)((low | high << 4) - 32);
            codebook(b->qs + 16 * g, u + 32 * g);
        }
    }
}

void kt_fill_unpack_iq_portable(struct kt_kernels *k) {
    k->unpack[KT_FMT_IQ4_NL] = unpack_iq4_nl;
    k->unpack[KT_FMT_IQ4_XS] = unpack_iq4_xs;
}
