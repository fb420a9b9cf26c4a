/* dot_vec.h: what the decode texts (../dot_*.h) need of a vector, for AVX2 and, compiled again, AVX-VNNI.
 * avx512/dot_vec.h has the same names and says more.
 *
 * A vector is 32 bytes: two lanes of 16 bytes, 8 int32 or 8 floats. */
#ifndef KT_AVX2_DOT_VEC_H
#define KT_AVX2_DOT_VEC_H

#include "common.h"

enum { LANES = 2, VECTOR = 16 * LANES };
enum { DOT_TOKENS = 2 }; /* tokens of a pass: two or three sums each, of sixteen registers */

typedef __m256i vint;
typedef __m256 vfloat;
typedef struct {
    __m256 half[2];
} float16s; /* sixteen floats */

/* ---- bytes ------------------------------------------------------------------------------------------ */

INLINE vint v_load(const void *p) { return load256(p); }

/* A register, not an operand of each use: packed bytes cross lines, so that loading them again costs two loads. */
INLINE vint v_once(vint v) {
    __asm__("" : "+x"(v));
    return v;
}
INLINE void v_store(void *p, vint v) { _mm256_storeu_si256((__m256i_u *)p, v); }
INLINE vint v_minus(vint v) { return _mm256_sub_epi32(_mm256_setzero_si256(), v); } /* of int32 */
INLINE vint v_bytes(int x) { return _mm256_set1_epi8((char)x); }
INLINE vint v_bytes_halves(int x, int y) { return (void)y, v_bytes(x); } /* 32 bytes are the first half */
/* Lane l: bytes of x << l * step. */
INLINE vint v_bytes_lanes(const int x, const int step) {
    return _mm256_set_m128i(_mm_set1_epi8((char)(x << step)), _mm_set1_epi8((char)x));
}
INLINE vint v_bit_of_byte(void) { return _mm256_set1_epi64x((long long)0x8040201008040201); } /* bit i % 8 of byte i */
INLINE vint v_and(vint a, vint b) { return _mm256_and_si256(a, b); }
INLINE vint v_low4(vint v) { return v_and(v, v_bytes(15)); }
INLINE vint v_high4(vint v) { return v_low4(_mm256_srli_epi16(v, 4)); }
INLINE vint v_shift_right(vint v, const int n) { return _mm256_srli_epi16(v, n); } /* bits of the next byte come in */
INLINE vint v_flip(vint v) { return _mm256_xor_si256(v, v_bytes(-128)); }

INLINE vint v_max(vint a, vint b) { return _mm256_max_epu8(a, b); }
INLINE int v_any_byte_is(vint v, int x) { return _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, v_bytes(x))) != 0; }

/* Lane l: the 16 bytes at p + l * step. */
INLINE vint v_lanes(const uint8_t *p, size_t step) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(p)), load128(p + step), 1);
}

/* Lane 0 of a, then of b; lane 1 of both. */
INLINE vint v_even_lanes(vint a, vint b) { return _mm256_permute2x128_si256(a, b, 0x20); }
INLINE vint v_odd_lanes(vint a, vint b) { return _mm256_permute2x128_si256(a, b, 0x31); }

/* Half h of 64 bytes is the 32 at p + h * step: here the first only. */
INLINE vint v_halves(const uint8_t *p, size_t step) { return (void)step, load256(p); }

/* Entry v[i] (0..15) of a table of 16 bytes. */
INLINE vint v_look_up(const uint8_t *table, vint v) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table)), v);
}

/* u + 2^n in each byte that meets a byte of `bits` which has the bits of `mask` set; u is below 2^n. */
INLINE vint v_add_where(vint u, vint bits, vint mask, const int value) {
    return _mm256_or_si256(u, v_and(_mm256_cmpeq_epi8(v_and(bits, mask), mask), v_bytes(value)));
}

/* The first two bytes of each lane (part 1: the next two), each eight times: what holds the bits of 16 values. */
INLINE vint v_spread_bits(vint of, const int part) {
    const __m128i first = _mm_set_epi64x(0x0101010101010101, 0),
                  second = _mm_set_epi64x(0x0303030303030303, 0x0202020202020202);
    return _mm256_shuffle_epi8(of, _mm256_broadcastsi128_si256(part ? second : first));
}

/* ---- dot products ----------------------------------------------------------------------------------- */

#ifdef __AVXVNNI__
enum { WIDE_ZERO = 128 }; /* wide codes are unsigned, and `start` takes 128 * sum of activations away */
INLINE vint v_wide_unsigned(vint u) { return u; }
INLINE vint v_wide_signed(vint w) { return v_flip(w); }
INLINE vint v_dot(vint start, vint u, vint a) { return _mm256_dpbusd_avx_epi32(start, u, a); }
INLINE vint v_dot_wide(vint start, vint u, vint a) { return v_dot(start, u, a); }
INLINE vint v_dot_two(vint start, vint u, vint a, vint v, vint b) { return v_dot(v_dot(start, u, a), v, b); }
#else
enum { WIDE_ZERO = 0 };
INLINE vint v_wide_unsigned(vint u) { return v_flip(u); }
INLINE vint v_wide_signed(vint w) { return w; }

/* start + products of codes below 128. */
INLINE vint v_dot(vint start, vint u, vint a) { return add4(start, dot2(u, a)); }
INLINE vint v_dot_wide(vint start, vint w, vint a) { return add4(start, dot2_signed(w, a)); }

/* The same of two pairs of vectors, codes below 64: 4 * 63 * 127 fits 16 bits. */
INLINE vint v_dot_two(vint start, vint u, vint a, vint v, vint b) {
    return add4(start, _mm256_add_epi16(dot2(u, a), dot2(v, b)));
}
#endif

