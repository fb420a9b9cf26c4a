/* matmul.c: one block of W @ x: a few rows of one matrix and all tokens that meet it. Three paths:
 *
 *   dot     few tokens: a pass over packed bytes that unpacks in registers, for up to four tokens (formats that have
 * such           a kernel)
 *   strips  not many tokens: 32 rows x 512 columns are unpacked into the first-level cache and met by all tokens
 *   panels  many tokens: 128 rows x 2048 columns are unpacked into the second-level cache; while a GEMM works on
 *           them it fetches the packed bytes of the next panel
 *
 * No intrinsics, no threads, no experts. */
#include "matmul.h"

#include <stdatomic.h>
#include <string.h>

/* ---- which path ------------------------------------------------------------------------------------- */

enum path { DOT, STRIPS, PANELS };

enum {
    PANELS_FROM = 8,   /* tokens from which a panel's second trip through the caches is repaid */
    STRIP_ROWS = 32,   /* two tiles: what a GEMM prepares of its tokens serves both */
    STRIP_BYTES = 512, /* of a row */
};

static _Atomic(int) forced_threshold;

void kt_set_panel_threshold(int tokens) { atomic_store(&forced_threshold, tokens); }

int kt_panel_threshold(int measured) {
    const int forced = atomic_load(&forced_threshold);
    return forced > 0 ? forced : measured;
}

/* What the weights become on this instruction set. */
static enum kt_kind kind_of(const struct kt_kernels *k, const struct kt_matrix *w) {
    return w->kind == KT_KIND_Q8 && !k->gemm_q8 ? KT_KIND_F32 : w->kind;
}

/* Whether the format's decode kernel computes this very matrix: not where its columns are scattered over the groups,
 * which makes it fp32. */
static int has_dot(const struct kt_kernels *k, const struct kt_matrix *w) {
    return k->dot[w->format] && w->kind == w->traits->kind;
}

static enum path path_of(const struct kt_kernels *k, const struct kt_matrix *w, int64_t tokens) {
    const int tiles_from = kt_panel_threshold(k->tiles_from[w->format]);
    if (has_dot(k, w) && tokens < tiles_from) return DOT;
    return tokens < PANELS_FROM ? STRIPS : PANELS;
}

int kt_forms_needed(const struct kt_kernels *k, const struct kt_matrix *w, int64_t tokens, int dtype) {
    enum kt_kind kind = kind_of(k, w);
    if (kind == KT_KIND_Q8) return KT_NEED_Q8;
    if (kind != KT_KIND_BF16 || !k->gemm_bf16 || (path_of(k, w, tokens) == DOT && !k->dot_bf16)) return 0;
    return w->traits->scales_separate || dtype == KT_BF16 ? KT_NEED_BF16 : 0;
}

/* ---- activations ------------------------------------------------------------------------------------ */

void kt_acts_take(struct kt_arena *arena, int64_t tokens, int64_t cols, int need, struct kt_acts *a) {
    int64_t stride = kt_round_up(cols, 64) | 64; /* see struct kt_acts; enough for bf16 and fp32 as well */
    const int64_t groups = tokens * (stride / KT_ACT_GROUP);
    *a = (struct kt_acts){.cols = cols, .stride = stride};
    a->f = kt_arena_take(arena, tokens * stride, 4);
    if (need & KT_NEED_BF16) a->h = kt_arena_take(arena, tokens * stride, 2);
    if (need & KT_NEED_Q8) {
        a->q = kt_arena_take(arena, tokens * stride, 1);
        a->d = kt_arena_take(arena, groups + 16, 4); /* kernels read 16 at a time */
        a->ds = kt_arena_take(arena, groups + 16, 4);
        a->low = kt_arena_take(arena, groups + 16, 4);
        a->high = kt_arena_take(arena, groups + 16, 4);
    }
}

int kt_acts_derive_part(const struct kt_kernels *k, struct kt_acts *a, int64_t t, int64_t first, int64_t n, int need) {
    int finite = 1;
    const int64_t at = t * a->stride + first, g = at / KT_ACT_GROUP;
    const float *x = a->f + at;
    if (need & KT_NEED_Q8) { /* such a matrix has cols % 32 == 0 */
        k->quantize(x, n, a->q + at, a->d + g, a->ds + g, a->low + g, a->high + g);
        for (int64_t i = 0; i < n / KT_ACT_GROUP; i++) finite &= a->d[g + i] == a->d[g + i];
    }
    if (need & KT_NEED_BF16) {
        k->to_bf16(x, n, a->h + at);
        if (first + n == a->cols) memset(a->h + at + n, 0, (size_t)(a->stride - a->cols) * 2);
    }
    return finite;
}

