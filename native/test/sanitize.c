/* sanitize.c: every kernel on every instruction set of this machine against portable C, through the public
 * API, on heap blocks of exactly the right size at odd addresses: what a sanitizer needs to see. Also error
 * paths, nasty numbers, the pool from several threads, and fork. Built and run by ../sanitize.py.
 *
 * The Python tests hold the results to the truth; this program holds the memory accesses to the rules. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../include/kt_native.h"
#include "../src/attention/attend.h"

static int failures;
static uint64_t seed = 88172645463325252ull;

static uint32_t next(void) { /* xorshift64* */
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return (uint32_t)(seed * 2685821657736338717ull >> 32);
}
static float uniform(void) { return (float)next() / 4294967296.0f - 0.5f; }

static void check(int ok, const char *what) {
    if (!ok) {
        failures++;
        fprintf(stderr, "FAILED: %s\n", what);
    }
}

/* The bytes of a block that decide how large its values are; which bits to replace, and by what, for about +-0.01. */
static const struct {
    int type, count, at[4];
    uint8_t bits, value;
} blocks[] = {
    {KT_TYPE_F32, 1, {3}, 0x7f, 0x3c},     {KT_TYPE_F16, 1, {1}, 0x7c, 0x20},    {KT_TYPE_BF16, 1, {1}, 0x7f, 0x3c},
    {KT_TYPE_Q4_0, 1, {1}, 0x7c, 0x14},    {KT_TYPE_Q4_1, 2, {1, 3}, 0x7c, 0x14}, {KT_TYPE_Q5_0, 1, {1}, 0x7c, 0x14},
    {KT_TYPE_Q5_1, 2, {1, 3}, 0x7c, 0x14}, {KT_TYPE_Q8_0, 1, {1}, 0x7c, 0x20},
    {KT_TYPE_Q2_K, 2, {81, 83}, 0xff, 0x14},
    {KT_TYPE_Q3_K, 1, {109}, 0xff, 0x10},  {KT_TYPE_Q4_K, 2, {1, 3}, 0xff, 0x14}, {KT_TYPE_Q5_K, 2, {1, 3}, 0xff, 0x14},
    {KT_TYPE_Q6_K, 1, {209}, 0xff, 0x10},  {KT_TYPE_IQ4_NL, 1, {1}, 0x7c, 0x10}, {KT_TYPE_IQ4_XS, 1, {1}, 0x7c, 0x10},
    {KT_TYPE_IQ1_S, 1, {1}, 0x7c, 0x1c},   {KT_TYPE_IQ1_M, 2, {53, 55}, 0x70, 0x10},
    {KT_TYPE_IQ2_XXS, 1, {1}, 0x7c, 0x10}, {KT_TYPE_IQ2_XS, 1, {1}, 0x7c, 0x10}, {KT_TYPE_IQ2_S, 1, {1}, 0x7c, 0x10},
    {KT_TYPE_IQ3_XXS, 1, {1}, 0x7c, 0x10}, {KT_TYPE_IQ3_S, 1, {1}, 0x7c, 0x10},
    {KT_TYPE_TQ1_0, 1, {53}, 0x7c, 0x20},  {KT_TYPE_TQ2_0, 1, {65}, 0x7c, 0x20},
    {KT_TYPE_MXFP4, 1, {0}, 0xff, 0x78},   {KT_TYPE_NVFP4, 4, {0, 1, 2, 3}, 0x78, 0x08},
};

