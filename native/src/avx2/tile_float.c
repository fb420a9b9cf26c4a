/* fp32 tiles for AVX2. */
#include "tile_vec.h"

#include "../templates/tile_float.h"

void kt_fill_tile_float_avx2(struct kt_kernels *k) { fill_float_tiles(k); }
