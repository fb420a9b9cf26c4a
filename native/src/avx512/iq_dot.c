/* Decode of IQ1, IQ2 and IQ3 for AVX-512 (F, BW, VL, DQ). Compiled again with VNNI by ../avx512_vnni, and with VBMI and
 * GFNI by ../avx512_vbmi.
 *
 * A vector has 64 indices of a row, and their points come as two vectors of bytes (iq_grid.h). Points stay where they
 * are: value j of all 64 is cut out at once and meets activations that were arranged to match, so a dword of the sum
 * is four points of one group. Indices of groups of 16 come in twos: there the low and the high bytes of two points
 * make a dword.
 *
 * Rows are multiplied one after the other (../dot_rows.h says why), or two where a grid is so large that two vectors
 * of indices share it. Instructions that look up the next points stand before those that use these: waiting for
 * results of its own, the code would run at half its speed. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "iq_grid.h"
#include "../templates/dot_tokens.h"

enum {
    DOT_TOKENS = 4,
    CHUNK = 8192, /* columns of a row at once: their activations, arranged, share the first-level cache with weights */
    UNITS = CHUNK / 256,
};

/* How a unit is arranged: 64 indices of one row, and the activations of their points. */
enum unit {
    POINTS8,    /* two blocks of 256; points of 8 values, groups of 32 */
    POINTS8_16, /* the same, groups of 16 */
    POINTS4,    /* a block; points of 4 values, groups of 32 */
};

/* A chunk of activations, by units. */
struct ready {
    int units, odd; /* odd: the last unit lacks its second block; what stands there meets zeros */
    /* Value j of all points; POINTS8_16: value j of one block, 4 + j of the other */
    _Alignas(64) int8_t q[UNITS][8][64];
    _Alignas(64) int32_t start[UNITS][2][16]; /* minus zero point * activations of each dword of a sum */
    _Alignas(64) float d[UNITS][2][16];
};

/* ---- preparation ------------------------------------------------------------------------------------- */

/* Dword j of all lanes of 256 bytes, after a shuffle of each lane's bytes, for j < 4. */
INLINE void dwords_of_lanes(const int8_t *q, __m128i shuffle, int8_t out[4][64]) {
    const __m512i by_dword = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    __m512i v[4], t[4];
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(q + 64 * i), _mm512_broadcast_i32x4(shuffle));
        v[i] = _mm512_permutexvar_epi32(by_dword, v[i]); /* lane j: dwords j */
    }
    for (int i = 0; i < 2; i++) {
        t[i] = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x44);
        t[2 + i] = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xee);
    }
    for (int j = 0; j < 4; j += 2) {
        _mm512_store_si512(out[j], _mm512_shuffle_i32x4(t[j], t[j + 1], 0x88));
        _mm512_store_si512(out[j + 1], _mm512_shuffle_i32x4(t[j], t[j + 1], 0xdd));
    }
}