int kt_acts_derive(const struct kt_kernels *k, struct kt_acts *a, int64_t t, int need) {
    return kt_acts_derive_part(k, a, t, 0, a->cols, need);
}

size_t kt_dtype_size(int dtype) { return dtype == KT_F32 ? 4 : dtype == KT_F16 || dtype == KT_BF16 ? 2 : 0; }

void kt_load_row(const struct kt_kernels *k, const void *x, int dtype, int64_t offset, int64_t n, float *out) {
    int format = dtype == KT_F32 ? KT_FMT_F32 : dtype == KT_F16 ? KT_FMT_F16 : KT_FMT_BF16;
    k->unpack[format]((const uint8_t *)x + (size_t)offset * kt_dtype_size(dtype), n, out, NULL, NULL);
}

void kt_store_row(const struct kt_kernels *k, const float *x, int64_t n, int dtype, void *out, int64_t offset) {
    if (dtype == KT_F32) memcpy((float *)out + offset, x, (size_t)n * 4);
    if (dtype == KT_F16) k->to_f16(x, n, (uint16_t *)out + offset);
    if (dtype == KT_BF16) k->to_bf16(x, n, (uint16_t *)out + offset);
}

/* ---- what comes next -------------------------------------------------------------------------------- */

/* Of a type by columns: bytes that some rows, an even number, take in a stored row. */
static size_t column_bytes(const struct kt_matrix *w, int64_t rows) {
    return (size_t)(w->format == KT_FMT_AWQ4 ? rows / 2 : rows * 4);
}

struct kt_ahead kt_packed_bytes(const struct kt_matrix *w, int64_t first, int64_t rows, int64_t k0, int64_t n) {
    const struct kt_traits *t = w->traits;
    rows = kt_min(rows, w->rows - first);
    n = kt_min(n, w->cols - k0);
    if (rows <= 0 || n <= 0) return (struct kt_ahead){0};
    if (t->by_column)
        return (struct kt_ahead){.row = w->data + (size_t)(k0 / t->block) * w->stride + column_bytes(w, first),
                                 .stride = w->stride, .bytes = column_bytes(w, rows), .rows = (int)(n / t->block)};
    struct kt_ahead a = {.row = w->data + (size_t)first * w->stride + kt_row_bytes(t, k0), .stride = w->stride,
                         .bytes = kt_row_bytes(t, n), .rows = (int)rows};
    if (a.bytes == a.stride) { /* contiguous */
        a.bytes *= (size_t)rows;
        a.rows = 1;
    }
    return a;
}

/* How far what is read FETCH bytes after row r of a block lies from it: rows of this block, then of the next. */
static size_t rows_ahead(const struct kt_block *b, int64_t r) {
    enum { FETCH = 8192 }; /* the latency of memory at its full speed, twice over; a quarter of the first-level cache */
    const struct kt_matrix *w = b->w, *next = b->next.w;
    const int64_t skip = (int64_t)((FETCH + w->stride - 1) / w->stride);
    if (r + skip < b->rows) return (size_t)skip * w->stride;
    if (!next) return 0;
    const uint8_t *then = next->data + (size_t)(b->next.first + r + skip - b->rows) * next->stride;
    return (uintptr_t)then - (uintptr_t)(w->data + (size_t)(b->first + r) * w->stride);
}

/* The same for a type by columns: how far the next call's part of a stored row lies from this one's. */
static size_t columns_ahead(const struct kt_block *b, int64_t r) {
    const struct kt_matrix *w = b->w, *next = b->next.w;
    if (r + KT_DOT_ROWS < b->rows) return column_bytes(w, KT_DOT_ROWS);
    if (!next) return 0;
    const uint8_t *then = next->data + column_bytes(next, b->next.first);
    return (uintptr_t)then - (uintptr_t)(w->data + column_bytes(w, b->first + r));
}

/* The scales that the next block meets first. */
static void fetch_scales(struct kt_next next) {
    const struct kt_matrix *w = next.w;
    if (!w || !w->scales || w->traits->by_column) return;
    const uint8_t *scales = w->scales + (size_t)(next.first / w->scale_rows) * w->scale_stride;
    const size_t bytes = w->scale_stride * (w->scale_rows == 1 ? KT_SCALES_AHEAD : 1);
    for (size_t i = 0; i < bytes && i < 4096; i += 64) __builtin_prefetch(scales + i);
}

/* ---- the paths -------------------------------------------------------------------------------------- */

