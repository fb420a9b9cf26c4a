/* kernels.h: the contract that each instruction set meets, as one struct of function pointers.
 *
 * dispatch.c fills it with portable C first and lets each instruction set overwrite what it does better.
 * Nothing outside src/<isa>/ contains an intrinsic; nothing inside knows experts, threads or shapes of models.
 *
 * Decode:  dot[format] runs over packed bytes, unpacking in registers.
 * Prefill: unpack[format] turns pieces of a row into the one panel layout, and a GEMM that knows no format
 *          multiplies the panel with many tokens. A new format costs a dot and an unpack, not a GEMM. */
#ifndef KT_KERNELS_H
#define KT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../include/kt_native.h"
#include "formats/traits.h"
#include "isas.h"

#define KT_TILE 16          /* weight rows interleaved in a panel tile */
#define KT_BLOCK_ROWS 128   /* weight rows of a panel and of a job. Prefill is 2 to 6 % faster than with 64 (Zen 4) */
#define KT_SHARD_ROWS 64    /* NUMA nodes' shares of a matrix are multiples of it, so that two nodes halve 1408 rows */
#define KT_DOT_ROWS 128     /* weight rows of a decode kernel's call: what rearranging activations is spread over */
#define KT_DOT_TOKENS 4     /* tokens of it, at most */
#define KT_SCALES_AHEAD 16  /* rows of separate scales that are fetched before they are needed */
#define KT_ACT_GROUP 32     /* activations that share an int8 scale */
#define KT_PANEL_BYTES 2048 /* bytes of a panel row: 2048 codes, 1024 bf16 or 512 floats. 128 rows take 256 KiB of L2 */
#define KT_CACHE_BYTES 512  /* of them, what a GEMM takes at once: two tiles are 16 KiB and stay in L1 for all tokens */
#define KT_AHEAD_COLS 256   /* see struct kt_tile */
#define KT_MAX_GROUPS (KT_PANEL_BYTES / 16)
#define KT_MAX_ORDERED (KT_BLOCK_ROWS * KT_MAX_GROUPS / KT_TILE) /* groups of a matrix whose columns name theirs */

/* Activations of T tokens in every form that some weight needs; unused forms are NULL. A row of any form starts
 * `stride` values after the one before: an odd number of 64-byte lines, so that rows of many tokens spread over all
 * sets of the first-level cache. */
struct kt_acts {
    int64_t cols, stride;
    float *f;            /* [T, stride] */
    uint16_t *h;         /* [T, stride] bf16; zero from cols on */
    int8_t *q;           /* [T, stride] */
    float *d;            /* [T, stride/32] scale of each group */
    float *ds;           /* [T, stride/32] scale times sum of the group's codes: meets a weight group's min */
    int32_t *low, *high; /* [T, stride/32] sums of the first and of the last 16 codes: meet a format's zero point */
};

/* One token of kt_acts, for the decode kernels. */
struct kt_act {
    const float *f;
    const uint16_t *h; /* NULL where none are needed */
    const int8_t *q;
    const float *d, *ds;
    const int32_t *low, *high;
};

/* A weight matrix that passed its checks. */
struct kt_matrix {
    int format;
    const struct kt_traits *traits;
    enum kt_kind kind;
    int64_t rows, cols;
    const uint8_t *data;
    size_t stride; /* bytes from a row to the next; of a type by columns: from a stored row to the next */

    /* Types with separate scales (traits->scales_separate). One scale for scale_rows x scale_cols weights. */
    const uint8_t *scales;
    size_t scale_stride; /* bytes from a stored row of scales to the next */
    int scale_type;
    int64_t scale_rows, scale_cols;
    const uint8_t *zeros; /* packed zero points, as many as scales; NULL: the format's own */
    size_t zero_stride;
    int zero_bias;        /* added to a packed zero point */
    const int32_t *order; /* group of each column, where columns of a group are scattered; else NULL */
    float scale;          /* multiplies all */
    int group, min_group; /* columns of a panel that share a scale, a min (0: there are none) */
    int zero;             /* Q8 kind: z */
};

/* Where the next weights lie: lines of memory that a GEMM fetches while it computes. Empty when rows is 0. */
struct kt_ahead {
    const uint8_t *row;
    size_t stride, bytes; /* of a row */
    int rows;
    size_t at;            /* in this row */
    int step;             /* lines to fetch each time */
};

/* Lines that are left. */
static inline int64_t kt_ahead_lines(const struct kt_ahead *a) {
    return a->rows ? (int64_t)((a->bytes + 63) / 64) * a->rows - (int64_t)(a->at / 64) : 0;
}

/* Spread what is left over `steps` steps. */
static inline void kt_ahead_spread(struct kt_ahead *a, int64_t steps) {
    a->step = (int)((kt_ahead_lines(a) + steps - 1) / steps);
}

