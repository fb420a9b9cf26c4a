/* dot_vec.h: what the decode texts (../dot_*.h) need of a vector, for AVX-512. avx2/dot_vec.h has the same names.
 *
 * A vector is 64 bytes: four lanes of 16 bytes, 16 int32 or 16 floats. A decode kernel multiplies a vector of codes
 * with a vector of activations; each int32 of the result holds four products. */
#ifndef KT_AVX512_DOT_VEC_H
#define KT_AVX512_DOT_VEC_H

#include "common.h"

enum { LANES = 4, VECTOR = 16 * LANES };
enum { DOT_TOKENS = 4 }; /* tokens of a pass, 1 to 4: two or three sums each, and codes, scales, constants */

typedef __m512i vint;
typedef __m512 vfloat;
typedef __m512 float16s; /* sixteen floats */

/* ---- bytes ------------------------------------------------------------------------------------------ */

INLINE vint v_load(const void *p) { return _mm512_loadu_si512(p); }

/* A register, not an operand of each use: packed bytes cross lines, so that loading them again costs two loads. */
INLINE vint v_once(vint v) {
    __asm__("" : "+v"(v));
    return v;
}
INLINE void v_store(void *p, vint v) { _mm512_storeu_si512(p, v); }
INLINE vint v_minus(vint v) { return _mm512_sub_epi32(_mm512_setzero_si512(), v); } /* of int32 */
INLINE vint v_bytes(int x) { return _mm512_set1_epi8((char)x); }
INLINE vint v_bytes_halves(int x, int y) { return _mm512_inserti64x4(v_bytes(x), _mm256_set1_epi8((char)y), 1); }
/* Lane l: bytes of x << l * step. */
INLINE vint v_bytes_lanes(const int x, const int step) {
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi8((char)(x << step)), _mm_set1_epi8((char)x))),
        _mm256_set_m128i(_mm_set1_epi8((char)(x << 3 * step)), _mm_set1_epi8((char)(x << 2 * step))), 1);
}
INLINE vint v_bit_of_byte(void) { return _mm512_set1_epi64((long long)0x8040201008040201); } /* bit i % 8 of byte i */
INLINE vint v_and(vint a, vint b) { return _mm512_and_si512(a, b); }
INLINE vint v_low4(vint v) { return _mm512_and_si512(v, v_bytes(15)); }
INLINE vint v_high4(vint v) { return v_low4(_mm512_srli_epi16(v, 4)); }
INLINE vint v_shift_right(vint v, const int n) { return _mm512_srli_epi16(v, n); } /* bits of the next byte come in */
INLINE vint v_flip(vint v) { return _mm512_xor_si512(v, v_bytes(-128)); }

INLINE vint v_max(vint a, vint b) { return _mm512_max_epu8(a, b); }
INLINE int v_any_byte_is(vint v, int x) { return _mm512_cmpeq_epi8_mask(v, v_bytes(x)) != 0; }

/* Lane l: the 16 bytes at p + l * step. */
INLINE vint v_lanes(const uint8_t *p, size_t step) {
    __m512i v = _mm512_castsi128_si512(load128(p));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load128(p + step));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load128(p + 2 * step));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, load128(p + 3 * step));
}

/* Lanes 0, 2 .. of a, then of b; lanes 1, 3 .. */
INLINE vint v_even_lanes(vint a, vint b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
INLINE vint v_odd_lanes(vint a, vint b) { return _mm512_shuffle_i32x4(a, b, 0xdd); }

/* Half h of the vector: the 32 bytes at p + h * step. */
INLINE vint v_halves(const uint8_t *p, size_t step) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load256(p)), load256(p + step), 1);
}

/* Entry v[i] (0..15) of a table of 16 bytes. */
INLINE vint v_look_up(const uint8_t *table, vint v) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load128(table)), v);
}

