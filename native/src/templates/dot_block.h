/* templates/dot_block.h: decode of GGUF's quantized blocks, compiled for AVX2 and AVX-512 alike: the includer brings
 * dot_vec.h. Grids (IQ1 to IQ3) and ternary digits (TQ1_0) are not here: they decode through tiles.
 *
 * Each format says how a window's codes leave its bytes, and what its scales are. */
#include "dot_rows.h"
#include "../formats/iq_tables.h"

/* ---- scales ------------------------------------------------------------------------------------------ */

/* What a window's scales are, and what becomes of them for one token; mins go to their own sum. `plain` and `mins`
 * are of groups of 32, of which a window has eight; `plain16` and `mins16` of groups of 16. */
typedef __m256 plain;
typedef float16s mins; /* eight scales, then eight mins */
typedef float16s plain16;
typedef struct {
    float16s s, m;
} mins16;

INLINE __m256 plain_scaled(plain s, const struct window *x, vfloat *acc) {
    (void)acc;
    return _mm256_mul_ps(s, _mm256_loadu_ps(x->d));
}
INLINE __m256 mins_scaled(mins s, const struct window *x, vfloat *acc) { return v_scales_and_mins(s, x->d, acc); }
INLINE float16s plain16_scaled(plain16 s, const struct window *x, vfloat *acc) {
    (void)acc;
    return f16s_mul(s, f16s_load(x->d));
}
INLINE float16s mins16_scaled(mins16 s, const struct window *x, vfloat *acc) {
    *acc = v_fma16(s.m, f16s_load(x->m), *acc);
    return f16s_mul(s.s, f16s_load(x->d));
}

/* ---- blocks of 32 with nibbles ---------------------------------------------------------------------- */

/* p: the window. Its blocks are `bytes` long; codes(p, i, &low, &high) gives chain i, scales(p) its scales. */
#define NIBBLES(name, kind, bytes, zero, dot_two)                                                                \
    INLINE void name##_row(const uint8_t *w, size_t ahead, const struct ready *a, const int T, struct sums *t) {  \
        EACH_WINDOW(a, T, w, 8 * (bytes)) {                                                                       \
            fetch(p, ahead, 8 * (bytes));                                                                         \
            const kind of = name##_scales(p);                                                                     \
            __m256 s[DOT_TOKENS];                                                                                 \
            for (int k = 0; k < T; k++) s[k] = kind##_scaled(of, x + k, &t[k].mins);                              \
            for (int i = 0; i < VECTORS / 2; i++) {                                                               \
                vint low, high;                                                                                   \
                name##_codes(p, i, &low, &high);                                                                  \
                for (int k = 0; k < T; k++) {                                                                     \
                    const int8_t *q = x[k].q + 2 * i * VECTOR;                                                    \
                    const vint sum = dot_two(start_of(x + k, i, zero), low, v_load(q), high, v_load(q + VECTOR)); \
                    t[k].s[i % 2] = v_scaled(t[k].s[i % 2], sum, scales_of(HALVES, s[k], i));                     \
                }                                                                                                 \
            }                                                                                                     \
        }                                                                                                         \
    }                                                                                                             \
    DOT(name, HALVES, zero, 32, 8 * (bytes))

INLINE __m256 minus(__m256 v) { return _mm256_sub_ps(_mm256_setzero_ps(), v); }

/* Fifth bits: 4 bytes a block, bit i of value i. */
INLINE void add_fifths(const uint8_t *qh, size_t step, vint *low, vint *high) {
    const vint bit = v_bit_of_byte(), of = v_lanes(qh, step);
    *low = v_add_where(*low, v_spread_bits(of, 0), bit, 16);
    *high = v_add_where(*high, v_spread_bits(of, 1), bit, 16);
}

/* Dwords at p + i * step, i < 8. */
INLINE __m256i dwords(const uint8_t *p, const int step) {
#define AT(i) (int)kt_load32(p + (i) * step)
    return _mm256_set_epi32(AT(7), AT(6), AT(5), AT(4), AT(3), AT(2), AT(1), AT(0));
#undef AT
}

