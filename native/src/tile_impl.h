/* tile_impl.h: 16 rows of packed weights straight into a tile of a panel, in one text for every instruction set that
 * has a tile_vec.h. What kt_matrix and kt_tile are says kernels.h; what the codes mean says portable C, whose numbers these
 * functions give bit for bit.
 *
 * A vector holds a dword of each of W rows. So the transpose comes first, on packed dwords, and every operation then
 * takes four columns of W rows apart at once. Nothing here is specific to a machine: and, or, shift, add and multiply
 * are C on vector types, all else is in tile_vec.h. Blocks of 32 and types with scales beside the codes are here,
 * super-blocks in tile_k_impl.h. */
#ifndef KT_TILE_IMPL_H
#define KT_TILE_IMPL_H

#include "iq_tables.h"
#include "kernels.h"

typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint16_t vec16 __attribute__((vector_size(4 * W)));
typedef uint8_t vec8 __attribute__((vector_size(4 * W)));

#define LOW4 0x0f0f0f0fu

INLINE void put(const struct kt_tile *to, int dword, vec v) { store(to->data + dword * KT_TILE, v); }
INLINE void put_scale(const struct kt_tile *to, int group, fvec f) { store_f(to->scales + group * KT_TILE, f); }
INLINE void put_min(const struct kt_tile *to, int group, fvec f) { store_f(to->mins + group * KT_TILE, f); }

INLINE vec byte_of(vec v, const int i) { return i == 3 ? v >> 24 : v >> 8 * i & 255; }
INLINE vec signed_byte_of(vec v, const int i) { return (vec)((ivec)(v << (24 - 8 * i)) >> 24); }
INLINE vec high_nibbles(vec v) { return v >> 4 & LOW4; }

/* A dword that starts two bytes into a. */
INLINE vec straddle(vec a, vec b) { return a >> 16 | b << 16; }

/* struct kt_kernels */
static void interleave(const uint32_t *in, size_t in_stride, int64_t n, uint32_t *out) {
    for (int r = 0; r < KT_TILE; r += W) {
        const struct rows rows = rows_of((const uint8_t *)(in + (size_t)r * in_stride), 4 * in_stride);
        for (int64_t j = 0; j + 4 <= n; j += 4) {
            vec v[4];
            columns4(&rows, (size_t)j * 4, v);
            for (int i = 0; i < 4; i++) store(out + (j + i) * KT_TILE + r, v[i]);
        }
    }
    for (int64_t j = n & ~(int64_t)3; j < n; j++)
        for (int r = 0; r < KT_TILE; r++) out[j * KT_TILE + r] = in[(size_t)r * in_stride + (size_t)j];
}

/* A function that calls name_block for all blocks of W rows, then of the next W. */
#define TILE(name, columns, bytes, groups, min_groups)                                                                \
    static void tile_##name(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out) { \
        for (int r = 0; r < KT_TILE; r += W) {                                                                        \
            const size_t stride = w->stride, begin = (size_t)(first + r) * stride + (size_t)(k0 / (columns) * (bytes)); \
            const struct rows rows = rows_of(w->data + begin, stride);                                                \
            struct kt_tile to = {out->data + r, out->scales + r, out->mins + r};                                      \
            for (int64_t at = 0; at < n / (columns) * (bytes); at += (bytes)) {                                       \
                name##_block(&rows, (size_t)at, &to);                                                                 \
                to.data += (columns) / 4 * KT_TILE;                                                                   \
                to.scales += (groups)*KT_TILE, to.mins += (min_groups)*KT_TILE;                                       \
            }                                                                                                         \
        }                                                                                                             \
    }

/* ---- blocks of 32: low nibbles are columns 0 .. 15, high ones 16 .. 31 ------------------------------- */

/* fp16 at `at`; 16 bytes from there on belong to the block. */
INLINE fvec half_at(const struct rows *rows, size_t at) {
    vec v[4];
    columns4(rows, at, v);
    return halves(v[0], 0);
}

INLINE void q4_0_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec v[4];
    put_scale(to, 0, half_at(rows, at));
    columns4(rows, at + 2, v);
    for (int j = 0; j < 4; j++) put(to, j, v[j] & LOW4), put(to, 4 + j, high_nibbles(v[j]));
}
TILE(q4_0, 32, 18, 1, 0)

