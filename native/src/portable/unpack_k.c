/* Unpacking in portable C: the K super-blocks of 256. See unpack.c. */
#include "../kernels.h"
#include "../quants.h"

/* Two-bit value c of a super-block: 32 bytes a half, four values a byte, 32 apart. */
static int two_bits(const uint8_t qs[64], int c) { return qs[c / 128 * 32 + c % 32] >> (c % 128 / 32 * 2) & 3; }

static void unpack_q2_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const kt_block_q2_k *b = (const kt_block_q2_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8, mins += 16) {
        float d = kt_load_f16(b->d), dmin = kt_load_f16(b->dmin);
        for (int g = 0; g < 8; g++) scales[g] = d;
        for (int g = 0; g < 16; g++) mins[g] = dmin * (float)(b->scales[g] >> 4);
        for (int c = 0; c < KT_QK; c++) u[c] = (uint8_t)(two_bits(b->qs, c) * (b->scales[c / 16] & 15));
    }
}

static void unpack_q3_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_q3_k *b = (const kt_block_q3_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8) {
        int8_t sub[16];
        kt_q3_scales(b->scales, sub);
        float d = kt_load_f16(b->d);
        for (int g = 0; g < 8; g++) scales[g] = -d;
        for (int c = 0; c < KT_QK; c++) {
            int q = two_bits(b->qs, c) | (b->hmask[c % 32] >> (c / 32) & 1) << 2;
            u[c] = (uint8_t)(128 - (q - 4) * sub[c / 16]);
        }
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

void kt_fill_unpack_k_portable(struct kt_kernels *k) {
    k->unpack[KT_FMT_Q2_K] = unpack_q2_k;
    k->unpack[KT_FMT_Q3_K] = unpack_q3_k;
    k->unpack[KT_FMT_Q4_K] = unpack_q4_k;
    k->unpack[KT_FMT_Q5_K] = unpack_q5_k;
    k->unpack[KT_FMT_Q6_K] = unpack_q6_k;
}
