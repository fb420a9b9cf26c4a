/* matrix.c: from a caller's kt_weight to a kt_matrix that kernels may read without further checks, and back to
 * plain numbers (kt_dequantize). No intrinsics, no threads. */
#include "matrix.h"

#include "panel.h"
#include "../formats/quants.h"

/* ---- scales beside the codes ------------------------------------------------------------------------- */

/* Whether `lines` lines of `bytes` bytes, `stride` bytes apart (0: dense, and then set), end within `span` bytes. */
static int fits(int64_t lines, size_t bytes, size_t *stride, size_t span) {
    size_t end;
    if (!*stride) *stride = bytes;
    if (*stride < bytes || __builtin_mul_overflow(*stride, (size_t)(lines - 1), &end)) return 0;
    return !__builtin_add_overflow(end, bytes, &end) && end <= span;
}

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

static int check_zeros(const kt_weight *w, struct kt_matrix *m) {
    const int64_t packed = kt_zeros_per_dword(m->format), groups = divide_up(m->cols, m->scale_cols);
    if (!w->zeros) return KT_OK;
    if (!packed || m->scale_rows != 1) return KT_ERR_SCALES;
    m->zeros = w->zeros;
    m->zero_stride = (size_t)w->zero_stride;
    m->zero_bias = w->zero_bias;
    int64_t lines = m->traits->by_column ? groups : divide_up(m->rows, packed);
    int64_t words = m->traits->by_column ? divide_up(m->rows, packed) : groups;
    if (w->zero_stride < 0 || w->zero_bias < 0 || w->zero_bias > 1) return KT_ERR_SCALES;
    return fits(lines, (size_t)words * 4, &m->zero_stride, w->zero_bytes) ? KT_OK : KT_ERR_BYTES;
}

static int check_order(const kt_weight *w, struct kt_matrix *m) {
    const int64_t groups = divide_up(m->cols, m->scale_cols);
    if (!w->order) return KT_OK;
    if ((uintptr_t)w->order % 4 || m->kind != KT_KIND_Q8 || m->scale_rows != 1 || groups > KT_MAX_ORDERED) return KT_ERR_SCALES;
    for (int64_t c = 0; c < m->cols; c++)
        if (w->order[c] < 0 || w->order[c] >= groups) return KT_ERR_SCALES;
    m->order = w->order;
    m->kind = KT_KIND_F32; /* neighbours differ in scale: no integer sums */
    return KT_OK;
}

static int check_scales(const kt_weight *w, struct kt_matrix *m) {
    size_t size = kt_scale_size(w->scale_type);
    m->scales = w->scales;
    m->scale_type = w->scale_type;
    m->scale_rows = w->scale_rows;
    m->scale_cols = w->scale_cols;
    m->scale_stride = (size_t)w->scale_stride;
    m->scale = m->format == KT_FMT_F4_E2M1 ? 0.5f * w->scale : w->scale; /* its codes are doubled */
    if (!w->scales) return KT_ERR_NULL;
    if (!size || w->scale_rows < 1 || w->scale_cols < 1 || w->scale_stride < 0) return KT_ERR_SCALES;
    if (m->scale_rows > m->rows) m->scale_rows = m->rows;
    if (m->scale_cols > m->cols) m->scale_cols = m->cols;
    int64_t down = divide_up(m->rows, m->scale_rows), across = divide_up(m->cols, m->scale_cols);
    if (m->traits->by_column && m->scale_rows != 1) return KT_ERR_SCALES;
    int64_t lines = m->traits->by_column ? across : down, each = m->traits->by_column ? down : across;
    if (!fits(lines, (size_t)each * size, &m->scale_stride, w->scale_bytes)) return KT_ERR_BYTES;
    if (m->kind == KT_KIND_Q8) {
        if (m->scale_cols % 32 == 0 || m->scale_cols == m->cols) m->group = 32;
        else if (m->scale_cols % 16 == 0) m->group = 16;
        else return KT_ERR_SCALES;
        if (m->cols % 32) return KT_ERR_BLOCK;
    } else if (m->scale_cols % 32 && m->scale_cols != m->cols) {
        return KT_ERR_SCALES;
    } else {
        m->group = 32;
    }
    int status = check_zeros(w, m);
    if (status) return status;
    m->min_group = m->zeros ? m->group : 0;
    if (m->zeros) m->zero = 0;
    if (m->min_group == 16) return KT_ERR_SCALES; /* no published type; the GEMMs have no such variant */
    return check_order(w, m);
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
    if (format == KT_FMT_AWQ4 && w->rows % 8) return KT_ERR_BLOCK;
    int64_t lines = t->by_column ? w->cols / t->block : w->rows;
    size_t line = t->by_column ? (size_t)w->rows * (size_t)t->bytes / (format == KT_FMT_AWQ4 ? 2 : 1) : kt_row_bytes(t, w->cols);
    if (!fits(lines, line, &m->stride, w->bytes)) return KT_ERR_BYTES;
    if (!w->stride && m->stride * (size_t)lines != w->bytes) return KT_ERR_BYTES; /* dense weights fill their bytes */
    return t->beside ? check_scales(w, m) : KT_OK;
}

/* ---- numbers ----------------------------------------------------------------------------------------- */

enum { PIECE = 512 }; /* columns at once, a multiple of every block */

int kt_dequantize(const kt_weight *w, float *out) {
    struct kt_matrix m;
    int status = kt_matrix_check(w, &m);
    if (status) return status;
    if (!out) return KT_ERR_NULL;
    const struct kt_kernels *k = kt_kernels();
    struct kt_arena arena = {0};
    struct kt_scratch s;
    kt_scratch_take(&arena, 0, &s);
    void *memory = kt_arena_commit(&arena);
    if (!memory) return KT_ERR_MEMORY;
    kt_scratch_take(&arena, 0, &s);
    for (int64_t r = 0; r < m.rows; r += KT_TILE)
        for (int64_t c = 0; c < m.cols; c += PIECE) {
            const int rows = (int)kt_min(m.rows - r, KT_TILE);
            struct kt_panel p = {.kind = KT_KIND_F32, .tiles = 1, .k = kt_min(m.cols - c, PIECE)};
            kt_panel_fill(k, &m, r, rows, c, &s, &p);
            const float *v = (const float *)p.data;
            for (int i = 0; i < rows; i++)
                for (int64_t j = 0; j < p.k; j++) out[(r + i) * m.cols + c + j] = v[j * KT_TILE + i];
        }
    kt_arena_free(memory);
    return KT_OK;
}
