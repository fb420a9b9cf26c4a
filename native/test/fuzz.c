/* fuzz.c: random calls across the C border for a bounded time, for AddressSanitizer and UBSan: `fuzz [SECONDS [SEED]]`.
 * Built and run by ../sanitize.py.
 *
 * Every buffer is an allocation of exactly its size, so that a byte too far is seen. Weights are valid ones of any
 * type, or such with fields changed to whatever is nasty. What is checked: a status, never a crash; a refused call
 * writes nothing; an accepted one writes all of its output, the same bits on any number of threads. What the values
 * should be is for the Python tests.
 *
 * The one promise that a C library must be able to trust is that a pointer has as many bytes as its length says. Calls
 * that read weights keep it; `lies` breaks it and creates experts only, which must not read them. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../include/kt_native.h"
#include "../src/formats/traits.h"

#if defined(__SANITIZE_ADDRESS__)
void __sanitizer_set_death_callback(void (*callback)(void));
#endif

static uint64_t case_seed, state;
static int failures;
static kt_pool *pools[2];

static uint64_t next(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
}
static int64_t below(int64_t n) { return (int64_t)(next() >> 11) % n; }
static int chance(int one_in) { return below(one_in) == 0; }
static int64_t pick(int64_t n, const int64_t *of) { return of[below(n)]; }
#define PICK(...) pick(sizeof((int64_t[]){__VA_ARGS__}) / 8, (int64_t[]){__VA_ARGS__})

static void say_case(void) { fprintf(stderr, "in this case: fuzz 0 %llu\n", (unsigned long long)case_seed); }
static void check(int ok, const char *what) {
    if (ok) return;
    failures++;
    fprintf(stderr, "FAILED: %s\n", what);
    say_case();
}

/* ---- memory ----------------------------------------------------------------------------------------- */

enum { MAX_BUFFERS = 4096 };
static void *buffers[MAX_BUFFERS]; /* of this case */
static int buffer_count;

/* `bytes` bytes that begin at some multiple of `align` and end where the allocation ends. */
static uint8_t *buffer(size_t bytes, size_t align) {
    size_t before = (size_t)below(9) * align;
    uint8_t *p = malloc(before + bytes + !(before + bytes));
    if (!p || buffer_count == MAX_BUFFERS) abort();
    buffers[buffer_count++] = p;
    return p + before;
}
static uint8_t *random_bytes(size_t bytes, size_t align) {
    uint8_t *p = buffer(bytes, align);
    for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)next();
    return p;
}
static float *random_floats(int64_t n) {
    static const float nasty[] = {INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, FLT_MIN / 4, 0.0f, -0.0f};
    float *x = (float *)buffer((size_t)n * 4, 4);
    const int odd = chance(4);
    for (int64_t i = 0; i < n; i++)
        x[i] = odd && chance(50) ? nasty[below(8)] : (float)below(2001) / 1000.0f - 1.0f;
    return x;
}
static void free_buffers(void) {
    while (buffer_count) free(buffers[--buffer_count]);
}

/* ---- weights ---------------------------------------------------------------------------------------- */

/* The fields that are changed. A new field of kt_weight is a line here, and in `valid` if it must be right at times. */
enum kind { I32, I64, SIZE, REAL, POINTER };
static const struct field {
    size_t at;
    enum kind kind;
} fields[] = {
#define FIELD(name, kind) {offsetof(kt_weight, name), kind}
    FIELD(type, I32),         FIELD(rows, I64),       FIELD(cols, I64),       FIELD(data, POINTER),
    FIELD(bytes, SIZE),       FIELD(stride, I64),     FIELD(scales, POINTER), FIELD(scale_bytes, SIZE),
    FIELD(scale_stride, I64), FIELD(scale_type, I32), FIELD(scale_rows, I64), FIELD(scale_cols, I64),
    FIELD(scale, REAL),       FIELD(zeros, POINTER),  FIELD(zero_bytes, SIZE), FIELD(zero_stride, I64),
    FIELD(zero_bias, I32),    FIELD(order, POINTER),
#undef FIELD
};

