/* fuzz_attention.h: the part of fuzz.c about attention, modules of it and layers; included by it alone. */

/* ---- attention ---- */

/* Pages of exactly what may be read of them, heads side by side within a token or behind each other. */
static const void *const *random_pages(int64_t heads, int64_t length, int64_t row, int64_t *head, int64_t *token) {
    const int64_t pages = (length + 63) / 64;
    const int beside = chance(2);
    const void **page = (const void **)(void *)buffer((size_t)pages * sizeof *page, sizeof *page);
    *token = row * (beside ? heads : 1) + below(3);
    *head = beside ? row : *token * 64;
    for (int64_t i = 0; i < pages; i++) {
        const int64_t tokens = length - i * 64 < 64 ? length - i * 64 : 64;
        page[i] = random_bytes((size_t)((heads - 1) * *head + (tokens - 1) * *token + row), 1);
    }
    return page;
}

static void random_sequence(const kt_attention_args *a, kt_attention_sequence *s) {
    const int64_t unit = a->type == KT_F32 ? 4 : 2;
    const int quantized = a->type == KT_CACHE_Q8_0;
    s->length = 1 + below(chance(2) ? 200 : 70);
    s->queries = chance(3) ? below(s->length + 1) : 1;
    s->start = chance(3) ? below(s->length + 1) : 0;
    s->keys = random_pages(a->kv_heads, s->length, quantized ? a->size / 32 * 34 : a->size * unit, &s->key_head,
                           &s->key_row);
    s->values = random_pages(a->kv_heads, s->length, quantized ? a->value_size / 32 * 34 : a->value_size * unit,
                             &s->value_head, &s->value_row);
    if (chance(2)) return;
    s->mask_row = s->length;
    uint8_t *mask = random_bytes((size_t)(s->queries * s->length), 1);
    for (int64_t i = 0; i < s->queries * s->length; i++) mask[i] &= 1;
    s->mask = mask;
}

/* A number that no call may take. */
static void spoil(kt_attention_args *a, kt_attention_sequence *s) {
    int64_t *const fields[] = {&a->heads,    &a->kv_heads,   &a->size,     &a->value_size, &a->window,
                               &a->q_stride, &a->out_stride, &a->sequences, &s->key_head,  &s->value_head,
                               &s->key_row,  &s->value_row,  &s->query,    &s->queries,    &s->start,
                               &s->length};
    const int64_t which = below(sizeof fields / sizeof *fields + 1);
    if (which == sizeof fields / sizeof *fields) a->type = (int32_t)PICK(-1, 4, INT32_MAX, INT32_MIN);
    else *fields[which] = PICK(-1, INT64_MIN, INT64_MAX, INT64_MAX - 63, (int64_t)1 << 62);
}

static void attention_case(void) {
    enum { MOST = 3 };
    kt_attention_sequence s[MOST] = {{0}};
    kt_attention_args a = {.type = (int32_t)below(4), .kv_heads = 1 + below(3), .sequence = s};
    a.heads = a.kv_heads * (1 + below(chance(4) ? 70 : 9));
    a.size = a.type == KT_CACHE_Q8_0 ? PICK(32, 64, 128) : random_size();
    a.value_size = a.type == KT_CACHE_Q8_0 ? PICK(32, 64, 128) : random_size();
    a.scale = random_floats(1)[0];
    a.window = chance(3) ? 1 + below(100) : 0;
    a.sinks = chance(3) ? random_floats(a.heads) : NULL;
    a.sequences = 1 + below(MOST);
    int64_t tokens = 0;
    for (int64_t i = 0; i < a.sequences; i++) {
        random_sequence(&a, &s[i]);
        s[i].query = tokens;
        tokens += s[i].queries;
    }
    a.q_stride = a.heads * a.size;
    a.out_stride = a.heads * a.value_size;
    a.q = random_floats(tokens * a.q_stride);
    const size_t bytes = (size_t)(tokens * a.out_stride) * 4;
    uint8_t *out[2];
    two_outputs(out, bytes, KT_F32);
    a.out = (float *)(void *)out[0];
    int status = kt_attention_core(pools[0], &a);
    a.out = (float *)(void *)out[1];
    compare(status, kt_attention_core(pools[1], &a), out, bytes, KT_F32, "attention");
    check(status == KT_OK, "attention of valid arguments");
    spoil(&a, s);
    check(kt_attention_core(pools[0], &a) != KT_OK, "attention of absurd arguments");
}

