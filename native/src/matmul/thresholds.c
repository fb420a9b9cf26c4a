/* thresholds.c */
#include "thresholds.h"

#include "../isas.h"

void kt_thresholds(int isa, int tiles_from[KT_FORMATS]) {
    for (int f = 0; f < KT_FORMATS; f++) {
        const int q8 = kt_traits_table[f].kind == KT_KIND_Q8;
        const int wide = isa >= KT_ISA_AVX512 && isa <= KT_ISA_AMX;
        tiles_from[f] = q8 ? (wide ? 9 : 5) : 12;
        if (isa >= KT_ISA_AVX512_BF16 && isa <= KT_ISA_AMX && kt_traits_table[f].kind == KT_KIND_BF16)
            tiles_from[f] = 9;
    }
}
