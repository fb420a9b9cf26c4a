/* transposed.c: one block of d @ w: some columns of one matrix and all tokens that meet it.
 *
 * A tile of a panel holds 16 rows of weights side by side (struct kt_panel). Here it holds 16 columns: a line is then
 * a piece of a row as it lies in memory, and the GEMMs of the forward product compute this one, on any instruction set.
 * A scale belongs to a row and a group of columns, so it stands inside the sum: codes become numbers first, fp32, or
 * bf16 where there is a multiplier for it. No intrinsics, no threads, no experts. */
#include "transposed.h"

#include <string.h>

enum {
    LINE = KT_TILE * KT_TILE,            /* floats of 16 rows of a tile */
    TILES = KT_BLOCK_COLS / KT_TILE,     /* of a panel */
    AT_ONCE = KT_BLOCK_ROWS / KT_TILE,   /* of a GEMM, which expects no more */
    DWORDS = KT_BLOCK_ROWS * KT_PANEL_BYTES / 4,
    ROWS_F32 = DWORDS / KT_BLOCK_COLS,
    ROWS_BF16 = 2 * ROWS_F32,
};

int kt_transposed_forms(const struct kt_kernels *k, const struct kt_matrix *w, int dtype) {
    if (!k->gemm_bf16 || w->traits->kind == KT_KIND_F32) return 0;
    return w->format != KT_FMT_BF16 || dtype == KT_BF16 ? KT_NEED_BF16 : 0;
}

uint32_t *kt_transposed_take(struct kt_arena *arena) { return kt_arena_take(arena, DWORDS, 4); }

struct kt_matrix kt_floats_matrix(const float *data, int64_t rows, int64_t cols, int64_t stride) {
    return (struct kt_matrix){.format = KT_FMT_F32, .traits = &kt_traits_table[KT_FMT_F32], .kind = KT_KIND_F32,
                              .rows = rows, .cols = cols, .data = (const uint8_t *)data,
                              .stride = (size_t)stride * sizeof *data, .scale = 1.0f};
}

int kt_job_cols(const kt_pool *pool, const struct kt_matrix *w, int64_t jobs_each) {
    const int least = w->traits->block > 64 ? KT_BLOCK_COLS : 64;
    int cols = KT_BLOCK_COLS;
    while (cols > least && w->cols / cols * jobs_each < 3 * kt_pool_threads(pool)) cols /= 2;
    return cols;
}

/* ---- sixteen rows as floats -------------------------------------------------------------------------- */

/* Where some rows go: column c of the i-th at to[c / 16 * tile + i * 16 + c % 16]; zeros after the last column. */
struct lines {
    float *to;
    int64_t tile;
};

static void put_row(const float *x, int cols, int i, const struct lines *out) {
    float *to = out->to + i * KT_TILE;
    for (; cols >= KT_TILE; cols -= KT_TILE, x += KT_TILE, to += out->tile) memcpy(to, x, KT_TILE * sizeof *x);
    if (cols <= 0) return;
    memset(to, 0, KT_TILE * sizeof *to);
    memcpy(to, x, (size_t)cols * sizeof *x);
}

/* Plain floats, row by row. */
static void rows_of_floats(const struct kt_transposed *b, int64_t r, int rows, const struct lines *out) {
    const struct kt_matrix *w = b->w;
    for (int i = 0; i < rows; i++) {
        float x[KT_BLOCK_COLS];
        const int64_t row = b->row ? b->row[r + i] : r + i;
        b->k->unpack[w->format](w->data + (size_t)row * w->stride + kt_row_bytes(w->traits, b->first), b->cols, x, NULL,
                                NULL);
        put_row(x, b->cols, i, out);
    }
}

/* Any format, by way of a tile of 16 rows, whose columns lie apart. */
static void rows_of_tile(const struct kt_transposed *b, const float *v, int rows, const struct lines *out) {
    for (int c = 0; c < b->cols; c += KT_TILE) {
        float *to = out->to + c / KT_TILE * out->tile;
        _Alignas(64) float turned[LINE];
        const int cols = b->cols - c < KT_TILE ? b->cols - c : KT_TILE;
        if (rows == KT_TILE && cols == KT_TILE) {
            b->k->interleave((const uint32_t *)v + c * KT_TILE, KT_TILE, KT_TILE, (uint32_t *)to);
            continue;
        }
        memset(turned, 0, sizeof turned);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) turned[i * KT_TILE + j] = v[(c + j) * KT_TILE + i];
        memcpy(to, turned, (size_t)rows * KT_TILE * sizeof *to);
    }
}

static struct kt_panel one_tile(const struct kt_transposed *b, int64_t r, int rows, enum kt_kind kind,
                                struct kt_ahead *ahead) {
    const struct kt_block block = {.k = b->k, .w = b->w, .first = r, .rows = rows, .s = b->s};
    struct kt_panel p = {.kind = kind, .tiles = 1, .k = b->cols, .ahead = ahead};
    kt_panel_fill(&block, b->first, &p);
    return p;
}