/* ---- attention modules and layers ---- */

static kt_attention_desc random_module(int64_t hidden) {
    kt_attention_desc d = {.kv_heads = 1 + below(3), .size = 2 * (1 + below(40)), .scale = random_floats(1)[0]};
    d.heads = d.kv_heads * (1 + below(5));
    d.gate = (int32_t)below(4);
    d.value_size = d.gate == KT_GATE_IN_Q ? d.size : 1 + below(70);
    d.q = valid(d.heads * d.size * (d.gate == KT_GATE_IN_Q ? 2 : 1), hidden);
    d.k = valid(d.kv_heads * d.size, hidden);
    d.v = valid(d.kv_heads * d.value_size, hidden);
    if (d.gate > KT_GATE_IN_Q) d.g = valid(d.gate == KT_GATE_HEADS ? d.heads : d.heads * d.value_size, hidden);
    d.o = valid(hidden, d.heads * d.value_size);
    d.norm_whole = (int32_t)below(2);
    d.norm_last = !d.norm_whole && chance(2);
    if (chance(2)) d.q_norm = random_floats(d.heads * d.size);
    if (chance(2)) d.k_norm = random_floats(d.heads * d.size);
    if (chance(3)) d.v_norm = random_floats(d.value_size);
    if (chance(3)) d.sinks = random_floats(d.heads);
    for (int i = 0; i < 5; i++)
        if (chance(3)) d.bias[i] = random_floats(2 * d.heads * (d.size + d.value_size) + hidden);
    d.eps = 1e-6f;
    d.clip = chance(4) ? 1.0f : 0.0f;
    d.value_factor = chance(3) ? 0.7f : 0.0f;
    d.gate_by = (int32_t)below(2);
    d.rotary_pairs = (int32_t)below(4);
    return d;
}

/* Room of exactly `tokens` tokens for each of the sequences. */
static void empty_sequences(const kt_attention_desc *d, const kt_kv_layout *l, int64_t batch, int64_t tokens,
                            kt_sequence *s) {
    for (int64_t b = 0; b < batch; b++) {
        const int64_t pages = (tokens + 63) / 64;
        void **page[2];
        for (int which = 0; which < 2; which++) {
            const int64_t row = which ? l->value_row : l->key_row, head = which ? l->value_head : l->key_head;
            page[which] = (void **)(void *)buffer((size_t)pages * sizeof(void *), sizeof(void *));
            for (int64_t p = 0; p < pages; p++) {
                const int64_t left = tokens - p * 64 < 64 ? tokens - p * 64 : 64;
                page[which][p] = random_bytes((size_t)((d->kv_heads - 1) * head + left * row), 8);
            }
        }
        s[b] = (kt_sequence){.keys = page[0], .values = page[1]};
    }
}

static kt_row_norm random_norm(int64_t hidden) {
    return (kt_row_norm){.weight = chance(3) ? NULL : random_floats(hidden), .eps = 1e-6f, .centered = (int32_t)below(2)};
}

static kt_joining random_joining(int64_t hidden) {
    return (kt_joining){.before = random_norm(hidden), .after = random_norm(hidden), .keep = chance(2) ? 1.0f : 0.8f,
                        .factor = chance(2) ? 1.0f : 0.3f};
}