static const struct kt_traits *random_type(int64_t rows, int64_t cols) {
    for (int tries = 0; tries < 100; tries++) {
        const struct kt_traits *t = &kt_traits_table[below(KT_FORMATS)];
        if (cols % t->block || (t->kind == KT_KIND_Q8 && cols % 32)) continue;
        if (t->id == KT_TYPE_AWQ4 && rows % 8) continue;
        return t;
    }
    return &kt_traits_table[KT_FMT_BF16];
}

/* Zero points in a dword, 0 for a type without. */
static int64_t zeros_per_dword(int type) {
    if (type == KT_TYPE_I4 || type == KT_TYPE_GPTQ4 || type == KT_TYPE_AWQ4) return 8;
    return type == KT_TYPE_U8 || type == KT_TYPE_GPTQ8 ? 4 : 0;
}

/* Dense, or with room between lines where lines are rows. */
static kt_weight valid(int64_t rows, int64_t cols) {
    const struct kt_traits *t = random_type(rows, cols);
    kt_weight w = {.type = t->id, .rows = rows, .cols = cols, .scale = 1.0f};
    const size_t line = (size_t)(cols / t->block) * (size_t)t->bytes;
    w.bytes = (size_t)rows * line / (t->id == KT_TYPE_AWQ4 ? 2 : 1);
    if (!t->by_column && chance(3)) {
        w.stride = (int64_t)line + below(40);
        w.bytes = (size_t)(rows - 1) * (size_t)w.stride + line + (size_t)below(3);
    }
    w.data = random_bytes(w.bytes, 1);
    if (!t->scales_separate) return w;

    w.scale_type = (int32_t)below(5);
    w.scale_rows = t->by_column || chance(2) ? 1 : PICK(16, 128, rows);
    w.scale_cols = t->kind == KT_KIND_Q8 ? PICK(16, 32, 64, 128, cols) : PICK(32, 128, cols);
    const int64_t down = (rows + w.scale_rows - 1) / w.scale_rows, across = (cols + w.scale_cols - 1) / w.scale_cols;
    const size_t size = w.scale_type == KT_SCALE_F32 ? 4 : w.scale_type < KT_SCALE_E8M0 ? 2 : 1;
    w.scale_bytes = (size_t)(down * across) * size;
    w.scales = random_bytes(w.scale_bytes, 1);
    const int64_t per_dword = zeros_per_dword(t->id);
    if (per_dword && w.scale_rows == 1 && w.scale_cols != 16 && chance(2)) {
        w.zero_bytes = (size_t)((rows + per_dword - 1) / per_dword * across) * 4;
        w.zeros = random_bytes(w.zero_bytes, 1);
        w.zero_bias = (int32_t)below(2);
    }
    if (t->kind == KT_KIND_Q8 && w.scale_rows == 1 && chance(4)) {
        int32_t *order = (int32_t *)buffer((size_t)cols * 4, 4);
        const int64_t groups = across + chance(10); /* one too many at times */
        for (int64_t c = 0; c < cols; c++) order[c] = (int32_t)below(groups);
        w.order = order;
    }
    return w;
}

static int64_t nasty_number(int64_t now) {
    switch (below(4)) {
    case 0: return (int64_t)((uint64_t)now + (uint64_t)PICK(-64, -16, -8, -1, 1, 8, 16, 64));
    case 1: return (int64_t)((uint64_t)now * (uint64_t)PICK(0, 2, 3, -1)) / PICK(1, 2);
    case 2: return PICK(INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 63, INT32_MIN, INT32_MAX, -1, 0, 1, 1 << 30);
    default: return (int64_t)next() >> below(64);
    }
}

