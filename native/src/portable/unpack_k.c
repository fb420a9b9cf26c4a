/* Unpacking in portable C: the K super-blocks of 256. See unpack.c. Inner loops have one shift for all bytes, so that
 * compilers turn them into vectors. */
#include "../kernels.h"
#include "../formats/quants.h"

/* The two-bit values of a super-block: 32 bytes a half, four values a byte, 32 apart. */
static void two_bits(const uint8_t *restrict qs, uint8_t *restrict u) {
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++) u[32 * g + i] = qs[g / 4 * 32 + i] >> (g % 4 * 2) & 3;
}

static void unpack_q2_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const kt_block_q2_k *b = (const kt_block_q2_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 8, mins += 16) {
        float d = kt_load_f16(b->d), dmin = kt_load_f16(b->dmin);
        for (int g = 0; g < 8; g++) scales[g] = d;
        for (int g = 0; g < 16; g++) mins[g] = dmin * (float)(b->scales[g] >> 4);
        two_bits(b->qs, u);
        for (int g = 0; g < 16; g++) {
            const uint8_t scale = b->scales[g] & 15;
            for (int i = 0; i < 16; i++) u[16 * g + i] = (uint8_t)(u[16 * g + i] * scale);
        }
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
        two_bits(b->qs, u);
        for (int g = 0; g < 8; g++)
            for (int i = 0; i < 32; i++) u[32 * g + i] |= (uint8_t)((b->hmask[i] >> g & 1) << 2);
        for (int g = 0; g < 16; g++)
            for (int i = 0; i < 16; i++) u[16 * g + i] = (uint8_t)(128 - (u[16 * g + i] - 4) * sub[g]);
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

/* Half a Q6_K block: 128 values, four bits in `low`, two in `high`. */
static void six_bits(const uint8_t *restrict low, const uint8_t *restrict high, uint8_t *restrict u) {
    for (int i = 0; i < 32; i++) {
        u[i] = (uint8_t)((low[i] & 15) | (high[i] & 3) << 4);
        u[32 + i] = (uint8_t)((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4);
        u[64 + i] = (uint8_t)(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
        u[96 + i] = (uint8_t)(low[32 + i] >> 4 | (high[i] >> 6) << 4);
    }
}

static void unpack_q6_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    const kt_block_q6_k *b = (const kt_block_q6_k *)w;
    uint8_t *u = data;
    for (int64_t i = 0; i < n / KT_QK; i++, b++, u += KT_QK, scales += 16) {
        float d = kt_load_f16(b->d);
        for (int g = 0; g < 16; g++) scales[g] = d * (float)b->scales[g];
        for (int half = 0; half < 2; half++) six_bits(b->ql + 64 * half, b->qh + 32 * half, u + 128 * half);
    }
}

void kt_fill_unpack_k_portable(struct kt_kernels *k) {
    k->unpack[KT_FMT_Q2_K] = unpack_q2_k;
    k->unpack[KT_FMT_Q3_K] = unpack_q3_k;
    k->unpack[KT_FMT_Q4_K] = unpack_q4_k;
    k->unpack[KT_FMT_Q5_K] = unpack_q5_k;
    k->unpack[KT_FMT_Q6_K] = unpack_q6_k;
}
