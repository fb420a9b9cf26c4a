/* templates/tile.h: 16 rows of packed weights straight into a tile of a panel, in one text for every instruction set
 * that has a tile_vec.h. What kt_matrix and kt_tile are says kernels.h; what the codes mean says portable C, whose
 * numbers these functions give bit for bit.
 *
 * A vector holds a dword of each of W rows. So the transpose comes first, on packed dwords, and every operation then
 * takes four columns of W rows apart at once. Nothing here is specific to a machine: and, or, shift, add and multiply
 * are C on vector types, all else is in tile_vec.h. Blocks of 32 and types with separate scales are here,
 * super-blocks in tile_k.h. */
#ifndef KT_TILE_IMPL_H
#define KT_TILE_IMPL_H

#include "../formats/iq_tables.h"
#include "../kernels.h"

typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint8_t vec8 __attribute__((vector_size(4 * W)));

#define LOW4 0x0f0f0f0fu

INLINE void put(const struct kt_tile *to, int dword, vec v) { store(to->data + dword * KT_TILE, v); }
INLINE void put_scale(const struct kt_tile *to, int group, fvec f) { store_f(to->scales + group * KT_TILE, f); }
INLINE void put_min(const struct kt_tile *to, int group, fvec f) { store_f(to->mins + group * KT_TILE, f); }

INLINE vec byte_of(vec v, const int i) { return i == 3 ? v >> 24 : v >> 8 * i & 255; }
INLINE vec signed_byte_of(vec v, const int i) { return (vec)((ivec)(v << (24 - 8 * i)) >> 24); }
INLINE vec high_nibbles(vec v) { return v >> 4 & LOW4; }

/* The dword that starts `off` bytes into dwords w. */
INLINE vec dword_in(const vec *w, const int off) {
    const int i = off / 4, bits = off % 4 * 8;
    return bits ? w[i] >> bits | w[i + 1] << (32 - bits) : w[i];
}
INLINE fvec half_in(const vec *w, const int off) { return halves(w[off / 4], off % 4 == 2); }

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

/* How a format's blocks lie in a row, and what one of them leaves in a tile. */
struct block {
    int columns, bytes, groups, min_groups;
    int head, run; /* of small blocks, see tile_small */
};

/* Unpacks the block that starts at `at` of W rows. */
typedef void (*block_fn)(const struct rows *rows, size_t at, const struct kt_tile *to);

/* Unpacks a small block: w are the dwords in which it begins, `off` bytes into the first; v are those of its codes. */
typedef void (*codes_fn)(const struct kt_tile *to, const vec *w, const int off, const vec *v);

/* W of the 16 rows that a tile function is called for. */
struct part {
    struct rows rows;
    struct kt_tile to;
    size_t at; /* of the rows: how far they are unpacked */
};

INLINE struct part part_of(const struct block f, const struct kt_matrix *w, int64_t first, int64_t k0,
                           const struct kt_tile *out, int r) {
    const size_t begin = (size_t)(first + r) * w->stride + (size_t)(k0 / f.columns * f.bytes);
    const struct kt_tile to = {out->data + r, out->scales + r, out->mins + r, out->ahead};
    return (struct part){rows_of(w->data + begin, w->stride), to, 0};
}

INLINE void advance(const struct block f, const int blocks, struct part *p) {
    p->at += (size_t)(blocks * f.bytes);
    p->to.data += blocks * f.columns / 4 * KT_TILE;
    p->to.scales += blocks * f.groups * KT_TILE;
    p->to.mins += blocks * f.min_groups * KT_TILE;
}

INLINE void look_ahead(const struct kt_tile *out) {
    if (out->ahead) kt_ahead_step(out->ahead);
}

INLINE void tile_blocks(const struct block f, block_fn unpack, const struct kt_matrix *w, int64_t first, int64_t k0,
                        int64_t n, const struct kt_tile *out) {
    for (int r = 0; r < KT_TILE; r += W) {
        struct part p = part_of(f, w, first, k0, out, r);
        for (int64_t i = 0; i < n / f.columns; i++, advance(f, 1, &p)) {
            if (i * f.columns % KT_AHEAD_COLS == 0) look_ahead(out);
            unpack(&p.rows, p.at, &p.to);
        }
    }
}

/* One block by itself: its codes, `head` bytes into it, are loaded as dwords wherever they lie. */
INLINE void one_small(const struct block f, codes_fn codes, const struct part *p) {
    vec w[4], v[8];
    columns4(&p->rows, p->at, w);
#pragma GCC unroll 2
    for (int i = 0; i < f.bytes / 16; i++) columns4(&p->rows, p->at + (size_t)(f.head + 16 * i), v + 4 * i);
    codes(&p->to, w, 0, v);
}

/* `run` blocks without a gap, each byte loaded once, in pieces of 16 bytes. Codes that do not begin on a dword are
 * moved: 3 operations for 4 columns of W rows, less than what loading them twice costs. */