static void change(kt_weight *w) {
    const struct field *f = &fields[below(sizeof fields / sizeof *fields)];
    uint8_t *at = (uint8_t *)w + f->at;
    int64_t number = 0;
    if (f->kind == REAL) {
        memcpy(at, random_floats(1), 4);
    } else if (f->kind == POINTER) {
        memset(at, 0, sizeof(void *));
    } else if (f->kind == I32) {
        int32_t value;
        memcpy(&value, at, 4);
        if (at == (uint8_t *)&w->type && chance(2)) number = kt_traits_table[below(KT_FORMATS)].id;
        else number = (int32_t)(chance(2) ? below(12) : (uint32_t)nasty_number(value));
        value = (int32_t)number;
        memcpy(at, &value, 4);
    } else {
        memcpy(&number, at, 8);
        number = nasty_number(number);
        memcpy(at, &number, 8);
    }
}

/* Nasty fields that still keep the promise about lengths. */
static kt_weight truthful(int64_t rows, int64_t cols) {
    const kt_weight good = valid(rows, cols);
    kt_weight w = good;
    if (chance(2)) return w;
    for (int64_t n = 1 + below(3); n > 0; n--) change(&w);
    if (w.bytes > good.bytes) w.bytes = good.bytes;
    if (w.scale_bytes > good.scale_bytes) w.scale_bytes = good.scale_bytes;
    if (w.zero_bytes > good.zero_bytes) w.zero_bytes = good.zero_bytes;
    if (w.cols > good.cols) w.order = NULL; /* its length is cols */
    return w;
}

static int64_t random_size(void) { return chance(3) ? 1 + below(70) : PICK(32, 64, 96, 128, 256, 256, 512); }

/* ---- calls ------------------------------------------------------------------------------------------ */

static size_t size_of(int dtype) { return dtype == KT_F32 ? 4 : 2; }

/* Random settings, which all answers must survive. */
static void settings(void) {
    int usable = 0;
    while (kt_isa_usable(usable)) usable++;
    kt_isa_force(kt_isa_name((int)below(usable)));
    kt_set_panel_threshold((int)PICK(0, 0, 1, 3, 1000));
    kt_set_exact(chance(8));
}

static void *random_input(int dtype, int64_t n) {
    if (dtype == KT_F32) return random_floats(n);
    uint16_t *x = (uint16_t *)random_bytes((size_t)n * 2, 2); /* every NaN and infinity there is */
    for (int64_t i = chance(3) ? n : 0; i < n; i++) x[i] &= 0xbfff; /* below 2 */
    return x;
}

/* Which NaN comes out of two is the processor's choice: make them one. */
static void same_nans(uint8_t *out, size_t bytes, int dtype) {
    const uint16_t infinity = dtype == KT_F16 ? 0x7c00 : 0x7f80;
    for (size_t i = 0; i < bytes; i += size_of(dtype)) {
        uint32_t value = 0; /* bf16 is the upper half of an fp32 */
        memcpy((uint8_t *)&value + (dtype == KT_F32 ? 0 : 2), out + i, size_of(dtype));
        if ((value & 0x7fffffff) > (uint32_t)infinity << 16) memset(out + i, 0xff, size_of(dtype));
    }
}

/* Two answers to the same question, on memory that held 0xa5 and 0x5a before. */
static void compare(int status, int again, uint8_t *const out[2], size_t bytes, int dtype, const char *what) {
    check(status == again && status >= KT_OK && kt_status_message(status)[0], what);
    if (status == KT_OK) {
        same_nans(out[0], bytes, dtype);
        same_nans(out[1], bytes, dtype);
    }
    size_t i = 0;
    while (i < bytes && (status ? out[0][i] == 0xa5 && out[1][i] == 0x5a : out[0][i] == out[1][i])) i++;
    if (i == bytes) return;
    fprintf(stderr, "%s, byte %zu of %zu: %02x and %02x\n", kt_status_message(status), i, bytes, out[0][i], out[1][i]);
    check(0, what);
}