/* Types with separate scales: how those are stored, what shares one, and whether there are zero points. */
static const struct separate {
    int type, scale_type;
    int64_t scale_rows, scale_cols;
    int zeros;
} separates[] = {
    {KT_TYPE_F8_E4M3, KT_SCALE_F32, 128, 128, 0}, {KT_TYPE_F8_E4M3, KT_SCALE_E8M0, 1, 32, 0},
    {KT_TYPE_F4_E2M1, KT_SCALE_E4M3, 1, 16, 0},   {KT_TYPE_F4_E2M1, KT_SCALE_E8M0, 1, 32, 0},
    {KT_TYPE_I8, KT_SCALE_F32, 1, 1 << 20, 0},    {KT_TYPE_I8, KT_SCALE_BF16, 1, 16, 0},
    {KT_TYPE_U8, KT_SCALE_F16, 1, 128, 1},        {KT_TYPE_I4, KT_SCALE_BF16, 1, 32, 0},
    {KT_TYPE_I4, KT_SCALE_F16, 1, 128, 1},        {KT_TYPE_GPTQ4, KT_SCALE_F16, 1, 128, 1},
    {KT_TYPE_GPTQ8, KT_SCALE_F16, 1, 64, 0},      {KT_TYPE_GPTQ8, KT_SCALE_F16, 1, 128, 1},
    {KT_TYPE_AWQ4, KT_SCALE_F16, 1, 128, 1},
};
enum {
    BLOCKS = sizeof blocks / sizeof blocks[0],
    FORMATS = BLOCKS + sizeof separates / sizeof separates[0],
    Q8_0 = 7,
    THREADS = 3
};

static int type_of(int format) { return format < BLOCKS ? blocks[format].type : separates[format - BLOCKS].type; }

/* A weight whose bytes end where the allocation ends and start at an odd address; so do its scales and zero points. */
struct weight {
    uint8_t *room, *scales, *zeros;
    kt_weight w;
};

static uint8_t *random_bytes(size_t n) {
    uint8_t *p = malloc(n + 1);
    for (size_t i = 0; i < n; i++) p[1 + i] = (uint8_t)next();
    return p;
}

/* Byte `at` of every `size` bytes. */
static void set_bits(uint8_t *p, size_t n, size_t at, size_t size, uint8_t bits, uint8_t value) {
    for (size_t i = at; i < n; i += size) p[i] = (uint8_t)((p[i] & ~bits) | value);
}

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void add_scales(const struct separate *f, struct weight *m) {
    static const struct {
        size_t size;
        uint8_t bits, value;
    } about[] = {{4, 0xff, 0x3c}, {2, 0xfc, 0x20}, {2, 0xff, 0x3c}, {1, 0xfe, 0x78}, {1, 0xf8, 0x08}}; /* by kt_scale */
    const int64_t down = divide_up(m->w.rows, f->scale_rows), across = divide_up(m->w.cols, f->scale_cols);
    const size_t size = about[f->scale_type].size;
    m->w.scale_type = f->scale_type;
    m->w.scale_rows = f->scale_rows;
    m->w.scale_cols = f->scale_cols;
    m->w.scale = 0.75f;
    m->w.scale_bytes = (size_t)(down * across) * size;
    m->scales = random_bytes(m->w.scale_bytes);
    m->w.scales = m->scales + 1;
    set_bits(m->scales + 1, m->w.scale_bytes, size - 1, size, about[f->scale_type].bits, about[f->scale_type].value);
    if (f->type == KT_TYPE_F8_E4M3) set_bits(m->room + 1, m->w.bytes, 0, 1, 0x40, 0); /* all ones are a NaN */
    if (!f->zeros) return;
    m->w.zero_bytes = (size_t)(divide_up(down, f->type == KT_TYPE_U8 || f->type == KT_TYPE_GPTQ8 ? 4 : 8) * across) * 4;
    m->zeros = random_bytes(m->w.zero_bytes);
    m->w.zeros = m->zeros + 1;
    m->w.zero_bias = 1;
}

static struct weight make(int format, int64_t rows, int64_t cols) {
    const int type = type_of(format);
    int64_t block = kt_type_block(type), size = kt_type_block_bytes(type);
    size_t bytes = (size_t)(rows * (cols / block) * size) / (type == KT_TYPE_AWQ4 ? 2 : 1);
    struct weight m = {.room = random_bytes(bytes), .w = {.type = type, .rows = rows, .cols = cols, .bytes = bytes}};
    m.w.data = m.room + 1;
    if (format >= BLOCKS) {
        add_scales(&separates[format - BLOCKS], &m);
        return m;
    }
    for (int j = 0; j < blocks[format].count; j++)
        set_bits(m.room + 1, bytes, (size_t)blocks[format].at[j], (size_t)size, blocks[format].bits,
                 blocks[format].value);
    return m;
}

