/* attend.c: softmax(q K^T) V over a paged cache, for decode and prefill alike. No intrinsics here.
 *
 *   for each sequence, head of keys, block of query rows, piece of the context:          a job
 *     for each chunk of its tokens (one page; up to four by panels):
 *       s = q . keys                       rows x tokens; kernels `scores`, or panels of keys and a GEMM
 *       p = exp(scale * s - max), sum      row by row, where the row sees the token; max is the row's largest so far
 *       acc = acc * exp(old - max) + p . values                          `values`, or panels of values and a GEMM
 *   for each row of what was cut into several pieces: out = the pieces, weighed by their maxima, in order
 *
 * REGULARITIES
 *  - A row is a query head of a query token; all rows of a head of keys (the heads of its group, times tokens) meet
 *    each key and value while it is in the cache: memory is read once for all of them.
 *  - Few rows are bound by memory and take the kernels, which convert in registers. Many rows repay panels: see
 *    matmul/panel.h. kt_attend_thresholds says from which number of rows on.
 *  - How a sequence is cut depends on its lengths and the shape of heads, not on the threads or other sequences: every
 *    sum has one owner and one order. A piece costs the merging of its rows, which takes as long as panels need for
 *    some pages of many rows: there pieces are larger.
 *  - Blocks of late rows see most and are handed out first.
 *  - A key that a row does not see never meets it: its weight is 0, and where 0 times a value would be NaN the chunk
 *    is computed row by row (careful_values).
 *
 * EXAMPLE (32 heads on 4, 4096 cached, one query): 8 rows a head, 64 pages in 32 pieces of 2: 128 jobs; 128 partial
 * results of 8 x 128 floats, merged by row. */
#include "attend.h"

#include <math.h>
#include <string.h>

#include "../formats/quants.h"
#include "../matmul/matmul.h"

enum {
    MAX_ROWS = 128,            /* of a job */
    CHUNK = 4 * KT_PAGE,       /* tokens at once by panels */
    FEW_ROWS = 32,             /* up to so many take half of it: they wait for memory, and fetch ahead a page a chunk */
    LDS = CHUNK + KT_TILE,     /* floats from a row of scores to the next */
    ROW_HEAD = 16,             /* floats before a partial result: its maximum and its sum, in a line of their own */
    JOBS = 128,                /* pieces, over all heads and blocks of a sequence, that feed 64 threads */
    LEAST_PAGES = 2,           /* of a piece */
    MOST_LEAST = 8,            /* where panels are, of many rows: they meet few pages while a piece is merged */
    FEW_JOBS = 16,             /* which are worth more than larger pieces */
};

/* How one sequence is cut. */
struct plan {
    int64_t rows;           /* group * queries */
    int64_t blocks;         /* of rows */
    int32_t pieces;         /* of each block's context */
    int64_t first_job;      /* its jobs: [block, latest first][head][piece] */
    int64_t first_partial;  /* floats; [head][row][piece][ROW_HEAD + columns] */
    int64_t first_merge;    /* rows, over all heads; nothing to merge where pieces is 1 */
};

/* Memory of one thread. */
struct space {
    struct kt_acts q, p; /* query rows; weights of a chunk, whose fp32 form is the scores */
    float *acc, *keep, *values_row;
    uint32_t *key_panel, *value_panel;
    float *stage; /* keys of a page in fp32, of types that panels do not know */
    struct kt_scratch scratch;
};

struct run {
    const struct kt_attend *a;
    int64_t group, columns; /* heads of a group; value_size rounded up to a tile */
    int64_t jobs, merges, partial_floats, per_merge;
    int32_t most_rows; /* of a block */
    int panels, bf16;  /* whether some job goes by panels; whether q and weights become bf16 there */
    struct plan *plan;
    float *partial;
    int32_t *token; /* 0, 1, 2, ... */
    struct space *space;
};

/* One job. */
struct work {
    const struct run *r;
    const struct kt_attend_sequence *s;
    struct space *m;
    int64_t head, first; /* of keys; first row */
    int rows, piece;
    int64_t begin, end;  /* tokens of the piece */
    const uint8_t *const *keys, *const *values;
    size_t key_at, value_at; /* of the head in a page */
    float *acc;              /* [rows][acc_stride]: maximum, sum, then columns from ROW_HEAD on */
    int64_t acc_stride;
};

