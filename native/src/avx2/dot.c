/* Decode of quantized formats for AVX2. Compiled a second time with VNNI by ../avx_vnni. */
#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include "dot_vec.h"
#include "../templates/dot_scaled.h"
#include "../templates/dot_block.h"

void KT_JOIN(kt_fill_dot_, KT_ISA)(struct kt_kernels *k) {
    fill_dot_blocks(k);
    fill_dot_scaled(k);
}
