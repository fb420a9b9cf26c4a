#ifndef KT_ISA
#define KT_ISA avx2
#endif
#include "../templates/act.h"
#include "common.h"

static uint64_t read_all(const void *p, size_t bytes) {
    __m256i mix[4];
    const uint8_t *b = p;
    for (int i = 0; i < 4; i++) mix[i] = _mm256_setzero_si256();
    for (; bytes >= 128; bytes -= 128, b += 128)
        for (int i = 0; i < 4; i++) mix[i] = _mm256_xor_si256(mix[i], load256(b + 32 * i));
    mix[0] = _mm256_xor_si256(_mm256_xor_si256(mix[0], mix[1]), _mm256_xor_si256(mix[2], mix[3]));
    uint64_t v[4], total = 0;
    _mm256_storeu_si256((__m256i_u *)v, mix[0]);
    for (int i = 0; i < 4; i++) total ^= v[i];
    for (; bytes; bytes--) total ^= *b++;
    return total;
}

void KT_JOIN(kt_fill_act_, KT_ISA)(struct kt_kernels *k) {
    fill_act(k);
    k->read = read_all;
}