/* ---- what is visible -------------------------------------------------------------------------------- */

struct range {
    int64_t begin, end;
};

/* The tokens that query i of a sequence may see; with a mask, those that it decides on. */
static struct range seen_by(const struct kt_attend *a, const struct kt_attend_sequence *s, int64_t i) {
    struct range seen = {s->start, s->length};
    if (s->mask) return seen;
    const int64_t at = s->length - s->queries + i;
    seen.end = at + 1;
    if (a->window && at - a->window + 1 > seen.begin) seen.begin = at - a->window + 1;
    return seen;
}

/* The tokens that some query of first .. last sees. Both ends of what a query sees grow with the query. */
static struct range seen_by_some(const struct kt_attend *a, const struct kt_attend_sequence *s, int64_t first,
                                 int64_t last) {
    const struct range from = seen_by(a, s, first), to = seen_by(a, s, last);
    return (struct range){from.begin, to.end > from.begin ? to.end : from.begin};
}

static struct range cut(struct range r, int64_t begin, int64_t end) {
    if (r.begin < begin) r.begin = begin;
    if (r.end > end) r.end = end;
    if (r.end < r.begin) r.end = r.begin;
    return r;
}

/* ---- the cut ---------------------------------------------------------------------------------------- */

static int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* Part `i` of n things in `parts` parts of equal size, or one less. */
static struct range part_of(int64_t n, int64_t parts, int64_t i) {
    return (struct range){n * i / parts, n * (i + 1) / parts};
}

/* Pages of a block of rows that see `seen`. */
static struct range pages_of(struct range seen) {
    if (seen.end <= seen.begin) return (struct range){0, 0};
    return (struct range){seen.begin / KT_PAGE, divide_up(seen.end, KT_PAGE)};
}

static int needs_panels(const struct run *r, int64_t rows) {
    return rows >= kt_panel_threshold(r->a->k->panels_from[r->bf16]);
}

static void cut_sequence(const struct run *r, const struct kt_attend_sequence *s, struct plan *p) {
    const struct kt_attend *a = r->a;
    *p = (struct plan){.rows = r->group * s->queries};
    p->blocks = divide_up(p->rows, MAX_ROWS);
    if (!p->rows) return;
    const struct range pages = pages_of(seen_by_some(a, s, 0, s->queries - 1));
    const int64_t others = kt_min(a->kv_heads * p->blocks, JOBS);
    const int64_t count = pages.end - pages.begin;
    const int64_t wanted = divide_up(count * others, JOBS);
    int64_t least = LEAST_PAGES;
    if (needs_panels(r, kt_min(p->rows, MAX_ROWS))) least = kt_min(kt_min(p->rows, MAX_ROWS) / 8, MOST_LEAST);
    least = kt_min(least, count * others / FEW_JOBS);
    if (least < LEAST_PAGES) least = LEAST_PAGES;
    p->pieces = (int32_t)divide_up(count, wanted > least ? wanted : least);
    if (p->pieces < 1) p->pieces = 1;
}

static int64_t acc_stride(const struct run *r) { return r->columns + ROW_HEAD; }

/* Everything that does not need memory, and with `plan` also each sequence's. */
static void measure(struct run *r, struct plan *plan) {
    const struct kt_attend *a = r->a;
    r->group = a->heads / a->kv_heads;
    r->columns = kt_round_up(a->value_size, KT_TILE);
    r->bf16 = a->type == KT_BF16 && a->k->gemm_bf16;
    for (int32_t i = 0; i < a->sequences; i++) {
        struct plan p;
        cut_sequence(r, &a->sequence[i], &p);
        p.first_job = r->jobs;
        p.first_partial = r->partial_floats;
        p.first_merge = r->merges;
        r->jobs = kt_min(r->jobs + p.blocks * a->kv_heads * p.pieces, (int64_t)INT32_MAX + 1); /* which is refused */
        if (p.pieces > 1) {
            r->merges += p.rows * a->kv_heads;
            r->partial_floats += p.rows * a->kv_heads * p.pieces * acc_stride(r);
        }
        const int64_t rows = kt_min(p.rows, MAX_ROWS);
        if (rows > r->most_rows) r->most_rows = (int32_t)rows;
        if (plan) plan[i] = p;
    }
    r->panels = needs_panels(r, r->most_rows);
    r->per_merge = 1 + 4096 / r->columns;
}