static void drop(struct weight *m) { free(m->room), free(m->scales), free(m->zeros); }

/* What the columns of a format are a multiple of. */
static int64_t unit_of(int format) {
    const int type = type_of(format);
    return type > KT_TYPE_F8_E4M3 ? 32 : kt_type_block(type);
}

/* mean|a - b| / mean|b| */
static double difference(const float *a, const float *b, size_t n) {
    double d = 0, s = 1e-30;
    for (size_t i = 0; i < n; i++) {
        d += fabs((double)a[i] - b[i]);
        s += fabs((double)b[i]);
    }
    return d / s;
}

static float *random_floats(size_t n) {
    float *x = malloc(n * sizeof *x + 1);
    for (size_t i = 0; i < n; i++) x[i] = uniform();
    return x;
}

/* The n floats cut to bf16 in place, and as an allocation of their own; and back. */
static uint16_t *cut_to_bf16(float *x, size_t n) {
    uint16_t *h = malloc(n * sizeof *h + 1);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        h[i] = (uint16_t)(bits >> 16);
        bits &= 0xffff0000u;
        memcpy(&x[i], &bits, 4);
    }
    return h;
}
static void widen(const uint16_t *h, size_t n, float *x) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)h[i] << 16;
        memcpy(&x[i], &bits, 4);
    }
}

/* The sum of |w x| over all products in all results: a single sum may nearly cancel, its parts do not. */
static double sum_of_products(const struct weight *m, const float *x, int64_t tokens) {
    const int64_t rows = m->w.rows, cols = m->w.cols;
    float *w = malloc((size_t)(rows * cols) * sizeof *w + 1), *each = calloc((size_t)cols, sizeof *each);
    check(kt_dequantize(&m->w, w) == KT_OK, "dequantize status");
    for (int64_t i = 0; i < rows * cols; i++) each[i % cols] += fabsf(w[i]);
    double sum = 1e-30;
    for (int64_t i = 0; i < tokens * cols; i++) sum += (double)each[i % cols] * fabsf(x[i]);
    free(w);
    free(each);
    return sum;
}

/* bf16 activations, against `expected`, the fp32 result of the same values. */
static void linear_bf16(kt_pool *pool, const struct weight *m, const float *bias, const uint16_t *x, int64_t tokens,
                        const float *expected, const char *isa) {
    size_t n = (size_t)(tokens * m->w.rows);
    uint16_t *y = malloc(n * sizeof *y + 1);
    float *found = malloc(n * 4 + 1);
    check(kt_linear(pool, &m->w, bias, x, KT_BF16, tokens, y) == KT_OK, "linear bf16 status");
    widen(y, n, found);
    double d = difference(found, expected, n);
    if (!(d < 0x1p-8)) {
        failures++;
        fprintf(stderr, "FAILED: linear %s [%ld, %ld] T=%ld %s of bf16: %g\n", kt_type_name(m->w.type), (long)m->w.rows,
                (long)m->w.cols, (long)tokens, isa, d);
    }
    free(y);
    free(found);
}

