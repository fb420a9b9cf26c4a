/* iq_tables.h: constant tables of the weight formats: codebooks, and the grids of the IQ formats. Facts of ggml's
 * GGUF quantization types. All are 64-byte aligned. Indices cut from a file's bits have exactly a table's width. */
#ifndef KT_IQ_TABLES_H
#define KT_IQ_TABLES_H

#include <stdint.h>

/* Unsigned codes of 4-bit values: IQ4_NL and IQ4_XS (value + 128), e2m1 doubled (value + 12). */
extern const uint8_t kt_iq4_codes[16], kt_fp4_codes[16];

#endif