/* ---- floats ----------------------------------------------------------------------------------------- */

INLINE vfloat v_zero(void) { return _mm256_setzero_ps(); }
INLINE vfloat v_floats(float x) { return _mm256_set1_ps(x); }
INLINE vfloat v_load_f32(const void *p) { return load_f32(p); }
INLINE vfloat v_load_f16(const void *p) { return load_f16(p); }
INLINE vfloat v_load_bf16(const void *p) { return load_bf16(p); }
INLINE vfloat v_add(vfloat a, vfloat b) { return _mm256_add_ps(a, b); }
INLINE vfloat v_mul(vfloat a, vfloat b) { return _mm256_mul_ps(a, b); }
INLINE vfloat v_fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float v_sum(vfloat v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/* out[i] = sum of v[i], i < n. */
INLINE void v_sums(const vfloat *v, int n, float *out) {
    for (int i = 0; i < n; i++) out[i] = v_sum(v[i]);
}

/* Byte b of each dword, which is e4m3, as a float of 2^-120 of it. */
INLINE vfloat v_e4m3_byte(vint v, const int b) {
    const __m256i bits = _mm256_srai_epi32(b == 3 ? v : _mm256_slli_epi32(v, 24 - 8 * b), 4);
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0x87f00000)));
}

/* s[0]: the scale of the 32 columns of a vector. */
INLINE vfloat v_halves_of(const float *s) { return _mm256_broadcast_ss(s); }

/* acc + eight floats. */
INLINE vfloat v_add8(vfloat acc, __m256 v) { return _mm256_add_ps(acc, v); }

/* acc + sum * scale. */
INLINE vfloat v_scaled(vfloat acc, vint sum, vfloat scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc);
}

/* int32 number i of a sum meets scale first + i / per; `then` is for longer vectors. */
INLINE vfloat v_pick8(__m256 s, const int first, const int per, const int then) {
    const __m256i lane = _mm256_set_epi32(7 / per, 6 / per, 5 / per, 4 / per, 3 / per, 2 / per, 1 / per, 0);
    (void)then;
    return _mm256_permutevar8x32_ps(s, _mm256_add_epi32(_mm256_set1_epi32(first), lane));
}
/* Lane l of a sum meets scale first + l * step. */
INLINE vfloat v_pick8_lanes(__m256 s, const int first, const int step) {
    const __m256i lane = _mm256_set_epi32(step, step, step, step, 0, 0, 0, 0);
    return _mm256_permutevar8x32_ps(s, _mm256_add_epi32(_mm256_set1_epi32(first), lane));
}
INLINE vfloat v_pick16(float16s s, const int first, const int per, const int then) {
    return v_pick8(s.half[first / 8], first % 8, per, then);
}

INLINE float16s f16s_load(const float *p) { return (float16s){{load_f32(p), load_f32(p + 8)}}; }
INLINE float16s f16s_mul(float16s a, float16s b) {
    return (float16s){{v_mul(a.half[0], b.half[0]), v_mul(a.half[1], b.half[1])}};
}
INLINE float16s f16s_scale(float16s a, float s) { return f16s_mul(a, (float16s){{v_floats(s), v_floats(s)}}); }
INLINE __m256 signed8(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)); }
INLINE float16s f16s_signed(__m128i v) { return (float16s){{signed8(v), signed8(_mm_unpackhi_epi64(v, v))}}; }
INLINE float16s f16s_join(__m256 a, __m256 b) { return (float16s){{a, b}}; }
/* s[0..7] * d[0..7]; s[8..15] * d[8..15] is added to acc. */
INLINE __m256 v_scales_and_mins(float16s s, const float *d, vfloat *acc) {
    *acc = v_fma(s.half[1], load_f32(d + 8), *acc);
    return v_mul(s.half[0], load_f32(d));
}
INLINE vfloat v_fma16(float16s a, float16s b, vfloat acc) {
    return v_fma(a.half[1], b.half[1], v_fma(a.half[0], b.half[0], acc));
}

/* ---- scales of formats ------------------------------------------------------------------------------ */

/* fp16 numbers at p + i * step, i < 8. */
INLINE __m256 halves_at(const uint8_t *p, const int step) {
#define AT(i) (short)kt_load16(p + (i) * step)
    return _mm256_cvtph_ps(_mm_set_epi16(AT(7), AT(6), AT(5), AT(4), AT(3), AT(2), AT(1), AT(0)));
#undef AT
}
INLINE __m256 halves_18(const uint8_t *p) { return halves_at(p, 18); }
INLINE __m256 halves_34(const uint8_t *p) { return halves_at(p, 34); }

/* Dwords at p + i * 20, i < 8. */
INLINE __m256i dwords_20(const uint8_t *p) {
#define AT(i) (int)kt_load32(p + (i) * 20)
    return _mm256_set_epi32(AT(7), AT(6), AT(5), AT(4), AT(3), AT(2), AT(1), AT(0));
#undef AT
}

/* The fp16 numbers in the low halves of dwords. */
INLINE __m256 low_halves(__m256i v) {
    const __m256i words =
        _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_set_epi32(-1, -1, 0x0d0c0908, 0x05040100)));
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
}

/* Scales of a Q4_K or Q5_K block, then its mins, eight each. */
INLINE float16s k4_scales_mins(const uint8_t *p) {
    const __m128i header = load128(p);
    const __m128 both = _mm_cvtph_ps(header);
    const float16s s = f16s_signed(k4_scales(header)); /* below 64 */
    return f16s_mul(s, (float16s){{_mm256_broadcastss_ps(both), _mm256_broadcastss_ps(_mm_movehdup_ps(both))}});
}

#endif
