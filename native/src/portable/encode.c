/* Encoding (encode.h) in vectors of 16 bytes, which every compiler has. */
#include <stdint.h>
#include <string.h>

#define V_BYTES 16
typedef float v_f __attribute__((vector_size(V_BYTES)));
typedef int32_t v_i __attribute__((vector_size(V_BYTES)));
typedef int16_t v_s __attribute__((vector_size(V_BYTES)));

static inline v_f v_if_less(v_f p, v_f q, v_f a, v_f b) {
    const v_i less = p < q;
    return (v_f)((less & (v_i)a) | (~less & (v_i)b));
}
static inline v_f v_min(v_f a, v_f b) { return v_if_less(a, b, a, b); }
static inline v_f v_max(v_f a, v_f b) { return v_if_less(b, a, a, b); }

/* (a * b + 2^14) >> 15 of each pair of int16. */
static inline v_s v_scaled(v_s a, v_s b) {
    v_s r;
    for (int i = 0; i < V_BYTES / 2; i++) r[i] = (int16_t)((a[i] * b[i] + (1 << 14)) >> 15);
    return r;
}
static inline v_s v_least(v_s a, v_s b) { return ((a < b) & a) | (~(a < b) & b); }
static inline v_s v_most(v_s a, v_s b) { return ((a > b) & a) | (~(a > b) & b); }
static inline v_s v_above(v_s a, v_s b) { return (a > b) & (a - b); } /* neither negative */
static inline v_i v_add_pairs(v_i sum, v_s a, v_s b) { /* products, two neighbours to a sum */
    const v_i x = (v_i)a, y = (v_i)b;
    return sum + (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
}

/* Bytes of a table by indices 0 .. 31. */
static inline v_s v_lookup(const uint8_t *table, v_s index) {
    v_s r;
    for (int i = 0; i < V_BYTES / 2; i++) r[i] = table[index[i]];
    return r;
}

/* 4x4 numbers of 32 bits, rows becoming columns; `from` and `to` are 4 bytes each from row to row. */
static inline void transpose4(const void *in, int from, void *out, int to) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) memcpy((char *)out + 4 * (j * to + i), (const char *)in + 4 * (i * from + j), 4);
}

#include "../templates/encode.h"

void kt_fill_encode_portable(struct kt_kernels *k) { fill_encode(k); }