static void take_space(const struct run *r, struct kt_arena *arena, struct space *m) {
    const struct kt_attend *a = r->a;
    const int64_t rows = r->most_rows;
    *m = (struct space){0};
    kt_acts_take(arena, rows, a->size, r->bf16 && r->panels ? KT_NEED_BF16 : 0, &m->q);
    m->p = (struct kt_acts){.cols = CHUNK, .stride = LDS};
    m->p.f = kt_arena_take(arena, rows * LDS, 4);
    m->acc = kt_arena_take(arena, rows * acc_stride(r), 4);
    m->keep = kt_arena_take(arena, rows, 4);
    m->values_row = kt_arena_take(arena, r->columns, 4);
    if (!r->panels) return;
    if (r->bf16) m->p.h = kt_arena_take(arena, rows * LDS, 2);
    m->key_panel = kt_arena_take(arena, KT_BLOCK_ROWS * KT_PANEL_BYTES, 1);
    m->value_panel = kt_arena_take(arena, CHUNK * r->columns, r->bf16 ? 2 : 4);
    if (a->type == KT_CACHE_Q8_0) m->stage = kt_arena_take(arena, KT_PAGE * a->size, 4);
    m->scratch.stage = kt_arena_take(arena, KT_TILE * KT_PANEL_BYTES, 1);
    m->scratch.stage_scales = kt_arena_take(arena, KT_TILE * KT_MAX_GROUPS, 4);
    m->scratch.stage_mins = kt_arena_take(arena, KT_TILE * KT_MAX_GROUPS, 4);
    m->scratch.scales = kt_arena_take(arena, KT_BLOCK_ROWS, 4); /* panels of floats have none */
    m->scratch.mins = m->scratch.scales;
}

static void layout(struct run *r, struct kt_arena *arena, int threads) {
    r->plan = kt_arena_take(arena, r->a->sequences, sizeof *r->plan);
    r->space = kt_arena_take(arena, threads, sizeof *r->space);
    r->token = kt_arena_take(arena, MAX_ROWS, sizeof *r->token);
    r->partial = kt_arena_take(arena, r->partial_floats, sizeof *r->partial);
    for (int i = 0; i < threads; i++) {
        struct space m;
        take_space(r, arena, &m);
        if (arena->base) r->space[i] = m;
    }
}

/* ---- one chunk of tokens, all rows ------------------------------------------------------------------ */

/* The token of the sequence's queries that a row belongs to. */
static int64_t query_of(const struct work *w, int row) { return (w->first + row) / w->r->group; }

static const uint8_t *mask_of(const struct work *w, int row) {
    return w->s->mask ? w->s->mask + query_of(w, row) * w->s->mask_row : NULL;
}

static int any_seen(const uint8_t *mask, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
        if (mask[t]) return 1;
    return 0;
}

/* Whether some row's mask shows a token of the chunk. */
static int chunk_is_seen(const struct work *w, int64_t begin, int64_t end) {
    if (!w->s->mask) return 1;
    for (int64_t q = query_of(w, 0); q <= query_of(w, w->rows - 1); q++)
        if (any_seen(w->s->mask + q * w->s->mask_row, begin, end)) return 1;
    return 0;
}

/* The tokens that all rows see: of none with a mask, which nobody looks through for that. */
static struct range seen_by_all(const struct work *w) {
    if (w->s->mask) return (struct range){0};
    const struct range first = seen_by(w->r->a, w->s, query_of(w, 0));
    const struct range last = seen_by(w->r->a, w->s, query_of(w, w->rows - 1));
    return cut((struct range){last.begin, first.end}, w->begin, w->end);
}