static struct kt_act act_of(const struct kt_acts *a, int32_t token) {
    const int64_t at = token * a->stride, g = at / KT_ACT_GROUP;
    struct kt_act one = {.f = a->f + at, .h = a->h ? a->h + at : NULL};
    if (!a->q) return one;
    one.q = a->q + at;
    one.d = a->d + g;
    one.ds = a->ds + g;
    one.low = a->low + g;
    one.high = a->high + g;
    return one;
}

/* A few rows at a time, each met by every token while its bytes are in the first-level cache. */
static void dot_block(const struct kt_block *b) {
    const kt_dot_fn dot = b->k->dot[b->w->format];
    /* Passes of equal size, or one less: five tokens are 3 + 2. */
    const int passes = (b->tokens + KT_DOT_TOKENS - 1) / KT_DOT_TOKENS;
    for (int r = 0; r < b->rows; r += KT_DOT_ROWS) {
        const int rows = (int)kt_min(b->rows - r, KT_DOT_ROWS);
        const size_t ahead = b->w->traits->by_column ? columns_ahead(b, r) : rows_ahead(b, r);
        for (int pass = 0, i = 0; pass < passes; pass++) {
            struct kt_act few[KT_DOT_TOKENS];
            const int some = (b->tokens - i + passes - pass - 1) / (passes - pass);
            for (int j = 0; j < some; j++) few[j] = act_of(b->a, b->token[i + j]);
            dot(b->w, b->first + r, rows, few, some, ahead, b->c + i * b->ldc + r, b->ldc);
            i += some;
        }
    }
    fetch_scales(b->next);
}

/* Unpacking takes as long as two tokens' products, and fetches as much of what comes next. */
static void fetch_while_filling(struct kt_panel *p, int tokens) {
    const int64_t steps = (int64_t)p->tiles * 2 * ((p->k + KT_AHEAD_COLS - 1) / KT_AHEAD_COLS);
    p->ahead->step = (int)(kt_ahead_lines(p->ahead) * 2 / (tokens + 2) / steps);
}

/* `bytes` of a panel row at a time. */
static void panel_block(const struct kt_block *b, int bytes) {
    const struct kt_kernels *k = b->k;
    const struct kt_matrix *w = b->w;
    enum kt_kind kind = kind_of(k, w);
    if (kind == KT_KIND_BF16 && !(k->gemm_bf16 && b->a->h)) kind = KT_KIND_F32;
    const kt_gemm_fn gemm = kind == KT_KIND_Q8 ? k->gemm_q8 : kind == KT_KIND_BF16 ? k->gemm_bf16 : k->gemm_f32;
    int64_t columns = bytes / 4 * kt_values_per_dword(kind);
    if (columns < KT_BLOCK_COLS) columns = KT_BLOCK_COLS;
    const int tiles = (b->rows + KT_TILE - 1) / KT_TILE;
    for (int64_t k0 = 0; k0 < w->cols; k0 += columns) {
        struct kt_ahead ahead = {0};
        struct kt_panel p = {.kind = kind, .tiles = tiles, .k = kt_min(w->cols - k0, columns), .ahead = &ahead};
        if (k0 + columns < w->cols) ahead = kt_packed_bytes(w, b->first, b->rows, k0 + columns, columns);
        else if (b->next.w) ahead = kt_packed_bytes(b->next.w, b->next.first, b->rows, 0, columns);
        fetch_while_filling(&p, b->tokens);
        kt_panel_fill(b, k0, &p);
        gemm(&p, b->a, b->token, b->tokens, k0, b->c, b->ldc, k0 > 0);
    }
}

static void strips_block(const struct kt_block *b) {
    for (int r = 0; r < b->rows; r += STRIP_ROWS) {
        struct kt_block strip = *b;
        strip.first = b->first + r;
        strip.rows = (int)kt_min(b->rows - r, STRIP_ROWS);
        strip.c = b->c + r;
        if (r + strip.rows < b->rows) strip.next = (struct kt_next){b->w, strip.first + strip.rows};
        panel_block(&strip, STRIP_BYTES);
    }
}

void kt_matmul_block(const struct kt_block *b) {
    switch (path_of(b->k, b->w, b->tokens)) {
    case DOT: dot_block(b); break;
    case STRIPS: strips_block(b); break;
    case PANELS: panel_block(b, KT_PANEL_BYTES); break;
    }
}

int kt_job_rows(const kt_pool *pool, int64_t rows_total) {
    int rows = kt_pool_nodes(pool) > 1 ? KT_SHARD_ROWS : KT_BLOCK_ROWS; /* a job is of one node */
    while (rows > KT_TILE && rows_total / rows < 6 * kt_pool_threads(pool)) rows /= 2;
    return rows;
}
