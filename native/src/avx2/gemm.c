/* The int8 panel GEMM for AVX2 and, compiled again, AVX-VNNI: a tile (16 weight rows, two registers) meets up to six
 * tokens. Twelve sums, two registers of codes, one of activations and one of products are sixteen.
 *
 * Three tokens keep their fp32 results in registers as well. That is what sums of 16 bits take: they are bound by
 * vpmaddubsw and by the scales after each group, which share two ports, and a short group's scales are computed while
 * the next group's products begin. What reads more per code, wide codes, or multiplies more at once, VNNI, takes six.
 *
 * vpdpbusd adds four products to a sum of 32 bits. AVX2 has vpmaddubsw, two products in 16 bits, and a second
 * instruction that brings pairs of those to 32 bits. Small codes put that off: sums of 16 bits may wrap around on
 * their way, only the last must fit, and it does while steps * 2 * 127 * max|u - z| < 2^15 if the sum starts from
 * minus z times the sum of its activations. For |u - z| up to 16, most formats, that is a whole group of 32 columns.
 * Codes of 8 bits are made signed, u - 128, and |u - 128| meets the activation with the sign of u - 128. */
#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include "../../include/kt_native.h"
#include "common.h"

#ifdef __AVXVNNI__
#define VNNI 1
#else
#define VNNI 0
#endif

enum { TOKENS = 6, GROUPS = KT_CACHE_BYTES / KT_ACT_GROUP };

/* What a micro kernel is compiled for. */
struct variant {
    int group;     /* 32 or 16 */
    int min_group; /* 32, 16 or 0 */
    int zero;      /* whether sums start from something */
    int steps;     /* dwords of codes whose products one sum holds */
    int wide;      /* whether codes have 8 bits: they are made signed, and sums have 32 bits */
};

/* Columns k .. k+n of a panel meet up to six tokens. What a group needs of a token lies in one small array each,
 * prepared once for all tiles. */
struct slice {
    const struct kt_panel *p;
    int64_t k, n;
    const int8_t *q[TOKENS];           /* at column k */
    float d[TOKENS][GROUPS];
    int32_t start[TOKENS][4 * GROUPS]; /* what the sums of each `steps` dwords start from */
    float ds[2][TOKENS][GROUPS];       /* scale times sum of activations: of the group, or of its two halves */
    float *c;
    int64_t ldc;
    int add;
};

/* ---- what a group needs of a token ------------------------------------------------------------------- */

INLINE void store256(void *p, __m256i v) { _mm256_storeu_si256((__m256i_u *)p, v); }

/* `factor` times the sums of each group. Of groups of 16, the first and second sixteen of an activation's group. */
INLINE void start32(struct slice *s, const int n, const int group, const int32_t *low, const int32_t *high,
                    int factor) {
    const __m256i by = _mm256_set1_epi32(factor);
    int32_t *start = s->start[n];
    for (int g = 0; g < GROUPS; g += 8) {
        __m256i a = load256(low + g), b = load256(high + g);
        if (group == 32) {
            store256(start + g, _mm256_mullo_epi32(_mm256_add_epi32(a, b), by));
        } else {
            __m256i x = _mm256_unpacklo_epi32(a, b), y = _mm256_unpackhi_epi32(a, b);
            store256(start + 2 * g, _mm256_mullo_epi32(_mm256_permute2x128_si256(x, y, 0x20), by));
            store256(start + 2 * g + 8, _mm256_mullo_epi32(_mm256_permute2x128_si256(x, y, 0x31), by));
        }
    }
}

/* Minus z times the sums of `steps` dwords: of first and of second pairs, as 16 bits each. */
INLINE void start16(struct slice *s, const int n, const int steps) {
    __m256i v[GROUPS];
    int count = GROUPS;
    for (int i = 0; i < GROUPS; i++)
        v[i] = 32 * i < s->n ? dot2(_mm256_set1_epi8(1), load256(s->q[n] + 32 * i)) : _mm256_setzero_si256();
    for (int sum = 1; sum < steps; sum *= 2) {
        count /= 2;
        for (int i = 0; i < count; i++) { /* dwords 0 and 1, 2 and 3, ... of v[2i] and v[2i + 1] */
            __m256 a = _mm256_castsi256_ps(v[2 * i]), b = _mm256_castsi256_ps(v[2 * i + 1]);
            __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
            __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
            v[i] = _mm256_permute4x64_epi64(_mm256_add_epi16(even, odd), 0xd8);
        }
    }
    for (int i = 0; i < count; i++)
        store256(s->start[n] + 8 * i, _mm256_mullo_epi16(v[i], _mm256_set1_epi16((short)-s->p->zero)));
}

