/* templates/encode.h: floats to packed blocks, the inverse of unpack. Plain C over vectors, compiled for each
 * instruction set by src/<isa>/encode.c, with the same bits on all: every operation rounds once, and sums across lanes
 * are scalar code.
 *
 * A group is the weights that share one scale (W of them: 16 or 32). Sixteen groups are encoded side by side, a lane
 * each, so that sums over a group are additions of whole vectors. What follows holds for one group; w are importances.
 *
 * Linear formats: x ~ s*q, q from a few values. For given codes q the best scale is sum wxq / sum wqq, and it lowers
 * the error by (sum wxq)^2 / sum wqq, its gain. Start from several scales around the one that just holds the largest
 * weight, round, fit, keep the largest gain, and then round and fit that one again.
 * Affine formats: x ~ s*q - m with s, m >= 0: the same with two unknowns, a 2x2 system.
 * Super-blocks: s = d*(a small integer), d fp16 for all groups. Take d from the widest group; each group tries the
 * integers next to its own s/d; then d is fitted to all codes and integers at once, and the groups try again. The best
 * round stays. Every error counted is that of numbers that can be decoded.
 *
 * Where no importances are given the search is done in whole numbers of 16 bits, twice as many in a vector: their sums
 * are exact, so that their order is free. The last codes, the ones that are written, are those of the floats.
 *
 * Before this header a file defines V_BYTES; v_min(a, b) (a < b ? a : b), v_max(a, b) (a > b ? a : b) and
 * v_if_less(p, q, a, b) (p < q ? a : b); for int16 v_least, v_most, v_above (a - b, not below 0), v_scaled, v_add_pairs
 * and v_lookup, which portable/encode.c explains; and transpose4. */
#ifndef KT_ENCODE_IMPL_H
#define KT_ENCODE_IMPL_H

#include <math.h>
#include <string.h>

#include "../formats/iq_tables.h"
#include "../formats/quants.h"
#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define EQUAL 0.999999f /* what is no better than that is rounding: the earlier start stays */
#define SMALLEST 0x1p-40f /* below it a weight is zero: 2^-24 is the least that any block holds */
#define MARGIN 0.125f     /* how far minima may lie below the least weight, in widths of a group */
#define ROUND 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even */

enum { GROUPS = 16, LANES = V_BYTES / 4, WIDE = 32 };

/* Weight j of each group, and its importance. Where all weigh alike the search reads whole numbers instead, two weights
 * of a group in a lane: fine, whose sums are taken, and coarse, which codes are made of. Then
 * x = base + fine_unit * fine = base + coarse_unit * coarse. */
struct groups {
    float x[WIDE][GROUPS], w[WIDE][GROUPS];
    int16_t fine[WIDE / 2][2 * GROUPS], coarse[WIDE / 2][2 * GROUPS];
    float base[GROUPS], fine_unit[GROUPS], coarse_unit[GROUPS], per_unit[GROUPS]; /* per_unit: 1 / coarse_unit */
} __attribute__((aligned(64)));

/* Which values codes stand for: whole numbers low .. high, or IQ4's. */
struct rule {
    float low, high;
    int iq4;
    int coarse; /* bits of a weight that its code does without: it and the factor to codes share 16 bits */
};

