/* thresholds.h: from how many tokens of a matrix on unpacking into tiles beats decoding. */
#ifndef KT_THRESHOLDS_H
#define KT_THRESHOLDS_H

#include "../formats/traits.h"

/* tiles_from[format] of an instruction set (enum kt_isa). Matters where the set has a decode kernel of the format. */
void kt_thresholds(int isa, int tiles_from[KT_FORMATS]);

/* Query rows of one head of keys (heads of its group times query tokens) from which attention goes by panels: by
 * fp32 ones, by bf16 ones. */
void kt_attend_thresholds(int isa, int panels_from[2]);

#endif
