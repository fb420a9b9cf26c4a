/* iq_tables.c: the tables of iq_tables.h, all constant: the compiler expands the packed grids, no code runs. */
#include "iq_tables.h"

#include "iq_grids.h"

#define ALIGNED _Alignas(64) const

ALIGNED uint8_t kt_iq4_codes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
ALIGNED uint8_t kt_fp4_codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* The parity of seven bits, moved to bit 7. 0x6996 holds the parities of 0..15. */
#define SIGN(x) (uint8_t)((x) | (0x6996 >> (((x) ^ (x) >> 4) & 15) & 1) << 7)
#define SIGN4(x) SIGN(x), SIGN((x) + 1), SIGN((x) + 2), SIGN((x) + 3)
#define SIGN16(x) SIGN4(x), SIGN4((x) + 4), SIGN4((x) + 8), SIGN4((x) + 12)
ALIGNED uint8_t kt_iq_signs[128] = {SIGN16(0),  SIGN16(16), SIGN16(32), SIGN16(48),
                                    SIGN16(64), SIGN16(80), SIGN16(96), SIGN16(112)};

/* One byte of each level, and a point with every level replaced by its byte. */
#define IQ2_LEVEL(l) (8 + 17 * (l) + ((l) >> 1))     /* 8, 25, 43 */
#define IQ3_XXS_LEVEL(l) (4 + 8 * (l) + 2 * ((l) == 7)) /* 4, 12, .. 52, 62 */
#define IQ3_S_LEVEL(l) (1 + 2 * (l))
#define IQ1_LEVEL(l) (8 * (l))
#define BYTE2(LEVEL, p, i) ((uint64_t)LEVEL((p) >> 2 * (i) & 3) << 8 * (i))
#define BYTE4(LEVEL, p, i) ((uint32_t)LEVEL((p) >> 4 * (i) & 15) << 8 * (i))
#define BYTES2(LEVEL, p)                                                                      \
    (BYTE2(LEVEL, p, 0) | BYTE2(LEVEL, p, 1) | BYTE2(LEVEL, p, 2) | BYTE2(LEVEL, p, 3) |      \
     BYTE2(LEVEL, p, 4) | BYTE2(LEVEL, p, 5) | BYTE2(LEVEL, p, 6) | BYTE2(LEVEL, p, 7))
#define BYTES4(LEVEL, p) (BYTE4(LEVEL, p, 0) | BYTE4(LEVEL, p, 1) | BYTE4(LEVEL, p, 2) | BYTE4(LEVEL, p, 3))

#define PACKED(p) 0x##p,
#define PAIR(p) (((p) & 7) | ((p) >> 1 & 56)) /* two nibbles as 3 bits each */
#define PAIRS(p) PAIR(0x##p) | PAIR(0x##p >> 8) << 8,
#define IQ2(p) BYTES2(IQ2_LEVEL, 0x##p),
#define IQ3_XXS(p) BYTES4(IQ3_XXS_LEVEL, 0x##p),
#define IQ3_S(p) BYTES4(IQ3_S_LEVEL, 0x##p),
#define IQ1(p) BYTES2(IQ1_LEVEL, 0x##p),

ALIGNED uint16_t kt_iq2_xxs_packed[256] = {KT_GRID_IQ2_XXS(PACKED)};
ALIGNED uint16_t kt_iq2_xs_packed[512] = {KT_GRID_IQ2_XS(PACKED)};
ALIGNED uint16_t kt_iq2_s_packed[1024] = {KT_GRID_IQ2_S(PACKED)};
ALIGNED uint16_t kt_iq3_xxs_packed[256] = {KT_GRID_IQ3_XXS(PAIRS)};
ALIGNED uint16_t kt_iq3_s_packed[512] = {KT_GRID_IQ3_S(PAIRS)};
ALIGNED uint16_t kt_iq1_packed[2048] = {KT_GRID_IQ1(PACKED)};

ALIGNED uint64_t kt_iq2_xxs_grid[256] = {KT_GRID_IQ2_XXS(IQ2)};
ALIGNED uint64_t kt_iq2_xs_grid[512] = {KT_GRID_IQ2_XS(IQ2)};
ALIGNED uint64_t kt_iq2_s_grid[1024] = {KT_GRID_IQ2_S(IQ2)};
ALIGNED uint32_t kt_iq3_xxs_grid[256] = {KT_GRID_IQ3_XXS(IQ3_XXS)};
ALIGNED uint32_t kt_iq3_s_grid[512] = {KT_GRID_IQ3_S(IQ3_S)};
ALIGNED uint64_t kt_iq1_grid[2048] = {KT_GRID_IQ1(IQ1)};

#define LOW(p) 0x##p & 255,
#define HIGH(p) 0x##p >> 8,
#define LOW3(p) PAIR(0x##p),
#define HIGH3(p) PAIR(0x##p >> 8),
ALIGNED uint8_t kt_iq2_xxs_bytes[2][256] = {{KT_GRID_IQ2_XXS(LOW)}, {KT_GRID_IQ2_XXS(HIGH)}};
ALIGNED uint8_t kt_iq2_xs_bytes[2][512] = {{KT_GRID_IQ2_XS(LOW)}, {KT_GRID_IQ2_XS(HIGH)}};
ALIGNED uint8_t kt_iq2_s_bytes[2][1024] = {{KT_GRID_IQ2_S(LOW)}, {KT_GRID_IQ2_S(HIGH)}};
ALIGNED uint8_t kt_iq3_xxs_bytes[2][256] = {{KT_GRID_IQ3_XXS(LOW3)}, {KT_GRID_IQ3_XXS(HIGH3)}};
ALIGNED uint8_t kt_iq3_s_bytes[2][512] = {{KT_GRID_IQ3_S(LOW3)}, {KT_GRID_IQ3_S(HIGH3)}};
ALIGNED uint8_t kt_iq1_low[2048] = {KT_GRID_IQ1(LOW)};
ALIGNED uint8_t kt_iq1_high[2][128] = {{KT_IQ1_FIRST}, {KT_IQ1_LAST}};
ALIGNED uint8_t kt_iq1_step[128] = {KT_IQ1_STEP};
