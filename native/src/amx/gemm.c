/* The panel GEMMs for AMX: a tile of up to 16 tokens times a tile of 16 weight rows an instruction. Panels already are
 * the layout that the second operand has: a line of 16 dwords is a row of the tile. The first operand is packed, for
 * tokens of an expert lie apart. Everything else of this instruction set is inherited from AVX-512.
 *
 * int8: products of one group of 32 columns stay in a tile of integers, which AVX-512 scales into fp32 sums. Groups of
 * 16 columns are left to the GEMM of AVX-512, which is 1.15 times as fast as half-filled tiles would be.
 * bf16: sums stay in tiles, over all columns of a slice or over those that share a scale.
 *
 * The shapes of tiles are state of the thread. A call sets them and ends by releasing them: the calling thread may be
 * the application's, tiles in use make every context switch and signal 8 KiB heavier, and they keep a core from deep
 * sleep. */
#ifndef KT_ISA
#define KT_ISA amx
#endif
#include "../../include/kt_native.h"
#include "../avx512/common.h"
#include "tile.h"

enum {
    TOKENS = 16,   /* rows of a tile */
    MAX_TILES = KT_BLOCK_ROWS / KT_TILE, /* of a panel */
#ifdef KT_AMX_EMULATED
    Q8_TOKENS = 1, /* to see the bits of tiles, whatever the number of tokens */
#else
    Q8_TOKENS = 8, /* from which int8 tiles repay packing, and sums that go by way of memory */
#endif
};

/* The GEMM of AVX-512, for fewer tokens and for groups of 16. Its sums have the same order, so that a token does not
 * depend on the others. */
static kt_gemm_fn below_q8;

/* Tokens of block b, which starts at token t: blocks are of equal size, or one less. */
INLINE int block_tokens(int tokens, int t, int blocks, int b) { return (tokens - t + blocks - b - 1) / (blocks - b); }

/* ---- int8 ------------------------------------------------------------------------------------------- */

enum {
    GROUPS = KT_CACHE_BYTES / KT_ACT_GROUP,
    AT_ONCE = 4, /* tiles of sums */
    STAGES = 3,  /* sets of them: those before the last have left the store buffer, which forwards no tiles to vectors */
};

typedef int32_t sums_tile[TOKENS][KT_TILE];

/* Columns k .. k+n of a panel meet up to 16 tokens. Arrays by group are prepared once for all tiles. */
struct q8_slice {
    const struct kt_panel *p;
    int64_t k, n;
    int tokens;
    float *c;
    int64_t ldc;
    int add;
    _Alignas(64) int8_t q[GROUPS][TOKENS][KT_ACT_GROUP];
    float d[TOKENS][GROUPS];
    int32_t start[TOKENS][GROUPS]; /* minus zero point times sum of codes */
    float ds[2][TOKENS][GROUPS];   /* scale times sum of codes: of the group, or of its halves */
    sums_tile sums[STAGES][AT_ONCE]; /* of these columns, and of those before them */
};

_Static_assert(GROUPS == 16, "a token's groups are one register");

/* Token n of the slice; `at`: its first value. */
INLINE void prepare(struct q8_slice *s, const int n, const struct kt_acts *a, int64_t at) {
    const int64_t g = at / KT_ACT_GROUP;
    const int min_halves = s->p->min_group == 16;
    const __m512i zero = _mm512_set1_epi32(-s->p->zero);
    const __m512 d = _mm512_loadu_ps(a->d + g);
    const __m512i low = _mm512_loadu_si512(a->low + g), high = _mm512_loadu_si512(a->high + g);
    const __m512i both = _mm512_add_epi32(low, high);
    for (int64_t i = 0; i < s->n / KT_ACT_GROUP; i++)
        _mm256_store_si256((__m256i *)s->q[i][n], load256(a->q + at + i * KT_ACT_GROUP));
    _mm512_storeu_ps(s->d[n], d);
    _mm512_storeu_si512(s->start[n], _mm512_mullo_epi32(zero, both));
    _mm512_storeu_ps(s->ds[0][n], _mm512_mul_ps(d, _mm512_cvtepi32_ps(min_halves ? low : both)));
    _mm512_storeu_ps(s->ds[1][n], _mm512_mul_ps(d, _mm512_cvtepi32_ps(high)));
}

/* What a micro kernel is compiled for. */
struct variant {
    int min_group; /* 32, 16 or 0 */
    int zero;      /* whether sums start from `start` */
};