/* u + 2^n in each byte that meets a byte of `bits` which has the bits of `mask` set; u is below 2^n. */
INLINE vint v_add_where(vint u, vint bits, vint mask, const int value) {
    return _mm512_mask_add_epi8(u, _mm512_test_epi8_mask(bits, mask), u, v_bytes(value));
}

/* The first two bytes of each lane (part 1: the next two), each eight times: what holds the bits of 16 values. */
INLINE vint v_spread_bits(vint of, const int part) {
    const __m128i first = _mm_set_epi64x(0x0101010101010101, 0),
                  second = _mm_set_epi64x(0x0303030303030303, 0x0202020202020202);
    return _mm512_shuffle_epi8(of, _mm512_broadcast_i32x4(part ? second : first));
}

/* ---- dot products ----------------------------------------------------------------------------------- */

#ifdef __AVX512VNNI__
enum { WIDE_ZERO = 128 }; /* wide codes are unsigned, and `start` takes 128 * sum of activations away */
INLINE vint v_wide_unsigned(vint u) { return u; }
INLINE vint v_wide_signed(vint w) { return v_flip(w); }
INLINE vint v_dot_wide(vint start, vint u, vint a) { return dot4(start, u, a); }
#else
enum { WIDE_ZERO = 0 };
INLINE vint v_wide_unsigned(vint u) { return v_flip(u); }
INLINE vint v_wide_signed(vint w) { return w; }
INLINE vint v_dot_wide(vint start, vint w, vint a) { return dot4_signed(start, w, a); }
#endif

/* start + products of codes below 128. */
INLINE vint v_dot(vint start, vint u, vint a) { return dot4(start, u, a); }

/* The same of two pairs of vectors, codes below 64. */
INLINE vint v_dot_two(vint start, vint u, vint a, vint v, vint b) {
#ifdef __AVX512VNNI__
    return dot4(dot4(start, u, a), v, b);
#else
    __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(u, a), _mm512_maddubs_epi16(v, b));
    return _mm512_add_epi32(start, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

/* ---- floats ----------------------------------------------------------------------------------------- */

INLINE vfloat v_zero(void) { return _mm512_setzero_ps(); }
INLINE vfloat v_floats(float x) { return _mm512_set1_ps(x); }
INLINE vfloat v_load_f32(const void *p) { return _mm512_loadu_ps(p); }
INLINE vfloat v_load_f16(const void *p) { return load_f16(p); }
INLINE vfloat v_load_bf16(const void *p) { return load_bf16(p); }
INLINE vfloat v_add(vfloat a, vfloat b) { return _mm512_add_ps(a, b); }
INLINE vfloat v_mul(vfloat a, vfloat b) { return _mm512_mul_ps(a, b); }
INLINE vfloat v_fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float v_sum(vfloat v) { return _mm512_reduce_add_ps(v); }

/* The same for n <= 16; v has 16 to be read. */
INLINE void sums16(const vfloat *v, int n, float *out) {
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

/* out[i] = sum of v[i], i < n. */
INLINE void v_sums(const vfloat *v, int n, float *out) {
    for (int i = 0; i < n; i += 16) sums16(v + i, n - i < 16 ? n - i : 16, out + i);
}

/* Byte b of each dword, which is e4m3, as a float of 2^-120 of it. */
INLINE vfloat v_e4m3_byte(vint v, const int b) {
    const __m512i bits = _mm512_srai_epi32(b == 3 ? v : _mm512_slli_epi32(v, 24 - 8 * b), 4);
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0x87f00000)));
}

/* s[0] in the first half, s[1] in the second. */
INLINE vfloat v_halves_of(const float *s) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(s[0]), 0xff00, _mm_load_ss(s + 1));
}

/* acc + eight floats. */
INLINE vfloat v_add8(vfloat acc, __m256 v) { return _mm512_add_ps(acc, _mm512_zextps256_ps512(v)); }

