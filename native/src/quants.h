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

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

#define KT_QK 256 /* values in a K-quant super-block */

typedef struct { /* w = d * q */
    uint8_t d[2];   /* fp16 */
    int8_t q[32];
} kt_block_q8_0;
static_assert(sizeof(kt_block_q8_0) == 34, "Q8_0");

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

static inline uint16_t kt_load16(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
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

static inline float kt_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31u) /* infinity, or NaN made quiet as the hardware conversion does */
        return kt_bits_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    if (exponent == 0u) { /* zero and subnormals: mantissa * 2^-24, exact in fp32 */
        float f = (float)mantissa * 0x1p-24f;
        return kt_bits_float(sign | kt_float_bits(f));
    }
    return kt_bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
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

#endif
