/* dispatch.c: which instruction set runs: the last one of isas.h that was built, that the processor has and whose
 * registers the operating system saves. */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "../include/kt_native.h"
#include "cpu.h"
#include "kernels.h"
#include "matmul/thresholds.h"

/* BUILT(KT_HAVE_AVX2) is 1 where that macro is defined as 1, and 0 where it is not defined: SECOND is given "0, 1, 0,
 * 0" or "PLACEHOLDER_KT_HAVE_AVX2 1, 0, 0". */
#define PLACEHOLDER_1 0,
#define SECOND(ignored, value, ...) value
#define BUILT_4(placeholder) SECOND(placeholder 1, 0, 0)
#define BUILT_3(value) BUILT_4(PLACEHOLDER_##value)
#define BUILT(macro) BUILT_3(macro)
#define KT_HAVE_PORTABLE 1

/* fill_<isa>, all its parts in order; NULL for a set that was not built. */
#define CALL_PART(isa, part) kt_fill_##part##_##isa(k);
#define DEFINE_1(isa) static void fill_##isa(struct kt_kernels *k) { KT_PARTS_##isa(CALL_PART) }
#define DEFINE_0(isa) enum { fill_##isa = 0 }; /* a null pointer constant */
#define DEFINE_FILL(isa, upper, base, need) KT_JOIN(DEFINE_, BUILT(KT_HAVE_##upper))(isa)
KT_ISAS(DEFINE_FILL)

#define RUNG(isa, upper, base, need) [KT_ISA_##upper] = {#isa, KT_ISA_##base, need, fill_##isa},
static const struct rung {
    const char *name;
    int base;
    uint32_t need;
    void (*fill)(struct kt_kernels *k);
} rungs[KT_ISA_COUNT] = {KT_ISAS(RUNG)};

static struct kt_kernels tables[KT_ISA_COUNT], exact_tables[KT_ISA_COUNT];
static int usable[KT_ISA_COUNT];
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
    for (int i = 0; i < KT_ISA_COUNT; i++) {
        if (!rungs[i].fill || (features & rungs[i].need) != rungs[i].need) continue;
        int base = rungs[i].base;
        while (base != i && !usable[base]) base = rungs[base].base;
        if (i != base) tables[i] = tables[base];
        rungs[i].fill(&tables[i]);
        kt_thresholds(i, tables[i].tiles_from);
        kt_attend_thresholds(i, tables[i].panels_from);
        tables[i].name = rungs[i].name;
        exact_tables[i] = only_fp32(tables[i]);
        usable[i] = 1;
        if (i != KT_ISA_AMX_EMULATED) atomic_store(&active, i);
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

int kt_isa_count(void) { return KT_ISA_COUNT; }

const char *kt_isa_name(int index) { return index < 0 || index >= KT_ISA_COUNT ? NULL : rungs[index].name; }

int kt_isa_usable(int index) {
    pthread_once(&once, detect);
    return index >= 0 && index < KT_ISA_COUNT && usable[index];
}

int kt_isa_active(void) {
    pthread_once(&once, detect);
    return atomic_load(&active);
}

int kt_isa_force(const char *name) {
    if (!name) return KT_ERR_NULL;
    pthread_once(&once, detect);
    for (int i = 0; i < KT_ISA_COUNT; i++)
        if (usable[i] && !strcmp(name, rungs[i].name)) {
            atomic_store(&active, i);
            return KT_OK;
        }
    return KT_ERR_ISA;
}

uint32_t kt_isa_needs(int index) { return index < 0 || index >= KT_ISA_COUNT ? 0 : rungs[index].need; }

uint32_t kt_cpu_features(void) {
    pthread_once(&once, detect);
    return features;
}
