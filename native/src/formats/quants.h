/* quants.h: the packed block formats as they lie in a file, and the scalar float conversions.
 *
 * Every member is a byte array, so a block has alignment 1 and may be read at any address. Multi-byte
 * numbers are little-endian, as GGUF and safetensors are; big-endian hosts are refused below.
 * Layouts: ggml's documentation of GGUF quantization types. */
#ifndef KT_QUANTS_H
#define KT_QUANTS_H

#include <assert.h>
#include <stdint.h>
#include <string.h>

#include "../../include/kt_native.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

#define KT_QK 256 /* values in a K-quant super-block */

/* ---- blocks of 32: one fp16 scale. A nibble at i is value i, the high one value i + 16 ---- */

typedef struct { /* w = d * (q - 8), q 4 bits */
    uint8_t d[2];
    uint8_t qs[16];
} kt_block_q4_0;
static_assert(sizeof(kt_block_q4_0) == 18, "Q4_0");

typedef struct { /* w = d * q + m */
    uint8_t d[2], m[2];
    uint8_t qs[16];
} kt_block_q4_1;
static_assert(sizeof(kt_block_q4_1) == 20, "Q4_1");

typedef struct { /* w = d * (q - 16), q 5 bits */
    uint8_t d[2];
    uint8_t qh[4]; /* bit i: the fifth bit of value i */
    uint8_t qs[16];
} kt_block_q5_0;
static_assert(sizeof(kt_block_q5_0) == 22, "Q5_0");

typedef struct { /* w = d * q + m */
    uint8_t d[2], m[2];
    uint8_t qh[4];
    uint8_t qs[16];
} kt_block_q5_1;
static_assert(sizeof(kt_block_q5_1) == 24, "Q5_1");

typedef struct { /* w = d * q */
    uint8_t d[2];   /* fp16 */
    int8_t q[32];
} kt_block_q8_0;
static_assert(sizeof(kt_block_q8_0) == 34, "Q8_0");

/* ---- K: super-blocks of 256 with scales of their own per 16 or 32 ---- */

typedef struct { /* 16 groups of 16: w = d*scale*q - dmin*min, q 2 bits */
    uint8_t scales[16]; /* low nibble scale, high nibble min */
    uint8_t qs[64];     /* 32 bytes a half: bits 2s of byte i hold value 32*s + i of the half */
    uint8_t d[2], dmin[2];
} kt_block_q2_k;
static_assert(sizeof(kt_block_q2_k) == 84, "Q2_K");

typedef struct { /* 16 groups of 16: w = d*(scale - 32)*(q - 4), q 3 bits */
    uint8_t hmask[32];  /* bit g of byte i: the third bit of value 32*g + i */
    uint8_t qs[64];     /* the low 2 bits, as in Q2_K */
    uint8_t scales[12]; /* 16 scales of 6 bits, see kt_q3_scales */
    uint8_t d[2];
} kt_block_q3_k;
static_assert(sizeof(kt_block_q3_k) == 110, "Q3_K");

typedef struct { /* 8 groups of 32: w = d*scale*q - dmin*min, q 4 bits */
    uint8_t d[2], dmin[2]; /* fp16 */
    uint8_t scales[12];    /* 8 scales and 8 mins of 6 bits, see kt_k4_scales */
    uint8_t qs[128];       /* 32 bytes a pair of groups: low nibbles the even one, high nibbles the odd one */
} kt_block_q4_k;
static_assert(sizeof(kt_block_q4_k) == 144, "Q4_K");

typedef struct { /* as Q4_K with a fifth bit */
    uint8_t d[2], dmin[2];
    uint8_t scales[12];
    uint8_t qh[32]; /* bit g of byte i: the fifth bit of value i of group g */
    uint8_t qs[128];
} kt_block_q5_k;
static_assert(sizeof(kt_block_q5_k) == 176, "Q5_K");

typedef struct { /* 16 groups of 16: w = d*scale*(q - 32), q 6 bits */
    uint8_t ql[128]; /* low 4 bits; each 64 bytes hold values 0..63 (low nibbles), 64..127 (high) of a half */
    uint8_t qh[64];  /* high 2 bits; each 32 bytes hold four values of a half, 32 apart */
    int8_t scales[16];
    uint8_t d[2];
} kt_block_q6_k;
static_assert(sizeof(kt_block_q6_k) == 210, "Q6_K");

