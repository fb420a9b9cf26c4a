#include "dot_vec.h"
#include "../templates/attend.h"

void kt_fill_attend_avx2(struct kt_kernels *k) { fill_attend(k); }
