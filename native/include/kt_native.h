/* kt_native.h: the whole C API of the KTransformers CPU library.
 *
 * What it computes: y = x @ W^T (kt_linear) and routed experts (kt_experts_*), where W is read from the
 * bytes of a published checkpoint as they lie on disk: plain floats, GGUF's block formats, and safetensors' FP8, FP4
 * and integers with separate scales (compressed-tensors, GPTQ, AWQ).
 * What it never does: print, exit, raise a signal, or keep a copy of a weight.
 *
 * Letters: T tokens, H hidden size, I expert intermediate size, E experts, K experts per token,
 * G group of values that share one scale.
 *
 * Conventions
 *  - Functions that can fail return a kt_status; kt_status_message() says it in words.
 *  - Matrices are row-major and dense: weights [rows, cols] as GGUF stores them, activations [T, cols].
 *  - Weight bytes may lie at any address (safetensors maps are not aligned); ids, weights and
 *    activations need the natural alignment of their element type.
 *  - Memory stays the caller's: a kt_experts only keeps the weight pointers it was given.
 *  - A kt_pool serves one call at a time; concurrent calls on one pool wait for each other.
 *    After fork() the child's first call starts fresh workers.
 *  - Results do not depend on the number of threads, bit for bit.
 *
 * Numerics (met by portable C, equalled by every other instruction set up to fp32 summation order)
 *  - Float weights (F32, F16, BF16): products and sums in fp32 against the activations in fp32. One exception:
 *    with avx512_bf16, amx and neon_i8mm, BF16 weights meeting BF16 activations use a bf16 multiplier. It takes
 *    kt_linear's and the experts' inputs as they are; the experts' intermediates are rounded to bf16 (nearest even)
 * before    down. F32 and F16 activations are never rounded to bf16. F8_E4M3 weights use that multiplier too, on
 * those sets    for any number of tokens and with any activations, which are rounded to bf16; its sums are fp32.
 *  - Quantized weights: each 32 activations become int8 codes with one fp32 scale. They are rounded to nearest even so
 *    that the largest becomes 127, and again so that it becomes 126; the scale of either is the least squares fit, and
 *    the better of the two stays. Dot products inside a group are exact int32; groups are added in fp32. With a
 *    weight written as w = s*(u - z) - m (u the unsigned code, z the format's constant) a group adds
 *    s_a * (s*(sum u*a - z*sum a) - m*sum a).
 *  - A token whose activations, given or intermediate, hold an infinity or a NaN is computed in fp32 throughout, so
 *    that these go where IEEE arithmetic takes them; other tokens keep their bits.
 *  - Groups of activations whose largest magnitude is below 1e-36 count as zero.
 */
#ifndef KT_NATIVE_H
#define KT_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/* The Python binding parses the text between the next two marker lines. */
/* <cffi> */

typedef enum kt_status {
    KT_OK = 0,
    KT_ERR_NULL = 1,        /* a required pointer is NULL */
    KT_ERR_TYPE = 2,        /* weight type unknown to this library */
    KT_ERR_SHAPE = 3,       /* rows, cols, tokens or counts out of range, or matrices do not fit together */
    KT_ERR_BLOCK = 4,       /* cols is not a multiple of the type's block */
    KT_ERR_BYTES = 5,       /* byte length differs from what rows, cols and type need */
    KT_ERR_DTYPE = 6,       /* activation dtype unknown */
    KT_ERR_ACTIVATION = 7,  /* activation function unknown */
    KT_ERR_MEMORY = 8,      /* out of memory */
    KT_ERR_THREADS = 9,     /* thread count out of range, or threads cannot be started */
    KT_ERR_ISA = 10,        /* instruction set unknown, not built, or not on this machine */
    KT_ERR_SCALES = 11,     /* separate scales, zero points or column order do not fit the type */
    KT_ERR_CLOSED = 12,     /* the queue was closed before the calls were computed */
    KT_ERR_ROUTER = 13,     /* a router's way of scoring, choosing or weighing unknown, or its cap no number */
    KT_ERR_VALUE = 14,      /* a NaN or an infinity where there can be none, or an importance below zero */
    KT_ERR_RANGE = 15       /* a number too large for the type it shall have */
} kt_status;