INLINE void prepare(struct slice *s, const int n, const struct variant v, const struct kt_acts *a, int64_t at) {
    const int64_t g = at / KT_ACT_GROUP;
    s->q[n] = a->q + at;
    if (v.zero && (VNNI || v.wide)) start32(s, n, v.group, a->low + g, a->high + g, (v.wide ? 128 : 0) - s->p->zero);
    else if (v.zero) start16(s, n, v.steps);
    for (int i = 0; i < GROUPS; i += 8) {
        const __m256 d = load_f32(a->d + g + i), high = _mm256_cvtepi32_ps(load256(a->high + g + i));
        _mm256_storeu_ps(s->d[n] + i, d);
        if (v.min_group == 32) _mm256_storeu_ps(s->ds[0][n] + i, load_f32(a->ds + g + i));
        if (v.min_group != 16) continue;
        _mm256_storeu_ps(s->ds[0][n] + i, _mm256_mul_ps(d, _mm256_cvtepi32_ps(load256(a->low + g + i))));
        _mm256_storeu_ps(s->ds[1][n] + i, _mm256_mul_ps(d, high));
    }
}

/* ---- the micro kernel -------------------------------------------------------------------------------- */

INLINE __m256i broadcast4(const int8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

/* sum + products of a dword of codes. */
INLINE __m256i step(__m256i sum, __m256i u, __m256i a) {
#if VNNI
    return _mm256_dpbusd_avx_epi32(sum, u, a);
#else
    sum = _mm256_add_epi16(sum, dot2(u, a));
    __asm__("" : "+x"(sum)); /* added now: the compiler would rather keep all products and add them as a tree */
    return sum;
#endif
}
/* The same for wide codes: `sign` is u - 128 and u its magnitude. */
INLINE __m256i step_wide(__m256i sum, __m256i u, __m256i sign, __m256i a) {
    sum = add4(sum, dot2(u, _mm256_sign_epi8(a, sign)));
    __asm__("" : "+x"(sum));
    return sum;
}

/* sum[N tokens] += products of `steps` dwords of codes. */
INLINE void run(const int N, const struct variant v, const uint8_t *data, const int8_t *const *q, int64_t k,
                __m256i sum[TOKENS][2]) {
#pragma GCC unroll 8
    for (int j = 0; j < v.steps; j++, data += 64) {
        __m256i u[2] = {load256(data), load256(data + 32)}, sign[2];
        for (int r = 0; v.wide && r < 2; r++) {
            sign[r] = _mm256_xor_si256(u[r], _mm256_set1_epi8(-128));
            u[r] = _mm256_abs_epi8(sign[r]);
        }
        for (int n = 0; n < N; n++) {
            const __m256i b = broadcast4(q[n] + k + 4 * j);
            for (int r = 0; r < 2; r++)
                sum[n][r] = v.wide ? step_wide(sum[n][r], u[r], sign[r], b) : step(sum[n][r], u[r], b);
        }
    }
}

/* out = products of a group, less zero points. */
INLINE void dots(const int N, const struct variant v, const struct slice *s, const uint8_t *data, int64_t k,
                 __m256i out[TOKENS][2]) {
    const int runs = v.group / 4 / v.steps;
#pragma GCC unroll 4
    for (int i = 0; i < runs; i++, data += v.steps * 64, k += v.steps * 4) {
        __m256i sum[TOKENS][2];
        for (int n = 0; n < N; n++)
            sum[n][0] = sum[n][1] = v.zero ? _mm256_set1_epi32(s->start[n][k / 4 / v.steps]) : _mm256_setzero_si256();
        run(N, v, data, s->q, k, sum);
        for (int n = 0; n < N; n++)
            for (int r = 0; r < 2; r++) {
                if (!VNNI && !v.wide) sum[n][r] = _mm256_madd_epi16(sum[n][r], _mm256_set1_epi16(1)); /* to 32 bits */
                out[n][r] = i ? _mm256_add_epi32(sum[n][r], out[n][r]) : sum[n][r];
            }
    }
}

/* c[N tokens][tile] (+)= the slice. Two halves with a scale each are scaled before they are added, so that the
 * activation's scale is applied once. */
INLINE void micro(const int N, const struct variant v, const struct slice *s, int tile) {
    const struct kt_panel *p = s->p;
    const uint8_t *data = (const uint8_t *)(p->data + (tile * p->k + s->k) / 4 * KT_TILE);
    const float *scales = p->scales + (tile * p->k + s->k) / v.group * KT_TILE;
    const float *mins = v.min_group ? p->mins + (tile * p->k + s->k) / v.min_group * KT_TILE : NULL;
    __m256 acc[TOKENS][2];
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < s->n / KT_ACT_GROUP; g++) {
        kt_ahead_step(p->ahead); /* a line or two at a time never fills the queue of outstanding misses */
        __m256 scaled[TOKENS][2];
        const int halves = 32 / v.group; /* a division in the loop's head, checked by a sanitizer, hides the pragma */
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++, data += v.group * KT_TILE, scales += KT_TILE) {
            __m256i sum[TOKENS][2];
            dots(N, v, s, data, 32 * g + 16 * half, sum);
            for (int n = 0; n < N; n++)
                for (int r = 0; r < 2; r++) {
                    __m256 x = _mm256_cvtepi32_ps(sum[n][r]), scale = load_f32(scales + 8 * r);
                    scaled[n][r] = half ? _mm256_fmadd_ps(x, scale, scaled[n][r]) : _mm256_mul_ps(x, scale);
                }
        }
        for (int n = 0; n < N; n++)
            for (int r = 0; r < 2; r++)
                acc[n][r] = _mm256_fmadd_ps(scaled[n][r], _mm256_set1_ps(s->d[n][g]), acc[n][r]);
        for (int half = 0; v.min_group && half < 32 / v.min_group; half++, mins += KT_TILE)
            for (int n = 0; n < N; n++)
                for (int r = 0; r < 2; r++)
                    acc[n][r] = _mm256_fnmadd_ps(load_f32(mins + 8 * r), _mm256_set1_ps(s->ds[half][n][g]), acc[n][r]);
    }
    for (int n = 0; n < N; n++) store_tile(s->c + n * s->ldc + tile * KT_TILE, acc[n][0], acc[n][1], s->add);
}