/* Room for two answers. */
static void two_outputs(uint8_t *out[2], size_t bytes, int dtype) {
    for (int i = 0; i < 2; i++) {
        out[i] = buffer(bytes, size_of(dtype));
        memset(out[i], i ? 0x5a : 0xa5, bytes);
    }
}

static void linear_case(void) {
    const kt_weight w = truthful(random_size(), random_size());
    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 3, -1);
    const int64_t tokens =
        chance(20) ? PICK(-1, INT64_MIN, INT64_MAX, ((int64_t)1 << 30) + 1) : PICK(0, 1, 1, 2, 3, 5, 17, 40);
    /* Who has more than this must be refused: then nothing may touch the buffers, which are empty. */
    const int sane = tokens >= 0 && tokens <= 40 && w.rows > 0 && w.cols > 0 && w.rows < 1 << 16 && w.cols < 1 << 16;
    const size_t in = sane ? (size_t)(tokens * w.cols) : 0,
                 bytes = sane ? (size_t)(tokens * w.rows) * size_of(dtype) : 0;
    const void *x = chance(30) ? NULL : random_input(dtype, (int64_t)in);
    const float *bias = chance(2) || !sane ? NULL : random_floats(w.rows);
    uint8_t *out[2];
    two_outputs(out, bytes, dtype);
    int status = kt_linear(pools[0], &w, bias, x, dtype, tokens, out[0]);
    compare(status, kt_linear(pools[1], &w, bias, x, dtype, tokens, out[1]), out, bytes, dtype, "linear");
}

static void dequantize_case(void) {
    const kt_weight w = truthful(random_size(), random_size());
    const int sane = w.rows > 0 && w.cols > 0 && w.rows < 1 << 16 && w.cols < 1 << 16;
    const size_t bytes = sane ? (size_t)(w.rows * w.cols) * 4 : 0;
    uint8_t *out[2];
    two_outputs(out, bytes, KT_F32);
    int status = kt_dequantize(&w, (float *)out[0]);
    compare(status, kt_dequantize(&w, (float *)out[1]), out, bytes, KT_F32, "dequantize");
}

static void argmax_case(void) {
    const int64_t count = chance(20) ? PICK(0, -1, INT64_MAX) : 1 + below(5000);
    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 3, -1), sane = count > 0 && count < 6000;
    const void *x = chance(30) ? NULL : random_input(dtype, sane ? count : 0);
    int64_t at = -1;
    if (kt_argmax(x, dtype, count, &at) == KT_OK) check(at >= 0 && at < count, "argmax");
    else check(at == -1, "argmax of nothing");
}

static void embed_case(void) {
    const kt_weight w = truthful(random_size(), random_size());
    const int sane = w.rows > 0 && w.cols > 0 && w.rows < 1 << 16 && w.cols < 1 << 16;
    const int64_t count = chance(20) ? PICK(-1, INT64_MIN, INT64_MAX) : below(9);
    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 3, -1);
    int64_t ids[9];
    for (int i = 0; i < 9; i++) ids[i] = sane && !chance(50) ? below(w.rows) : PICK(-1, w.rows, INT64_MIN, INT64_MAX);
    const size_t bytes = sane && count > 0 && count < 9 ? (size_t)(count * w.cols) * size_of(dtype) : 0;
    uint8_t *out[2];
    two_outputs(out, bytes, dtype);
    int status = kt_embed(&w, ids, count, out[0], dtype);
    compare(status, kt_embed(&w, ids, count, out[1], dtype), out, bytes, dtype, "embed");
}

