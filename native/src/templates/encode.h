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
 * Before this header a file defines V_BYTES, v_min(a, b) (a < b ? a : b), v_max(a, b) (a > b ? a : b) and
 * v_if_less(p, q, a, b) (p < q ? a : b). */
#ifndef KT_ENCODE_IMPL_H
#define KT_ENCODE_IMPL_H

#include <math.h>
#include <string.h>

#include "../formats/iq_tables.h"
#include "../formats/quants.h"
#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define EQUAL 0.999999f /* what is no better than that is rounding: the earlier start stays */
#define ROUND 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even */

enum { GROUPS = 16, LANES = V_BYTES / 4, WIDE = 32 };

/* Weight j of each group, and its importance. */
struct groups {
    float x[WIDE][GROUPS], w[WIDE][GROUPS];
} __attribute__((aligned(64)));

/* Which values codes stand for: whole numbers low .. high, or IQ4's. */
struct rule {
    float low, high;
    int iq4;
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

/* `count` groups of n weights, side by side; groups that are missing are zero. */
INLINE void gather(const float *x, const float *w, int count, int n, struct groups *g) {
    if (count < GROUPS) memset(g, 0, sizeof *g);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < n; j++) g->x[j][i] = x[i * n + j];
    for (int i = 0; w && i < count; i++)
        for (int j = 0; j < n; j++) g->w[j][i] = w[i * n + j];
}

/* ---- linear formats ---- */

INLINE void linear_sums(const struct groups *g, int c, int n, int weighted, struct rule r, v_f factor, v_f *qx,
                        v_f *qq) {
    v_f a = {0}, b = {0};
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), q = nearest(x * factor, r);
        const v_f wq = weighted ? q * load(g->w[j] + c) : q;
        a += wq * x;
        b += wq * q;
    }
    *qx = a;
    *qq = b;
}

/* The best scales of LANES groups. A start takes the largest weight to the number `reach`. */
INLINE v_f linear_search(const struct groups *g, int c, int n, int weighted, struct rule r, const float *reach,
                         int starts, int refits) {
    v_f extreme = {0}, most = {0}, best = {0}, gain = {0};
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), size = size_of(x);
        extreme = v_if_less(most, size, x, extreme);
        most = v_max(size, most);
    }
    const v_f unit = inverse(extreme);
    for (int i = 0; i < starts + refits; i++) {
        v_f qx, qq;
        linear_sums(g, c, n, weighted, r, i < starts ? unit * reach[i] : inverse(best), &qx, &qq);
        const v_f scale = qx * inverse(qq), new_gain = scale * qx * EQUAL;
        best = v_if_less(gain, new_gain, scale, best);
        gain = v_max(new_gain, gain);
    }
    return best;
}

/* Codes, from 0 on, of groups with these scales: codes[group][weight]. */
INLINE void linear_codes(const struct groups *g, int n, struct rule r, const float *scale, uint8_t (*codes)[WIDE]) {
    for (int c = 0; c < GROUPS; c += LANES) {
        const v_f factor = inverse(load(scale + c));
        for (int j = 0; j < n; j++) {
            const v_f t = load(g->x[j] + c) * factor;
            v_i code = {0};
            if (r.iq4)
                for (int i = 1; i < 16; i++) code -= t > all(0.5f * (iq4_value[i - 1] + iq4_value[i]));
            else
                code = (v_i)(rounded(t, r.low, r.high) - r.low + ROUND) - (v_i)all(ROUND);
            for (int i = 0; i < LANES; i++) codes[c + i][j] = (uint8_t)code[i];
        }
    }
}

/* A batch of super-blocks, `per` groups each: what was found for them so far, and what this round brought. */
struct found {
    float d[GROUPS], dmin[GROUPS], scale[GROUPS], min[GROUPS]; /* d, dmin: of a super-block, repeated for its groups */
    float gain[GROUPS];                                        /* of a super-block, at its first group */
};

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
        linear_round(g, n, weighted, r, top, round ? 1 : around, scales, &now, &p);
        for (int at = 0; at < GROUPS; at += per) {
            keep_better(&now, &p, at, per, round, best);
            const float aa = total(p.aa + at, per), ax = total(p.ax + at, per);
            const float d = as_half(aa > 0.0f ? ax / aa : 0.0f);
            for (int i = at; i < at + per; i++) now.d[i] = d;
        }
    }
}

