/* pairs.c: a counting sort of (token, slot) pairs by expert. */
#include "pairs.h"

#include <stdlib.h>
#include <string.h>

static int busiest_first(const void *a, const void *b) {
    const struct kt_group *x = a, *y = b;
    if (x->tokens != y->tokens) return x->tokens < y->tokens ? 1 : -1;
    return x->expert < y->expert ? -1 : 1;
}

static int64_t id_of(const struct kt_sorted *p, int64_t i) { return p->ids ? p->ids[i] : 0; }
static int chosen(const struct kt_sorted *p, int64_t i) { return id_of(p, i) >= 0 && id_of(p, i) < p->experts; }

void kt_pairs_count(struct kt_sorted *p) {
    memset(p->of_expert, 0, (size_t)p->experts * sizeof *p->of_expert);
    p->count = p->groups = p->busiest = p->shares = 0;
    for (int64_t i = 0; i < (int64_t)p->tokens * p->slots; i++)
        if (chosen(p, i)) {
            p->count++;
            p->of_expert[id_of(p, i)]++;
        }
    for (int64_t e = 0; e < p->experts; e++) {
        if (p->of_expert[e]) p->groups++;
        p->shares += (p->of_expert[e] + KT_SHARE_TOKENS - 1) / KT_SHARE_TOKENS;
        if (p->of_expert[e] > p->busiest) p->busiest = p->of_expert[e];
    }
}

void kt_pairs_take(struct kt_sorted *p, struct kt_arena *arena) {
    const int64_t most = (int64_t)p->tokens * p->slots; /* pairs: an upper bound, known before counting */
    p->of_expert = kt_arena_take(arena, p->experts, sizeof *p->of_expert);
    p->pos = kt_arena_take(arena, most, sizeof *p->pos);
    p->token = kt_arena_take(arena, p->count, sizeof *p->token);
    p->row = kt_arena_take(arena, p->count, sizeof *p->row);
    p->group = kt_arena_take(arena, p->groups, sizeof *p->group);
    p->share = kt_arena_take(arena, p->shares, sizeof *p->share);
}

static void cut_groups(struct kt_sorted *p) {
    int32_t n = 0;
    for (int32_t i = 0; i < p->groups; i++)
        for (int32_t from = 0; from < p->group[i].tokens; from += KT_SHARE_TOKENS) {
            struct kt_group share = p->group[i];
            share.begin += from;
            share.tokens = share.tokens - from < KT_SHARE_TOKENS ? share.tokens - from : KT_SHARE_TOKENS;
            p->share[n++] = share;
        }
}

void kt_pairs_sort(struct kt_sorted *p) {
    int32_t begin = 0, n = 0;
    for (int64_t e = 0; e < p->experts; e++) {
        const int32_t tokens = p->of_expert[e];
        p->of_expert[e] = begin; /* from here on: the next free pos */
        if (tokens) p->group[n++] = (struct kt_group){(int32_t)e, begin, tokens};
        begin += tokens;
    }
    for (int32_t t = 0; t < p->tokens; t++)
        for (int k = 0; k < p->slots; k++) {
            const int64_t i = (int64_t)t * p->slots + k;
            p->pos[i] = chosen(p, i) ? p->of_expert[id_of(p, i)]++ : -1;
            if (p->pos[i] >= 0) p->token[p->pos[i]] = t;
        }
    for (int32_t i = 0; i < p->count; i++) p->row[i] = i;
    qsort(p->group, (size_t)p->groups, sizeof *p->group, busiest_first);
    cut_groups(p);
}
