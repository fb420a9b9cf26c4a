/* dequantize.c: a weight back to plain numbers, by way of fp32 panels. No intrinsics, no threads. */
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

int kt_dequantize(const kt_weight *w, float *out) {
    struct kt_matrix m;
    int status = kt_matrix_check(w, &m);
    if (status) return status;
    if (!out) return KT_ERR_NULL;
    struct kt_arena arena = {0};
    struct kt_scratch s;
    kt_scratch_take(&arena, 0, &s);
    void *memory = kt_arena_commit(&arena);
    if (!memory) return KT_ERR_MEMORY;
    kt_scratch_take(&arena, 0, &s);
    const struct kt_kernels *k = kt_kernels();
    for (int64_t r = 0; r < m.rows; r += KT_TILE) {
        const struct kt_block b = {.k = k, .w = &m, .first = r, .rows = (int)kt_min(m.rows - r, KT_TILE), .s = &s};
        for (int64_t c = 0; c < m.cols; c += PIECE) {
            piece_to_floats(&b, c, kt_min(m.cols - c, PIECE), out + r * m.cols + c);
        }
    }
    kt_arena_free(memory);
    return KT_OK;
}