/* Weight types: the ids of the GGUF file format; from 1000 on, types with separate scales. */
typedef enum kt_type {
    KT_TYPE_F32 = 0,
    KT_TYPE_F16 = 1,
    KT_TYPE_Q4_0 = 2,
    KT_TYPE_Q4_1 = 3,
    KT_TYPE_Q5_0 = 6,
    KT_TYPE_Q5_1 = 7,
    KT_TYPE_Q8_0 = 8,
    KT_TYPE_Q2_K = 10,
    KT_TYPE_Q3_K = 11,
    KT_TYPE_Q4_K = 12,
    KT_TYPE_Q5_K = 13,
    KT_TYPE_Q6_K = 14,
    KT_TYPE_IQ2_XXS = 16,
    KT_TYPE_IQ2_XS = 17,
    KT_TYPE_IQ3_XXS = 18,
    KT_TYPE_IQ1_S = 19,
    KT_TYPE_IQ4_NL = 20,
    KT_TYPE_IQ3_S = 21,
    KT_TYPE_IQ2_S = 22,
    KT_TYPE_IQ4_XS = 23,
    KT_TYPE_IQ1_M = 29,
    KT_TYPE_BF16 = 30,
    KT_TYPE_TQ1_0 = 34,
    KT_TYPE_TQ2_0 = 35,
    KT_TYPE_MXFP4 = 39,
    KT_TYPE_NVFP4 = 40,
    KT_TYPE_F8_E4M3 = 1000, /* OCP FP8 e4m3fn */
    KT_TYPE_F4_E2M1 = 1001, /* OCP FP4 e2m1, two a byte, low nibble first */
    KT_TYPE_I8 = 1002,      /* two's complement */
    KT_TYPE_I4 = 1003,      /* code - 8, two a byte, low nibble first (compressed-tensors) */
    KT_TYPE_GPTQ4 = 1004,   /* int32 [cols/8, rows]: a dword holds 8 columns of a row */
    KT_TYPE_GPTQ8 = 1005,   /* int32 [cols/4, rows] */
    KT_TYPE_AWQ4 = 1006,    /* int32 [cols, rows/8]: a dword holds rows 0 2 4 6 1 3 5 7 of a column */
    KT_TYPE_U8 = 1007       /* code - 128 (compressed-tensors) */
} kt_type;

/* Types of separate scales. */
typedef enum kt_scale {
    KT_SCALE_F32 = 0, KT_SCALE_F16 = 1, KT_SCALE_BF16 = 2,
    KT_SCALE_E8M0 = 3, /* 2^(code - 127) */
    KT_SCALE_E4M3 = 4
} kt_scale;

/* Activation dtypes, for inputs and outputs alike. */
typedef enum kt_dtype { KT_F32 = 0, KT_F16 = 1, KT_BF16 = 2 } kt_dtype;

/* Types of cached keys and values: the three of kt_dtype, and GGUF's q8_0 (34 bytes for 32 values). */
typedef enum kt_cache { KT_CACHE_Q8_0 = 3 } kt_cache;

/* What becomes of gate and up; x is gate, or up where there is no gate.
 * GELU is the erf form, GELU_TANH its tanh approximation, RELU2 max(x, 0)^2, each times up (alone without a gate).
 * SWIGLU_OAI (gpt-oss, MiniMax): x * sigmoid(alpha * x) * (up + 1). */
typedef enum kt_activation {
    KT_SILU = 0, KT_GELU = 1, KT_GELU_TANH = 2, KT_RELU = 3, KT_RELU2 = 4, KT_SWIGLU_OAI = 5
} kt_activation;

/* Between the projections of an expert. Before the activation, gate is cut to at most `limit` and up to
 * -limit .. limit; infinity for no limit. alpha: of SWIGLU_OAI. Biases are fp32: gate and up [E, I], down [E, H],
 * or NULL; they stay the caller's. */
typedef struct kt_glu {
    int32_t activation;
    float alpha, limit;
    const float *gate_bias, *up_bias, *down_bias;
} kt_glu;

/* What kt_bench_peak measures: fused multiply-adds on registers, nothing from memory. */
typedef enum kt_peak { KT_PEAK_INT8 = 0, KT_PEAK_BF16 = 1, KT_PEAK_F32 = 2 } kt_peak;

/* A packed weight matrix [rows, cols]. Dense (stride 0): `bytes` is exactly what rows, cols and type need. Otherwise
 * a row starts `stride` bytes after the one before, and `bytes` reaches at least to the end of the last. GPTQ and AWQ
 * are stored by columns: a stored row holds one index of packed columns, of all rows of the matrix.
 *
 * The fields from `scales` on are read for types from 1000 on only. Weight [r, c] meets the scale
 * [r / scale_rows, c / scale_cols] (GPTQ, AWQ: scales are [cols / scale_cols, rows]); scale_cols is a multiple of 16
 * (F8_E4M3: of 32) or all columns. `scale` multiplies everything (1 for none). `zeros`: zero points packed as the
 * checkpoint packs them (I4, U8: int32 [rows/8 or /4, groups]; GPTQ, AWQ: int32 [groups, rows/8 or /4]), one a scale,
 * with zero_bias (0 or 1) added to each; NULL: the type's own. `order` [cols]: the group of each column where they
 * are scattered (GPTQ act-order; at most 1024 groups); NULL: in order. */
