/* sanitize_encode.h: the part of sanitize.c about encoding; included by it alone. */

/* Floats to blocks and back, from odd rows and with importances, on every instruction set: the same bytes. */
static void encode_case(kt_pool *pool, int type, int64_t rows, int64_t cols, int dtype, int weighted) {
    const size_t n = (size_t)(rows * cols), size = dtype == KT_F32 ? 4 : 2;
    const size_t bytes = n / (size_t)kt_type_block(type) * (size_t)kt_type_block_bytes(type);
    uint8_t *x = random_bytes(n * size) + 1, *out[2] = {malloc(bytes), malloc(bytes)};
    void *aligned = malloc(n * size);
    for (size_t i = 0; i < n * size; i++) /* below 2, of any magnitude */
        if (i % size == size - 1) x[i] = (uint8_t)(next() % 3 ? (x[i] & 0x80) | 0x3c : x[i] & 0xbf);
    memcpy(aligned, x, n * size);
    float *importance = weighted ? malloc((size_t)cols * 4) : NULL;
    for (int64_t i = 0; i < cols && weighted; i++) importance[i] = next() % 4 ? uniform() + 0.5f : 0.0f;
    for (int isa = 0; isa < kt_isa_count(); isa++) {
        if (!kt_isa_usable(isa)) continue;
        kt_isa_force(kt_isa_name(isa));
        check(kt_encode(pool, type, aligned, dtype, rows, cols, importance, out[isa > 0], bytes) == KT_OK, "encode");
        check(!isa || !memcmp(out[0], out[1], bytes), "encode: the same bytes on every instruction set");
    }
    float *back = malloc(n * 4);
    const kt_weight w = {.type = type, .rows = rows, .cols = cols, .data = out[0], .bytes = bytes};
    check(kt_dequantize(&w, back) == KT_OK, "encode: back");
    for (size_t i = 0; i < n; i++) check(isfinite(back[i]), "encode: finite");
    free(x - 1), free(aligned), free(importance), free(out[0]), free(out[1]), free(back);
}

static void encode_cases(kt_pool *pool) {
    for (int i = 0; i < BLOCKS; i++) {
        const int type = blocks[i].type;
        if (!kt_encodes(type)) continue;
        const int64_t block = kt_type_block(type);
        for (int64_t rows = 1; rows < 24; rows += 11)
            for (int dtype = 0; dtype < 3; dtype++)
                encode_case(pool, type, rows, block == 1 ? 67 : block * (1 + (rows + dtype) % 3), dtype, rows % 2);
    }
}

static void encode_errors(kt_pool *pool) {
    float x[256] = {1.0f}, bad[256] = {-1.0f};
    uint8_t out[144];
    const int type = KT_TYPE_Q4_K;
    check(kt_encode(NULL, type, x, KT_F32, 1, 256, NULL, out, 144) == KT_ERR_NULL, "null pool");
    check(kt_encode(pool, type, NULL, KT_F32, 1, 256, NULL, out, 144) == KT_ERR_NULL, "null x");
    check(kt_encode(pool, type, x, KT_F32, 1, 256, NULL, NULL, 144) == KT_ERR_NULL, "null out");
    check(kt_encode(pool, KT_TYPE_IQ1_S, x, KT_F32, 1, 256, NULL, out, 50) == KT_ERR_TYPE, "type");
    check(kt_encode(pool, type, x, 9, 1, 256, NULL, out, 144) == KT_ERR_DTYPE, "dtype");
    check(kt_encode(pool, type, x, KT_F32, 1, 255, NULL, out, 144) == KT_ERR_BLOCK, "block");
    check(kt_encode(pool, type, x, KT_F32, -1, 256, NULL, out, 144) == KT_ERR_SHAPE, "rows");
    check(kt_encode(pool, type, x, KT_F32, INT64_MAX, 256, NULL, out, 144) == KT_ERR_SHAPE, "huge");
    check(kt_encode(pool, type, x, KT_F32, 1, 256, NULL, out, 143) == KT_ERR_BYTES, "bytes");
    check(kt_encode(pool, type, x, KT_F32, 1, 256, bad, out, 144) == KT_ERR_VALUE, "importance");
    check(kt_encode(pool, type, x, KT_F32, 0, 256, NULL, NULL, 0) == KT_OK, "no rows");
    x[7] = 1e30f;
    check(kt_encode(pool, type, x, KT_F32, 1, 256, NULL, out, 144) == KT_ERR_RANGE, "range");
    x[9] = NAN;
    check(kt_encode(pool, type, x, KT_F32, 1, 256, NULL, out, 144) == KT_ERR_VALUE, "NaN");
}