static void linear_case(kt_pool *pool, int format, int64_t rows, int64_t cols, int64_t tokens, int threshold) {
    struct weight m = make(format, rows, cols);
    float *x = random_floats((size_t)(tokens * cols)), *bias = random_floats((size_t)rows);
    uint16_t *h = cut_to_bf16(x, (size_t)(tokens * cols));
    size_t n = (size_t)(tokens * rows);
    const double products = sum_of_products(&m, x, tokens);
    float *expected = malloc(n * 4), *found = malloc(n * 4);
    kt_set_panel_threshold(threshold);
    kt_isa_force("portable");
    check(kt_linear(pool, &m.w, bias, x, KT_F32, tokens, expected) == KT_OK, "linear status");
    double most = 2e-7 * products; /* a single sum may nearly cancel, as do the codes and zero points of eight bits */
    for (size_t i = 0; i < n; i++) most += (m.zeros ? 2e-5 : 3e-6) * fabs((double)expected[i]);
    for (int isa = 1; isa < kt_isa_count(); isa++) {
        if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
        check(kt_linear(pool, &m.w, bias, x, KT_F32, tokens, found) == KT_OK, "linear status");
        linear_bf16(pool, &m, bias, h, tokens, expected, kt_isa_name(isa));
        double d = 0;
        for (size_t i = 0; i < n; i++) d += fabs((double)found[i] - expected[i]);
        if (!(d <= most)) {
            failures++;
            fprintf(stderr, "FAILED: linear %s [%ld, %ld] T=%ld %s threshold=%d: %g of %g\n", kt_type_name(m.w.type),
                    (long)rows, (long)cols, (long)tokens, kt_isa_name(isa), threshold, d, most);
        }
    }
    drop(&m);
    free(x);
    free(h);
    free(bias);
    free(expected);
    free(found);
}

static void dequantize_case(int format, int64_t rows, int64_t cols) {
    struct weight m = make(format, rows, cols);
    size_t n = (size_t)(rows * cols) * 4;
    float *expected = malloc(n), *found = malloc(n);
    kt_isa_force("portable");
    check(kt_dequantize(&m.w, expected) == KT_OK, "dequantize status");
    for (int isa = 1; isa < kt_isa_count(); isa++) {
        if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
        check(kt_dequantize(&m.w, found) == KT_OK && !memcmp(found, expected, n), "dequantize");
    }
    drop(&m);
    free(expected);
    free(found);
}

struct moe {
    enum { E = 4, K = 3 } unused;
    int64_t hidden, inner, tokens;
    struct weight part[3][E];
    kt_experts *experts;
    float *x, *weights;
    uint16_t *h; /* x as bf16 */
    int64_t *ids;
};

static struct moe moe_make(const int format[3], int64_t hidden, int64_t inner, int64_t tokens, int activation) {
    struct moe m = {.hidden = hidden, .inner = inner, .tokens = tokens};
    kt_weight w[3][E];
    for (int p = 0; p < 3; p++)
        for (int e = 0; e < E; e++) {
            m.part[p][e] = p == 2 ? make(format[p], hidden, inner) : make(format[p], inner, hidden);
            w[p][e] = m.part[p][e].w;
        }
    const kt_glu glu = {.activation = activation, .alpha = 1.7f, .limit = activation & 1 ? 7.0f : INFINITY};
    check(kt_experts_create(E, w[0], w[1], w[2], &glu, &m.experts) == KT_OK, "create");
    m.x = random_floats((size_t)(tokens * hidden));
    m.h = cut_to_bf16(m.x, (size_t)(tokens * hidden));
    m.weights = random_floats((size_t)(tokens * K));
    m.ids = malloc((size_t)(tokens * K) * sizeof *m.ids + 1);
    for (int64_t i = 0; i < tokens * K; i++) m.ids[i] = (int64_t)(next() % (E + 2)) - 1;
    return m;
}
static void moe_free(struct moe *m) {
    for (int p = 0; p < 3; p++)
        for (int e = 0; e < E; e++) drop(&m->part[p][e]);
    kt_experts_destroy(m->experts);
    free(m->x);
    free(m->h);
    free(m->weights);
    free(m->ids);
}
/* The block of a router of the first format, these experts, and the first of them as the shared one. */
static void block_case(kt_pool *pool, const struct moe *m, int format, const float *gate) {
    struct weight w = make(format, E, m->hidden), one = make(format, 1, m->hidden);
    const kt_glu glu = {.activation = KT_SILU, .limit = INFINITY};
    kt_router *router = NULL;
    kt_experts *shared = NULL;
    kt_moe *moe = NULL;
    const kt_router_desc desc = {.weight = &w.w, .top_k = K, .score = KT_SCORE_SIGMOID, .bias_on = KT_BIAS_ON_SCORE,
                                 .choice_bias = gate, .groups = 2, .groups_kept = 2, .group_by = KT_GROUP_BEST2,
                                 .masked = -INFINITY, .divide = KT_DIVIDE_SUM, .factor = 1.0f};
    check(kt_router_create(&desc, &router) == KT_OK, "router");
    check(kt_experts_create(1, &m->part[0][0].w, &m->part[1][0].w, &m->part[2][0].w, &glu, &shared) == KT_OK, "shared");
    const kt_moe_desc block = {.router = router, .experts = m->experts, .shared = shared, .shared_gate = &one.w,
                               .factor = 1.0f, .shared_factor = 0.5f};
    check(kt_moe_create(&block, &moe) == KT_OK, "block");
    float *out = malloc((size_t)(m->tokens * m->hidden) * 4 + 1), *logits = malloc((size_t)(m->tokens * E) * 4 + 1);
    float *weights = malloc((size_t)(m->tokens * K) * 4 + 1);
    int64_t *ids = malloc((size_t)(m->tokens * K) * 8 + 1);
    check(kt_router_forward(router, pool, m->x, KT_F32, m->tokens, ids, weights, logits) == KT_OK, "route");
    for (int64_t i = 0; i < m->tokens * K; i++) check(ids[i] >= 0 && ids[i] < E, "id");
    check(kt_moe_forward(moe, pool, m->x, KT_F32, m->tokens, out, NULL) == KT_OK, "block forward");
    check(kt_moe_forward(moe, pool, m->h, KT_BF16, m->tokens, out, NULL) == KT_OK, "block forward bf16");
    kt_moe_destroy(moe);
    kt_router_destroy(router);
    kt_experts_destroy(shared);
    drop(&w);
    drop(&one);
    free(out);
    free(logits);
    free(weights);
    free(ids);
}