static const float iq4_value[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE v_f all(float value) { return (v_f){0} + value; }
INLINE v_f load(const float *p) {
    v_f v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, v_f v) { memcpy(p, &v, sizeof v); }
INLINE v_f size_of(v_f v) { return (v_f)((v_i)v & 0x7fffffff); }

/* 1/v, and 0 where there is hardly a v. */
INLINE v_f inverse(v_f v) { return v_if_less(all(1e-30f), size_of(v), 1.0f / v, all(0.0f)); }

INLINE v_f rounded(v_f v, float low, float high) { return (v_min(v_max(v, all(low)), all(high)) + ROUND) - ROUND; }

/* The value of the code nearest to t. */
INLINE v_f nearest(v_f t, struct rule r) {
    if (!r.iq4) return rounded(t, r.low, r.high);
    v_f value = all(iq4_value[0]);
    for (int i = 1; i < 16; i++) {
        const float middle = 0.5f * (iq4_value[i - 1] + iq4_value[i]);
        value = v_if_less(all(middle), t, all(iq4_value[i]), value);
    }
    return value;
}

INLINE v_f importance(const struct groups *g, int j, int c, int weighted) {
    return weighted ? load(g->w[j] + c) : all(1.0f);
}

/* fp16 of a scale, but no zero for one that is there, and no infinity. */
static uint16_t half_scale(float d) {
    uint16_t h = kt_f32_to_f16(d);
    if ((h & 0x7fff) == 0x7c00) h--;
    if ((h & 0x7fff) == 0 && d != 0.0f) h++;
    return h;
}

static float as_half(float d) { return kt_f16_to_f32(half_scale(d)); }

static void put_half(uint8_t *out, float d) {
    const uint16_t h = half_scale(d);
    memcpy(out, &h, 2);
}

/* rows[GROUPS][n] to columns[n][GROUPS]. */
INLINE void side_by_side(const float *rows, int n, float (*columns)[GROUPS]) {
    for (int i = 0; i < GROUPS; i += 4)
        for (int j = 0; j < n; j += 4) transpose4(rows + i * n + j, n, columns[j] + i, GROUPS);
}

/* `count` groups of n weights, side by side; groups that are missing are zero. */
INLINE void gather(const float *x, const float *w, int count, int n, struct groups *g) {
    float some[WIDE * GROUPS], weigh[WIDE * GROUPS];
    if (count < GROUPS) {
        memset(some, 0, sizeof some);
        memcpy(some, x, (size_t)(count * n) * sizeof *x);
        x = some;
        if (w) {
            memset(weigh, 0, sizeof weigh);
            memcpy(weigh, w, (size_t)(count * n) * sizeof *w);
            w = weigh;
        }
    }
    side_by_side(x, n, g->x);
    if (w) side_by_side(w, n, g->w);
    for (int j = 0; j < n; j++)
        for (int c = 0; c < GROUPS; c += LANES) {
            const v_f v = load(g->x[j] + c);
            store(g->x[j] + c, v_if_less(size_of(v), all(SMALLEST), all(0.0f), v));
        }
}

/* The bytes that make up codes: 4 of a group in a lane. words[n / 4][GROUPS] to codes[GROUPS][n]. */
INLINE void one_by_one(const uint32_t (*words)[GROUPS], int n, uint8_t (*codes)[WIDE]) {
    for (int j = 0; j < n / 4; j += 4)
        for (int i = 0; i < GROUPS; i += 4) transpose4(words[j] + i, GROUPS, codes[i] + 4 * j, WIDE / 4);
}

/* ---- whole numbers ---- */

INLINE v_s load16(const int16_t *p) {
    v_s v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store16(int16_t *p, v_i v) { memcpy(p, &v, sizeof v); }
INLINE v_s all16(int value) { return (v_s){0} + (int16_t)value; }
INLINE v_f as_float(v_i v) { return __builtin_convertvector(v, v_f); }

/* v, which is -32767 .. 32767, rounded. */
INLINE v_i as_whole(v_f v) { return (v_i)(v + ROUND) - (v_i)all(ROUND); }

/* The same int16 twice in a lane. */
INLINE v_s twice(v_i v) { return (v_s)((v & 0xffff) | (v << 16)); }

INLINE v_s factor16(v_f v) { return twice(as_whole(v_min(v_max(v, all(-32767.0f)), all(32767.0f)))); }

/* Fill in fine and coarse: `range` from base on becomes 32767, and 32767 >> bits. */
INLINE void quantize_groups(struct groups *g, int c, int n, v_f base, v_f range, int bits) {
    const float most = (float)(32767 >> bits);
    const v_f per_range = inverse(range), fine = 32767.0f * per_range, coarse = most * per_range;
    store(g->base + c, base);
    store(g->fine_unit + c, range * (1.0f / 32767.0f));
    store(g->coarse_unit + c, range * (1.0f / most));
    store(g->per_unit + c, coarse);
    for (int j = 0; j < n; j += 2) {
        const v_f x = load(g->x[j] + c) - base, y = load(g->x[j + 1] + c) - base;
        store16(g->fine[j / 2] + 2 * c, (as_whole(x * fine) & 0xffff) | (as_whole(y * fine) << 16));
        store16(g->coarse[j / 2] + 2 * c, (as_whole(x * coarse) & 0xffff) | (as_whole(y * coarse) << 16));
    }
}

/* ---- linear formats ---- */

enum { IQ4_PARTS = 8 }; /* of a step of IQ4's values, so that thresholds between them are whole */

/* For each 64 parts from -1024 on, which hold at most one threshold: the value at their begin, plus 128, and the last
 * part that has it. */
static const uint8_t iq4_from[32] = {1, 1, 24, 24, 24, 45, 45, 63, 63, 79, 79, 93, 93, 106, 106, 118,
                                     129, 141, 141, 153, 166, 166, 181, 181, 197, 197, 217, 217, 217, 241, 241, 241};
static const uint8_t iq4_until[32] = {64, 36, 64, 64, 20, 64, 48, 64, 56, 64, 48, 64, 28, 64, 0, 28,
                                      56, 64, 24, 60, 64, 44, 64, 40, 64, 56, 64, 64, 40, 64, 64, 64};

/* The value of the code nearest to t, which for IQ4 is in parts. */
INLINE v_s nearest16(v_s t, struct rule r) {
    if (!r.iq4) return v_least(v_most(t, all16((int)r.low)), all16((int)r.high));
    const v_s at = v_least(v_most(t + all16(1024), all16(0)), all16(2047)), bucket = at >> 6;
    return v_lookup(iq4_from, bucket - ((at & 63) > v_lookup(iq4_until, bucket))) - all16(128);
}

INLINE void linear_sums16(const struct groups *g, int c, int n, struct rule r, v_f factor, v_f *qx, v_f *qq) {
    const v_s times = factor16(factor * load(g->coarse_unit + c) * (r.iq4 ? 32768.0f * IQ4_PARTS : 32768.0f));
    v_i a = {0}, b = {0};
    for (int j = 0; j < n / 2; j++) {
        const v_s q = nearest16(v_scaled(load16(g->coarse[j] + 2 * c), times), r);
        a = v_add_pairs(a, q, load16(g->fine[j] + 2 * c));
        b = v_add_pairs(b, q, q);
    }
    *qx = as_float(a) * load(g->fine_unit + c);
    *qq = as_float(b);
}

INLINE void linear_sums(const struct groups *g, int c, int n, int weighted, struct rule r, v_f factor, v_f *qx,
                        v_f *qq) {
    if (!weighted) {
        linear_sums16(g, c, n, r, factor, qx, qq);
        return;
    }
    v_f a = {0}, b = {0};
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), q = nearest(x * factor, r);
        const v_f wq = q * load(g->w[j] + c);
        a += wq * x;
        b += wq * q;
    }
    *qx = a;
    *qq = b;
}

