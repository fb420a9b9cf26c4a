/* thresholds.c: measured by tests/bench/bench_thresholds.py, one thread, a matrix of 1024 x 2048, 1 to 16 tokens.
 *
 * Columns are machines, each for the sets that such machines choose. One machine says little of another: the same
 * kernels are worth it up to 8 tokens on Zen 4 and up to 4 on the Xeon.
 *   avx2    avx2 and avx_vnni; xeon    avx512; vnni    avx512_vnni and avx512_vbmi; amx    amx
 *           Intel Xeon with AMX (family 6, model 167 under KVM, 2 MiB second-level cache), 30 November 2026
 *           (Q8_0 on avx2: 1 December), gcc 12.2
 *   zen4    avx512_bf16: machines that have it and no AMX. AMD EPYC (Zen 4), November 2026, gcc 12.2
 * 17: decoding won up to 16 tokens. Never 1: one token is bound by memory, which decode kernels read best. A format
 * without a row, and a set without a column (portable, ARM), take the defaults. */
#include "thresholds.h"

#include "../isas.h"

enum { FLOAT_DEFAULT = 12, Q8_DEFAULT = 5 };
enum { NONE, AVX2, XEON, VNNI, ZEN4, AMX, COLUMNS };

static const uint8_t column_of[KT_ISA_COUNT] = {
    [KT_ISA_AVX2] = AVX2,        [KT_ISA_AVX_VNNI] = AVX2,    [KT_ISA_AMX_EMULATED] = AVX2,
    [KT_ISA_AVX512] = XEON,      [KT_ISA_AVX512_VNNI] = VNNI, [KT_ISA_AVX512_VBMI] = VNNI,
    [KT_ISA_AVX512_BF16] = ZEN4, [KT_ISA_AMX] = AMX,
};

/* clang-format off */
#define ROW(name, avx2, xeon, vnni, zen4, amx) [KT_FMT_##name] = {0, avx2, xeon, vnni, zen4, amx}
static const uint8_t measured[KT_FORMATS][COLUMNS] = {
    /*  name     avx2  xeon  vnni  zen4  amx */
    ROW(F32,     5,    16,   16,   12,   16),
    ROW(F16,     16,   17,   17,   12,   17),
    ROW(BF16,    5,    17,   17,   9,    5),
    ROW(Q4_0,    4,    4,    5,    9,    5),
    ROW(Q4_1,    3,    4,    4,    9,    4),
    ROW(Q5_0,    3,    5,    5,    9,    5),
    ROW(Q5_1,    2,    4,    4,    9,    4),
    ROW(Q8_0,    2,    7,    4,    9,    4),
    ROW(Q2_K,    3,    5,    4,    9,    5),
    ROW(Q3_K,    3,    8,    4,    9,    5),
    ROW(Q4_K,    3,    9,    5,    9,    5),
    ROW(Q5_K,    3,    6,    5,    9,    5),
    ROW(Q6_K,    2,    4,    4,    9,    5),
    ROW(IQ1_S,   0,    5,    5,    9,    5), /* 0: no decode kernel */
    ROW(IQ1_M,   0,    5,    5,    9,    5),
    ROW(IQ2_XXS, 0,    8,    9,    9,    9),
    ROW(IQ2_XS,  0,    5,    5,    9,    5),
    ROW(IQ2_S,   0,    5,    5,    9,    5),
    ROW(IQ3_XXS, 0,    5,    5,    9,    6),
    ROW(IQ3_S,   0,    5,    5,    9,    5),
    ROW(IQ4_NL,  3,    5,    5,    9,    5),
    ROW(IQ4_XS,  3,    5,    5,    9,    5),
    ROW(TQ1_0,   0,    0,    0,    0,    0),
    ROW(TQ2_0,   2,    3,    3,    9,    3),
    ROW(MXFP4,   4,    6,    5,    9,    5),
    ROW(NVFP4,   4,    9,    5,    9,    5),
    ROW(F8_E4M3, 9,    13,   13,   9,    6), /* of normal values: codes that are subnormal floats are slow on Intel */
    ROW(F4_E2M1, 4,    10,   9,    9,    9),
    ROW(I8,      2,    8,    5,    9,    5),
    ROW(U8,      3,    8,    5,    9,    5),
    ROW(I4,      5,    8,    9,    9,    9),
    ROW(GPTQ4,   0,    17,   17,   9,    17),
    ROW(GPTQ8,   0,    0,    17,   9,    17),
    ROW(AWQ4,    0,    17,   17,   9,    17),
};
/* clang-format on */

void kt_thresholds(int isa, int tiles_from[KT_FORMATS]) {
    for (int f = 0; f < KT_FORMATS; f++) {
        const int found = measured[f][column_of[isa]];
        tiles_from[f] = found ? found : kt_traits_table[f].kind == KT_KIND_Q8 ? Q8_DEFAULT : FLOAT_DEFAULT;
    }
}

/* By `python -m tests.bench.bench_attention --rows`, same machine and day as above but for zen4, which is a guess. */
void kt_attend_thresholds(int isa, int panels_from[2]) {
    static const uint8_t rows[COLUMNS][2] = {[NONE] = {16, 16}, [AVX2] = {24, 24}, [XEON] = {48, 48},
                                             [VNNI] = {48, 48}, [ZEN4] = {48, 16}, [AMX] = {48, 6}};
    panels_from[0] = rows[column_of[isa]][0];
    panels_from[1] = rows[column_of[isa]][1];
}