/* s[0..7] * d[0..7]; s[8..15] * d[8..15] is added to acc. */
INLINE __m256 v_scales_and_mins(float16s s, const float *d, vfloat *acc) {
    const __m512 v = _mm512_mul_ps(s, _mm512_loadu_ps(d));
    *acc = _mm512_mask_add_ps(*acc, 0xff00, *acc, v);
    return _mm512_castps512_ps256(v);
}

/* acc + sum * scale. */
INLINE vfloat v_scaled(vfloat acc, vint sum, vfloat scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

/* Which scale each int32 of a sum meets: first + i / per for the first eight, and `then` more for the other eight. */
INLINE __m512i pick(const int first, const int per, const int then) {
#define AT(j) first + (j) % 8 / per + (j) / 8 * then
    return _mm512_set_epi32(AT(15), AT(14), AT(13), AT(12), AT(11), AT(10), AT(9), AT(8), AT(7), AT(6), AT(5), AT(4),
                            AT(3), AT(2), AT(1), AT(0));
#undef AT
}
INLINE vfloat v_pick8(__m256 s, const int first, const int per, const int then) {
    return _mm512_permutexvar_ps(pick(first, per, then), _mm512_castps256_ps512(s));
}
/* Lane l of a sum meets scale first + l * step. */
INLINE vfloat v_pick8_lanes(__m256 s, const int first, const int step) {
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_mullo_epi32(lane, _mm512_set1_epi32(step)));
    return _mm512_permutexvar_ps(at, _mm512_castps256_ps512(s));
}
INLINE vfloat v_pick16(float16s s, const int first, const int per, const int then) {
    return _mm512_permutexvar_ps(pick(first, per, then), s);
}

INLINE float16s f16s_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE float16s f16s_mul(float16s a, float16s b) { return _mm512_mul_ps(a, b); }
INLINE float16s f16s_scale(float16s a, float s) { return _mm512_mul_ps(a, _mm512_set1_ps(s)); }
INLINE float16s f16s_signed(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); }
INLINE float16s f16s_join(__m256 a, __m256 b) { return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1); }
INLINE vfloat v_fma16(float16s a, float16s b, vfloat acc) { return _mm512_fmadd_ps(a, b, acc); }

/* ---- scales of formats ------------------------------------------------------------------------------ */

/* Words 0, step, 2 * step ... of 128 bytes. */
INLINE __m128i words8(const uint8_t *p, const int step) {
    const __m512i at =
        _mm512_castsi128_si512(_mm_set_epi16((short)(7 * step), (short)(6 * step), (short)(5 * step), (short)(4 * step),
                                             (short)(3 * step), (short)(2 * step), (short)step, 0));
    return _mm512_castsi512_si128(_mm512_permutex2var_epi16(_mm512_loadu_si512(p), at, _mm512_loadu_si512(p + 64)));
}

/* fp16 numbers at p + i * 18, and p + i * 34, i < 8. */
INLINE __m256 halves_18(const uint8_t *p) { return _mm256_cvtph_ps(words8(p, 9)); }
INLINE __m256 halves_34(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(words8(p, 17), words8(p + 136, 17)));
}

/* Dwords at p + i * 20, i < 8. */
INLINE __m256i dwords_20(const uint8_t *p) {
    const __m512i at = _mm512_castsi256_si512(_mm256_set_epi32(31, 26, 21, 16, 15, 10, 5, 0));
    return _mm512_castsi512_si256(_mm512_permutex2var_epi32(_mm512_loadu_si512(p), at, _mm512_loadu_si512(p + 80)));
}

/* The fp16 numbers in the low halves of dwords. */
INLINE __m256 low_halves(__m256i v) { return _mm256_cvtph_ps(_mm256_cvtepi32_epi16(v)); }

/* Scales of a Q4_K or Q5_K block, then its mins, eight each. */
INLINE float16s k4_scales_mins(const uint8_t *p) { return k4_scales(load128(p)); }

#endif
