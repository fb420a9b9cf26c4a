/* pairs.h: the (token, slot) pairs of a call on experts, sorted by expert. */
#ifndef KT_PAIRS_H
#define KT_PAIRS_H

#include <stdint.h>

#include "../matmul/arena.h"

/* An expert that has tokens. */
struct kt_group {
    int32_t expert, begin, tokens; /* pos of its first pair, and how many */
};

enum { KT_SHARE_TOKENS = 256 }; /* enough to repay unpacking the weights once more for those after them */

struct kt_sorted {
    const int64_t *ids; /* [T, K]; NULL: all expert 0 */
    int64_t experts;
    int32_t tokens, slots;          /* T, K */
    int32_t count, groups, busiest; /* pairs; experts with tokens; tokens of the one that has most of them */
    int32_t shares;
    int32_t *of_expert;             /* [E] how many; after the sort of no meaning */
    struct kt_group *group;         /* [groups], busiest first */
    struct kt_group *share;         /* [shares], the groups again, cut at KT_SHARE_TOKENS */
    int32_t *pos;                   /* [T, K] of each pair, -1 if skipped */
    int32_t *token;                 /* [count] by pos */
    int32_t *row;                   /* [count] 0, 1, 2, ... */
};

/* How many there are: count, groups, busiest, shares and of_expert, which has to be there. */
void kt_pairs_count(struct kt_sorted *p);

/* Room for all of it. of_expert comes first: how much the rest takes is known when it has been filled. */
void kt_pairs_take(struct kt_sorted *p, struct kt_arena *arena);

/* All the rest, when they have been counted. */
void kt_pairs_sort(struct kt_sorted *p);

#endif