typedef struct kt_weight {
    int32_t type;
    int64_t rows, cols;
    const void *data;
    size_t bytes;
    int64_t stride;
    const void *scales;
    size_t scale_bytes;
    int64_t scale_stride;
    int32_t scale_type;
    int64_t scale_rows, scale_cols;
    float scale;
    const void *zeros;
    size_t zero_bytes;
    int64_t zero_stride;
    int32_t zero_bias;
    const int32_t *order;
} kt_weight;

typedef struct kt_pool kt_pool;
typedef struct kt_experts kt_experts;

const char *kt_status_message(int status);

/* Weight types. name is NULL and the numbers are 0 for a type this library does not compute. */
const char *kt_type_name(int type);
int64_t kt_type_block(int type);
int64_t kt_type_block_bytes(int type);

/* Instruction sets, lowest first; index 0 is "portable". A set is usable when it is built, the processor
 * has it and the operating system saves its registers. kt_isa_force lowers (or raises again) the set in
 * use; calls already running keep theirs. "amx_emulated" is for tests, and in use only when asked for. */
int kt_isa_count(void);
const char *kt_isa_name(int index);
int kt_isa_usable(int index);
int kt_isa_active(void);
int kt_isa_force(const char *name);

/* The processor features that a set needs, one bit each. */
uint32_t kt_isa_needs(int index);

/* Processor features that the operating system enables too, one bit each. */
uint32_t kt_cpu_features(void);
const char *kt_cpu_feature_name(int bit);

/* Thread pool. `threads` counts the calling thread, which works too; 0 asks for kt_default_threads():
 * the cores this process may run on (affinity, one per physical core) within its cgroup's CPU quota. */
int kt_default_threads(void);
int kt_pool_create(int threads, kt_pool **pool);
int kt_pool_threads(const kt_pool *pool);
void kt_pool_destroy(kt_pool *pool);

/* The same with a say in where threads run. `bind`: workers are bound to cores and nodes (see threads.c; the caller
 * never is); 0 leaves every thread to the kernel. `nodes`: NULL for the machine's NUMA nodes, or a list of CPUs a node,
 * such as "0-3,8;4-7", taken at its word even where this machine has no such CPU. KT_ERR_THREADS if it is no list. */
int kt_pool_create_on(int threads, int bind, const char *nodes, kt_pool **pool);

/* Change the number of threads, 0 as above, looking at affinity and quota again; waits for the call under way. */
int kt_pool_resize(kt_pool *pool, int threads);

/* NUMA nodes that the pool spans, and the threads of one. */
int kt_pool_nodes(const kt_pool *pool);

int kt_pool_node_threads(const kt_pool *pool, int node);

/* Bytes of the scratch memory that all calls on this pool share; waits for a call under way. It grows to what the
 * largest call needed (at most about half a gigabyte) and does not depend on the number of weights or layers. */
size_t kt_pool_scratch_bytes(kt_pool *pool);

/* Queue: calls that one thread of the queue's own works off in order on its pool, while the caller does something
 * else, such as drive a GPU. The thread starts with the first submission. */
typedef struct kt_queue kt_queue;

/* The arguments of one kt_experts_forward, or of one kt_linear (`weight`, `bias`) where `experts` is NULL. */
typedef struct kt_call {
    kt_queue *queue;
    const kt_experts *experts;
    const int64_t *ids;
    int64_t per_token;
    const float *weights;
    const kt_weight *weight;
    const float *bias;
    const void *input;
    int32_t dtype;
    int64_t tokens;
    void *out;
    int64_t tag; /* anything: what kt_sync names a failed call by */
} kt_call;

/* For kt_sync_host. */
typedef struct kt_wait {
    kt_queue *queue;
    int64_t allow_pending;
} kt_wait;

int kt_queue_create(kt_pool *pool, kt_queue **queue);

/* Ends with the call that is being computed; those still waiting are dropped. Whoever waits in kt_sync or
 * kt_sync_host is woken (KT_ERR_CLOSED where what they waited for was dropped) and has left when this returns. From
 * then on kt_submit fails with KT_ERR_CLOSED, and so does kt_sync while calls are missing. Closing twice is fine. */
void kt_queue_close(kt_queue *queue);

/* kt_queue_close, and the end of the queue: no other call on it may begin. Before the pool's end. */
void kt_queue_destroy(kt_queue *queue);

/* Append a call. Copies *call and *call->weight; what they point to must stay until the call is done. `number`, if not
 * NULL, receives its place: 1, 2, 3, ... What is wrong with the arguments shows at kt_sync. */
