/* The AMX GEMMs with every tile instruction computed in C: for tests, on any machine with AVX-512. Slow. */
#define KT_ISA amx_emulated
#define KT_AMX_EMULATED
#include "../amx/gemm.c"