INLINE plain q4_0_scales(const uint8_t *p) {
    return halves_18(p);
}
INLINE void q4_0_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    const vint v = v_once(v_lanes(p + i * LANES * 18 + 2, 18));
    *low = v_low4(v);
    *high = v_high4(v);
}
NIBBLES(q4_0, plain, 18, 8, v_dot_two)

INLINE mins q4_1_scales(const uint8_t *p) {
    const __m256i both = dwords_20(p);
    return f16s_join(low_halves(both), minus(low_halves(_mm256_srli_epi32(both, 16))));
}
INLINE void q4_1_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    const vint v = v_lanes(p + i * LANES * 20 + 4, 20);
    *low = v_low4(v);
    *high = v_high4(v);
}
NIBBLES(q4_1, mins, 20, 0, v_dot_two)

INLINE plain q5_0_scales(const uint8_t *p) {
    return low_halves(dwords(p, 22));
}
INLINE void q5_0_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    const uint8_t *b = p + i * LANES * 22;
    const vint v = v_lanes(b + 6, 22);
    *low = v_low4(v);
    *high = v_high4(v);
    add_fifths(b + 2, 22, low, high);
}
NIBBLES(q5_0, plain, 22, 16, v_dot_two)

INLINE mins q5_1_scales(const uint8_t *p) {
    const __m256i both = dwords(p, 24);
    return f16s_join(low_halves(both), minus(low_halves(_mm256_srli_epi32(both, 16))));
}
INLINE void q5_1_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    const uint8_t *b = p + i * LANES * 24;
    const vint v = v_lanes(b + 8, 24);
    *low = v_low4(v);
    *high = v_high4(v);
    add_fifths(b + 4, 24, low, high);
}
NIBBLES(q5_1, mins, 24, 0, v_dot_two)

/* Codebook values: + 128 where wide codes are unsigned. */
INLINE void look_up_iq4(vint v, vint *low, vint *high) {
    *low = v_wide_unsigned(v_look_up(kt_iq4_codes, v_low4(v)));
    *high = v_wide_unsigned(v_look_up(kt_iq4_codes, v_high4(v)));
}
INLINE vint dot_two_wide(vint start, vint u, vint a, vint v, vint b) {
    return v_dot_wide(v_dot_wide(start, u, a), v, b);
}

INLINE plain iq4_nl_scales(const uint8_t *p) { return q4_0_scales(p); }
INLINE void iq4_nl_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    look_up_iq4(v_lanes(p + i * LANES * 18 + 2, 18), low, high);
}
NIBBLES(iq4_nl, plain, 18, WIDE_ZERO, dot_two_wide)

/* Half of 2^(e - 127), as kt_e8m0_half: codes 0 and 1 are subnormal, 255 is 2^127. The bytes are gathered by whole
 * numbers, since loads of vectors are what this format has too many of. */
INLINE plain mxfp4_scales(const uint8_t *p) {
#define AT(i) ((uint32_t)p[17 * (i)] << 8 * ((i) % 4))
    const uint32_t low = AT(0) | AT(1) | AT(2) | AT(3), high = AT(4) | AT(5) | AT(6) | AT(7);
#undef AT
    const __m256i e = _mm256_cvtepu8_epi32(_mm_set_epi32(0, 0, (int)high, (int)low));
    const __m256i bits = _mm256_max_epi32(_mm256_slli_epi32(e, 23), _mm256_set1_epi32(0x00400000));
    const __m256 half = _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0.5f));
    return _mm256_min_ps(half, _mm256_set1_ps(0x1p127f));
}
INLINE void mxfp4_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    const vint v = v_lanes(p + i * LANES * 17 + 1, 17);
    *low = v_look_up(kt_fp4_codes, v_low4(v));
    *high = v_look_up(kt_fp4_codes, v_high4(v));
}
NIBBLES(mxfp4, plain, 17, 12, v_dot_two)

/* Bytes: chains are first and second halves of blocks. */
INLINE plain q8_0_scales(const uint8_t *p) { return halves_34(p); }
INLINE void q8_0_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    p += i * LANES * 34 + 2;
    const vint a = v_halves(p, 34), b = v_halves(p + LANES / 2 * 34, 34);
    *low = v_wide_signed(v_even_lanes(a, b));
    *high = v_wide_signed(v_odd_lanes(a, b));
}
NIBBLES(q8_0, plain, 34, WIDE_ZERO, dot_two_wide)

