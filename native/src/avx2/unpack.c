/* Unpacking for AVX2: packed rows to codes, scales and mins in column order, and the 16-row interleave. */
#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include "common.h"

#define UNUSED (void)scales, (void)mins

static void unpack_f16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    UNUSED;
    float *out = data;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_f16(w + 2 * i));
    for (; i < n; i++) out[i] = f16_at(w + 2 * i);
}

static void unpack_bf16(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    UNUSED;
    float *out = data;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_bf16(w + 2 * i));
    for (; i < n; i++) out[i] = kt_bf16_to_f32(kt_load16(w + 2 * i));
}

INLINE void store(uint8_t *p, __m256i v) { _mm256_storeu_si256((__m256i_u *)p, v); }

static void unpack_q8_0(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    uint8_t *u = data;
    for (int64_t g = 0; g < n / 32; g++, w += 34) {
        scales[g] = f16_at(w);
        store(u + 32 * g, _mm256_xor_si256(load256(w + 2), _mm256_set1_epi8(-128)));
    }
}

INLINE void store_k4_scales(const uint8_t *w, float *scales, float *mins) {
    __m256 s, m;
    k4_scales(w, &s, &m);
    _mm256_storeu_ps(scales, s);
    _mm256_storeu_ps(mins, m);
}

static void unpack_q4_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    uint8_t *u = data;
    for (; n > 0; n -= KT_QK, w += 144, u += KT_QK, scales += 8, mins += 8) {
        store_k4_scales(w, scales, mins);
        for (int i = 0; i < 4; i++) {
            __m256i v = load256(w + 16 + 32 * i);
            store(u + 64 * i, low4(v));
            store(u + 64 * i + 32, high4(v));
        }
    }
}

static void unpack_q5_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    uint8_t *u = data;
    for (; n > 0; n -= KT_QK, w += 176, u += KT_QK, scales += 8, mins += 8) {
        store_k4_scales(w, scales, mins);
        __m256i qh = load256(w + 16);
        for (int i = 0; i < 4; i++) {
            __m256i v = load256(w + 48 + 32 * i);
            store(u + 64 * i, _mm256_or_si256(low4(v), q5_bit(qh, 2 * i)));
            store(u + 64 * i + 32, _mm256_or_si256(high4(v), q5_bit(qh, 2 * i + 1)));
        }
    }
}

static void unpack_q6_k(const uint8_t *w, int64_t n, void *data, float *scales, float *mins) {
    (void)mins;
    uint8_t *u = data;
    for (; n > 0; n -= KT_QK, w += 210, u += KT_QK, scales += 16) {
        __m128i s = load128(w + 192);
        __m256 d = _mm256_set1_ps(f16_at(w + 208));
        _mm256_storeu_ps(scales, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(s)), d));
        _mm256_storeu_ps(scales + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(s, 8))), d));
        for (int i = 0; i < 8; i++) store(u + 32 * i, q6_codes(w, i));
    }
}

/* Transpose 8 x 8 dwords: dwords, qwords, 128-bit lanes. */
INLINE void transpose(__m256i v[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    __m256i s[8];
    for (int i = 0; i < 8; i += 4) {
        s[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        s[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        s[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        s[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(s[i], s[4 + i], 0x20);
        v[4 + i] = _mm256_permute2x128_si256(s[i], s[4 + i], 0x31);
    }
}

static void interleave(const uint32_t *in, size_t in_stride, int64_t n, uint32_t *out) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8)
        for (int half = 0; half < 2; half++) {
            __m256i v[8];
            for (int r = 0; r < 8; r++) v[r] = load256(in + (size_t)(8 * half + r) * in_stride + j);
            transpose(v);
            for (int i = 0; i < 8; i++) _mm256_store_si256((__m256i *)(out + (j + i) * KT_TILE + 8 * half), v[i]);
        }
    for (; j < n; j++)
        for (int r = 0; r < KT_TILE; r++) out[j * KT_TILE + r] = in[(size_t)r * in_stride + (size_t)j];
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
