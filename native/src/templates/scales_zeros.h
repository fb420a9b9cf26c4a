/* templates/scales_zeros.h: separate scales and zero points, of a tile of 16 rows, in plain C that the compiler
 * vectorizes: src/<isa>/unpack.c compiles it for each instruction set. */
#ifndef KT_SCALES_ZEROS_H
#define KT_SCALES_ZEROS_H

#include "../kernels.h"
#include "../formats/quants.h"

/* out[i] = scale i of those at p, times factor. */
static void load_scales(int type, const uint8_t *p, int64_t n, float factor, float *restrict out) {
    switch (type) {
    case KT_SCALE_F32:
        for (int64_t i = 0; i < n; i++) out[i] = kt_load_f32(p + 4 * i) * factor;
        break;
    case KT_SCALE_F16:
        for (int64_t i = 0; i < n; i++) out[i] = kt_load_f16(p + 2 * i) * factor;
        break;
    case KT_SCALE_BF16:
        for (int64_t i = 0; i < n; i++) out[i] = kt_bf16_to_f32(kt_load16(p + 2 * i)) * factor;
        break;
    case KT_SCALE_E8M0:
        for (int64_t i = 0; i < n; i++) out[i] = kt_e8m0_to_f32(p[i]) * factor;
        break;
    default:
        for (int64_t i = 0; i < n; i++) out[i] = kt_e4m3_to_f32(p[i]) * factor;
    }
}

/* out[g][16] = in[16][stride], g < count. */
static void turn(const float *in, int64_t stride, int64_t count, float *restrict out) {
    for (int64_t g = 0; g < count; g++)
        for (int r = 0; r < KT_TILE; r++) out[g * KT_TILE + r] = in[r * stride + g];
}

/* Zero points of 16 rows of a group that are packed along rows: p is the group's
 * row of them. */
static void zeros_along_rows(const struct kt_matrix *w, const uint8_t *p, int64_t first, int rows,
                             float *restrict out) {
    const int each = w->traits->zeros_per_dword, bits = 32 / each;
    for (int r = 0; r < rows; r++) {
        const int64_t row = first + r;
        const int at = w->format == KT_FMT_AWQ4 ? kt_awq_nibble[row % 8] : (int)(row % each);
        out[r] = (float)((int)(kt_load32(p + 4 * (row / each)) >> (bits * at) & ((1u << bits) - 1)) + w->zero_bias);
    }
}

/* Zero points of a row's groups: a dword holds those of eight or four rows of a group. */
static void zeros_of_row(const struct kt_matrix *w, int64_t row, int64_t from, int64_t count, float *restrict out) {
    const int each = w->traits->zeros_per_dword, bits = 32 / each, bias = w->zero_bias;
    const int shift = bits * (int)(row % each);
    const uint8_t *p = w->zeros + (size_t)(row / each) * w->zero_stride + 4 * from;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < count; i++) out[i] = (float)((int)(kt_load32(p + 4 * i) >> shift & mask) + bias);
}

/* See kt_kernels.read_scales. */
static void read_scales(const struct kt_matrix *w, int64_t first, int rows, int64_t from, int64_t count,
                        float *restrict scales, float *restrict zeros) {
    const int64_t size = (int64_t)kt_scale_size(w->scale_type);
    if (w->traits->by_column) { /* a stored row of scales has those of all rows */
        for (int64_t g = 0; g < count; g++, scales += KT_TILE) {
            const uint8_t *p = w->scales + (size_t)(from + g) * w->scale_stride + size * first;
            for (int r = rows; r < KT_TILE; r++) scales[r] = 0.0f;
            load_scales(w->scale_type, p, rows, w->scale, scales);
            if (!zeros) continue;
            for (int r = rows; r < KT_TILE; r++) zeros[r] = 0.0f;
            zeros_along_rows(w, w->zeros + (size_t)(from + g) * w->zero_stride, first, rows, zeros);
            zeros += KT_TILE;
        }
        return;
    }
    enum { PIECE = 64 };
    for (int64_t g = 0; g < count; g += PIECE) {
        const int64_t n = count - g < PIECE ? count - g : PIECE;
        float s[KT_TILE][PIECE], z[KT_TILE][PIECE];
        memset(s[rows < KT_TILE ? rows : 0], 0, sizeof *s * (size_t)(rows < KT_TILE ? KT_TILE - rows : 0));
        memset(z[rows < KT_TILE ? rows : 0], 0, sizeof *z * (size_t)(rows < KT_TILE ? KT_TILE - rows : 0));
        for (int r = 0; r < rows; r++) {
            const uint8_t *row = w->scales + (size_t)((first + r) / w->scale_rows) * w->scale_stride;
            load_scales(w->scale_type, row + size * (from + g), n, w->scale, s[r]);
            if (zeros) zeros_of_row(w, first + r, from + g, n, z[r]);
        }
        turn(s[0], PIECE, n, scales + g * KT_TILE);
        if (zeros) turn(z[0], PIECE, n, zeros + g * KT_TILE);
    }
}

#endif
