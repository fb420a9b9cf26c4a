/* fuzz_backward.h: gradients in fuzz.c: of linears, and of experts with adapters of any rank. */

static void linear_backward_case(void) {
    const kt_weight w = truthful(random_size(), random_size());
    const int dtype = (int)PICK(0, 1, 2, 0, 1, 2, 3, -1);
    const int64_t tokens =
        chance(20) ? PICK(-1, INT64_MIN, INT64_MAX, ((int64_t)1 << 30) + 1) : PICK(0, 1, 1, 2, 3, 5, 17, 40, 260);
    const int sane = tokens >= 0 && tokens <= 260 && w.rows > 0 && w.cols > 0 && w.rows < 1 << 12 && w.cols < 1 << 12;
    const size_t bytes = sane ? (size_t)(tokens * w.cols) * size_of(dtype) : 0;
    const void *d_y = chance(30) ? NULL : random_input(dtype, sane ? tokens * w.rows : 0);
    uint8_t *out[2];
    two_outputs(out, bytes, dtype);
    int status = kt_linear_backward(pools[0], &w, d_y, dtype, tokens, out[0]);
    compare(status, kt_linear_backward(pools[1], &w, d_y, dtype, tokens, out[1]), out, bytes, dtype, "linear backward");
}

/* An adapter for two calls, whose gradients begin as the same numbers. */
struct adapter {
    kt_lora lora[2];
    size_t a_bytes, b_bytes;
};

static struct adapter random_adapter(int64_t count, int64_t in, int64_t out) {
    const int64_t rank = chance(30) ? PICK(0, -1, INT64_MAX, 4097) : PICK(1, 2, 8, 17, 130);
    const int64_t sane = rank > 0 && rank < 200 ? rank : 0;
    struct adapter made = {.a_bytes = (size_t)(count * sane * in) * 4, .b_bytes = (size_t)(count * sane * out) * 4};
    const kt_lora lora = {.rank = rank, .scale = random_floats(1)[0], .a = random_floats(count * sane * in),
                          .b = chance(40) ? NULL : random_floats(count * sane * out)};
    for (int i = 0; i < 2; i++) {
        made.lora[i] = lora;
        made.lora[i].grad_a = (float *)buffer(made.a_bytes, 4);
        made.lora[i].grad_b = (float *)buffer(made.b_bytes, 4);
        memset(made.lora[i].grad_a, 0, made.a_bytes);
        memset(made.lora[i].grad_b, 0, made.b_bytes);
    }
    return made;
}

static void compare_gradients(int status, const struct adapter *a) {
    uint8_t *const of_a[2] = {(uint8_t *)a->lora[0].grad_a, (uint8_t *)a->lora[1].grad_a};
    uint8_t *const of_b[2] = {(uint8_t *)a->lora[0].grad_b, (uint8_t *)a->lora[1].grad_b};
    if (status) return; /* zeros that nothing touched: what `compare` has for refused calls is about its own bytes */
    compare(status, status, of_a, a->a_bytes, KT_F32, "gradient of A");
    compare(status, status, of_b, a->b_bytes, KT_F32, "gradient of B");
}

/* The two calls with adapters, on what experts_case gives to the one without. */
static void adapted(const kt_experts *e, int64_t count, int64_t hidden, int64_t first_rows, int64_t inner, const void *x,
                    int dtype, int64_t tokens, const int64_t *ids, int64_t slots, const float *weights) {
    const struct adapter first = random_adapter(count, hidden, first_rows), down = random_adapter(count, inner, hidden);
    const int with = (int)below(4);
    const size_t bytes = (size_t)(tokens * hidden) * size_of(dtype), of_weights = (size_t)(tokens * slots) * 4;
    const void *d_out = random_input(dtype, tokens * hidden);
    uint8_t *out[2], *d_hidden[2], *d_weights[2];
    two_outputs(out, bytes, dtype);
    two_outputs(d_hidden, bytes, dtype);
    two_outputs(d_weights, of_weights, KT_F32);
    int forward[2], backward[2];
    for (int i = 0; i < 2; i++) {
        const kt_lora *f = with & 1 ? &first.lora[i] : NULL, *d = with & 2 ? &down.lora[i] : NULL;
        forward[i] = kt_experts_forward_lora(e, pools[i], x, dtype, tokens, ids, slots, weights, f, d, out[i]);
        backward[i] = kt_experts_backward(e, pools[i], x, dtype, tokens, ids, slots, weights, d_out, f, d, d_hidden[i],
                                          (float *)d_weights[i]);
    }
    compare(forward[0], forward[1], out, bytes, dtype, "experts with adapters");
    compare(backward[0], backward[1], d_hidden, bytes, dtype, "experts backward");
    compare(backward[0], backward[1], d_weights, of_weights, KT_F32, "experts backward, weights");
    if (with & 1) compare_gradients(backward[0], &first);
    if (with & 2) compare_gradients(backward[0], &down);
}
