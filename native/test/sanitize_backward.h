/* sanitize_backward.h: gradients in sanitize.c, every set against portable C. */

static double bf16_bound(int format, int isa) {
    const char *name = kt_isa_name(isa);
    const int by_bf16 = strstr(name, "bf16") || strstr(name, "amx") || strstr(name, "i8mm");
    return by_bf16 && format > 2 ? 0x1p-7 : 3e-6; /* beside F32, F16 and, of fp32, BF16 */
}

static void linear_backward_case(kt_pool *pool, int format, int64_t rows, int64_t cols, int64_t tokens) {
    struct weight m = make(format, rows, cols);
    float *d_y = random_floats((size_t)(tokens * rows));
    uint16_t *h = cut_to_bf16(d_y, (size_t)(tokens * rows));
    const size_t n = (size_t)(tokens * cols);
    float *expected = malloc(n * 4 + 1), *found = malloc(n * 4 + 1);
    uint16_t *d_x = malloc(n * 2 + 1);
    kt_isa_force("portable");
    check(kt_linear_backward(pool, &m.w, d_y, KT_F32, tokens, expected) == KT_OK, "linear backward status");
    for (int isa = 1; isa < kt_isa_count(); isa++) {
        if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
        check(kt_linear_backward(pool, &m.w, d_y, KT_F32, tokens, found) == KT_OK, "linear backward status");
        const double d = difference(found, expected, n);
        check(kt_linear_backward(pool, &m.w, h, KT_BF16, tokens, d_x) == KT_OK, "linear backward bf16");
        widen(d_x, n, found);
        if (n && (!(d < bf16_bound(format, isa)) || !(difference(found, expected, n) < 0x1p-6))) {
            failures++;
            fprintf(stderr, "FAILED: linear backward %s [%ld, %ld] T=%ld %s: %g\n", kt_type_name(m.w.type), (long)rows,
                    (long)cols, (long)tokens, kt_isa_name(isa), d);
        }
    }
    drop(&m);
    free(d_y);
    free(h);
    free(expected);
    free(found);
    free(d_x);
}

/* d_hidden, d_weights and the gradients of adapters, one after the other. */
struct gradients {
    float *d_hidden, *d_weights, *of_adapters;
};
enum { RANK = 5 };

static int experts_backward_run(kt_pool *pool, const struct moe *m, const float *d_out, const float *adapters,
                                const struct gradients *g) {
    const int64_t H = m->hidden, I = m->inner, a = E * RANK * H, b = E * RANK * 2 * I, c = E * RANK * I;
    const kt_lora first = {RANK, 0.5f, adapters, adapters + a, g->of_adapters, g->of_adapters + a};
    const kt_lora down = {RANK, 0.5f, adapters + a + b, adapters + a + b + c, g->of_adapters + a + b,
                          g->of_adapters + a + b + c};
    memset(g->of_adapters, 0, (size_t)(a + b + c + a) * 4);
    return kt_experts_backward(m->experts, pool, m->x, KT_F32, m->tokens, m->ids, K, m->weights, d_out, &first, &down,
                               g->d_hidden, g->d_weights);
}

static struct gradients gradients_of(const struct moe *m) {
    return (struct gradients){malloc((size_t)(m->tokens * m->hidden) * 4 + 1), malloc((size_t)(m->tokens * K) * 4 + 1),
                              malloc((size_t)(E * RANK * (2 * m->hidden + 3 * m->inner)) * 4)};
}
static void gradients_free(struct gradients *g) { free(g->d_hidden), free(g->d_weights), free(g->of_adapters); }

