/* panel.h: unpacked pieces of weights, in the one layout that the GEMMs read, whatever the format. */
#ifndef KT_PANEL_H
#define KT_PANEL_H

#include "matrix.h"

#define KT_BLOCK_COLS 256 /* a multiple of every format's block */

/* ---- memory: lay out twice, first with base NULL to learn the size ---- */

struct kt_arena {
    uint8_t *base;
    size_t used;
    int overflow;
};
/* count * size bytes, 64-byte aligned; NULL while base is NULL. */
void *kt_arena_take(struct kt_arena *arena, int64_t count, size_t size);

/* Between the two layouts, for callers without a pool: memory for what was taken; NULL when there is none. */
void *kt_arena_commit(struct kt_arena *arena);
void kt_arena_free(void *memory);

/* Scratch of one thread. */
struct kt_scratch {
    uint32_t *data;             /* panel: KT_BLOCK_ROWS rows */
    float *scales, *mins;
    uint32_t *stage;            /* 16 rows, row-major, before interleaving */
    float *stage_scales, *stage_mins;
    float *c;                   /* [tokens, 64] results on their way elsewhere */
};
void kt_scratch_take(struct kt_arena *arena, int64_t tokens, struct kt_scratch *s);

/* Unpack columns k0 .. k0 + p->k of rows first .. first + rows into s and complete *p, of which kind, tiles and k are
 * given. A panel row takes up to KT_PANEL_BYTES. k0 and p->k are multiples of 32 (but for the last columns of floats)
 * and of the format's block. */
void kt_panel_fill(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                   const struct kt_scratch *s, struct kt_panel *p);

static inline int kt_values_per_dword(enum kt_kind kind) { return kind == KT_KIND_Q8 ? 4 : kind == KT_KIND_BF16 ? 2 : 1; }

#endif