/* ---- the GEMM ---------------------------------------------------------------------------------------- */

INLINE void block(const int N, const struct variant v, struct slice *s) {
    for (int tile = 0; tile < s->p->tiles; tile++) micro(N, v, s, tile);
}

/* The kernel of a variant, and how many tokens a pass of it takes. */
struct kernel {
    void (*block)(int n, struct slice *s, const struct kt_acts *a, const int32_t *token, int64_t k0);
    int tokens;
};

#define MEET(N, most)                        \
    case N:                                  \
        if (N <= (most)) block(N, v, s);     \
        break;
#define KERNEL(name, most, ...)                                                                                       \
    static void name##_block(int n, struct slice *s, const struct kt_acts *a, const int32_t *token, int64_t k0) {     \
        const struct variant v = {__VA_ARGS__};                                                                       \
        for (int i = 0; i < n; i++) prepare(s, i, v, a, token[i] * a->stride + k0 + s->k);                            \
        switch (n) { MEET(6, most) MEET(5, most) MEET(4, most) MEET(3, most) MEET(2, most) MEET(1, most) }            \
    }                                                                                                                 \
    static const struct kernel name = {name##_block, most};

/* clang-format off
 *             tokens, group, min_group, zero, steps, wide */
#if VNNI
KERNEL(zero_8,      6, 32, 0,  1, 8, 0)
KERNEL(mins_8,      6, 32, 32, 0, 8, 0)
KERNEL(zero16_4,    6, 16, 0,  1, 4, 0)
KERNEL(mins16,      6, 32, 16, 0, 8, 0)
#else
KERNEL(zero_8,      3, 32, 0,  1, 8, 0) /* Q4_0, Q5_0, IQ1_S, IQ3_S, TQ, MXFP4, INT4 */
KERNEL(mins_8,      3, 32, 32, 0, 8, 0) /* Q4_1, Q4_K, INT4 with zero points */
KERNEL(zero16_4,    3, 16, 0,  1, 4, 0) /* Q6_K, IQ1_M, NVFP4 */
KERNEL(mins16,      3, 32, 16, 0, 2, 0) /* Q2_K: u up to 45 */
KERNEL(mins_4,      3, 32, 32, 0, 4, 0) /* Q5_1, Q5_K */
KERNEL(mins_wide,   6, 32, 32, 1, 8, 1) /* INT8 with zero points */
KERNEL(zero_2,      3, 32, 0,  1, 2, 0) /* IQ2_XXS, IQ3_XXS */
KERNEL(wide,        6, 32, 0,  0, 8, 1) /* Q8_0, Q3_K, IQ4, INT8: the zero point is 128 */
KERNEL(zero16_2,    3, 16, 0,  1, 2, 0) /* IQ2_XS, IQ2_S */
KERNEL(wide16,      6, 16, 0,  0, 4, 1) /* INT8, a scale for 16 columns */
#endif
/* clang-format on */

static const struct kernel *kernel_of(const struct kt_panel *p) {
#if VNNI
    return p->group == 16 ? &zero16_4 : p->min_group == 16 ? &mins16 : p->min_group ? &mins_8 : &zero_8;
#else
    const int steps = 32767 / 254 / p->max_abs; /* that fit 16 bits */
    if (p->group == 16) return steps >= 4 ? &zero16_4 : steps >= 2 ? &zero16_2 : &wide16;
    if (p->min_group == 16) return &mins16;
    if (p->min_group) return steps >= 8 ? &mins_8 : steps >= 4 ? &mins_4 : &mins_wide;
    return steps >= 8 ? &zero_8 : steps >= 2 ? &zero_2 : &wide;
#endif
}

static void gemm_q8(const struct kt_panel *p, const struct kt_acts *a, const int32_t *token, int tokens, int64_t k0,
                    float *c, int64_t ldc, int add) {
    const struct kernel *kernel = kernel_of(p);
    const int blocks = (tokens + kernel->tokens - 1) / kernel->tokens; /* of equal size, or one less: 4 are 2 + 2 */
    kt_ahead_spread(p->ahead, (int64_t)blocks * (p->k / KT_ACT_GROUP) * p->tiles);
    for (int64_t k = 0; k < p->k; k += KT_CACHE_BYTES)
        for (int b = 0, t = 0, n; b < blocks; b++, t += n) {
            n = (tokens - t + blocks - b - 1) / (blocks - b);
            struct slice s;
            s.p = p;
            s.k = k;
            s.n = p->k - k < KT_CACHE_BYTES ? p->k - k : KT_CACHE_BYTES;
            s.c = c + t * ldc;
            s.ldc = ldc;
            s.add = add || k;
            kernel->block(n, &s, a, token + t, k0);
        }
}

/* ---- limits ----------------------------------------------------------------------------------------- */
/* The int8 peak takes codes of 7 bits. Without VNNI sums of smaller ones are cheaper, and pass it. */
static double peak(int kind, int64_t iterations) {
    if (kind == KT_PEAK_INT8) {
        __m256i acc[12], u = _mm256_set1_epi8(3), a = _mm256_set1_epi8(5);
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm256_setzero_si256();
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) {
                acc[i] = VNNI ? step(acc[i], u, a) : add4(acc[i], dot2(u, a));
                __asm__ volatile("" : "+x"(acc[i]), "+x"(u)); /* a new u each time, or products would leave the loop */
            }
        }
        return 12.0 * 64.0 * (double)iterations;
    }
    if (kind == KT_PEAK_F32) {
        __m256 acc[12], x = _mm256_set1_ps(1.5f), y = _mm256_set1_ps(1e-3f);
        for (int i = 0; i < 12; i++) acc[i] = _mm256_setzero_ps();
        for (int64_t n = 0; n < iterations; n++) {
#pragma GCC unroll 12
            for (int i = 0; i < 12; i++) {
                acc[i] = _mm256_fmadd_ps(x, y, acc[i]);
            }
        }
        for (int i = 0; i < 12; i++) __asm__ volatile("" : : "x"(acc[i]));
        return 12.0 * 16.0 * (double)iterations;
    }
    return 0;
}

void KT_JOIN(kt_fill_gemm_, KT_ISA)(struct kt_kernels *k) {
    k->gemm_q8 = gemm_q8;
    k->peak = peak;
}