/* Scores of tokens base .. base + n become weights; the rows' maxima, sums and keep (what is left of acc) follow. */
static void weigh(const struct work *w, int64_t base, int n) {
    const struct kt_attend *a = w->r->a;
    for (int row = 0; row < w->rows; row++) {
        float *p = w->m->p.f + row * w->m->p.stride, *max = w->acc + row * w->acc_stride, *sum = max + 1;
        const float old = *max;
        const uint8_t *mask = mask_of(w, row);
        struct range seen = cut(seen_by(a, w->s, query_of(w, row)), kt_min(w->begin, base + n), w->end);
        seen = cut(seen, base, base + n);
        const int from = (int)(seen.begin - base), to = (int)(seen.end - base);
        for (int t = 0; t < from; t++) p[t] = 0.0f;
        for (int t = to; t < n; t++) p[t] = 0.0f;
        w->m->keep[row] = 1.0f;
        if (from == to) continue;
        if (mask) a->k->rescale(a->scale, p + from, to - from); /* no scale turns -infinity into something else then */
        for (int t = from; mask && t < to; t++)
            if (!mask[base + t]) p[t] = -INFINITY;
        const float added = a->k->softmax(p + from, to - from, mask ? 1.0f : a->scale, max);
        if (*max != old) w->m->keep[row] = expf(old - *max);
        *sum = *sum * w->m->keep[row] + added;
    }
}

static int bf16_nonfinite(const uint8_t *row, int64_t n) {
    uint16_t bad = 0;
    for (int64_t c = 0; c < n; c++) bad |= (uint16_t)((kt_load16(row + 2 * c) & 0x7f80u) + 0x0080u);
    return bad >> 15;
}

static int floats_nonfinite(const float *v, int64_t n) {
    uint32_t bad = 0;
    for (int64_t c = 0; c < n; c++) {
        uint32_t bits;
        memcpy(&bits, v + c, 4);
        bad |= (bits & 0x7f800000u) + 0x00800000u;
    }
    return (int)(bad >> 31);
}

/* Whether a value of these tokens is an infinity or a NaN. */
static int has_nonfinite(const struct work *w, int64_t begin, int64_t end) {
    const struct kt_attend *a = w->r->a;
    for (int64_t t = begin; t < end; t++) {
        const uint8_t *row = w->values[t / KT_PAGE] + w->value_at + (size_t)(t % KT_PAGE) * w->s->kv.value_row;
        if (a->type != KT_BF16) kt_cache_load(a->k, row, a->value_size, a->type, w->m->values_row);
        if (a->type == KT_BF16 ? bf16_nonfinite(row, a->value_size) : floats_nonfinite(w->m->values_row, a->value_size))
            return 1;
    }
    return 0;
}

/* Whether some row might meet such a value that it does not see. */
static int hides_nonfinite(const struct work *w, int64_t begin, int64_t end) {
    const struct range all = cut(seen_by_all(w), begin, end);
    return has_nonfinite(w, begin, kt_min(all.begin, end)) || has_nonfinite(w, all.end, end);
}

/* acc of each row from the tokens that it sees alone: 0 times an infinity is no zero. */
static void careful_values(const struct work *w, int64_t base, int n) {
    const struct kt_attend *a = w->r->a;
    for (int row = 0; row < w->rows; row++)
        a->k->rescale(w->m->keep[row], w->acc + row * w->acc_stride + ROW_HEAD, a->value_size);
    for (int t = 0; t < n; t++) {
        const int64_t at = base + t;
        kt_cache_load(a->k, w->values[at / KT_PAGE] + w->value_at + (size_t)(at % KT_PAGE) * w->s->kv.value_row,
                      a->value_size, a->type, w->m->values_row);
        for (int row = 0; row < w->rows; row++) {
            const struct range seen = seen_by(a, w->s, query_of(w, row));
            const uint8_t *mask = mask_of(w, row);
            if (at < w->begin || at < seen.begin || at >= seen.end || (mask && !mask[at])) continue;
            a->k->scale_add(w->m->p.f[row * w->m->p.stride + t], w->m->values_row,
                            w->acc + row * w->acc_stride + ROW_HEAD, a->value_size, 1);
        }
    }
}

/* What to fetch while keys from token `at` on are met: their values, unless they are the same memory. And while values
 * are: the next keys. As far as one page goes. */
