/* Unpacking for AVX-512: packed rows to codes, scales and mins in column order, and the 16 x 16 transpose. */
#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "common.h"

#define UNUSED (void)scales, (void)mins

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    UNUSED;
    float *out = data;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) PREFETCH(w + 2 * i, UNPACK_AHEAD), _mm512_storeu_ps(out + i, load_f16(w + 2 * i));
    __mmask16 m = (__mmask16)((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, m, load_f16_mask(m, w + 2 * i));
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    UNUSED;
    float *out = data;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) PREFETCH(w + 2 * i, UNPACK_AHEAD), _mm512_storeu_ps(out + i, load_bf16(w + 2 * i));
    __mmask16 m = (__mmask16)((1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(out + i, m, load_bf16_mask(m, w + 2 * i));
}

static void unpack_q8_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    uint8_t *u = data;
    for (int64_t g = 0; g < n / 32; g++, w += 34) {
        PREFETCH(w, UNPACK_AHEAD);
        scales[g] = f16_at(w);
        _mm256_storeu_si256((__m256i_u *)(u + 32 * g), _mm256_xor_si256(load256(w + 2), _mm256_set1_epi8(-128)));
    }
}

/* low holds groups (g, g + 2), high (g + 1, g + 3): store four groups in order. */
INLINE void store_pairs(uint8_t *u, __m512i low, __m512i high) {
    _mm512_storeu_si512(u, _mm512_shuffle_i64x2(low, high, 0x44));
    _mm512_storeu_si512(u + 64, _mm512_shuffle_i64x2(low, high, 0xee));
}

INLINE void store_k4_scales(const uint8_t *w, float *scales, float *mins) {
    __m512 s = k4_scales(load128(w));
    _mm256_storeu_ps(scales, _mm512_castps512_ps256(s));
    _mm256_storeu_ps(mins, _mm512_extractf32x8_ps(s, 1));
}

static void unpack_q4_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    const __m512i low = _mm512_set1_epi8(15);
    uint8_t *u = data;
    for (; n > 0; n -= KT_QK, w += 144, u += KT_QK, scales += 8, mins += 8) {
        for (int i = 0; i < 3; i++) PREFETCH(w + 64 * i, UNPACK_AHEAD);
        store_k4_scales(w, scales, mins);
        for (int i = 0; i < 2; i++) {
            __m512i v = _mm512_loadu_si512(w + 16 + 64 * i);
            store_pairs(u + 128 * i, _mm512_and_si512(v, low), _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
        }
    }
}

static void unpack_q5_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    uint8_t *u = data;
    for (; n > 0; n -= KT_QK, w += 176, u += KT_QK, scales += 8, mins += 8) {
        for (int i = 0; i < 3; i++) PREFETCH(w + 64 * i, UNPACK_AHEAD);
        store_k4_scales(w, scales, mins);
        __m512i high = _mm512_broadcast_i64x4(load256(w + 16));
        for (int i = 0; i < 2; i++) {
            __m512i v = _mm512_loadu_si512(w + 48 + 64 * i);
            store_pairs(u + 128 * i, q5_low(v, high, 4 * i), q5_high(v, high, 4 * i));
        }
    }
}

static void unpack_q6_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    uint8_t *u = data;
    for (; n > 0; n -= KT_QK, w += 210, u += KT_QK, scales += 16) {
        for (int i = 0; i < 4; i++) PREFETCH(w + 64 * i, UNPACK_AHEAD);
        __m512 s = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(w + 192)));
        _mm512_storeu_ps(scales, _mm512_mul_ps(s, _mm512_set1_ps(f16_at(w + 208))));
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(u + 64 * i, q6_codes(w, i));
    }
}

/* Transpose 16 x 16 dwords in registers, in four steps: dwords, qwords, then 128-bit lanes twice. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* v[4r + i]: rows 4r..4r+3 of columns i, 4+i, 8+i, 12+i */
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* ---- tiles: transpose packed dwords of 16 rows first, then take them apart in all rows at once ---- */

/* Row r of 16 lies at base[r / 4] + (r % 4) * stride: four registers and two strides address them all. */
struct rows16 {
    const uint8_t *base[4];
    size_t stride, stride3;
};

INLINE struct rows16 rows_from(const struct kt_matrix *m, int64_t first, int64_t k0) {
    const size_t stride = m->stride;
    const uint8_t *w = m->data + (size_t)first * stride + kt_row_bytes(m->traits, k0);
    return (struct rows16){{w, w + 4 * stride, w + 8 * stride, w + 12 * stride}, stride, 3 * stride};
}

INLINE const uint8_t *row_of(const struct rows16 *rows, const int r, size_t at) {
    const uint8_t *p = rows->base[r / 4] + at;
    return (r & 3) == 0 ? p : (r & 3) == 1 ? p + rows->stride : (r & 3) == 2 ? p + 2 * rows->stride : p + rows->stride3;
}

