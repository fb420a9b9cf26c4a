/* The panel GEMMs in portable C, and the interleave that makes panels. See struct kt_panel for the layout.
 *
 * Inner loops run over the 16 rows of a tile, four columns at once: compilers turn that into vectors for any machine,
 * if they are kept from unrolling the loop first. */
#include <string.h>

#include "../kernels.h"

#define ROWS _Pragma("GCC unroll 1") for (int r = 0; r < KT_TILE; r++)

static void interleave(const uint32_t *in, size_t in_stride, int64_t n, uint32_t *out) {
    for (int64_t j = 0; j < n; j++)
        for (int r = 0; r < KT_TILE; r++) out[j * KT_TILE + r] = in[(size_t)r * in_stride + (size_t)j];
}

/* sum[r] += four columns of w [4][16] times x. */
static inline void add_columns(const float *restrict w, const float *restrict x, float *restrict sum) {
    ROWS sum[r] += w[r] * x[0] + w[KT_TILE + r] * x[1] + w[2 * KT_TILE + r] * x[2] + w[3 * KT_TILE + r] * x[3];
}

/* u - z of n columns. */
static inline void take_codes(const uint32_t *restrict u, int n, int zero, float *restrict w) {
    for (int k = 0; k < n; k += 4, u += KT_TILE, w += 4 * KT_TILE)
        ROWS {
            w[r] = (float)((int)(u[r] & 255) - zero);
            w[KT_TILE + r] = (float)((int)(u[r] >> 8 & 255) - zero);
            w[2 * KT_TILE + r] = (float)((int)(u[r] >> 16 & 255) - zero);
            w[3 * KT_TILE + r] = (float)((int)(u[r] >> 24) - zero);
        }
}

/* c += scales * d * the integer sums of one group. They are below 2^24, so floats hold them exactly. */
static void add_group(const struct kt_panel *p, int tile, int64_t first, const struct kt_acts *a, const int32_t *token,
                      int tokens, int64_t k0, float *restrict c, int64_t ldc) {
    const float *scales = p->scales + (tile * p->k + first) / p->group * KT_TILE;
    float w[KT_ACT_GROUP * KT_TILE], x[KT_ACT_GROUP];
    take_codes(p->data + (tile * p->k + first) / 4 * KT_TILE, p->group, p->zero, w);
    for (int i = 0; i < tokens; i++, c += ldc) {
        const int64_t at = token[i] * a->stride + k0 + first;
        const float d = a->d[at / KT_ACT_GROUP];
        float sum[KT_TILE] = {0};
        for (int k = 0; k < p->group; k++) x[k] = a->q[at + k];
        for (int k = 0; k < p->group; k += 4) add_columns(w + k * KT_TILE, x + k, sum);
        ROWS c[r] += d * scales[r] * sum[r];
    }
}

/* c -= mins * d * the sum of one group of activations. */
static void subtract_mins(const struct kt_panel *p, int tile, int64_t first, const struct kt_acts *a,
                          const int32_t *token, int tokens, int64_t k0, float *restrict c, int64_t ldc) {
    const float *mins = p->mins + (tile * p->k + first) / p->min_group * KT_TILE;
    for (int i = 0; i < tokens; i++, c += ldc) {
        const int64_t at = token[i] * a->stride + k0 + first, g = at / KT_ACT_GROUP;
        const int32_t sum = p->min_group == 32 ? a->low[g] + a->high[g] : at % 32 ? a->high[g] : a->low[g];
        const float ds = a->d[g] * (float)sum;
        ROWS c[r] -= mins[r] * ds;
    }
}

static void clear(int rows, int tokens, float *c, int64_t ldc) {
    for (int i = 0; i < tokens; i++) memset(c + i * ldc, 0, (size_t)rows * sizeof *c);
}

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    if (!add) clear(p->tiles * KT_TILE, tokens, c, ldc);
    for (int tile = 0; tile < p->tiles; tile++, c += KT_TILE) {
        for (int64_t k = 0; k < p->k; k += p->group) add_group(p, tile, k, a, token, tokens, k0, c, ldc);
        for (int64_t k = 0; p->mins && k < p->k; k += p->min_group)
            subtract_mins(p, tile, k, a, token, tokens, k0, c, ldc);
    }
}

static void gemm_f32(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                     float *c, int64_t ldc, int add) {
    for (int i = 0; i < tokens; i++) {
        const float *x = a->f + token[i] * a->stride + k0;
        for (int tile = 0; tile < p->tiles; tile++) {
            const float *w = (const float *)(p->data + tile * p->k * KT_TILE);
            float sum[KT_TILE] = {0}, *out = c + i * ldc + tile * KT_TILE;
            int64_t k = 0;
            for (; k + 4 <= p->k; k += 4) add_columns(w + k * KT_TILE, x + k, sum);
            for (; k < p->k; k++) ROWS sum[r] += w[k * KT_TILE + r] * x[k];
            ROWS out[r] = add ? out[r] + sum[r] : sum[r];
        }
    }
}

void kt_fill_gemm_portable(struct kt_kernels *k) {
    k->interleave = interleave;
    k->gemm_q8 = gemm_q8;
    k->gemm_f32 = gemm_f32;
    k->gemm_bf16 = NULL;
}