/* ---- affine formats ---- */

struct affine {
    v_f q, qq, qx, x, w; /* sums, each with the importance */
};

INLINE v_f affine_gain(const struct affine *a, v_f s, v_f m) {
    return 2.0f * (s * a->qx - m * a->x) - (s * s * a->qq - 2.0f * (s * m) * a->q + m * m * a->w);
}

INLINE void affine_sums(const struct groups *g, int c, int n, int weighted, float top, v_f s, v_f m, struct affine *a) {
    const v_f factor = inverse(s), shift = m * factor;
    v_f q1 = {0}, q2 = {0}, qx = {0};
    for (int j = 0; j < n; j++) {
        const v_f x = load(g->x[j] + c), q = rounded(x * factor + shift, 0.0f, top);
        const v_f wq = weighted ? q * load(g->w[j] + c) : q;
        q1 += wq;
        q2 += wq * q;
        qx += wq * x;
    }
    a->q = q1;
    a->qq = q2;
    a->qx = qx;
}

/* Least squares of x ~ s*q - m, neither negative. */
INLINE void affine_fit(const struct affine *a, v_f *s, v_f *m) {
    const v_f det = a->w * a->qq - a->q * a->q;
    const v_f scale = (a->w * a->qx - a->q * a->x) * inverse(det), min = (scale * a->q - a->x) * inverse(a->w);
    const v_f alone = a->qx * inverse(a->qq); /* where the minimum has to be zero */
    *s = v_max(v_if_less(min, all(0.0f), alone, scale), all(0.0f));
    *m = v_max(min, all(0.0f));
}

struct start {
    float scale, min; /* in units of what just holds all weights */
};

INLINE void affine_search(const struct groups *g, int c, int n, int weighted, float top, const struct start *start,
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
    for (int i = 0; i < starts + refits; i++) {
        v_f s = *best_s, m = *best_m;
        if (i < starts) {
            s = (high - low) * (start[i].scale / top);
            m = -low * start[i].min;
        }
        affine_sums(g, c, n, weighted, top, s, m, a);
        affine_fit(a, &s, &m);
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
    for (int try = 0; try < 2 * (2 * around + 1); try++) {
        const v_f s = v_min(v_max(s0 + (float)(try / 2 - around), all(0.0f)), all(most)), ds = d * s;
        affine_sums(g, c, n, weighted, top, ds, dmin * ((try & 1) ? m1 : m0), a);
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

INLINE void affine_super(const struct groups *g, int n, int weighted, float top, float most, int rounds,
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
    for (int round = 0; round < rounds; round++) {
        for (int c = 0; c < GROUPS; c += LANES)
            affine_round(g, c, n, weighted, top, most, round ? 1 : around, scales, mins, &a[c / LANES], &now, &p);
        for (int at = 0; at < GROUPS; at += per) {
            keep_better(&now, &p, at, per, round, best);
            affine_units(&p, at, per, &now);
        }
    }
}

INLINE void affine_codes(const struct groups *g, int n, float top, const struct found *f, uint8_t (*codes)[WIDE]) {
    for (int c = 0; c < GROUPS; c += LANES) {
        const v_f factor = inverse(load(f->d + c) * load(f->scale + c));
        const v_f shift = load(f->dmin + c) * load(f->min + c) * factor;
        for (int j = 0; j < n; j++) {
            const v_f q = rounded(load(g->x[j] + c) * factor + shift, 0.0f, top);
            const v_i code = (v_i)(q + ROUND) - (v_i)all(ROUND);
            for (int i = 0; i < LANES; i++) codes[c + i][j] = (uint8_t)code[i];
        }
    }
}

/* ---- formats: from codes to bytes ---- */

#include "encode_blocks.h"

#endif