/* The best scales of LANES groups. A start takes the largest weight to the number `reach`. */
INLINE v_f linear_search(struct groups *g, int c, int n, int weighted, struct rule r, const float *reach,
                         int starts, int refits) {
    v_f extreme = {0}, most = {0}, best = {0}, gain = {0};
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), size = size_of(x);
        extreme = v_if_less(most, size, x, extreme);
        most = v_max(size, most);
    }
    const v_f unit = inverse(extreme);
    if (!weighted) quantize_groups(g, c, n, all(0.0f), most, r.coarse);
    v_f best_qx = {0}, best_qq = all(1.0f);
    for (int i = 0; i < starts && !weighted; i++) { /* gains as fractions: a division takes as long as some weights */
        v_f qx, qq;
        linear_sums(g, c, n, weighted, r, unit * reach[i], &qx, &qq);
        const v_f ours = best_qx * best_qx * qq, theirs = qx * qx * EQUAL * best_qq;
        best_qx = v_if_less(ours, theirs, qx, best_qx);
        best_qq = v_if_less(ours, theirs, qq, best_qq);
    }
    best = best_qx * inverse(best_qq);
    gain = best * best_qx;
    for (int i = weighted ? 0 : starts; i < starts + refits; i++) {
        v_f qx, qq;
        linear_sums(g, c, n, weighted, r, i < starts ? unit * reach[i] : inverse(best), &qx, &qq);
        const v_f scale = qx * inverse(qq), new_gain = scale * qx * EQUAL;
        best = v_if_less(gain, new_gain, scale, best);
        gain = v_max(new_gain, gain);
    }
    return best;
}

