/* templates/encode_blocks.h: which search each format takes, and its bytes. Part of encode.h. */

#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

typedef uint8_t codes_t[GROUPS][WIDE];

static inline int whole(float v) { return (int)v; } /* of what rounded() made */

/* ---- blocks of 32 ---- */

/* As the gguf package rounds: half away from zero, by the reciprocal of the scale before it becomes fp16. */
static void encode_q8_0(const float *x, const float *w, int64_t blocks, uint8_t *out) {
    (void)w; /* one scale, and that of the largest weight: nothing to choose */
    for (kt_block_q8_0 *b = (kt_block_q8_0 *)out; blocks > 0; blocks--, b++, x += 32) {
        float most = 0.0f;
        for (int i = 0; i < 32; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        const float d = most < 1e-36f ? 0.0f : most / 127.0f, factor = d > 0.0f ? 1.0f / d : 0.0f;
        const uint16_t h = kt_f32_to_f16(d);
        memcpy(b->d, &h, 2);
        for (int i = 0; i < 32; i++) {
            const float t = x[i] * factor, size = fabsf(t);
            const int32_t below = (int32_t)size, code = below + (size - (float)below >= 0.5f);
            b->q[i] = (int8_t)(t < 0.0f ? -code : code);
        }
    }
}

static void put_nibbles(uint8_t *qs, const uint8_t *code) {
    for (int i = 0; i < 16; i++) qs[i] = (uint8_t)(code[i] | code[i + 16] << 4);
}

/* Q4_0 and IQ4_NL: an fp16 scale, then nibbles. */
INLINE void encode_nibbles(const float *x, const float *w, int64_t blocks, uint8_t *out, struct rule r,
                           const float *reach, int starts, int weighted) {
    struct groups g;
    float scale[GROUPS] __attribute__((aligned(64)));
    codes_t codes;
    for (; blocks > 0; blocks -= GROUPS, x += GROUPS * 32, w += weighted ? GROUPS * 32 : 0) {
        const int count = blocks < GROUPS ? (int)blocks : GROUPS;
        gather(x, weighted ? w : NULL, count, 32, &g);
        for (int c = 0; c < GROUPS; c += LANES)
            store(scale + c, linear_search(&g, c, 32, weighted, r, reach, starts, 2));
        for (int i = 0; i < GROUPS; i++) scale[i] = as_half(scale[i]);
        linear_codes(&g, 32, r, scale, codes);
        for (int i = 0; i < count; i++, out += 18) {
            put_half(out, scale[i]);
            put_nibbles(out + 2, codes[i]);
        }
    }
}

/* ---- super-blocks ---- */

/* Two bits each: 32 bytes a half, bits 2s of byte i hold value 32*s + i of the half. */
static void put_pairs(uint8_t *qs, const uint8_t *code) {
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 32; i++) {
            const uint8_t *q = code + 128 * h + i;
            qs[32 * h + i] = (uint8_t)((q[0] & 3) | (q[32] & 3) << 2 | (q[64] & 3) << 4 | (q[96] & 3) << 6);
        }
}

/* The 256 codes of a super-block in the order of its weights. */
INLINE void in_order(const uint8_t (*codes)[WIDE], int n, uint8_t *out) {
    for (int i = 0; i < KT_QK / n; i++) memcpy(out + i * n, codes[i], (size_t)n);
}

static void put_q2_k(const struct found *f, int at, const uint8_t *code, uint8_t *out) {
    kt_block_q2_k *b = (kt_block_q2_k *)out;
    for (int i = 0; i < 16; i++) b->scales[i] = (uint8_t)(whole(f->scale[at + i]) | whole(f->min[at + i]) << 4);
    put_pairs(b->qs, code);
    put_half(b->d, f->d[at]);
    put_half(b->dmin, f->dmin[at]);
}

