/* The AVX-512 source once more, with vpdpbusd in dot4 (common.h) and VNNI flags. */
#define KT_ISA avx512_vnni
#include "../avx512/iq_dot.c"