static int moe_run(const struct moe *m, kt_pool *pool, float *out) {
    return kt_experts_forward(m->experts, pool, m->x, KT_F32, m->tokens, m->ids, K, m->weights, out);
}

static const float few_floats[E] = {0.1f, -0.2f, 0.3f, 0.0f};

static void experts_case(kt_pool *pool, const int format[3], int64_t hidden, int64_t inner, int64_t tokens,
                         int threshold) {
    struct moe m = moe_make(format, hidden, inner, tokens, (int)(next() % 4));
    size_t n = (size_t)(tokens * hidden);
    float *expected = malloc(n * 4 + 1), *found = malloc(n * 4 + 1);
    uint16_t *y = malloc(n * sizeof *y + 1);
    kt_set_panel_threshold(threshold);
    kt_isa_force("portable");
    check(moe_run(&m, pool, expected) == KT_OK, "experts status");
    for (int isa = 1; isa < kt_isa_count(); isa++) {
        if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
        if (type_of(format[0]) != KT_TYPE_AWQ4) block_case(pool, &m, format[0], few_floats); /* 4 rows */
        check(moe_run(&m, pool, found) == KT_OK, "experts status");
        double d = difference(found, expected, n);
        check(kt_experts_forward(m.experts, pool, m.h, KT_BF16, tokens, m.ids, K, m.weights, y) == KT_OK,
              "experts bf16");
        widen(y, n, found);
        d = fmax(d, difference(found, expected, n));
        if (tokens && !(d < 1e-2)) {
            failures++;
            fprintf(stderr, "FAILED: experts %s T=%ld %s threshold=%d: %g\n", kt_type_name(type_of(format[0])),
                    (long)tokens, kt_isa_name(isa), threshold, d);
        }
    }
    free(expected);
    free(found);
    free(y);
    moe_free(&m);
}

#include "sanitize_attention.h"
#include "sanitize_backward.h"

