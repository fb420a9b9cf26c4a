/* iq_grid.h: points of the IQ grids (../iq_tables.h) for AVX-512, 64 at a time, and the bits around them. Where there
 * are byte permutes (VBMI: IQ_VBMI) a grid is looked up in registers as bytes, else as words. Static inline only. */
#ifndef KT_AVX512_IQ_GRID_H
#define KT_AVX512_IQ_GRID_H

#include "../formats/iq_tables.h"
#include "common.h"

#if defined(__AVX512VBMI__) && defined(__GFNI__)
#define IQ_VBMI 1
#else
#define IQ_VBMI 0
#endif

/* Bits of `a` where those of m are set, else of b. */
INLINE __m512i merge(__m512i m, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(b, a, m, 0xd8); }

INLINE __m512i bytes(const int x) { return _mm512_set1_epi8((char)x); }
INLINE __m512i shift_left(__m512i v, const int n) { return _mm512_slli_epi16(v, (unsigned)n); }   /* bits cross bytes */
INLINE __m512i shift_right(__m512i v, const int n) { return _mm512_srli_epi16(v, (unsigned)n); }

#if IQ_VBMI
/* For byte b of a dword: bit first + step * b of it, as a qword of two dwords counts bits. */
INLINE __m512i bit_numbers(const int first, const int step) {
    const uint64_t low = (uint64_t)(first & 63) | (uint64_t)((first + step) & 63) << 8 |
                         (uint64_t)((first + 2 * step) & 63) << 16 | (uint64_t)((first + 3 * step) & 63) << 24;
    return _mm512_set1_epi64((int64_t)(low | (low ^ 0x20202020u) << 32));
}
#endif

/* Byte b of each dword: bits first + step * b and up of the dword. What lies past a field's own bits is undefined. */
INLINE __m512i fields(__m512i x, const int first, const int step) {
#if IQ_VBMI
    return _mm512_multishift_epi64_epi8(bit_numbers(first, step), x);
#else
    __m512i v = x;
    for (int b = 0; b < 4; b++) {
        const int right = first + step * b - 8 * b;
        __m512i moved = right >= 0 ? _mm512_srli_epi32(x, (unsigned)right) : _mm512_slli_epi32(x, (unsigned)-right);
        v = b ? merge(_mm512_set1_epi32((int)(255u << 8 * b)), moved, v) : moved;
    }
    return v;
#endif
}

/* What the low four bits of each dword stand for: step * n + half for n of `count`, a power of two. */
INLINE __m512 scale_table(const float step, const float half, const int count) {
    float t[16];
    for (int n = 0; n < 16; n++) t[n] = step * (float)(n % count) + half;
    return _mm512_loadu_ps(t);
}

/* ---- points ------------------------------------------------------------------------------------------ */

/* The first and the second bytes of the points that 64 indices name. */
struct points {
    __m512i low, high;
};

/* points_NAME(count, index, upper, out): one or two vectors of indices, which share the registers of the table. index:
 * the low eight bits; upper: those from bit 8 on, beginning at bit 0 of a byte (IQ1: at bit 4), anything above. */
#if IQ_VBMI
/* m: bits 7, 8 .. of the indices. */
typedef const __mmask64 masks[2][4];

INLINE void table7(const uint8_t *t, const int count, const __m512i *i, masks m, __m512i out[2]) {
    (void)m;
    const __m512i low = _mm512_load_si512(t), high = _mm512_load_si512(t + 64);
    for (int n = 0; n < count; n++) out[n] = _mm512_permutex2var_epi8(low, i[n], high);
}
#define TABLE(bits, half)                                                                                    \
    INLINE void table##bits(const uint8_t *t, const int count, const __m512i *i, masks m, __m512i out[2]) {  \
        __m512i low[2], high[2];                                                                             \
        table##half(t, count, i, m, low);                                                                    \
        table##half(t + (1 << (half)), count, i, m, high);                                                   \
        for (int n = 0; n < count; n++) out[n] = _mm512_mask_blend_epi8(m[n][(half)-7], low[n], high[n]);    \
    }
TABLE(8, 7)
TABLE(9, 8)
TABLE(10, 9)
TABLE(11, 10)
#undef TABLE

INLINE void index_masks(const int count, const __m512i *index, const __m512i *upper, const int at, __mmask64 m[2][4]) {
    for (int n = 0; n < count; n++) {
        m[n][0] = _mm512_movepi8_mask(index[n]);
        for (int i = 0; i < 3; i++) m[n][1 + i] = _mm512_test_epi8_mask(upper[n], bytes(1 << (at + i)));
    }
}

#define GRID(name, bits)                                                                                         \
    INLINE void points_##name(const int count, const __m512i *index, const __m512i *upper, struct points *out) { \
        __mmask64 m[2][4];                                                                                       \
        __m512i low[2], high[2];                                                                                 \
        index_masks(count, index, upper, 0, m);                                                                  \
        table##bits(kt_##name##_bytes[0], count, index, m, low);                                                 \
        table##bits(kt_##name##_bytes[1], count, index, m, high);                                                \
        for (int n = 0; n < count; n++) out[n] = (struct points){low[n], high[n]};                               \
    }

