/* arena.c: memory of one call, and a thread's scratch. */
#include "arena.h"

#include <stdlib.h>

#include "../kernels.h"

void *kt_arena_take(struct kt_arena *arena, int64_t count, size_t size) {
    size_t bytes, end;
    if (__builtin_mul_overflow((size_t)count, size, &bytes) || bytes > SIZE_MAX - 64 ||
        __builtin_add_overflow(arena->used, (bytes + 63) & ~(size_t)63, &end)) {
        arena->overflow = 1;
        return NULL;
    }
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used = end;
    return p;
}

void *kt_arena_commit(struct kt_arena *arena) {
    arena->base = arena->overflow ? NULL : aligned_alloc(64, arena->used ? arena->used : 64);
    arena->used = 0;
    return arena->base;
}

void kt_arena_free(void *memory) { free(memory); }

void kt_scratch_take(struct kt_arena *arena, int64_t tokens, struct kt_scratch *s) {
    const int64_t scales = KT_BLOCK_ROWS * KT_MAX_GROUPS;
    s->data = kt_arena_take(arena, KT_BLOCK_ROWS * KT_PANEL_BYTES, 1);
    s->scales = kt_arena_take(arena, scales, 4);
    s->mins = kt_arena_take(arena, scales, 4);
    s->stage = kt_arena_take(arena, KT_TILE * KT_PANEL_BYTES, 1);
    s->stage_scales = kt_arena_take(arena, KT_TILE * KT_MAX_GROUPS, 4);
    s->stage_mins = kt_arena_take(arena, KT_TILE * KT_MAX_GROUPS, 4);
    s->c = kt_arena_take(arena, tokens * KT_BLOCK_ROWS, 4);
}