/* Sixteen dwords of each row, as sixteen columns. */
INLINE void columns16(const struct rows16 *rows, size_t at, __m512i v[16]) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) v[r] = _mm512_loadu_si512(row_of(rows, r, at));
    transpose(v);
}

/* Four dwords of each row. */
INLINE void columns4(const struct rows16 *rows, size_t at, __m512i v[4]) {
    __m512i t[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_castsi128_si512(load128(row_of(rows, i, at)));
        t[i] = _mm512_inserti32x4(t[i], load128(row_of(rows, 4 + i, at)), 1);
        t[i] = _mm512_inserti32x4(t[i], load128(row_of(rows, 8 + i, at)), 2);
        t[i] = _mm512_inserti32x4(t[i], load128(row_of(rows, 12 + i, at)), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(t[0], t[1]), b = _mm512_unpackhi_epi32(t[0], t[1]);
    __m512i c = _mm512_unpacklo_epi32(t[2], t[3]), d = _mm512_unpackhi_epi32(t[2], t[3]);
    v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
}

/* fp16 in the low half of each dword. */
INLINE __m512 half_low(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }

INLINE void k4_tile_scales(const struct rows16 *rows, size_t at, float *scales, float *mins) {
    __m512i h[4];
    columns4(rows, at, h);
    const __m512 d = half_low(h[0]), dmin = half_low(_mm512_srli_epi32(h[0], 16));
    const __m512i six = _mm512_set1_epi32(0x3f3f3f3f), low = _mm512_set1_epi32(0x0f0f0f0f), top = _mm512_set1_epi32(0x30303030);
    __m512i w[4];
    w[0] = _mm512_and_si512(h[1], six);
    w[1] = _mm512_or_si512(_mm512_and_si512(h[3], low), _mm512_and_si512(_mm512_srli_epi32(h[1], 2), top));
    w[2] = _mm512_and_si512(h[2], six);
    w[3] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(h[3], 4), low), _mm512_and_si512(_mm512_srli_epi32(h[2], 2), top));
    const __m512i byte = _mm512_set1_epi32(255);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        __m512i s = _mm512_and_si512(_mm512_srli_epi32(w[g / 4], 8 * (g % 4)), byte);
        __m512i m = _mm512_and_si512(_mm512_srli_epi32(w[2 + g / 4], 8 * (g % 4)), byte);
        _mm512_store_ps(scales + g * KT_TILE, _mm512_mul_ps(d, _mm512_cvtepi32_ps(s)));
        _mm512_store_ps(mins + g * KT_TILE, _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(m)));
    }
}

static void tile_q4_k(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n, const struct kt_tile *out) {
    const __m512i low = _mm512_set1_epi8(15);
    const struct rows16 rows = rows_from(w, first, k0);
    uint32_t *data = out->data;
    for (int64_t b = 0; b < n / KT_QK; b++) {
        const size_t at = (size_t)b * 144;
        k4_tile_scales(&rows, at, out->scales + b * 8 * KT_TILE, out->mins + b * 8 * KT_TILE);
        for (int h = 0; h < 2; h++) {
            __m512i v[16];
            columns16(&rows, at + 16 + 64 * h, v);
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++, data += 16 * KT_TILE)
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    _mm512_store_si512(data + j * KT_TILE, _mm512_and_si512(v[8 * g + j], low));
                    _mm512_store_si512(data + (8 + j) * KT_TILE, _mm512_and_si512(_mm512_srli_epi32(v[8 * g + j], 4), low));
                }
        }
    }
}

static void interleave(const uint32_t *in, size_t in_stride, int64_t n, uint32_t *out) {
    for (int64_t j = 0; j < n; j += 16) {
        int columns = n - j < 16 ? (int)(n - j) : 16;
        __mmask16 m = (__mmask16)((1u << columns) - 1);
        __m512i v[16];
        for (int r = 0; r < 16; r++) v[r] = _mm512_maskz_loadu_epi32(m, in + (size_t)r * in_stride + j);
        transpose(v);
        if (columns == 16)
            for (int i = 0; i < 16; i++) _mm512_store_si512(out + (j + i) * KT_TILE, v[i]);
        else
            for (int i = 0; i < columns; i++) _mm512_store_si512(out + (j + i) * KT_TILE, v[i]);
    }
}

void KT_JOIN(kt_fill_unpack_, KT_ISA)(struct kt_kernels *k) {
    k->unpack[KT_FMT_F16] = unpack_f16;
    k->unpack[KT_FMT_BF16] = unpack_bf16;
    k->unpack[KT_FMT_Q8_0] = unpack_q8_0;
    k->unpack[KT_FMT_Q4_K] = unpack_q4_k;
    k->unpack[KT_FMT_Q5_K] = unpack_q5_k;
    k->unpack[KT_FMT_Q6_K] = unpack_q6_k;
    k->interleave = interleave;
    k->tile[KT_FMT_Q4_K] = tile_q4_k;
}
