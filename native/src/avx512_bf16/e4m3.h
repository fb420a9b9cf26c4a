/* e4m3.h: e4m3 codes to bf16, which holds them exactly. */
#ifndef KT_AVX512_BF16_E4M3_H
#define KT_AVX512_BF16_E4M3_H

#include "../avx512/common.h"

/* seeeemmm is s, exponent eeee + 120 and mantissa mmm0000: the high byte of the bf16 depends on the high nibble, the
 * low byte is the low nibble moved up. Below 2^-5 (eee_ is zero; half of these are subnormal, which bf16
 * multipliers take for zero) the value is the low nibble times 2^-9. Codes 0x7f and 0xff, which are NaN, become 480;
 * most: the largest magnitudes so far, by which they are found.
 * low: of each lane the first eight bytes, high: the last. */
INLINE void e4m3_to_bf16(__m512i v, __m512i *low, __m512i *high, __m512i *most) {
    const __m512i highs =
        _mm512_broadcast_i32x4(_mm_set_epi8(-61, -62, -63, -64, -65, -66, -67, -68, 67, 66, 65, 64, 63, 62, 61, 60));
    const __m512i small_highs = _mm512_broadcast_i32x4(
        _mm_set_epi8(60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 60, 59, 59, 59, 0));
    const __m512i small_lows = _mm512_broadcast_i32x4(
        _mm_set_epi8(-16, -32, -48, -64, -80, -96, -112, -128, 96, 64, 32, 0, -64, -128, 0, 0));
    const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
    const __m512i lows = _mm512_and_si512(v, nibble), ups = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    const __mmask64 is_small = _mm512_testn_epi8_mask(v, _mm512_set1_epi8(0x70));
    __m512i h = _mm512_shuffle_epi8(highs, ups), l = _mm512_slli_epi16(lows, 4);
    h = _mm512_mask_shuffle_epi8(h, is_small, small_highs, lows);
    l = _mm512_mask_shuffle_epi8(l, is_small, small_lows, lows);
    h = _mm512_ternarylogic_epi32(h, v, sign, 0xf8); /* h | (v & sign) */
    *most = _mm512_max_epu8(*most, _mm512_andnot_si512(sign, v));
    *low = _mm512_unpacklo_epi8(l, h);
    *high = _mm512_unpackhi_epi8(l, h);
}

#endif