INLINE void add_code(uint32_t *word, int byte, v_i code) {
    v_i sum;
    memcpy(&sum, word, sizeof sum);
    sum |= code << (8 * byte);
    memcpy(word, &sum, sizeof sum);
}

/* Codes, from 0 on, of groups with these scales: codes[group][weight]. */
INLINE void linear_codes(const struct groups *g, int n, struct rule r, const float *scale, uint8_t (*codes)[WIDE]) {
    uint32_t words[WIDE / 4][GROUPS] = {{0}};
    for (int c = 0; c < GROUPS; c += LANES) {
        const v_f factor = inverse(load(scale + c));
        for (int j = 0; j < n; j++) {
            const v_f t = load(g->x[j] + c) * factor;
            v_i code = {0};
            if (r.iq4)
                for (int i = 1; i < 16; i++) code -= t > all(0.5f * (iq4_value[i - 1] + iq4_value[i]));
            else
                code = (v_i)(rounded(t, r.low, r.high) - r.low + ROUND) - (v_i)all(ROUND);
            add_code(words[j / 4] + c, j % 4, code);
        }
    }
    one_by_one(words, n, codes);
}

/* A batch of super-blocks, `per` groups each: what was found for them so far, and what this round brought. */
struct found {
    float d[GROUPS], dmin[GROUPS], scale[GROUPS], min[GROUPS]; /* d, dmin: of a super-block, repeated for its groups */
    float gain[GROUPS];                                        /* of a super-block, at its first group */
};

/* Whether units that were just fitted are those of before: then every later round would find the same once more, if it
 * tries as many numbers. So no block depends on what its neighbours in the batch still need. */
INLINE int settled(const float *before, const float *units) { return !memcmp(before, units, GROUPS * sizeof *units); }

/* The sums of each group that fit d and dmin: see affine_units. */
struct parts {
    float gain[GROUPS], aa[GROUPS], ab[GROUPS], bb[GROUPS], ax[GROUPS], bx[GROUPS];
} __attribute__((aligned(64)));

INLINE float total(const float *v, int n) {
    float t = 0.0f;
    for (int i = 0; i < n; i++) t += v[i];
    return t;
}

/* Keep super-block `at` of this round where it is better. */
INLINE void keep_better(const struct found *now, const struct parts *p, int at, int per, int round,
                        struct found *best) {
    const float gain = total(p->gain + at, per);
    if (round && !(gain > best->gain[at])) return;
    best->gain[at] = gain;
    for (int i = at; i < at + per; i++) {
        best->d[i] = now->d[i];
        best->dmin[i] = now->dmin[i];
        best->scale[i] = now->scale[i];
        best->min[i] = now->min[i];
    }
}

INLINE void linear_round(const struct groups *g, int n, int weighted, struct rule r, float top, int around,
                         const float *scales, struct found *now, struct parts *p) {
    for (int c = 0; c < GROUPS; c += LANES) {
        const v_f d = load(now->d + c), middle = rounded(load(scales + c) * inverse(d), -top, top - 1.0f);
        v_f best = middle, gain = all(-INFINITY), aa = {0}, ax = {0};
        for (int up = -around; up <= around; up++) {
            const v_f s = v_min(v_max(middle + (float)up, all(-top)), all(top - 1.0f)), ds = d * s;
            v_f qx, qq;
            linear_sums(g, c, n, weighted, r, inverse(ds), &qx, &qq);
            const v_f new_gain = 2.0f * (ds * qx) - ds * ds * qq;
            best = v_if_less(gain, new_gain, s, best);
            aa = v_if_less(gain, new_gain, s * s * qq, aa);
            ax = v_if_less(gain, new_gain, s * qx, ax);
            gain = v_max(new_gain, gain);
        }
        store(now->scale + c, best);
        store(p->gain + c, gain);
        store(p->aa + c, aa);
        store(p->ax + c, ax);
    }
}