static inline void kt_ahead_step(struct kt_ahead *a) {
    for (int i = 0; i < a->step && a->rows; i++) {
        __builtin_prefetch(a->row + a->at, 0, 2);
        a->at += 64;
        if (a->at < a->bytes) continue;
        a->at = 0;
        a->row += a->stride;
        a->rows--;
    }
}

/* One piece of unpacked weights: `tiles` tiles of 16 rows, k columns. Rows past the end are zero.
 * Data of a tile: [k / per_dword][16] dwords. A dword holds consecutive columns of one row:
 * four unsigned codes (Q8), two bf16 (BF16, last one zero padded) or one float (F32). */
struct kt_panel {
    enum kt_kind kind;
    int tiles;
    int64_t k;
    const uint32_t *data; /* 64-byte aligned; a tile has k rounded up to its dwords, times 16 */
    int group, min_group; /* columns that share a scale (0: no scales), a min (0: no mins) */
    int zero;             /* Q8 kind: z */
    int max_abs;          /* Q8 kind: the largest |u - z| */
    const float *scales;  /* per tile [k / group][16]: s */
    const float *mins;    /* per tile [k / min_group][16]: m, or NULL */
    struct kt_ahead *ahead;
};

/* Where one tile of a panel goes. */
struct kt_tile {
    uint32_t *data;
    float *scales, *mins;
    struct kt_ahead *ahead; /* a step for each KT_AHEAD_COLS columns of 8 rows; or NULL */
};

/* out[i * ldc + r] = dot(row first + r of w, a[i]) for r < rows <= KT_DOT_ROWS, i < tokens <= KT_DOT_TOKENS. `ahead`:
 * bytes from a weight to what is worth fetching meanwhile, modulo the size of memory; of a type by columns, from this
 * call's part of a stored row to the next call's. */
typedef void (*kt_dot_fn)(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,
                          size_t ahead, float *out, int64_t ldc);

/* Unpack n columns of one row from its block at `w` (n a multiple of the block, or anything for floats).
 * Q8 kind: data = n unsigned codes, scales [n / group], mins [n / min_group] (if the format has them).
 * F32 and BF16 kinds: data = n floats. */
typedef void (*kt_unpack_fn)(const uint8_t *w, int64_t n, void *data, float *scales, float *mins);

/* Unpack columns k0 .. k0 + n of rows first .. first + 15, all of them there, straight into a tile. Of types with
 * separate scales only the codes. */
typedef void (*kt_unpack_tile_fn)(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n,
                                  const struct kt_tile *out);

/* Encode whole blocks: their weights x, finite and within the format's range, one after the other; `importance` of each
 * weight (at most 1, above 0), or NULL for alike. Same bits on every ISA. */
typedef void (*kt_encode_fn)(const float *x, const float *importance, int64_t blocks, uint8_t *out);

/* c[i, r] (+)= panel row r . activations of token[i], columns from k0 on; ldc floats between tokens.
 * c has room for tiles*16 rows. `add` 0 overwrites. */
typedef void (*kt_gemm_fn)(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens,
                           int64_t k0, float *c, int64_t ldc, int add);

/* Attention (attention/attend.c): the query rows of `q`, `rows` of them, meet `tokens` keys of one page, key_row bytes
 * from one to the next: s[r * lds + t] = q row r . key t. q is padded with zeros to a multiple of 16. */
typedef void (*kt_scores_fn)(const struct kt_acts *q, int rows, const uint8_t *keys, size_t key_row, int tokens,
                             float *s, int64_t lds, struct kt_ahead *ahead);

/* out[r * ldo + c] = keep[r] * out[r * ldo + c] + sum over tokens t of p[r * ldp + t] * value t [c], c < size. out has
 * room for a multiple of 16. */
typedef void (*kt_values_fn)(const float *p, int64_t ldp, int rows, const float *keep, const uint8_t *values,
                             size_t value_row, int tokens, int64_t size, float *out, int64_t ldo,
                             struct kt_ahead *ahead);

enum { KT_CACHES = 4 }; /* types of cached keys and values: KT_F32, KT_F16, KT_BF16, KT_CACHE_Q8_0 */

struct kt_kernels {
    const char *name;
    kt_dot_fn dot[KT_FORMATS];          /* NULL: decode goes through tiles as well */
    int tiles_from[KT_FORMATS];         /* tokens from which tiles beat dot, see matmul/thresholds.c */
    int dot_bf16;                       /* dot of BF16 and F8_E4M3 meets bf16 activations where it is given them */
    kt_unpack_fn unpack[KT_FORMATS];    /* NULL: a type by columns, which has a tile function */
    kt_unpack_tile_fn tile[KT_FORMATS]; /* NULL: unpack and interleave */
    kt_unpack_tile_fn tile_bf16[KT_FORMATS]; /* the same for a BF16 panel; NULL: by way of fp32 */
    kt_encode_fn encode[KT_FORMATS]; /* NULL: a format that is not written, or plain numbers */
    kt_gemm_fn gemm_q8, gemm_f32;
    kt_gemm_fn gemm_bf16; /* for bf16 activations. NULL: BF16 weights are unpacked to fp32 and use gemm_f32 */