static struct kt_ahead values_ahead(const struct work *w, int64_t at) {
    const struct kt_attend *a = w->r->a;
    const struct kt_kv *kv = &w->s->kv;
    const uint8_t *values = w->values[at / KT_PAGE] + w->value_at;
    if (values == w->keys[at / KT_PAGE] + w->key_at) return (struct kt_ahead){0};
    const int64_t first = at % KT_PAGE, end = kt_min(w->end - at + first, KT_PAGE);
    return (struct kt_ahead){.row = values + (size_t)first * kv->value_row, .stride = kv->value_row,
                             .bytes = kt_cache_row(a->type, a->value_size), .rows = (int)(end - first)};
}

static struct kt_ahead keys_ahead(const struct work *w, int64_t at) {
    const struct kt_attend *a = w->r->a;
    if (at >= w->end) return (struct kt_ahead){0};
    return (struct kt_ahead){.row = w->keys[at / KT_PAGE] + w->key_at, .stride = w->s->kv.key_row,
                             .bytes = kt_cache_row(a->type, a->size), .rows = (int)kt_min(w->end - at, KT_PAGE)};
}

/* A chunk within one page, by kernels that read rows as they lie. Values are fetched while keys are met, and the next
 * page's keys while values are. */
static void rows_chunk(const struct work *w, int64_t begin, int64_t end) {
    const struct kt_attend *a = w->r->a;
    const struct kt_kv *kv = &w->s->kv;
    const int n = (int)(end - begin);
    const int64_t page = begin / KT_PAGE, at = begin % KT_PAGE;
    const uint8_t *keys = w->keys[page] + w->key_at + (size_t)at * kv->key_row;
    const uint8_t *values = w->values[page] + w->value_at + (size_t)at * kv->value_row;
    struct kt_ahead ahead = values_ahead(w, begin);
    a->k->scores[a->type](&w->m->q, w->rows, keys, kv->key_row, n, w->m->p.f, w->m->p.stride, &ahead);
    weigh(w, begin, n);
    ahead = keys_ahead(w, end);
    if (hides_nonfinite(w, begin, end)) careful_values(w, begin, n);
    else
        a->k->values[a->type](w->m->p.f, w->m->p.stride, w->rows, w->m->keep, values, kv->value_row, n, a->value_size,
                              w->acc + ROW_HEAD, w->acc_stride, &ahead);
}

/* ---- the same by panels ----------------------------------------------------------------------------- */

static enum kt_kind panel_kind(const struct run *r) { return r->bf16 ? KT_KIND_BF16 : KT_KIND_F32; }

/* `n` keys of a page as a matrix of weights. q8_0 by way of fp32: as weights they would ask for int8 queries. */
static struct kt_matrix keys_of(const struct work *w, int64_t page, int n) {
    static const int format[KT_CACHES] = {KT_FMT_F32, KT_FMT_F16, KT_FMT_BF16, KT_FMT_F32};
    const struct kt_attend *a = w->r->a;
    const struct kt_traits *t = &kt_traits_table[format[a->type]];
    struct kt_matrix m = {.format = format[a->type], .traits = t, .kind = t->kind, .rows = n, .cols = a->size,
                          .data = w->keys[page] + w->key_at, .stride = w->s->kv.key_row, .scale = 1.0f};
    if (a->type != KT_CACHE_Q8_0) return m;
    for (int i = 0; i < n; i++)
        a->k->load_q8_0(m.data + (size_t)i * m.stride, a->size, w->m->stage + i * a->size);
    m.data = (const uint8_t *)w->m->stage;
    m.stride = (size_t)a->size * 4;
    return m;
}

/* s = q . keys of tokens base .. base + n, base at the beginning of a page, n up to what is in a panel: so many columns
 * at a time as a panel's rows hold, its tiles being those of one page and then the next's. */
