/* templates/dot_rows.h: what the decode kernels of quantized formats share. They multiply one row after the other:
 * memory is read in order, which is what reaches its bandwidth; four rows side by side lose a quarter of it. To pay
 * for rearranging the activations a call takes several rows.
 *
 * The text is compiled for several instruction sets; dot_vec.h of each brings the vectors. A row is cut into windows
 * of 256 columns. Where the columns are no multiple, the last window ends with the row and starts over columns that
 * the one before has seen; their activations are zero there. */
#ifndef KT_DOT_ROWS_H
#define KT_DOT_ROWS_H

#include "dot_tokens.h"
#include "../formats/iq_tables.h"

enum {
    WINDOW = 256,
    /* Columns of a row at once: their activations, rearranged, share the first-level cache with weights */
    CHUNK = 8192,
    WINDOWS = CHUNK / WINDOW + 1,
    VECTORS = WINDOW / VECTOR,
};

/* In what order activations meet the codes of a window. Pieces are 16 columns. */
enum layout {
    IN_ORDER, /* a code a byte */
    HALVES,   /* 16 bytes hold columns 0..15 (low nibbles) and 16..31 (high); a lane is such a block */
    EVENS,    /* low nibbles are even columns, high ones odd; a lane is 32 columns */
    EIGHTS,   /* 8 bytes hold columns 0..7 and 8..15 */
    PAIRS,    /* 32 bytes hold columns 0..31 and 32..63; first halves of such stand together, and second halves */
    QUARTERS, /* 32 bytes hold four values a byte, 32 columns apart */
};

/* Whether two vectors of codes meet the same scales and share a sum. */
INLINE int is_chain(const enum layout order) {
    return order == HALVES || order == EVENS || order == EIGHTS || order == PAIRS;
}

/* A window of one token's activations, ready for rows of one format. */
struct window {
    _Alignas(64) int8_t q[WINDOW];
    int32_t start[WINDOW / 4]; /* of each sum: minus zero point * activations */
    float d[16];               /* 8 scales, then 8 times minus scale * sum; groups of 16: each scale twice */
    float m[16];               /* groups of 16: minus scale * sum */
};

struct ready {
    int windows, moved; /* how many, and which one is moved back: the last, or none */
    int64_t last;       /* the first column of that, of the chunk */
    struct window window[WINDOWS * DOT_TOKENS]; /* of each window, one for each token */
};

/* ---- preparation ------------------------------------------------------------------------------------ */

/* The piece of a window that lane l of vector v meets, for orders that move whole pieces. */
INLINE int piece_of(const enum layout order, const int v, const int l) {
    const int i = v / 2, part = v % 2;
    switch (order) {
    case HALVES: return 2 * (LANES * i + l) + part;
    case PAIRS: return 4 * (LANES * (v / 4) + l) + v % 4;
    case QUARTERS: return LANES == 4 ? 2 * v + l / 2 * 8 + l % 2 : 2 * v + l; /* 64 bytes are both halves of a block */
    default: return LANES * v + l;
    }
}

/* The even, then the odd of 32 bytes. */
INLINE void part_pairs(const int8_t *q, int8_t *even, int8_t *odd) {
    const __m128i a = load128(q), b = load128(q + 16), low = _mm_set1_epi16(255);
    _mm_store_si128((__m128i *)even, _mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low)));
    _mm_store_si128((__m128i *)odd, _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
}

INLINE void arrange(const enum layout order, const int8_t *q, int8_t *out) {
    if (order == EVENS || order == EIGHTS)
        for (int i = 0; i < VECTORS / 2; i++, out += VECTOR)
            for (int l = 0; l < LANES; l++, out += 16, q += 32) {
                if (order == EVENS) {
                    part_pairs(q, out, out + VECTOR);
                } else {
                    memcpy(out, q, 8);
                    memcpy(out + 8, q + 16, 8);
                    memcpy(out + VECTOR, q + 8, 8);
                    memcpy(out + VECTOR + 8, q + 24, 8);
                }
            }
    else
        for (int v = 0; v < VECTORS; v++)
            for (int l = 0; l < LANES; l++, out += 16) memcpy(out, q + 16 * piece_of(order, v, l), 16);
}

