/* arena.h: memory of one call, cut into pieces. Lay out twice: first with base NULL, to learn the size. */
#ifndef KT_ARENA_H
#define KT_ARENA_H

#include <stddef.h>
#include <stdint.h>

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
    uint32_t *data; /* panel: KT_BLOCK_ROWS rows */
    float *scales, *mins;
    uint32_t *stage; /* 16 rows, row-major, before interleaving */
    float *stage_scales, *stage_mins;
    float *c; /* [tokens, KT_BLOCK_ROWS] results on their way elsewhere */
};
void kt_scratch_take(struct kt_arena *arena, int64_t tokens, struct kt_scratch *s);

#endif