INLINE void put_scale_and_min(const struct kt_tile *to, vec header) {
    put_scale(to, 0, halves(header, 0));
    put_min(to, 0, -halves(header, 1));
}

INLINE void q4_1_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4], v[4];
    columns4(rows, at, h);
    put_scale_and_min(to, h[0]);
    columns4(rows, at + 4, v);
    for (int j = 0; j < 4; j++) put(to, j, v[j] & LOW4), put(to, 4 + j, high_nibbles(v[j]));
}
TILE(q4_1, 32, 20, 1, 1)

/* 16 in byte i where bit 4*j + i is set: its byte four times, one bit of each, whatever that bit is worth. */
INLINE vec fifth_bits(vec bits, const int j) {
    const uint32_t k = j / 2;
    vec four = shuffle8(j & 1 ? bits : bits << 4, 0x01010101 * LANES(k, 4 + k, 8 + k, 12 + k));
    return min8(four & 0x80402010, 0x10101010 + (vec){0});
}

INLINE void put_five_bits(const struct kt_tile *to, const vec v[4], vec bits) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        put(to, j, (v[j] & LOW4) | fifth_bits(bits, j));
        put(to, 4 + j, high_nibbles(v[j]) | fifth_bits(bits, 4 + j));
    }
}

INLINE void q5_0_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4], v[4];
    columns4(rows, at, h);
    put_scale(to, 0, halves(h[0], 0));
    columns4(rows, at + 6, v);
    put_five_bits(to, v, straddle(h[0], h[1]));
}
TILE(q5_0, 32, 22, 1, 0)

INLINE void q5_1_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4], v[4];
    columns4(rows, at, h);
    put_scale_and_min(to, h[0]);
    columns4(rows, at + 8, v);
    put_five_bits(to, v, h[1]);
}
TILE(q5_1, 32, 24, 1, 1)

/* 32 bytes, moved from signed to unsigned where `flip`. */
INLINE void put_bytes(const struct rows *rows, size_t at, const uint32_t flip, const struct kt_tile *to) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        vec v[4];
        columns4(rows, at + 16 * i, v);
        for (int j = 0; j < 4; j++) put(to, 4 * i + j, v[j] ^ flip);
    }
}

INLINE void q8_0_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    put_scale(to, 0, half_at(rows, at));
    put_bytes(rows, at + 2, 0x80808080, to);
}
TILE(q8_0, 32, 34, 1, 0)

/* 16 bytes of nibbles that choose a code from a table. */
INLINE void put_chosen(const struct kt_tile *to, const vec v[4], const uint8_t codes[16]) {
    const vec table = table16(codes);
    for (int j = 0; j < 4; j++) {
        put(to, j, shuffle8(table, v[j] & LOW4));
        put(to, 4 + j, shuffle8(table, high_nibbles(v[j])));
    }
}

INLINE void iq4_nl_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec v[4];
    put_scale(to, 0, half_at(rows, at));
    columns4(rows, at + 2, v);
    put_chosen(to, v, kt_iq4_codes);
}
TILE(iq4_nl, 32, 18, 1, 0)

/* kt_e8m0_half */
INLINE fvec e8m0_half(vec e) { return (fvec)larger((e << 23) - 0x00800000, (e << 21) + 0x00200000); }

INLINE void mxfp4_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec h[4], v[4];
    columns4(rows, at, h);
    put_scale(to, 0, e8m0_half(byte_of(h[0], 0)));
    columns4(rows, at + 1, v);
    put_chosen(to, v, kt_fp4_codes);
}
TILE(mxfp4, 32, 17, 1, 0)

/* kt_ue4m3_half: as fp16 the same bits mean 2^-8 of an e4m3. */
INLINE fvec ue4m3_half(vec x) {
    vec number = (x & 127) << 7;
    number &= (vec)(x != 127);
    return halves(number, 0) * 128.0f;
}