/* Tiles 0 and 1 hold activations, 2 and 3 codes, 4 to 7 sums. */
static void shape_q8(struct tile_config *config, int tokens) {
    memset(config, 0, sizeof *config);
    for (int i = 0; i < 2; i++) tile_shape(config, i, tokens, KT_ACT_GROUP);
    for (int i = 2; i < 4; i++) tile_shape(config, i, KT_ACT_GROUP / 4, 64);
    for (int i = 4; i < 8; i++) tile_shape(config, i, tokens, 64);
}

/* sums[i] = products over group first + i, for i < count <= AT_ONCE */
INLINE void multiply_q8(const struct q8_slice *s, const uint32_t *data, int64_t first, int64_t count, sums_tile *sums) {
    enum { DWORDS = KT_ACT_GROUP / 4 * KT_TILE }; /* of a tile of codes */
    const uint32_t *codes = data + first * DWORDS;
#define PRODUCT(i, ta, tb, tc)                             \
    if (i < count) {                                       \
        tile_zero(tc);                                     \
        tile_load(tb, codes + i * DWORDS, 64);             \
        tile_load(ta, s->q[first + i][0], KT_ACT_GROUP);   \
        tile_dot_q8(tc, ta, tb);                           \
    }
    PRODUCT(0, 0, 2, 4)
    PRODUCT(1, 1, 3, 5)
    PRODUCT(2, 0, 2, 6)
    PRODUCT(3, 1, 3, 7)
#undef PRODUCT
    if (0 < count) tile_store(4, sums[0], 64);
    if (1 < count) tile_store(5, sums[1], 64);
    if (2 < count) tile_store(6, sums[2], 64);
    if (3 < count) tile_store(7, sums[3], 64);
}

/* acc[n] += what sums[i] are worth, for groups first + i, i < count. The operations are those of avx512/gemm.c. */
INLINE void scale_q8(const int N, const struct variant v, const struct q8_slice *s, const float *scales,
                     const float *mins, int64_t first, int64_t count, const sums_tile *sums, __m512 *acc) {
    const int parts = v.min_group ? KT_ACT_GROUP / v.min_group : 0; /* mins of a group */
    for (int64_t i = 0; i < count; i++) {
        const int64_t g = first + i;
        const __m512 scale = _mm512_load_ps(scales + g * KT_TILE);
        __m512 min[2];
        for (int half = 0; half < parts; half++) min[half] = _mm512_load_ps(mins + (g * parts + half) * KT_TILE);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            __m512i sum = _mm512_load_si512(sums[i][n]);
            if (v.zero) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(s->start[n][g]));
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
            acc[n] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(s->d[n][g]), acc[n]);
            for (int half = 0; half < parts; half++)
                acc[n] = _mm512_fnmadd_ps(min[half], _mm512_set1_ps(s->ds[half][n][g]), acc[n]);
        }
    }
}

/* c[tokens][a tile] (+)= the slice. While tiles multiply some columns, AVX-512 scales the sums of those before. */
INLINE void micro_q8(const int N, const struct variant v, struct q8_slice *s, int tile) {
    const struct kt_panel *p = s->p;
    const int64_t groups = s->n / KT_ACT_GROUP;
    const uint32_t *data = p->data + (tile * p->k + s->k) / 4 * KT_TILE;
    const float *scales = p->scales + (tile * p->k + s->k) / KT_ACT_GROUP * KT_TILE;
    const float *mins = v.min_group ? p->mins + (tile * p->k + s->k) / v.min_group * KT_TILE : NULL;
    __m512 acc[TOKENS];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) acc[n] = _mm512_setzero_ps();
    const int64_t delay = (STAGES - 1) * AT_ONCE; /* groups multiplied and not yet scaled */
    for (int64_t g = 0, stage = 0, oldest; g < groups + delay; g += AT_ONCE, stage = oldest) {
        oldest = stage + 1 == STAGES ? 0 : stage + 1;
        kt_ahead_step(p->ahead);
        multiply_q8(s, data, g, groups - g < AT_ONCE ? groups - g : AT_ONCE, s->sums[stage]);
        const int64_t done = g - delay;
        if (done < 0) continue;
        scale_q8(N, v, s, scales, mins, done, groups - done < AT_ONCE ? groups - done : AT_ONCE,
                 (const sums_tile *)s->sums[oldest], acc);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; n++)
        if (n < s->tokens) store_tile(s->c + n * s->ldc + tile * KT_TILE, acc[n], s->add);
}

