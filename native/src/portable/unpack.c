/* Unpacking in portable C, the readable truth of every format: plain floats, blocks of 32, ternary and 4-bit floats.
 * Super-blocks are in unpack_k.c, grids in unpack_iq.c. Codes leave in column order.
 * Every table index comes from a bit field as wide as its table, so no byte of a file can lead outside one. */
#include "../formats/iq_tables.h"
#include "../kernels.h"
#include "../formats/quants.h"

static void unpack_f32(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    memcpy(data, w, (size_t)n * 4);
}

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    for (int64_t i = 0; i < n; i++) out[i] = kt_load_f16(w + 2 * i);
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales;
    (void)mins;
    float *out = data;
    for (int64_t i = 0; i < n; i++) out[i] = kt_bf16_to_f32(kt_load16(w + 2 * i));
}

/* 16 bytes: low nibbles are values 0..15, high ones 16..31. */
static void nibbles(const uint8_t qs[16], uint8_t *u) {
    for (int i = 0; i < 16; i++) {
        u[i] = qs[i] & 15;
        u[i + 16] = qs[i] >> 4;
    }
}

static void fifth_bits(const uint8_t qh[4], uint8_t *u) {
    for (int i = 0; i < 32; i++) u[i] |= (uint8_t)((qh[i / 8] >> (i & 7) & 1) << 4);
}

static void unpack_q4_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_q4_0 *b = (const kt_block_q4_0 *)w;
    for (int64_t g = 0; g < n / 32; g++, b++) {
        scales[g] = kt_load_f16(b->d);
        nibbles(b->qs, (uint8_t *)data + 32 * g);
    }
}

static void unpack_q4_1(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const kt_block_q4_1 *b = (const kt_block_q4_1 *)w;
    for (int64_t g = 0; g < n / 32; g++, b++) {
        scales[g] = kt_load_f16(b->d);
        mins[g] = -kt_load_f16(b->m);
        nibbles(b->qs, (uint8_t *)data + 32 * g);
    }
}

static void unpack_q5_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_q5_0 *b = (const kt_block_q5_0 *)w;
    for (int64_t g = 0; g < n / 32; g++, b++) {
        scales[g] = kt_load_f16(b->d);
        nibbles(b->qs, (uint8_t *)data + 32 * g);
        fifth_bits(b->qh, (uint8_t *)data + 32 * g);
    }
}

static void unpack_q5_1(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const kt_block_q5_1 *b = (const kt_block_q5_1 *)w;
    for (int64_t g = 0; g < n / 32; g++, b++) {
        scales[g] = kt_load_f16(b->d);
        mins[g] = -kt_load_f16(b->m);
        nibbles(b->qs, (uint8_t *)data + 32 * g);
        fifth_bits(b->qh, (uint8_t *)data + 32 * g);
    }
}

static void unpack_q8_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_q8_0 *b = (const kt_block_q8_0 *)w;
    uint8_t *u = data;
    for (int64_t g = 0; g < n / 32; g++, b++, u += 32) {
        scales[g] = kt_load_f16(b->d);
        for (int i = 0; i < 32; i++) u[i] = (uint8_t)(b->q[i] + 128);
    }
}

static void unpack_mxfp4(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_mxfp4 *b = (const kt_block_mxfp4 *)w;
    uint8_t *u = data;
    for (int64_t g = 0; g < n / 32; g++, b++, u += 32) {
        scales[g] = kt_e8m0_half(b->e);
        nibbles(b->qs, u);
        for (int i = 0; i < 32; i++) u[i] = kt_fp4_codes[u[i]];
    }
}

static void unpack_nvfp4(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_nvfp4 *b = (const kt_block_nvfp4 *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / 64; i++, b++)
        for (int g = 0; g < 4; g++, u += 16) {
            *scales++ = kt_ue4m3_half(b->d[g]);
            for (int j = 0; j < 8; j++) {
                u[j] = kt_fp4_codes[b->qs[8 * g + j] & 15];
                u[j + 8] = kt_fp4_codes[b->qs[8 * g + j] >> 4];
            }
        }
}

static void unpack_tq1_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_tq1_0 *b = (const kt_block_tq1_0 *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8) {
        for (int g = 0; g < 8; g++) scales[g] = kt_load_f16(b->d);
        for (int digit = 0; digit < 5; digit++) {
            for (int c = 0; c < 32; c++) u[32 * digit + c] = (uint8_t)kt_ternary(b->qs[c], digit);
            for (int c = 0; c < 16; c++) u[160 + 16 * digit + c] = (uint8_t)kt_ternary(b->qs[32 + c], digit);
        }
        for (int c = 0; c < 16; c++) u[240 + c] = (uint8_t)kt_ternary(b->qh[c % 4], c / 4);
    }
}

static void unpack_tq2_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_tq2_0 *b = (const kt_block_tq2_0 *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8) {
        for (int g = 0; g < 8; g++) scales[g] = kt_load_f16(b->d);
        for (int g = 0; g < 8; g++)
            for (int c = 0; c < 32; c++) u[32 * g + c] = b->qs[g / 4 * 32 + c] >> (g % 4 * 2) & 3;
    }
}

void kt_fill_unpack_k_portable(struct kt_kernels *k);
void kt_fill_unpack_iq_portable(struct kt_kernels *k);
void kt_fill_unpack_separate_portable(struct kt_kernels *k);

void kt_fill_unpack_portable(struct kt_kernels *k) {
    k->unpack[KT_FMT_F32] = unpack_f32;
    k->unpack[KT_FMT_F16] = unpack_f16;
    k->unpack[KT_FMT_BF16] = unpack_bf16;
    k->unpack[KT_FMT_Q4_0] = unpack_q4_0;
    k->unpack[KT_FMT_Q4_1] = unpack_q4_1;
    k->unpack[KT_FMT_Q5_0] = unpack_q5_0;
    k->unpack[KT_FMT_Q5_1] = unpack_q5_1;
    k->unpack[KT_FMT_Q8_0] = unpack_q8_0;
    k->unpack[KT_FMT_TQ1_0] = unpack_tq1_0;
    k->unpack[KT_FMT_TQ2_0] = unpack_tq2_0;
    k->unpack[KT_FMT_MXFP4] = unpack_mxfp4;
    k->unpack[KT_FMT_NVFP4] = unpack_nvfp4;
    kt_fill_unpack_k_portable(k);
    kt_fill_unpack_iq_portable(k);
    kt_fill_unpack_separate_portable(k);
}