/* Any numbers to any type. Those that cannot be encoded are found after others were written. */
static void encode_case(void) {
    const struct kt_traits *t = &kt_traits_table[below(KT_FORMATS)];
    const int64_t rows = chance(20) ? PICK(-1, 0, INT64_MIN, INT64_MAX) : 1 + below(9);
    const int64_t cols = chance(9) ? PICK(-1, 0, 33, INT64_MAX) : t->block * (1 + below(t->block == 1 ? 300 : 5));
    const int sane = rows >= 0 && rows < 10 && cols > 0 && cols < 1 << 16;
    const size_t bytes = sane ? (size_t)(rows * (cols / t->block) * t->bytes) : 0, told = bytes + (size_t)chance(20);
    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 3, -1);
    const void *x = random_input(dtype, sane ? rows * cols : 0);
    float *importance = chance(2) || !sane ? NULL : random_floats(cols);
    for (int64_t i = chance(4) ? cols : 0; importance && i < cols; i++) importance[i] = fabsf(importance[i]);
    uint8_t *out[2];
    two_outputs(out, bytes, KT_F32);
    int status = kt_encode(pools[0], t->id, x, dtype, rows, cols, importance, out[0], told);
    int again = kt_encode(pools[1], t->id, x, dtype, rows, cols, importance, out[1], told);
    if (status == again && (status == KT_ERR_VALUE || status == KT_ERR_RANGE)) return;
    compare(status, again, out, bytes, t->id == KT_TYPE_F32 ? KT_F32 : KT_F16, "encode");
}

static kt_glu random_glu(int64_t count, int64_t hidden, int64_t inner) {
    kt_glu g = {.activation = chance(20) ? (int32_t)PICK(-1, 6, INT32_MAX) : (int32_t)below(6)};
    g.alpha = random_floats(1)[0];
    g.limit = chance(2) ? INFINITY : chance(10) ? random_floats(1)[0] : (float)(1 + below(5));
    if (chance(3)) g.gate_bias = random_floats(count * inner);
    if (chance(3)) g.up_bias = random_floats(count * inner);
    if (chance(3)) g.down_bias = random_floats(count * hidden);
    return g;
}

static int64_t random_id(int64_t count, int mode) {
    if (mode == 0) return 0; /* all tokens to one expert */
    if (mode == 1 && chance(4)) return PICK(-1, INT64_MIN, INT64_MAX, count, 1ll << 32);
    return below(count);
}

#include "fuzz_backward.h"

static void experts_case(void) {
    enum { MOST = 5 };
    const int64_t count = 1 + below(MOST), hidden = random_size(), inner = random_size();
    kt_weight gate[MOST], up[MOST], down[MOST];
    const int spoiled = chance(4) ? (int)below(3 * count) : -1;
    for (int i = 0; i < count; i++) {
        gate[i] = spoiled == 3 * i ? truthful(inner, hidden) : valid(inner, hidden);
        up[i] = spoiled == 3 * i + 1 ? truthful(inner, hidden) : valid(inner, hidden);
        down[i] = spoiled == 3 * i + 2 ? truthful(hidden, inner) : valid(hidden, inner);
    }
    const kt_glu glu = random_glu(count, hidden, inner);
    kt_experts *e = NULL;
    const int gated = !chance(6);
    int status = kt_experts_create(count, gated ? gate : NULL, up, down, &glu, &e);
    check((status == KT_OK) == (e != NULL), "create");
    if (status) return;

    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 9);
    const int64_t tokens = PICK(0, 1, 1, 2, 5, 18, 33), slots = below(count + 3), pairs = tokens * slots;
    const void *x = random_input(dtype, tokens * hidden);
    const float *weights = random_floats(pairs);
    int64_t *ids = (int64_t *)buffer((size_t)pairs * 8, 8);
    const int mode = (int)below(4);
    for (int64_t i = 0; i < pairs; i++) ids[i] = random_id(count, mode);
    const size_t bytes = (size_t)(tokens * hidden) * size_of(dtype);
    uint8_t *out[2];
    two_outputs(out, bytes, dtype);
    status = kt_experts_forward(e, pools[0], x, dtype, tokens, ids, slots, weights, out[0]);
    int again = kt_experts_forward(e, pools[1], x, dtype, tokens, ids, slots, weights, out[1]);
    compare(status, again, out, bytes, dtype, "experts");
    if (chance(2)) adapted(e, count, hidden, gated ? 2 * inner : inner, inner, x, dtype, tokens, ids, slots, weights);
    const int64_t absurd = PICK(-1, INT64_MIN, INT64_MAX, ((int64_t)1 << 30) + 1);
    check(kt_experts_forward(e, pools[0], x, dtype, absurd, ids, slots, weights, out[0]) != KT_OK, "absurd tokens");
    check(kt_experts_forward(e, pools[0], x, dtype, tokens, ids, absurd, weights, out[0]) != KT_OK, "absurd slots");
    kt_experts_destroy(e);
}