/* Garbage bytes as scales, infinities and NaNs as activations: any answer, no undefined behaviour. */
static void garbage(kt_pool *pool, int few) {
    const float nasty[] = {INFINITY, -INFINITY, NAN, 3e38f, -3e38f, 1e-45f, 0.0f, -0.0f};
    for (int i = 0; i < FORMATS; i += few ? 9 : 1) {
        struct weight m = make(i, 40, 512);
        for (size_t b = 0; b < m.w.bytes; b++) m.room[1 + b] = (uint8_t)next();
        for (size_t b = 0; b < m.w.scale_bytes; b++) m.scales[1 + b] = (uint8_t)next();
        float x[9 * 512], out[9 * 40], d_x[9 * 512];
        for (int j = 0; j < 9 * 512; j++) x[j] = j % 7 ? uniform() : nasty[next() % 8];
        uint16_t half[9 * 512], half_out[9 * 40];
        for (int j = 0; j < 9 * 512; j++) half[j] = (uint16_t)next();
        for (int isa = 0; isa < kt_isa_count(); isa++)
            for (int threshold = 1; threshold < 1002; threshold += 1000) {
                if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
                kt_set_panel_threshold(threshold);
                check(kt_linear(pool, &m.w, NULL, x, KT_F32, 9, out) == KT_OK, "garbage");
                check(kt_linear(pool, &m.w, NULL, half, KT_F16, 9, half_out) == KT_OK, "garbage f16");
                check(kt_linear(pool, &m.w, NULL, half, KT_BF16, 9, half_out) == KT_OK, "garbage bf16");
                check(kt_linear_backward(pool, &m.w, x, KT_F32, 9, d_x) == KT_OK, "garbage backward");
                check(kt_linear_backward(pool, &m.w, half, KT_BF16, 9, d_x) == KT_OK, "garbage backward bf16");
            }
        drop(&m);
        int all[3] = {i, i, i};
        for (int activation = 0; activation <= KT_SWIGLU_OAI; activation++) {
            struct moe e = moe_make(all, 256, 512, 9, activation);
            for (int j = 0; j < 9 * 256; j++) e.x[j] = nasty[next() % 8];
            float *y = malloc(9 * 256 * 4);
            check(moe_run(&e, pool, y) == KT_OK, "garbage experts");
            struct gradients g = gradients_of(&e);
            float *adapters = random_floats(E * RANK * (2 * 256 + 3 * 512));
            check(experts_backward_run(pool, &e, e.x, adapters, &g) == KT_OK, "garbage experts backward");
            gradients_free(&g);
            free(adapters);
            free(y);
            moe_free(&e);
        }
    }
}

#include "sanitize_encode.h"