INLINE void tiles_of(const int N, const struct variant v, struct q8_slice *s) {
    for (int tile = 0; tile < s->p->tiles; tile++) micro_q8(N, v, s, tile);
}

/* The variants that some format needs. */
INLINE void tiles_q8(const int N, struct q8_slice *s) {
    const struct kt_panel *p = s->p;
    if (p->min_group == 16) tiles_of(N, (struct variant){16, 0}, s);
    else if (p->min_group == 32) tiles_of(N, (struct variant){32, 0}, s);
    else tiles_of(N, (struct variant){0, 1}, s);
}

static void tokens16(struct q8_slice *s) { tiles_q8(16, s); }
static void tokens12(struct q8_slice *s) { tiles_q8(12, s); }
static void tokens8(struct q8_slice *s) { tiles_q8(8, s); }
static void tokens4(struct q8_slice *s) { tiles_q8(4, s); }

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    static void (*const meet[])(struct q8_slice *s) = {tokens4, tokens8, tokens12, tokens16};
    if (tokens < Q8_TOKENS || p->group == 16) {
        below_q8(p, a, token, tokens, k0, c, ldc, add);
        return;
    }
    const int blocks = (tokens + TOKENS - 1) / TOKENS;
    struct tile_config config;
    struct q8_slice s; /* rows past the last token are computed and dropped: they must hold numbers */
    memset(&s, 0, sizeof s);
    s.p = p;
    s.ldc = ldc;
    kt_ahead_spread(p->ahead, (int64_t)blocks * p->tiles * (p->k / KT_ACT_GROUP / AT_ONCE + 1));
    for (int64_t k = 0; k < p->k; k += KT_CACHE_BYTES)
        for (int b = 0, t = 0; b < blocks; b++, t += s.tokens) {
            const int n = block_tokens(tokens, t, blocks, b);
            if (n != s.tokens) {
                shape_q8(&config, n);
                tile_configure(&config);
            }
            s.tokens = n;
            s.k = k;
            s.n = p->k - k < KT_CACHE_BYTES ? p->k - k : KT_CACHE_BYTES;
            s.c = c + t * ldc;
            s.add = add || k;
            for (int i = 0; i < n; i++) prepare(&s, i, a, token[t + i] * a->stride + k0 + k);
            meet[(n - 1) / 4](&s);
        }
    tile_end();
}

/* ---- bf16 ------------------------------------------------------------------------------------------- */

enum {
    STEP = 32,                          /* columns of a multiplication */
    STEPS = KT_CACHE_BYTES / 2 / STEP,  /* of a slice */
    LINES = STEP / 2,                   /* of a panel in a step: rows of a tile */
};

typedef float floats_tile[TOKENS][KT_TILE];

/* Columns of a panel, `steps` times 32 from column k on, meet two tiles of tokens (the second may be empty). */
struct bf16_slice {
    const struct kt_panel *p;
    int64_t k, steps;
    int tokens[2];
    float *c;
    int64_t ldc;
    int add;
    _Alignas(64) uint16_t x[STEPS][2 * TOKENS][STEP];
    _Alignas(64) uint32_t last[MAX_TILES][LINES * KT_TILE]; /* the last step of a panel, filled up with zeros */
    floats_tile sums[2][2];
};

/* Tile 0: 16 tokens, 1: those after; 2 and 3: weights of two panel tiles; 4 + 2 * i + j: sums of tile i and 2 + j. */
static void shape_bf16(struct tile_config *config, const int tokens[2]) {
    memset(config, 0, sizeof *config);
    for (int i = 0; i < 2; i++) {
        tile_shape(config, i, tokens[i], 2 * STEP);
        tile_shape(config, 2 + i, LINES, 64);
        for (int j = 0; j < 2; j++) tile_shape(config, 4 + 2 * i + j, tokens[i], 64);
    }
}

/* Lines of a step of panel tile `tile`. */
INLINE const uint32_t *lines_at(const struct bf16_slice *s, int tile, int64_t step) {
    const int64_t pairs = (s->p->k + 1) / 2, first = s->k / 2 + step * LINES;
    return pairs - first < LINES ? s->last[tile] : s->p->data + (tile * pairs + first) * KT_TILE;
}

