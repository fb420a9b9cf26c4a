/* The panel GEMMs in portable C, and the interleave that makes panels. See struct kt_panel for the layout. */
#include <string.h>

#include "../kernels.h"

static void interleave(const uint32_t *in, size_t in_stride, int64_t n, uint32_t *out) {
    for (int64_t j = 0; j < n; j++)
        for (int r = 0; r < KT_TILE; r++) out[j * KT_TILE + r] = in[(size_t)r * in_stride + (size_t)j];
}

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    int64_t groups = p->k / p->group;
    for (int i = 0; i < tokens; i++) {
        const int8_t *q = a->q + token[i] * a->stride + k0;
        const float *d = a->d + (token[i] * a->stride + k0) / KT_ACT_GROUP;
        const int32_t *half[2] = {a->low + (token[i] * a->stride + k0) / KT_ACT_GROUP,
                                  a->high + (token[i] * a->stride + k0) / KT_ACT_GROUP};
        for (int tile = 0; tile < p->tiles; tile++) {
            const uint8_t *u = (const uint8_t *)(p->data + tile * (p->k / 4) * KT_TILE);
            const float *scales = p->scales + tile * groups * KT_TILE;
            float total[KT_TILE] = {0};
            for (int64_t g = 0; g < groups; g++) {
                int64_t first = g * p->group, ag = first / KT_ACT_GROUP;
                int32_t sum[KT_TILE] = {0};
                for (int64_t k = first; k < first + p->group; k += 4)
                    for (int r = 0; r < KT_TILE; r++)
                        for (int b = 0; b < 4; b++) sum[r] += (u[k * KT_TILE + 4 * r + b] - p->zero) * q[k + b];
                for (int r = 0; r < KT_TILE; r++) total[r] += d[ag] * scales[g * KT_TILE + r] * (float)sum[r];
            }
            for (int64_t g = 0; p->mins && g < p->k / p->min_group; g++) {
                const float *mins = p->mins + (tile * (p->k / p->min_group) + g) * KT_TILE;
                int64_t first = g * p->min_group, ag = first / KT_ACT_GROUP;
                int32_t sum = p->min_group == 16 ? half[first / 16 % 2][ag] : half[0][ag] + half[1][ag];
                for (int r = 0; r < KT_TILE; r++) total[r] -= mins[r] * (d[ag] * (float)sum);
            }
            float *out = c + i * ldc + tile * KT_TILE;
            for (int r = 0; r < KT_TILE; r++) out[r] = add ? out[r] + total[r] : total[r];
        }
    }
}

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    for (int i = 0; i < tokens; i++) {
        const float *x = a->f + token[i] * a->stride + k0;
        for (int tile = 0; tile < p->tiles; tile++) {
            const float *w = (const float *)(p->data + tile * p->k * KT_TILE);
            float total[KT_TILE] = {0};
            for (int64_t k = 0; k < p->k; k++)
                for (int r = 0; r < KT_TILE; r++) total[r] += w[k * KT_TILE + r] * x[k];
            float *out = c + i * ldc + tile * KT_TILE;
            for (int r = 0; r < KT_TILE; r++) out[r] = add ? out[r] + total[r] : total[r];
        }
    }
}

void kt_fill_gemm_portable(struct kt_kernels *k) {
    k->interleave = interleave;
    k->gemm_q8 = gemm_q8;
    k->gemm_f32 = gemm_f32;
    k->gemm_bf16 = NULL;
}