/* start[] of a window from its arranged codes. */
INLINE void starts(const enum layout order, const int zero, const int8_t *q, int32_t *start) {
    const vint z = v_bytes(zero < 128 ? zero : 64), none = v_bytes(0);
    const int step = is_chain(order) ? 2 : 1;
    for (int v = 0; v < VECTORS; v += step, start += VECTOR / 4) {
        vint s = v_dot(none, z, v_load(q + v * VECTOR));
        if (zero == 128) s = v_dot(s, z, v_load(q + v * VECTOR));
        if (step == 2) s = v_dot(s, z, v_load(q + (v + 1) * VECTOR));
        if (step == 2 && zero == 128) s = v_dot(s, z, v_load(q + (v + 1) * VECTOR));
        v_store(start, v_minus(s));
    }
}

/* out[2i] = a[i], out[2i + 1] = b[i] */
INLINE void twice(__m256 a, __m256 b, float *out) {
    const __m256 x = _mm256_unpacklo_ps(a, b), y = _mm256_unpackhi_ps(a, b);
    _mm256_store_ps(out, _mm256_permute2f128_ps(x, y, 0x20));
    _mm256_store_ps(out + 8, _mm256_permute2f128_ps(x, y, 0x31));
}

/* A window from its activations in order. low, high: sums of 16 codes. */
INLINE void fill_window(struct window *x, const enum layout order, const int zero, const int group, const int8_t *q,
                        const float *d, const float *ds, const int32_t *low, const int32_t *high) {
    arrange(order, q, x->q);
    if (zero) starts(order, zero, x->q, x->start);
    const __m256 scale = _mm256_loadu_ps(d), minus = _mm256_set1_ps(-0.0f);
    if (group == 32) {
        _mm256_store_ps(x->d, scale);
        _mm256_store_ps(x->d + 8, _mm256_xor_ps(_mm256_loadu_ps(ds), minus));
        return;
    }
    twice(scale, scale, x->d);
    const __m256 first = _mm256_cvtepi32_ps(load256(low)), second = _mm256_cvtepi32_ps(load256(high));
    const __m256 less = _mm256_xor_ps(scale, minus);
    twice(_mm256_mul_ps(less, first), _mm256_mul_ps(less, second), x->m);
}

/* Columns from .. from + n of a matrix, n at most CHUNK, for token i of T; what lies before `from` is there to be
 * read. */
INLINE void make_ready(struct ready *x, const int T, const int i, const enum layout order, const int zero,
                       const int group, const struct kt_act *a, int64_t from, int64_t n) {
    struct window *to = x->window + i;
    x->moved = -1;
    x->last = 0;
    x->windows = (int)((n + WINDOW - 1) / WINDOW);
    for (int w = 0; w < n / WINDOW; w++, to += T) {
        const int64_t c = from + w * WINDOW, g = c / KT_ACT_GROUP;
        fill_window(to, order, zero, group, a->q + c, a->d + g, a->ds + g, a->low + g, a->high + g);
    }
    const int rest = (int)(n % WINDOW); /* a multiple of 32 */
    if (!rest) return;
    int8_t q[WINDOW] = {0};
    float d[8] = {0}, ds[8] = {0};
    int32_t low[8] = {0}, high[8] = {0};
    const int64_t c = from + n - rest, g = c / KT_ACT_GROUP;
    const int narrow = from + n < WINDOW, at = narrow ? 0 : WINDOW - rest; /* narrow rows are padded at the end */
    memcpy(q + at, a->q + c, (size_t)rest);
    for (int j = 0; j < rest / 32; j++) {
        d[at / 32 + j] = a->d[g + j];
        ds[at / 32 + j] = a->ds[g + j];
        low[at / 32 + j] = a->low[g + j];
        high[at / 32 + j] = a->high[g + j];
    }
    if (!narrow) {
        x->moved = x->windows - 1;
        x->last = n - WINDOW;
    }
    fill_window(to, order, zero, group, q, d, ds, low, high);
}

/* make_ready of each order and group size, called by that name. */
#define READY(order, group)                                                                                         \
    SHARED void make_ready_##order##_##group(struct ready *x, int T, int i, int zero, const struct kt_act *a,       \
                                             int64_t from, int64_t n) {                                             \
        make_ready(x, T, i, order, zero, group, a, from, n);                                                        \
    }
READY(IN_ORDER, 16)
READY(HALVES, 32)
READY(EVENS, 32)
READY(EVENS, 16)
READY(EIGHTS, 16)
READY(PAIRS, 32)
READY(QUARTERS, 32)
READY(QUARTERS, 16)

/* ---- rows ------------------------------------------------------------------------------------------- */

