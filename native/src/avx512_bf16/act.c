/* Rounding to bf16 by the instruction for it, which gives the bits of kt_f32_to_bf16 but for subnormal numbers: to the
 * instruction they are zeros. */
#include "../avx512/common.h"

static void to_bf16(const float *x, int64_t n, uint16_t *out) {
    enum { SUBNORMAL = 0x20 };
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + i + 16);
        const __mmask16 some = _mm512_fpclass_ps_mask(low, SUBNORMAL) | _mm512_fpclass_ps_mask(high, SUBNORMAL);
        if (__builtin_expect(some, 0))
            for (int j = 0; j < 32; j++) out[i + j] = kt_f32_to_bf16(x[i + j]);
        else _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (; i < n; i++) out[i] = kt_f32_to_bf16(x[i]);
}

void kt_fill_act_avx512_bf16(struct kt_kernels *k) { k->to_bf16 = to_bf16; }
