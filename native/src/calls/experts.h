/* experts.h: what a kt_experts is. */
#ifndef KT_EXPERTS_H
#define KT_EXPERTS_H

#include "../matmul/matrix.h"

struct kt_experts {
    int64_t count, hidden, inner; /* E, H, I */
    kt_glu glu;
    struct kt_matrix *gate, *up, *down; /* [E] each, one allocation; gate NULL: there is none */
};

#endif