INLINE void run_small(const struct block f, codes_fn codes, struct part p) {
    const int bytes = f.run * f.bytes;
    vec w[72], v[8];
#pragma GCC unroll 8
    for (int g = 0; g < f.run; g++) {
        const int begin = g * f.bytes, end = begin + f.bytes;
#pragma GCC unroll 18
        for (int i = 0; i < (bytes + 15) / 16; i++)
            if (16 * i >= begin && 16 * i < end) {
                const int over = (16 * i + 16 - bytes) / 4; /* dwords of the last piece that lie after the run */
                columns4(&p.rows, p.at + (size_t)(over > 0 ? bytes - 16 : 16 * i), w + 4 * i);
                for (int j = 0; j < 4 - over && over > 0; j++) w[4 * i + j] = w[4 * i + j + over];
            }
#pragma GCC unroll 8
        for (int j = 0; j < (f.bytes - f.head) / 4; j++) v[j] = dword_in(w, begin + f.head + 4 * j);
        codes(&p.to, w + begin / 4, begin % 4, v);
        advance((struct block){f.columns, 0, f.groups, f.min_groups, 0, 0}, 1, &p);
    }
}

INLINE void tile_small(const struct block f, codes_fn codes, const struct kt_matrix *w, int64_t first, int64_t k0,
                       int64_t n, const struct kt_tile *out) {
    for (int r = 0; r < KT_TILE; r += W) {
        struct part p = part_of(f, w, first, k0, out, r);
        int64_t i = n / f.columns;
        for (; i >= f.run; i -= f.run, advance(f, f.run, &p)) {
            if ((i - n / f.columns) * f.columns % KT_AHEAD_COLS == 0) look_ahead(out);
            run_small(f, codes, p);
        }
        for (; i > 0; i--, advance(f, 1, &p)) one_small(f, codes, &p);
    }
}

#define TILE_FN(name) \
    static void tile_##name(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out)
#define TILE_BLOCKS(name, ...) \
    TILE_FN(name) { tile_blocks((struct block){__VA_ARGS__, 0, 0}, name##_block, w, first, k0, n, out); }
#define TILE_SMALL(name, ...) \
    TILE_FN(name) { tile_small((struct block){__VA_ARGS__}, name##_codes, w, first, k0, n, out); }

/* ---- blocks of 32: low nibbles are columns 0 .. 15, high ones 16 .. 31 ------------------------------- */

INLINE void q4_0_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    put_scale(to, 0, half_in(w, off));
    for (int j = 0; j < 4; j++) {
        put(to, j, v[j] & LOW4);
        put(to, 4 + j, high_nibbles(v[j]));
    }
}
TILE_SMALL(q4_0, 32, 18, 1, 0, 2, 8)

INLINE void put_scale_and_min(const struct kt_tile *to, vec header) {
    put_scale(to, 0, halves(header, 0));
    put_min(to, 0, -halves(header, 1));
}

INLINE void q4_1_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    (void)off; /* always 0 */
    put_scale_and_min(to, w[0]);
    for (int j = 0; j < 4; j++) {
        put(to, j, v[j] & LOW4);
        put(to, 4 + j, high_nibbles(v[j]));
    }
}
TILE_SMALL(q4_1, 32, 20, 1, 1, 4, 4)

/* 16 in byte i where bit 4*j + i is set: its byte four times, one bit of each, whatever that bit is worth. */
INLINE vec fifth_bits(vec bits, const int j) {
    const uint32_t k = j / 2;
    vec four = shuffle8(j & 1 ? bits : bits << 4, 0x01010101 * LANES(k, 4 + k, 8 + k, 12 + k));
    return min8(four & 0x80402010, 0x10101010 + (vec){0});
}

INLINE void put_five_bits(const struct kt_tile *to, const vec *v, vec bits) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        put(to, j, (v[j] & LOW4) | fifth_bits(bits, j));
        put(to, 4 + j, high_nibbles(v[j]) | fifth_bits(bits, 4 + j));
    }
}

INLINE void q5_0_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    put_scale(to, 0, half_in(w, off));
    put_five_bits(to, v, dword_in(w, off + 2));
}
TILE_SMALL(q5_0, 32, 22, 1, 0, 6, 8)

INLINE void q5_1_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    (void)off; /* always 0 */
    put_scale_and_min(to, w[0]);
    put_five_bits(to, v, w[1]);
}
TILE_SMALL(q5_1, 32, 24, 1, 1, 8, 2)

INLINE void q8_0_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    put_scale(to, 0, half_in(w, off));
    for (int j = 0; j < 8; j++) put(to, j, v[j] ^ 0x80808080);
}
TILE_SMALL(q8_0, 32, 34, 1, 0, 2, 8)

/* 16 bytes of nibbles that choose a code from a table. */
INLINE void put_chosen(const struct kt_tile *to, const vec *v, const uint8_t codes[16]) {
    const vec table = table16(codes);
    for (int j = 0; j < 4; j++) {
        put(to, j, shuffle8(table, v[j] & LOW4));
        put(to, 4 + j, shuffle8(table, high_nibbles(v[j])));
    }
}

INLINE void iq4_nl_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    put_scale(to, 0, half_in(w, off));
    put_chosen(to, v, kt_iq4_codes);
}
TILE_SMALL(iq4_nl, 32, 18, 1, 0, 2, 8)

