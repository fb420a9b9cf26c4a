/* cache.c: rows of a cache: their size, floats into them and out of them. */
#include <math.h>
#include <string.h>

#include "../formats/quants.h"
#include "attend.h"

size_t kt_cache_row(int type, int64_t n) {
    if (n < 0) return 0;
    switch (type) {
    case KT_F32: return (size_t)n * 4;
    case KT_F16:
    case KT_BF16: return (size_t)n * 2;
    case KT_CACHE_Q8_0: return n % 32 ? 0 : (size_t)n / 32 * sizeof(kt_block_q8_0);
    }
    return 0;
}

/* To nearest, half away from zero, for |x| below 2^22: with 0.5 itself, what lies just below 0.5 would become 1. */
static int8_t round_away(float x) { return (int8_t)(x + copysignf(0x1.fffffep-2f, x)); }

/* What holds an infinity or a NaN becomes NaN: there is no code for either. */
static void store_q8_0(const float *x, kt_block_q8_0 *block) {
    float most = 0, check = 0;
    for (int i = 0; i < 32; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        check += x[i] * 0.0f;
    }
    const float d = check == 0.0f ? most / 127.0f : NAN, inverse = d > 0.0f ? 1.0f / d : 0.0f;
    const uint16_t half = kt_f32_to_f16(d);
    memcpy(block->d, &half, 2);
    /* of subnormals: 1 / d overflows, and the codes would too */
    const int none = check != 0.0f || isinf(inverse);
    for (int i = 0; i < 32; i++) block->q[i] = none ? 0 : round_away(x[i] * inverse);
}

void kt_cache_store(const struct kt_kernels *k, const float *x, int64_t n, int type, uint8_t *out) {
    switch (type) {
    case KT_F32: memcpy(out, x, (size_t)n * 4); break;
    case KT_F16: k->to_f16(x, n, (uint16_t *)(void *)out); break;
    case KT_BF16: k->to_bf16(x, n, (uint16_t *)(void *)out); break;
    case KT_CACHE_Q8_0:
        for (int64_t i = 0; i < n / 32; i++) store_q8_0(x + 32 * i, (kt_block_q8_0 *)out + i);
        break;
    }
}

void kt_cache_load(const struct kt_kernels *k, const uint8_t *row, int64_t n, int type, float *out) {
    static const int format[] = {[KT_F32] = KT_FMT_F32, [KT_F16] = KT_FMT_F16, [KT_BF16] = KT_FMT_BF16};
    if (type == KT_CACHE_Q8_0) k->load_q8_0(row, n, out);
    else k->unpack[format[type]](row, n, out, NULL, NULL);
}
