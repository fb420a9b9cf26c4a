/* bf16 tiles: BF16 weights, whose dwords are only transposed, and e4m3, which bf16 holds exactly. */
#include "../avx512/tile_vec.h"
#include "e4m3.h"

/* Columns k0 .. k0 + n of 16 rows, of `size` bytes: each 16 bytes of them as four dwords a row. An odd number of bytes
 * at the end of a row is padded with zeros. */
#define BF16_TILE(name, size)                                                                                   \
    static void tile_##name(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n,                    \
                             const struct kt_tile *to) {                                                        \
        const struct rows rows = rows_of(w->data + (size_t)first * w->stride + (size_t)k0 * (size), w->stride); \
        const size_t bytes = (size_t)n * (size);                                                                \
        const int64_t dwords = (n + 1) / 2;                                                                     \
        struct name##_state state = {0};                                                                        \
        uint32_t *out = to->data;                                                                               \
        size_t at = 0;                                                                                          \
        for (; at + 16 <= bytes; at += 16, out += (8 / (size)) * KT_TILE) name##_piece(&rows, at, out, &state); \
        if (at < bytes) {                                                                                       \
            uint8_t rest[16][16] = {{0}};                                                                       \
            _Alignas(64) uint32_t last[8 / (size) * KT_TILE];                                                   \
            for (int r = 0; r < 16; r++) memcpy(rest[r], row_at(&rows, r, at), bytes - at);                     \
            const struct rows padded = rows_of(rest[0], 16);                                                    \
            name##_piece(&padded, 0, last, &state);                                                             \
            memcpy(out, last, (size_t)(to->data + dwords * KT_TILE - out) * 4);                                 \
        }                                                                                                       \
        name##_end(&state, to->data, dwords);                                                                   \
    }

struct bf16_state {
    int none;
};
INLINE void bf16_piece(const struct rows *rows, size_t at, uint32_t *out, struct bf16_state *state) {
    (void)state;
    vec v[4];
    columns4(rows, at, v);
    for (int i = 0; i < 4; i++) store(out + i * KT_TILE, v[i]);
}
INLINE void bf16_end(const struct bf16_state *state, uint32_t *data, int64_t dwords) {
    (void)state;
    (void)data;
    (void)dwords;
}
BF16_TILE(bf16, 2)

/* ---- e4m3 ------------------------------------------------------------------------------------------- */

struct f8_state {
    __m512i most; /* magnitudes: 127 is NaN */
};

INLINE void f8_dwords(__m512i v, uint32_t *out, struct f8_state *state) {
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0));
    __m512i low, high;
    /* Columns 0 and 1 of four rows, then 2 and 3 */
    e4m3_to_bf16(_mm512_shuffle_epi8(v, pairs), &low, &high, &state->most);
    _mm512_store_si512(out, low);
    _mm512_store_si512(out + KT_TILE, high);
}

INLINE void f8_piece(const struct rows *rows, size_t at, uint32_t *out, struct f8_state *state) {
    vec v[4];
    columns4(rows, at, v);
    for (int i = 0; i < 4; i++) f8_dwords((__m512i)v[i], out + 2 * i * KT_TILE, state);
}

/* Codes 0x7f and 0xff have become 480, which no other code is: they are NaN. */
INLINE void f8_end(const struct f8_state *state, uint32_t *data, int64_t dwords) {
    if (!_mm512_cmpeq_epi8_mask(state->most, _mm512_set1_epi8(127))) return;
    uint16_t *v = (uint16_t *)data;
    for (int64_t i = 0; i < dwords * 2 * KT_TILE; i++)
        if ((v[i] & 0x7fff) == 0x43f0) v[i] = 0x7fc0;
}
BF16_TILE(f8, 1)

void kt_fill_tile_float_avx512_bf16(struct kt_kernels *k) {
    k->tile_bf16[KT_FMT_BF16] = tile_bf16;
    k->tile_bf16[KT_FMT_F8_E4M3] = tile_f8;
}
