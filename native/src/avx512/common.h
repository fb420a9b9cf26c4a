/* common.h: loads, dot products and bit unpacking that the AVX-512 files share. Static inline only. */
#ifndef KT_AVX512_COMMON_H
#define KT_AVX512_COMMON_H

#include <immintrin.h>

#include "../kernels.h"
#include "../formats/quants.h"

#define INLINE static inline __attribute__((always_inline))

/* One copy that is called, for work that many rows share: inlined, each format and number of tokens would get its
 * own, which doubles the time to compile. */
#if __has_attribute(noclone)
#define SHARED static __attribute__((noinline, noclone, unused))
#else
#define SHARED static __attribute__((noinline, unused))
#endif

/* Unpacking reads one row after the other: a fixed distance will do. */
#define UNPACK_AHEAD 2048

/* Into the second-level cache: the few misses that the first level can have in flight bound the bandwidth. One layer,
 * T=1, Zen 4, beside fetching into the first: BF16 96 % of the read bandwidth, not 64; INT4 92, not 68; Q8_0 84, not
 * 68. */
#define PREFETCH(p, ahead) _mm_prefetch((const char *)(uintptr_t)((uintptr_t)(p) + (ahead)), _MM_HINT_T1)

INLINE __m128i load128(const void *p) { return _mm_loadu_si128((const __m128i_u *)p); }
INLINE __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i_u *)p); }
INLINE float f16_at(const void *p) { return _cvtsh_ss(kt_load16(p)); }

INLINE __m512 load_f16(const void *p) { return _mm512_cvtph_ps(load256(p)); }
INLINE __m512 load_f16_mask(__mmask16 m, const void *p) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
INLINE __m512 widen_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
INLINE __m512 load_bf16(const void *p) { return widen_bf16(load256(p)); }
INLINE __m512 load_bf16_mask(__mmask16 m, const void *p) { return widen_bf16(_mm256_maskz_loadu_epi16(m, p)); }

/* acc + sums of four products, unsigned u times signed a. Without VNNI u must not exceed 127: two products
 * are added in 16 bits, 2 * 127 * 127 fits, 2 * 255 * 127 would saturate. */
INLINE __m512i dot4(__m512i acc, __m512i u, __m512i a) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(acc, u, a);
#else
    __m512i pairs = _mm512_maddubs_epi16(u, a);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

/* The same for signed w (two's complement bytes). VNNI adds 128 to every w, and `start` takes
 * 128 * sum of a away again; without it, |w| meets a with the sign of w: 2 * 128 * 127 fits 16 bits. */
INLINE __m512i dot4_signed(__m512i start, __m512i w, __m512i a) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(start, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), a);
#else
    __m512i flipped = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
    return dot4(start, _mm512_abs_epi8(w), flipped);
#endif
}
INLINE __m512i signed_start(__m512i a) {
#ifdef __AVX512VNNI__
    __m512i zero = _mm512_setzero_si512();
    return _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(-128), a));
#else
    (void)a;
    return _mm512_setzero_si512();
#endif
}

/* Results of a tile for one token. */
INLINE void store_tile(float *out, __m512 v, int add) {
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), v) : v);
}

/* The first 16 bytes of a Q4_K or Q5_K block (d, dmin, 12 bytes of scales; see kt_k4_scales):
 * d * scale of 8 groups, then dmin * min of 8 groups. */
INLINE __m512 k4_scales(__m128i header) {
    __m128i low = _mm_shuffle_epi32(header, _MM_SHUFFLE(3, 2, 3, 1)); /* a c b c */
    low = _mm_and_si128(_mm_srlv_epi32(low, _mm_set_epi32(4, 0, 0, 0)),
                        _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
    __m128i top = _mm_srli_epi32(_mm_shuffle_epi32(header, _MM_SHUFFLE(2, 2, 1, 1)), 2); /* a a b b */
    top = _mm_and_si128(top, _mm_set_epi32(0x30303030, 0, 0x30303030, 0));
    __m512 s = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(low, top)));
    const __m512i d_dmin = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_mul_ps(s, _mm512_permutexvar_ps(d_dmin, _mm512_castps128_ps512(_mm_cvtph_ps(header))));
}

/* Codes of Q5_K groups (g, g + 2) from the low nibbles of v, and (g + 1, g + 3) from the high ones.
 * high: the 32 bytes of qh, twice. */
INLINE __m512i bits_of(const int g) {
    return _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << g)), _mm256_set1_epi8((char)(1 << (g + 2))), 1);
}
INLINE __m512i q5_low(__m512i v, __m512i high, const int g) {
    __m512i u = _mm512_and_si512(v, _mm512_set1_epi8(15));
    return _mm512_mask_add_epi8(u, _mm512_test_epi8_mask(high, bits_of(g)), u, _mm512_set1_epi8(16));
}
INLINE __m512i q5_high(__m512i v, __m512i high, const int g) {
    __m512i u = _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
    return _mm512_mask_add_epi8(u, _mm512_test_epi8_mask(high, bits_of(g + 1)), u, _mm512_set1_epi8(16));
}

/* Codes 64*i .. 64*i + 63 of a Q6_K block, in column order. */
INLINE __m512i q6_codes(const uint8_t *p, const int i) {
    __m512i v = _mm512_loadu_si512(p + 64 * (i / 2));
    __m512i h = _mm512_broadcast_i64x4(load256(p + 128 + 32 * (i / 2)));
    if (i & 1) {
        v = _mm512_srli_epi16(v, 4);
        h = _mm512_srlv_epi16(h, _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1));
    } else {
        h = _mm512_sllv_epi16(h, _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1));
    }
    return _mm512_or_si512(_mm512_and_si512(v, _mm512_set1_epi8(15)), _mm512_and_si512(h, _mm512_set1_epi8(0x30)));
}

#endif