/* The last lines of a panel of odd length: beyond them the next tile begins. */
static void fill_last(struct bf16_slice *s) {
    const int64_t pairs = (s->p->k + 1) / 2, whole = pairs / LINES * LINES;
    const size_t bytes = (size_t)(pairs - whole) * KT_TILE * 4;
    if (!bytes) return;
    memset(s->last, 0, sizeof s->last);
    for (int tile = 0; tile < s->p->tiles; tile++)
        memcpy(s->last[tile], s->p->data + (tile * pairs + whole) * KT_TILE, bytes);
}

/* M tiles of tokens by R of rows: zero sums, or take them from memory; multiply a step; put them into memory. */
INLINE void zero_bf16(const int M, const int R) {
    tile_zero(4);
    if (R > 1) tile_zero(5);
    if (M > 1) tile_zero(6);
    if (M > 1 && R > 1) tile_zero(7);
}

INLINE void load_bf16_sums(const int M, const int R, const float *c, int64_t ldc) {
    tile_load(4, c, ldc * 4);
    if (R > 1) tile_load(5, c + KT_TILE, ldc * 4);
    if (M > 1) tile_load(6, c + TOKENS * ldc, ldc * 4);
    if (M > 1 && R > 1) tile_load(7, c + TOKENS * ldc + KT_TILE, ldc * 4);
}

INLINE void store_bf16_sums(const int M, const int R, float *c, int64_t ldc) {
    tile_store(4, c, ldc * 4);
    if (R > 1) tile_store(5, c + KT_TILE, ldc * 4);
    if (M > 1) tile_store(6, c + TOKENS * ldc, ldc * 4);
    if (M > 1 && R > 1) tile_store(7, c + TOKENS * ldc + KT_TILE, ldc * 4);
}

INLINE void multiply_bf16(const int M, const int R, const struct bf16_slice *s, int tile, int64_t step) {
    tile_load(2, lines_at(s, tile, step), 64);
    tile_load(0, s->x[step][0], 2 * STEP);
    tile_dot_bf16(4, 0, 2);
    if (M > 1) tile_load(1, s->x[step][TOKENS], 2 * STEP);
    if (M > 1) tile_dot_bf16(6, 1, 2);
    if (R > 1) tile_load(3, lines_at(s, tile + 1, step), 64);
    if (R > 1) tile_dot_bf16(5, 0, 3);
    if (M > 1 && R > 1) tile_dot_bf16(7, 1, 3);
}

/* c (+)= sums times the scales of panel tiles `tile` and after, in group g */
INLINE void scale_bf16(const int M, const int R, const struct bf16_slice *s, int tile, int64_t g, int add) {
    const struct kt_panel *p = s->p;
    const int64_t groups = (p->k + p->group - 1) / p->group;
    for (int r = 0; r < R; r++) {
        const __m512 scale = _mm512_load_ps(p->scales + ((tile + r) * groups + g) * KT_TILE);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < s->tokens[m]; n++) {
                float *c = s->c + (m * TOKENS + n) * s->ldc + (tile + r) * KT_TILE;
                const __m512 sum = _mm512_load_ps(s->sums[m][r][n]);
                _mm512_storeu_ps(c, add ? _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(c)) : _mm512_mul_ps(sum, scale));
            }
    }
}

/* c (+)= the slice, where weights have no scales */
INLINE void micro_plain(const int M, const int R, const struct bf16_slice *s, int tile) {
    float *c = s->c + tile * KT_TILE;
    if (s->add) load_bf16_sums(M, R, c, s->ldc);
    else zero_bf16(M, R);
    for (int64_t step = 0; step < s->steps; step++) {
        kt_ahead_step(s->p->ahead);
        multiply_bf16(M, R, s, tile, step);
    }
    store_bf16_sums(M, R, c, s->ldc);
}

/* The same where `group` columns share one */
INLINE void micro_scaled(const int M, const int R, struct bf16_slice *s, int tile) {
    const int64_t each = s->p->group / STEP;
    for (int64_t step = 0; step < s->steps; step += each) {
        zero_bf16(M, R);
        for (int64_t i = step; i < step + each && i < s->steps; i++) {
            kt_ahead_step(s->p->ahead);
            multiply_bf16(M, R, s, tile, i);
        }
        tile_store(4, s->sums[0][0], 64);
        if (R > 1) tile_store(5, s->sums[0][1], 64);
        if (M > 1) tile_store(6, s->sums[1][0], 64);
        if (M > 1 && R > 1) tile_store(7, s->sums[1][1], 64);
        scale_bf16(M, R, s, tile, s->k / s->p->group + step / each, s->add || step);
    }
}