static void errors(kt_pool *pool) {
    struct weight m = make(Q8_0, 4, 64);
    float x[64] = {0}, out[4];
    kt_weight w = m.w;
    kt_experts *e;
    check(kt_linear(NULL, &w, NULL, x, KT_F32, 1, out) == KT_ERR_NULL, "null pool");
    check(kt_linear(pool, NULL, NULL, x, KT_F32, 1, out) == KT_ERR_NULL, "null weight");
    check(kt_linear(pool, &w, NULL, NULL, KT_F32, 1, out) == KT_ERR_NULL, "null x");
    check(kt_linear(pool, &w, NULL, x, 7, 1, out) == KT_ERR_DTYPE, "dtype");
    check(kt_linear(pool, &w, NULL, x, KT_F32, -1, out) == KT_ERR_SHAPE, "tokens");
    check(kt_linear(pool, &w, NULL, x, KT_F32, 0, NULL) == KT_OK, "no tokens");
    w.cols = 65;
    check(kt_linear(pool, &w, NULL, x, KT_F32, 1, out) == KT_ERR_BLOCK, "block");
    w.cols = INT64_MAX;
    check(kt_dequantize(&w, out) == KT_ERR_SHAPE, "huge");
    w = m.w;
    w.bytes--;
    check(kt_dequantize(&w, out) == KT_ERR_BYTES, "bytes");
    check(kt_dequantize(&m.w, NULL) == KT_ERR_NULL, "null out");
    const kt_glu silu = {.activation = KT_SILU, .limit = INFINITY}, unknown = {.activation = 9, .limit = INFINITY};
    const kt_glu none = {.activation = KT_SILU}, gated = {.activation = KT_SWIGLU_OAI, .limit = 7.0f};
    check(kt_experts_create(1, &m.w, &m.w, &m.w, &silu, &e) == KT_ERR_SHAPE && !e, "fit");
    check(kt_experts_create(0, &m.w, &m.w, &m.w, &silu, &e) == KT_ERR_SHAPE, "count");
    check(kt_experts_create(1, &m.w, &m.w, &m.w, &unknown, &e) == KT_ERR_ACTIVATION, "activation");
    check(kt_experts_create(1, &m.w, &m.w, &m.w, &none, &e) == KT_ERR_ACTIVATION, "limit 0");
    check(kt_experts_create(1, NULL, &m.w, &m.w, &gated, &e) == KT_ERR_ACTIVATION, "gated without gate");
    check(kt_experts_create(1, &m.w, NULL, &m.w, &silu, &e) == KT_ERR_NULL, "null up");
    check(kt_experts_create(1, &m.w, &m.w, &m.w, NULL, &e) == KT_ERR_NULL, "null glu");
    check(kt_experts_create(1, &m.w, &m.w, &m.w, &silu, NULL) == KT_ERR_NULL, "null experts");
    check(kt_experts_forward(NULL, pool, x, KT_F32, 1, NULL, 0, NULL, out) == KT_ERR_NULL, "null experts");
    kt_router *r;
    kt_moe *b;
    kt_router_desc desc = {.weight = &m.w, .top_k = 5};
    check(kt_router_create(&desc, &r) == KT_ERR_SHAPE && !r, "more than there are");
    desc.top_k = 1;
    desc.weigh = 7;
    check(kt_router_create(&desc, &r) == KT_ERR_ROUTER, "weigh");
    check(kt_router_create(NULL, &r) == KT_ERR_NULL && kt_router_create(&desc, NULL) == KT_ERR_NULL, "null router");
    check(kt_moe_create(&(kt_moe_desc){0}, &b) == KT_ERR_NULL && !b, "null block");
    for (int s = -1; s < 17; s++) check(kt_status_message(s) != NULL, "message");
    check(!kt_type_name(77) && !kt_type_block(77) && !kt_isa_name(99) && !kt_cpu_feature_name(40), "names");
    drop(&m);
}

/* ---- the pool ---- */

struct caller {
    kt_pool *pool;
    const struct moe *m;
    const float *expected;
    int wrong;
};
static void *call_often(void *arg) {
    struct caller *c = arg;
    size_t bytes = (size_t)(c->m->tokens * c->m->hidden) * 4;
    float *out = malloc(bytes);
    for (int i = 0; i < 25; i++) {
        if (moe_run(c->m, c->pool, out) != KT_OK || memcmp(out, c->expected, bytes)) c->wrong++;
        if (i % 5 == 0) usleep(300); /* long enough for workers to fall asleep */
    }
    free(out);
    return NULL;
}

static void pool_cases(int with_fork) {
    kt_set_panel_threshold(0);
    const int format[3] = {Q8_0, Q8_0, Q8_0};
    struct moe m = moe_make(format, 64, 96, 20, KT_SILU);
    float *expected = malloc(20 * 64 * 4);
    kt_pool *pool = NULL, *shared = NULL;
    for (int threads = 1; threads < 9; threads++) { /* one more than any core count of a laptop: sleeps at once */
        check(kt_pool_create(threads, &pool) == KT_OK, "pool");
        if (threads == 1) moe_run(&m, pool, expected);
        struct caller c = {pool, &m, expected, 0};
        call_often(&c);
        check(!c.wrong, "same bits for any number of threads");
        kt_pool_destroy(pool);
    }
    check(kt_pool_create(THREADS, &shared) == KT_OK, "pool");
    struct caller callers[4];
    pthread_t id[4];
    for (int i = 0; i < 4; i++) {
        callers[i] = (struct caller){shared, &m, expected, 0};
        pthread_create(&id[i], NULL, call_often, &callers[i]);
    }
    for (int i = 0; i < 4 && with_fork; i++) {
        pid_t child = fork();
        if (child == 0) {
            struct caller c = {shared, &m, expected, 0};
            call_often(&c);
            _exit(c.wrong ? 1 : 0);
        }
        int status = 1;
        waitpid(child, &status, 0);
        check(status == 0, "fork while the pool works");
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(id[i], NULL);
        check(!callers[i].wrong, "concurrent callers");
    }
    check(kt_bench_read(shared, expected, 20 * 64 * 4) == kt_bench_read(shared, expected, 20 * 64 * 4), "read");
    for (int isa = 0; isa < kt_isa_count(); isa++)
        for (int kind = 0; kind < 3; kind++) {
            kt_isa_force(kt_isa_name(isa));
            kt_bench_peak(shared, kind, 10);
        }
    kt_pool_destroy(shared);
    free(expected);
    moe_free(&m);
}

