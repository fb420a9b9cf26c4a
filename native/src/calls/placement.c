/* placement.c: brings experts' pages to the NUMA nodes that will compute their rows. Computes nothing. */
#include <stdlib.h>

#include "../threads/threads.h"
#include "experts.h"

/* The bytes of a matrix that each node will read: its rows. A type by columns has stored rows that every node reads;
 * they are shared out all the same, so that no node serves them all. */
static int32_t place_matrix(const struct kt_matrix *w, const kt_pool *pool, struct kt_range *ranges) {
    int64_t begin[KT_MAX_NODES + 1];
    int32_t n = 0;
    if (w->traits->by_column) kt_pool_shard(pool, w->cols / w->traits->block, 1, begin);
    else kt_pool_shard(pool, w->rows, KT_SHARD_ROWS, begin);
    for (int node = 0; node < kt_pool_nodes(pool); node++)
        if (begin[node + 1] > begin[node])
            ranges[n++] = (struct kt_range){w->data + (size_t)begin[node] * w->stride,
                                            (size_t)(begin[node + 1] - begin[node] - 1) * w->stride + 1, node};
    return n;
}

int kt_experts_place(const kt_experts *e, kt_pool *pool) {
    if (!e || !pool) return KT_ERR_NULL;
    kt_pool_lock(pool);
    struct kt_range *ranges = malloc((size_t)e->count * 3 * (size_t)kt_pool_nodes(pool) * sizeof *ranges);
    int32_t n = 0;
    for (int64_t i = 0; ranges && i < e->count; i++) {
        if (e->gate) n += place_matrix(&e->gate[i], pool, ranges + n);
        n += place_matrix(&e->up[i], pool, ranges + n);
        n += place_matrix(&e->down[i], pool, ranges + n);
    }
    int status = ranges && kt_pool_touch(pool, ranges, n) ? KT_OK : KT_ERR_MEMORY;
    kt_pool_unlock(pool);
    free(ranges);
    return status;
}