int kt_submit(const kt_call *call, int64_t *number);

/* Wait until at most `allow_pending` of the calls submitted so far are unfinished. Returns the status of the first call
 * that failed since the last kt_sync, its number in `failed` (0 if it could not even be submitted) and its tag in `tag`,
 * if these are not NULL; later ones are computed all the same. After fork() the child computes what was pending, starting here. */
int kt_sync(kt_queue *queue, int64_t allow_pending, int64_t *failed, int64_t *tag);

/* How many calls are finished: all numbers up to this one. */
int64_t kt_queue_done(kt_queue *queue);

/* kt_submit(user, NULL) and kt_sync as CUDA host functions (cudaLaunchHostFunc): `user` is a kt_call * or a kt_wait *
 * that must stay as long as the graph. Failures wait for the next kt_sync. */
void kt_submit_host(void *user);
void kt_sync_host(void *user);

/* out[T, rows] = x[T, cols] @ w^T + bias. `bias` is fp32 [rows] or NULL; x and out share `dtype`. */
int kt_linear(kt_pool *pool, const kt_weight *w, const float *bias, const void *x, int dtype, int64_t tokens,
              void *out);

/* d_x[T, cols] = d_y[T, rows] @ w: the gradient of x from that of kt_linear's result. Sums are fp32, of the weights and
 * d_y in fp32; on sets with a bf16 multiplier both are rounded to bf16, but never weights of F32 and F16, nor BF16 ones
 * where dtype is not bf16. */
int kt_linear_backward(kt_pool *pool, const kt_weight *w, const void *d_y, int dtype, int64_t tokens, void *d_x);

/* E routed experts: out = sum_k weights[t,k] * (down_e(act(gate_e(x)) * up_e(x)) + bias), e = ids[t,k].
 * gate, up: E matrices [I, H]; down: E matrices [H, I]. The three may differ in type, and so may experts. gate NULL:
 * experts without a gate, act(up_e(x)). */
int kt_experts_create(int64_t count, const kt_weight *gate, const kt_weight *up, const kt_weight *down,
                      const kt_glu *glu, kt_experts **experts);
void kt_experts_destroy(kt_experts *experts);

/* hidden, out [T, H] of `dtype`; ids int64 [T, K]; weights fp32 [T, K]. An id outside 0..E-1 is skipped;
 * an id that occurs twice in a row counts twice. out may not overlap hidden. */
int kt_experts_forward(const kt_experts *experts, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                       const int64_t *ids, int64_t per_token, const float *weights, void *out);

/* A low-rank adapter of all experts (Hu et al. 2021): y += scale * (x A') B' beside a product y = x W'. a [E, rank, in]
 * and b [E, out, rank], fp32, dense; grad_a and grad_b of the same shapes, to which a backward call adds. */
typedef struct kt_lora {
    int64_t rank;
    float scale;
    const float *a, *b;
    float *grad_a, *grad_b;
} kt_lora;

/* kt_experts_forward with adapters, each or NULL: `first` of what multiplies hidden, out being I rows of gate (where
 * there is one) and then I of up; `down` of down. Their own products are fp32. */
int kt_experts_forward_lora(const kt_experts *experts, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                            const int64_t *ids, int64_t per_token, const float *weights, const kt_lora *first,
                            const kt_lora *down, void *out);

/* Gradients of it from d_out [T, H], that of its result. hidden, ids, weights, adapters as given to it; d_out and
 * d_hidden [T, H] of dtype, d_weights fp32 [T, K] or NULL. Weights and biases are frozen. Gate and up are computed again
 * as the forward call computes them; all else as kt_linear_backward says. Where a clamp cuts, nothing passes. A skipped
 * id adds nothing, and its weight gets 0. d_hidden may not overlap hidden or d_out. */
int kt_experts_backward(const kt_experts *experts, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                        const int64_t *ids, int64_t per_token, const float *weights, const void *d_out,
                        const kt_lora *first, const kt_lora *down, void *d_hidden, float *d_weights);

/* Which experts a token goes to, and with which weights. logit = norm(x) @ weight^T + bias; then cap * tanh(logit / cap).
 * A score is the logit, or this of all logits. Experts are chosen by key: by score, or by score or logit plus
 * choice_bias; of `groups` groups of equal size only the experts of the groups_kept best can be, and the keys of others
 * are `masked` (-infinity or 0). Equals go by ascending id; a NaN counts as larger than any number. The weights of the
 * chosen, their scores or the softmax or sigmoid of their logits, are divided and multiplied by `factor` and
 * factors[id]. */
