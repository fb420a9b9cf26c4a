/* The AVX-512 source once more, with vpdpwssd for the sums. */
#define KT_ISA avx512_vnni
#include "../avx512/encode.c"