static void score_panel(const struct work *w, int64_t base, int n, float *s) {
    const struct kt_attend *a = w->r->a;
    const enum kt_kind kind = panel_kind(w->r);
    const int64_t most = KT_PANEL_BYTES / 4 * kt_values_per_dword(kind);
    for (int64_t k0 = 0; k0 < a->size; k0 += most) {
        struct kt_ahead ahead = k0 ? (struct kt_ahead){0} : values_ahead(w, base);
        struct kt_panel all = {.kind = kind, .tiles = (n + KT_TILE - 1) / KT_TILE, .k = kt_min(a->size - k0, most)};
        const int64_t tile = divide_up(all.k, kt_values_per_dword(kind)) * KT_TILE;
        for (int at = 0; at < n; at += KT_PAGE) {
            const int rows = (int)kt_min(n - at, KT_PAGE);
            const struct kt_matrix keys = keys_of(w, (base + at) / KT_PAGE, rows);
            struct kt_scratch scratch = w->m->scratch;
            scratch.data = w->m->key_panel + at / KT_TILE * tile;
            const struct kt_block block = {.k = a->k, .w = &keys, .rows = rows, .s = &scratch};
            struct kt_panel page = {.kind = kind, .tiles = (rows + KT_TILE - 1) / KT_TILE, .k = all.k};
            kt_panel_fill(&block, k0, &page);
        }
        all.data = w->m->key_panel;
        all.ahead = &ahead;
        const kt_gemm_fn gemm = kind == KT_KIND_BF16 ? a->k->gemm_bf16 : a->k->gemm_f32;
        gemm(&all, &w->m->q, w->r->token, w->rows, k0, s, w->m->p.stride, k0 > 0);
    }
}

static void score_panels(const struct work *w, int64_t base, int n) {
    for (int at = 0; at < n; at += KT_BLOCK_ROWS)
        score_panel(w, base + at, (int)kt_min(n - at, KT_BLOCK_ROWS), w->m->p.f + at);
}

/* The values of a chunk as a panel whose rows are columns of values, and whose columns are tokens. */
static void fill_values(const struct work *w, int64_t base, int n) {
    const struct kt_attend *a = w->r->a;
    const enum kt_kind kind = panel_kind(w->r);
    const int64_t tile = divide_up(n, kt_values_per_dword(kind)) * KT_TILE;
    for (int at = 0; at < n; at += KT_PAGE) {
        const uint8_t *values = w->values[(base + at) / KT_PAGE] + w->value_at;
        const int tokens = (int)kt_min(n - at, KT_PAGE);
        uint32_t *data = w->m->value_panel + at / kt_values_per_dword(kind) * KT_TILE;
        if (kind == KT_KIND_BF16) {
            a->k->pair_rows(values, w->s->kv.value_row, tokens, a->value_size, data, tile);
            continue;
        }
        for (int t = 0; t < tokens; t++) {
            float *v = w->m->values_row;
            kt_cache_load(a->k, values + (size_t)t * w->s->kv.value_row, a->value_size, a->type, v);
            for (int64_t c = 0; c < a->value_size; c += KT_TILE)
                memcpy(data + c / KT_TILE * tile + t * KT_TILE, v + c, KT_TILE * 4);
        }
    }
}

/* acc = keep * acc + p . values; `fresh`: nothing is in acc yet */
static void value_panels(const struct work *w, int64_t base, int n, int fresh) {
    const struct kt_attend *a = w->r->a;
    const enum kt_kind kind = panel_kind(w->r);
    const kt_gemm_fn gemm = kind == KT_KIND_BF16 ? a->k->gemm_bf16 : a->k->gemm_f32;
    const int64_t tile = divide_up(n, kt_values_per_dword(kind)) * KT_TILE;
    struct kt_acts *p = &w->m->p;
    for (int row = 0; row < w->rows; row++) {
        float *weights = p->f + row * p->stride;
        if (!fresh && w->m->keep[row] != 1.0f)
            a->k->rescale(w->m->keep[row], w->acc + row * w->acc_stride + ROW_HEAD, a->value_size);
        if (kind != KT_KIND_BF16) continue;
        for (int t = n; t < kt_round_up(n, 32); t++) weights[t] = 0.0f; /* a tile multiplication takes 32 */
        a->k->to_bf16(weights, kt_round_up(n, 32), p->h + row * p->stride);
    }
    fill_values(w, base, n);
    for (int64_t c = 0; c < w->r->columns; c += KT_BLOCK_ROWS) {
        struct kt_ahead ahead = c ? (struct kt_ahead){0} : keys_ahead(w, base + n);
        const struct kt_panel values = {.kind = kind, .k = n, .ahead = &ahead,
                                        .tiles = (int)(kt_min(w->r->columns - c, KT_BLOCK_ROWS) / KT_TILE),
                                        .data = w->m->value_panel + c / KT_TILE * tile};
        gemm(&values, p, w->r->token, w->rows, 0, w->acc + ROW_HEAD + c, w->acc_stride, !fresh);
    }
}

