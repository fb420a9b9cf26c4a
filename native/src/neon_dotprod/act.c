/* Activations (act.h) compiled for NEON, and the read that measures bandwidth. */
#include "../templates/act.h"
#include "common.h"

static uint64_t read_all(const void *p, size_t bytes) {
    uint8x16_t mix[8];
    const uint8_t *b = p;
    for (int i = 0; i < 8; i++) mix[i] = vdupq_n_u8(0);
    for (; bytes >= 128; bytes -= 128, b += 128)
        for (int i = 0; i < 8; i++) mix[i] = veorq_u8(mix[i], load128(b + 16 * i));
    for (int i = 1; i < 8; i++) mix[0] = veorq_u8(mix[0], mix[i]);
    uint64_t total = vgetq_lane_u64(vreinterpretq_u64_u8(mix[0]), 0) ^ vgetq_lane_u64(vreinterpretq_u64_u8(mix[0]), 1);
    for (; bytes; bytes--) total ^= *b++;
    return total;
}

void kt_fill_act_neon_dotprod(struct kt_kernels *k) {
    fill_act(k);
    k->read = read_all;
}