/* Rows r .. r + rows of the block, rows <= 16. */
static void fill_rows(const struct kt_transposed *b, int64_t r, int rows, struct kt_ahead *ahead,
                      const struct lines *out) {
    const struct kt_matrix *w = b->w;
    if (w->traits->kind != KT_KIND_Q8 && !w->traits->scales_separate) {
        rows_of_floats(b, r, rows, out);
        for (int i = 0; i < 2; i++) kt_ahead_step(ahead);
        return;
    }
    const int by_codes = w->kind == KT_KIND_Q8 && b->k->turn_codes;
    const struct kt_panel p = one_tile(b, r, rows, by_codes ? KT_KIND_Q8 : KT_KIND_F32, ahead);
    if (by_codes) b->k->turn_codes(&p, rows, out->to, out->tile);
    else rows_of_tile(b, (const float *)p.data, rows, out);
}

/* ---- panels ------------------------------------------------------------------------------------------ */

static void fill_f32(const struct kt_transposed *b, int64_t r, struct kt_panel *p) {
    for (int64_t i = 0; i < p->k; i += KT_TILE)
        fill_rows(b, r + i, (int)kt_min(p->k - i, KT_TILE), p->ahead,
                  &(struct lines){(float *)b->panel + i * KT_TILE, p->k * KT_TILE});
}

/* Two rows a line. */
static void fill_bf16(const struct kt_transposed *b, int64_t r, struct kt_panel *p) {
    const struct kt_matrix *w = b->w;
    const int64_t tile = (p->k + 1) / 2 * KT_TILE;
    if (w->format == KT_FMT_BF16) {
        const uint8_t *from = w->data + (size_t)r * w->stride + kt_row_bytes(w->traits, b->first);
        b->k->pair_rows(from, w->stride, (int)p->k, b->cols, b->panel, tile);
        return;
    }
    for (int64_t i = 0; i < p->k; i += KT_TILE) {
        _Alignas(64) float v[TILES * LINE];
        uint16_t h[TILES * LINE];
        const int rows = (int)kt_min(p->k - i, KT_TILE);
        if (w->kind == KT_KIND_Q8 && b->k->turn_codes_bf16) {
            const struct kt_panel codes = one_tile(b, r + i, rows, KT_KIND_Q8, p->ahead);
            b->k->turn_codes_bf16(&codes, rows, b->panel + i / 2 * KT_TILE, tile);
            continue;
        }
        fill_rows(b, r + i, rows, p->ahead, &(struct lines){v, LINE});
        for (int t = 0; t < p->tiles; t++) {
            b->k->to_bf16(v + t * LINE, rows * KT_TILE, h + t * LINE);
            b->k->pair_rows((const uint8_t *)(h + t * LINE), KT_TILE * sizeof *h, rows, KT_TILE,
                            b->panel + t * tile + i / 2 * KT_TILE, tile);
        }
    }
}

/* Some columns of the panel: as many as a GEMM takes. */
static void multiply(const struct kt_transposed *b, struct kt_panel p, int64_t r) {
    const int bf16 = p.kind == KT_KIND_BF16, tiles = p.tiles;
    const int64_t dwords = (bf16 ? (p.k + 1) / 2 : p.k) * KT_TILE;
    for (int t = 0; t < tiles; t += AT_ONCE) {
        p.data = b->panel + t * dwords;
        p.tiles = tiles - t < AT_ONCE ? tiles - t : AT_ONCE;
        (bf16 ? b->k->gemm_bf16 : b->k->gemm_f32)(&p, b->d, b->token, b->tokens, r, b->c + t * KT_TILE, b->ldc,
                                                  b->add || r > 0);
    }
}

struct kt_ahead kt_transposed_ahead(const struct kt_matrix *w, int64_t first, int cols) {
    return kt_packed_bytes(w, 0, ROWS_F32, first, cols);
}

void kt_transposed_block(const struct kt_transposed *b) {
    const struct kt_matrix *w = b->w;
    const int bf16 = b->forms & KT_NEED_BF16;
    const int64_t most = bf16 ? ROWS_BF16 : ROWS_F32;
    for (int64_t r = 0; r < w->rows; r += most) {
        struct kt_ahead ahead = b->row           ? (struct kt_ahead){0}
                                : r + most < w->rows ? kt_packed_bytes(w, r + most, most, b->first, b->cols)
                                                     : b->next;
        struct kt_panel p = {.kind = bf16 ? KT_KIND_BF16 : KT_KIND_F32, .k = kt_min(w->rows - r, most),
                             .tiles = (b->cols + KT_TILE - 1) / KT_TILE, .ahead = &ahead};
        kt_ahead_spread(&ahead, 4 * (most / KT_TILE)); /* half of it while this panel is filled, two steps 16 rows */
        if (bf16) fill_bf16(b, r, &p);
        else fill_f32(b, r, &p);
        multiply(b, p, r);
    }
}
