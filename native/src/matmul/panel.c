/* panel.c: fills panels (struct kt_panel) from packed weights, a tile of 16 rows at a time. No intrinsics: an
 * instruction set brings a function that unpacks a whole tile, or one that unpacks a row and one that transposes.
 *
 * Separate scales (safetensors) are read here, for all such formats alike. */
#include "panel.h"

#include <string.h>

#include "../formats/quants.h"

/* What becomes one tile, or a part of one. */
struct piece {
    const struct kt_kernels *k;
    const struct kt_matrix *w;
    const struct kt_scratch *s;
    int64_t first; /* row */
    int rows;      /* at most 16; the tile's others are zero */
    int64_t k0, n; /* columns */
};

/* ---- separate scales --------------------------------------------------------------------------------- */

/* Scales [n / group][16] of the piece, and mins where zero points are packed. */
static void fill_scales(const struct piece *p, float *scales, float *mins) {
    const struct kt_matrix *w = p->w;
    const int64_t groups = (p->n + w->group - 1) / w->group, from = p->k0 / w->scale_cols;
    const int64_t count = (p->k0 + p->n - 1) / w->scale_cols + 1 - from;
    p->k->read_scales(w, p->first, p->rows, from, count, scales, w->zeros ? mins : NULL);
    for (int64_t i = 0; w->zeros && i < count * KT_TILE; i++) mins[i] *= scales[i];
    for (int64_t g = groups - 1; g >= 0; g--) { /* from the back: a scale may serve several groups */
        const int64_t at = (p->k0 + g * w->group) / w->scale_cols - from;
        if (at == g) continue;
        memcpy(scales + g * KT_TILE, scales + at * KT_TILE, KT_TILE * sizeof *scales);
        if (w->zeros) memcpy(mins + g * KT_TILE, mins + at * KT_TILE, KT_TILE * sizeof *mins);
    }
}

/* ---- tiles ------------------------------------------------------------------------------------------- */

/* A row as bf16. Exact: formats that become bf16 panels have no more bits than it has. */
static void row_as_bf16(const struct piece *p, const uint8_t *bytes, uint32_t *row) {
    if (p->n & 1) row[p->n / 2] = 0;
    if (p->w->format == KT_FMT_BF16) {
        memcpy(row, bytes, (size_t)p->n * 2);
        return;
    }
    float v[KT_PANEL_BYTES / 2];
    p->k->unpack[p->w->format](bytes, p->n, v, NULL, NULL);
    p->k->to_bf16(v, p->n, (uint16_t *)row);
}

/* Row by row into the stage, then the transpose. `kind` is the format's own, or BF16. */
static void tile_by_rows(const struct piece *p, enum kt_kind kind, const struct kt_tile *out) {
    const struct kt_kernels *k = p->k;
    const struct kt_traits *t = p->w->traits;
    const struct kt_scratch *s = p->s;
    const int values = kt_values_per_dword(kind);
    const int64_t dwords = (p->n + values - 1) / values;
    const int64_t scales = t->group && !t->scales_separate ? p->n / t->group : 0;
    const int64_t mins = t->min_group ? p->n / t->min_group : 0;
    for (int r = 0; r < KT_TILE; r++) {
        uint32_t *row = s->stage + r * KT_PANEL_BYTES / 4;
        float *row_scales = s->stage_scales + r * KT_MAX_GROUPS, *row_mins = s->stage_mins + r * KT_MAX_GROUPS;
        if (r >= p->rows) {
            memset(row, 0, (size_t)dwords * 4);
            memset(row_scales, 0, (size_t)scales * 4);
            memset(row_mins, 0, (size_t)mins * 4);
            continue;
        }
        const uint8_t *bytes = p->w->data + (size_t)(p->first + r) * p->w->stride + kt_row_bytes(t, p->k0);
        if (kind == KT_KIND_BF16) row_as_bf16(p, bytes, row);
        else k->unpack[p->w->format](bytes, p->n, row, row_scales, row_mins);
    }
    k->interleave(s->stage, KT_PANEL_BYTES / 4, dwords, out->data);
    if (scales) k->interleave((const uint32_t *)s->stage_scales, KT_MAX_GROUPS, scales, (uint32_t *)out->scales);
    if (mins) k->interleave((const uint32_t *)s->stage_mins, KT_MAX_GROUPS, mins, (uint32_t *)out->mins);
}

/* A code of a type by columns. */
static uint32_t code_at(const struct kt_matrix *w, int64_t row, int64_t column) {
    const uint8_t *stored = w->data + (size_t)(column / w->traits->block) * w->stride;
    if (w->format == KT_FMT_AWQ4) return kt_load32(stored + row / 8 * 4) >> (4 * kt_awq_nibble[row % 8]) & 15;
    if (w->format == KT_FMT_GPTQ4) return kt_load32(stored + row * 4) >> (4 * (column % 8)) & 15;
    return kt_load32(stored + row * 4) >> (8 * (column % 4)) & 255;
}

