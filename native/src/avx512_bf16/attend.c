#include "../avx512/dot_vec.h"

void kt_fill_attend_avx512_bf16(struct kt_kernels *k) { (void)k; }