/* Two steps through one layer, alike on both pools; then the same with absurd numbers. */
static void layer_case(void) {
    enum { MOST = 3 };
    const int64_t hidden = 32 * (1 + below(8)), inner = random_size(), batch = 1 + below(MOST);
    kt_attention_desc d = random_module(hidden);
    kt_attention *a = NULL;
    kt_experts *e = NULL;
    kt_layer *layer = NULL;
    const kt_weight gate = valid(inner, hidden), up = valid(inner, hidden), down = valid(hidden, inner);
    const kt_glu silu = {.activation = KT_SILU, .limit = INFINITY};
    if (kt_attention_create(&d, &a) == KT_OK && kt_experts_create(1, &gate, &up, &down, &silu, &e) == KT_OK) {
        const kt_layer_desc both = {.attention = a, .mlp = e, .first = random_joining(hidden),
                                    .second = random_joining(hidden), .parallel = (int32_t)below(2)};
        check(kt_layer_create(&both, &layer) == KT_OK && layer, "layer");
    }
    const int64_t steps[2] = {1 + below(chance(4) ? 90 : 9), 1}, rotary = 2 * (1 + below(d.size / 2));
    kt_attention_call c = {.dtype = (int32_t)below(3), .batch = batch, .rotary = rotary, .rotary_row = rotary / 2};
    c.layout.key_row = d.size * 4;
    c.layout.value_row = d.value_size * 4;
    c.layout.key_head = c.layout.key_row * 64;
    c.layout.value_head = c.layout.value_row * 64;
    c.cos = random_floats(rotary * 50);
    c.sin = chance(20) ? NULL : random_floats(rotary * 50);
    if (!c.cos || rotary * 50 < steps[0] * rotary / 2) c.rotary_row = 0;
    c.window = chance(3) ? 1 + below(20) : 0;
    const kt_row_norm last = random_norm(hidden);
    c.q_factor_batch = chance(2) ? steps[0] : 0;
    if (chance(3)) c.q_factor = random_floats(c.q_factor_batch ? batch * steps[0] : steps[0]);
    kt_sequence s[2][MOST];
    for (int i = 0; i < 2 && layer; i++) empty_sequences(&d, &c.layout, batch, steps[0] + steps[1], s[i]);
    for (int step = 0; step < 2 && layer; step++) {
        c.tokens = steps[step];
        const size_t bytes = (size_t)(batch * c.tokens * hidden) * size_of(c.dtype);
        const void *x = random_input(c.dtype, batch * c.tokens * hidden);
        uint8_t *out[2];
        int status[2];
        two_outputs(out, bytes, c.dtype);
        for (int i = 0; i < 2; i++) {
            c.sequences = s[i];
            const kt_stack stack = {.count = 1, .layers = (const kt_layer *const *)&layer, .calls = &c, .norm = last};
            status[i] = kt_layers_forward(&stack, pools[i], x, out[i]);
        }
        compare(status[0], status[1], out, bytes, c.dtype, "layer");
        check(status[0] || s[0][0].length == s[1][0].length, "length");
    }
    int64_t *const fields[] = {&c.batch, &c.tokens, &c.layout.key_row, &c.layout.value_row, &c.rotary};
    const int64_t which = below(sizeof fields / sizeof *fields);
    if (which == 4 && (d.rotary_pairs == KT_PAIRS_NONE)) c.dtype = 9;
    *fields[which] = which == 4 ? PICK(-2, 3, 1 << 20) : PICK(-1, INT64_MIN, -((int64_t)1 << 40));
    uint8_t *out[2];
    two_outputs(out, 16, KT_F32);
    if (a) check(kt_attention_forward(a, pools[0], &c, out[1], out[0]) != KT_OK, "attention module of absurd arguments");
    kt_layer_destroy(layer);
    kt_attention_destroy(a);
    kt_experts_destroy(e);
}

/* A matrix of latents' heads, of a type that their attention reads. */
static kt_weight latent_weight(int64_t rows, int64_t cols) {
    static const int ids[] = {KT_FMT_F32, KT_FMT_F16, KT_FMT_BF16, KT_FMT_Q8_0};
    const struct kt_traits *t = &kt_traits_table[ids[below(cols % 32 ? 3 : 4)]];
    kt_weight w = {.type = t->id, .rows = rows, .cols = cols, .scale = 1.0f};
    w.bytes = (size_t)rows * (size_t)(cols / t->block) * (size_t)t->bytes;
    w.data = random_bytes(w.bytes, 1);
    return w;
}