static void experts_backward_case(kt_pool *pool, const int format[3], int64_t hidden, int64_t inner, int64_t tokens) {
    struct moe m = moe_make(format, hidden, inner, tokens, (int)(next() % 4));
    const size_t of_adapters = (size_t)(E * RANK * (2 * hidden + 3 * inner));
    float *d_out = random_floats((size_t)(tokens * hidden)), *adapters = random_floats(of_adapters);
    struct gradients expected = gradients_of(&m), found = gradients_of(&m);
    kt_isa_force("portable");
    check(experts_backward_run(pool, &m, d_out, adapters, &expected) == KT_OK, "experts backward status");
    for (int isa = 1; isa < kt_isa_count(); isa++) {
        if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
        check(experts_backward_run(pool, &m, d_out, adapters, &found) == KT_OK, "experts backward status");
        const double d[3] = {difference(found.d_hidden, expected.d_hidden, (size_t)(tokens * hidden)),
                             difference(found.d_weights, expected.d_weights, (size_t)(tokens * K)),
                             difference(found.of_adapters, expected.of_adapters, of_adapters)};
        /* At one token d_weights is three sums that may nearly cancel: I8's, 188 where others reach 4 600, is 2.4 % off. */
        if (tokens && !(d[0] < 2e-2 && d[1] < (tokens > 1 ? 2e-2 : 8e-2) && d[2] < 2e-2)) {
            failures++;
            fprintf(stderr, "FAILED: experts backward %s T=%ld %s: %g %g %g\n", kt_type_name(type_of(format[0])),
                    (long)tokens, kt_isa_name(isa), d[0], d[1], d[2]);
        }
    }
    gradients_free(&expected);
    gradients_free(&found);
    free(d_out);
    free(adapters);
    moe_free(&m);
}

static void backward_cases(kt_pool *pool, int format, int few) {
    const int64_t unit = unit_of(format), each = type_of(format) == KT_TYPE_AWQ4 ? 8 : 1;
    const int all[3] = {format, format, format};
    const int64_t rows[] = {1, 37, 531}, cols[] = {unit == 1 ? 19 : unit, unit == 1 ? 273 : 512 + unit};
    for (int64_t tokens = 0; tokens < 20; tokens += 1 + tokens * 2)
        for (int i = few; i < 6; i += 1 + few)
            linear_backward_case(pool, format, divide_up(rows[i / 2], each) * each, cols[i % 2], tokens);
    for (int64_t tokens = few; tokens < 20; tokens += 1 + tokens * 3)
        experts_backward_case(pool, all, unit == 1 ? 77 : 512, unit == 1 ? 45 : 256, tokens);
}

static void backward_errors(kt_pool *pool) {
    struct weight m = make(Q8_0, 4, 64);
    const int format[3] = {Q8_0, Q8_0, Q8_0};
    struct moe e = moe_make(format, 64, 32, 1, KT_SILU);
    float d_y[64] = {0}, d_x[64];
    check(kt_linear_backward(NULL, &m.w, d_y, KT_F32, 1, d_x) == KT_ERR_NULL, "null pool");
    check(kt_linear_backward(pool, NULL, d_y, KT_F32, 1, d_x) == KT_ERR_NULL, "null weight");
    check(kt_linear_backward(pool, &m.w, NULL, KT_F32, 1, d_x) == KT_ERR_NULL, "null d_y");
    check(kt_linear_backward(pool, &m.w, d_y, KT_F32, 1, NULL) == KT_ERR_NULL, "null d_x");
    check(kt_linear_backward(pool, &m.w, d_y, 7, 1, d_x) == KT_ERR_DTYPE, "dtype");
    check(kt_linear_backward(pool, &m.w, d_y, KT_F32, -1, d_x) == KT_ERR_SHAPE, "tokens");
    check(kt_linear_backward(pool, &m.w, NULL, KT_F32, 0, NULL) == KT_OK, "no tokens");
    kt_lora lora = {.rank = 0, .a = d_y, .b = d_y};
#define BACKWARD(first, down)                                                                                      \
    kt_experts_backward(e.experts, pool, e.x, KT_F32, 1, e.ids, K, e.weights, d_y, first, down, d_x, NULL)
    check(BACKWARD(&lora, NULL) == KT_ERR_SHAPE && BACKWARD(NULL, &lora) == KT_ERR_SHAPE, "rank");
    lora.rank = 1;
    check(BACKWARD(&lora, NULL) == KT_ERR_NULL, "no room for gradients");
    check(BACKWARD(NULL, NULL) == KT_OK, "no gradient of weights");
#undef BACKWARD
    check(kt_experts_backward(e.experts, pool, e.x, KT_F32, 1, e.ids, K, e.weights, NULL, NULL, NULL, d_x, NULL) ==
              KT_ERR_NULL, "null d_out");
    moe_free(&e);
    drop(&m);
}
