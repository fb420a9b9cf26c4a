/* templates/tile_k.h: tile.h for super-blocks of 256. */
#ifndef KT_TILE_K_IMPL_H
#define KT_TILE_K_IMPL_H

#include "tile.h"

#define LOW2 0x03030303u

/* The same scale for all groups of 32. */
INLINE void put_scale8(const struct kt_tile *to, fvec d) {
    for (int g = 0; g < 8; g++) put_scale(to, g, d);
}

/* fp16 that ends `end` bytes into the rows. */
INLINE fvec half_before(const struct rows *rows, size_t end) {
    vec v[4];
    columns4(rows, end - 16, v);
    return halves(v[3], 1);
}

/* ---- Q4_K, Q5_K -------------------------------------------------------------------------------------- */

/* d * scale and dmin * min, see kt_k4_scales. */
INLINE void k4_scales_of(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4], b[4];
    columns4(rows, at, h);
    const fvec d = halves(h[0], 0), dmin = halves(h[0], 1);
    b[0] = h[1] & 0x3f3f3f3f;
    b[1] = (h[3] & LOW4) | (h[1] >> 2 & 0x30303030);
    b[2] = h[2] & 0x3f3f3f3f;
    b[3] = high_nibbles(h[3]) | (h[2] >> 2 & 0x30303030);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        put_scale(to, g, d * to_float(byte_of(b[g / 4], g % 4)));
        put_min(to, g, dmin * to_float(byte_of(b[2 + g / 4], g % 4)));
    }
}

INLINE void q4_k_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    k4_scales_of(rows, at, to);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) { /* 32 bytes hold two groups of 32 */
        const int dword = i / 2 * 16 + i % 2 * 4;
        vec v[4];
        columns4(rows, at + 16 + 16 * i, v);
        for (int j = 0; j < 4; j++) {
            put(to, dword + j, v[j] & LOW4);
            put(to, dword + 8 + j, high_nibbles(v[j]));
        }
    }
}
TILE_BLOCKS(q4_k, KT_QK, 144, 8, 8)

/* Bits g of each byte, as 16. */
INLINE vec bits_as_16(vec v, const int g) { return (g < 4 ? v << (4 - g) : v >> (g - 4)) & 0x10101010; }

INLINE void q5_k_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    k4_scales_of(rows, at, to);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) { /* of 32 columns */
        vec high[4], v[4];
        columns4(rows, at + 16 + 16 * half, high);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) { /* two groups of 32 */
            columns4(rows, at + 48 + 32 * p + 16 * half, v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                put(to, 16 * p + 4 * half + j, (v[j] & LOW4) | bits_as_16(high[j], 2 * p));
                put(to, 16 * p + 8 + 4 * half + j, high_nibbles(v[j]) | bits_as_16(high[j], 2 * p + 1));
            }
        }
    }
}
TILE_BLOCKS(q5_k, KT_QK, 176, 8, 8)

/* ---- Q6_K -------------------------------------------------------------------------------------------- */

/* Bits 2p and 2p + 1 of each byte, as multiples of 16. */
INLINE vec pairs_as_16(vec v, const int p) { return (p < 2 ? v << (4 - 2 * p) : v >> (2 * p - 4)) & 0x30303030; }

INLINE void q6_k_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const fvec d = half_before(rows, at + 210);
    vec s[4];
    columns4(rows, at + 192, s);
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) put_scale(to, g, d * to_float(signed_byte_of(s[g / 4], g % 4)));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* columns 128 * (i / 2) + 16 * (i % 2) + 0 .. 15, and 32, 64, 96 further on */
        const int dword = i / 2 * 32 + i % 2 * 4;
        const size_t low = at + i / 2 * 64 + i % 2 * 16;
        vec high[4], v[4];
        columns4(rows, at + 128 + 16 * i, high);
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            columns4(rows, low + 32 * p, v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                put(to, dword + 8 * p + j, (v[j] & LOW4) | pairs_as_16(high[j], p));
                put(to, dword + 16 + 8 * p + j, high_nibbles(v[j]) | pairs_as_16(high[j], 2 + p));
            }
        }
    }
}
TILE_BLOCKS(q6_k, KT_QK, 210, 16, 0)

/* ---- Q2_K, Q3_K: scales folded into the codes, see traits.c ------------------------------------------ */

/* Byte i of each dword, in both of its halves. */
INLINE vec16 twice(vec v, const uint32_t i) {
    const uint32_t k = 0x80008000 + 0x00010001 * i;
    return (vec16)shuffle8(v, LANES(k, k + 0x00040004, k + 0x00080008, k + 0x000c000c));
}

INLINE void q2_k_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec s[4], h[4];
    columns4(rows, at, s);
    columns4(rows, at + 68, h);
    const fvec dmin = halves(h[3], 1);
    put_scale8(to, halves(h[3], 0));
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) put_min(to, g, dmin * to_float(byte_of(s[g / 4] >> 4 & LOW4, g % 4)));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 16 bytes hold columns 128 * (i / 2) + 16 * (i % 2) + 32 * p */
        vec v[4];
        columns4(rows, at + 16 + 16 * i, v);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            const int g = i / 2 * 8 + 2 * p + i % 2;
            const vec16 scale = twice(s[g / 4] & LOW4, g % 4);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) /* up to 45: no carry */
                put(to, 4 * g + j, (vec)((vec16)(v[j] >> 2 * p & LOW2) * scale));
        }
    }
}
TILE_BLOCKS(q2_k, KT_QK, 84, 8, 16)

/* 128 - (q - 4) * (s - 32) = q * (32 - s) + 4 * s, for two columns in 16 bits: both results are 0 .. 255, so that what
 * a negative factor borrows from the upper one is paid back by the sum. */
