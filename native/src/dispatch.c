/* dispatch.c: which instruction set runs. Each rung names the one it is built on, inherits its kernels and overwrites
 * what it does better, so a missing kernel silently keeps the best below. The rungs are a tree, not a ladder: a
 * processor may have AVX-512 without AVX-VNNI, or the other way round.
 *
 * setup.py defines KT_HAVE_<ISA> for the sets that the compiler could build. */
#include <stdatomic.h>
#include <pthread.h>
#include <string.h>

#include "../include/kt_native.h"
#include "cpu.h"
#include "kernels.h"

#define BIT(x) (1u << KT_CPU_##x)
#define NEED_AVX2 (BIT(AVX2) | BIT(FMA) | BIT(F16C))
#define NEED_AVX_VNNI (NEED_AVX2 | BIT(AVXVNNI))
#define NEED_AVX512 (NEED_AVX2 | BIT(AVX512F) | BIT(AVX512BW) | BIT(AVX512VL) | BIT(AVX512DQ))
#define NEED_VNNI (NEED_AVX512 | BIT(AVX512VNNI))
#define NEED_VBMI (NEED_VNNI | BIT(AVX512VBMI) | BIT(GFNI))
#define NEED_BF16 (NEED_VNNI | BIT(AVX512BF16))
#define NEED_AMX (NEED_BF16 | BIT(AMXTILE) | BIT(AMXINT8) | BIT(AMXBF16))
#define NEED_I8MM (BIT(ASIMDDP) | BIT(I8MM) | BIT(ARMBF16))

/* Parts that no dot product of bytes touches are not compiled again with VNNI. */
#define FILL(isa, more)                            \
    static void fill_##isa(struct kt_kernels *k) { \
        kt_fill_dot_##isa(k);                      \
        kt_fill_unpack_##isa(k);                   \
        kt_fill_gemm_##isa(k);                     \
        kt_fill_act_##isa(k);                      \
        more;                                      \
    }
FILL(portable, )
#ifdef KT_HAVE_AVX2
FILL(avx2, (kt_fill_dot_float_avx2(k), kt_fill_tile_float_avx2(k), kt_fill_gemm_f32_avx2(k)))
#else
#define fill_avx2 NULL
#endif
#ifdef KT_HAVE_AVX_VNNI
static void fill_avx_vnni(struct kt_kernels *k) { kt_fill_dot_avx_vnni(k), kt_fill_gemm_avx_vnni(k); }
#else
#define fill_avx_vnni NULL
#endif
#ifdef KT_HAVE_AVX512
FILL(avx512, (kt_fill_dot_float_avx512(k), kt_fill_tile_float_avx512(k), kt_fill_gemm_f32_avx512(k),
              kt_fill_iq_dot_avx512(k), kt_fill_iq_tile_avx512(k)))
#else
#define fill_avx512 NULL
#endif
#ifdef KT_HAVE_AVX512_VNNI
static void fill_avx512_vnni(struct kt_kernels *k) {
    kt_fill_dot_avx512_vnni(k), kt_fill_gemm_avx512_vnni(k), kt_fill_act_avx512_vnni(k), kt_fill_iq_dot_avx512_vnni(k);
}
#else
#define fill_avx512_vnni NULL
#endif
#ifdef KT_HAVE_AVX512_VBMI
static void fill_avx512_vbmi(struct kt_kernels *k) { kt_fill_iq_tile_avx512_vbmi(k), kt_fill_iq_dot_avx512_vbmi(k); }
#else
#define fill_avx512_vbmi NULL
#endif
#ifdef KT_HAVE_AVX512_BF16
/* All else as VNNI. */
static void fill_avx512_bf16(struct kt_kernels *k) {
    kt_fill_dot_avx512_bf16(k), kt_fill_tile_float_avx512_bf16(k), kt_fill_gemm_avx512_bf16(k);
}
#else
#define fill_avx512_bf16 NULL
#endif
#ifdef KT_HAVE_AMX
static void fill_amx(struct kt_kernels *k) { kt_fill_gemm_amx(k); } /* all else as AVX-512 */
#else
#define fill_amx NULL
#endif
#ifdef KT_HAVE_AMX_EMULATED
static void fill_amx_emulated(struct kt_kernels *k) { kt_fill_gemm_amx_emulated(k); }
#else
#define fill_amx_emulated NULL
#endif

#ifdef KT_HAVE_NEON_DOTPROD
FILL(neon_dotprod, kt_fill_gemm_f32_neon_dotprod(k))
#else
#define fill_neon_dotprod NULL
#endif
#ifdef KT_HAVE_NEON_I8MM
static void fill_neon_i8mm(struct kt_kernels *k) { kt_fill_gemm_neon_i8mm(k); } /* all else as dotprod */
#else
#define fill_neon_i8mm NULL
#endif

/* Lowest first: the last one that this machine can run is used. The emulation of AMX is there to be asked for by name;
 * it lies below every set that such a machine has itself, so that the last usable rung is the best one. */
