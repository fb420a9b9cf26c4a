/* Unpacking in portable C: the readable truth of every format. Codes leave in column order. */
#include "../kernels.h"
#include "../quants.h"

static void unpack_f32(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales, (void)mins;
    memcpy(data, w, (size_t)n * 4);
}

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales, (void)mins;
    float *out = data;
    for (int64_t i = 0; i < n; i++) out[i] = kt_load_f16(w + 2 * i);
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)scales, (void)mins;
    float *out = data;
    for (int64_t i = 0; i < n; i++) out[i] = kt_bf16_to_f32(kt_load16(w + 2 * i));
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

/* Scales and mins of one Q4_K or Q5_K block: 8 groups. */
static void k4_groups(const uint8_t *d, const uint8_t *packed, float *scales, float *mins) {
    uint8_t s[16];
    kt_k4_scales(packed, s);
    float scale = kt_load_f16(d), min = kt_load_f16(d + 2);
    for (int g = 0; g < 8; g++) {
        scales[g] = scale * (float)s[g];
        mins[g] = min * (float)s[8 + g];
    }
}

static void unpack_q4_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const kt_block_q4_k *b = (const kt_block_q4_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8, mins += 8) {
        k4_groups(b->d, b->scales, scales, mins);
        for (int pair = 0; pair < 4; pair++)
            for (int j = 0; j < 32; j++) {
                u[64 * pair + j] = b->qs[32 * pair + j] & 15;
                u[64 * pair + 32 + j] = b->qs[32 * pair + j] >> 4;
            }
    }
}

static void unpack_q5_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const kt_block_q5_k *b = (const kt_block_q5_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8, mins += 8) {
        k4_groups(b->d, b->scales, scales, mins);
        for (int pair = 0; pair < 4; pair++)
            for (int j = 0; j < 32; j++) {
                int low = b->qh[j] >> (2 * pair) & 1, high = b->qh[j] >> (2 * pair + 1) & 1;
                u[64 * pair + j] = (uint8_t)((b->qs[32 * pair + j] & 15) | low << 4);
                u[64 * pair + 32 + j] = (uint8_t)((b->qs[32 * pair + j] >> 4) | high << 4);
            }
    }
}

static void unpack_q6_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_q6_k *b = (const kt_block_q6_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 16) {
        float d = kt_load_f16(b->d);
        for (int g = 0; g < 16; g++) scales[g] = d * (float)b->scales[g];
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 128; j++) { /* column 128*half + j */
                int low = b->ql[64 * half + (j & 63)] >> (j < 64 ? 0 : 4) & 15;
                int high = b->qh[32 * half + (j & 31)] >> (2 * (j / 32)) & 3;
                u[128 * half + j] = (uint8_t)(low | high << 4);
            }
    }
}

void kt_fill_unpack_portable(struct kt_kernels *k) {
    k->unpack[KT_FMT_F32] = unpack_f32;
    k->unpack[KT_FMT_F16] = unpack_f16;
    k->unpack[KT_FMT_BF16] = unpack_bf16;
    k->unpack[KT_FMT_Q8_0] = unpack_q8_0;
    k->unpack[KT_FMT_Q4_K] = unpack_q4_k;
    k->unpack[KT_FMT_Q5_K] = unpack_q5_k;
    k->unpack[KT_FMT_Q6_K] = unpack_q6_k;
}
