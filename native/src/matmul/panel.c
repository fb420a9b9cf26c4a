/* panel.c: fills panels (struct kt_panel) from packed weights, a tile of 16 rows at a time. No intrinsics: an
 * instruction set brings a function that unpacks a whole tile, or one that unpacks a row and one that transposes.
 *
 * Scales that lie beside the codes (safetensors) are read here, for all such formats alike. */
#include "panel.h"

#include <stdlib.h>
#include <string.h>

#include "../formats/quants.h"

/* ---- memory ------------------------------------------------------------------------------------------ */

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

/* ---- scales beside the codes ------------------------------------------------------------------------- */

/* Scales [n / group][16] of columns k0 .. k0 + n, and mins where zero points are packed. */
static void fill_beside(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                        int64_t n, float *scales, float *mins) {
    const int64_t groups = (n + w->group - 1) / w->group, from = k0 / w->scale_cols;
    const int64_t count = (k0 + n - 1) / w->scale_cols + 1 - from;
    k->beside(w, first, rows, from, count, scales, w->zeros ? mins : NULL);
    for (int64_t i = 0; w->zeros && i < count * KT_TILE; i++) mins[i] *= scales[i];
    for (int64_t g = groups - 1; g >= 0; g--) { /* from the back: a scale may serve several groups */
        const int64_t at = (k0 + g * w->group) / w->scale_cols - from;
        if (at == g) continue;
        memcpy(scales + g * KT_TILE, scales + at * KT_TILE, KT_TILE * sizeof *scales);
        if (w->zeros) memcpy(mins + g * KT_TILE, mins + at * KT_TILE, KT_TILE * sizeof *mins);
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------- */

/* Row by row into the stage, then the transpose. `kind` is the format's own, or BF16. */
static void tile_by_rows(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                         int64_t n, enum kt_kind kind, const struct kt_scratch *s, const struct kt_tile *out) {
    const struct kt_traits *t = w->traits;
    const int values = kt_values_per_dword(kind);
    const int64_t dwords = (n + values - 1) / values;
    const int64_t scales = t->group && !t->beside ? n / t->group : 0, mins = t->min_group ? n / t->min_group : 0;
    for (int r = 0; r < KT_TILE; r++) {
        uint32_t *row = s->stage + r * KT_PANEL_BYTES / 4;
        float *row_scales = s->stage_scales + r * KT_MAX_GROUPS, *row_mins = s->stage_mins + r * KT_MAX_GROUPS;
        if (r >= rows) { /* past the end */
            memset(row, 0, (size_t)dwords * 4);
            memset(row_scales, 0, (size_t)scales * 4);
            memset(row_mins, 0, (size_t)mins * 4);
            continue;
        }
        const uint8_t *bytes = w->data + (size_t)(first + r) * w->stride + kt_row_bytes(t, k0);
        if (kind == KT_KIND_BF16) {
            if (n & 1) row[n / 2] = 0;
            if (w->format == KT_FMT_BF16) {
                memcpy(row, bytes, (size_t)n * 2);
            } else { /* exact: such formats have fewer bits than bf16 */
                float v[KT_PANEL_BYTES / 2];
                k->unpack[w->format](bytes, n, v, NULL, NULL);
                k->to_bf16(v, n, (uint16_t *)row);
            }
        } else {
            k->unpack[w->format](bytes, n, row, row_scales, row_mins);
        }
    }
    k->interleave(s->stage, KT_PANEL_BYTES / 4, dwords, out->data);
    if (scales) k->interleave((const uint32_t *)s->stage_scales, KT_MAX_GROUPS, scales, (uint32_t *)out->scales);
    if (mins) k->interleave((const uint32_t *)s->stage_mins, KT_MAX_GROUPS, mins, (uint32_t *)out->mins);
}

/* A type by columns, a code at a time: what a tile function equals, and what the last rows of a matrix take. */
static void tile_by_columns(const struct kt_matrix *w, int64_t first, int rows, int64_t k0, int64_t n,
                            const struct kt_tile *out) {
    uint8_t *u = (uint8_t *)out->data;
    for (int64_t c = 0; c < n; c++)
        for (int r = 0; r < KT_TILE; r++) {
            uint32_t code = 0;
            if (r < rows) {
                const int64_t column = k0 + c, row = first + r;
                const uint8_t *line = w->data + (size_t)(column / w->traits->block) * w->stride;
                if (w->format == KT_FMT_AWQ4) code = kt_load32(line + row / 8 * 4) >> (4 * kt_awq_nibble[row % 8]) & 15;
                else if (w->format == KT_FMT_GPTQ4) code = kt_load32(line + row * 4) >> (4 * (column % 8)) & 15;
                else code = kt_load32(line + row * 4) >> (8 * (column % 4)) & 255;
            }
            u[c / 4 * 64 + r * 4 + c % 4] = (uint8_t)code;
        }
}

/* One tile of the format's own kind, or of BF16; without the scales that lie beside. */
static void fill_tile(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                      int64_t n, enum kt_kind kind, const struct kt_scratch *s, const struct kt_tile *out) {
    kt_unpack_tile_fn tile = kind == KT_KIND_BF16 ? k->tile_bf16[w->format] : k->tile[w->format];
    if (tile && rows == KT_TILE) tile(w, first, k0, n, out);
    else if (w->traits->by_column) tile_by_columns(w, first, rows, k0, n, out);
    else tile_by_rows(k, w, first, rows, k0, n, kind, s, out);
}

/* ---- fp32 panels of what is not fp32 ----------------------------------------------------------------- */

/* v[k][16] = s*(u - z) - m */
static void codes_to_floats(const struct kt_matrix *w, int64_t n, const struct kt_tile *from, float *v) {
    const uint8_t *u = (const uint8_t *)from->data;
    for (int64_t c = 0; c < n; c++, v += KT_TILE) {
        const float *s = from->scales + c / w->group * KT_TILE;
        for (int r = 0; r < KT_TILE; r++) v[r] = s[r] * (float)(u[c / 4 * 64 + r * 4 + c % 4] - w->zero);
        if (!w->min_group) continue;
        const float *m = from->mins + c / w->min_group * KT_TILE;
        for (int r = 0; r < KT_TILE; r++) v[r] -= m[r];
    }
}

/* The same where each column names its group: scales and zeros of all groups, [group][16]. */
static void ordered_to_floats(const struct kt_matrix *w, int64_t k0, int64_t n, const struct kt_tile *from, float *v) {
    const uint8_t *u = (const uint8_t *)from->data;
    for (int64_t c = 0; c < n; c++, v += KT_TILE) {
        const size_t at = (size_t)w->order[k0 + c] * KT_TILE;
        for (int r = 0; r < KT_TILE; r++) {
            const float code = (float)u[c / 4 * 64 + r * 4 + c % 4], zero = w->zeros ? from->mins[at + r] : (float)w->zero;
            v[r] = from->scales[at + r] * (code - zero);
        }
    }
}

/* A tile of fp32 from a format of another kind. Where columns name their groups, s->scales and s->mins take those of all
 * groups: an fp32 panel has no use for them. */
static void fill_floats(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                        int64_t n, const struct kt_scratch *s, float *v) {
    enum { PIECE = KT_BLOCK_COLS };
    _Alignas(64) uint32_t codes[PIECE / 4 * KT_TILE];
    _Alignas(64) float scales[PIECE / 16 * KT_TILE], mins[PIECE / 16 * KT_TILE];
    const struct kt_tile piece = {codes, w->order ? s->scales : scales, w->order ? s->mins : mins};
    if (w->order) k->beside(w, first, rows, 0, (w->cols + w->scale_cols - 1) / w->scale_cols, s->scales, w->zeros ? s->mins : NULL);
    for (int64_t c = 0; c < n; c += PIECE) {
        const int64_t m = kt_min(n - c, PIECE);
        fill_tile(k, w, first, rows, k0 + c, m, KT_KIND_Q8, s, &piece);
        if (w->order) {
            ordered_to_floats(w, k0 + c, m, &piece, v + c * KT_TILE);
            continue;
        }
        if (w->traits->beside) fill_beside(k, w, first, rows, k0 + c, m, scales, mins);
        codes_to_floats(w, m, &piece, v + c * KT_TILE);
    }
}

/* ---- panels ------------------------------------------------------------------------------------------ */

static void fill_tile_of(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                         const struct kt_scratch *s, const struct kt_panel *p, const struct kt_tile *out) {
    const int64_t n = p->k;
    if (p->kind == KT_KIND_F32 && w->traits->kind == KT_KIND_Q8) {
        fill_floats(k, w, first, rows, k0, n, s, (float *)out->data);
        return;
    }
    fill_tile(k, w, first, rows, k0, n, p->kind, s, out);
    if (!w->traits->beside) return;
    fill_beside(k, w, first, rows, k0, n, out->scales, out->mins);
    if (p->kind != KT_KIND_F32) return;
    k->scale_tile((float *)out->data, n, w->group, out->scales);
}

void kt_panel_fill(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                   const struct kt_scratch *s, struct kt_panel *p) {
    const int values = kt_values_per_dword(p->kind);
    const int scaled = p->kind == KT_KIND_Q8 || (p->kind == KT_KIND_BF16 && w->traits->beside);
    const int64_t dwords = (p->k + values - 1) / values, groups = w->group ? (p->k + w->group - 1) / w->group : 0;
    const int64_t min_groups = w->min_group ? p->k / w->min_group : 0;
    p->data = s->data;
    p->group = scaled ? w->group : 0;
    p->min_group = scaled ? w->min_group : 0;
    p->zero = w->zero;
    p->reach = w->traits->top - w->zero > w->zero ? w->traits->top - w->zero : w->zero;
    p->scales = scaled ? s->scales : NULL;
    p->mins = scaled && w->min_group ? s->mins : NULL;
    for (int t = 0; t < p->tiles; t++) {
        const struct kt_tile out = {s->data + t * dwords * KT_TILE, s->scales + t * groups * KT_TILE,
                                    s->mins + t * min_groups * KT_TILE};
        fill_tile_of(k, w, first + t * KT_TILE, (int)kt_min(rows - t * KT_TILE, KT_TILE), k0, s, p, &out);
    }
}