static void clear_columns(const struct work *w) {
    for (int row = 0; row < w->rows; row++)
        memset(w->acc + row * w->acc_stride + ROW_HEAD, 0, (size_t)w->r->columns * 4);
}

static void panels_chunk(const struct work *w, int64_t base, int n, int fresh) {
    score_panels(w, base, n);
    weigh(w, base, n);
    if (hides_nonfinite(w, base, base + n)) {
        if (fresh) clear_columns(w);
        careful_values(w, base, n);
    } else value_panels(w, base, n, fresh);
}

/* ---- jobs ------------------------------------------------------------------------------------------- */

/* Query rows, in bf16 where panels are, and what the rows have seen: nothing. */
static void load_rows(const struct work *w, int bf16) {
    const struct kt_attend *a = w->r->a;
    struct kt_acts *q = &w->m->q;
    for (int row = 0; row < w->rows; row++) {
        const int64_t token = w->s->query + query_of(w, row);
        const int64_t head = w->head * w->r->group + (w->first + row) % w->r->group;
        const float *from = a->q + token * a->q_stride + head * a->size;
        const size_t rest = (size_t)(q->stride - a->size);
        if (bf16) {
            a->k->to_bf16(from, a->size, q->h + row * q->stride);
            memset(q->h + row * q->stride + a->size, 0, rest * 2);
        } else {
            memcpy(q->f + row * q->stride, from, (size_t)a->size * 4);
            memset(q->f + row * q->stride + a->size, 0, rest * 4);
        }
        float *acc = w->acc + row * w->acc_stride;
        acc[0] = -INFINITY;
        acc[1] = 0.0f;
    }
}

/* out = what `pieces` partial results of a row amount to together, in their order. */
static void finish_row(const struct run *r, const float *partial, int32_t pieces, int64_t head, float *out) {
    const struct kt_attend *a = r->a;
    const int64_t stride = acc_stride(r);
    float max = a->sinks ? a->sinks[head] : -INFINITY, sum = 0.0f;
    for (int32_t i = 0; i < pieces; i++)
        if (partial[i * stride] > max) max = partial[i * stride];
    if (a->sinks) sum = expf(a->sinks[head] - max);
    float weight[JOBS];
    for (int32_t i = 0; i < pieces; i++) {
        const float *one = partial + i * stride;
        if (one[1] == 0.0f) continue; /* saw nothing, and nothing is in its columns */
        weight[i] = expf(one[0] - max);
        sum += one[1] * weight[i];
    }
    int add = 0;
    for (int32_t i = 0; i < pieces; i++) {
        const float *one = partial + i * stride;
        if (one[1] == 0.0f) continue;
        a->k->scale_add(weight[i] / sum, one + ROW_HEAD, out, a->value_size, add);
        add = 1;
    }
    if (!add) memset(out, 0, (size_t)a->value_size * 4);
}

static float *out_of(const struct run *r, const struct kt_attend_sequence *s, int64_t head_of_keys, int64_t row) {
    const int64_t head = head_of_keys * r->group + row % r->group;
    return r->a->out + (s->query + row / r->group) * r->a->out_stride + head * r->a->value_size;
}

static int32_t sequence_of(const struct run *r, int64_t job) {
    int32_t low = 0, high = r->a->sequences;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        if (r->plan[middle].first_job <= job) low = middle;
        else high = middle;
    }
    return low;
}

