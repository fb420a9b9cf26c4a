/* matrix.c: from a caller's kt_weight to a kt_matrix that kernels may read without further checks. No intrinsics, no
 * threads. */
#include "matrix.h"

#include "../formats/quants.h"

/* ---- separate scales, zero points, column order -------------------------------------------------------- */

/* Whether `count` pieces of `bytes` bytes, `stride` bytes apart (0: dense, and then set), end within `span` bytes. */
static int fits(int64_t count, size_t bytes, size_t *stride, size_t span) {
    size_t end;
    if (!*stride) *stride = bytes;
    if (*stride < bytes || __builtin_mul_overflow(*stride, (size_t)(count - 1), &end)) return 0;
    return !__builtin_add_overflow(end, bytes, &end) && end <= span;
}

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* The array of scales or of words of zero points: how many stored rows, and how many values in each. `down` belong to
 * the rows of the matrix, `across` to its columns; a type by columns stores them the other way round. */
struct stored {
    int64_t rows, values;
};
static struct stored stored(const struct kt_matrix *m, int64_t down, int64_t across) {
    return m->traits->by_column ? (struct stored){across, down} : (struct stored){down, across};
}

static int check_zeros(const kt_weight *w, struct kt_matrix *m) {
    const int64_t packed = m->traits->zeros_per_dword;
    if (!w->zeros) return KT_OK;
    if (!packed || m->scale_rows != 1) return KT_ERR_SCALES;
    m->zeros = w->zeros;
    m->zero_stride = (size_t)w->zero_stride;
    m->zero_bias = w->zero_bias;
    m->zero = 0;
    m->min_group = m->group;
    if (w->zero_stride < 0 || w->zero_bias < 0 || w->zero_bias > 1) return KT_ERR_SCALES;
    if (m->min_group == 16) return KT_ERR_SCALES; /* no published type; the GEMMs have no such variant */
    const struct stored words = stored(m, divide_up(m->rows, packed), divide_up(m->cols, m->scale_cols));
    return fits(words.rows, (size_t)words.values * 4, &m->zero_stride, w->zero_bytes) ? KT_OK : KT_ERR_BYTES;
}

static int check_order(const kt_weight *w, struct kt_matrix *m) {
    const int64_t groups = divide_up(m->cols, m->scale_cols);
    if (!w->order) return KT_OK;
    if ((uintptr_t)w->order % 4 || m->kind != KT_KIND_Q8) return KT_ERR_SCALES;
    if (m->scale_rows != 1 || groups > KT_MAX_ORDERED) return KT_ERR_SCALES;
    for (int64_t c = 0; c < m->cols; c++)
        if (w->order[c] < 0 || w->order[c] >= groups) return KT_ERR_SCALES;
    m->order = w->order;
    m->kind = KT_KIND_F32; /* neighbours differ in scale: no integer sums */
    return KT_OK;
}

/* Columns of a panel that share a scale: 32; 16 where a scale covers an odd multiple of 16. One scale for all columns
 * serves any number of them. 0: there are no kernels for such scales. */
static int group_of(const struct kt_matrix *m) {
    if (m->scale_cols % 32 == 0 || m->scale_cols == m->cols) return 32;
    return m->scale_cols % 16 == 0 && m->kind == KT_KIND_Q8 ? 16 : 0;
}

static int take_scales(const kt_weight *w, struct kt_matrix *m) {
    const size_t size = kt_scale_size(w->scale_type);
    m->scales = w->scales;
    m->scale_type = w->scale_type;
    m->scale_rows = kt_min(w->scale_rows, m->rows);
    m->scale_cols = kt_min(w->scale_cols, m->cols);
    m->scale_stride = (size_t)w->scale_stride;
    m->scale = m->format == KT_FMT_F4_E2M1 ? 0.5f * w->scale : w->scale; /* its codes are doubled */
    if (!w->scales) return KT_ERR_NULL;
    if (!size || w->scale_rows < 1 || w->scale_cols < 1 || w->scale_stride < 0) return KT_ERR_SCALES;
    if (m->traits->by_column && m->scale_rows != 1) return KT_ERR_SCALES;
    const struct stored all = stored(m, divide_up(m->rows, m->scale_rows), divide_up(m->cols, m->scale_cols));
    return fits(all.rows, (size_t)all.values * size, &m->scale_stride, w->scale_bytes) ? KT_OK : KT_ERR_BYTES;
}

static int check_scales(const kt_weight *w, struct kt_matrix *m) {
    int status = take_scales(w, m);
    if (status) return status;
    m->group = group_of(m);
    m->min_group = 0;
    if (!m->group) return KT_ERR_SCALES;
    if (m->kind == KT_KIND_Q8 && m->cols % 32) return KT_ERR_BLOCK;
    status = check_zeros(w, m);
    return status ? status : check_order(w, m);
}

/* ---- the matrix -------------------------------------------------------------------------------------- */

/* Stored rows: of a type by columns each holds `block` columns of all rows of the matrix. */
static int check_codes(const kt_weight *w, struct kt_matrix *m) {
    const struct kt_traits *t = m->traits;
    const size_t sharing = m->format == KT_FMT_AWQ4 ? 2 : 1; /* rows in a block's bytes */
    const int64_t count = t->by_column ? m->cols / t->block : m->rows;
    const size_t bytes = t->by_column ? (size_t)m->rows * (size_t)t->bytes / sharing : kt_row_bytes(t, m->cols);
    if (m->format == KT_FMT_AWQ4 && m->rows % 8) return KT_ERR_BLOCK;
    if (!fits(count, bytes, &m->stride, w->bytes)) return KT_ERR_BYTES;
    if (!w->stride && m->stride * (size_t)count != w->bytes) return KT_ERR_BYTES; /* dense weights fill their bytes */
    return KT_OK;
}

int kt_matrix_check(const kt_weight *w, struct kt_matrix *m) {
    if (!w || !w->data) return KT_ERR_NULL;
    int format = kt_format_of(w->type);
    if (format < 0) return KT_ERR_TYPE;
    const struct kt_traits *t = &kt_traits_table[format];
    if (w->rows < 1 || w->cols < 1 || w->rows > KT_MAX_DIM || w->cols > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (w->cols % t->block) return KT_ERR_BLOCK;
    if (w->stride < 0) return KT_ERR_BYTES;
    *m = (struct kt_matrix){.format = format, .traits = t, .kind = t->kind, .rows = w->rows, .cols = w->cols,
                            .data = w->data, .stride = (size_t)w->stride, .scale = 1.0f,
                            .group = t->group, .min_group = t->min_group, .zero = t->zero};
    int status = check_codes(w, m);
    if (status || !t->scales_separate) return status;
    return check_scales(w, m);
}