/* out[j][n] = q[8 * n + j] of 512 bytes. */
INLINE void eighths(const int8_t *q, int8_t out[8][64]) {
    const __m128i twos = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i by_word = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3,
                                             26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    __m512i v[8], t[8];
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(q + 64 * i), _mm512_broadcast_i32x4(twos));
        v[i] = _mm512_permutexvar_epi16(by_word, v[i]); /* qword j: bytes j of eight */
    }
    for (int i = 0; i < 8; i += 2) { /* lane l: qwords 2 * l, or 2 * l + 1, of two */
        t[i / 2] = _mm512_unpacklo_epi64(v[i], v[i + 1]);
        t[4 + i / 2] = _mm512_unpackhi_epi64(v[i], v[i + 1]);
    }
    for (int h = 0; h < 2; h++) {
        const __m512i a = _mm512_shuffle_i32x4(t[4 * h], t[4 * h + 1], 0x44),
                      b = _mm512_shuffle_i32x4(t[4 * h + 2], t[4 * h + 3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(t[4 * h], t[4 * h + 1], 0xee),
                      d = _mm512_shuffle_i32x4(t[4 * h + 2], t[4 * h + 3], 0xee);
        _mm512_store_si512(out[h], _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_store_si512(out[2 + h], _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_store_si512(out[4 + h], _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_store_si512(out[6 + h], _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

INLINE void arrange(const enum unit unit, const int8_t *q, int8_t out[8][64]) {
    const __m128i fours = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    /* Low bytes of two points, high bytes */
    const __m128i twos = _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    if (unit == POINTS8) eighths(q, out);
    if (unit == POINTS4) dwords_of_lanes(q, fours, out);
    if (unit == POINTS8_16) {
        dwords_of_lanes(q, twos, out);
        dwords_of_lanes(q + 256, twos, out + 4);
    }
}

/* a[0], b[0], a[1] .. of eight. */
INLINE __m512i in_twos(const int32_t *a, const int32_t *b) {
    const __m512i order = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutex2var_epi32(_mm512_castsi256_si512(load256(a)), order, _mm512_castsi256_si512(load256(b)));
}

/* One unit. low, high: sums of 16 activations; a group of 32 may find its whole sum in any dword. */
INLINE void fill_unit(struct ready *x, const int u, const enum unit unit, const int zero, const int8_t *q,
                      const float *d, const int32_t *low, const int32_t *high) {
    const __m512i minus = _mm512_set1_epi32(-zero),
                  twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    arrange(unit, q, x->q[u]);
    if (unit == POINTS8) {
        const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(low), _mm512_loadu_si512(high));
        _mm512_store_si512(x->start[u][0], _mm512_mullo_epi32(minus, sum));
        _mm512_store_ps(x->d[u][0], _mm512_loadu_ps(d));
        return;
    }
    for (int h = 0; h < (unit == POINTS4 ? 1 : 2); h++) {
        _mm512_store_si512(x->start[u][h], _mm512_mullo_epi32(minus, in_twos(low + 8 * h, high + 8 * h)));
        _mm512_store_ps(x->d[u][h], _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(d + 8 * h))));
    }
}

INLINE void make_ready(struct ready *x, const enum unit unit, const int zero, const struct kt_act *a, int64_t from,
                       int64_t n) {
    const int columns = unit == POINTS4 ? 256 : 512;
    x->units = (int)((n + columns - 1) / columns);
    x->odd = n % columns != 0;
    for (int u = 0; u < x->units - x->odd; u++) {
        const int64_t c = from + u * columns, g = c / KT_ACT_GROUP;
        fill_unit(x, u, unit, zero, a->q + c, a->d + g, a->low + g, a->high + g);
    }
    if (x->odd) {
        const int64_t c = from + n - 256, g = c / KT_ACT_GROUP;
        int8_t q[512] = {0};
        float d[16] = {0};
        int32_t low[16] = {0}, high[16] = {0};
        memcpy(q, a->q + c, 256);
        memcpy(d, a->d + g, 32);
        memcpy(low, a->low + g, 32);
        memcpy(high, a->high + g, 32);
        fill_unit(x, x->units - 1, unit, zero, q, d, low, high);
    }
}

/* make_ready of each kind of unit, called by that name. */
#define READY(unit)                                                                                                  \
    SHARED void make_ready_##unit(struct ready *x, int zero, const struct kt_act *a, int64_t from, int64_t n) {      \
        make_ready(x, unit, zero, a, from, n);                                                                       \
    }
READY(POINTS8)
READY(POINTS8_16)
READY(POINTS4)

/* ---- one unit: looking up, and meeting activations ----------------------------------------------------- */

/* What is known of a unit when its activations come: two vectors of points, and of signs or shifts (IQ1), and the
 * weights' scale of each dword of a sum. */
struct found {
    struct points p;
    __m512i signs[2];
    __m512 scale[2];
};

/* A register, not an operand of each use: packed bytes cross lines, so that loading them again costs two loads. */
INLINE __m512i once(__m512i v) {
    __asm__("" : "+v"(v));
    return v;
}
INLINE __m512i load(const uint8_t *p) { return once(_mm512_loadu_si512(p)); }
INLINE __m512i both(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }

/* An fp16 number for each dword of a block; for two blocks of eight dwords. */
INLINE __m512 half_of(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_set1_epi16((short)kt_load16(p))); }
INLINE __m512 halves_of(const uint8_t *a, const uint8_t *b) {
    const __m256i first = _mm256_set1_epi16((short)kt_load16(a)), second = _mm256_set1_epi16((short)kt_load16(b));
    return _mm512_cvtph_ps(_mm256_blend_epi32(first, second, 0xf0));
}

INLINE __m512 entry(__m512 table, __m512i n) { return _mm512_permutexvar_ps(n, table); }

/* Low bytes and high bytes of words: of points 0, 1 of each dword of `low`, the same of `high`; and the second half. */
INLINE struct points twos(struct points p) {
    return (struct points){_mm512_unpacklo_epi16(p.low, p.high), _mm512_unpackhi_epi16(p.low, p.high)};
}

/* Codes of value j of each point: byte v holds four levels of 2 bits, byte s four signs, from bit 0 on. s4: the same
 * from bit 4 on. */
INLINE __m512i iq2_codes(__m512i v, __m512i s, __m512i s4, const int j) {
#if IQ_VBMI /* the tables know where level and sign are, and which bits are others' */
    static const _Alignas(64) uint8_t table[4][64] = {T64(IQ2_CODE, 0, 4), T64(IQ2_CODE, 2, 1), T64(IQ2_CODE, 4, 2),
                                                      T64(IQ2_CODE, 4, 3)};
    const __m512i mixed = merge(bytes(j == 0 ? 3 : j == 1 ? 12 : 48), j == 3 ? shift_right(v, 2) : v, j == 0 ? s4 : s);
    return _mm512_permutexvar_epi8(mixed, _mm512_load_si512(table[j]));
#else
    (void)s4;
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(51, 68, 86, 0, 35, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m512i sign = j < 2 ? shift_left(s, 2 - j) : j == 2 ? s : shift_right(s, 1);
    const __m512i mixed = merge(bytes(3), j ? shift_right(v, 2 * j) : v, sign);
    return _mm512_shuffle_epi8(table, _mm512_and_si512(mixed, bytes(7)));
#endif
}

/* Two chains of sums: one would take longer than the rest of a unit. */
INLINE __m512i iq2_sum(const struct found *f, const int8_t q[8][64], const int32_t *start) {
    const __m512i s = f->signs[0], s4 = shift_left(s, 4), above = shift_right(s, 4);
    __m512i low = _mm512_load_si512(start), high = _mm512_setzero_si512();
    for (int j = 0; j < 4; j++) {
        low = dot4(low, iq2_codes(f->p.low, s, s4, j), _mm512_load_si512(q[j]));
        high = dot4(high, iq2_codes(f->p.high, above, s, j), _mm512_load_si512(q[4 + j]));
    }
    return _mm512_add_epi32(low, high);
}

/* A vector of twos. */
INLINE __m512i iq2_sum16(__m512i v, __m512i s, const int8_t q[4][64], const int32_t *start) {
    const __m512i s4 = shift_left(s, 4);
    __m512i sum = _mm512_load_si512(start);
    for (int j = 0; j < 4; j++) sum = dot4(sum, iq2_codes(v, s, s4, j), _mm512_load_si512(q[j]));
    return sum;
}

INLINE __m512 scaled(__m512 acc, __m512i sum, __m512 scale, const float *d) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_load_ps(d)), acc);
}

