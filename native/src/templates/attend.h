/* templates/attend.h: what attention needs beside products and powers of e, in plain C that the compiler vectorizes.
 * Every instruction set compiles this same text (src/<isa>/attend.c), and gets the same bits: see act.h. */
#ifndef KT_ATTEND_IMPL_H
#define KT_ATTEND_IMPL_H

#include <math.h>

#include "../kernels.h"
#include "../formats/quants.h"

static void rescale(float factor, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

/* pair_rows of struct kt_kernels. `line`: sixteen bf16 of two tokens as a line of a tile, which portable/attend.c says
 * in plain C. */
typedef void (*pair_line_fn)(const uint8_t *first, const uint8_t *second, uint32_t *line);

static inline __attribute__((always_inline)) void pair_rows_by(pair_line_fn line, const uint8_t *values,
                                                               size_t value_row, int tokens, int64_t n, uint32_t *data,
                                                               int64_t tile) {
    static const uint8_t none[2 * KT_TILE];
    for (int t = 0; t < tokens; t += 2, values += 2 * value_row, data += KT_TILE) {
        const uint8_t *second = t + 1 < tokens ? values + value_row : NULL; /* an odd last token: with zeros */
        int64_t c = 0;
        for (; c + KT_TILE <= n; c += KT_TILE)
            line(values + c * 2, second ? second + c * 2 : none, data + c / KT_TILE * tile);
        if (c == n) continue;
        uint8_t last[2][2 * KT_TILE] = {{0}};
        memcpy(last[0], values + c * 2, (size_t)(n - c) * 2);
        if (second) memcpy(last[1], second + c * 2, (size_t)(n - c) * 2);
        line(last[0], last[1], data + c / KT_TILE * tile);
    }
}

static void load_q8_0(const uint8_t *p, int64_t n, float *out) {
    for (int64_t i = 0; i < n / 32; i++, p += sizeof(kt_block_q8_0), out += 32) {
        const float d = kt_load_f16(p);
        int8_t q[32];
        memcpy(q, p + 2, sizeof q);
        for (int j = 0; j < 32; j++) out[j] = d * (float)q[j];
    }
}

static void fill_attend(struct kt_kernels *k) {
    k->rescale = rescale;
    k->load_q8_0 = load_q8_0;
}

#endif
