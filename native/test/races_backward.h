/* races_backward.h: gradients in races.c: threads that differentiate on one pool, as autograd's do, while it is resized.
 * Each gets the bits of a pool of one thread. Sizes make two blocks of columns and two shares of an expert's tokens. */

enum { SIZE = 288, EXPERTS = 2, TOKENS = 300, SLOTS = 2, RANK = 3, BLOCK = 34, DIFFERENTIATE = 3 };

static struct given {
    uint8_t weights[3][EXPERTS][SIZE * SIZE / 32][BLOCK]; /* Q8_0 */
    kt_weight of[3][EXPERTS];
    kt_experts *experts;
    float x[TOKENS * SIZE], d_out[TOKENS * SIZE], weight[TOKENS * SLOTS];
    int64_t ids[TOKENS * SLOTS];
    float a[2][EXPERTS * RANK * SIZE], b[2][EXPERTS * 2 * SIZE * RANK];
} given;

/* Floats alone, so that all bytes are compared. */
struct made {
    float out[TOKENS * SIZE], d_x[TOKENS * SIZE], d_hidden[TOKENS * SIZE], d_weight[TOKENS * SLOTS];
    float grad_a[2][EXPERTS * RANK * SIZE], grad_b[2][EXPERTS * 2 * SIZE * RANK];
};
static struct made expected;

static void fill(float *x, size_t bytes) {
    static uint32_t state = 1;
    for (size_t i = 0; i < bytes / sizeof *x; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
}

static void make_given(void) {
    struct given *g = &given;
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < EXPERTS; e++) {
            for (int i = 0; i < SIZE * SIZE / 32; i++)
                for (int j = 0; j < BLOCK; j++) /* scales of 2^-7 */
                    g->weights[m][e][i][j] = (uint8_t)(j == 0 ? 0 : j == 1 ? 0x20 : (i * 37 + j * 101 + m + e) % 256);
            g->of[m][e] = (kt_weight){.type = KT_TYPE_Q8_0, .rows = SIZE, .cols = SIZE, .data = g->weights[m][e],
                                      .bytes = sizeof g->weights[m][e], .scale = 1.0f};
        }
    const kt_glu glu = {.activation = KT_SILU, .alpha = 1.0f, .limit = 10.0f};
    check(kt_experts_create(EXPERTS, g->of[0], g->of[1], g->of[2], &glu, &g->experts) == KT_OK, "experts");
    fill(g->x, sizeof g->x);
    fill(g->d_out, sizeof g->d_out);
    fill(g->weight, sizeof g->weight);
    fill(g->a[0], sizeof g->a);
    fill(g->b[0], sizeof g->b);
    for (int i = 0; i < TOKENS * SLOTS; i++) g->ids[i] = i % 17 ? i % 2 : -1;
}

static void differentiate(kt_pool *pool, struct made *m) {
    const struct given *g = &given;
    memset(m, 0, sizeof *m);
    const kt_lora first = {RANK, 0.5f, g->a[0], g->b[0], m->grad_a[0], m->grad_b[0]};
    const kt_lora down = {RANK, 0.5f, g->a[1], g->b[1], m->grad_a[1], m->grad_b[1]};
    check(kt_linear_backward(pool, &g->of[0][0], g->d_out, KT_F32, TOKENS, m->d_x) == KT_OK, "linear backward");
    check(kt_experts_forward_lora(g->experts, pool, g->x, KT_F32, TOKENS, g->ids, SLOTS, g->weight, &first, &down,
                                  m->out) == KT_OK, "experts with adapters");
    check(kt_experts_backward(g->experts, pool, g->x, KT_F32, TOKENS, g->ids, SLOTS, g->weight, g->d_out, &first, &down,
                              m->d_hidden, m->d_weight) == KT_OK, "experts backward");
}

static void *differentiator(void *pool) {
    struct made *m = malloc(sizeof *m);
    for (int i = 0; i < 2; i++) {
        differentiate(pool, m);
        check(!memcmp(m, &expected, sizeof *m), "gradients of one thread");
    }
    free(m);
    return NULL;
}

static void gradients(void) {
    kt_pool *alone = new_pool(1, NULL), *shared = new_pool(3, "0;1-2");
    pthread_t id[DIFFERENTIATE];
    differentiate(alone, &expected);
    for (int i = 0; i < DIFFERENTIATE; i++) pthread_create(&id[i], NULL, differentiator, shared);
    for (int i = 0; i < 10; i++) {
        kt_pool_resize(shared, 1 + i % 4);
        usleep(20000);
    }
    for (int i = 0; i < DIFFERENTIATE; i++) pthread_join(id[i], NULL);
    kt_pool_destroy(alone);
    kt_pool_destroy(shared);
}

/* In portable C too, of which the sanitizer sees every access; past intrinsics it does not. */
static void gradients_of_two_sets(void) {
    const char *best = kt_isa_name(kt_isa_active());
    make_given();
    gradients();
    check(kt_isa_force("portable") == KT_OK, "portable");
    gradients();
    kt_isa_force(best);
    kt_experts_destroy(given.experts);
}