INLINE void meet_iq2(const struct found *f, const struct ready *x, const int u, __m512 acc[2]) {
    acc[0] = scaled(acc[0], iq2_sum(f, x->q[u], x->start[u][0]), f->scale[0], x->d[u][0]);
}
INLINE void meet_iq2_16(const struct found *f, const struct ready *x, const int u, __m512 acc[2]) {
    acc[0] = scaled(acc[0], iq2_sum16(f->p.low, f->signs[0], x->q[u], x->start[u][0]), f->scale[0], x->d[u][0]);
    acc[1] = scaled(acc[1], iq2_sum16(f->p.high, f->signs[1], x->q[u] + 4, x->start[u][1]), f->scale[1], x->d[u][1]);
}

/* Codes of value j of each point: two levels of 3 bits a byte. left: signs from bit 3 on; s: from bit 0; right: from
 * 1. */
INLINE __m512i iq3_codes(struct points p, const uint8_t (*tables)[64], __m512i left, __m512i s, __m512i right,
                         const int j) {
    const __m512i v = j < 2 ? p.low : p.high;
#if IQ_VBMI
    const __m512i mixed = j % 2 ? merge(bytes(56), v, j == 1 ? s : right) : merge(bytes(7), v, left);
    return _mm512_permutexvar_epi8(mixed, _mm512_load_si512(tables[j]));
#else
    (void)right;
    const __m512i sign = j == 0 ? left : j == 1 ? shift_left(s, 2) : j == 2 ? shift_left(s, 1) : s;
    const __m512i mixed = merge(bytes(7), j % 2 ? shift_right(v, 3) : v, sign);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(tables[0])), _mm512_and_si512(mixed, bytes(15)));
