/* Tiles of IQ1, IQ2 and IQ3 for AVX-512 (F, BW, VL, DQ). Compiled a second time with VBMI and GFNI by ../avx512_vbmi.
 *
 * A vector holds a dword of each of 16 rows. Four indices are the bytes of a dword, so one vector has 64 of them, and
 * their points come as two vectors (iq_grid.h). A dword of codes, four columns of a row, is spread from one byte of a
 * point (three levels, 2 bits each) or from two (eight levels, two of 3 bits in each), where the tile wants it. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "iq_grid.h"
#include "tile_vec.h"

/* ---- signs ------------------------------------------------------------------------------------------ */

/* The signs of 32 columns of each row. */
struct signs {
#if IQ_VBMI
    __m512i even, odd; /* in bit 3 - n of byte b: that of column 8 * n + b, of column 8 * n + 4 + b */
#else
    __m512i bits; /* of column c: bit c */
#endif
};

/* From the bits `low` and up of each byte: eight of them, or seven and one that makes the number of ones even. */
INLINE struct signs signs_of(__m512i x, const int count, const int low) {
#if IQ_VBMI
    /* A product of bit matrices. Bit i of a byte is the parity of what one byte, here, picks from byte 7 - i there. */
    const uint32_t even = 0x08040201u << low, last = (count == 8 ? 0x80u : 0x7fu) << low;
    const uint32_t odd = (0x00402010u << low) | last << 24;
    const __m512i right = _mm512_set1_epi64(4); /* even rows, the low dwords, come from bytes 0 .. 3 */
    return (struct signs){_mm512_srlv_epi32(_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi32((int)even), x, 0), right),
                          _mm512_srlv_epi32(_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi32((int)odd), x, 0), right)};
#else
    return (struct signs){count == 8 ? x : even_signs(x, low)};
#endif
}

/* ---- codes of columns 4 * n .. + 3 ------------------------------------------------------------------- */

#if !IQ_VBMI
/* Byte b of each dword, in all of its bytes. */
INLINE __m512i all_bytes(__m512i v, const int b) {
    const __m512i dwords = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm512_shuffle_epi8(v, _mm512_add_epi8(dwords, bytes(b)));
}

INLINE __m512i signed_codes(__m512i m, struct signs s, const int n, const int zero) {
    __mmask64 minus =
        _mm512_test_epi8_mask(all_bytes(s.bits, n / 2), _mm512_set1_epi32(n & 1 ? (int)0x80402010 : 0x08040201));
    return _mm512_mask_sub_epi8(_mm512_add_epi8(bytes(zero), m), minus, bytes(zero), m);
}
#endif

/* IQ2: byte b of each dword is four levels of 2 bits. */
INLINE __m512i iq2_codes(__m512i levels, const int b, struct signs s, const int n) {
#if IQ_VBMI
    static const _Alignas(64) uint8_t table[4][64] = {T64(IQ2_CODE, 4, 3), T64(IQ2_CODE, 4, 2), T64(IQ2_CODE, 4, 1),
                                                      T64(IQ2_CODE, 4, 0)};
    __m512i v = merge(bytes(15), n & 1 ? s.odd : s.even, fields(levels, 8 * b - 4, 2));
    return _mm512_permutexvar_epi8(v, _mm512_load_si512(table[n / 2]));
#else /* levels 0 and 1 from the low nibble, 2 and 3 from the high one; an odd one lies in the nibble's upper bits */
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(8, 25, 43, 0, 25, 0, 0, 0, 43, 0, 0, 0, 0, 0, 0, 0));
    __m512i nibbles = _mm512_srlv_epi16(all_bytes(levels, b), _mm512_set1_epi32(4 << 16));
    return signed_codes(_mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, _mm512_set1_epi16(0x0c03))), s, n, 43);
#endif
}

/* IQ3: two levels of 3 bits in byte b of each dword of p.low become bytes 0 and 1, those of p.high bytes 2 and 3. */
struct levels8 {
    uint8_t codes[16]; /* of 2 * level + sign */
    uint8_t magnitudes[16];
    int zero;
};
#define MAGNITUDE(l, LEVEL) LEVEL((l) & 7)
static const struct levels8 iq3_xxs = {{T16(IQ3_XXS_CODE, 0, 1, 0)}, {T16(MAGNITUDE, 0, IQ3_XXS_LEVEL)}, 62};
static const struct levels8 iq3_s = {{T16(IQ3_S_CODE, 0, 1, 0)}, {T16(MAGNITUDE, 0, IQ3_S_LEVEL)}, 15};

