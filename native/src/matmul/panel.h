/* panel.h: unpacked pieces of weights, in the one layout that the GEMMs read, whatever the format. */
#ifndef KT_PANEL_H
#define KT_PANEL_H

#include "block.h"

#define KT_BLOCK_COLS 256 /* a multiple of every format's block */

/* Unpack columns k0 .. k0 + p->k of the block's rows into its scratch and complete *p, of which kind, tiles and k are
 * given. Asks of the block its kernels, matrix, rows and scratch. A panel row takes up to KT_PANEL_BYTES. k0 and p->k
 * are multiples of 32 (but for the last columns of floats) and of the format's block. */
void kt_panel_fill(const struct kt_block *b, int64_t k0, struct kt_panel *p);

static inline int kt_values_per_dword(enum kt_kind kind) {
    return kind == KT_KIND_Q8 ? 4 : kind == KT_KIND_BF16 ? 2 : 1;
}

#endif
