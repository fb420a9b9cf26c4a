/* templates/dot_tokens.h: decode kernels of several tokens from one text. A pass unpacks weights once, in registers,
 * and meets up to DOT_TOKENS tokens: as many as the instruction set has registers for their sums (dot_vec.h). */
#ifndef KT_DOT_TOKENS_H
#define KT_DOT_TOKENS_H

/* dot_NAME from NAME_pass(T, w, first, rows, a, ahead, out, ldc), always inlined for a constant number of tokens. A
 * token's sums do not depend on the others. */
#define DOT_FOR_TOKENS(name)                                                                                         \
    DOT_PASS(name, 1) DOT_PASS(name, 2) DOT_PASS(name, 3) DOT_PASS(name, 4)                                          \
    static void dot_##name(const struct kt_matrix *w, int64_t first, int rows, const struct kt_act *a, int tokens,   \
                           size_t ahead, float *out, int64_t ldc) {                                                  \
        for (; tokens > 0; tokens -= DOT_TOKENS, a += DOT_TOKENS, out += DOT_TOKENS * ldc) {                         \
            if (tokens == 1) name##_1(w, first, rows, a, ahead, out, ldc);                                           \
            else if (tokens == 2 || DOT_TOKENS == 2) name##_2(w, first, rows, a, ahead, out, ldc);                   \
            else if (tokens == 3 || DOT_TOKENS == 3) name##_3(w, first, rows, a, ahead, out, ldc);                   \
            else name##_4(w, first, rows, a, ahead, out, ldc);                                                       \
        }                                                                                                            \
    }
#define DOT_PASS(name, T)                                                                                            \
    static __attribute__((noinline)) void name##_##T(const struct kt_matrix *w, int64_t first, int rows,             \
                                                     const struct kt_act *a, size_t ahead, float *out, int64_t ldc) { \
        name##_pass(T <= DOT_TOKENS ? T : DOT_TOKENS, w, first, rows, a, ahead, out, ldc);                           \
    }

/* The kernel of a format; from how many tokens on tiles beat it is in matmul/thresholds.c. */
#define DOT_FILL(k, format, name) ((k)->dot[KT_FMT_##format] = dot_##name)

#endif