/* Scales of super-blocks of `per` groups: whole numbers -top .. top - 1, times d. */
INLINE void linear_super(const struct groups *g, int n, int weighted, struct rule r, float top, int per, int rounds,
                         int around, const float *scales, struct found *best) {
    struct found now __attribute__((aligned(64)));
    struct parts p;
    memset(&now, 0, sizeof now);
    for (int at = 0; at < GROUPS; at += per) {
        float widest = 0.0f;
        for (int i = at; i < at + per; i++) widest = fabsf(scales[i]) > fabsf(widest) ? scales[i] : widest;
        for (int i = at; i < at + per; i++) now.d[i] = as_half(widest / -top);
    }
    for (int round = 0; round < rounds; round++) {
        float d0[GROUPS];
        memcpy(d0, now.d, sizeof d0);
        linear_round(g, n, weighted, r, top, round ? 1 : around, scales, &now, &p);
        for (int at = 0; at < GROUPS; at += per) {
            keep_better(&now, &p, at, per, round, best);
            const float aa = total(p.aa + at, per), ax = total(p.ax + at, per);
            const float d = as_half(aa > 0.0f ? ax / aa : 0.0f);
            for (int i = at; i < at + per; i++) now.d[i] = d;
        }
        if ((round || around == 1) && settled(d0, now.d)) return;
    }
}

/* ---- affine formats ---- */

struct affine {
    v_f q, qq, qx, x, w; /* sums, each with the importance */
};

INLINE v_f affine_gain(const struct affine *a, v_f s, v_f m) {
    return 2.0f * (s * a->qx - m * a->x) - (s * s * a->qq - 2.0f * (s * m) * a->q + m * m * a->w);
}

INLINE int affine_coarse(float top) { return top > 7.0f ? 5 : 6; } /* as a rule's coarse */

/* Codes of x + m are those of coarse - below, which is no less than 0. */
INLINE void affine_sums16(const struct groups *g, int c, int n, float top, v_f factor, v_f m,
                          struct affine *a) {
    const v_f base = load(g->base + c);
    const v_s below = factor16(v_max((-m - base) * load(g->per_unit + c), all(0.0f)));
    const v_s times = factor16(factor * load(g->coarse_unit + c) * 32768.0f);
    v_i qx = {0}, qq = {0};
    v_s q1 = {0};
    for (int j = 0; j < n / 2; j++) {
        const v_s more = v_above(load16(g->coarse[j] + 2 * c), below);
        const v_s q = v_least(v_scaled(more, times), all16((int)top));
        q1 += q;
        qq = v_add_pairs(qq, q, q);
        qx = v_add_pairs(qx, q, load16(g->fine[j] + 2 * c));
    }
    a->q = as_float(v_add_pairs((v_i){0}, q1, all16(1)));
    a->qq = as_float(qq);
    a->qx = as_float(qx) * load(g->fine_unit + c) + base * a->q;
}

/* Sums with the codes of (x + m) * factor. */
INLINE void affine_sums(const struct groups *g, int c, int n, int weighted, float top, v_f factor, v_f m,
                        struct affine *a) {
    if (!weighted) {
        affine_sums16(g, c, n, top, factor, m, a);
        return;
    }
    const v_f shift = m * factor;
    v_f q1 = {0}, q2 = {0}, qx = {0};
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), q = rounded(x * factor + shift, 0.0f, top);
        const v_f wq = q * load(g->w[j] + c);
        q1 += wq;
        q2 += wq * q;
        qx += wq * x;
    }
    a->q = q1;
    a->qq = q2;
    a->qx = qx;
}

/* Least squares of x ~ s*q - m, neither negative; `each` is 1/w. */
INLINE void affine_fit(const struct affine *a, v_f each, v_f *s, v_f *m) {
    const v_f det = a->w * a->qq - a->q * a->q;
    const v_f scale = (a->w * a->qx - a->q * a->x) * inverse(det), min = (scale * a->q - a->x) * each;
    const v_f alone = a->qx * inverse(a->qq); /* where the minimum has to be zero */
    *s = v_max(v_if_less(min, all(0.0f), alone, scale), all(0.0f));
    *m = v_max(min, all(0.0f));
}

/* The gain of that as a fraction, where all weigh alike. */
INLINE void affine_promise(const struct affine *a, v_f each, v_f *above, v_f *below) {
    const v_f det = a->w * a->qq - a->q * a->q, slope = a->w * a->qx - a->q * a->x, x_det = a->x * det;
    const v_f min = slope * a->q - x_det;
    const v_f fitted = (a->x * x_det + slope * slope) * each, alone = a->qx * a->qx;
    *above = v_if_less(all(0.0f), min, fitted, alone);
    *below = v_if_less(all(0.0f), min, det, a->qq);
}