enum { PORTABLE, AVX2, AVX_VNNI, AMX_EMULATED, AVX512, AVX512_VNNI, AVX512_VBMI, AVX512_BF16,
       AMX, NEON_DOTPROD, NEON_I8MM, RUNGS };

static const struct {
    const char *name;
    int base; /* the rung it is built on; where that one is not usable, the one below that */
    uint32_t need;
    void (*fill)(struct kt_kernels *k);
} rungs[RUNGS] = {
    /* any machine with a C11 compiler */
    [PORTABLE] = {"portable", PORTABLE, 0, fill_portable},
    /* Intel Haswell (2013), AMD Zen (2017) and later */
    [AVX2] = {"avx2", PORTABLE, NEED_AVX2, fill_avx2},
    /* Intel Alder Lake (2021), Sierra Forest; AMD Zen 5 */
    [AVX_VNNI] = {"avx_vnni", AVX2, NEED_AVX_VNNI, fill_avx_vnni},
    /* for tests, where AVX-512 is */
    [AMX_EMULATED] = {"amx_emulated", AVX2, NEED_AVX512, fill_amx_emulated},
    /* Intel Skylake-X (2017) */
    [AVX512] = {"avx512", AVX2, NEED_AVX512, fill_avx512},
    /* Intel Cascade Lake (2019) */
    [AVX512_VNNI] = {"avx512_vnni", AVX512, NEED_VNNI, fill_avx512_vnni},
    /* Intel Ice Lake (2019), AMD Zen 4 (2022) */
    [AVX512_VBMI] = {"avx512_vbmi", AVX512_VNNI, NEED_VBMI, fill_avx512_vbmi},
    /* Intel Cooper Lake (without VBMI), Sapphire Rapids; AMD Zen 4 (2022) */
    [AVX512_BF16] = {"avx512_bf16", AVX512_VBMI, NEED_BF16, fill_avx512_bf16},
    /* Intel Sapphire Rapids (2023) and later Xeons */
    [AMX] = {"amx", AVX512_BF16, NEED_AMX, fill_amx},
    /* Arm Cortex-A55, A75 (2017), Neoverse N1 (Graviton2); Apple A13 and M1 */
    [NEON_DOTPROD] = {"neon_dotprod", PORTABLE, BIT(ASIMDDP), fill_neon_dotprod},
    /* Arm Cortex-A510, A710 (2021), Neoverse V1 (Graviton3), N2; Apple M2 */
    [NEON_I8MM] = {"neon_i8mm", NEON_DOTPROD, NEED_I8MM, fill_neon_i8mm},
};

static struct kt_kernels tables[RUNGS], exact_tables[RUNGS];
static int usable[RUNGS];
static uint32_t features;
static _Atomic(int) active, exact;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The kernels of kt_set_exact: what multiplies int8 or bf16 is left out. */
static struct kt_kernels only_fp32(struct kt_kernels k) {
    k.gemm_q8 = k.gemm_bf16 = NULL;
    for (int f = 0; f < KT_FORMATS; f++)
        if (kt_traits_table[f].kind == KT_KIND_Q8) k.dot[f] = NULL;
    return k;
}

static void detect(void) {
    features = kt_cpu_detect();
    for (int i = 0; i < RUNGS; i++) {
        if (!rungs[i].fill || (features & rungs[i].need) != rungs[i].need) continue;
        int base = rungs[i].base;
        while (base != i && !usable[base]) base = rungs[base].base;
        if (i != base) tables[i] = tables[base];
        rungs[i].fill(&tables[i]);
        tables[i].name = rungs[i].name;
        exact_tables[i] = only_fp32(tables[i]);
        usable[i] = 1;
        if (i != AMX_EMULATED) atomic_store(&active, i);
    }
}

const struct kt_kernels *kt_kernels(void) {
    pthread_once(&once, detect);
    return &(atomic_load(&exact) ? exact_tables : tables)[atomic_load(&active)];
}

const struct kt_kernels *kt_exact_kernels(void) {
    pthread_once(&once, detect);
    return &exact_tables[atomic_load(&active)];
}

void kt_set_exact(int on) { atomic_store(&exact, on != 0); }

int kt_isa_count(void) { return RUNGS; }

const char *kt_isa_name(int index) { return index < 0 || index >= RUNGS ? NULL : rungs[index].name; }

int kt_isa_usable(int index) {
    pthread_once(&once, detect);
    return index >= 0 && index < RUNGS && usable[index];
}

int kt_isa_active(void) {
    pthread_once(&once, detect);
    return atomic_load(&active);
}

int kt_isa_force(const char *name) {
    if (!name) return KT_ERR_NULL;
    pthread_once(&once, detect);
    for (int i = 0; i < RUNGS; i++)
        if (usable[i] && !strcmp(name, rungs[i].name)) {
            atomic_store(&active, i);
            return KT_OK;
        }
    return KT_ERR_ISA;
}

uint32_t kt_cpu_features(void) {
    pthread_once(&once, detect);
    return features;
}