/* Which piece of which rows a job is. */
static struct work work_of(const struct run *r, int64_t job, int thread) {
    const struct kt_attend *a = r->a;
    const int32_t sequence = sequence_of(r, job);
    const struct plan *p = &r->plan[sequence];
    struct work w = {.r = r, .s = &a->sequence[sequence], .m = &r->space[thread]};
    job -= p->first_job;
    w.piece = (int)(job % p->pieces);
    w.head = job / p->pieces % a->kv_heads;
    const struct range rows = part_of(p->rows, p->blocks, p->blocks - 1 - job / p->pieces / a->kv_heads);
    w.first = rows.begin;
    w.rows = (int)(rows.end - rows.begin);
    const struct range seen = seen_by_some(a, w.s, query_of(&w, 0), query_of(&w, w.rows - 1));
    const struct range pages = pages_of(seen), mine = part_of(pages.end - pages.begin, p->pieces, w.piece);
    const struct range tokens = cut(seen, (pages.begin + mine.begin) * KT_PAGE, (pages.begin + mine.end) * KT_PAGE);
    w.begin = tokens.begin;
    w.end = tokens.end;
    w.keys = w.s->kv.keys;
    w.values = w.s->kv.values;
    w.key_at = (size_t)w.head * w.s->kv.key_head;
    w.value_at = (size_t)w.head * w.s->kv.value_head;
    w.acc = w.m->acc;
    w.acc_stride = acc_stride(r);
    if (p->pieces > 1) {
        w.acc = r->partial + p->first_partial + ((w.head * p->rows + w.first) * p->pieces + w.piece) * acc_stride(r);
        w.acc_stride *= p->pieces;
    }
    return w;
}

static void attend_job(void *ctx, int32_t job, int thread) {
    const struct run *r = ctx;
    const struct work w = work_of(r, job, thread);
    const int panels = needs_panels(r, w.rows);
    int fresh = 1; /* panels write the first time, and add from then on */
    load_rows(&w, panels && r->bf16);
    if (!panels) clear_columns(&w);
    const int64_t step = !panels ? KT_PAGE : w.rows > FEW_ROWS ? CHUNK : CHUNK / 2, first = w.begin / KT_PAGE * KT_PAGE;
    for (int64_t t = first; t < w.end; t += step) {
        const int64_t begin = t > w.begin ? t : w.begin, end = kt_min(w.end, t + step);
        if (!chunk_is_seen(&w, begin, end)) continue;
        if (panels) panels_chunk(&w, t, (int)(end - t), fresh);
        else rows_chunk(&w, begin, end);
        fresh = 0;
    }
    if (w.acc != w.m->acc) return; /* a partial result */
    for (int row = 0; row < w.rows; row++)
        finish_row(r, w.acc + row * w.acc_stride, 1, w.head * r->group + (w.first + row) % r->group,
                   out_of(r, w.s, w.head, w.first + row));
}

/* Rows of the sequences that were cut into pieces, numbered over all of them. */
static void merge_job(void *ctx, int32_t job, int thread) {
    (void)thread;
    const struct run *r = ctx;
    int64_t at = (int64_t)job * r->per_merge;
    const int64_t end = kt_min(at + r->per_merge, r->merges);
    for (int32_t i = 0; i < r->a->sequences && at < end; i++) {
        const struct plan *p = &r->plan[i];
        const int64_t count = p->pieces > 1 ? p->rows * r->a->kv_heads : 0;
        for (; at < end && at < p->first_merge + count; at++) {
            const int64_t one = at - p->first_merge, head = one / p->rows, row = one % p->rows;
            finish_row(r, r->partial + p->first_partial + one * p->pieces * acc_stride(r), p->pieces,
                       head * r->group + row % r->group, out_of(r, &r->a->sequence[i], head, row));
        }
    }
}

size_t kt_attend_scratch(const struct kt_attend *a, const kt_pool *pool) {
    struct run r = {.a = a};
    struct kt_arena arena = {0};
    measure(&r, NULL);
    layout(&r, &arena, kt_pool_threads(pool));
    return arena.overflow || r.jobs > INT32_MAX ? SIZE_MAX : arena.used;
}

void kt_attend_run(const struct kt_attend *a, kt_pool *pool, void *scratch) {
    struct run r = {.a = a};
    struct kt_arena arena = {.base = scratch};
    measure(&r, NULL);
    layout(&r, &arena, kt_pool_threads(pool));
    struct run again = {.a = a};
    measure(&again, r.plan);
    for (int32_t i = 0; i < MAX_ROWS; i++) r.token[i] = i;
    kt_pool_run(pool, attend_job, &r, (int32_t)r.jobs);
    if (r.merges) kt_pool_run(pool, merge_job, &r, (int32_t)divide_up(r.merges, r.per_merge));
}