INLINE __m512i iq3_codes(struct points p, const int b, struct signs s, const int n, const struct levels8 *t) {
    const __mmask64 second = 0xcccccccccccccccc;
#if IQ_VBMI
    __m512i v =
        _mm512_mask_multishift_epi64_epi8(fields(p.low, 8 * b - 1, 3), second, bit_numbers(8 * b - 7, 3), p.high);
    v = merge(bytes(1), _mm512_srli_epi32(n & 1 ? s.odd : s.even, (unsigned)(3 - n / 2)), v);
    /* What is above four bits does not count */
    return _mm512_permutexvar_epi8(v, _mm512_broadcast_i32x4(load128(t->codes)));
#else
    __m512i twice = _mm512_mask_blend_epi8(second, all_bytes(p.low, b), all_bytes(p.high, b));
    __m512i v = _mm512_and_si512(merge(_mm512_set1_epi16(255), twice, shift_right(twice, 3)), bytes(7));
    return signed_codes(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(t->magnitudes)), v), s, n, t->zero);
#endif
}

/* IQ1: eight times the levels of byte b of each dword, plus `shift`: 2 where 1/8 is added, 0 where it is subtracted. */
INLINE __m512i iq1_codes(__m512i levels, const int b, __m512i shift) {
    return _mm512_or_si512(_mm512_and_si512(fields(levels, 8 * b - 3, 2), bytes(24)), shift);
}

/* ---- rows ------------------------------------------------------------------------------------------- */

/* v[i] = dword i of the 32 bytes at `at` of each row. */
INLINE void columns8(const struct rows *rows, size_t at, __m512i v[8]) {
    __m512i t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const int r = i / 4 * 8 + i % 4;
        t[i] = _mm512_castsi256_si512(load256(row_at(rows, r, at)));
        t[i] = _mm512_inserti64x4(t[i], load256(row_at(rows, r + 4, at)), 1);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* 4 x 4 dwords in each 128-bit lane */
        __m512i a = _mm512_unpacklo_epi32(t[i], t[i + 1]), b = _mm512_unpackhi_epi32(t[i], t[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(t[i + 2], t[i + 3]), d = _mm512_unpackhi_epi32(t[i + 2], t[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    }
}

INLINE void dwords4(const struct rows *rows, size_t at, __m512i v[4]) {
    vec t[4];
    columns4(rows, at, t);
    for (int i = 0; i < 4; i++) v[i] = (__m512i)t[i];
}

/* The fp16 number that begins each block. */
INLINE __m512 scale_of_block(const struct rows *rows, size_t at) {
    vec v[4];
    columns4(rows, at, v);
    return (__m512)halves(v[0], 0);
}

INLINE void put(const struct kt_tile *to, const int dword, __m512i v) {
    _mm512_store_si512(to->data + dword * KT_TILE, v);
}

/* d times what the bits of n from `first` on stand for. */
INLINE void put_scale(const struct kt_tile *to, const int group, __m512 d, __m512 table, __m512i n, const int first) {
    const __m512 scale = _mm512_permutexvar_ps(_mm512_srli_epi32(n, (unsigned)first), table);
    _mm512_store_ps(to->scales + group * KT_TILE, _mm512_mul_ps(d, scale));
}

#define TILE(name, bytes)                                                                        \
    static void tile_##name(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n,     \
                             const struct kt_tile *out) {                                        \
        const uint8_t *p = w->data + (size_t)first * w->stride + (size_t)(k0 / KT_QK * (bytes)); \
        const struct rows rows = rows_of(p, w->stride);                                          \
        struct kt_tile to = *out;                                                                \
        for (int64_t at = 0; at < n / KT_QK * (bytes); at += (bytes)) {                          \
            name##_block(&rows, (size_t)at, &to);                                                \
            to.data += KT_QK / 4 * KT_TILE;                                                      \
            to.scales += KT_QK / w->traits->group * KT_TILE;                                     \
        }                                                                                        \
    }

/* ---- IQ2 --------------------------------------------------------------------------------------------- */

/* Group g of 32 columns, four points. `crossed`: bytes 1 and 2 are points 2 and 1. */
INLINE void put_iq2(const struct kt_tile *to, const int g, struct points p, struct signs s, const int crossed) {
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) {
        const int b = crossed && (n / 2 == 1 || n / 2 == 2) ? 3 - n / 2 : n / 2;
        put(to, 8 * g + n, iq2_codes(n & 1 ? p.high : p.low, b, s, 2 * b + (n & 1)));
    }
}

INLINE void iq2_xxs_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const __m512 d = scale_of_block(rows, at), table = scale_table(0.25f, 0.125f, 16);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512i v[8]; /* indices, then four times seven signs and a scale */
        columns8(rows, at + 2 + 32 * h, v);
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            const __m512i index[2] = {v[2 * i], v[2 * i + 2]}, rest[2] = {v[2 * i + 1], v[2 * i + 3]};
            struct points p[2];
            points_iq2_xxs(2, index, index, p);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                put_scale(to, 4 * h + i + j, d, table, rest[j], 28);
                put_iq2(to, 4 * h + i + j, p[j], signs_of(fields(rest[j], 0, 7), 7, 0), 0);
            }
        }
    }
}
TILE(iq2_xxs, 66)

