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
}