/* Bytes before a column, where 256 columns take `bytes`: a whole block, or eight of 32 columns. */
INLINE int64_t offset_of(int64_t column, const int bytes) {
    return bytes % 8 ? column / WINDOW * bytes : column / 32 * (bytes / 8);
}

/* Sums of a row and a token: two chains hide the latency of the multiply-add; mins have their own. */
struct sums {
    vfloat s[2], mins;
};

/* For each window: x, its activations of T tokens, and p, its `bytes` of a row at w. */
#define EACH_WINDOW(ready, T, w, bytes)                                                                \
    const uint8_t *p = w, *const moved = w + offset_of((ready)->last, bytes);                          \
    const struct window *x = (ready)->window;                                                          \
    const struct window *const end = x + (ready)->windows * (T), *const at = x + (ready)->moved * (T); \
    for (; x < end; x += (T), p = x == at ? moved : p + (bytes))

/* Lines of what is read next; see kt_act. */
INLINE void fetch(const uint8_t *p, size_t ahead, const int bytes) {
    for (int i = 0; i < bytes; i += 64) PREFETCH(p + i, ahead);
}

/* Where sum i of a window starts. */
INLINE vint start_of(const struct window *x, const int i, const int zero) {
    return zero ? v_load(x->start + i * (VECTOR / 4)) : v_bytes(0);
}

/* The scales, of 32 or 16 columns, that the sum of vector or chain i meets. */
INLINE vfloat scales_of(const enum layout order, __m256 s, const int i) {
    switch (order) {
    case IN_ORDER: return v_pick8(s, LANES / 2 * i, 8, 1);
    case PAIRS: return v_pick8_lanes(s, 2 * LANES * (i / 2) + i % 2, 2);
    case QUARTERS: return v_pick8(s, i, 8, 4);
    default: return v_pick8(s, LANES * i, 4, 2);
    }
}
INLINE vfloat scales16_of(const enum layout order, float16s s, const int i) {
    switch (order) {
    case IN_ORDER: return v_pick16(s, LANES * i, 4, 2);
    case QUARTERS: return v_pick16(s, 2 * i, 4, 8);
    default: return v_pick16(s, 2 * LANES * i, 2, 4);
    }
}

INLINE const uint8_t *pad(uint8_t *room, size_t size, const uint8_t *p, size_t bytes) {
    memset(room, 0, size);
    return memcpy(room, p, bytes);
}

/* Sums of at most 16 rows to their places; `add` to what earlier chunks left there. */
SHARED void put_sums(const vfloat *sum, int rows, float *out, int add) {
    float v[16];
    v_sums(sum, rows, add ? v : out);
    for (int r = 0; add && r < rows; r++) out[r] += v[r];
}

/* The dot kernel of a format from its row function. bytes: of 256 columns; a row narrower than that is padded. */
#define DOT(name, order, zero, group, bytes)                                                                         \
    INLINE void name##_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *a, \
                            size_t ahead, float *out, int64_t ldc) {                                                 \
        struct ready x;                                                                                              \
        vfloat sum[DOT_TOKENS][16];                                                                                  \
        for (int64_t c = 0; c < m->cols; c += CHUNK) {                                                               \
            const int64_t n = m->cols - c < CHUNK ? m->cols - c : CHUNK;                                             \
            for (int i = 0; i < T; i++) make_ready_##order##_##group(&x, T, i, zero, a + i, c, n);                   \
            for (int r = 0; r < rows; r++) {                                                                         \
                const uint8_t *p = m->data + (size_t)(first + r) * m->stride + offset_of(c, bytes);                  \
                uint8_t padded[(bytes) + 64];                                                                        \
                if (m->cols < WINDOW) p = pad(padded, sizeof padded, p, (size_t)offset_of(m->cols, bytes));          \
                struct sums t[DOT_TOKENS];                                                                           \
                for (int i = 0; i < T; i++) t[i] = (struct sums){{v_zero(), v_zero()}, v_zero()};                    \
                name##_row(p, ahead, &x, T, t);                                                                      \
                for (int i = 0; i < T; i++) sum[i][r % 16] = v_add(v_add(t[i].s[0], t[i].s[1]), t[i].mins);          \
                if (r % 16 == 15 || r == rows - 1)                                                                   \
                    for (int i = 0; i < T; i++) put_sums(sum[i], r % 16 + 1, out + i * ldc + r / 16 * 16, c > 0);    \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DOT_FOR_TOKENS(name)

#endif
