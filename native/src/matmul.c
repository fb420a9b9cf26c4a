#include "matmul.h"

#include <stdatomic.h>
#include <string.h>

#include "quants.h"

/* ---- checks and memory ------------------------------------------------------------------------------ */

int kt_matrix_check(const kt_weight *w, struct kt_matrix *out) {
    if (!w || !w->data) return KT_ERR_NULL;
    int format = kt_format_of(w->type);
    if (format < 0) return KT_ERR_TYPE;
    const struct kt_traits *t = &kt_traits_table[format];
    if (w->rows < 1 || w->cols < 1 || w->rows > KT_MAX_DIM || w->cols > KT_MAX_DIM) return KT_ERR_SHAPE;
    if (w->cols % t->block) return KT_ERR_BLOCK;
    size_t stride = kt_row_bytes(t, w->cols), bytes;
    if (__builtin_mul_overflow(stride, (size_t)w->rows, &bytes)) return KT_ERR_SHAPE;
    if (w->bytes != bytes) return KT_ERR_BYTES;
    *out = (struct kt_matrix){format, t, w->rows, w->cols, stride, w->data};
    return KT_OK;
}

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

/* ---- activations ------------------------------------------------------------------------------------ */

int kt_forms_needed(const struct kt_kernels *k, int format, int panel, int dtype) {
    enum kt_kind kind = kt_traits_table[format].kind;
    if (kind == KT_KIND_Q8) return KT_NEED_Q8;
    return kind == KT_KIND_BF16 && panel && dtype == KT_BF16 && k->gemm_bf16 ? KT_NEED_BF16 : 0;
}

void kt_acts_take(struct kt_arena *arena, int64_t tokens, int64_t cols, int need, struct kt_acts *a) {
    int64_t stride = kt_round_up(cols, KT_ACT_GROUP);
    *a = (struct kt_acts){.cols = cols, .stride = stride};
    a->f = kt_arena_take(arena, tokens * stride, 4);
    if (need & KT_NEED_BF16) a->h = kt_arena_take(arena, tokens * stride, 2);
    if (need & KT_NEED_Q8) {
        a->q = kt_arena_take(arena, tokens * stride, 1);
        a->d = kt_arena_take(arena, tokens * stride / KT_ACT_GROUP, 4);
        a->ds = kt_arena_take(arena, tokens * stride / KT_ACT_GROUP, 4);
        a->g = kt_arena_take(arena, tokens * stride / KT_ACT_GROUP, sizeof *a->g);
    }
}

