/* fp32 tiles for AVX-512. */
#include "tile_vec.h"

#include "../tile_float_impl.h"

void kt_fill_tile_float_avx512(struct kt_kernels *k) { fill_float_tiles(k); }
