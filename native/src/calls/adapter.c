/* adapter.c: the products of a low-rank adapter, in fp32: as those of any other matrix. */
#include "adapter.h"

int kt_lora_check(const kt_lora *l, int with_gradients) {
    if (!l) return KT_OK;
    if (l->rank < 1 || l->rank > KT_MAX_RANK) return KT_ERR_SHAPE;
    return l->a && l->b && (!with_gradients || (l->grad_a && l->grad_b)) ? KT_OK : KT_ERR_NULL;
}

struct kt_matrix kt_lora_a(const kt_lora *l, int64_t in, int64_t expert) {
    return kt_floats_matrix(l->a + expert * l->rank * in, l->rank, in, in);
}

struct kt_matrix kt_lora_b(const kt_lora *l, int64_t rows_all, int64_t expert, int64_t first, int64_t rows) {
    return kt_floats_matrix(l->b + (expert * rows_all + first) * l->rank, rows, l->rank, l->rank);
}

void kt_lora_narrow(const kt_lora *l, int64_t in, int64_t expert, const struct kt_block *b, float *z, int64_t ldz) {
    const struct kt_matrix a = kt_lora_a(l, in, expert);
    for (int64_t r = 0; r < l->rank; r += KT_BLOCK_ROWS) {
        struct kt_block some = *b;
        some.w = &a;
        some.first = r;
        some.rows = (int)kt_min(l->rank - r, KT_BLOCK_ROWS);
        some.c = z + r;
        some.ldc = ldz;
        kt_matmul_block(&some);
    }
    for (int64_t i = 0; i < b->tokens; i++) b->k->scale_add(l->scale, z + i * ldz, z + i * ldz, l->rank, 0);
}

void kt_lora_widen(const struct kt_matrix *b_rows, const struct kt_block *b, float *y, int64_t ldy) {
    enum { COLUMNS = KT_PANEL_BYTES / 4 };
    struct kt_block all = *b;
    all.w = b_rows;
    all.rows = (int)b_rows->rows;
    for (int64_t k = 0; k < b_rows->cols; k += COLUMNS) {
        struct kt_ahead none = {0};
        struct kt_panel p = {.kind = KT_KIND_F32, .tiles = (all.rows + KT_TILE - 1) / KT_TILE,
                             .k = kt_min(b_rows->cols - k, COLUMNS), .ahead = &none};
        kt_panel_fill(&all, k, &p);
        b->k->gemm_f32(&p, b->a, b->token, b->tokens, k, y, ldy, 1);
    }
}
