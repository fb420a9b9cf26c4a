#ifndef KT_ISA
#define KT_ISA avx512
#endif
#include "../templates/act.h"
#include "common.h"

static uint64_t read_all(const void *p, size_t bytes) {
    __m512i mix[4];
    const uint8_t *b = p;
    for (int i = 0; i < 4; i++) mix[i] = _mm512_setzero_si512();
    for (; bytes >= 256; bytes -= 256, b += 256)
        for (int i = 0; i < 4; i++) mix[i] = _mm512_xor_si512(mix[i], _mm512_loadu_si512(b + 64 * i));
    mix[0] = _mm512_xor_si512(_mm512_xor_si512(mix[0], mix[1]), _mm512_xor_si512(mix[2], mix[3]));
    uint64_t v[8], total = 0;
    _mm512_storeu_si512(v, mix[0]);
    for (int i = 0; i < 8; i++) total ^= v[i];
    for (; bytes; bytes--) total ^= *b++;
    return total;
}

void KT_JOIN(kt_fill_act_, KT_ISA)(struct kt_kernels *k) {
    fill_act(k);
    k->read = read_all;
}
