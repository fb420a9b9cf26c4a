/* isas.h: every instruction set, once: its name, the set it is built on, what it needs of the processor, and which
 * parts it brings. Lowest first: the last one that a machine can run is used. They are a tree, not a ladder: a
 * processor may have AVX-512 without AVX-VNNI, or the other way round.
 *
 * A set inherits the kernels of its base and overwrites what it does better: what it leaves out stays the best below.
 * Part <part> is src/<isa>/<part>.c, which ends in kt_fill_<part>_<isa>. setup.py has the compiler's flags and defines
 * KT_HAVE_<ISA> for what it built; ktransformers/env.py repeats the names, for machines without the library. */
#ifndef KT_ISAS_H
#define KT_ISAS_H

#include "cpu.h"

#define KT_BIT(x) (1u << KT_CPU_##x)
#define KT_NEED_AVX2 (KT_BIT(AVX2) | KT_BIT(FMA) | KT_BIT(F16C))
#define KT_NEED_AVX_VNNI (KT_NEED_AVX2 | KT_BIT(AVXVNNI))
#define KT_NEED_AVX512 (KT_NEED_AVX2 | KT_BIT(AVX512F) | KT_BIT(AVX512BW) | KT_BIT(AVX512VL) | KT_BIT(AVX512DQ))
#define KT_NEED_VNNI (KT_NEED_AVX512 | KT_BIT(AVX512VNNI))
#define KT_NEED_VBMI (KT_NEED_VNNI | KT_BIT(AVX512VBMI) | KT_BIT(GFNI))
#define KT_NEED_AVX512_BF16 (KT_NEED_VNNI | KT_BIT(AVX512BF16))
#define KT_NEED_AMX (KT_NEED_AVX512_BF16 | KT_BIT(AMXTILE) | KT_BIT(AMXINT8) | KT_BIT(AMXBF16))
#define KT_NEED_DOTPROD KT_BIT(ASIMDDP)
#define KT_NEED_I8MM (KT_BIT(ASIMDDP) | KT_BIT(I8MM) | KT_BIT(ARMBF16))

/* X(name, NAME, base, needs). First machines:
 *   avx2          Intel Haswell (2013), AMD Zen (2017)
 *   avx_vnni      Intel Alder Lake (2021), Sierra Forest; AMD Zen 5
 *   amx_emulated  for tests, where AVX-512 is. Below every set that such a machine has itself, and used only by name
 *   avx512        Intel Skylake-X (2017)
 *   avx512_vnni   Intel Cascade Lake (2019)
 *   avx512_vbmi   Intel Ice Lake (2019), AMD Zen 4 (2022)
 *   avx512_bf16   Intel Cooper Lake (2020, without VBMI), AMD Zen 4 (2022)
 *   amx           Intel Sapphire Rapids (2023) and later Xeons
 *   neon_dotprod  Arm Cortex-A55, A75 (2017), Neoverse N1 (Graviton2); Apple A13, M1
 *   neon_i8mm     Arm Cortex-A510, A710 (2021), Neoverse V1 (Graviton3), N2; Apple M2 */
#define KT_ISAS(X)                                               \
    X(portable, PORTABLE, PORTABLE, 0)                           \
    X(avx2, AVX2, PORTABLE, KT_NEED_AVX2)                        \
    X(avx_vnni, AVX_VNNI, AVX2, KT_NEED_AVX_VNNI)                \
    X(amx_emulated, AMX_EMULATED, AVX2, KT_NEED_AVX512)          \
    X(avx512, AVX512, AVX2, KT_NEED_AVX512)                      \
    X(avx512_vnni, AVX512_VNNI, AVX512, KT_NEED_VNNI)            \
    X(avx512_vbmi, AVX512_VBMI, AVX512_VNNI, KT_NEED_VBMI)       \
    X(avx512_bf16, AVX512_BF16, AVX512_VBMI, KT_NEED_AVX512_BF16) \
    X(amx, AMX, AVX512_BF16, KT_NEED_AMX)                        \
    X(neon_dotprod, NEON_DOTPROD, PORTABLE, KT_NEED_DOTPROD)     \
    X(neon_i8mm, NEON_I8MM, NEON_DOTPROD, KT_NEED_I8MM)

/* P(isa, part), in the order in which they are called: a later one may keep what an earlier one of its base has filled.
 * Parts that no dot product of integers touches are not compiled again with VNNI. */
#define KT_PARTS_ALL(P, isa) P(isa, dot) P(isa, unpack) P(isa, gemm) P(isa, act)
#define KT_PARTS_FLOATS(P, isa) P(isa, dot_float) P(isa, tile_float) P(isa, gemm_f32)
#define KT_PARTS_portable(P) KT_PARTS_ALL(P, portable) P(portable, attend) P(portable, encode)
#define KT_PARTS_avx2(P) KT_PARTS_ALL(P, avx2) KT_PARTS_FLOATS(P, avx2) P(avx2, attend) P(avx2, encode) P(avx2, turn)
#define KT_PARTS_avx_vnni(P) P(avx_vnni, dot) P(avx_vnni, gemm) P(avx_vnni, encode)
#define KT_PARTS_amx_emulated(P) P(amx_emulated, gemm)
#define KT_PARTS_avx512(P)                                   \
    KT_PARTS_ALL(P, avx512) KT_PARTS_FLOATS(P, avx512)       \
    P(avx512, iq_dot) P(avx512, iq_tile) P(avx512, attend) P(avx512, encode) P(avx512, turn)
#define KT_PARTS_avx512_vnni(P)                                                                     \
    P(avx512_vnni, dot) P(avx512_vnni, gemm) P(avx512_vnni, act) P(avx512_vnni, iq_dot) P(avx512_vnni, encode)
#define KT_PARTS_avx512_vbmi(P) P(avx512_vbmi, iq_tile) P(avx512_vbmi, iq_dot)
#define KT_PARTS_avx512_bf16(P)                                                                      \
    P(avx512_bf16, dot) P(avx512_bf16, tile_float) P(avx512_bf16, gemm) P(avx512_bf16, act)          \
    P(avx512_bf16, turn)
#define KT_PARTS_amx(P) P(amx, gemm)
#define KT_PARTS_neon_dotprod(P) KT_PARTS_ALL(P, neon_dotprod) P(neon_dotprod, gemm_f32)
#define KT_PARTS_neon_i8mm(P) P(neon_i8mm, gemm)

/* Dense index of a set, for tables. */
#define KT_ISA_INDEX(isa, upper, base, need) KT_ISA_##upper,
enum kt_isa { KT_ISAS(KT_ISA_INDEX) KT_ISA_COUNT };

#endif