#endif
}
#define IQ3_TABLES(CODE) {T64(CODE, 0, 3), T64(CODE, 3, 1), T64(CODE, 0, 5), T64(CODE, 3, 2)}
static const _Alignas(64) uint8_t iq3_xxs_tables[4][64] = IQ3_TABLES(IQ3_XXS_CODE);
static const _Alignas(64) uint8_t iq3_s_tables[4][64] = IQ3_TABLES(IQ3_S_CODE);

INLINE void meet_iq3(const struct found *f, const struct ready *x, const int u, const uint8_t (*tables)[64],
                     __m512 acc[2]) {
    const __m512i s = f->signs[0], left = shift_left(s, 3), right = shift_right(s, 1);
    __m512i sum[2] = {_mm512_load_si512(x->start[u][0]), _mm512_setzero_si512()};
    for (int j = 0; j < 4; j++)
        sum[j % 2] = dot4(sum[j % 2], iq3_codes(f->p, tables, left, s, right, j), _mm512_load_si512(x->q[u][j]));
    acc[0] = scaled(acc[0], _mm512_add_epi32(sum[0], sum[1]), f->scale[0], x->d[u][0]);
}
INLINE void meet_iq3_xxs(const struct found *f, const struct ready *x, const int u, __m512 acc[2]) {
    meet_iq3(f, x, u, iq3_xxs_tables, acc);
}
INLINE void meet_iq3_s(const struct found *f, const struct ready *x, const int u, __m512 acc[2]) {
    meet_iq3(f, x, u, iq3_s_tables, acc);
}

/* Eight times level j of each byte, plus 2 or 0. */
INLINE __m512i iq1_codes(__m512i v, __m512i shift, const int j) {
    const __m512i at3 = j < 2 ? shift_left(v, 3 - 2 * j) : shift_right(v, 2 * j - 3);
    return _mm512_ternarylogic_epi32(at3, bytes(24), shift, 0xea); /* a & b | c */
}
INLINE __m512i iq1_sum(__m512i sum, __m512i v, __m512i shift, const int8_t q[4][64]) {
    for (int j = 0; j < 4; j++) sum = dot4(sum, iq1_codes(v, shift, j), _mm512_load_si512(q[j]));
    return sum;
}
INLINE void meet_iq1_s(const struct found *f, const struct ready *x, const int u, __m512 acc[2]) {
    const __m512i low = iq1_sum(_mm512_load_si512(x->start[u][0]), f->p.low, f->signs[0], x->q[u]);
    const __m512i high = iq1_sum(_mm512_setzero_si512(), f->p.high, f->signs[0], x->q[u] + 4);
    acc[0] = scaled(acc[0], _mm512_add_epi32(low, high), f->scale[0], x->d[u][0]);
}
INLINE void meet_iq1_m(const struct found *f, const struct ready *x, const int u, __m512 acc[2]) {
    acc[0] = scaled(acc[0], iq1_sum(_mm512_load_si512(x->start[u][0]), f->p.low, f->signs[0], x->q[u]), f->scale[0],
                    x->d[u][0]);
    acc[1] = scaled(acc[1], iq1_sum(_mm512_load_si512(x->start[u][1]), f->p.high, f->signs[1], x->q[u] + 4),
                    f->scale[1], x->d[u][1]);
}

/* ---- formats: a and b are the blocks of a unit, one or two rows of them ------------------------------------- */

/* The signs and scales of groups of 32 that share a dword: four times seven bits, and four. */
INLINE __m512i signs_of(__m512i x) { return even_signs(fields(x, 0, 7), 0); }