void kt_acts_derive(const struct kt_kernels *k, struct kt_acts *a, int64_t t, int need) {
    const float *x = a->f + t * a->stride;
    int64_t group = t * a->stride / KT_ACT_GROUP;
    if (need & KT_NEED_Q8) /* such a matrix has cols % 32 == 0 */
        k->quantize(x, a->cols, a->q + t * a->stride, a->d + group, a->ds + group, a->g + group);
    if (need & KT_NEED_BF16) {
        uint16_t *h = a->h + t * a->stride;
        k->to_bf16(x, a->cols, h);
        memset(h + a->cols, 0, (size_t)(a->stride - a->cols) * 2);
    }
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

/* ---- decode or prefill ------------------------------------------------------------------------------ */

static _Atomic(int) forced_threshold;

void kt_set_panel_threshold(int tokens) { atomic_store(&forced_threshold, tokens); }

/* Where unpacking once beats unpacking for every token. Measured on Zen 5, 768 x 2048, one thread: time of
 * decode over time of prefill passes 1 at 4 tokens for quantized types (AVX2 3-6, AVX-512 4-5), and at 10 to 20 for
 * floats, whose decode unpacks in one or two instructions. */
int kt_use_panel(int format, int64_t tokens) {
    int threshold = atomic_load(&forced_threshold);
    if (threshold <= 0) threshold = kt_traits_table[format].kind == KT_KIND_Q8 ? 4 : 12;
    return tokens >= threshold;
}

/* Decode: a few rows at a time, each met by every token while its bytes are in the first-level cache. */
static void dot_block(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows,
                      const struct kt_acts *a, const int32_t *token, int tokens, float *c, int64_t ldc) {
    kt_dot_fn dot = k->dot[w->format];
    for (int r = 0; r < rows; r += KT_DOT_ROWS) {
        int n = (int)kt_min(rows - r, KT_DOT_ROWS);
        const uint8_t *bytes = w->data + (size_t)(first + r) * w->stride;
        for (int i = 0; i < tokens; i++) {
            int64_t at = token[i] * a->stride;
            struct kt_act one = {.f = a->f + at};
            if (a->q)
                one.q = a->q + at, one.d = a->d + at / KT_ACT_GROUP, one.ds = a->ds + at / KT_ACT_GROUP;
            dot(bytes, w->stride, n, w->cols, &one, c + i * ldc + r);
        }
    }
}

static int values_per_dword(enum kt_kind kind) { return kind == KT_KIND_Q8 ? 4 : kind == KT_KIND_BF16 ? 2 : 1; }

/* Unpack columns k0 .. k0+p->k of up to 64 rows into the panel `p` describes, a tile of 16 rows at a time:
 * whole rows first, so that memory is read in order, then the transpose. */
static void fill_panel(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows, int64_t k0,
                       const struct kt_scratch *s, const struct kt_panel *p) {
    const struct kt_traits *t = w->traits;
    const int values = values_per_dword(p->kind);
    const int64_t dwords = (p->k + values - 1) / values, groups = t->group ? p->k / t->group : 0;
    const int64_t min_groups = t->min_group ? p->k / t->min_group : 0;
    for (int tile = 0; tile < p->tiles; tile++) {
        const uint8_t *bytes = w->data + (size_t)(first + tile * KT_TILE) * w->stride + kt_row_bytes(t, k0);
        for (int r = 0; r < KT_TILE; r++, bytes += w->stride) {
            uint32_t *row = s->stage + r * KT_PANEL_BYTES / 4;
            float *scales = s->stage_scales + r * KT_MAX_GROUPS, *mins = s->stage_mins + r * KT_MAX_GROUPS;
            if (tile * KT_TILE + r >= rows) { /* past the end */
                memset(row, 0, (size_t)dwords * 4);
                memset(scales, 0, (size_t)groups * 4);
                memset(mins, 0, (size_t)min_groups * 4);
            } else if (p->kind == KT_KIND_BF16) {
                if (p->k & 1) row[p->k / 2] = 0;
                memcpy(row, bytes, (size_t)p->k * 2);
            } else {
                k->unpack[w->format](bytes, p->k, row, scales, mins);
            }
        }
        k->interleave(s->stage, KT_PANEL_BYTES / 4, dwords, s->data + tile * dwords * KT_TILE);
        if (!groups) continue;
        const int64_t at = tile * groups * KT_TILE;
        k->interleave((const uint32_t *)s->stage_scales, KT_MAX_GROUPS, groups, (uint32_t *)s->scales + at);
        if (min_groups)
            k->interleave((const uint32_t *)s->stage_mins, KT_MAX_GROUPS, min_groups,
                          (uint32_t *)s->mins + tile * min_groups * KT_TILE);
    }
}

static void panel_block(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows,
                        const struct kt_acts *a, const int32_t *token, int tokens, const struct kt_scratch *s,
                        float *c, int64_t ldc) {
    const struct kt_traits *t = w->traits;
    enum kt_kind kind = t->kind == KT_KIND_BF16 && !a->h ? KT_KIND_F32 : t->kind;
    kt_gemm_fn gemm = kind == KT_KIND_Q8 ? k->gemm_q8 : kind == KT_KIND_BF16 ? k->gemm_bf16 : k->gemm_f32;
    struct kt_kernels portable;
    if (t->min_group == 16) { /* no other GEMM has mins finer than scales */
        kt_fill_gemm_portable(&portable);
        gemm = portable.gemm_q8;
    }
    const int64_t columns = KT_PANEL_BYTES / 4 * values_per_dword(kind);
    for (int64_t k0 = 0; k0 < w->cols; k0 += columns) {
        struct kt_panel p = {.kind = kind, .tiles = (rows + KT_TILE - 1) / KT_TILE, .k = kt_min(w->cols - k0, columns),
                             .data = s->data, .group = t->group, .zero = t->zero, .min_group = t->min_group,
                             .scales = s->scales, .mins = t->min_group ? s->mins : NULL};
        fill_panel(k, w, first, rows, k0, s, &p);
        gemm(&p, a, token, tokens, k0, c, ldc, k0 > 0);
    }
}

void kt_matmul_block(const struct kt_kernels *k, const struct kt_matrix *w, int64_t first, int rows,
                     const struct kt_acts *a, const int32_t *token, int tokens, int panel,
                     const struct kt_scratch *s, float *c, int64_t ldc) {
    if (panel)
        panel_block(k, w, first, rows, a, token, tokens, s, c, ldc);
    else
        dot_block(k, w, first, rows, a, token, tokens, c, ldc);
}

int kt_job_rows(const kt_pool *pool, int64_t rows_total) {
    int rows = KT_BLOCK_ROWS;
    while (rows > KT_TILE && rows_total / rows < 6 * kt_pool_threads(pool)) rows /= 2;
    return rows;
}
