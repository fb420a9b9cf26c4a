/* attend.h: attention over a paged cache of keys and values: the contract between attend.c and its callers. */
#ifndef KT_ATTEND_H
#define KT_ATTEND_H

#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"
#include "../threads/threads.h"

enum { KT_PAGE = 64 }; /* tokens a page */

/* Keys and values of one sequence in one layer. keys[p] points to token 64*p of head 0. Only pages that hold a visible
 * token are read, and of the last one nothing past `length`. */
struct kt_kv {
    const uint8_t *const *keys, *const *values; /* a pointer a page */
    size_t key_head, value_head;                /* bytes from a head to the next */
    size_t key_row, value_row;                  /* bytes from a token to the next within a page */
};

/* One sequence's part of a call. Its `queries` tokens are the last of `length` cached tokens (already appended). */
struct kt_attend_sequence {
    struct kt_kv kv;
    int64_t query;         /* index of its first query token in q and out */
    int32_t queries;
    int64_t start, length; /* visible keys lie in start .. length; query i (of `queries`) sees keys
                              <= length - queries + i */
    const uint8_t *mask;   /* NULL: causal (and window). Else [queries][length] bytes, nonzero = visible, INSTEAD of
                              causal and window */
    int64_t mask_row;      /* bytes from a query's row to the next */
};

struct kt_attend {
    const struct kt_kernels *k;
    int type; /* of the cache: KT_F32, KT_F16, KT_BF16, or KT_CACHE_Q8_0 (GGUF q8_0 blocks, 34 bytes per 32 values) */
    int64_t heads, kv_heads, size, value_size; /* heads % kv_heads == 0; query head h meets kv head
                                                  h / (heads / kv_heads) */
    float scale;                               /* of the scores, after the dot */
    int64_t window;     /* 0: none; else query at position p sees keys > p - window */
    const float *sinks; /* [heads] or NULL: adds exp(sink - max) to the sum of a head's softmax and nothing to V */
    const float *q;     /* fp32 [tokens][heads][size], q_stride floats between tokens */
    int64_t q_stride;
    float *out; /* fp32 [tokens][heads][value_size] */
    int64_t out_stride;
    const struct kt_attend_sequence *sequence;
    int32_t sequences;
};

/* Bytes of scratch it needs, SIZE_MAX where no memory holds that; and the call itself: between kt_pool_lock and unlock,
 * scratch 64-byte aligned. A query that sees nothing gets zeros. Results do not depend on the threads, nor on the other
 * sequences of the call. */
size_t kt_attend_scratch(const struct kt_attend *a, const kt_pool *pool);
void kt_attend_run(const struct kt_attend *a, kt_pool *pool, void *scratch);

/* Bytes of n values of a cache's type; 0 if n does not fit the type (q8_0: n % 32) or the type is unknown. */
size_t kt_cache_row(int type, int64_t n);

/* n values become a row of the cache. q8_0 as GGUF's reference rounds: d = amax / 127, to nearest, half away from 0. */
void kt_cache_store(const struct kt_kernels *k, const float *x, int64_t n, int type, uint8_t *out);

/* And back. */
void kt_cache_load(const struct kt_kernels *k, const uint8_t *row, int64_t n, int type, float *out);

#endif