INLINE void look_iq2_xxs(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512 table = scale_table(0.25f, 0.125f, 16);
    for (int r = 0; r < rows; r++) {
        const __m512i v = load(a[r] + 2), w = load(b[r] + 2);
        const __m512i index = _mm512_permutex2var_epi32(v, even, w), rest = _mm512_permutex2var_epi32(v, odd, w);
        points_iq2_xxs(1, &index, &index, &out[r].p);
        out[r].signs[0] = signs_of(rest);
        out[r].scale[0] = _mm512_mul_ps(entry(table, _mm512_srli_epi32(rest, 28)), halves_of(a[r], b[r]));
    }
}

/* Scales of 4 bits of the 16 groups of a block, and its d. */
INLINE __m512 nibble_scales(const uint8_t *p, const uint8_t *d, __m512 table) {
    const __m512i bytes2 = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    int64_t eight;
    memcpy(&eight, p, 8);
    const __m512i n =
        _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(eight), bytes2), _mm512_set1_epi64((int64_t)4 << 32));
    return _mm512_mul_ps(entry(table, n), half_of(d));
}

/* Signs of twos, from those of points. */
INLINE void signs_of_twos(__m512i s, __m512i out[2]) {
    const struct points t = twos((struct points){s, shift_right(s, 4)});
    out[0] = t.low;
    out[1] = t.high;
}

INLINE void look_iq2_xs(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512 table = scale_table(0.25f, 0.125f, 16);
    const __m512i low = _mm512_set1_epi16(255);
    for (int r = 0; r < rows; r++) {
        const __m512i v = load(a[r] + 2), w = load(b[r] + 2); /* words: 9 bits of an index, 7 of signs */
        const __m512i index = _mm512_packus_epi16(_mm512_and_si512(v, low), _mm512_and_si512(w, low));
        const __m512i upper = _mm512_packus_epi16(shift_right(v, 8), shift_right(w, 8));
        struct points p;
        points_iq2_xs(1, &index, &upper, &p);
        out[r].p = twos(p);
        signs_of_twos(even_signs(upper, 1), out[r].signs);
        out[r].scale[0] = nibble_scales(a[r] + 66, a[r], table);
        out[r].scale[1] = nibble_scales(b[r] + 66, b[r], table);
    }
}

/* Qwords 0, 1, 2, 3 of v and of w in turn, or 4 .. 7: lanes have 8 bytes of each. */
INLINE __m512i in_turn(__m512i v, __m512i w, const int from) {
    return _mm512_permutex2var_epi64(
        v, _mm512_add_epi64(_mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), _mm512_set1_epi64(from)), w);
}

/* Two bits for each index: those of index n of eight in bits 2n of word l of the qword of lane l. */
INLINE __m512i two_bits(__m512i qwords) {
#if IQ_VBMI
    const uint64_t row = 0x0e0c0a0806040200, lane = 0x1010101010101010;
#define LANE(l) (long long)(row + (l) * lane)
    const __m512i at = _mm512_set_epi64(LANE(3), LANE(3), LANE(2), LANE(2), LANE(1), LANE(1), LANE(0), LANE(0));
#undef LANE
    return _mm512_multishift_epi64_epi8(at, qwords);
#else
    const __m512i lane = _mm512_set_epi64(0x0606060606060606, 0x0606060606060606, 0x0404040404040404,
                                          0x0404040404040404, 0x0202020202020202, 0x0202020202020202, 0, 0);
    const __m512i byte = _mm512_set4_epi32(0x09090909, 0x08080808, 0x01010101, 0);
    const __m512i four = _mm512_shuffle_epi8(qwords, _mm512_add_epi8(lane, byte));
    const __m512i v = _mm512_srlv_epi16(four, _mm512_set1_epi32(4 << 16));
    return merge(_mm512_set1_epi16(255), v, shift_right(v, 2));
#endif
}