/* A type by columns, a code at a time: what a tile function equals, and what the last rows of a matrix take. */
static void tile_by_columns(const struct piece *p, const struct kt_tile *out) {
    uint8_t *u = (uint8_t *)out->data;
    for (int64_t c = 0; c < p->n; c++)
        for (int r = 0; r < KT_TILE; r++)
            u[c / 4 * 64 + r * 4 + c % 4] = r < p->rows ? (uint8_t)code_at(p->w, p->first + r, p->k0 + c) : 0;
}

/* One tile of the format's own kind, or of BF16; without separate scales. */
static void fill_codes(const struct piece *p, enum kt_kind kind, const struct kt_tile *out) {
    const int format = p->w->format;
    kt_unpack_tile_fn tile = kind == KT_KIND_BF16 ? p->k->tile_bf16[format] : p->k->tile[format];
    if (tile && p->rows == KT_TILE) tile(p->w, p->first, p->k0, p->n, out);
    else if (p->w->traits->by_column) tile_by_columns(p, out);
    else tile_by_rows(p, kind, out);
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
static void ordered_to_floats(const struct piece *p, const struct kt_tile *from, float *v) {
    const struct kt_matrix *w = p->w;
    const uint8_t *u = (const uint8_t *)from->data;
    for (int64_t c = 0; c < p->n; c++, v += KT_TILE) {
        const size_t at = (size_t)w->order[p->k0 + c] * KT_TILE;
        for (int r = 0; r < KT_TILE; r++) {
            const float code = (float)u[c / 4 * 64 + r * 4 + c % 4];
            const float zero = w->zeros ? from->mins[at + r] : (float)w->zero;
            v[r] = from->scales[at + r] * (code - zero);
        }
    }
}

/* A tile of fp32 from a format of another kind. Where columns name their groups, the scratch's scales and mins take
 * those of all groups: an fp32 panel has no use for them. */
static void fill_floats(const struct piece *p, float *v) {
    enum { PIECE = KT_BLOCK_COLS };
    const struct kt_matrix *w = p->w;
    _Alignas(64) uint32_t codes[PIECE / 4 * KT_TILE];
    _Alignas(64) float scales[PIECE / 16 * KT_TILE], mins[PIECE / 16 * KT_TILE];
    const struct kt_tile to = {codes, w->order ? p->s->scales : scales, w->order ? p->s->mins : mins, NULL};
    const int64_t all_groups = w->order ? (w->cols + w->scale_cols - 1) / w->scale_cols : 0;
    if (w->order) p->k->read_scales(w, p->first, p->rows, 0, all_groups, to.scales, w->zeros ? to.mins : NULL);
    for (int64_t c = 0; c < p->n; c += PIECE) {
        struct piece some = *p;
        some.k0 = p->k0 + c;
        some.n = kt_min(p->n - c, PIECE);
        fill_codes(&some, KT_KIND_Q8, &to);
        if (w->order) {
            ordered_to_floats(&some, &to, v + c * KT_TILE);
            continue;
        }
        if (w->traits->scales_separate) fill_scales(&some, scales, mins);
        codes_to_floats(w, some.n, &to, v + c * KT_TILE);
    }
}

/* ---- panels ------------------------------------------------------------------------------------------ */

static void fill_tile(const struct piece *p, enum kt_kind kind, const struct kt_tile *out) {
    if (kind == KT_KIND_F32 && p->w->traits->kind == KT_KIND_Q8) {
        fill_floats(p, (float *)out->data);
        return;
    }
    fill_codes(p, kind, out);
    if (!p->w->traits->scales_separate) return;
    fill_scales(p, out->scales, out->mins);
    if (kind == KT_KIND_F32) p->k->scale_tile((float *)out->data, p->n, p->w->group, out->scales);
}

void kt_panel_fill(const struct kt_block *b, int64_t k0, struct kt_panel *p) {
    const struct kt_matrix *w = b->w;
    const struct kt_scratch *s = b->s;
    const int values = kt_values_per_dword(p->kind), zero = w->zero, top = w->traits->top;
    const int scaled = p->kind == KT_KIND_Q8 || (p->kind == KT_KIND_BF16 && w->traits->scales_separate);
    const int64_t dwords = (p->k + values - 1) / values, groups = w->group ? (p->k + w->group - 1) / w->group : 0;
    const int64_t min_groups = w->min_group ? p->k / w->min_group : 0;
    p->data = s->data;
    p->group = scaled ? w->group : 0;
    p->min_group = scaled ? w->min_group : 0;
    p->zero = zero;
    p->max_abs = top - zero > zero ? top - zero : zero;
    p->scales = scaled ? s->scales : NULL;
    p->mins = scaled && w->min_group ? s->mins : NULL;
    for (int t = 0; t < p->tiles; t++) {
        const struct kt_tile out = {s->data + t * dwords * KT_TILE, s->scales + t * groups * KT_TILE,
                                    s->mins + t * min_groups * KT_TILE, p->ahead};
        const struct piece piece = {.k = b->k, .w = w, .s = s, .first = b->first + t * KT_TILE,
                                    .rows = (int)kt_min(b->rows - t * KT_TILE, KT_TILE), .k0 = k0, .n = p->k};
        fill_tile(&piece, p->kind, &out);
    }
}
