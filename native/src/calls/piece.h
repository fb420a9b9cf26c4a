/* piece.h: tokens of one call on their way through an attention module: what both kinds of attention share. */
#ifndef KT_PIECE_H
#define KT_PIECE_H

#include "../attention/attend.h"
#include "self_attention.h"

/* `count` matrices that meet the same activations, in one job set: part i gives the columns from first[i] on. */
struct kt_projection {
    const struct kt_matrix *w;
    const float *const *bias; /* of each, or NULL */
    const int64_t *first;
    int count;
    const struct kt_acts *x;
    float *out;
    int64_t stride; /* floats from a token to the next */
};

enum { KT_EXPAND = 128 /* tokens whose keys and values a job makes of latents */ };

/* What attention on latents keeps of a piece; see latent_attention.c. */
struct kt_latent_piece {
    int absorbed;
    struct kt_acts qa; /* latents of queries, normed, where there are any */
    int forms_qa;
    float *q;          /* [tokens][A][N + R] */
    int64_t q_stride;

    float *query, *context; /* absorbed: [tokens][A][L + R], and [tokens][A][L] */

    int type, forms_l;        /* expanded: type of keys and values, and forms of latents that meet kv_b */
    int64_t heads, tokens;    /* there is room for */
    int64_t longest;          /* sequence */
    uint8_t *keys, *values;   /* [heads][tokens][N + R], [heads][tokens][V] */
    const uint8_t **pages[2]; /* of them */
    struct kt_acts *l;        /* of each thread: latents of KT_EXPAND tokens */
    float *turned;            /* the same: parts of keys with a position */
    int32_t *list;            /* 0, 1, 2, ... */
    int64_t sequence, from;   /* what is being expanded: a sequence of the piece, from this token on, */
    int64_t head, some, each; /* some heads from this one on, so many of them in a job */
};

struct kt_piece {
    const struct kt_attention *a;
    const struct kt_kernels *k;
    const kt_attention_call *c;
    const struct kt_rows *in;
    const struct kt_sum *out;
    int64_t sequence, token; /* the first of each; tokens of a sequence in this piece */
    int64_t sequences, each; /* sequences, and tokens of each of them */
    int32_t tokens;          /* sequences * each */
    int forms_x, forms_m, rows;
    int32_t per_job, threads;
    struct kt_acts x, m;
    float *r; /* [tokens, width]: q, k, v, gate */
    float *mixed; /* [tokens, mixed_stride]: what attention gave */
    int64_t mixed_stride;
    const struct kt_projection *now;
    int32_t *list, listed; /* tokens to project: all, or those with infinities and NaNs */
    uint8_t *nonfinite;
    struct kt_attend_sequence *seq;
    struct kt_attend attend;
    void *attend_scratch;
    struct kt_scratch *scratch;
    struct kt_latent_piece latent;
};

/* Where each part begins in a token's row of results. */
void kt_attention_place(struct kt_attention *a);

/* projection->out = W x (+ bias) of the piece's tokens, those of `nonfinite` in fp32. */
void kt_project(struct kt_piece *p, kt_pool *pool, const struct kt_projection *projection);

/* Tokens that a query of the call sees, 0 for all. */
static inline int64_t kt_window(const struct kt_piece *p) { return p->c->window ? p->c->window : p->a->d.window; }

struct kt_angles {
    float cos[KT_MAX_ROTARY], sin[KT_MAX_ROTARY], room[KT_MAX_ROTARY * 2];
};

/* The angles of a token of the piece, if there are any; and x, the part of a query or key with a position, turned. */
void kt_load_angles(const struct kt_piece *p, int64_t t, struct kt_angles *at);
void kt_turn(const struct kt_piece *p, float *x, struct kt_angles *at);

/* latent_attention.c */

static inline int64_t kt_latent_row(const struct kt_attention *a) { return a->latent->latent + a->latent->rotary; }

/* How sequences from p->sequence on are computed: p->sequences of them alike. Returns tokens of a piece, at most. */
int64_t kt_latent_plan(struct kt_piece *p);

/* Bytes of scratch that the attentions of a piece need, one after the other; what else it keeps; and all that happens
 * between the first projections and W_o. */
size_t kt_latent_scratch(struct kt_piece *p, kt_pool *pool);
void kt_latent_layout(struct kt_piece *p, struct kt_arena *arena);
void kt_latent_mix(struct kt_piece *p, kt_pool *pool);

#endif