INLINE void q3_k_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4], s[4];
    columns4(rows, at + 92, h);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) /* see kt_q3_scales */
        s[i] = (i < 2 ? h[1 + i] & LOW4 : high_nibbles(h[i - 1])) | pairs_as_16(h[3], i);
    put_scale8(to, -half_before(rows, at + 110));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) { /* of 32 columns */
        vec high[4], v[4];
        columns4(rows, at + 16 * half, high);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) { /* groups of 32; four share their bytes */
            const int g = 2 * i + half;
            const vec16 scale = twice(s[g / 4], g % 4), factor = 32 - scale, start = scale * 0x0404;
            if (i % 4 == 0) columns4(rows, at + 32 + 8 * i + 16 * half, v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vec third = i < 2 ? high[j] << (2 - i) : high[j] >> (i - 2);
                const vec q = (v[j] >> 2 * (i % 4) & LOW2) | (third & 0x04040404);
                put(to, 4 * g + j, (vec)((vec16)q * factor + start));
            }
        }
    }
}
TILE_BLOCKS(q3_k, KT_QK, 110, 8, 0)

/* ---- IQ4_XS ------------------------------------------------------------------------------------------ */

INLINE void iq4_xs_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4];
    columns4(rows, at, h);
    const fvec d = halves(h[0], 0);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        const vec scale = (h[1] >> 4 * g & 15) | (h[0] >> (12 + 2 * g) & 0x30);
        put_scale(to, g, d * to_float(scale - 32));
    }
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        const struct kt_tile group = {to->data + g * 8 * KT_TILE, NULL, NULL, NULL};
        vec v[4];
        columns4(rows, at + 8 + 16 * g, v);
        put_chosen(&group, v, kt_iq4_codes);
    }
}
TILE_BLOCKS(iq4_xs, KT_QK, 136, 8, 0)

/* ---- ternary ----------------------------------------------------------------------------------------- */

INLINE void tq2_0_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    put_scale8(to, half_before(rows, at + 66));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* as in Q2_K */
        vec v[4];
        columns4(rows, at + 16 * i, v);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++)
            for (int j = 0; j < 4; j++) put(to, i / 2 * 32 + 8 * p + i % 2 * 4 + j, v[j] >> 2 * p & LOW2);
    }
}
TILE_BLOCKS(tq2_0, KT_QK, 66, 8, 0)

/* `count` digits of each of `dwords` dwords, each digit `apart` dwords after the one before. A byte holds a fraction
 * in base 3: three times it is 256 times a digit, plus the byte of the rest. Even bytes keep to the upper halves of
 * words, odd ones to the lower. */
INLINE void put_digits(const struct kt_tile *to, const int dword, const int apart, const int count, const vec *v,
                       const int dwords) {
    const vec16 three = hidden16(3 + (vec16){0});
#pragma GCC unroll 4
    for (int j = 0; j < dwords; j++) {
        vec16 even = (vec16)v[j] << 8, odd = (vec16)v[j] >> 8;
#pragma GCC unroll 5
        for (int n = 0; n < count; n++) {
            const vec16 product = odd * three;
            put(to, dword + apart * n + j, (vec)(times_high16(even, three) | (product & 0xff00)));
            even *= three;
            odd = product & 0x00ff;
        }
    }
}

INLINE void tq1_0_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec v[4];
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
        columns4(rows, at + 16 * i, v);
        if (i < 2) put_digits(to, 4 * i, 8, 5, v, 4);
        else put_digits(to, 40, 4, 5, v, 4);
    }
    columns4(rows, at + 38, v);
    put_scale8(to, halves(v[3], 1));
    v[0] = dword_in(v, 10);
    put_digits(to, 60, 1, 4, v, 1);
}
TILE_BLOCKS(tq1_0, KT_QK, 54, 8, 0)

/* ---- what there is ----------------------------------------------------------------------------------- */

static void fill_tiles(struct kt_kernels *k) {
    k->tile[KT_FMT_Q4_0] = tile_q4_0;
    k->tile[KT_FMT_Q4_1] = tile_q4_1;
    k->tile[KT_FMT_Q5_0] = tile_q5_0;
    k->tile[KT_FMT_Q5_1] = tile_q5_1;
    k->tile[KT_FMT_Q8_0] = tile_q8_0;
    k->tile[KT_FMT_Q2_K] = tile_q2_k;
    k->tile[KT_FMT_Q3_K] = tile_q3_k;
    k->tile[KT_FMT_Q4_K] = tile_q4_k;
    k->tile[KT_FMT_Q5_K] = tile_q5_k;
    k->tile[KT_FMT_Q6_K] = tile_q6_k;
    k->tile[KT_FMT_IQ4_NL] = tile_iq4_nl;
    k->tile[KT_FMT_IQ4_XS] = tile_iq4_xs;
    k->tile[KT_FMT_TQ1_0] = tile_tq1_0;
    k->tile[KT_FMT_TQ2_0] = tile_tq2_0;
    k->tile[KT_FMT_MXFP4] = tile_mxfp4;
    k->tile[KT_FMT_NVFP4] = tile_nvfp4;
    k->tile[KT_FMT_F4_E2M1] = tile_f4_e2m1;
    k->tile[KT_FMT_I8] = tile_i8;
    k->tile[KT_FMT_U8] = tile_u8;
    k->tile[KT_FMT_I4] = tile_i4;
    k->tile[KT_FMT_GPTQ4] = tile_gptq4;
    k->tile[KT_FMT_GPTQ8] = tile_gptq8;
    k->tile[KT_FMT_AWQ4] = tile_awq4;
}

#endif
