/* The AVX2 source once more, with vpdpbusd and AVX-VNNI flags. */
#define KT_ISA avx_vnni
#include "../avx2/dot.c"