static kt_router_desc random_router(const kt_weight *w) {
    const int64_t E = w->rows > 0 && w->rows < 1 << 16 ? w->rows : 1, H = w->cols > 0 && w->cols < 1 << 16 ? w->cols : 1;
    kt_router_desc d = {.weight = w, .top_k = (int32_t)(1 + below(E)), .factor = random_floats(1)[0]};
    if (chance(3)) d.bias = random_floats(E);
    if (chance(4)) d.norm = random_floats(H);
    d.norm_eps = d.norm_factor = random_floats(1)[0];
    d.round = (int32_t)below(2);
    d.cap = chance(3) ? random_floats(1)[0] : 0.0f;
    d.score = chance(20) ? (int32_t)PICK(-1, 4, INT32_MAX) : (int32_t)below(4);
    d.bias_on = (int32_t)below(3);
    if (!chance(8)) d.choice_bias = random_floats(E);
    if (chance(2)) {
        d.groups = (int32_t)(chance(10) ? PICK(-1, INT32_MAX, 7) : E % 4 ? 1 : PICK(1, 2, 4));
        d.groups_kept = (int32_t)(chance(10) ? PICK(0, -1, INT32_MAX) : 1 + (d.groups > 0 ? below(d.groups) : 0));
    }
    d.group_by = (int32_t)below(2);
    d.masked = chance(2) ? -INFINITY : 0.0f;
    d.weigh = (int32_t)below(3);
    d.divide = (int32_t)below(3);
    d.divide_by = random_floats(1)[0];
    if (chance(3)) d.factors = random_floats(E);
    return d;
}