struct start {
    float scale, min; /* in units of what just holds all weights */
};

INLINE void affine_search(struct groups *g, int c, int n, int weighted, float top, const struct start *start,
                          int starts, int refits, struct affine *a, v_f *best_s, v_f *best_m) {
    v_f low = {0}, high = {0}, gain = {0};
    a->x = a->w = all(0.0f);
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), w = importance(g, j, c, weighted);
        low = v_min(x, low);
        high = v_max(x, high);
        a->x += w * x;
        a->w += w;
    }
    *best_s = *best_m = all(0.0f);
    const v_f range = high - low;
    if (!weighted) quantize_groups(g, c, n, low - MARGIN * range, (1.0f + MARGIN) * range, affine_coarse(top));
    const v_f per_range = inverse(range), each = inverse(a->w);
    v_f most_above = {0}, most_below = all(1.0f);
    struct affine best = *a;
    best.q = best.qq = best.qx = all(0.0f);
    for (int i = 0; i < starts && !weighted; i++) {
        v_f above, below;
        affine_sums(g, c, n, 0, top, per_range * (top / start[i].scale), -low * start[i].min, a);
        affine_promise(a, each, &above, &below);
        const v_f ours = most_above * below, theirs = above * EQUAL * most_below;
        most_above = v_if_less(ours, theirs, above, most_above);
        most_below = v_if_less(ours, theirs, below, most_below);
        best.q = v_if_less(ours, theirs, a->q, best.q);
        best.qq = v_if_less(ours, theirs, a->qq, best.qq);
        best.qx = v_if_less(ours, theirs, a->qx, best.qx);
    }
    if (!weighted) {
        affine_fit(&best, each, best_s, best_m);
        gain = affine_gain(&best, *best_s, *best_m);
    }
    for (int i = weighted ? 0 : starts; i < starts + refits; i++) {
        v_f s, m = i < starts ? -low * start[i].min : *best_m;
        affine_sums(g, c, n, weighted, top, i < starts ? per_range * (top / start[i].scale) : inverse(*best_s), m, a);
        affine_fit(a, each, &s, &m);
        const v_f new_gain = affine_gain(a, s, m) * EQUAL;
        *best_s = v_if_less(gain, new_gain, s, *best_s);
        *best_m = v_if_less(gain, new_gain, m, *best_m);
        gain = v_max(new_gain, gain);
    }
}

/* Whole scales and minima 0 .. most of LANES groups for given d and dmin. For each scale near the real one, and the
 * minimum on either side of the real one: codes, the minimum that suits those, and the gain of both. */
INLINE void affine_round(const struct groups *g, int c, int n, int weighted, float top, float most, int around,
                         const float *scales, const float *mins, struct affine *a, struct found *now, struct parts *p) {
    const v_f d = load(now->d + c), dmin = load(now->dmin + c), whole = inverse(dmin), each = inverse(a->w);
    const v_f s0 = rounded(load(scales + c) * inverse(d), 0.0f, most), real = load(mins + c) * whole;
    const v_f m0 = rounded(real, 0.0f, most);
    const v_f m1 = v_min(v_max(m0 + v_if_less(m0, real, all(1.0f), all(-1.0f)), all(0.0f)), all(most));
    v_f best_s = s0, best_m = m0, gain = all(-INFINITY), q = {0}, qq = {0}, qx = {0};
    v_f s = s0, ds = s0, factor = s0;
    for (int try = 0; try < 2 * (2 * around + 1); try++) {
        if (!(try & 1)) {
            s = v_min(v_max(s0 + (float)(try / 2 - around), all(0.0f)), all(most));
            ds = d * s;
            factor = inverse(ds);
        }
        affine_sums(g, c, n, weighted, top, factor, dmin * ((try & 1) ? m1 : m0), a);
        const v_f m = rounded((ds * a->q - a->x) * each * whole, 0.0f, most);
        const v_f new_gain = affine_gain(a, ds, dmin * m);
        best_s = v_if_less(gain, new_gain, s, best_s);
        best_m = v_if_less(gain, new_gain, m, best_m);
        q = v_if_less(gain, new_gain, a->q, q);
        qq = v_if_less(gain, new_gain, a->qq, qq);
        qx = v_if_less(gain, new_gain, a->qx, qx);
        gain = v_max(new_gain, gain);
    }
    store(now->scale + c, best_s);
    store(now->min + c, best_m);
    store(p->gain + c, gain);
    store(p->aa + c, best_s * best_s * qq);
    store(p->ab + c, best_s * best_m * q);
    store(p->bb + c, best_m * best_m * a->w);
    store(p->ax + c, best_s * qx);
    store(p->bx + c, best_m * a->x);
}

