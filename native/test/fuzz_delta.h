/* fuzz_delta.h: the part of fuzz.c about gated delta nets; included by it alone. */

static void delta_shape(kt_delta_net_desc *d, int64_t hidden) {
    d->key_heads = 1 + below(3);
    d->value_heads = d->key_heads * (1 + below(3));
    d->key_size = 1 + below(70);
    d->value_size = 1 + below(70);
    d->width = chance(8) ? 1 + below(64) : 1 + below(5);
    d->order = (int32_t)below(2);
    const int64_t values = d->value_heads * d->value_size, channels = 2 * d->key_heads * d->key_size + values;
    const int64_t split[4] = {channels, values, d->value_heads, d->value_heads};
    const int64_t joined[2] = {channels + values, 2 * d->value_heads};
    const int inputs = d->order == KT_DELTA_SPLIT ? 4 : 2;
    for (int i = 0; i < inputs; i++) {
        const int64_t rows = d->order == KT_DELTA_SPLIT ? split[i] : joined[i];
        d->inputs[i] = valid(rows, hidden);
        if (chance(3)) d->in_bias[i] = random_floats(rows);
    }
    d->out = valid(hidden, values);
    if (chance(3)) d->out_bias = random_floats(hidden);
    d->conv = random_floats(channels * d->width);
    if (chance(3)) d->conv_bias = random_floats(channels);
}

/* A layer around a delta net, with a dense MLP, which outlives it. */
static kt_layer *random_layer_of(const kt_delta_net *net, int64_t hidden, kt_experts **mlp) {
    const int64_t inner = random_size();
    const kt_weight gate = valid(inner, hidden), up = valid(inner, hidden), down = valid(hidden, inner);
    const kt_glu silu = {.activation = KT_SILU, .limit = INFINITY};
    kt_layer *layer = NULL;
    if (!net || kt_experts_create(1, &gate, &up, &down, &silu, mlp) != KT_OK) return NULL;
    const kt_layer_desc d = {.delta_net = net, .mlp = *mlp, .first = random_joining(hidden),
                             .second = random_joining(hidden), .parallel = (int32_t)below(2)};
    check(kt_layer_create(&d, &layer) == KT_OK && layer, "layer of a delta net");
    return layer;
}

static int step_of_layer(const kt_layer *layer, kt_pool *pool, const kt_delta_net_call *net, int64_t tokens,
                         const void *x, void *out) {
    const kt_attention_call c = {.dtype = net->dtype, .batch = net->batch, .tokens = tokens};
    const kt_stack stack = {.count = 1, .layers = &layer, .calls = &c, .nets = net};
    return kt_layers_forward(&stack, pool, x, out);
}

/* Three steps of a batch, alike on both pools, states included, alone or in a layer; then with absurd numbers. */
static void delta_case(void) {
    const int64_t hidden = random_size(), batch = 1 + below(5);
    kt_delta_net_desc d = {.norm_eps = 1e-6f, .l2_eps = 1e-6f};
    delta_shape(&d, hidden);
    d.rate = random_floats(d.value_heads);
    d.dt_bias = random_floats(d.value_heads);
    d.norm = random_floats(d.value_size);
    kt_delta_net *net = NULL;
    const int made = kt_delta_net_create(&d, &net); /* `valid` names a group too many at times */
    check((made == KT_OK) == (net != NULL), "delta net made");
    kt_experts *mlp = NULL;
    kt_layer *layer = chance(2) ? random_layer_of(net, hidden, &mlp) : NULL;
    kt_delta_net_call c = {.dtype = (int32_t)below(3), .conv_dtype = (int32_t)below(3), .batch = batch};
    const int64_t values = d.value_heads * d.value_size, channels = 2 * d.key_heads * d.key_size + values;
    const size_t bytes = (size_t)(batch * hidden) * size_of(c.dtype);
    const size_t kept[2] = {(size_t)(batch * channels * d.width) * size_of(c.conv_dtype),
                            (size_t)(batch * values * d.key_size) * 4};
    uint8_t *conv[2] = {random_input(c.conv_dtype, batch * channels * d.width), buffer(kept[0], 4)};
    uint8_t *state[2] = {(uint8_t *)random_floats(batch * values * d.key_size), buffer(kept[1], 4)};
    memcpy(conv[1], conv[0], kept[0]);
    memcpy(state[1], state[0], kept[1]);
    for (int step = 0; step < 3 && net; step++) {
        const void *x = random_input(c.dtype, batch * hidden);
        uint8_t *out[2];
        int status[2];
        two_outputs(out, bytes, c.dtype);
        for (int i = 0; i < 2; i++) {
            c.conv = conv[i];
            c.state = (float *)(void *)state[i];
            status[i] = layer ? step_of_layer(layer, pools[i], &c, 1, x, out[i])
                              : kt_delta_net_forward(net, pools[i], &c, x, out[i]);
        }
        compare(status[0], status[1], out, bytes, c.dtype, "delta net");
        compare(KT_OK, KT_OK, conv, kept[0], c.conv_dtype, "convolution's state");
        compare(KT_OK, KT_OK, state, kept[1], KT_F32, "delta net's state");
        check(status[0] == KT_OK, "delta net of valid arguments");
    }
    uint8_t *out[2];
    two_outputs(out, 16, KT_F32);
    switch (below(3)) {
    case 0: c.batch = PICK(-1, INT64_MIN, INT64_MAX, 1 << 21); break;
    case 1: c.conv_dtype = (int32_t)PICK(-1, 3, INT32_MAX); break;
    default: c.state = NULL;
    }
    if (net) check(kt_delta_net_forward(net, pools[0], &c, out[1], out[0]) != KT_OK, "delta net of an absurd call");
    if (layer) {
        check(step_of_layer(layer, pools[0], &c, 1, out[1], out[0]) != KT_OK, "layer of an absurd call");
        c.batch = batch;
        check(step_of_layer(layer, pools[0], &c, 2, out[1], out[0]) == KT_ERR_SHAPE, "two tokens for a delta net");
    }
    kt_layer_destroy(layer);
    kt_experts_destroy(mlp);
    kt_delta_net_destroy(net);
    int64_t *const sizes[] = {&d.key_heads, &d.value_heads, &d.key_size, &d.value_size, &d.width};
    *sizes[below(5)] = PICK(-1, 0, INT64_MIN, INT64_MAX, INT64_MAX - 63, (int64_t)1 << 62);
    check(kt_delta_net_create(&d, &net) != KT_OK && !net, "delta net of absurd arguments");
}