/* kt_iq1_high: sixteen points in a row have one or two second bytes. */
INLINE void points_iq1(const int count, const __m512i *index, const __m512i *upper, struct points *out) {
    __m512i sixteen[2], step[2], first[2], last[2], low[2];
    __mmask64 m[2][4];
    for (int n = 0; n < count; n++) sixteen[n] = merge(bytes(15), shift_right(index[n], 4), upper[n]);
    table7(kt_iq1_step, count, sixteen, m, step);
    table7(kt_iq1_high[0], count, sixteen, m, first);
    table7(kt_iq1_high[1], count, sixteen, m, last);
    for (int n = 0; n < count; n++) {
        __mmask64 past = _mm512_cmpge_epu8_mask(_mm512_and_si512(index[n], bytes(15)), step[n]);
        out[n].high = _mm512_mask_blend_epi8(past, first[n], last[n]);
    }
    index_masks(count, index, upper, 4, m);
    table11(kt_iq1_low, count, index, m, low);
    for (int n = 0; n < count; n++) out[n].low = low[n];
}
#else
/* Word i of a table of 64, 128 .. entries. */
INLINE __m512i table6(const uint16_t *t, __m512i i) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(t), i, _mm512_load_si512(t + 32));
}
#define TABLE(bits, half)                                                                                    \
    INLINE __m512i table##bits(const uint16_t *t, __m512i i) {                                               \
        __mmask32 m = _mm512_test_epi16_mask(i, _mm512_set1_epi16(1 << (half)));                             \
        return _mm512_mask_blend_epi16(m, table##half(t, i), table##half(t + (1 << (half)), i));             \
    }
TABLE(7, 6)
TABLE(8, 7)
TABLE(9, 8)
TABLE(10, 9)
TABLE(11, 10)
#undef TABLE

/* The even and the odd indices as words. */
INLINE __m512i even_index(__m512i index, __m512i upper, const int at) {
    return merge(_mm512_set1_epi16(255), index, shift_left(upper, 8 - at));
}
INLINE __m512i odd_index(__m512i index, __m512i upper, const int at) {
    return merge(_mm512_set1_epi16(255), shift_right(index, 8), at ? shift_right(upper, at) : upper);
}

#define GRID_AT(name, bits, at)                                                                                        \
    INLINE void points_##name(const int count, const __m512i *index, const __m512i *upper, struct points *out) {       \
        const __m512i byte = _mm512_set1_epi16(255);                                                                   \
        for (int n = 0; n < count; n++) {                                                                              \
            __m512i even = table##bits(kt_##name##_packed, even_index(index[n], upper[n], at));                        \
            __m512i odd = table##bits(kt_##name##_packed, odd_index(index[n], upper[n], at));                          \
            out[n] = (struct points){merge(byte, even, shift_left(odd, 8)), merge(byte, shift_right(even, 8), odd)};   \
        }                                                                                                              \
    }
#define GRID(name, bits) GRID_AT(name, bits, 0)
GRID_AT(iq1, 11, 4)
#endif
GRID(iq2_xxs, 8)
GRID(iq2_xs, 9)
GRID(iq2_s, 10)
GRID(iq3_xxs, 8)
GRID(iq3_s, 9)
#undef GRID

/* Eight signs from seven, in bits low .. low + 6 of each byte: the last one makes the number of ones even. */
INLINE __m512i even_signs(__m512i x, const int low) {
#if IQ_VBMI
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(low ? 0x02040810204080fe : 0x010204081020407f), 0);
#else
    const __m512i parity = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
    __m512i s = _mm512_and_si512(low ? shift_right(x, 1) : x, bytes(127));
    __m512i both = _mm512_and_si512(_mm512_xor_si512(s, shift_right(s, 4)), bytes(15));
    return _mm512_or_si512(s, _mm512_shuffle_epi8(parity, both));
#endif
}

/* ---- tables of codes ---------------------------------------------------------------------------------- */

/* T64(F, ...): F(0, ...) .. F(63, ...) */
#define T4(F, i, ...) F(i, __VA_ARGS__), F((i) + 1, __VA_ARGS__), F((i) + 2, __VA_ARGS__), F((i) + 3, __VA_ARGS__)
#define T16(F, i, ...) \
    T4(F, i, __VA_ARGS__), T4(F, (i) + 4, __VA_ARGS__), T4(F, (i) + 8, __VA_ARGS__), T4(F, (i) + 12, __VA_ARGS__)
#define T64(F, ...) {T16(F, 0, __VA_ARGS__), T16(F, 16, __VA_ARGS__), T16(F, 32, __VA_ARGS__), T16(F, 48, __VA_ARGS__)}

/* Magnitudes of levels, of three (the fourth does not occur) and of eight. */
#define IQ2_LEVEL(l) ((l) == 0 ? 8 : (l) == 1 ? 25 : 43)
#define IQ3_XXS_LEVEL(l) (4 + 8 * (l) + ((l) == 7) * 2)
#define IQ3_S_LEVEL(l) (1 + 2 * (l))

/* zero + magnitude, or minus, of an entry whose level begins at bit `at` and whose sign is bit `sign`. */
#define SIGNED(i, sign, zero, m) ((i) >> (sign) & 1 ? (zero) - (m) : (zero) + (m))
#define IQ2_CODE(i, at, sign) SIGNED(i, sign, 43, IQ2_LEVEL((i) >> (at) & 3))
#define IQ3_XXS_CODE(i, at, sign) SIGNED(i, sign, 62, IQ3_XXS_LEVEL((i) >> (at) & 7))
#define IQ3_S_CODE(i, at, sign) SIGNED(i, sign, 15, IQ3_S_LEVEL((i) >> (at) & 7))

#endif