/* Least squares of x ~ d*(s*q) - dmin*m over a super-block. */
INLINE void affine_units(const struct parts *p, int at, int per, struct found *now) {
    const float aa = total(p->aa + at, per), ab = total(p->ab + at, per), bb = total(p->bb + at, per);
    const float ax = total(p->ax + at, per), bx = total(p->bx + at, per), det = aa * bb - ab * ab;
    float d = 0.0f, dmin = 0.0f;
    if (bb > 0.0f && det > 1e-5f * (aa * bb)) {
        d = (ax * bb - bx * ab) / det;
        dmin = (ax * ab - bx * aa) / det;
    } else if (aa > 0.0f) {
        d = ax / aa;
        dmin = now->dmin[at];
    }
    for (int i = at; i < at + per; i++) {
        now->d[i] = as_half(d > 0.0f ? d : 0.0f);
        now->dmin[i] = as_half(dmin > 0.0f ? dmin : 0.0f);
    }
}

INLINE void affine_super(struct groups *g, int n, int weighted, float top, float most, int rounds,
                         int around, const struct start *start, int starts, int refits, struct found *best) {
    struct found now __attribute__((aligned(64)));
    struct parts p;
    float scales[GROUPS] __attribute__((aligned(64))), mins[GROUPS] __attribute__((aligned(64)));
    struct affine a[GROUPS / LANES];
    const int per = KT_QK / n;
    for (int c = 0; c < GROUPS; c += LANES) {
        v_f s, m;
        affine_search(g, c, n, weighted, top, start, starts, refits, &a[c / LANES], &s, &m);
        store(scales + c, s);
        store(mins + c, m);
    }
    for (int at = 0; at < GROUPS; at += per) {
        float s = 0.0f, m = 0.0f;
        for (int i = at; i < at + per; i++) {
            s = scales[i] > s ? scales[i] : s;
            m = mins[i] > m ? mins[i] : m;
        }
        for (int i = at; i < at + per; i++) {
            now.d[i] = as_half(s / most);
            now.dmin[i] = as_half(m / most);
        }
    }
    for (int c = 0; !weighted && c < GROUPS; c += LANES) { /* a whole minimum may lie lower by one dmin */
        const v_f more = load(now.dmin + c), range = 32767.0f * load(g->fine_unit + c);
        quantize_groups(g, c, n, load(g->base + c) - more, range + more, affine_coarse(top));
    }
    for (int round = 0; round < rounds; round++) {
        float d0[GROUPS], dmin0[GROUPS];
        memcpy(d0, now.d, sizeof d0);
        memcpy(dmin0, now.dmin, sizeof dmin0);
        for (int c = 0; c < GROUPS; c += LANES)
            affine_round(g, c, n, weighted, top, most, round ? 1 : around, scales, mins, &a[c / LANES], &now, &p);
        for (int at = 0; at < GROUPS; at += per) {
            keep_better(&now, &p, at, per, round, best);
            affine_units(&p, at, per, &now);
        }
        if ((round || around == 1) && settled(d0, now.d) && settled(dmin0, now.dmin)) return;
    }
}

INLINE void affine_codes(const struct groups *g, int n, float top, const struct found *f, uint8_t (*codes)[WIDE]) {
    uint32_t words[WIDE / 4][GROUPS] = {{0}};
    for (int c = 0; c < GROUPS; c += LANES) {
        const v_f factor = inverse(load(f->d + c) * load(f->scale + c));
        const v_f shift = load(f->dmin + c) * load(f->min + c) * factor;
        for (int j = 0; j < n; j++) {
            const v_f q = rounded(load(g->x[j] + c) * factor + shift, 0.0f, top);
            add_code(words[j / 4] + c, j % 4, (v_i)(q + ROUND) - (v_i)all(ROUND));
        }
    }
    one_by_one(words, n, codes);
}

/* ---- formats: from codes to bytes ---- */

#include "encode_blocks.h"

#endif