INLINE void look_iq2_s(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512 table = scale_table(0.25f, 0.125f, 16);
    __m512i index[2], upper[2];
    struct points p[2];
    for (int r = 0; r < rows; r++) {
        const __m512i v = load(a[r] + 2), w = load(b[r] + 2); /* 32 bytes of indices, 32 of signs */
        int64_t high[2];
        memcpy(&high[0], a[r] + 66, 8);
        memcpy(&high[1], b[r] + 66, 8);
        index[r] = in_turn(v, w, 0);
        upper[r] = two_bits(_mm512_broadcast_i32x4(_mm_set_epi64x(high[1], high[0])));
        signs_of_twos(in_turn(v, w, 4), out[r].signs);
        out[r].scale[0] = nibble_scales(a[r] + 74, a[r], table);
        out[r].scale[1] = nibble_scales(b[r] + 74, b[r], table);
    }
    points_iq2_s(rows, index, upper, p);
    for (int r = 0; r < rows; r++) out[r].p = twos(p[r]);
}

/* Bytes of eight signs to two bytes of four. */
INLINE __m512i signs_of_fours(__m256i s) {
    const __m512i words = _mm512_cvtepu8_epi16(s);
    return _mm512_or_si512(words, shift_left(words, 4));
}

INLINE __m512i for_two(__m256i v) {
    return _mm512_permutexvar_epi32(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0),
                                    _mm512_castsi256_si512(v));
}

INLINE void look_iq3_xxs(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512 table = scale_table(0.5f, 0.25f, 16);
    (void)b;
    for (int r = 0; r < rows; r++) {
        const __m512i index = load(a[r] + 2);
        const __m256i rest = load256(a[r] + 66);
        points_iq3_xxs(1, &index, &index, &out[r].p);
        out[r].signs[0] = signs_of_fours(_mm512_castsi512_si256(signs_of(_mm512_castsi256_si512(rest))));
        const __m512 s = entry(table, for_two(_mm256_srli_epi32(rest, 28)));
        out[r].scale[0] = _mm512_mul_ps(s, half_of(a[r]));
    }
}

INLINE void look_iq3_s(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512 table = scale_table(2.0f, 1.0f, 16);
    const __m512i nibbles = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    (void)b;
    for (int r = 0; r < rows; r++) {
        const __m512i index = load(a[r] + 2);
        uint64_t ninth;
        memcpy(&ninth, a[r] + 66, 8);
        const __m512i upper = _mm512_maskz_set1_epi8((__mmask64)ninth, 1);
        points_iq3_s(1, &index, &upper, &out[r].p);
        out[r].signs[0] = signs_of_fours(load256(a[r] + 74));
        const __m512 s = entry(table, _mm512_srlv_epi32(_mm512_set1_epi32((int)kt_load32(a[r] + 106)), nibbles));
        out[r].scale[0] = _mm512_mul_ps(s, half_of(a[r]));
    }
}

/* Of a group: 2, or 0 where bit 3 of n is set. */
INLINE __m512i two_unless_8(__m512i n) {
    const int two = 0x02020202;
    return _mm512_permutexvar_epi32(n,
                                    _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, two, two, two, two, two, two, two, two));
}

INLINE void look_iq1_s(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512 table = scale_table(0.25f, 0.125f, 8);
    __m512i index[2], upper[2];
    struct points p[2];
    for (int r = 0; r < rows; r++) {
        index[r] = both(load256(a[r] + 2), load256(b[r] + 2));
        /* words: three upper bits of 4 indices, scale, sign of 1/8 */
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_set_m128i(load128(b[r] + 34), load128(a[r] + 34)));
        const __m512i n = _mm512_srli_epi32(words, 12);
        upper[r] = fields(words, -4, 3);
        out[r].signs[0] = two_unless_8(n);
        out[r].scale[0] = _mm512_mul_ps(entry(table, n), halves_of(a[r], b[r]));
    }
    points_iq1(rows, index, upper, p);
    for (int r = 0; r < rows; r++) out[r].p = p[r];
}

/* Nibbles of 8 bytes in each lane's first dword and third, as bytes: in their upper halves, what is below undefined. */
INLINE __m512i nibbles_up(__m512i v) {
#if IQ_VBMI
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1814100c0804003c), v);
#else
    const __m512i twice = _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0b0b0a0a, 0x09090808, 0x03030202, 0x01010000));
    return merge(_mm512_set1_epi16(255), shift_left(twice, 4), twice);
#endif
}