typedef enum kt_scoring {
    KT_SCORE_NONE = 0, KT_SCORE_SOFTMAX = 1, KT_SCORE_SIGMOID = 2, KT_SCORE_SQRTSOFTPLUS = 3
} kt_scoring;
typedef enum kt_bias_on { KT_BIAS_ON_NONE = 0, KT_BIAS_ON_SCORE = 1, KT_BIAS_ON_LOGIT = 2 } kt_bias_on;
typedef enum kt_group_by { KT_GROUP_MAX = 0, KT_GROUP_BEST2 = 1 } kt_group_by; /* its largest key, or the sum of two */
typedef enum kt_weigh { KT_WEIGH_SCORE = 0, KT_WEIGH_SOFTMAX = 1, KT_WEIGH_SIGMOID = 2 } kt_weigh;
typedef enum kt_divide {
    KT_DIVIDE_NONE = 0,
    KT_DIVIDE_SUM = 1,  /* by their sum + divide_by */
    KT_DIVIDE_CLAMP = 2 /* by their sum, or by divide_by where that is more */
} kt_divide;

/* Vectors are fp32 and stay the caller's; those that may be NULL are absent then. */
typedef struct kt_router_desc {
    const kt_weight *weight; /* [E, H] */
    const float *bias;       /* [E] or NULL */
    const float *norm;       /* [H] or NULL: x * rsqrt(mean(x^2) + norm_eps) * norm * norm_factor first */
    float norm_eps, norm_factor;
    int32_t round;           /* 1: normed x and logits are rounded to hidden's dtype, as a model of that dtype has them */
    float cap;               /* 0: none */
    int32_t top_k;           /* K */
    int32_t score, bias_on;  /* kt_scoring, kt_bias_on */
    const float *choice_bias; /* [E], or NULL where bias_on is KT_BIAS_ON_NONE */
    int32_t groups, groups_kept, group_by; /* groups 0: none */
    float masked;
    int32_t weigh, divide;   /* kt_weigh, kt_divide */
    float divide_by, factor;
    const float *factors;    /* [E] or NULL */
} kt_router_desc;

typedef struct kt_router kt_router;

/* Copies what `desc` holds, but not what it points to. */
int kt_router_create(const kt_router_desc *desc, kt_router **router);
void kt_router_destroy(kt_router *router);

/* hidden [T, H] of `dtype` -> ids int64 [T, K], weights fp32 [T, K], and logits fp32 [T, E] if not NULL. */
int kt_router_forward(const kt_router *router, kt_pool *pool, const void *hidden, int dtype, int64_t tokens,
                      int64_t *ids, float *weights, float *logits);

/* A block of experts: out = factor * experts(hidden, router(hidden)) + shared_factor * s * shared(hidden). `shared` is
 * one expert, of an inner size of its own, or NULL; s = sigmoid(hidden @ shared_gate^T), [1, H], or 1 without one.
 * Sums are fp32. The parts stay the caller's and must outlive the block. */
typedef struct kt_moe_desc {
    const kt_router *router;
    const kt_experts *experts, *shared;
    const kt_weight *shared_gate;
    float factor, shared_factor;
} kt_moe_desc;

typedef struct kt_moe kt_moe;

int kt_moe_create(const kt_moe_desc *desc, kt_moe **moe);
void kt_moe_destroy(kt_moe *moe);

/* hidden, out [T, H] of `dtype`; out may not overlap hidden. weights, if not NULL: the router's, fp32 [T, K]. */
int kt_moe_forward(const kt_moe *moe, kt_pool *pool, const void *hidden, int dtype, int64_t tokens, void *out,
                   float *weights);

/* Read the weights in, each row by a thread of the NUMA node that will compute it: pages of a mapped file that are not
 * in memory yet come to lie on that node; those that are stay where they are. Takes as long as reading the file. */
int kt_experts_place(const kt_experts *experts, kt_pool *pool);

/* Self-attention. Keys and values of a sequence lie in pages of 64 tokens; a page holds all heads of one layer. type: a
 * kt_dtype or KT_CACHE_Q8_0. In a page: bytes from a head to the next, and from a token to the next. */
typedef struct kt_kv_layout {
    int32_t type;
    int64_t key_head, value_head, key_row, value_row;
} kt_kv_layout;

/* A sequence in one layer: its pages (where head 0 of their first token is), the tokens in them, and the first token
 * that can still be seen (padding on the left, or pages given back by a window). */
typedef struct kt_sequence {
    void *const *keys, *const *values;
    int64_t length, start;
} kt_sequence;

typedef enum kt_part { KT_Q = 0, KT_K = 1, KT_V = 2, KT_G = 3, KT_O = 4 } kt_part;

/* What the heads' sum is multiplied by, through a kt_gate_by: nothing; the second half of each head's rows of q; a value
 * each from the matrix g; one a head from it. */