INLINE void tiles_bf16(const int M, struct bf16_slice *s) {
    const int tiles = s->p->tiles, scaled = s->p->group != 0;
    int tile = 0;
    for (; tile + 2 <= tiles; tile += 2)
        if (scaled) micro_scaled(M, 2, s, tile);
        else micro_plain(M, 2, s, tile);
    if (tile == tiles) return;
    if (scaled) micro_scaled(M, 1, s, tile);
    else micro_plain(M, 1, s, tile);
}

static void one_tile(struct bf16_slice *s) { tiles_bf16(1, s); }
static void two_tiles(struct bf16_slice *s) { tiles_bf16(2, s); }

/* However few tokens: a tile multiplication adds in an order of its own, and a token must not depend on the others. */
static void gemm_bf16(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                      float *c, int64_t ldc, int add) {
    const int blocks = (tokens + 2 * TOKENS - 1) / (2 * TOKENS);
    struct tile_config config;
    struct bf16_slice s;
    s.p = p;
    s.ldc = ldc;
    s.tokens[0] = s.tokens[1] = 0;
    fill_last(&s);
    kt_ahead_spread(p->ahead, (int64_t)blocks * ((p->tiles + 1) / 2) * ((p->k + STEP - 1) / STEP));
    for (int64_t k = 0; k < p->k; k += STEPS * STEP)
        for (int b = 0, t = 0, n; b < blocks; b++, t += n) {
            n = block_tokens(tokens, t, blocks, b);
            const int first = n < TOKENS ? n : TOKENS;
            const int64_t steps = (p->k - k + STEP - 1) / STEP;
            if (first != s.tokens[0] || n - first != s.tokens[1]) {
                s.tokens[0] = first;
                s.tokens[1] = n - first;
                shape_bf16(&config, s.tokens);
                tile_configure(&config);
            }
            s.k = k;
            s.steps = steps < STEPS ? steps : STEPS;
            s.c = c + t * ldc;
            s.add = add || k;
            for (int i = 0; i < n; i++) { /* a row is zero from its last column on to a multiple of 64 */
                const uint16_t *x = a->h + token[t + i] * a->stride + k0 + k;
                for (int64_t j = 0; j < s.steps; j++) _mm512_store_si512(s.x[j][i], _mm512_loadu_si512(x + j * STEP));
            }
            if (n > TOKENS) two_tiles(&s);
            else one_tile(&s);
        }
    tile_end();
}

/* ---- limits ----------------------------------------------------------------------------------------- */

#ifndef KT_AMX_EMULATED /* whose limits are nobody's */
static double (*peak_below)(int kind, int64_t iterations);

static double peak(int kind, int64_t iterations) {
    static const int full[2] = {TOKENS, TOKENS};
    _Alignas(64) static const uint8_t zeros[TOKENS][64];
    if (kind != KT_PEAK_INT8 && kind != KT_PEAK_BF16) return peak_below(kind, iterations);
    struct tile_config config;
    shape_bf16(&config, full);
    tile_configure(&config);
    tile_load(0, zeros, 64);
    tile_load(1, zeros, 64);
    tile_load(2, zeros, 64);
    tile_load(3, zeros, 64);
    zero_bf16(2, 2);
    for (int64_t n = 0; n < iterations; n++) {
        if (kind == KT_PEAK_INT8) {
            tile_dot_q8(4, 0, 2);
            tile_dot_q8(5, 0, 3);
            tile_dot_q8(6, 1, 2);
            tile_dot_q8(7, 1, 3);
        } else {
            tile_dot_bf16(4, 0, 2);
            tile_dot_bf16(5, 0, 3);
            tile_dot_bf16(6, 1, 2);
            tile_dot_bf16(7, 1, 3);
        }
    }
    tile_end();
    return (kind == KT_PEAK_INT8 ? 4.0 * 32768.0 : 4.0 * 16384.0) * (double)iterations;
}
#endif

void KT_JOIN(kt_fill_gemm_, KT_ISA)(struct kt_kernels *k) {
    below_q8 = k->gemm_q8;
    k->gemm_q8 = gemm_q8;
    k->gemm_bf16 = gemm_bf16;
#ifndef KT_AMX_EMULATED
    peak_below = k->peak;
    k->peak = peak;
#endif
}