    /* out[j][r] = in[r * in_stride + j] for 16 rows r and n dwords j. out is 64-byte aligned. */
    void (*interleave)(const uint32_t *in, size_t in_stride, int64_t n, uint32_t *out);

    /* A Q8 panel of one tile as floats, s*(u - z) - m, turned: column c of its row r at
     * out[c / 16 * tile + r * 16 + c % 16], r < rows. NULL: by way of an fp32 tile, to the same bits. */
    void (*turn_codes)(const struct kt_panel *p, int rows, float *out, int64_t tile);

    /* The same as bf16, two rows a dword: at out[c / 16 * tile + r / 2 * 16 + c % 16]. NULL: by way of fp32. */
    void (*turn_codes_bf16)(const struct kt_panel *p, int rows, uint32_t *out, int64_t tile);

    /* scales [count][16] (times w->scale) of rows first .. first + rows, rows <= 16, in groups from .. from + count of
     * scale_cols columns; 0 past `rows`. zeros, if not NULL: their packed zero points likewise. */
    void (*read_scales)(const struct kt_matrix *w, int64_t first, int rows, int64_t from, int64_t count, float *scales,
                        float *zeros);

    /* v[k][16] *= scales[k / group][16], k < n: an fp32 tile meets its separate scales. */
    void (*scale_tile)(float *v, int64_t n, int group, const float *scales);

    /* Quantize n (a multiple of 32) activations; see kt_native.h for the rule. Same bits on every ISA. */
    void (*quantize)(const float *x, int64_t n, int8_t *q, float *d, float *ds, int32_t *low, int32_t *high);
    void (*to_bf16)(const float *x, int64_t n, uint16_t *out);
    void (*to_f16)(const float *x, int64_t n, uint16_t *out);

    /* up[i] = activation of gate[i] and up[i] (see kt_glu); gate NULL: of up[i] alone. Same bits on every ISA. */
    void (*activate)(const struct kt_glu *glu, const float *gate, float *up, int64_t n);

    /* The gradients of gate and up take their place, scale * d being that of the activation's result, which m gets. */
    void (*activate_back)(const struct kt_glu *glu, float scale, const float *d, float *gate, float *up, float *m,
                          int64_t n);

    /* out[i] += x[i] */
    void (*add)(const float *x, float *out, int64_t n);

    /* out[i] (+)= scale * x[i]; `add` 0 overwrites. Unfused multiply and add: same bits on every ISA. */
    void (*scale_add)(float scale, const float *x, float *out, int64_t n, int add);

    kt_scores_fn scores[KT_CACHES];
    kt_values_fn values[KT_CACHES];
    int panels_from[2]; /* rows from which panels beat them, by gemm_f32 and by gemm_bf16: see matmul/thresholds.c */

    /* s[i] = e^(scale * s[i] - m), i < n; m is the largest of *max and all scale * s[i], and is left in *max. Returns
     * the sum of what it wrote. -infinity becomes 0, even if nothing larger is known. */
    float (*softmax)(float *s, int n, float scale, float *max);

    /* x[i] *= factor */
    void (*rescale)(float factor, float *x, int64_t n);

    /* `tokens` rows of n bf16 (the rest up to a multiple of 16: zero) as columns of a BF16 panel, tiles of which begin
     * `tile` dwords apart: the columns of values are its rows. */
    void (*pair_rows)(const uint8_t *values, size_t value_row, int tokens, int64_t n, uint32_t *data, int64_t tile);

    /* n values of GGUF's q8_0 as floats. */
    void (*load_q8_0)(const uint8_t *p, int64_t n, float *out);

    /* Measurements. read: any mix of all bytes. peak: returns operations done, 0 where there is no such unit. */
    uint64_t (*read)(const void *p, size_t bytes);
    double (*peak)(int kind, int64_t iterations);
};

/* Each src/<isa>/<part>.c fills its slots by kt_fill_<part>_<isa>: those that isas.h lists. */
#define KT_DECLARE_FILL(isa, part) void kt_fill_##part##_##isa(struct kt_kernels *k);
#define KT_DECLARE_ISA(isa, upper, base, need) KT_PARTS_##isa(KT_DECLARE_FILL)
KT_ISAS(KT_DECLARE_ISA)

#define KT_JOIN2(a, b) a##b
#define KT_JOIN(a, b) KT_JOIN2(a, b)

/* The kernels in use; never NULL. And those of the same instruction set that only multiply fp32. */
const struct kt_kernels *kt_kernels(void);
const struct kt_kernels *kt_exact_kernels(void);

#endif