/* ---- IQ: values are points of a grid (iq_tables.h), 8 or 4 at a time, with signs beside them ---- */

typedef struct { /* 8 groups of 32: w = d*(scale + 0.5)/4 * +-grid */
    uint8_t d[2];
    uint8_t qs[64]; /* 8 bytes a group: 4 grid indices, then 32 bits: 4 sign indices of 7 bits and a scale of 4 */
} kt_block_iq2_xxs;
static_assert(sizeof(kt_block_iq2_xxs) == 66, "IQ2_XXS");

typedef struct { /* 16 groups of 16: w = d*(scale + 0.5)/4 * +-grid */
    uint8_t d[2];
    uint8_t qs[64];    /* 32 x 16 bits: a grid index of 9, a sign index of 7 */
    uint8_t scales[8]; /* nibbles, low one first */
} kt_block_iq2_xs;
static_assert(sizeof(kt_block_iq2_xs) == 74, "IQ2_XS");

typedef struct { /* 16 groups of 16: w = d*(scale + 0.5)/4 * +-grid */
    uint8_t d[2];
    uint8_t qs[32];    /* low 8 bits of 32 grid indices */
    uint8_t signs[32]; /* bit i: value i of the grid point is negative */
    uint8_t qh[8];     /* high 2 bits of 4 indices a byte */
    uint8_t scales[8];
} kt_block_iq2_s;
static_assert(sizeof(kt_block_iq2_s) == 82, "IQ2_S");

typedef struct { /* 8 groups of 32: w = d*(scale + 0.5)/2 * +-grid */
    uint8_t d[2];
    uint8_t qs[64];    /* 64 grid indices of 4 values each */
    uint8_t signs[32]; /* 32 bits a group: 4 sign indices of 7 bits and a scale of 4 */
} kt_block_iq3_xxs;
static_assert(sizeof(kt_block_iq3_xxs) == 98, "IQ3_XXS");

typedef struct { /* 8 groups of 32: w = d*(2*scale + 1) * +-grid */
    uint8_t d[2];
    uint8_t qs[64];    /* low 8 bits of 64 grid indices */
    uint8_t qh[8];     /* the ninth bits, 8 a byte */
    uint8_t signs[32];
    uint8_t scales[4]; /* nibbles, low one first */
} kt_block_iq3_s;
static_assert(sizeof(kt_block_iq3_s) == 110, "IQ3_S");

typedef struct { /* 8 groups of 32: w = d*(2*scale + 1) * (grid +- 1/8), grid of -1, 0, 1 */
    uint8_t d[2];
    uint8_t qs[32]; /* low 8 bits of 32 grid indices */
    uint8_t qh[16]; /* 16 bits a group: high 3 bits of 4 indices, a scale of 3, the sign of 1/8 (1: minus) */
} kt_block_iq1_s;
static_assert(sizeof(kt_block_iq1_s) == 50, "IQ1_S");

typedef struct { /* 16 groups of 16, as IQ1_S with a sign of 1/8 for each 8 values */
    uint8_t qs[32];
    uint8_t qh[16];    /* nibbles: high 3 bits of an index, and the sign */
    uint8_t scales[8]; /* 4 x 16 bits: four scales of 3 bits, then a nibble of the fp16 d, lowest nibble first */
} kt_block_iq1_m;
static_assert(sizeof(kt_block_iq1_m) == 56, "IQ1_M");

typedef struct { /* w = d * codebook[q], q 4 bits; nibbles as in Q4_0 */
    uint8_t d[2];
    uint8_t qs[16];
} kt_block_iq4_nl;
static_assert(sizeof(kt_block_iq4_nl) == 18, "IQ4_NL");

typedef struct { /* 8 groups of 32: w = d*(scale - 32) * codebook[q] */
    uint8_t d[2];
    uint8_t scales_h[2]; /* high 2 bits of 8 scales */
    uint8_t scales_l[4]; /* low 4 bits, low nibble first */
    uint8_t qs[128];     /* 16 bytes a group, nibbles as in Q4_0 */
} kt_block_iq4_xs;
static_assert(sizeof(kt_block_iq4_xs) == 136, "IQ4_XS");

/* ---- ternary and 4-bit floats ---- */

