/* The AVX2 source once more, with vpdpwssd for the sums. */
#define KT_ISA avx_vnni
#include "../avx2/encode.c"
