/* iq_tables.c: the tables of iq_tables.h, all constant: no code runs to make them. */
#include "iq_tables.h"

#define ALIGNED _Alignas(64) const

ALIGNED uint8_t kt_iq4_codes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
ALIGNED uint8_t kt_fp4_codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
