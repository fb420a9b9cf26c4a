/* fp32 tiles for AVX-512. */
#include "tile_vec.h"

#include "../templates/tile_float.h"

void kt_fill_tile_float_avx512(struct kt_kernels *k) { fill_float_tiles(k); }