/* Ids in range whatever the numbers, and the same answers of both pools: of the router and of a block around it. */
static void block_case(void) {
    enum { MOST = 8 };
    const int64_t count = 1 + below(MOST), hidden = random_size(), inner = random_size(), own = random_size();
    kt_weight gate[MOST], up[MOST], down[MOST];
    for (int i = 0; i < count; i++) {
        gate[i] = valid(inner, hidden);
        up[i] = valid(inner, hidden);
        down[i] = valid(hidden, inner);
    }
    const kt_weight w = chance(4) ? truthful(count, hidden) : valid(count, hidden), one = valid(1, hidden);
    const kt_weight shared[3] = {valid(own, hidden), valid(own, hidden), valid(hidden, own)};
    const kt_glu glu = random_glu(count, hidden, inner), silu = {.activation = KT_SILU, .limit = INFINITY};
    const kt_router_desc desc = random_router(&w);
    kt_router *r = NULL;
    kt_experts *e = NULL, *s = NULL;
    kt_moe *m = NULL;
    int status = kt_router_create(&desc, &r);
    check((status == KT_OK) == (r != NULL), "router");
    if (kt_experts_create(count, gate, up, down, &glu, &e) == KT_OK && r &&
        kt_experts_create(1, shared, shared + 1, shared + 2, &silu, &s) == KT_OK) {
        const int with = chance(2);
        const kt_moe_desc block = {.router = r, .experts = e, .shared = with ? s : NULL,
                                   .shared_gate = with && chance(2) ? &one : NULL, .factor = 1.0f, .shared_factor = 0.5f};
        status = kt_moe_create(&block, &m);
        check((status == KT_OK) == (m != NULL), "block");
    }
    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 9);
    const int64_t tokens = PICK(0, 1, 1, 2, 5, 18), pairs = r ? tokens * desc.top_k : 0;
    const size_t bytes = (size_t)(tokens * hidden) * size_of(dtype);
    const void *x = random_input(dtype, tokens * hidden);
    uint8_t *out[2], *weights[2];
    int64_t *ids[2];
    two_outputs(out, bytes, dtype);
    two_outputs(weights, (size_t)pairs * 4, KT_F32);
    for (int i = 0; i < 2; i++) ids[i] = (int64_t *)buffer((size_t)pairs * 8, 8);
    if (r && w.cols == hidden) {
        status = kt_router_forward(r, pools[0], x, dtype, tokens, ids[0], (float *)weights[0], NULL);
        int again = kt_router_forward(r, pools[1], x, dtype, tokens, ids[1], (float *)weights[1], NULL);
        compare(status, again, weights, (size_t)pairs * 4, KT_F32, "weights");
        for (int64_t i = 0; !status && i < pairs; i++)
            check(ids[0][i] == ids[1][i] && ids[0][i] >= 0 && ids[0][i] < w.rows, "ids");
    }
    if (m) {
        status = kt_moe_forward(m, pools[0], x, dtype, tokens, out[0], NULL);
        compare(status, kt_moe_forward(m, pools[1], x, dtype, tokens, out[1], NULL), out, bytes, dtype, "block");
    }
    kt_moe_destroy(m);
    kt_router_destroy(r);
    kt_experts_destroy(e);
    kt_experts_destroy(s);
}

#include "fuzz_attention.h"
#include "fuzz_delta.h"

/* Any number in any field, over a pointer to one byte: only creation, which may look at `order` but at no weight. */
static void lies(void) {
    kt_weight w[3];
    for (int i = 0; i < 3; i++) {
        w[i] = valid(random_size(), random_size());
        for (int64_t n = 1 + below(6); n > 0; n--) change(&w[i]);
        w[i].order = NULL;
        if (chance(2)) w[i].data = buffer(1, 1);
    }
    kt_experts *e = NULL;
    const kt_glu glu = {.activation = KT_SILU, .limit = INFINITY};
    const int64_t count = chance(4) ? PICK(0, -1, INT64_MIN, INT64_MAX, (1 << 20) + 1) : 1;
    int status = kt_experts_create(count, w, w + 1, w + 2, &glu, &e);
    check((status == KT_OK) == (e != NULL), "create from lies");
    kt_experts_destroy(e);
    check(kt_experts_create(1, w, w + 1, w + 2, NULL, &e) == KT_ERR_NULL && !e, "no glu");
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    static void (*const cases[])(void) = {linear_case, linear_case, linear_backward_case, dequantize_case, argmax_case, embed_case, encode_case,
                                          experts_case, experts_case, block_case, block_case, attention_case, attention_case,
                                          layer_case, layer_case, latent_case, latent_case, delta_case, delta_case, lies};
    const double limit = argc > 1 ? atof(argv[1]) : 8, begin = seconds();
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(say_case);
#endif
    check(kt_pool_create(1, &pools[0]) == KT_OK && kt_pool_create_on(3, 1, "0;1-2", &pools[1]) == KT_OK, "pools");
    int64_t count = 0;
    do {
        case_seed = seed++;
        state = case_seed * 0x9e3779b97f4a7c15ull | 1;
        for (int i = 0; i < 4; i++) next();
        settings();
        cases[below(sizeof cases / sizeof *cases)]();
        free_buffers();
        count++;
    } while (seconds() - begin < limit && failures < 10);
    for (int i = 0; i < 2; i++) kt_pool_destroy(pools[i]);
    fprintf(stderr, "fuzz: %lld cases, %d failures\n", (long long)count, failures);
    return failures != 0;
}