static void latent_module(kt_latent_desc *d, int64_t hidden) {
    const int64_t rank = chance(2) ? random_size() : 0;
    d->gate = (int32_t)below(4);
    d->gate_by = (int32_t)below(2);
    const int64_t gated = d->gate == KT_GATE_IN_Q ? d->value_size : 0;
    const int64_t queries = d->heads * (d->plain + d->rotary + gated);
    if (rank) {
        d->q_a = valid(rank, hidden);
        d->q_norm = random_floats(rank);
    }
    d->q = valid(queries, rank ? rank * (1 + below(2)) : hidden);
    d->kv_a = valid(d->latent + d->rotary, hidden);
    d->kv_b = latent_weight(d->heads * (d->plain + d->value_size), d->latent);
    d->o = valid(hidden, d->heads * d->value_size);
    if (d->gate > KT_GATE_IN_Q)
        d->g = valid(d->heads * (d->gate == KT_GATE_HEADS ? 1 : d->value_size), hidden);
    d->kv_norm = random_floats(d->latent);
    if (chance(3)) d->key_norm = random_floats(d->rotary);
    if (chance(2)) d->bias[KT_Q] = random_floats(rank ? rank : queries);
    if (chance(2)) d->bias[KT_K] = random_floats(d->latent + d->rotary);
    if (chance(2)) d->bias[KT_O] = random_floats(hidden);
    if (chance(3)) d->sinks = random_floats(d->heads);
}

/* Room for `length` tokens, of which the last are to come. */
static kt_sequence latent_sequence(int64_t length, int64_t tokens, int64_t row) {
    const int64_t pages = (length + 63) / 64;
    void **page = (void **)(void *)buffer((size_t)pages * sizeof *page, sizeof *page);
    for (int64_t i = 0; i < pages; i++)
        page[i] = random_bytes((size_t)((length - i * 64 < 64 ? length - i * 64 : 64) * row), 4);
    kt_sequence s = {.keys = page, .values = page, .length = length - tokens};
    s.start = chance(3) ? below(length + 1) : chance(20) ? length : 0;
    return s;
}

static void latent_case(void) {
    kt_sequence s[3];
    const int64_t hidden = random_size();
    kt_latent_desc d = {.heads = 1 + below(6), .latent = 16 * (1 + below(5)), .plain = 1 + below(70),
                        .rotary = 2 * below(20), .value_size = 1 + below(70), .q_eps = 1e-6f, .kv_eps = 1e-6f,
                        .scale = 0.2f, .window = chance(3) ? 1 + below(100) : 0, .rotary_pairs = (int32_t)below(3)};
    const int quantized = d.latent % 32 == 0 && chance(3);
    if (quantized) d.rotary = 32;
    latent_module(&d, hidden);
    kt_attention *a = NULL;
    const int made = kt_latent_attention_create(&d, &a); /* `valid` names a group too many at times */
    check((made == KT_OK) == (a != NULL), "latents made");
    const int type = quantized ? KT_CACHE_Q8_0 : (int)below(3), dtype = (int)below(3);
    const int64_t width = d.latent + d.rotary, row = quantized ? width / 32 * 34 : width * (int64_t)size_of(type);
    kt_attention_call c = {.dtype = dtype, .batch = 1 + below(3), .tokens = chance(2) ? 1 + below(150) : 1,
                           .sequences = s, .layout = {type, 64 * row, 64 * row, row, row}};
    for (int64_t i = 0; i < c.batch; i++) s[i] = latent_sequence(chance(6) ? 192 : c.tokens + below(200), c.tokens, row);
    if (d.rotary && chance(4)) {
        c.rotary = c.rotary_row = d.rotary;
        c.cos = random_floats(c.tokens * d.rotary);
        c.sin = random_floats(c.tokens * d.rotary);
    }
    const size_t n = (size_t)(c.batch * c.tokens * hidden), bytes = n * size_of(dtype);
    const void *x = random_input(dtype, (int64_t)n);
    uint8_t *out[2];
    two_outputs(out, bytes, dtype);
    if (a) {
        const int status = kt_attention_forward(a, pools[0], &c, x, out[0]);
        for (int64_t i = 0; i < c.batch && !status; i++) s[i].length -= c.tokens; /* raised: the same places again */
        compare(status, kt_attention_forward(a, pools[1], &c, x, out[1]), out, bytes, dtype, "latent attention");
        check(status == KT_OK, "latent attention of valid arguments");
    }
    kt_attention_destroy(a);
    int64_t *const sizes[] = {&d.heads, &d.latent, &d.plain, &d.rotary, &d.value_size};
    *sizes[below(5)] = PICK(-1, INT64_MIN, INT64_MAX, INT64_MAX - 63, (int64_t)1 << 62);
    check(kt_latent_attention_create(&d, &a) != KT_OK && !a, "latents of absurd arguments");
}