/* Sixteen nibbles. */
INLINE void put_scales(const struct kt_tile *to, __m512 d, __m512 table, const __m512i n[2]) {
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) put_scale(to, g, d, table, n[g / 8], 4 * (g % 8));
}

/* Two dwords are four words, each of 9 bits of an index and 7 of signs. */
INLINE void iq2_xs_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const __m512i low = _mm512_set1_epi16(255);
    __m512i last[4];
    dwords4(rows, at + 58, last);
    put_scales(to, scale_of_block(rows, at), scale_table(0.25f, 0.125f, 16), last + 2);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512i v[8];
        columns8(rows, at + 2 + 32 * h, v);
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            __m512i index[2], upper[2];
            struct points p[2];
            for (int j = 0; j < 2; j++) { /* points 0, 2, 1, 3 */
                index[j] = merge(low, v[2 * (i + j)], shift_left(v[2 * (i + j) + 1], 8));
                upper[j] = merge(low, shift_right(v[2 * (i + j)], 8), v[2 * (i + j) + 1]);
            }
            points_iq2_xs(2, index, upper, p);
            for (int j = 0; j < 2; j++) put_iq2(to, 4 * h + i + j, p[j], signs_of(upper[j], 7, 1), 1);
        }
    }
}
TILE(iq2_xs, 74)

INLINE void iq2_s_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    __m512i v[8], signs[8], last[4]; /* upper bits of indices, scales */
    columns8(rows, at + 2, v);
    columns8(rows, at + 34, signs);
    dwords4(rows, at + 66, last);
    put_scales(to, scale_of_block(rows, at), scale_table(0.25f, 0.125f, 16), last + 2);
#pragma GCC unroll 4
    for (int g = 0; g < 8; g += 2) {
        const __m512i upper[2] = {fields(last[g / 4], 8 * (g % 4), 2), fields(last[g / 4], 8 * (g % 4) + 8, 2)};
        struct points p[2];
        points_iq2_s(2, v + g, upper, p);
        for (int j = 0; j < 2; j++) put_iq2(to, g + j, p[j], signs_of(signs[g + j], 8, 0), 0);
    }
}
TILE(iq2_s, 82)

/* ---- IQ3 --------------------------------------------------------------------------------------------- */

/* Group g of 32 columns, two times four points. */
INLINE void put_iq3(const struct kt_tile *to, const int g, const struct points p[2], struct signs s,
                    const struct levels8 *t) {
#pragma GCC unroll 8
    for (int n = 0; n < 8; n++) put(to, 8 * g + n, iq3_codes(p[n / 4], n % 4, s, n, t));
}

INLINE void iq3_xxs_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const __m512 d = scale_of_block(rows, at), table = scale_table(0.5f, 0.25f, 16);
    __m512i rest[8]; /* four times seven signs and a scale */
    columns8(rows, at + 66, rest);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512i v[8];
        columns8(rows, at + 2 + 32 * h, v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i x = rest[4 * h + i];
            struct points p[2];
            points_iq3_xxs(2, v + 2 * i, v, p);
            put_scale(to, 4 * h + i, d, table, x, 28);
            put_iq3(to, 4 * h + i, p, signs_of(fields(x, 0, 7), 7, 0), &iq3_xxs);
        }
    }
}
TILE(iq3_xxs, 98)

