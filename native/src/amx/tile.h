/* tile.h: the AMX instructions that the GEMMs use, by name. A tile is 16 rows of 64 bytes; tile numbers are literals.
 *
 * With KT_AMX_EMULATED the same names are plain C that computes what Intel's manual (SDM volume 2, instructions
 * TDPBSUD, TDPBF16PS, TILELOADD, LDTILECFG) says, so that gemm.c can be tested on processors without AMX. The
 * emulation traps where the processor would fault. */
#ifndef KT_AMX_TILE_H
#define KT_AMX_TILE_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* What LDTILECFG reads: the rows and the bytes of a row of each of eight tiles. A tile of no rows is not used. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "the layout of LDTILECFG");

static inline void tile_shape(struct tile_config *config, int tile, int rows, int colsb) {
    config->palette = 1;
    config->rows[tile] = (uint8_t)(colsb ? rows : 0);
    config->colsb[tile] = (uint16_t)(rows ? colsb : 0);
}

#ifndef KT_AMX_EMULATED

/* Compilers' intrinsics do not all say which memory they read and write, so stores could move past them. */
#define TILE_ORDERED(instruction)            \
    do {                                     \
        __asm__ volatile("" ::: "memory");   \
        instruction;                         \
        __asm__ volatile("" ::: "memory");   \
    } while (0)

#define tile_configure(config) TILE_ORDERED(_tile_loadconfig(config))
#define tile_end() TILE_ORDERED(_tile_release())
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) TILE_ORDERED(_tile_loadd(t, from, stride))
#define tile_store(t, to, stride) TILE_ORDERED(_tile_stored(t, to, stride))

/* c[i][j] += four signed bytes of a's row i by four unsigned bytes of b's column j, over all of them; in 32 bits */
#define tile_dot_q8(c, a, b) _tile_dpbsud(c, a, b)

/* The same of pairs of bf16, in fp32 */
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)

#else

struct tile_state {
    struct tile_config config;
    _Alignas(64) uint8_t tile[8][16][64];
};
static _Thread_local struct tile_state tile_state;

SHARED void tile_configure(const struct tile_config *config) {
    memset(&tile_state, 0, sizeof tile_state);
    tile_state.config = *config;
    if (config->palette != 1 || config->start_row) __builtin_trap();
    for (int i = 0; i < 14; i++)
        if (config->reserved[i]) __builtin_trap();
    for (int i = 0; i < 16; i++) {
        if (config->rows[i] > 16 || config->colsb[i] > 64 || !config->rows[i] != !config->colsb[i]) __builtin_trap();
        if (i >= 8 && config->rows[i]) __builtin_trap();
    }
}

static inline void tile_end(void) { memset(&tile_state, 0, sizeof tile_state); }

static inline int tile_rows(int t) {
    if (!tile_state.config.rows[t]) __builtin_trap();
    return tile_state.config.rows[t];
}

static inline int tile_colsb(int t) { return tile_state.config.colsb[t]; }

SHARED void tile_zero(int t) {
    tile_rows(t);
    memset(tile_state.tile[t], 0, sizeof tile_state.tile[t]);
}

SHARED void tile_load(int t, const void *from, int64_t stride) {
    const int rows = tile_rows(t);
    tile_zero(t);
    for (int i = 0; i < rows; i++)
        memcpy(tile_state.tile[t][i], (const uint8_t *)from + i * stride, (size_t)tile_colsb(t));
}

SHARED void tile_store(int t, void *to, int64_t stride) {
    for (int i = 0; i < tile_rows(t); i++)
        memcpy((uint8_t *)to + i * stride, tile_state.tile[t][i], (size_t)tile_colsb(t));
}

/* Whether c can take the product of a and b; what c has beyond its shape becomes zero. */
static inline void tile_check(int c, int a, int b) {
    if (c == a || c == b || a == b) __builtin_trap();
    if (tile_rows(c) != tile_rows(a) || tile_colsb(a) != 4 * tile_rows(b) || tile_colsb(c) != tile_colsb(b))
        __builtin_trap();
    if (tile_colsb(c) % 4) __builtin_trap();
}

SHARED void tile_dot_q8(int tc, int ta, int tb) {
    tile_check(tc, ta, tb);
    for (int i = 0; i < tile_rows(tc); i++) {
        uint32_t c[16];
        memcpy(c, tile_state.tile[tc][i], 64);
        for (int k = 0; k < tile_rows(tb); k++)
            for (int j = 0; j < tile_colsb(tc) / 4; j++)
                for (int l = 0; l < 4; l++)
                    c[j] += (uint32_t)((int8_t)tile_state.tile[ta][i][4 * k + l] * tile_state.tile[tb][k][4 * j + l]);
        memcpy(tile_state.tile[tc][i], c, 64);
    }
}

/* Subnormal numbers count as zero, going in and coming out. */
static inline float tile_flush(float v) { return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0.0f, v) : v; }

static inline float tile_bf16(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float v;
    memcpy(&v, &bits, 4);
    return tile_flush(v);
}

/* The first and the second values of all pairs have a fused sum each; then these are added, and that to c. */
SHARED void tile_dot_bf16(int tc, int ta, int tb) {
    tile_check(tc, ta, tb);
    for (int i = 0; i < tile_rows(tc); i++) {
        float c[16], sum[16][2] = {{0}};
        memcpy(c, tile_state.tile[tc][i], 64);
        for (int k = 0; k < tile_rows(tb); k++)
            for (int j = 0; j < tile_colsb(tc) / 4; j++)
                for (int l = 0; l < 2; l++)
                    sum[j][l] =
                        tile_flush(__builtin_fmaf(tile_bf16(&tile_state.tile[ta][i][4 * k + 2 * l]),
                                                  tile_bf16(&tile_state.tile[tb][k][4 * j + 2 * l]), sum[j][l]));
        for (int j = 0; j < tile_colsb(tc) / 4; j++)
            c[j] = tile_flush(tile_flush(c[j]) + tile_flush(sum[j][0] + sum[j][1]));
        memcpy(tile_state.tile[tc][i], c, 64);
    }
}

#endif
#endif
