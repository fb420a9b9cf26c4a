/* sanitize_attention.h: the part of sanitize.c about attention and rows of a cache; included by it alone. */

/* ---- attention ---- */

/* Pages of a cache, each an allocation of exactly what may be read of it, at an odd address. */
struct pages {
    int count;
    uint8_t *room[16];
    const void *page[16];
};

static struct pages pages_make(int type, int64_t heads, int64_t length, int64_t row, int nasty) {
    struct pages p = {.count = (int)divide_up(length, 64)};
    for (int i = 0; i < p.count; i++) {
        const int64_t tokens = length - i * 64 < 64 ? length - i * 64 : 64;
        const size_t bytes = (size_t)(((heads - 1) * 64 + tokens) * row);
        p.room[i] = random_bytes(bytes);
        p.page[i] = p.room[i] + 1;
        if (nasty) continue;
        if (type == KT_F32) set_bits(p.room[i] + 1, bytes, 3, 4, 0x7f, 0x3c);
        if (type == KT_F16) set_bits(p.room[i] + 1, bytes, 1, 2, 0x7c, 0x34);
        if (type == KT_BF16) set_bits(p.room[i] + 1, bytes, 1, 2, 0x7f, 0x3e);
        if (type == KT_CACHE_Q8_0) set_bits(p.room[i] + 1, bytes, 1, 34, 0xfc, 0x20);
    }
    return p;
}
static void pages_drop(struct pages *p) {
    for (int i = 0; i < p->count; i++) free(p->room[i]);
}

/* Rows of a cache: what goes in comes out, q8_0 as its reference rounds; no infinity or NaN becomes a number. */
static void cache_case(int type) {
    const int64_t n = 32 * (1 + next() % 5);
    const size_t bytes = kt_cache_row(type, n);
    float *x = random_floats((size_t)n), *y = malloc((size_t)n * 4);
    uint8_t *row = malloc(bytes);
    for (int i = 0; i < 32; i++) x[i] *= 1e-41f; /* subnormal: q8_0 makes them 0 */
    kt_cache_store(kt_kernels(), x, n, type, row);
    kt_cache_load(kt_kernels(), row, n, type, y);
    for (int64_t b = 0; b < n; b += 32) {
        float most = 0;
        for (int i = 0; i < 32; i++) most = fmaxf(most, fabsf(x[b + i]));
        for (int i = 0; i < 32; i++) {
            const float step = type == KT_CACHE_Q8_0 ? most / 127 : most * (type == KT_BF16 ? 0x1p-7f : 0x1p-10f);
            check(fabsf(x[b + i] - y[b + i]) <= 0.57f * step + (type == KT_F32 ? 0 : 1e-7f), "row of a cache");
            if (type != KT_CACHE_Q8_0 || !b) continue;
            const float code = roundf(x[b + i] * (1 / (most / 127)));
            check((int8_t)row[b / 32 * 34 + 2 + i] == (int)code, "code of q8_0");
        }
    }
    x[n - 1] = next() % 2 ? NAN : INFINITY;
    kt_cache_store(kt_kernels(), x, n, type, row);
    kt_cache_load(kt_kernels(), row, n, type, y);
    check(!isfinite(y[n - 1]), "infinity in a row of a cache");
    check(!kt_cache_row(KT_CACHE_Q8_0, 33) && !kt_cache_row(4, 32) && !kt_cache_row(KT_F32, -1), "size of a row");
    free(x);
    free(y);
    free(row);
}

/* Two sequences, the second with a mask; all instruction sets against portable, both paths. */
static void attention_case(kt_pool *pool, int type, int nasty) {
    static const int64_t row_bytes[] = {4, 2, 2};
    const int quantized = type == KT_CACHE_Q8_0;
    const int64_t kv_heads = 1 + next() % 3, group = 1 + next() % 9, heads = kv_heads * group;
    const int64_t size = quantized ? 32 * (1 + next() % 4) : 1 + next() % 100;
    const int64_t width = quantized ? 32 * (1 + next() % 4) : 1 + next() % 100;
    const int64_t key_row = quantized ? size / 32 * 34 : size * row_bytes[type];
    const int64_t value_row = quantized ? width / 32 * 34 : width * row_bytes[type];
    kt_attention_sequence s[2];
    struct pages pages[4];
    uint8_t *masks[2];
    int64_t queries = 0;
    for (int i = 0; i < 2; i++) {
        const int64_t length = 1 + next() % 300, some = 1 + next() % (next() % 2 ? length : 1);
        pages[2 * i] = pages_make(type, kv_heads, length, key_row, nasty);
        pages[2 * i + 1] = pages_make(type, kv_heads, length, value_row, nasty);
        masks[i] = malloc((size_t)(some * length));
        for (int64_t j = 0; j < some * length; j++) masks[i][j] = next() % 3 == 0;
        s[i] = (kt_attention_sequence){
            .keys = pages[2 * i].page, .values = pages[2 * i + 1].page, .key_head = 64 * key_row,
            .value_head = 64 * value_row, .key_row = key_row, .value_row = value_row, .query = queries,
            .queries = some, .start = next() % 2 ? next() % (length + 1) : 0, .length = length,
            .mask = i ? masks[i] : NULL, .mask_row = length};
        queries += some;
    }
    const size_t n = (size_t)(queries * heads * width);
    float *q = random_floats((size_t)(queries * heads * size)), *sinks = random_floats((size_t)heads);
    float *expected = malloc(n * 4), *found = malloc(n * 4);
    kt_attention_args a = {.type = type, .heads = heads, .kv_heads = kv_heads, .size = size, .value_size = width,
                           .scale = 0.3f, .window = next() % 2 ? 1 + next() % 100 : 0,
                           .sinks = next() % 2 ? sinks : NULL, .q = q, .q_stride = heads * size, .out = expected,
                           .out_stride = heads * width, .sequence = s, .sequences = 2};
    kt_set_panel_threshold(0);
    kt_isa_force("portable");
    check(kt_attention_core(pool, &a) == KT_OK, "attention status");
    a.out = found;
    for (int isa = 0; isa < kt_isa_count(); isa++)
        for (int threshold = 1; threshold < 1002; threshold += 1000) {
            if (kt_isa_force(kt_isa_name(isa)) != KT_OK) continue;
            kt_set_panel_threshold(threshold);
            check(kt_attention_core(pool, &a) == KT_OK, "attention status");
            const double d = nasty ? 0 : difference(found, expected, n);
            if (!(d < (type == KT_BF16 ? 1e-2 : 1e-5))) {
                failures++;
                fprintf(stderr, "FAILED: attention type=%d heads=%ld/%ld size=%ld/%ld %s threshold=%d: %g\n", type,
                        (long)heads, (long)kv_heads, (long)size, (long)width, kt_isa_name(isa), threshold, d);
            }
        }
    for (int i = 0; i < 4; i++) pages_drop(&pages[i]);
    for (int i = 0; i < 2; i++) free(masks[i]);
    free(q);
    free(sinks);
    free(expected);
    free(found);
}
