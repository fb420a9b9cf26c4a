/* The AVX-512 source once more, with byte permutes, bit fields and bit matrices (VBMI, GFNI). */
#define KT_ISA avx512_vbmi
#include "../avx512/iq_dot.c"