/* IQ4_XS: 136 bytes for 8 such blocks, whose scales of 6 bits come first. */
INLINE plain iq4_xs_scales(const uint8_t *p) {
    const __m256i fours = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0),
                  twos = _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0);
    __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32((int)kt_load32(p + 4)), fours);
    __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(kt_load16(p + 2)), twos);
    low = _mm256_and_si256(low, _mm256_set1_epi32(15));
    high = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
    const __m256i s = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(s), _mm256_set1_ps(f16_at(p)));
}
INLINE void iq4_xs_codes(const uint8_t *p, const int i, vint *low, vint *high) {
    look_up_iq4(v_once(v_load(p + 8 + i * VECTOR)), low, high);
}
NIBBLES(iq4_xs, plain, 17, WIDE_ZERO, dot_two_wide)

/* ---- super-blocks of 256 with nibbles ---------------------------------------------------------------- */

/* codes(p, i, u) gives two chains of two vectors, low and high nibbles of LANES times 32 bytes. */
#define NIBBLES_K(name, bytes)                                                                                       \
    INLINE void name##_row(const uint8_t *w, size_t ahead, const struct ready *a, const int T, struct sums *t) {     \
        EACH_WINDOW(a, T, w, bytes) {                                                                                \
            fetch(p, ahead, bytes);                                                                                  \
            const mins of = k4_scales_mins(p);                                                                       \
            __m256 s[DOT_TOKENS];                                                                                    \
            for (int k = 0; k < T; k++) s[k] = mins_scaled(of, x + k, &t[k].mins);                                   \
            for (int i = 0; i < VECTORS / 4; i++) {                                                                  \
                vint u[4];                                                                                           \
                name##_codes(p, i, u);                                                                               \
                for (int k = 0; k < T; k++)                                                                          \
                    for (int j = 0; j < 2; j++) {                                                                    \
                        const int8_t *q = x[k].q + (4 * i + 2 * j) * VECTOR;                                         \
                        const vint sum = v_dot_two(v_bytes(0), u[2 * j], v_load(q), u[2 * j + 1], v_load(q + VECTOR)); \
                        t[k].s[j] = v_scaled(t[k].s[j], sum, scales_of(PAIRS, s[k], 2 * i + j));                     \
                    }                                                                                                \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DOT(name, PAIRS, 0, 32, bytes)

/* First and second halves of 32 bytes. */
INLINE void halves_apart(const uint8_t *p, vint *first, vint *second) {
    const vint a = v_load(p), b = v_load(p + VECTOR);
    *first = v_once(v_even_lanes(a, b));
    *second = v_once(v_odd_lanes(a, b));
}

INLINE void q4_k_codes(const uint8_t *p, const int i, vint *u) {
    vint first, second;
    halves_apart(p + 16 + 2 * i * VECTOR, &first, &second);
    u[0] = v_low4(first);
    u[1] = v_low4(second);
    u[2] = v_high4(first);
    u[3] = v_high4(second);
}
NIBBLES_K(q4_k, 144)

INLINE void q5_k_codes(const uint8_t *p, const int i, vint *u) { /* bit g of 32 bytes: of group g */
    const vint bits[2] = {v_lanes(p + 16, 0), v_lanes(p + 32, 0)};
    vint v[2];
    halves_apart(p + 48 + 2 * i * VECTOR, &v[0], &v[1]);
    for (int j = 0; j < 2; j++) {
        u[j] = v_add_where(v_low4(v[j]), bits[j], v_bytes_lanes(1 << 2 * LANES * i, 2), 16);
        u[2 + j] = v_add_where(v_high4(v[j]), bits[j], v_bytes_lanes(2 << 2 * LANES * i, 2), 16);
    }
}
NIBBLES_K(q5_k, 176)

/* ---- a vector of codes a sum ------------------------------------------------------------------------ */

/* codes(p, i, u) gives vectors each * i .. of a window of `bytes` bytes. */
#define VECTORS32(name, kind, bytes, order, each, zero, dot)                                                         \
    INLINE void name##_row(const uint8_t *w, size_t ahead, const struct ready *a, const int T, struct sums *t) {     \
        EACH_WINDOW(a, T, w, bytes) {                                                                                \
            fetch(p, ahead, bytes);                                                                                  \
            const kind of = name##_scales(p);                                                                        \
            __m256 s[DOT_TOKENS];                                                                                    \
            for (int k = 0; k < T; k++) s[k] = kind##_scaled(of, x + k, &t[k].mins);                                 \
            for (int v = 0; v < VECTORS; v += each) {                                                                \
                vint u[each];                                                                                        \
                name##_codes(p, v / each, u);                                                                        \
                for (int k = 0; k < T; k++)                                                                          \
                    for (int j = 0; j < each; j++) {                                                                 \
                        const vint sum = dot(start_of(x + k, v + j, zero), u[j], v_load(x[k].q + (v + j) * VECTOR)); \
                        t[k].s[j % 2] = v_scaled(t[k].s[j % 2], sum, scales_of(order, s[k], v + j));                 \
                    }                                                                                                \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DOT(name, order, zero, 32, bytes)

/* Two bits: 32 bytes a half of the block, four vectors of codes a load. */
INLINE void two_bits(const uint8_t *qs, const int i, vint *u) {
    const vint v = v_once(v_load(qs + i * VECTOR)), three = v_bytes(3);
    u[0] = v_and(v, three);
    u[1] = v_and(v_shift_right(v, 2), three);
    u[2] = v_and(v_shift_right(v, 4), three);
    u[3] = v_and(v_shift_right(v, 6), three);
}

INLINE plain tq2_0_scales(const uint8_t *p) {
    return _mm256_set1_ps(f16_at(p + 64));
}
INLINE void tq2_0_codes(const uint8_t *p, const int i, vint *u) { two_bits(p, i, u); }
VECTORS32(tq2_0, plain, 66, QUARTERS, 4, 1, v_dot)

/* ---- groups of 16 ----------------------------------------------------------------------------------- */

#define VECTORS16(name, kind, bytes, order, each, zero)                                                              \
    INLINE void name##_row(const uint8_t *w, size_t ahead, const struct ready *a, const int T, struct sums *t) {     \
        EACH_WINDOW(a, T, w, bytes) {                                                                                \
            fetch(p, ahead, bytes);                                                                                  \
            const kind of = name##_scales(p);                                                                        \
            float16s s[DOT_TOKENS];                                                                                  \
            for (int k = 0; k < T; k++) s[k] = kind##_scaled(of, x + k, &t[k].mins);                                 \
            for (int v = 0; v < VECTORS; v += each) {                                                                \
                vint u[each];                                                                                        \
                name##_codes(p, v / each, u);                                                                        \
                for (int k = 0; k < T; k++)                                                                          \
                    for (int j = 0; j < each; j++) {                                                                 \
                        const vint sum = v_dot(start_of(x + k, v + j, zero), u[j], v_load(x[k].q + (v + j) * VECTOR)); \
                        t[k].s[(v + j) % 2] = v_scaled(t[k].s[(v + j) % 2], sum, scales16_of(order, s[k], v + j));   \
                    }                                                                                                \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DOT(name, order, zero, 16, bytes)

INLINE plain16 q6_k_scales(const uint8_t *p) {
    return f16s_scale(f16s_signed(load128(p + 192)), f16_at(p + 208));
}
INLINE void q6_k_codes(const uint8_t *p, const int i, vint *u) { u[0] = q6_codes(p, i); }
VECTORS16(q6_k, plain16, 210, IN_ORDER, 1, 32)

INLINE mins16 q2_k_scales(const uint8_t *p) {
    const __m128i both = load128(p), low = _mm_set1_epi8(15);
    const float16s s = f16s_signed(_mm_and_si128(both, low)),
                   m = f16s_signed(_mm_and_si128(_mm_srli_epi16(both, 4), low));
    return (mins16){f16s_scale(s, f16_at(p + 80)), f16s_scale(m, f16_at(p + 82))};
}
INLINE void q2_k_codes(const uint8_t *p, const int i, vint *u) { two_bits(p + 16, i, u); }
VECTORS16(q2_k, mins16, 84, QUARTERS, 4, 0)

INLINE plain16 q3_k_scales(const uint8_t *p) {
    const uint32_t a = kt_load32(p + 96), b = kt_load32(p + 100), c = kt_load32(p + 104);
    __m128i low = _mm_and_si128(_mm_set_epi32((int)(b >> 4), (int)(a >> 4), (int)b, (int)a), _mm_set1_epi8(15));
    __m128i high = _mm_srlv_epi32(_mm_set1_epi32((int)c), _mm_set_epi32(6, 4, 2, 0));
    high = _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4);
    const __m128i s = _mm_sub_epi8(_mm_or_si128(low, high), _mm_set1_epi8(32));
    return f16s_scale(f16s_signed(s), f16_at(p + 108));
}
INLINE void q3_k_codes(const uint8_t *p, const int i, vint *u) { /* bit g: of group g; 64 bytes hold groups j, j + 4 */
    const vint bits = v_halves(p, 0);
    two_bits(p + 32, i, u);
    for (int j = 0; j < 4; j++) u[j] = v_add_where(u[j], bits, v_bytes_halves(1 << (4 * i + j), 16 << j), 4);
}
VECTORS16(q3_k, plain16, 110, QUARTERS, 4, 4)

/* NVFP4: four blocks of 64 a window, each with four scales of 16. */
INLINE plain16 nvfp4_scales(const uint8_t *p) {
    const __m128i e =
        _mm_set_epi32((int)kt_load32(p + 108), (int)kt_load32(p + 72), (int)kt_load32(p + 36), (int)kt_load32(p));
    const __m256i words = _mm256_cvtepu8_epi16(_mm_and_si128(e, _mm_set1_epi8(127)));
    const __m256i nan = _mm256_cmpeq_epi16(words, _mm256_set1_epi16(127));
    const __m256i half = _mm256_slli_epi16(_mm256_andnot_si256(nan, words), 7); /* as fp16: 2^-8 of e4m3 */
    const float16s s =
        f16s_join(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)));
    return f16s_scale(s, 128.0f); /* codes are doubled */
}
INLINE void nvfp4_row(const uint8_t *w, size_t ahead, const struct ready *a, const int T, struct sums *t) {
    EACH_WINDOW(a, T, w, 144) {
        fetch(p, ahead, 144);
        const plain16 of = nvfp4_scales(p);
        float16s s[DOT_TOKENS];
        for (int k = 0; k < T; k++) s[k] = plain16_scaled(of, x + k, &t[k].mins);
        for (int i = 0; i < VECTORS / 2; i++) {
            const vint v = v_halves(p + i * LANES / 2 * 36 + 4, 36);
            const vint low = v_look_up(kt_fp4_codes, v_low4(v)), high = v_look_up(kt_fp4_codes, v_high4(v));
            for (int k = 0; k < T; k++) {
                const int8_t *q = x[k].q + 2 * i * VECTOR;
                const vint sum = v_dot_two(start_of(x + k, i, 12), low, v_load(q), high, v_load(q + VECTOR));
                t[k].s[i % 2] = v_scaled(t[k].s[i % 2], sum, scales16_of(EIGHTS, s[k], i));
            }
        }
    }
}
DOT(nvfp4, EIGHTS, 12, 16, 144)

static void fill_dot_blocks(struct kt_kernels *k) {
    DOT_FILL(k, Q4_0, q4_0);
    DOT_FILL(k, Q4_1, q4_1);
    DOT_FILL(k, Q5_0, q5_0);
    DOT_FILL(k, Q5_1, q5_1);
    DOT_FILL(k, Q8_0, q8_0);
    DOT_FILL(k, IQ4_NL, iq4_nl);
    DOT_FILL(k, IQ4_XS, iq4_xs);
    DOT_FILL(k, MXFP4, mxfp4);
    DOT_FILL(k, NVFP4, nvfp4);
    DOT_FILL(k, Q2_K, q2_k);
    DOT_FILL(k, Q3_K, q3_k);
    DOT_FILL(k, Q4_K, q4_k);
    DOT_FILL(k, Q5_K, q5_k);
    DOT_FILL(k, Q6_K, q6_k);
    DOT_FILL(k, TQ2_0, tq2_0);
}
