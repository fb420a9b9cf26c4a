/* common.h: loads, dot products and bit unpacking that the AVX2 files share. Static inline only. */
#ifndef KT_AVX2_COMMON_H
#define KT_AVX2_COMMON_H

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

/* Into the second-level cache: see ../avx512/common.h. */
#define PREFETCH(p, ahead) _mm_prefetch((const char *)(uintptr_t)((uintptr_t)(p) + (ahead)), _MM_HINT_T1)

INLINE __m128i load128(const void *p) { return _mm_loadu_si128((const __m128i_u *)p); }
INLINE __m256i load256(const void *p) { return _mm256_loadu_si256((const __m256i_u *)p); }
INLINE __m256 load_f32(const void *p) { return _mm256_loadu_ps(p); }
INLINE float f16_at(const void *p) { return _cvtsh_ss(kt_load16(p)); }
INLINE __m256 load_f16(const void *p) { return _mm256_cvtph_ps(load128(p)); }
INLINE __m256 load_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}

/* Results of a tile for one token. */
INLINE void store_tile(float *out, __m256 low, __m256 high, int add) {
    _mm256_storeu_ps(out, add ? _mm256_add_ps(load_f32(out), low) : low);
    _mm256_storeu_ps(out + 8, add ? _mm256_add_ps(load_f32(out + 8), high) : high);
}

/* Sums of two products in 16 bits. u must not exceed 127: 2 * 127 * 127 fits, 2 * 255 * 127 would saturate. */
INLINE __m256i dot2(__m256i u, __m256i a) { return _mm256_maddubs_epi16(u, a); }

/* The same for signed bytes w: |w| meets a with the sign of w. 2 * 128 * 127 fits. */
INLINE __m256i dot2_signed(__m256i w, __m256i a) { return dot2(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)); }

/* acc + sums of four products. */
INLINE __m256i add4(__m256i acc, __m256i pairs) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* The first 16 bytes of a Q4_K or Q5_K block (d, dmin, 12 bytes; see kt_k4_scales): 8 scales, then 8 mins. */
INLINE __m128i k4_scales(__m128i header) {
    __m128i low = _mm_shuffle_epi32(header, _MM_SHUFFLE(3, 2, 3, 1)); /* a c b c */
    low = _mm_and_si128(_mm_srlv_epi32(low, _mm_set_epi32(4, 0, 0, 0)),
                        _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
    __m128i top = _mm_srli_epi32(_mm_shuffle_epi32(header, _MM_SHUFFLE(2, 2, 1, 1)), 2); /* a a b b */
    return _mm_or_si128(low, _mm_and_si128(top, _mm_set_epi32(0x30303030, 0, 0x30303030, 0)));
}

INLINE __m256i low4(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

/* Codes 32*i .. 32*i + 31 of a Q6_K block. */
INLINE __m256i q6_codes(const uint8_t *p, const int i) {
    const int half = i / 4, part = i % 4;
    __m256i v = load256(p + 64 * half + 32 * (part & 1)), h = load256(p + 128 + 32 * half);
    v = low4(part < 2 ? v : _mm256_srli_epi16(v, 4));
    h = part == 0   ? _mm256_slli_epi16(h, 4)
        : part == 1 ? _mm256_slli_epi16(h, 2)
        : part == 2 ? h
                    : _mm256_srli_epi16(h, 2);
    return _mm256_or_si256(v, _mm256_and_si256(h, _mm256_set1_epi8(0x30)));
}

#endif
