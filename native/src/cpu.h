/* cpu.h: what this processor can do and what the operating system lets it do. */
#ifndef KT_CPU_H
#define KT_CPU_H

#include <stdint.h>

enum kt_cpu_bit {
    KT_CPU_AVX2, KT_CPU_FMA, KT_CPU_F16C, KT_CPU_AVXVNNI, KT_CPU_AVX512F, KT_CPU_AVX512BW, KT_CPU_AVX512VL,
    KT_CPU_AVX512DQ, KT_CPU_AVX512VNNI, KT_CPU_AVX512VBMI, KT_CPU_GFNI, KT_CPU_AVX512BF16, KT_CPU_AMXTILE,
    KT_CPU_AMXINT8, KT_CPU_AMXBF16, KT_CPU_ASIMDDP, KT_CPU_I8MM, KT_CPU_ARMBF16, KT_CPU_BITS
};

/* Bits of kt_cpu_bit; 0 on anything but x86-64 and 64-bit ARM. Asks Linux for the use of AMX tiles, for the whole
 * process. */
uint32_t kt_cpu_detect(void);

#endif