static void put_q3_k(const struct found *f, int at, const uint8_t *code, uint8_t *out) {
    kt_block_q3_k *b = (kt_block_q3_k *)out;
    memset(b, 0, sizeof *b);
    for (int i = 0; i < 256; i++) b->hmask[i % 32] |= (uint8_t)((code[i] >> 2) << (i / 32));
    put_pairs(b->qs, code);
    for (int i = 0; i < 16; i++) {
        const int s = whole(f->scale[at + i]) + 32;
        b->scales[i & 7] |= (uint8_t)((s & 15) << (i < 8 ? 0 : 4));
        b->scales[8 + (i & 3)] |= (uint8_t)((s >> 4) << (2 * (i >> 2)));
    }
    put_half(b->d, f->d[at]);
}

/* The inverse of kt_k4_scales. */
static void put_k4_scales(const struct found *f, int at, uint8_t *out) {
    for (int i = 0; i < 4; i++) {
        const int s = whole(f->scale[at + i]), m = whole(f->min[at + i]);
        const int s4 = whole(f->scale[at + i + 4]), m4 = whole(f->min[at + i + 4]);
        out[i] = (uint8_t)(s | (s4 >> 4) << 6);
        out[i + 4] = (uint8_t)(m | (m4 >> 4) << 6);
        out[i + 8] = (uint8_t)((s4 & 15) | (m4 & 15) << 4);
    }
}

static void put_q4_k(const struct found *f, int at, const uint8_t *code, uint8_t *out) {
    kt_block_q4_k *b = (kt_block_q4_k *)out;
    put_half(b->d, f->d[at]);
    put_half(b->dmin, f->dmin[at]);
    put_k4_scales(f, at, b->scales);
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < 32; i++) b->qs[32 * p + i] = (uint8_t)(code[64 * p + i] | code[64 * p + 32 + i] << 4);
}

static void put_q5_k(const struct found *f, int at, const uint8_t *code, uint8_t *out) {
    kt_block_q5_k *b = (kt_block_q5_k *)out;
    put_half(b->d, f->d[at]);
    put_half(b->dmin, f->dmin[at]);
    put_k4_scales(f, at, b->scales);
    memset(b->qh, 0, sizeof b->qh);
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++) b->qh[i] |= (uint8_t)((code[32 * g + i] >> 4) << g);
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < 32; i++)
            b->qs[32 * p + i] = (uint8_t)((code[64 * p + i] & 15) | (code[64 * p + 32 + i] & 15) << 4);
}

static void put_q6_k(const struct found *f, int at, const uint8_t *code, uint8_t *out) {
    kt_block_q6_k *b = (kt_block_q6_k *)out;
    for (int h = 0; h < 2; h++) {
        const uint8_t *q = code + 128 * h;
        for (int i = 0; i < 64; i++) b->ql[64 * h + i] = (uint8_t)((q[i] & 15) | (q[i + 64] & 15) << 4);
        for (int i = 0; i < 32; i++)
            b->qh[32 * h + i] =
                (uint8_t)(q[i] >> 4 | (q[i + 32] >> 4) << 2 | (q[i + 64] >> 4) << 4 | (q[i + 96] >> 4) << 6);
    }
    for (int i = 0; i < 16; i++) b->scales[i] = (int8_t)whole(f->scale[at + i]);
    put_half(b->d, f->d[at]);
}

static void put_iq4_xs(const struct found *f, int at, const uint8_t *code, uint8_t *out) {
    kt_block_iq4_xs *b = (kt_block_iq4_xs *)out;
    memset(b, 0, sizeof *b);
    put_half(b->d, f->d[at]);
    for (int i = 0; i < 8; i++) {
        const int s = whole(f->scale[at + i]) + 32;
        b->scales_l[i / 2] |= (uint8_t)((s & 15) << (4 * (i & 1)));
        b->scales_h[i / 4] |= (uint8_t)((s >> 4) << (2 * (i & 3)));
        put_nibbles(b->qs + 16 * i, code + 32 * i);
    }
}

typedef void (*put_fn)(const struct found *f, int at, const uint8_t *code, uint8_t *out);