/* Every path for one format. `few`: of the numbers of rows and tokens, those that take every branch of a GEMM. */
static void format_cases(kt_pool *pool, int i, int few) {
    const int64_t unit = unit_of(i), cols[] = {unit, unit == 1 ? 67 : 3 * unit, unit == 1 ? 1029 : 2048 + unit};
    const int all[3] = {i, i, i}, mixed[3] = {i, (i + 1) % FORMATS, (i + 2) % FORMATS};
    const int64_t each = type_of(i) == KT_TYPE_AWQ4 ? 8 : 1; /* rows are a multiple of */
    for (int c = 0; c < 3; c++) {
        dequantize_case(i, 5 + 3 * (each == 8), cols[c]);
        for (int threshold = 1; threshold < 1002; threshold += 1000)
            for (int64_t tokens = 0; tokens < 20; tokens += tokens < 8 ? 1 : 5)
                for (int64_t rows = 1; rows < 100; rows += 41) {
                    if (few && (rows == 1 || (rows == 42) != (tokens < 8) || (tokens % 2 == 0) != (threshold == 1)))
                        continue;
                    linear_case(pool, i, divide_up(rows, each) * each, cols[c], tokens, threshold);
                }
    }
    for (int threshold = 0; threshold < 1001; threshold += threshold ? 999 : 1)
        for (int64_t tokens = 0; tokens < 30; tokens += 1 + tokens * 2) {
            if (few && (threshold || tokens % 3 == 0)) continue;
            experts_case(pool, all, unit == 1 ? 77 : 512, unit == 1 ? 45 : 256, tokens, threshold);
            if (!few) experts_case(pool, mixed, 256, 512, tokens, threshold);
        }
}

/* Arguments: `pool`: only its cases, without fork. `few`: a part of all cases, and no fork, for an emulator: QEMU's own
 * threads do not survive it. */
int main(int argc, char **argv) {
    const int pool_only = argc > 1 && !strcmp(argv[1], "pool"), few = argc > 1 && !strcmp(argv[1], "few");
    kt_pool *pool = NULL;
    check(kt_pool_create(THREADS, &pool) == KT_OK, "pool");
    for (int i = 0; i < FORMATS && !pool_only; i++) {
        format_cases(pool, i, few);
        backward_cases(pool, i, few);
    }
    for (int i = 0; i < (few ? 8 : 60) && !pool_only; i++) {
        attention_case(pool, i % 4, i % 5 == 4);
        cache_case(i % 4);
    }
    if (!pool_only) {
        garbage(pool, few);
        errors(pool);
        backward_errors(pool);
        encode_cases(pool);
        encode_errors(pool);
    }
    pool_cases(!pool_only && !few);
    kt_pool_destroy(pool);
    fprintf(stderr, failures ? "%d failures" : "all equal, on:", failures);
    for (int i = 0; !failures && i < kt_isa_count(); i++)
        if (kt_isa_usable(i)) fprintf(stderr, " %s", kt_isa_name(i));
    fputc('\n', stderr);
    return failures != 0;
}