/* Sixteen scales of 3 bits in four words, and d in their upper nibbles. */
INLINE __m512 iq1_m_scales(const uint8_t *p, __m512 table) {
    uint64_t x;
    memcpy(&x, p, 8);
    const uint64_t d = (x >> 12 & 0xf) | (x >> 24 & 0xf0) | (x >> 36 & 0xf00) | (x >> 48 & 0xf000);
    const __m512i lanes = _mm512_set_epi32(0x706, 0x706, 0x706, 0x706, 0x504, 0x504, 0x504, 0x504, 0x302, 0x302, 0x302,
                                           0x302, 0x100, 0x100, 0x100, 0x100);
    const __m512i words = _mm512_shuffle_epi8(_mm512_set1_epi64((int64_t)x), lanes);
    const __m512 s = entry(table, _mm512_srlv_epi32(words, _mm512_set4_epi32(9, 6, 3, 0)));
    return _mm512_mul_ps(s, _mm512_cvtph_ps(_mm256_set1_epi16((short)d)));
}

INLINE void look_iq1_m(const int rows, const uint8_t *const *a, const uint8_t *const *b, struct found *out) {
    const __m512 table = scale_table(0.25f, 0.125f, 8);
    __m512i index[2], upper[2];
    struct points p[2];
    for (int r = 0; r < rows; r++) {
        const __m512i v = _mm512_maskz_loadu_epi64(0x3f, a[r]), w = _mm512_maskz_loadu_epi64(0x3f, b[r]);
        index[r] = in_turn(v, w, 0);
        /* a nibble an index: three upper bits, sign of 1/8; 32 bits for eight */
        const __m512i dwords = _mm512_set_epi32(27, 27, 11, 11, 26, 26, 10, 10, 25, 25, 9, 9, 24, 24, 8, 8);
        upper[r] = nibbles_up(_mm512_permutex2var_epi32(v, dwords, w));
        const __m512i shift = _mm512_andnot_si512(shift_right(upper[r], 6), bytes(2));
        const struct points t = twos((struct points){shift, shift});
        out[r].signs[0] = t.low;
        out[r].signs[1] = t.high;
        out[r].scale[0] = iq1_m_scales(a[r] + 48, table);
        out[r].scale[1] = iq1_m_scales(b[r] + 48, table);
    }
    points_iq1(rows, index, upper, p);
    for (int r = 0; r < rows; r++) out[r].p = twos(p[r]);
}

/* ---- rows ------------------------------------------------------------------------------------------- */

/* out[i] = sum of v[i], i < n <= 16. */
SHARED void sums_of(const __m512 v[16], int n, float *out) {
    __m512 t[4];
    for (int i = 0; i < 4; i++) { /* lane l of t[i]: of 4 vectors, the sums of their lanes l */
        __m512 a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        t[i] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
    __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(t[2], t[3], 0x88), _mm512_shuffle_f32x4(t[2], t[3], 0xdd));
    x = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    _mm512_mask_storeu_ps(out, (__mmask16)((1u << n) - 1), x);
}

/* The dot kernel of a format, `each` rows at once. At the end of a row comes the next one, at the last the first again.
 * Codes are the same for all tokens; the compiler sees that. */