/* How a format of super-blocks is searched. top: affine, the largest code; linear, the number of scales below zero. */
struct search {
    int group, affine;
    struct rule rule;
    float top, most; /* most: the largest scale and minimum of an affine format */
    const float *reach;
    const struct start *start;
    int starts, refits, rounds, around;
    put_fn put;
    int bytes;
};

INLINE void encode_super(const float *x, const float *w, int64_t blocks, uint8_t *out, struct search s, int weighted) {
    struct groups g;
    struct found f __attribute__((aligned(64)));
    float scales[GROUPS] __attribute__((aligned(64)));
    codes_t codes;
    uint8_t code[KT_QK];
    const int per = KT_QK / s.group, at_once = GROUPS / per;
    for (; blocks > 0; blocks -= at_once, x += at_once * KT_QK, w += weighted ? at_once * KT_QK : 0) {
        const int count = blocks < at_once ? (int)blocks : at_once;
        gather(x, weighted ? w : NULL, count * per, s.group, &g);
        if (s.affine) {
            affine_super(&g, s.group, weighted, s.top, s.most, s.rounds, s.around, s.start, s.starts, s.refits, &f);
            affine_codes(&g, s.group, s.top, &f, codes);
        } else {
            for (int c = 0; c < GROUPS; c += LANES)
                store(scales + c, linear_search(&g, c, s.group, weighted, s.rule, s.reach, s.starts, s.refits));
            linear_super(&g, s.group, weighted, s.rule, s.top, per, s.rounds, s.around, scales, &f);
            for (int i = 0; i < GROUPS; i++) scales[i] = f.d[i] * f.scale[i];
            linear_codes(&g, s.group, s.rule, scales, codes);
        }
        for (int i = 0; i < count; i++, out += s.bytes) {
            in_order((const uint8_t(*)[WIDE])(codes + i * per), s.group, code);
            s.put(&f, i * per, code, out);
        }
    }
}

/* Starts around the scale that just holds the largest weight, as many as still lowered the error; by
 * tests/bench/bench_encode.py. Few codes want more of them, and the largest weight at either end. */
static const float reach_q4_0[] = {-7.4f, -7.9f, -8.4f, -9.0f, -6.8f, 7.3f, 7.9f, 6.7f};
static const float reach_q3_k[] = {-3.5f, -3.9f, -4.3f, -3.1f, -4.8f, 3.2f, 3.6f, 2.8f};
static const float reach_q6_k[] = {-32.0f, -29.0f, -29.5f, -30.0f, -30.4f, -30.9f, -31.3f, -31.7f, -32.3f,
                                   -32.7f, -33.2f, -33.7f, -34.1f, -34.6f, -35.1f, -35.5f, -36.0f};
static const float reach_iq4[] = {-118.0f, -127.0f, -137.0f, -108.0f, 104.0f, 113.0f, 122.0f, 96.0f};
static const struct start start_q2_k[] = {{1.0f, 1.0f}, {0.9f, 0.9f}, {0.8f, 0.8f}, {0.7f, 0.7f}, {0.6f, 0.6f},
                                          {0.8f, 0.95f}, {0.7f, 0.85f}, {0.8f, 0.65f}, {0.7f, 0.55f}};
/* No two alike in their scale, for groups without a minimum. */
static const struct start start_q4_k[] = {
    {1.0f, 1.0f},
    {1.080f, 1.080f}, {1.068f, 1.008f}, {1.055f, 1.115f}, {1.042f, 1.062f}, {1.030f, 1.000f},
    {1.018f, 1.018f}, {1.005f, 0.945f}, {0.993f, 1.052f}, {0.980f, 1.000f}, {0.968f, 0.938f},
    {0.955f, 0.955f}, {0.943f, 0.883f}, {0.930f, 0.990f}, {0.917f, 0.938f}, {0.905f, 0.875f},
    {0.893f, 0.893f}, {0.880f, 0.820f}, {0.868f, 0.927f}, {0.855f, 0.875f}, {0.843f, 0.812f},
    {0.830f, 0.830f}, {0.818f, 0.758f}, {0.805f, 0.865f}, {0.792f, 0.812f}};
