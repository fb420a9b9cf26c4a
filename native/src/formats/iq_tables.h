/* iq_tables.h: constant tables of the weight formats: codebooks, and the grids of the IQ formats. Facts of ggml's
 * GGUF quantization types. All lie in read-only data at 64-byte boundaries.
 *
 * An index cut from a file has exactly as many bits as its table has entries for, so no file can lead outside:
 * 8 bits for 256 entries (IQ2_XXS, IQ3_XXS), 9 for 512 (IQ2_XS, IQ3_S), 10 for 1024 (IQ2_S), 11 for 2048 (IQ1), 7 for
 * 128 (signs), 4 for 16 (codebooks).
 *
 * Each grid exists twice. `_packed`, a uint16_t a point: value i in bits 2i (8 values of levels 0..2), or in bits 0,
 * 3, 8 and 11 (4 values of levels 0..7): small enough for registers or a byte shuffle. `_grid`, a byte a value, value
 * 0 in the lowest:
 *   IQ2  magnitudes 8, 25, 43      u = 43 +- magnitude
 *   IQ3_XXS  4, 12, 20 .. 52, 62   u = 62 +- magnitude
 *   IQ3_S  1, 3, 5 .. 15           u = 15 +- magnitude
 *   IQ1  8 * level: 0, 8, 16       u = byte + 2, or + 0 where the format subtracts its 1/8 */
#ifndef KT_IQ_TABLES_H
#define KT_IQ_TABLES_H

#include <stdint.h>

/* Unsigned codes of 4-bit values: IQ4_NL and IQ4_XS (value + 128), e2m1 doubled (value + 12). */
extern const uint8_t kt_iq4_codes[16], kt_fp4_codes[16];

/* Eight sign bits (bit i: value i is negative) from seven: the last makes the number of ones even. */
extern const uint8_t kt_iq_signs[128];

extern const uint16_t kt_iq2_xxs_packed[256], kt_iq2_xs_packed[512], kt_iq2_s_packed[1024];
extern const uint64_t kt_iq2_xxs_grid[256], kt_iq2_xs_grid[512], kt_iq2_s_grid[1024];
extern const uint16_t kt_iq3_xxs_packed[256], kt_iq3_s_packed[512];
extern const uint32_t kt_iq3_xxs_grid[256], kt_iq3_s_grid[512];
extern const uint16_t kt_iq1_packed[2048];
extern const uint64_t kt_iq1_grid[2048];

/* The packed grids by bytes, for byte permutes: the low ones of all points, then the high ones. */
extern const uint8_t kt_iq2_xxs_bytes[2][256], kt_iq2_xs_bytes[2][512], kt_iq2_s_bytes[2][1024];
extern const uint8_t kt_iq3_xxs_bytes[2][256], kt_iq3_s_bytes[2][512];
extern const uint8_t kt_iq1_low[2048];

/* High bytes of the IQ1 grid. It is sorted, so that 16 points in a row have one or two: that of point i is [0][i / 16]
 * if i % 16 < kt_iq1_step[i / 16], else [1][i / 16]. */
extern const uint8_t kt_iq1_high[2][128], kt_iq1_step[128];

#endif