#define DOT(name, meet, unit, bytes, zero, each)                                                                       \
    SHARED void look_first_##name(const uint8_t *const *a, const uint8_t *const *b, struct found *out) {               \
        look_##name(each, a, b, out);                                                                                  \
    }                                                                                                                  \
    INLINE void name##_pass(const int T, const struct kt_matrix *m, int64_t first, int rows, const struct kt_act *act, \
                            size_t ahead, float *out, int64_t ldc) {                                                   \
        enum { SPAN = (unit) == POINTS4 ? (bytes) : 2 * (bytes) };                                                     \
        struct ready x[DOT_TOKENS];                                                                                    \
        __m512 sum[DOT_TOKENS][KT_DOT_ROWS + 1];                                                                       \
        for (int t = 0; t < T; t++)                                                                                    \
            for (int r = 0; r < (rows + 15) / 16 * 16; r++) sum[t][r] = _mm512_setzero_ps();                           \
        for (int64_t c = 0; c < m->cols; c += CHUNK) {                                                                 \
            const uint8_t *const w = m->data + (size_t)first * m->stride + (size_t)(c / KT_QK * (bytes));              \
            const uint8_t *a[each], *b[each];                                                                          \
            struct found now[each], next[each];                                                                        \
            const int64_t n = m->cols - c < CHUNK ? m->cols - c : CHUNK;                                               \
            for (int t = 0; t < T; t++) make_ready_##unit(&x[t], zero, act + t, c, n);                                 \
            const int units = x[0].units;                                                                              \
            const size_t to_b = x[0].odd ? 0 : (bytes); /* in the last unit */                                         \
            for (int i = 0; i < (each); i++) {                                                                         \
                a[i] = w + (i < rows ? (size_t)i * m->stride : 0);                                                     \
                b[i] = a[i] + (units == 1 ? to_b : (bytes));                                                           \
            }                                                                                                          \
            look_first_##name(a, b, now);                                                                              \
            for (int r = 0; r < rows; r += (each)) {                                                                   \
                __m512 acc[each][DOT_TOKENS][2];                                                                       \
                const uint8_t *then[each];                                                                             \
                for (int i = 0; i < (each); i++) {                                                                     \
                    for (int t = 0; t < T; t++) acc[i][t][0] = acc[i][t][1] = _mm512_setzero_ps();                     \
                    then[i] = w + (r + (each) + i < rows ? (size_t)(r + (each) + i) * m->stride : 0);                  \
                }                                                                                                      \
                for (int u = 0; u < units; u++) {                                                                      \
                    const size_t last = (size_t)-(u + 1 == units), v = (size_t)(u + 1) & ~last;                        \
                    const size_t width = v + 1 == (size_t)units ? to_b : (bytes);                                      \
                    for (int i = 0; i < (each); i++) {                                                                 \
                        a[i] += SPAN + (((uintptr_t)then[i] - (uintptr_t)a[i] - SPAN) & last); /* no jump */           \
                        b[i] = a[i] + width;                                                                           \
                        for (int l = 0; l < SPAN; l += 64) PREFETCH(a[i] + l, ahead);                                  \
                    }                                                                                                  \
                    look_##name(each, a, b, next);                                                                     \
                    for (int i = 0; i < (each); i++)                                                                   \
                        for (int t = 0; t < T; t++) meet(&now[i], &x[t], u, acc[i][t]);                                \
                    for (int i = 0; i < (each); i++) now[i] = next[i];                                                 \
                }                                                                                                      \
                for (int i = 0; i < (each); i++)                                                                       \
                    for (int t = 0; t < T; t++)                                                                        \
                        sum[t][r + i] = _mm512_add_ps(sum[t][r + i], _mm512_add_ps(acc[i][t][0], acc[i][t][1]));       \
            }                                                                                                          \
        }                                                                                                              \
        for (int t = 0; t < T; t++)                                                                                    \
            for (int r = 0; r < rows; r += 16) sums_of(sum[t] + r, rows - r < 16 ? rows - r : 16, out + t * ldc + r);  \
    }                                                                                                                  \
    DOT_FOR_TOKENS(name)
DOT(iq1_s, meet_iq1_s, POINTS8, 50, 9, 2)
DOT(iq1_m, meet_iq1_m, POINTS8_16, 56, 9, 2)
DOT(iq2_xxs, meet_iq2, POINTS8, 66, 43, 1)
DOT(iq2_xs, meet_iq2_16, POINTS8_16, 74, 43, 1)
DOT(iq2_s, meet_iq2_16, POINTS8_16, 82, 43, 2)
DOT(iq3_xxs, meet_iq3_xxs, POINTS4, 98, 62, 1)
DOT(iq3_s, meet_iq3_s, POINTS4, 110, 15, 1)

void KT_JOIN(kt_fill_iq_dot_, KT_ISA)(struct kt_kernels *k) {
    DOT_FILL(k, IQ1_S, iq1_s);
    DOT_FILL(k, IQ1_M, iq1_m);
    DOT_FILL(k, IQ2_XXS, iq2_xxs);
    DOT_FILL(k, IQ2_XS, iq2_xs);
    DOT_FILL(k, IQ2_S, iq2_s);
    DOT_FILL(k, IQ3_XXS, iq3_xxs);
    DOT_FILL(k, IQ3_S, iq3_s);
}