typedef struct { /* w = d * (q - 1), five base-3 digits a byte, see kt_ternary */
    uint8_t qs[48]; /* digit n of byte i < 32: value 32*n + i; then 16 bytes: digit n of byte i, value 160 + 16*n + i */
    uint8_t qh[4];  /* digit n < 4 of byte i: value 240 + 4*n + i */
    uint8_t d[2];
} kt_block_tq1_0;
static_assert(sizeof(kt_block_tq1_0) == 54, "TQ1_0");

typedef struct { /* w = d * (q - 1), q 2 bits, packed as in Q2_K */
    uint8_t qs[64];
    uint8_t d[2];
} kt_block_tq2_0;
static_assert(sizeof(kt_block_tq2_0) == 66, "TQ2_0");

typedef struct { /* w = 2^(e - 127) * e2m1; nibbles as in Q4_0. OCP Microscaling Formats 1.0 */
    uint8_t e;
    uint8_t qs[16];
} kt_block_mxfp4;
static_assert(sizeof(kt_block_mxfp4) == 17, "MXFP4");

typedef struct { /* 4 groups of 16: w = d * e2m1, d e4m3 without its sign */
    uint8_t d[4];
    uint8_t qs[32]; /* 8 bytes a group: low nibbles values 0..7, high ones 8..15 */
} kt_block_nvfp4;
static_assert(sizeof(kt_block_nvfp4) == 36, "NVFP4");