/* 16 columns take two dwords: low nibbles are columns 0 .. 7. */
INLINE void nvfp4_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const vec table = table16(kt_fp4_codes);
    vec h[4], v[4];
    columns4(rows, at, h);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) put_scale(to, g, ue4m3_half(byte_of(h[0], g)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        columns4(rows, at + 4 + 16 * i, v);
        for (int j = 0; j < 4; j++) {
            const int dword = 8 * i + j / 2 * 4 + j % 2;
            put(to, dword, shuffle8(table, v[j] & LOW4));
            put(to, dword + 2, shuffle8(table, high_nibbles(v[j])));
        }
    }
}
TILE(nvfp4, 64, 36, 4, 0)

/* ---- types with scales beside the codes: only codes, column after column ----------------------------- */

INLINE void i8_block(const struct rows *rows, size_t at, const struct kt_tile *to) { put_bytes(rows, at, 0x80808080, to); }
TILE(i8, 32, 32, 0, 0)

INLINE void u8_block(const struct rows *rows, size_t at, const struct kt_tile *to) { put_bytes(rows, at, 0, to); }
TILE(u8, 32, 32, 0, 0)

/* The four nibbles of the low (0) or high (1) half of a dword, a byte each: bytes spread to 16 bits, then to 8. */
INLINE vec four_nibbles(vec v, const int high) {
    const uint32_t k = high ? 0x80038002 : 0x80018000;
    vec two = shuffle8(v, LANES(k, k + 0x00040004, k + 0x00080008, k + 0x000c000c));
    return (two | two << 4) & LOW4;
}

INLINE void i4_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec v[4];
    columns4(rows, at, v);
    for (int j = 0; j < 4; j++) put(to, 2 * j, four_nibbles(v[j], 0)), put(to, 2 * j + 1, four_nibbles(v[j], 1));
}
TILE(i4, 32, 16, 0, 0)

INLINE void f4_e2m1_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const vec table = table16(kt_fp4_codes);
    vec v[4];
    columns4(rows, at, v);
    for (int j = 0; j < 4; j++) {
        put(to, 2 * j, shuffle8(table, four_nibbles(v[j], 0)));
        put(to, 2 * j + 1, shuffle8(table, four_nibbles(v[j], 1)));
    }
}
TILE(f4_e2m1, 32, 16, 0, 0)

/* ---- types by columns: a line of memory holds a few columns of all rows ------------------------------ */

/* A line is eight columns, a dword a row: as after a transpose. */
static void tile_gptq4(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out) {
    const uint8_t *line = w->data + (size_t)(k0 / 8) * w->stride + (size_t)first * 4;
    uint32_t *data = out->data;
    for (int64_t k = 0; k < n; k += 8, line += w->stride, data += 2 * KT_TILE)
        for (int r = 0; r < KT_TILE; r += W) {
            const vec v = load(line + 4 * r);
            store(data + r, four_nibbles(v, 0));
            store(data + KT_TILE + r, four_nibbles(v, 1));
        }
}

/* A line is four columns, a dword a row: as the tile itself. */
static void tile_gptq8(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out) {
    const uint8_t *line = w->data + (size_t)(k0 / 4) * w->stride + (size_t)first * 4;
    uint32_t *data = out->data;
    for (int64_t k = 0; k < n; k += 4, line += w->stride, data += KT_TILE)
        for (int r = 0; r < KT_TILE; r += W) store(data + r, load(line + 4 * r));
}

/* A line is one column, eight rows a dword: nibbles are rows 0, 2, 4, 6, 1, 3, 5, 7. W lines are transposed as rows
 * are elsewhere; then 16 bytes hold the same eight rows of four columns, and their bytes are transposed too: to rows
 * (0, 2), (1, 3), (4, 6), (5, 7) of four columns each. */
static void tile_awq4(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out) {
    const vec by_row = LANES(0x0c080400, 0x0e0a0602, 0x0d090501, 0x0f0b0703);
    const struct rows lines = rows_of(w->data + (size_t)k0 * w->stride + (size_t)first / 2, w->stride);
    uint32_t *data = out->data;
    for (int64_t k = 0; k < n; k += W, data += W / 4 * KT_TILE) {
        vec v[2], q[4];
        columns2(&lines, (size_t)k * w->stride, v);
        for (int i = 0; i < 2; i++) {
            const vec pairs = shuffle8(v[i], by_row), low = pairs & LOW4, high = high_nibbles(pairs);
            q[2 * i] = join_low(low, high), q[2 * i + 1] = join_high(low, high);
        }
        store_quads(data, q);
    }
}

#endif
