/* templates/tile_float.h: 16 rows of floats straight into an fp32 tile, in one text for AVX2 and AVX-512: the
 * includer brings tile_vec.h. The transpose comes first, on dwords as they lie in memory; then a dword of each row
 * becomes the one, two or four columns that it holds. */
#ifndef KT_TILE_FLOAT_IMPL_H
#define KT_TILE_FLOAT_IMPL_H

typedef int16_t halves16 __attribute__((vector_size(4 * W)));
typedef int8_t bytes8 __attribute__((vector_size(4 * W)));

/* A function that calls name_dword for every dword of 16 bytes of W rows, then of the next W. `each` columns a dword.
 * The last columns of a row go by way of padded copies. */
#define FLOAT_TILE(name, each)                                                                                       \
    INLINE void name##_piece(const struct rows *rows, size_t at, float *out) {                                       \
        vec v[4];                                                                                                    \
        columns4(rows, at, v);                                                                                       \
        for (int i = 0; i < 4; i++) name##_dword(v[i], out + i * (each)*KT_TILE);                                    \
    }                                                                                                                \
    static void tile_##name(const struct kt_matrix *w, int64_t first, int64_t k0, int64_t n,                         \
                             const struct kt_tile *to) {                                                             \
        const size_t size = 4 / (each);                                                                              \
        for (int r = 0; r < KT_TILE; r += W) {                                                                       \
            const uint8_t *p = w->data + (size_t)(first + r) * w->stride + (size_t)k0 * size;                        \
            const struct rows rows = rows_of(p, w->stride);                                                          \
            float *out = (float *)to->data + r;                                                                      \
            int64_t c = 0;                                                                                           \
            for (; c + 4 * (each) <= n; c += 4 * (each)) name##_piece(&rows, (size_t)c * size, out + c * KT_TILE);   \
            if (c == n) continue;                                                                                    \
            uint8_t rest[W][16] = {{0}};                                                                             \
            _Alignas(64) float last[4 * (each)*KT_TILE];                                                             \
            for (int i = 0; i < W; i++) memcpy(rest[i], row_at(&rows, i, (size_t)c * size), (size_t)(n - c) * size); \
            const struct rows padded = rows_of(rest[0], 16);                                                         \
            name##_piece(&padded, 0, last);                                                                          \
            for (; c < n; c++) memcpy(out + c * KT_TILE, last + c % (4 * (each)) * KT_TILE, 4 * W);                  \
        }                                                                                                            \
    }

INLINE void f32_dword(vec v, float *out) { store_f(out, (fvec)v); }
FLOAT_TILE(f32, 1)

INLINE void f16_dword(vec v, float *out) {
    store_f(out, halves(v, 0));
    store_f(out + KT_TILE, halves(v, 1));
}
FLOAT_TILE(f16, 2)

INLINE void bf16_dword(vec v, float *out) {
    store_f(out, (fvec)(v << 16));
    store_f(out + KT_TILE, (fvec)(v & 0xffff0000u));
}
FLOAT_TILE(bf16, 2)

/* e4m3 in the high byte of each half of v. As fp16 the same bits, one to the right, mean 2^-8 of it. nan: 0xff in
 * these bytes where they are one, which e4m3 has only two codes for. */
INLINE vec e4m3_halves(vec v, vec nan) { return ((vec)((halves16)v >> 1) & 0xbf80bf80u) | (nan & 0x7e007e00u); }

INLINE void f8_dword(vec v, float *out) {
    const vec nan = (vec)((bytes8)(v & 0x7f7f7f7fu) == 127);
    const vec even = e4m3_halves((vec)((halves16)v << 8), (vec)((halves16)nan << 8)), odd = e4m3_halves(v, nan);
    for (int i = 0; i < 2; i++) {
        store_f(out + 2 * i * KT_TILE, halves(even, i) * 256.0f);
        store_f(out + (2 * i + 1) * KT_TILE, halves(odd, i) * 256.0f);
    }
}
FLOAT_TILE(f8, 4)

static void scale_tile(float *v, int64_t n, int group, const float *scales) {
    for (int64_t c = 0; c < n; scales += KT_TILE)
        for (const int64_t end = c + group < n ? c + group : n; c < end; c++, v += KT_TILE)
            for (int r = 0; r < KT_TILE; r += W) store_f(v + r, *(const fvec *)(v + r) * *(const fvec *)(scales + r));
}

INLINE void fill_float_tiles(struct kt_kernels *k) {
    k->scale_tile = scale_tile;
    k->tile[KT_FMT_F32] = tile_f32;
    k->tile[KT_FMT_F16] = tile_f16;
    k->tile[KT_FMT_BF16] = tile_bf16;
    k->tile[KT_FMT_F8_E4M3] = tile_f8;
}

#endif