typedef enum kt_gate { KT_GATE_NONE = 0, KT_GATE_IN_Q = 1, KT_GATE_ELEMENTS = 2, KT_GATE_HEADS = 3 } kt_gate;
typedef enum kt_gate_by { KT_GATE_SIGMOID = 0, KT_GATE_SOFTPLUS = 1 /* log(1 + e^x) */ } kt_gate_by;

/* Rotary positions (Su et al. 2021) of the first values of a head: which two turn together, and where they lie after. */
typedef enum kt_pairs {
    KT_PAIRS_HALVES = 0,    /* half of the rotated part apart */
    KT_PAIRS_NEIGHBOURS = 1,
    KT_PAIRS_PARTED = 2,    /* neighbours before, half apart after */
    KT_PAIRS_NONE = 3       /* nothing turns */
} kt_pairs;

/* An attention module, A heads of queries on C heads of keys and values. q [A*D, H] ([A*2*D, H] with KT_GATE_IN_Q), k
 * [C*D, H], v [C*V, H], o [H, A*V], g [A*V or A, H]. bias: fp32 by kt_part, or NULL. q_norm and k_norm: fp32 [D], of
 * each head, or with norm_whole of all heads at once [A*D] and [C*D]; NULL for none; norm_last: after the rotation.
 * scale multiplies scores. window: tokens that a query sees, itself included, 0 for all. sinks: fp32 [A], logits that
 * take part in the softmax and have no value. clip: q, k, v are cut to -clip .. clip after norms of all heads at once,
 * before any of each; 0 for not. v_norm: fp32 [V] or NULL, of each head of v; value_factor multiplies v, 0 for not. Biases,
 * norms and sinks stay the caller's. */
typedef struct kt_attention_desc {
    kt_weight q, k, v, g, o;
    const float *bias[5];
    const float *q_norm, *k_norm, *v_norm, *sinks;
    int32_t norm_whole, norm_last, gate, gate_by, rotary_pairs;
    float eps, scale, clip, value_factor;
    int64_t heads, kv_heads, size, value_size, window;
} kt_attention_desc;

/* Multi-head latent attention (DeepSeek-V2). A heads, L size of a latent, N and R (rotary) sizes of a query's parts
 * without and with a position, V value_size. q [A*(N+R), H], or with q_a [Q, H] (q_a.data not NULL) [A*(N+R), Q] of its
 * normed results, or [A*(N+R), 2*Q] of these and then the results themselves; with KT_GATE_IN_Q each head has V rows more
 * in q; kv_a [L+R, H]; kv_b [A*(N+V), L], of type F32, F16, BF16 or Q8_0: for each head N rows that make keys of
 * latents, then V that make values; o [H, A*V]; g [A*V or A, H] with such a gate. L is a multiple of 16. bias: fp32 by
 * kt_part or NULL, of KT_Q (of q_a, where there is one), KT_K (kv_a), KT_G, KT_O. q_norm [Q] and kv_norm [L]: fp32, and
 * key_norm [R] or NULL, of the part of a key that turns, before it does. All stay the caller's. The cache keeps a row [L + R] a token, of one head: its latent, normed, and its key, turned; the
 * layout's key_row and `keys` of a sequence say where, and `values` is not read. */
typedef struct kt_latent_desc {
    kt_weight q_a, q, kv_a, kv_b, g, o;
    const float *bias[5];
    const float *q_norm, *kv_norm, *key_norm, *sinks;
    float q_eps, kv_eps, key_eps, scale;
    int32_t gate, gate_by, rotary_pairs;
    int64_t heads, latent, plain, rotary, value_size, window;
} kt_latent_desc;

typedef struct kt_attention kt_attention;

/* One call on batch x tokens rows of dtype. cos and sin: angles of each token, of `rotary` rotated values; the first
 * rotary / 2 numbers of a row are read; rotary_row and rotary_batch: numbers from a token and a sequence to the next
 * (0: alike). cos NULL: no positions. sequences: one for each of the batch, with room for the new tokens, which get
 * the places from `length` on. q_factor: fp32 [batch][tokens] that queries are multiplied by after norms and rotation, or
 * NULL; q_factor_batch: numbers from a sequence to the next (0: alike); of grouped queries alone. window: instead of the
 * attention's own, where it is not 0. mask: NULL for causal; else bytes [batch][tokens][keys from mask_first on], nonzero
 * for what is seen, instead of causality and window; mask_batch 0: one for all. like: for kt_layers_forward. */
