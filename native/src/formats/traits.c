/* traits.c: the weight formats. How each becomes w = s*(u - z) - m, with u an unsigned byte:
 *
 * Values are whole numbers times a scale in every quantized format, so u is that number moved up by z, the distance
 * of the lowest value from zero. s*(u - z) then equals the format's own product, in most cases bit for bit.
 *  - Q4_0, Q5_0, Q6_K: z is the middle code. Q4_1, Q5_1, Q4_K, Q5_K: natural codes and a min, which the first two
 *    add where we subtract.
 *  - Q8_0, IQ4_NL, IQ4_XS: values down to -128 and -127. Codes above 127 must have z = 128, as AVX-512 without
 *    VNNI multiplies them as signed bytes.
 *  - Q2_K: its scales are 4 bits, so they are folded into the code: u = q*scale (0..45), s = d. Then only the mins
 *    stay per 16, where they cost one multiply-add, and the integer sums run over 32 columns.
 *  - Q3_K: folded too: (q - 4)*(scale - 32) is -124..128, one more than a signed byte holds at the wrong end, so
 *    the sign is turned: u = 128 - product, s = -d.
 *  - IQ2, IQ3: grid values up to 43, 62 and 15 with a sign; z is the largest. IQ1: eighths, 8*grid +- 1, and s an
 *    eighth of the scale. TQ: -1, 0, 1 (2 in TQ2_0's unused code); one scale a block, repeated for each 32.
 *  - MXFP4, NVFP4: e2m1 values doubled are -12..12, s = half the scale. */
#include "traits.h"

#include "../../include/kt_native.h"
#include "quants.h"

/* clang-format off */
#define ROW(name, block, bytes, kind, group, zero, top, min_group) \
    [KT_FMT_##name] = {KT_TYPE_##name, #name, block, bytes, KT_KIND_##kind, group, zero, top, min_group, 0, 0, 0}
#define SEPARATE(name, block, bytes, kind, zero, top, zeros_per_dword, by_column) \
    [KT_FMT_##name] = {KT_TYPE_##name, #name, block, bytes, KT_KIND_##kind, 32, zero, top, 0, 1, zeros_per_dword, \
                       by_column}

const struct kt_traits kt_traits_table[KT_FORMATS] = {
    /*  name     block  bytes                    kind  group  zero  top   min_group */
    ROW(F32,     1,     4,                       F32,  0,     0,    0,    0),
    ROW(F16,     1,     2,                       F32,  0,     0,    0,    0),
    ROW(BF16,    1,     2,                       BF16, 0,     0,    0,    0),
    ROW(Q4_0,    32,    sizeof(kt_block_q4_0),   Q8,   32,    8,    15,   0),
    ROW(Q4_1,    32,    sizeof(kt_block_q4_1),   Q8,   32,    0,    15,   32),
    ROW(Q5_0,    32,    sizeof(kt_block_q5_0),   Q8,   32,    16,   31,   0),
    ROW(Q5_1,    32,    sizeof(kt_block_q5_1),   Q8,   32,    0,    31,   32),
    ROW(Q8_0,    32,    sizeof(kt_block_q8_0),   Q8,   32,    128,  255,  0),
    ROW(Q2_K,    KT_QK, sizeof(kt_block_q2_k),   Q8,   32,    0,    45,   16),
    ROW(Q3_K,    KT_QK, sizeof(kt_block_q3_k),   Q8,   32,    128,  252,  0),
    ROW(Q4_K,    KT_QK, sizeof(kt_block_q4_k),   Q8,   32,    0,    15,   32),
    ROW(Q5_K,    KT_QK, sizeof(kt_block_q5_k),   Q8,   32,    0,    31,   32),
    ROW(Q6_K,    KT_QK, sizeof(kt_block_q6_k),   Q8,   16,    32,   63,   0),
    ROW(IQ1_S,   KT_QK, sizeof(kt_block_iq1_s),  Q8,   32,    9,    18,   0),
    ROW(IQ1_M,   KT_QK, sizeof(kt_block_iq1_m),  Q8,   16,    9,    18,   0),
    ROW(IQ2_XXS, KT_QK, sizeof(kt_block_iq2_xxs), Q8,  32,    43,   86,   0),
    ROW(IQ2_XS,  KT_QK, sizeof(kt_block_iq2_xs), Q8,   16,    43,   86,   0),
    ROW(IQ2_S,   KT_QK, sizeof(kt_block_iq2_s),  Q8,   16,    43,   86,   0),
    ROW(IQ3_XXS, KT_QK, sizeof(kt_block_iq3_xxs), Q8,  32,    62,   124,  0),
    ROW(IQ3_S,   KT_QK, sizeof(kt_block_iq3_s),  Q8,   32,    15,   30,   0),
    ROW(IQ4_NL,  32,    sizeof(kt_block_iq4_nl), Q8,   32,    128,  241,  0),
    ROW(IQ4_XS,  KT_QK, sizeof(kt_block_iq4_xs), Q8,   32,    128,  241,  0),
    ROW(TQ1_0,   KT_QK, sizeof(kt_block_tq1_0),  Q8,   32,    1,    2,    0),
    ROW(TQ2_0,   KT_QK, sizeof(kt_block_tq2_0),  Q8,   32,    1,    3,    0),
    ROW(MXFP4,   32,    sizeof(kt_block_mxfp4),  Q8,   32,    12,   24,   0),
    ROW(NVFP4,   64,    sizeof(kt_block_nvfp4),  Q8,   16,    12,   24,   0),
    /*       name     block  bytes  kind  zero  top   zeros_per_dword  by_column */
    SEPARATE(F8_E4M3, 1,     1,     BF16, 0,    0,    0,               0),
    SEPARATE(F4_E2M1, 2,     1,     Q8,   12,   24,   0,               0), /* twice the value, plus 12 */
    SEPARATE(I8,      1,     1,     Q8,   128,  255,  0,               0),
    SEPARATE(U8,      1,     1,     Q8,   128,  255,  4,               0),
    SEPARATE(I4,      2,     1,     Q8,   8,    15,   8,               0),
    SEPARATE(GPTQ4,   8,     4,     Q8,   8,    15,   8,               1),
    SEPARATE(GPTQ8,   4,     4,     Q8,   128,  255,  4,               1),
    SEPARATE(AWQ4,    1,     1,     Q8,   8,    15,   8,               1), /* a row takes half a byte of a stored row */
};
/* clang-format on */

int kt_format_of(int id) {
    for (int f = 0; f < KT_FORMATS; f++)
        if (kt_traits_table[f].id == id) return f;
    return -1;
}

const char *kt_type_name(int type) {
    int f = kt_format_of(type);
    return f < 0 ? NULL : kt_traits_table[f].name;
}

int64_t kt_type_block(int type) {
    int f = kt_format_of(type);
    return f < 0 ? 0 : kt_traits_table[f].block;
}

int64_t kt_type_block_bytes(int type) {
    int f = kt_format_of(type);
    return f < 0 ? 0 : kt_traits_table[f].bytes;
}