static const struct start start_q5_k[] = {
    {1.0f, 1.0f},
    {1.070f, 1.070f}, {1.060f, 1.035f}, {1.050f, 1.075f}, {1.040f, 1.040f}, {1.030f, 1.005f},
    {1.020f, 1.045f}, {1.010f, 1.010f}, {1.000f, 0.975f}, {0.990f, 1.015f}, {0.980f, 0.980f},
    {0.970f, 0.945f}, {0.960f, 0.985f}, {0.950f, 0.950f}, {0.940f, 0.915f}, {0.930f, 0.955f},
    {0.920f, 0.920f}, {0.910f, 0.885f}, {0.900f, 0.925f}, {0.890f, 0.890f}, {0.880f, 0.855f}};

/* refits: of the best start; rounds: of the integers; around: how far those are tried in the first round. */
#define SUPER(name, ...)                                                                                   \
    static void encode_##name(const float *x, const float *w, int64_t blocks, uint8_t *out) {              \
        const struct search s = {__VA_ARGS__, .put = put_##name, .bytes = sizeof(kt_block_##name)};        \
        if (w) encode_super(x, w, blocks, out, s, 1);                                                      \
        else encode_super(x, NULL, blocks, out, s, 0);                                                     \
    }
#define LINEAR(name, per, lowest, highest, iq, lost, tops, from, refit, round, wide)                             \
    SUPER(name, .group = per, .rule = {lowest, highest, iq, lost}, .top = tops, .reach = from,                   \
          .starts = COUNT(from), .refits = refit, .rounds = round, .around = wide)
#define AFFINE(name, per, tops, largest, from, refit, round, wide)                                         \
    SUPER(name, .group = per, .affine = 1, .top = tops, .most = largest, .start = from,                    \
          .starts = COUNT(from), .refits = refit, .rounds = round, .around = wide)
#define NIBBLES(name, low, high, iq4, lost, reach)                                                                     \
    static void encode_##name(const float *x, const float *w, int64_t blocks, uint8_t *out) {                    \
        const struct rule r = {low, high, iq4, lost};                                                                  \
        if (w) encode_nibbles(x, w, blocks, out, r, reach, COUNT(reach), 1);                                     \
        else encode_nibbles(x, NULL, blocks, out, r, reach, COUNT(reach), 0);                                    \
    }

NIBBLES(q4_0, -8.0f, 7.0f, 0, 6, reach_q4_0)
NIBBLES(iq4_nl, 0, 0, 1, 4, reach_iq4)
LINEAR(q3_k, 16, -4.0f, 3.0f, 0, 6, 32.0f, reach_q3_k, 2, 3, 2)
LINEAR(q6_k, 16, -32.0f, 31.0f, 0, 5, 128.0f, reach_q6_k, 1, 2, 2)
LINEAR(iq4_xs, 32, 0, 0, 1, 4, 32.0f, reach_iq4, 1, 2, 1)
AFFINE(q2_k, 16, 3.0f, 15.0f, start_q2_k, 2, 3, 1)
AFFINE(q4_k, 32, 15.0f, 63.0f, start_q4_k, 1, 3, 2)
AFFINE(q5_k, 32, 31.0f, 63.0f, start_q5_k, 1, 3, 2)

static void fill_encode(struct kt_kernels *k) {
    k->encode[KT_FMT_Q8_0] = encode_q8_0;
    k->encode[KT_FMT_Q4_0] = encode_q4_0;
    k->encode[KT_FMT_IQ4_NL] = encode_iq4_nl;
    k->encode[KT_FMT_Q2_K] = encode_q2_k;
    k->encode[KT_FMT_Q3_K] = encode_q3_k;
    k->encode[KT_FMT_Q4_K] = encode_q4_k;
    k->encode[KT_FMT_Q5_K] = encode_q5_k;
    k->encode[KT_FMT_Q6_K] = encode_q6_k;
    k->encode[KT_FMT_IQ4_XS] = encode_iq4_xs;
}