typedef struct kt_attention_call {
    int32_t dtype, rotary_dtype, like;
    int64_t batch, tokens;
    const void *cos, *sin;
    int64_t rotary, rotary_row, rotary_batch;
    kt_sequence *sequences;
    kt_kv_layout layout;
    int64_t window;
    const uint8_t *mask;
    int64_t mask_batch, mask_row, mask_first;
    const float *q_factor;
    int64_t q_factor_batch;
} kt_attention_call;

int kt_attention_create(const kt_attention_desc *desc, kt_attention **attention);
int kt_latent_attention_create(const kt_latent_desc *desc, kt_attention **attention);
void kt_attention_destroy(kt_attention *attention);

/* hidden, out [batch, tokens, H]; out may be hidden. Fills the cache; when all went well, raises the sequences' length. */
int kt_attention_forward(const kt_attention *attention, kt_pool *pool, const kt_attention_call *call,
                         const void *hidden, void *out);

/* A gated delta net (Yang et al. 2024), for the step of one new token a sequence. G key heads of size K, A value heads
 * of size V, R = A / G of these on each key head; channels are q [G*K], k [G*K], v [A*V], and each is convolved with its
 * own last `width` values. inputs: KT_DELTA_SPLIT: qkv [2*G*K + A*V, H], z [A*V, H], b [A, H], a [A, H];
 * KT_DELTA_BY_HEAD: for each key head q [K], k [K], v [R*V], z [R*V] in the first matrix and b [R], a [R] in the second,
 * and no more. out [H, A*V]. in_bias of each and out_bias: fp32 or NULL. conv: fp32 [channels][width]; conv_bias
 * [channels] or NULL. rate [A] and dt_bias [A]: a state decays by e^(-rate * log(1 + e^(a + dt_bias))). norm [V],
 * norm_eps: RMSNorm of each head, before it is multiplied by z * sigmoid(z); l2_eps is added to the square sums of q
 * and k. All stay the caller's. */
typedef enum kt_delta_order { KT_DELTA_SPLIT = 0, KT_DELTA_BY_HEAD = 1 } kt_delta_order;

typedef struct kt_delta_net_desc {
    kt_weight inputs[4], out;
    const float *in_bias[4], *out_bias;
    const float *conv, *conv_bias, *rate, *dt_bias, *norm;
    float norm_eps, l2_eps;
    int32_t order;
    int64_t key_heads, value_heads, key_size, value_size, width;
} kt_delta_net_desc;

typedef struct kt_delta_net kt_delta_net;

/* What is kept of the sequences, changed in place: their last inputs to the convolution, [batch][channels][width] of
 * conv_dtype, the newest last; and fp32 [batch][A][K][V]. */
typedef struct kt_delta_net_call {
    int32_t dtype, conv_dtype;
    int64_t batch;
    void *conv;
    float *state;
} kt_delta_net_call;

int kt_delta_net_create(const kt_delta_net_desc *desc, kt_delta_net **net);
void kt_delta_net_destroy(kt_delta_net *net);

/* hidden, out [batch, H] of dtype; out may be hidden. Where something fails, nothing kept has changed. */
int kt_delta_net_forward(const kt_delta_net *net, kt_pool *pool, const kt_delta_net_call *call, const void *hidden,
                         void *out);

/* x / sqrt(mean(x^2) + eps) * weight with fp32 weights [H]; centered: of x - mean(x). No norm where weight is NULL. */
typedef struct kt_row_norm {
    const float *weight;
    float eps;
    int32_t centered;
} kt_row_norm;

/* How a part of a layer joins the sum: x = keep * x + factor * after(part(before(x))). */
typedef struct kt_joining {
    kt_row_norm before, after;
    float keep, factor;
} kt_joining;

/* A decoder layer: attention or, where that is NULL, a delta net joins the sum, then an MLP, which is a block of experts
 * or, where that is NULL, a dense one (a kt_experts of one expert). parallel: both see the sum as it was before either joins. All stay the caller's. */
typedef struct kt_layer_desc {
    const kt_attention *attention;
    const kt_delta_net *delta_net;
    const kt_moe *moe;
    const kt_experts *mlp;
    kt_joining first, second;
    int32_t parallel;
} kt_layer_desc;

typedef struct kt_layer kt_layer;

int kt_layer_create(const kt_layer_desc *desc, kt_layer **layer);
void kt_layer_destroy(kt_layer *layer);

/* Layers one after the other, and the norm after the last of them. calls: one a layer, with its own sequences, layout and
 * window; all else of a layer's call is that of calls[its like], and like is at most the layer's own number. Of a delta
 * net's layer there is just its dtype, batch and tokens, one a sequence. nets: one a layer, for its conv_dtype, conv and
 * state; NULL where no layer has a delta net. */
typedef struct kt_stack {
    int64_t count;
    const kt_layer *const *layers;
    const kt_attention_call *calls;
    const kt_delta_net_call *nets;
    kt_row_norm norm;
} kt_stack;