INLINE void iq3_s_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const __m512 d = scale_of_block(rows, at), table = scale_table(2.0f, 1.0f, 16);
    __m512i ninth[4], signs[8], last[4];
    dwords4(rows, at + 66, ninth); /* ninth bits of indices, then signs */
    columns8(rows, at + 74, signs);
    dwords4(rows, at + 94, last); /* its last dword: scales */
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512i v[8];
        columns8(rows, at + 2 + 32 * h, v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i upper[2] = {fields(ninth[h], 8 * i, 1), fields(ninth[h], 8 * i + 4, 1)};
            struct points p[2];
            points_iq3_s(2, v + 2 * i, upper, p);
            put_scale(to, 4 * h + i, d, table, last[3], 16 * h + 4 * i);
            put_iq3(to, 4 * h + i, p, signs_of(signs[4 * h + i], 8, 0), &iq3_s);
        }
    }
}
TILE(iq3_s, 110)

/* ---- IQ1 --------------------------------------------------------------------------------------------- */

/* 2, or 0 where bit `bit` of a dword is set. */
INLINE __m512i two_unless(__m512i x, const int bit) {
    return _mm512_mask_set1_epi32(bytes(2), _mm512_test_epi32_mask(x, _mm512_set1_epi32((int)(1u << bit))), 0);
}

/* A word a group: three upper bits of 4 indices, scale, sign of 1/8. */
INLINE void iq1_s_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const __m512 d = scale_of_block(rows, at), table = scale_table(0.25f, 0.125f, 8);
    __m512i v[8], words[4];
    columns8(rows, at + 2, v);
    dwords4(rows, at + 34, words);
#pragma GCC unroll 4
    for (int g = 0; g < 8; g += 2) {
        const __m512i x = words[g / 2], upper[2] = {fields(x, -4, 3), fields(x, 12, 3)};
        struct points p[2];
        points_iq1(2, v + g, upper, p);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512i shift = two_unless(x, 16 * j + 15);
            put_scale(to, g + j, d, table, x, 16 * j + 12);
#pragma GCC unroll 8
            for (int n = 0; n < 8; n++) put(to, 8 * (g + j) + n, iq1_codes(n & 1 ? p[j].high : p[j].low, n / 2, shift));
        }
    }
}
TILE(iq1_s, 50)

/* kt_iq1_m_scale, of four words in two dwords. */
INLINE __m512 iq1_m_scale(__m512i a, __m512i b) {
    __m512i low = merge(_mm512_set1_epi32(0xf), _mm512_srli_epi32(a, 12), _mm512_srli_epi32(a, 24));
    __m512i high = merge(_mm512_set1_epi32(0xfff), _mm512_srli_epi32(b, 4), _mm512_srli_epi32(b, 16));
    return (__m512)halves((vec)merge(_mm512_set1_epi32(0xff), low, high), 0);
}

/* A nibble an index: its three upper bits, sign of 1/8. Four words with four scales of 3 bits and a nibble of d
 * each. */
INLINE void iq1_m_block(const struct rows *rows, size_t at, const struct kt_tile *to) {
    const __m512 table = scale_table(0.25f, 0.125f, 8);
    __m512i v[8], nibbles[4], last[4];
    dwords4(rows, at + 40, last);
    const __m512 d = iq1_m_scale(last[2], last[3]);
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) put_scale(to, g, d, table, last[2 + g / 8], g % 8 / 4 * 16 + 3 * (g % 4));
    columns8(rows, at, v);
    dwords4(rows, at + 32, nibbles);
#pragma GCC unroll 4
    for (int g = 0; g < 8; g += 2) {
        const __m512i x = nibbles[g / 2], upper[2] = {fields(x, -4, 4), fields(x, 12, 4)};
        struct points p[2];
        points_iq1(2, v + g, upper, p);
#pragma GCC unroll 8
        for (int b = 0; b < 8; b++) { /* point b % 4 of group g + b / 4 */
            const __m512i shift = two_unless(x, 4 * b + 3);
            put(to, 8 * g + 2 * b, iq1_codes(p[b / 4].low, b % 4, shift));
            put(to, 8 * g + 2 * b + 1, iq1_codes(p[b / 4].high, b % 4, shift));
        }
    }
}
TILE(iq1_m, 56)

void KT_JOIN(kt_fill_iq_tile_, KT_ISA)(struct kt_kernels *k) {
    k->tile[KT_FMT_IQ1_S] = tile_iq1_s;
    k->tile[KT_FMT_IQ1_M] = tile_iq1_m;
    k->tile[KT_FMT_IQ2_XXS] = tile_iq2_xxs;
    k->tile[KT_FMT_IQ2_XS] = tile_iq2_xs;
    k->tile[KT_FMT_IQ2_S] = tile_iq2_s;
    k->tile[KT_FMT_IQ3_XXS] = tile_iq3_xxs;
    k->tile[KT_FMT_IQ3_S] = tile_iq3_s;
}
