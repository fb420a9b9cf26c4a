/* dequantize.c: a weight back to plain numbers, by way of fp32 panels. No intrinsics, no threads. */
#include "matmul.h"
#include "panel.h"

enum { PIECE = 512 }; /* columns at once, a multiple of every block */

/* Rows b->first .. of columns c .. c + n; out: of that row and column. */
static void piece_to_floats(const struct kt_block *b, int64_t c, int64_t n, float *out) {
    struct kt_panel p = {.kind = KT_KIND_F32, .tiles = 1, .k = n};
    kt_panel_fill(b, c, &p);
    const float *v = (const float *)p.data;
    for (int i = 0; i < b->rows; i++)
        for (int64_t j = 0; j < n; j++) out[i * b->w->cols + j] = v[j * KT_TILE + i];
}

static void rows_to_floats(const struct kt_block *b, float *out) {
    for (int64_t c = 0; c < b->w->cols; c += PIECE) piece_to_floats(b, c, kt_min(b->w->cols - c, PIECE), out + c);
}

/* Scratch memory for one thread's panels, and `floats` more; free what is returned. NULL: there is none. */
static void *take(struct kt_scratch *s, int64_t floats, float **more) {
    struct kt_arena arena = {0};
    void *memory = NULL;
    for (int sized = 0; sized < 2; sized++) {
        kt_scratch_take(&arena, 0, s);
        *more = kt_arena_take(&arena, floats, sizeof **more);
        if (!sized && !(memory = kt_arena_commit(&arena))) return NULL;
    }
    return memory;
}

int kt_dequantize(const kt_weight *w, float *out) {
    struct kt_matrix m;
    const int status = kt_matrix_check(w, &m);
    if (status) return status;
    if (!out) return KT_ERR_NULL;
    struct kt_scratch s;
    float *none;
    void *memory = take(&s, 0, &none);
    if (!memory) return KT_ERR_MEMORY;
    for (int64_t r = 0; r < m.rows; r += KT_TILE)
        rows_to_floats(&(struct kt_block){.k = kt_kernels(), .w = &m, .first = r,
                                          .rows = (int)kt_min(m.rows - r, KT_TILE), .s = &s}, out + r * m.cols);
    kt_arena_free(memory);
    return KT_OK;
}

int kt_embed(const kt_weight *w, const int64_t *ids, int64_t count, void *out, int dtype) {
    struct kt_matrix m;
    const int status = kt_matrix_check(w, &m);
    if (status) return status;
    if (count < 0 || count > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (!kt_dtype_size(dtype)) return KT_ERR_DTYPE;
    if (count && (!ids || !out)) return KT_ERR_NULL;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= m.rows) return KT_ERR_SHAPE;
    struct kt_scratch s;
    float *row;
    void *memory = take(&s, m.cols, &row);
    if (!memory) return KT_ERR_MEMORY;
    const struct kt_kernels *k = kt_kernels();
    for (int64_t i = 0; i < count; i++) {
        rows_to_floats(&(struct kt_block){.k = k, .w = &m, .first = ids[i], .rows = 1, .s = &s}, row);
        kt_store_row(k, row, m.cols, dtype, out, i * m.cols);
    }
    kt_arena_free(memory);
    return KT_OK;
}