/* hidden, out [batch, tokens, H]; out may be hidden. The sum between the layers is in fp32. Lengths are raised in all
 * layers, or where something fails in none; then what delta nets of layers before it keep has changed all the same. */
int kt_layers_forward(const kt_stack *stack, kt_pool *pool, const void *hidden, void *out);

/* Attention of one sequence's last `queries` of `length` cached tokens. Pages of 64 tokens: keys[p] points to token 64*p
 * of head 0, from where heads are key_head and tokens key_row bytes apart; values likewise, and may be the same memory.
 * Visible are tokens start .. length: query i sees those up to length - queries + i, or, where mask is not NULL, those
 * whose byte mask[i * mask_row + token] is not zero, and neither causality nor the window counts. Its queries are rows
 * query .. query + queries of q and out. */
typedef struct kt_attention_sequence {
    const void *const *keys, *const *values;
    int64_t key_head, value_head, key_row, value_row;
    int64_t query, queries, start, length;
    const uint8_t *mask;
    int64_t mask_row;
} kt_attention_sequence;

/* q fp32 [tokens][heads][size], q_stride floats from a token to the next; out fp32 [tokens][heads][value_size]. Head h
 * meets head h / (heads / kv_heads) of keys and values, of `type` (kt_dtype or kt_cache). scale: of the scores. window
 * (0: none): the query at position p sees tokens > p - window. sinks [heads] or NULL: each adds e^sink to the
 * denominator of its head. */
typedef struct kt_attention_args {
    int32_t type;
    int64_t heads, kv_heads, size, value_size;
    float scale;
    int64_t window;
    const float *sinks;
    const float *q;
    int64_t q_stride;
    float *out;
    int64_t out_stride;
    const kt_attention_sequence *sequence;
    int64_t sequences;
} kt_attention_args;

/* softmax(scale * q K^T) V. Scores and sums are fp32; with avx512_bf16 and amx, BF16 caches meet queries and weights
 * that are rounded to bf16. A query that sees no token gets zeros. */
int kt_attention_core(kt_pool *pool, const kt_attention_args *args);

/* out[rows, cols] = the weight's values in fp32. */
int kt_dequantize(const kt_weight *w, float *out);

/* The place of the largest of x[count] of dtype, the first of several; of a NaN, where there is one. */
int kt_argmax(const void *x, int dtype, int64_t count, int64_t *at);

/* Rows `ids` of an embedding table as `dtype`: out [count, cols]. KT_ERR_SHAPE for an id that is no row. */
int kt_embed(const kt_weight *w, const int64_t *ids, int64_t count, void *out, int dtype);

/* x [rows, cols] of `dtype` to a packed type; out_bytes: exactly what rows, cols and type need. importance: fp32 [cols],
 * how much a squared error in each column counts, or NULL for alike; plain types and Q8_0 have no choice and ignore it.
 * Scales are searched (src/templates/encode.h); blocks are encoded each for itself, the same bits on any number of
 * threads and any instruction set. Q8_0 has the bytes of the gguf package. In packed blocks magnitudes below 2^-40
 * count as zero. NaN and infinity stay in plain types; in others they are KT_ERR_VALUE, in an importance too. A finite
 * number that the type cannot hold is KT_ERR_RANGE, never an infinity; where a matrix has both, KT_ERR_VALUE. After
 * either, out holds anything. x at the alignment of its dtype, out of plain types too. Out may not overlap x.
 * Scratch memory: 32 KiB a thread, and cols floats. */
int kt_encode(kt_pool *pool, int type, const void *x, int dtype, int64_t rows, int64_t cols, const float *importance,
              void *out, size_t out_bytes);

/* Whether kt_encode writes a type. */
int kt_encodes(int type);

/* 1: every product in fp32, of dequantized weights and fp32 activations, on every path: for verification, slow.
 * 0: back to what the numerics above say. For the whole process; calls already running keep theirs. */
void kt_set_exact(int on);

/* For tests and tuning: tokens per matrix from which the prefill path (unpack a panel, then GEMM) replaces
 * the decode path (dot products over packed bytes). 0 restores the measured default of each type. */
void kt_set_panel_threshold(int tokens);

/* Measurements. kt_bench_read streams `bytes` from `data` once over the pool's threads; the result only
 * keeps the compiler honest. kt_bench_peak runs register-only multiply-adds of the active instruction set on
 * every thread and returns the operations done (2 per multiply-add), 0 where the set has none of that kind. */
uint64_t kt_bench_read(kt_pool *pool, const void *data, size_t bytes);
double kt_bench_peak(kt_pool *pool, int kind, int64_t iterations);

/* </cffi> */

#endif
