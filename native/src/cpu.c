/* x86: cpuid says what the processor has, xgetbv what the operating system saves at a context switch; a feature
 * counts only with both. (A virtual machine or an old kernel may offer one without the other.) AMX counts only once
 * Linux has granted it to the process as well: its tiles are 8 KiB that most processes never need saved.
 * ARM: the identification registers belong to the operating system, which tells what it found and allows. */
#include "cpu.h"

#include "../include/kt_native.h"

#if defined(__x86_64__)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* ARCH_REQ_XCOMP_PERM for XTILEDATA (Documentation/arch/x86/xstate.rst). Holds for all threads of the process and for
 * children without exec. Refused by kernels before 5.16, and where a thread's signal stack is too small for tiles. */
static int may_use_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#else
static int may_use_tiles(void) { return 0; }
#endif

static uint64_t xgetbv(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

uint32_t kt_cpu_detect(void) {
    uint32_t a, b, c, d, found = 0;
    uint32_t basic_c, more_a, ignored; /* of leaf 1, and of the second part of leaf 7 */
    if (!__get_cpuid(1, &ignored, &ignored, &basic_c, &ignored)) return 0;
    if (!(basic_c & 1u << 27)) return 0; /* OSXSAVE: xgetbv exists */
    uint64_t saved = xgetbv();
    if ((saved & 0x06) != 0x06) return 0;         /* XMM and YMM */
    int zmm = (saved & 0xe6) == 0xe6;             /* and mask registers and both halves of ZMM */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    uint32_t max_subleaf = a;
    if (b & 1u << 5) found |= 1u << KT_CPU_AVX2;
    if (basic_c & 1u << 12) found |= 1u << KT_CPU_FMA;
    if (basic_c & 1u << 29) found |= 1u << KT_CPU_F16C;
    if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &more_a, &ignored, &ignored, &ignored)) {
        if (more_a & 1u << 4) found |= 1u << KT_CPU_AVXVNNI;
        if (zmm && more_a & 1u << 5) found |= 1u << KT_CPU_AVX512BF16;
    }
    if (!zmm) return found;
    if (b & 1u << 16) found |= 1u << KT_CPU_AVX512F;
    if (b & 1u << 17) found |= 1u << KT_CPU_AVX512DQ;
    if (b & 1u << 30) found |= 1u << KT_CPU_AVX512BW;
    if (b & 1u << 31) found |= 1u << KT_CPU_AVX512VL;
    if (c & 1u << 11) found |= 1u << KT_CPU_AVX512VNNI;
    if (d & 1u << 24 && (saved & 0x60000) == 0x60000 && may_use_tiles()) { /* XCR0: TILECFG and TILEDATA */
        found |= 1u << KT_CPU_AMXTILE;
        if (d & 1u << 25) found |= 1u << KT_CPU_AMXINT8;
        if (d & 1u << 22) found |= 1u << KT_CPU_AMXBF16;
    }
    if (c & 1u << 1) found |= 1u << KT_CPU_AVX512VBMI;
    if (c & 1u << 8) found |= 1u << KT_CPU_GFNI; /* alone it has no 512 bits; with AVX-512 it does */
    return found;
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

uint32_t kt_cpu_detect(void) {
    /* Bits of the kernel's interface, by number: headers older than these features still build the library. */
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    uint32_t found = 0;
    if (first & 1ul << 20) found |= 1u << KT_CPU_ASIMDDP;
    if (second & 1ul << 13) found |= 1u << KT_CPU_I8MM;
    if (second & 1ul << 14) found |= 1u << KT_CPU_ARMBF16;
    return found;
}
#elif defined(__aarch64__) && defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

static uint32_t has(const char *name, int bit) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value ? 1u << bit : 0;
}

uint32_t kt_cpu_detect(void) {
    return has("hw.optional.arm.FEAT_DotProd", KT_CPU_ASIMDDP) | has("hw.optional.arm.FEAT_I8MM", KT_CPU_I8MM) |
           has("hw.optional.arm.FEAT_BF16", KT_CPU_ARMBF16);
}
#else
uint32_t kt_cpu_detect(void) { return 0; }
#endif

const char *kt_cpu_feature_name(int bit) {
    static const char *const names[KT_CPU_BITS] = {
        "avx2",        "fma",         "f16c", "avx_vnni",    "avx512f",  "avx512bw", "avx512vl", "avx512dq",
        "avx512_vnni", "avx512_vbmi", "gfni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimddp",
        "i8mm",        "arm_bf16"};
    return bit < 0 || bit >= KT_CPU_BITS ? NULL : names[bit];
}
