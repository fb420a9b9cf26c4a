/* traits.h: one row a weight format. To add a format: a struct in quants.h, an index here, a row in traits.c. */
#ifndef KT_TRAITS_H
#define KT_TRAITS_H

#include <stddef.h>
#include <stdint.h>

/* Dense index of a format, for tables; the public ids have gaps. */
enum kt_format {
    KT_FMT_F32, KT_FMT_F16, KT_FMT_BF16,
    KT_FMT_Q4_0, KT_FMT_Q4_1, KT_FMT_Q5_0, KT_FMT_Q5_1, KT_FMT_Q8_0,
    KT_FMT_Q2_K, KT_FMT_Q3_K, KT_FMT_Q4_K, KT_FMT_Q5_K, KT_FMT_Q6_K,
    KT_FMT_IQ1_S, KT_FMT_IQ1_M, KT_FMT_IQ2_XXS, KT_FMT_IQ2_XS, KT_FMT_IQ2_S, KT_FMT_IQ3_XXS, KT_FMT_IQ3_S,
    KT_FMT_IQ4_NL, KT_FMT_IQ4_XS,
    KT_FMT_TQ1_0, KT_FMT_TQ2_0, KT_FMT_MXFP4, KT_FMT_NVFP4,
    KT_FMT_F8_E4M3, KT_FMT_F4_E2M1, KT_FMT_I8, KT_FMT_I4, KT_FMT_GPTQ4, KT_FMT_GPTQ8, KT_FMT_AWQ4, KT_FMT_U8,
    KT_FORMATS
};

/* What a format's weights are multiplied with. */
enum kt_kind {
    KT_KIND_F32,  /* fp32 activations */
    KT_KIND_BF16, /* fp32 activations; bf16 in prefill where the caller's are and a bf16 GEMM exists */
    KT_KIND_Q8    /* int8 activations, one scale per 32 */
};

struct kt_traits {
    int id;           /* GGUF type id */
    const char *name;
    int block;        /* values in a block; cols must be a multiple */
    int bytes;        /* bytes of a block */
    enum kt_kind kind;
    int group;        /* Q8 kind: values that share a scale s, 16 or 32 */
    int zero;         /* Q8 kind: z of w = s*(u - z) - m. Codes above 127 require z = 128 (see traits.c) */
    int top;          /* Q8 kind: the largest u: how many products a sum of 16 bits holds */
    int min_group;    /* Q8 kind: values that share a min m: 16 or 32, a divisor of group; 0: m is always zero */
    int scales_separate; /* scales are no part of the blocks; group is 32 unless a scale covers fewer columns */
    int zeros_per_dword; /* packed zero points in a dword; 0: such a format has none */
    int by_column;    /* a row of memory holds `block` columns of all rows, not all columns of a row */
};

extern const struct kt_traits kt_traits_table[KT_FORMATS];

/* The format of a GGUF type id, or -1. */
int kt_format_of(int id);

static inline size_t kt_row_bytes(const struct kt_traits *t, int64_t cols) {
    return (size_t)(cols / t->block) * (size_t)t->bytes;
}

#endif