static inline uint16_t kt_load16(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t kt_load32(const void *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float kt_load_f32(const void *p) {
    float f;
    memcpy(&f, p, sizeof f);
    return f;
}

static inline float kt_bits_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t kt_float_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float kt_bf16_to_f32(uint16_t h) { return kt_bits_float((uint32_t)h << 16); }

/* Round to nearest even; a NaN stays a (quiet) NaN instead of rounding up to infinity. */
static inline uint16_t kt_f32_to_bf16(float f) {
    uint32_t x = kt_float_bits(f);
    if ((x & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((x >> 16) | 0x40u);
    return (uint16_t)((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}

/* 1 where a < b, both below 2^31; no comparison, which compilers turn into a branch. */
static inline uint32_t kt_below(uint32_t a, uint32_t b) { return (a - b) >> 31; }

/* Exact; a NaN becomes quiet, as in the hardware conversion. No branches, so that loops become vectors. */
static inline float kt_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, x = (uint32_t)(h & 0x7fffu) << 13; /* exponent less 112 */
    const uint32_t subnormal = 0u - kt_below(x, 0x00800000u), infinite = kt_below(x, 0x0f800000u) - 1; /* or NaN */
    const uint32_t normal = (x + (112u << 23) + ((112u << 23) & infinite)) | kt_below(0x0f800000u, x) << 22;
    const uint32_t tiny = kt_float_bits(kt_bits_float(x + (113u << 23)) - 0x1p-14f); /* 2^-14 more, less 2^-14 */
    return kt_bits_float(sign | (tiny & subnormal) | (normal & ~subnormal));
}

/* Round to nearest even, overflow to infinity, subnormals kept: what the hardware conversion does. */
static inline uint16_t kt_f32_to_f16(float f) {
    uint32_t x = kt_float_bits(f), sign = (x >> 16) & 0x8000u;
    x &= 0x7fffffffu;
    if (x > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((x >> 13) & 0x3ffu));
    if (x >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above */
    if (x < 0x38800000u) {                                   /* below 2^-14: the adder rounds to 2^-24 */
        float r = kt_bits_float(x) + 0.5f;                   /* 0.5 has ulp 2^-24 */
        return (uint16_t)(sign | (kt_float_bits(r) - 0x3f000000u));
    }
    x += 0xfffu + ((x >> 13) & 1u);
    return (uint16_t)(sign | ((x - 0x38000000u) >> 13));
}

/* OCP microscaling scale: 2^(e - 127); 255 is NaN. */
static inline float kt_e8m0_to_f32(uint8_t e) {
    return kt_bits_float(e == 255 ? 0x7fc00000u : e ? (uint32_t)e << 23 : 0x00400000u);
}

/* OCP FP8 e4m3 (fn): bias 7, no infinity, 0x7f and 0xff are NaN. */
static inline float kt_e4m3_to_f32(uint8_t v) {
    const uint32_t sign = (v & 0x80u) << 24, x = (v & 0x7fu) << 20; /* exponent less 120 */
    const uint32_t subnormal = 0u - kt_below(x, 0x00800000u), nan = 0u - kt_below(0x07e00000u, x);
    const uint32_t normal = x + (120u << 23), tiny = kt_float_bits(kt_bits_float(x + (121u << 23)) - 0x1p-6f);
    return kt_bits_float((nan & 0x7fc00000u) | (~nan & (sign | (tiny & subnormal) | (normal & ~subnormal))));
}

static inline float kt_load_f16(const void *p) { return kt_f16_to_f32(kt_load16(p)); }

/* The 12 bytes of Q4_K and Q5_K hold eight 6-bit scales and eight 6-bit mins. out: 8 scales, then 8 mins.
 * bytes 0-3: scales 0-3, bytes 4-7: mins 0-3 (low 6 bits each); bytes 8-11: low 4 bits of scales 4-7 and
 * of mins 4-7 (high nibble); their top 2 bits sit in the top 2 bits of bytes 0-3 and 4-7. */
static inline void kt_k4_scales(const uint8_t s[12], uint8_t out[16]) {
    uint32_t a, b, c, w[4];
    memcpy(&a, s, 4);
    memcpy(&b, s + 4, 4);
    memcpy(&c, s + 8, 4);
    w[0] = a & 0x3f3f3f3fu;
    w[1] = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
    w[2] = b & 0x3f3f3f3fu;
    w[3] = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
    memcpy(out, w, 16);
}

/* The 12 bytes of Q3_K hold sixteen 6-bit scales, biased by 32. bytes 0-7: low 4 bits of scales 0-7 and of 8-15
 * (high nibble); bytes 8-11: the top 2 bits of scale 4*s + i in bits 2s of byte 8 + i. */
static inline void kt_q3_scales(const uint8_t s[12], int8_t out[16]) {
    for (int g = 0; g < 16; g++) {
        int low = s[g & 7] >> (g < 8 ? 0 : 4) & 15, high = s[8 + (g & 3)] >> (2 * (g >> 2)) & 3;
        out[g] = (int8_t)((low | high << 4) - 32);
    }
}

/* IQ1_M scatters its fp16 scale over the top nibbles of four 16-bit words. */
static inline float kt_iq1_m_scale(const uint8_t scales[8]) {
    int low = scales[1] >> 4 | (scales[3] & 0xf0), high = scales[5] >> 4 | (scales[7] & 0xf0);
    return kt_f16_to_f32((uint16_t)(low | high << 8));
}

/* Digit n (0 first) of the five base-3 digits that a byte holds as a fraction: byte = ceil(256 * 0.abcde). */
static inline int kt_ternary(uint8_t byte, int n) {
    static const uint8_t power[5] = {1, 3, 9, 27, 81};
    return (uint8_t)(byte * power[n]) * 3 >> 8;
}

/* Half an e8m0 scale, which meets e2m1 values doubled to whole numbers: 2^(e - 128). Codes 0 and 1 are subnormal.
 * Code 255, a NaN in the OCP specification, is 2^127 as in every GGUF reader. */
static inline float kt_e8m0_half(uint8_t e) {
    return kt_bits_float(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

/* Half an e4m3 scale (bias 7) without its sign: bit 7 is ignored and 0x7f, a NaN in e4m3, is zero, as in GGUF. */
static inline float kt_ue4m3_half(uint8_t x) {
    int exponent = x >> 3 & 15, mantissa = x & 7;
    if (x == 0x7f) return 0.0f;
    if (exponent == 0) return (float)mantissa * 0x1p-10f;
    return kt_bits_float((uint32_t)(exponent + 119) << 23 | (uint32_t)mantissa << 20);
}

/* ---- separate scales and zero points ------------------------------------------------------------------ */

/* Bytes of a scale, 0 for an unknown type. */
static inline size_t kt_scale_size(int type) {
    switch (type) {
    case KT_SCALE_F32: return 4;
    case KT_SCALE_F16:
    case KT_SCALE_BF16: return 2;
    case KT_SCALE_E8M0:
    case KT_SCALE_E4M3: return 1;
    }
    return 0;
}

/* The nibble of an AWQ dword that holds row 0, 1, ... of its eight. */
static const uint8_t kt_awq_nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

#endif
