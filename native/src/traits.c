#include "traits.h"

#include "../include/kt_native.h"
#include "quants.h"

const struct kt_traits kt_traits_table[KT_FORMATS] = {
    /* clang-format off                     block  bytes                  kind          group zero min */
    [KT_FMT_F32]  = {KT_TYPE_F32,  "F32",   1,     4,                     KT_KIND_F32,  0,    0,   0},
    [KT_FMT_F16]  = {KT_TYPE_F16,  "F16",   1,     2,                     KT_KIND_F32,  0,    0,   0},
    [KT_FMT_BF16] = {KT_TYPE_BF16, "BF16",  1,     2,                     KT_KIND_BF16, 0,    0,   0},
    [KT_FMT_Q8_0] = {KT_TYPE_Q8_0, "Q8_0",  32,    sizeof(kt_block_q8_0), KT_KIND_Q8,   32,   128, 0},
    [KT_FMT_Q4_K] = {KT_TYPE_Q4_K, "Q4_K",  KT_QK, sizeof(kt_block_q4_k), KT_KIND_Q8,   32,   0,   1},
    [KT_FMT_Q5_K] = {KT_TYPE_Q5_K, "Q5_K",  KT_QK, sizeof(kt_block_q5_k), KT_KIND_Q8,   32,   0,   1},
    [KT_FMT_Q6_K] = {KT_TYPE_Q6_K, "Q6_K",  KT_QK, sizeof(kt_block_q6_k), KT_KIND_Q8,   16,   32,  0},
    /* clang-format on */
};

int kt_format_of(int id) {
    for (int f = 0; f < KT_FORMATS; f++)
        if (kt_traits_table[f].id == id) return f;
    return -1;
}

const char *kt_type_name(int type) {
    int f = kt_format_of(type);
    return f < 0 ? NULL : kt_traits_table[f].name;
}

int64_t kt_type_block(int type) {
    int f = kt_format_of(type);
    return f < 0 ? 0 : kt_traits_table[f].block;
}

int64_t kt_type_block_bytes(int type) {
    int f = kt_format_of(type);
    return f < 0 ? 0 : kt_traits_table[f].bytes;
}
