/* Unpacking in portable C: the IQ formats, whose values come from tables (iq_tables.h). See unpack.c. */
#include "../formats/iq_tables.h"
#include "../kernels.h"
#include "../formats/quants.h"

/* ---- IQ4: a codebook of 16 values ------------------------------------------------------------------- */

static void codebook(const uint8_t qs[16], uint8_t *u) {
    for (int i = 0; i < 16; i++) {
        u[i] = kt_iq4_codes[qs[i] & 15];
        u[i + 16] = kt_iq4_codes[qs[i] >> 4];
    }
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

/* ---- IQ2 and IQ3: magnitudes from a grid, signs from the file --------------------------------------- */

/* Eight codes: `zero` plus or minus the bytes of a grid point; bit i of `signs` makes value i negative. */
static void signed8(uint64_t point, int signs, int zero, uint8_t *u) {
    for (int i = 0; i < 8; i++) {
        int magnitude = point >> 8 * i & 255;
        u[i] = (uint8_t)(signs >> i & 1 ? zero - magnitude : zero + magnitude);
    }
}

static uint64_t pair(uint32_t low, uint32_t high) { return low | (uint64_t)high << 32; }

/* Nibble i, low one first. */
static int nibble(const uint8_t *packed, int i) { return packed[i / 2] >> (i & 1) * 4 & 15; }

static void unpack_iq2_xxs(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq2_xxs *b = (const kt_block_iq2_xxs *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 8)
        for (int g = 0; g < 8; g++) {
            const uint8_t *index = b->qs + 8 * g;
            uint32_t signs = kt_load32(index + 4);
            scales[g] = kt_load_f16(b->d) * (0.5f + (float)(signs >> 28)) * 0.25f;
            for (int j = 0; j < 4; j++, u += 8)
                signed8(kt_iq2_xxs_grid[index[j]], kt_iq_signs[signs >> 7 * j & 127], 43, u);
        }
}

static void unpack_iq2_xs(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq2_xs *b = (const kt_block_iq2_xs *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 16) {
        for (int g = 0; g < 16; g++) scales[g] = kt_load_f16(b->d) * (0.5f + (float)nibble(b->scales, g)) * 0.25f;
        for (int j = 0; j < 32; j++, u += 8) {
            int q = kt_load16(b->qs + 2 * j);
            signed8(kt_iq2_xs_grid[q & 511], kt_iq_signs[q >> 9], 43, u);
        }
    }
}

static void unpack_iq2_s(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq2_s *b = (const kt_block_iq2_s *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 16) {
        for (int g = 0; g < 16; g++) scales[g] = kt_load_f16(b->d) * (0.5f + (float)nibble(b->scales, g)) * 0.25f;
        for (int j = 0; j < 32; j++, u += 8) {
            int high = b->qh[j / 4] >> 2 * (j & 3) & 3;
            signed8(kt_iq2_s_grid[b->qs[j] | high << 8], b->signs[j], 43, u);
        }
    }
}

static void unpack_iq3_xxs(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq3_xxs *b = (const kt_block_iq3_xxs *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 8)
        for (int g = 0; g < 8; g++) {
            uint32_t signs = kt_load32(b->signs + 4 * g);
            scales[g] = kt_load_f16(b->d) * (0.5f + (float)(signs >> 28)) * 0.5f;
            for (int j = 0; j < 4; j++, u += 8) {
                const uint8_t *index = b->qs + 8 * g + 2 * j;
                uint64_t point = pair(kt_iq3_xxs_grid[index[0]], kt_iq3_xxs_grid[index[1]]);
                signed8(point, kt_iq_signs[signs >> 7 * j & 127], 62, u);
            }
        }
}

static void unpack_iq3_s(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq3_s *b = (const kt_block_iq3_s *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 8) {
        for (int g = 0; g < 8; g++) scales[g] = kt_load_f16(b->d) * (float)(2 * nibble(b->scales, g) + 1);
        for (int j = 0; j < 32; j++, u += 8) {
            int high = b->qh[j / 4] >> 2 * (j & 3); /* bits 0 and 1: the ninth bits of both indices */
            uint32_t low_point = kt_iq3_s_grid[b->qs[2 * j] | (high & 1) << 8];
            uint32_t high_point = kt_iq3_s_grid[b->qs[2 * j + 1] | (high & 2) << 7];
            signed8(pair(low_point, high_point), b->signs[j], 15, u);
        }
    }
}

/* ---- IQ1: -1, 0 or 1 from a grid, all moved up or down by 1/8. In eighths: 8 * grid +- 1 ------------- */

static void shifted8(uint64_t point, int minus, uint8_t *u) {
    for (int i = 0; i < 8; i++) u[i] = (uint8_t)((point >> 8 * i & 255) + (minus ? 0 : 2));
}

static void unpack_iq1_s(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq1_s *b = (const kt_block_iq1_s *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 8)
        for (int g = 0; g < 8; g++) {
            int high = kt_load16(b->qh + 2 * g);
            scales[g] = kt_load_f16(b->d) * (float)(2 * (high >> 12 & 7) + 1) * 0.125f;
            for (int j = 0; j < 4; j++, u += 8)
                shifted8(kt_iq1_grid[b->qs[4 * g + j] | (high >> 3 * j & 7) << 8], high >> 15, u);
        }
}

static void unpack_iq1_m(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_iq1_m *b = (const kt_block_iq1_m *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, scales += 16) {
        float d = kt_iq1_m_scale(b->scales);
        for (int g = 0; g < 16; g++) {
            int scale = kt_load16(b->scales + g / 4 * 2) >> 3 * (g & 3) & 7;
            scales[g] = d * (float)(2 * scale + 1) * 0.125f;
        }
        for (int j = 0; j < 32; j++, u += 8) {
            int high = nibble(b->qh, j);
            shifted8(kt_iq1_grid[b->qs[j] | (high & 7) << 8], high >> 3, u);
        }
    }
}

void kt_fill_unpack_iq_portable(struct kt_kernels *k) {
    k->unpack[KT_FMT_IQ1_S] = unpack_iq1_s;
    k->unpack[KT_FMT_IQ1_M] = unpack_iq1_m;
    k->unpack[KT_FMT_IQ2_XXS] = unpack_iq2_xxs;
    k->unpack[KT_FMT_IQ2_XS] = unpack_iq2_xs;
    k->unpack[KT_FMT_IQ2_S] = unpack_iq2_s;
    k->unpack[KT_FMT_IQ3_XXS] = unpack_iq3_xxs;
    k->unpack[KT_FMT_IQ3_S] = unpack_iq3_s;
    k->unpack[KT_FMT_IQ4_NL] = unpack_iq4_nl;
    k->unpack[KT_FMT_IQ4_XS] = unpack_iq4_xs;
}