/* kt_e8m0_half */
INLINE fvec e8m0_half(vec e) { return (fvec)larger((e << 23) - 0x00800000, (e << 21) + 0x00200000); }

INLINE void mxfp4_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    put_scale(to, 0, e8m0_half(byte_of(w[0], off)));
    put_chosen(to, v, kt_fp4_codes);
}
TILE_SMALL(mxfp4, 32, 17, 1, 0, 1, 8)

/* 16 columns take two dwords: low nibbles are columns 0 .. 7. Scales are kt_ue4m3_half: as fp16 the same bits mean 2^-8
 * of an e4m3. */
INLINE void nvfp4_codes(const struct kt_tile *to, const vec *w, const int off, const vec *v) {
    (void)off; /* always 0 */
    const vec table = table16(kt_fp4_codes), scales = w[0] & (vec)((vec8)w[0] != 127);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        put_scale(to, g, halves((g ? scales >> (8 * g - 7) : scales << 7) & 0x3f80, 0) * 128.0f);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            put(to, 4 * g + j, shuffle8(table, v[2 * g + j] & LOW4));
            put(to, 4 * g + 2 + j, shuffle8(table, high_nibbles(v[2 * g + j])));
        }
    }
}
TILE_SMALL(nvfp4, 64, 36, 4, 0, 4, 4)

/* ---- types with separate scales: only codes, column after column ----------------------------- */

/* 32 bytes, moved from signed to unsigned where `flip`. */
INLINE void put_bytes(const struct rows *rows, size_t at, const uint32_t flip, const struct kt_tile *to) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        vec v[4];
        columns4(rows, at + 16 * i, v);
        for (int j = 0; j < 4; j++) put(to, 4 * i + j, v[j] ^ flip);
    }
}

INLINE void i8_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    put_bytes(rows, at, 0x80808080, to);
}
TILE_BLOCKS(i8, 32, 32, 0, 0)

INLINE void u8_block(const struct rows *rows, size_t at, const struct kt_tile *to) { put_bytes(rows, at, 0, to); }
TILE_BLOCKS(u8, 32, 32, 0, 0)

/* The four nibbles of the low (0) or high (1) half of a dword, a byte each: bytes spread to 16 bits, then to 8. */
INLINE vec four_nibbles(vec v, const int high) {
    const uint32_t k = high ? 0x80038002 : 0x80018000;
    vec two = shuffle8(v, LANES(k, k + 0x00040004, k + 0x00080008, k + 0x000c000c));
    return (two | two << 4) & LOW4;
}

INLINE void i4_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    vec v[4];
    columns4(rows, at, v);
    for (int j = 0; j < 4; j++) {
        put(to, 2 * j, four_nibbles(v[j], 0));
        put(to, 2 * j + 1, four_nibbles(v[j], 1));
    }
}
TILE_BLOCKS(i4, 32, 16, 0, 0)

INLINE void f4_e2m1_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const vec table = table16(kt_fp4_codes);
    vec v[4];
    columns4(rows, at, v);
    for (int j = 0; j < 4; j++) {
        put(to, 2 * j, shuffle8(table, four_nibbles(v[j], 0)));
        put(to, 2 * j + 1, shuffle8(table, four_nibbles(v[j], 1)));
    }
}
TILE_BLOCKS(f4_e2m1, 32, 16, 0, 0)

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

/* The byte, of eight, that holds a row of an AWQ line: nibbles are rows 0, 2, 4, 6, 1, 3, 5, 7, then 8, 10 .. 15. */
#define AWQ_BYTE(r) (r) / 8 * 4 + (r) % 2 * 2 + (r) % 8 / 4
#define AWQ_BYTES(r) AWQ_BYTE(r), AWQ_BYTE(r + 1), AWQ_BYTE(r + 2), AWQ_BYTE(r + 3)
static const uint32_t awq_bytes[KT_TILE] = {AWQ_BYTES(0), AWQ_BYTES(4), AWQ_BYTES(8), AWQ_BYTES(12)};

/* A line is one column, half a byte a row. The bytes of four lines that hold a row come into its dword; of rows 2, 3,
 * 6, 7 .. the upper nibbles count. */
static void tile_awq4(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out) {
    const vec upper = LANES(0, 0, 4, 4);
    const size_t stride = w->stride;
    const uint8_t *line = w->data + (size_t)k0 * stride + (size_t)first / 2;
    uint32_t *data = out->data;
    vec low[KT_TILE / W], high[KT_TILE / W];
    for (int i = 0; i < KT_TILE / W; i++) {
        low[i] = 0x0101 * load(awq_bytes + i * W) + 0x80800800;
        high[i] = low[i] << 16 | low[i] >> 16;
    }
    for (int64_t k = 0; k < n; k += 4, line += 4 * stride, data += KT_TILE) {
        const vec a = two_times8(line, line + stride), b = two_times8(line + 2 * stride, line + 3 * stride);
        for (int i = 0; i < KT_TILE / W; i++)
            store(data + i * W, (shuffle8(a, low[i]) | shuffle8(b, high[i])) >> upper & LOW4);
    }
}

#endif
