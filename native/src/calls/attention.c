/* attention.c: attention over a caller's cache: checks, then attention/attend.c. */
#include <stdlib.h>

#include "../../include/kt_native.h"
#include "../attention/attend.h"
#include "../matmul/matrix.h"

enum { MAX_HEADS = 1 << 16, MAX_SIZE = 1 << 16, MAX_SEQUENCES = 1 << 20 };
static const int64_t max_stride = (int64_t)1 << 32; /* of q, out and masks: times a number of tokens it fits 63 bits */

static int between(int64_t n, int64_t low, int64_t high) { return n >= low && n <= high; }

static int check_shapes(const kt_attention_args *a) {
    if (!between(a->heads, 1, MAX_HEADS) || !between(a->kv_heads, 1, a->heads) || a->heads % a->kv_heads)
        return KT_ERR_SHAPE;
    if (!between(a->size, 1, MAX_SIZE) || !between(a->value_size, 1, MAX_SIZE)) return KT_ERR_SHAPE;
    if (!between(a->window, 0, KT_MAX_DIM) || !between(a->sequences, 0, MAX_SEQUENCES)) return KT_ERR_SHAPE;
    if (!between(a->q_stride, a->heads * a->size, max_stride)) return KT_ERR_SHAPE;
    if (!between(a->out_stride, a->heads * a->value_size, max_stride)) return KT_ERR_SHAPE;
    if (!between(a->type, KT_F32, KT_CACHE_Q8_0)) return KT_ERR_DTYPE;
    return kt_cache_row(a->type, a->size) && kt_cache_row(a->type, a->value_size) ? KT_OK : KT_ERR_BLOCK;
}

static int check_sequence(const kt_attention_args *a, const kt_attention_sequence *s) {
    const int64_t far = (int64_t)1 << 40; /* bytes: a product with a head or a token's place in a page fits */
    if (!between(s->length, 0, KT_MAX_DIM) || !between(s->queries, 0, s->length)) return KT_ERR_SHAPE;
    if (!between(s->start, 0, s->length) || !between(s->query, 0, KT_MAX_DIM - s->queries)) return KT_ERR_SHAPE;
    if (!between(s->key_head, 0, far) || !between(s->value_head, 0, far)) return KT_ERR_SHAPE;
    if (!between(s->key_row, (int64_t)kt_cache_row(a->type, a->size), far)) return KT_ERR_SHAPE;
    if (!between(s->value_row, (int64_t)kt_cache_row(a->type, a->value_size), far)) return KT_ERR_SHAPE;
    if (s->mask && !between(s->mask_row, s->length, max_stride)) return KT_ERR_SHAPE;
    if (!s->queries) return KT_OK;
    if (!s->keys || !s->values) return KT_ERR_NULL;
    for (int64_t p = s->start / KT_PAGE; p * KT_PAGE < s->length; p++)
        if (!s->keys[p] || !s->values[p]) return KT_ERR_NULL;
    return KT_OK;
}

static struct kt_attend_sequence taken(const kt_attention_sequence *s) {
    return (struct kt_attend_sequence){
        .kv = {.keys = (const uint8_t *const *)s->keys, .values = (const uint8_t *const *)s->values,
               .key_head = (size_t)s->key_head, .value_head = (size_t)s->value_head,
               .key_row = (size_t)s->key_row, .value_row = (size_t)s->value_row},
        .query = s->query, .queries = (int32_t)s->queries, .start = s->start, .length = s->length,
        .mask = s->mask, .mask_row = s->mask_row};
}

static int run(struct kt_attend *a, kt_pool *pool) {
    kt_pool_lock(pool);
    a->k = kt_kernels();
    const size_t bytes = kt_attend_scratch(a, pool);
    void *scratch = bytes == SIZE_MAX ? NULL : kt_pool_shared(pool, bytes);
    if (scratch) kt_attend_run(a, pool, scratch);
    kt_pool_unlock(pool);
    return scratch ? KT_OK : KT_ERR_MEMORY;
}

int kt_attention_core(kt_pool *pool, const kt_attention_args *args) {
    if (!pool || !args) return KT_ERR_NULL;
    int status = check_shapes(args);
    if (status || args->sequences == 0) return status;
    if (!args->sequence) return KT_ERR_NULL;
    int64_t queries = 0;
    for (int64_t i = 0; i < args->sequences; i++) {
        status = check_sequence(args, &args->sequence[i]);
        if (status) return status;
        queries += args->sequence[i].queries;
    }
    if (queries == 0) return KT_OK;
    if (!args->q || !args->out) return KT_ERR_NULL;
    struct kt_attend_sequence *sequence = calloc((size_t)args->sequences, sizeof *sequence);
    if (!sequence) return KT_ERR_MEMORY;
    for (int64_t i = 0; i < args->sequences; i++) sequence[i] = taken(&args->sequence[i]);
    struct kt_attend a = {
        .type = args->type, .heads = args->heads, .kv_heads = args->kv_heads, .size = args->size,
        .value_size = args->value_size, .scale = args->scale, .window = args->window, .sinks = args->sinks,
        .q = args->q, .q_stride = args->q_stride, .out = args->out, .out_stride = args->out_stride,
        .sequence = sequence, .sequences = (int32_t)args->sequences};
    status = run(&a, pool);
    free(sequence);
    return status;
}
