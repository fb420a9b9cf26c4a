/* Encoding (encode.h) in vectors of 16 bytes, which every compiler has. */
#include <stdint.h>

#define V_BYTES 16
typedef float v_f __attribute__((vector_size(V_BYTES)));
typedef int32_t v_i __attribute__((vector_size(V_BYTES)));

static inline v_f v_if_less(v_f p, v_f q, v_f a, v_f b) {
    const v_i less = p < q;
    return (v_f)((less & (v_i)a) | (~less & (v_i)b));
}
static inline v_f v_min(v_f a, v_f b) { return v_if_less(a, b, a, b); }
static inline v_f v_max(v_f a, v_f b) { return v_if_less(b, a, a, b); }

#include "../templates/encode.h"

void kt_fill_encode_portable(struct kt_kernels *k) { fill_encode(k); }
