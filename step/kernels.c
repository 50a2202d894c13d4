// The inner loops of a training step on a CPU: attention, RMSNorm, SwiGLU and the losses' softmax, forward and backward.
//
//     kernels.py compiles this file for the processor at hand and calls it; model.py and losses.py are its specification.
//
// PyTorch does the matrix products, at the rate of the machine. What lies between them would take as long again and
// more at these sizes: each operation reads and writes all activations, and attention over heads of 8 numbers leaves
// most of a vector register empty. Here each row is read once, computed on in the first-level cache, and written once.
//
// Activations are float32 or bfloat16 (`bf16`); all arithmetic is float32. Every sum has an order of its own that does
// not depend on how many threads there are, so a run repeats to the bit. Functions return 0, or -1 where memory is short.
//
// B batch, T positions, N = B T rows, D dim, H query heads, G key/value heads, hd head dim, V vocabulary.
//
// What this leaves out on purpose: matrix products, dropout but that of attention, devices that are not CPUs.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };  // numbers in a register
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { KEYS = 8 };         // keys that attention looks at together
enum { ROW_BLOCK = 256 };  // rows that share a partial sum of a weight's gradient
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

static const float LOG2E = 1.44269504088896341f, LOWEST = -1e30f;  // the latter: less than any score, and finite

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }  // to whole registers of every width

static inline Floats all(float x) { return x - (Floats){0}; }  // minus, since -0 + 0 is 0

static inline Floats either(Ints mask, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

static inline Floats larger(Floats a, Floats b) {  // b where one of them is a NaN
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);  // which compilers do not find in the other line
#else
    return either(a > b, a, b);
#endif
}

static inline Floats *at(float *x, int64_t i) { return (Floats *)(void *)(x + i); }

static float sum_of(Floats x) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static float largest_of(Floats x) {
    float max = x[0];
    for (int i = 1; i < LANES; i++) max = x[i] > max ? x[i] : max;
    return max;
}

// 2^x within 2e-7 of itself for x in [-126, 127]; 2^-126 below. A NaN of arithmetic stays one.
// 2^x = 2^k 2^f, k the nearest whole number: adding 1.5 * 2^23 rounds, and leaves k in the low bits of the sum.
static inline Floats exp2_of(Floats x) {
    const Floats magic = all(12582912.0f);
    x = larger(all(-126.0f), x);
    Floats shifted = x + magic, f = x - (shifted - magic);  // f in [-1/2, 1/2]
    Floats p = all(1.535336188e-4f);                        // minimax polynomial of 2^f
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    return (Floats)((Ints)p + (((Ints)shifted - (Ints)magic) << 23));
}

static inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp2_of(larger(x, all(-87.0f)) * -LOG2E)); }

// n activations from index i on, as float32.
static inline void read_row(float *to, const void *from, int64_t i, int64_t n, int bf16) {
    if (bf16) {
        const uint16_t *x = (const uint16_t *)from + i;
        for (int64_t j = 0; j < n; j++) {
            uint32_t bits = (uint32_t)x[j] << 16;
            memcpy(to + j, &bits, 4);
        }
    } else {
        memcpy(to, (const float *)from + i, (size_t)n * 4);
    }
}

// And back; to the nearest bfloat16, ties to even, a NaN to a NaN.
static inline void write_row(void *to, int64_t i, const float *from, int64_t n, int bf16) {
    if (bf16) {
        uint16_t *x = (uint16_t *)to + i;
        for (int64_t j = 0; j < n; j++) {
            uint32_t bits;
            memcpy(&bits, from + j, 4);
            uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            x[j] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
        }
    } else {
        memcpy((float *)to + i, from, (size_t)n * 4);
    }
}

// A cache line's border for each of `rows` rows of padded(n) floats, for each thread; NULL where memory is short.
static float *scratch(int64_t rows, int64_t n) {
    size_t bytes = (size_t)(omp_get_max_threads() * rows * padded(n)) * 4;
    float *p = aligned_alloc(64, bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

static float *mine(float *all_threads, int64_t rows, int64_t n) {
    return all_threads + omp_get_thread_num() * rows * padded(n);
}

// Keeps freed memory for the next step, which needs as much again, instead of giving it back to the system: having each
// page cleared anew takes a tenth of a step. Only glibc gives it back so eagerly.
void keep_freed_memory(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
    mallopt(M_TOP_PAD, 1 << 26);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Causal attention with rotary embedding and grouped heads (model.Attention), never holding a T x T matrix
// (FlashAttention, arXiv 2205.14135 and 2307.08691)
//
// qkv: (B, T, (H + 2 G) hd), the rows of q, k and v before rotation; y: (B, T, H hd); log_sum: (B, H, T), of 2^score;
// cos, sin: (T, hd / 2). A register holds one number of LANES queries; keys and values come one number at a time, for all
// queries at once. So a head of 8 numbers fills the registers as well as one of 64. Scores are in units of log2, so that
// their exponential is 2^x.
//
// dropout, in [0, 1): the share of probabilities that are set to 0, the others growing by 1 / (1 - dropout). Which ones, a
// hash of `seed` and their place says: so no mask is kept, and backward finds the same.

typedef struct {
    const void *qkv;
    const float *cos, *sin;
    int64_t T, H, G, hd;
    int bf16;
    uint64_t seed;
    uint32_t dropped;  // hashes below it are: dropout * 2^32
    float kept;        // 1 / (1 - dropout)
    float scale;       // of queries, for scores in units of log2
} Attention;

static Attention attention_of(const void *qkv, const float *cos, const float *sin, int64_t T, int64_t H, int64_t G,
                              int64_t hd, int64_t bf16, int64_t seed, double dropout) {
    return (Attention){qkv, cos, sin, T, H, G, hd, (int)bf16, (uint64_t)seed, (uint32_t)(dropout * 0x1p32),
                       (float)(1.0 / (1.0 - dropout)), LOG2E / sqrtf((float)hd)};
}

static int64_t row_of(const Attention *a, int64_t b, int64_t t, int64_t head) {  // head: q 0..H-1, then k, then v
    return ((b * a->T + t) * (a->H + 2 * a->G) + head) * a->hd;
}

// Turns the pairs of a row at position t by their angles; direction -1 turns them back.
static inline void turn(const Attention *a, float *row, int64_t t, float direction) {
    int64_t half = a->hd / 2;
    const float *cos = a->cos + t * half, *sin = a->sin + t * half;
    for (int64_t j = 0; j < half; j++) {
        float even = row[2 * j], odd = row[2 * j + 1], s = direction * sin[j];
        row[2 * j] = even * cos[j] - odd * s;
        row[2 * j + 1] = even * s + odd * cos[j];
    }
}

// Keys, turned, and values of head g: (T, hd) each, at a stride of `stride` floats a row.
static void read_keys(const Attention *a, int64_t b, int64_t g, float *K, float *V, int64_t stride) {
    for (int64_t t = 0; t < a->T; t++) {
        read_row(K + t * stride, a->qkv, row_of(a, b, t, a->H + g), a->hd, a->bf16);
        turn(a, K + t * stride, t, 1.0f);
        read_row(V + t * stride, a->qkv, row_of(a, b, t, a->H + a->G + g), a->hd, a->bf16);
    }
}

// The query of head h at position t, turned and scaled.
static inline void read_query(const Attention *a, int64_t b, int64_t t, int64_t h, float *q) {
    read_row(q, a->qkv, row_of(a, b, t, h), a->hd, a->bf16);
    turn(a, q, t, 1.0f);
    for (int64_t d = 0; d < a->hd; d++) q[d] *= a->scale;
}

// out[j] += x (LANES queries' rows, transposed) times row j of `rows`.
static inline void products(Floats out[KEYS], const Floats *x, const float *rows, int64_t hd, int64_t stride) {
    for (int64_t d = 0; d < hd; d++)
        for (int j = 0; j < KEYS; j++) out[j] += x[d] * rows[j * stride + d];
}

// out[d] += the sum over keys j of weight[j] times rows[j][d].
static inline void add_weighted(Floats *out, const Floats weight[KEYS], const float *rows, int64_t hd, int64_t stride) {
    for (int64_t d = 0; d < hd; d++) {
        Floats sum = out[d];
        for (int j = 0; j < KEYS; j++) sum += weight[j] * rows[j * stride + d];
        out[d] = sum;
    }
}

// out[j][:] += the sum over queries r of weight[j][r] times rows[r][:].
static inline void add_over_queries(float *out, const Floats weight[KEYS], const float *rows, int64_t stride) {
    for (int64_t d = 0; d < stride; d += 8)
        for (int j = 0; j < KEYS; j += 4) {
            Eight sum[4];
            for (int i = 0; i < 4; i++) sum[i] = *(Eight *)(void *)(out + (j + i) * stride + d);
            for (int r = 0; r < LANES; r++) {
                Eight x = *(const Eight *)(const void *)(rows + r * stride + d);
                for (int i = 0; i < 4; i++) sum[i] += x * ((const float *)(weight + j + i))[r];
            }
            for (int i = 0; i < 4; i++) *(Eight *)(void *)(out + (j + i) * stride + d) = sum[i];
        }
}

// Whether query t0 + r may see key k + j, for all r.
static inline Ints sees(int64_t t0, int64_t key) {
    Ints first;
    for (int r = 0; r < LANES; r++) first[r] = r;
    return first >= (int32_t)(key - t0);
}

// Bits that look random for any x: lowbias32 (Wellons, "Prospecting for hash functions").
static inline Bits hashed(Bits x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// The hash of query t0 + r of head h, for all r.
static inline Bits hash_of_queries(const Attention *a, int64_t b, int64_t h, int64_t t0) {
    Bits row;
    for (int r = 0; r < LANES; r++) row[r] = (uint32_t)((b * a->H + h) * a->T + t0 + r);
    return hashed(row + (uint32_t)a->seed) ^ (uint32_t)(a->seed >> 32);
}

// What the probability of `key` is multiplied by: 0 where it is dropped.
static inline Floats dropout_of(const Attention *a, Bits queries, int64_t key) {
    Bits bits = hashed(queries ^ (uint32_t)key * 0x9e3779b9u);  // an odd number, so no two keys of a row are one
    return either((Ints)(bits >= a->dropped), all(a->kept), all(0.0f));
}

int attention_forward(const void *qkv, const float *cos, const float *sin, void *y, float *log_sum, int64_t B, int64_t T,
                      int64_t H, int64_t G, int64_t hd, int64_t bf16, int64_t seed, double dropout) {
    const Attention a = attention_of(qkv, cos, sin, T, H, G, hd, bf16, seed, dropout);
    const int64_t stride = (hd + 7) / 8 * 8, keys = padded(T + KEYS), tasks = B * G;  // rows of zeros follow the keys
    const int64_t size = 2 * keys * stride + (2 * LANES + 1) * stride;
    float *all_threads = scratch(1, size);
    if (!all_threads) return -1;
#pragma omp parallel
    {
        float *K = mine(all_threads, 1, size), *V = K + keys * stride, *row = V + keys * stride;
        Floats *Q = at(row, stride), *Y = Q + stride;  // (hd, LANES)
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t b = task / G, g = task % G;
            read_keys(&a, b, g, K, V, stride);
            for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++)
                for (int64_t t0 = 0; t0 < T; t0 += LANES) {
                    const int rows = T - t0 < LANES ? (int)(T - t0) : LANES;
                    memset(Q, 0, (size_t)stride * 2 * sizeof *Q);
                    for (int r = 0; r < rows; r++) {
                        read_query(&a, b, t0 + r, h, row);
                        for (int64_t d = 0; d < hd; d++) Q[d][r] = row[d];
                    }
                    Floats max = all(LOWEST), sum = all(0.0f);
                    const Bits queries = hash_of_queries(&a, b, h, t0);
                    for (int64_t k = 0; k < t0 + rows; k += KEYS) {
                        Floats p[KEYS] = {{0}}, new_max = max;
                        products(p, Q, K + k * stride, hd, stride);
                        if (k + KEYS > t0 + 1)
                            for (int j = 0; j < KEYS; j++) p[j] = either(sees(t0, k + j), p[j], all(LOWEST));
                        for (int j = 0; j < KEYS; j++) new_max = larger(p[j], new_max);
                        Floats shrink = exp2_of(max - new_max);  // what was summed up to now, under the new maximum
                        max = new_max;
                        sum *= shrink;
                        for (int64_t d = 0; d < hd; d++) Y[d] *= shrink;
                        for (int j = 0; j < KEYS; j++) p[j] = exp2_of(p[j] - max);
                        if (k + KEYS > t0 + 1)  // nothing, where 2^LOWEST is next to nothing
                            for (int j = 0; j < KEYS; j++) p[j] = either(sees(t0, k + j), p[j], all(0.0f));
                        for (int j = 0; j < KEYS; j++) sum += p[j];
                        if (a.dropped)  // after the sum: what is left of the probabilities need not add up to 1
                            for (int j = 0; j < KEYS; j++) p[j] *= dropout_of(&a, queries, k + j);
                        add_weighted(Y, p, V + k * stride, hd, stride);
                    }
                    for (int r = 0; r < rows; r++) {
                        for (int64_t d = 0; d < hd; d++) row[d] = Y[d][r] / sum[r];
                        write_row(y, ((b * T + t0 + r) * H + h) * hd, row, hd, a.bf16);
                        log_sum[(b * H + h) * T + t0 + r] = max[r] + log2f(sum[r]);
                    }
                }
        }
    }
    free(all_threads);
    return 0;
}

// dqkv from dy; the probabilities are computed again from log_sum.
int attention_backward(const void *qkv, const float *cos, const float *sin, const void *y, const float *log_sum,
                       const void *dy, void *dqkv, int64_t B, int64_t T, int64_t H, int64_t G, int64_t hd, int64_t bf16,
                       int64_t seed, double dropout) {
    const Attention a = attention_of(qkv, cos, sin, T, H, G, hd, bf16, seed, dropout);
    const int64_t stride = (hd + 7) / 8 * 8, keys = padded(T + KEYS), tasks = B * G;
    const int64_t size = 4 * keys * stride + (5 * LANES + 1) * stride;
    float *all_threads = scratch(1, size);
    if (!all_threads) return -1;
#pragma omp parallel
    {
        float *K = mine(all_threads, 1, size), *V = K + keys * stride, *dK = V + keys * stride, *dV = dK + keys * stride;
        float *q = dV + keys * stride, *o = q + LANES * stride, *row = o + LANES * stride;  // (LANES, hd), and one of y
        Floats *Q = at(row, stride), *dY = Q + stride, *dQ = dY + stride;  // (hd, LANES)
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t b = task / G, g = task % G;
            read_keys(&a, b, g, K, V, stride);
            memset(dK, 0, (size_t)(2 * keys * stride) * 4);
            for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++)
                for (int64_t t0 = 0; t0 < T; t0 += LANES) {
                    const int rows = T - t0 < LANES ? (int)(T - t0) : LANES;
                    memset(q, 0, (size_t)(2 * LANES * stride) * 4);
                    memset(Q, 0, (size_t)(3 * stride) * sizeof *Q);
                    Floats delta = all(0.0f), lse = all(0.0f);  // delta: of dy with y, what softmax takes off each score
                    const Bits queries = hash_of_queries(&a, b, h, t0);
                    for (int r = 0; r < rows; r++) {
                        const int64_t i = ((b * T + t0 + r) * H + h) * hd;
                        float *q_r = q + r * stride, *o_r = o + r * stride, sum = 0.0f;
                        read_query(&a, b, t0 + r, h, q_r);
                        read_row(o_r, dy, i, hd, a.bf16);
                        read_row(row, y, i, hd, a.bf16);
                        for (int64_t d = 0; d < hd; d++) {
                            Q[d][r] = q_r[d];
                            dY[d][r] = o_r[d];
                            sum += o_r[d] * row[d];
                        }
                        delta[r] = sum;
                        lse[r] = log_sum[(b * H + h) * T + t0 + r];
                    }
                    for (int64_t k = 0; k < t0 + rows; k += KEYS) {
                        Floats p[KEYS] = {{0}}, ds[KEYS] = {{0}};
                        products(p, Q, K + k * stride, hd, stride);
                        products(ds, dY, V + k * stride, hd, stride);
                        for (int j = 0; j < KEYS; j++) p[j] = exp2_of(p[j] - lse);
                        if (k + KEYS > t0 + 1)
                            for (int j = 0; j < KEYS; j++) p[j] = either(sees(t0, k + j), p[j], all(0.0f));
                        for (int j = 0; j < KEYS; j++) {
                            const Floats factor = a.dropped ? dropout_of(&a, queries, k + j) : all(1.0f);
                            ds[j] = p[j] * (ds[j] * factor - delta);
                            p[j] *= factor;
                        }
                        add_weighted(dQ, ds, K + k * stride, hd, stride);
                        add_over_queries(dV + k * stride, p, o, stride);
                        add_over_queries(dK + k * stride, ds, q, stride);
                    }
                    for (int r = 0; r < rows; r++) {
                        for (int64_t d = 0; d < hd; d++) row[d] = dQ[d][r] * (a.scale / LOG2E);
                        turn(&a, row, t0 + r, -1.0f);
                        write_row(dqkv, row_of(&a, b, t0 + r, h), row, hd, a.bf16);
                    }
                }
            for (int64_t t = 0; t < T; t++) {
                for (int64_t d = 0; d < hd; d++) dK[t * stride + d] /= LOG2E;  // the queries were scaled by it
                turn(&a, dK + t * stride, t, -1.0f);
                write_row(dqkv, row_of(&a, b, t, H + g), dK + t * stride, hd, a.bf16);
                write_row(dqkv, row_of(&a, b, t, H + G + g), dV + t * stride, hd, a.bf16);
            }
        }
    }
    free(all_threads);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// A residual sum and its RMSNorm (model.RMSNorm): x = h + branch, out = x / rms(x) * weight
//
// h, x: (N, D) float32; branch, out: (N, D) activations. Without a branch (NULL) x is h, and is not written.

static float inverse_rms(Floats squares, int64_t D, float eps) { return 1.0f / sqrtf(sum_of(squares) / (float)D + eps); }

int norm_forward(const float *h, const void *branch, const float *weight, float *x, void *out,
                 int64_t N, int64_t D, float eps, int64_t bf16) {
    float *all_threads = scratch(2, D);
    if (!all_threads) return -1;
#pragma omp parallel
    {
        float *a = mine(all_threads, 2, D), *c = a + padded(D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            memcpy(a, h + n * D, (size_t)D * 4);
            if (branch) {
                read_row(c, branch, n * D, D, (int)bf16);
                for (int64_t d = 0; d < D; d++) a[d] += c[d];
                memcpy(x + n * D, a, (size_t)D * 4);
            }
            Floats squares = all(0.0f);
            for (int64_t d = 0; d < D; d += LANES) squares += *at(a, d) * *at(a, d);
            const float r = inverse_rms(squares, D, eps);
            for (int64_t d = 0; d < D; d++) c[d] = a[d] * r * weight[d];
            write_row(out, n * D, c, D, (int)bf16);
        }
    }
    free(all_threads);
    return 0;
}

// dx, and the same rounded as dbranch (or NULL), from dout and what comes from later layers, dx_later (or NULL).
int norm_backward(const float *x, const float *weight, const void *dout, const float *dx_later, float *dx, void *dbranch,
                  float *dweight, int64_t N, int64_t D, float eps, int64_t bf16) {
    const int64_t width = padded(D), blocks = (N + ROW_BLOCK - 1) / ROW_BLOCK;
    float *all_threads = scratch(4, D), *partial = calloc((size_t)(blocks * width), 4);
    if (!all_threads || !partial) {
        free(all_threads);
        free(partial);
        return -1;
    }
#pragma omp parallel
    {
        float *a = mine(all_threads, 4, D), *g = a + width, *c = g + width, *w = c + width;
        memcpy(w, weight, (size_t)D * 4);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t n = block * ROW_BLOCK; n < N && n < (block + 1) * ROW_BLOCK; n++) {
                memcpy(a, x + n * D, (size_t)D * 4);
                read_row(g, dout, n * D, D, (int)bf16);
                Floats squares = all(0.0f), along = all(0.0f);
                for (int64_t d = 0; d < D; d += LANES) {
                    squares += *at(a, d) * *at(a, d);
                    along += *at(g, d) * *at(w, d) * *at(a, d);
                }
                const float r = inverse_rms(squares, D, eps), off = sum_of(along) * r * r * r / (float)D;
                for (int64_t d = 0; d < D; d += LANES) {
                    *at(partial, block * width + d) += *at(g, d) * *at(a, d) * r;
                    *at(c, d) = *at(g, d) * *at(w, d) * r - *at(a, d) * off;
                }
                if (dx_later)
                    for (int64_t d = 0; d < D; d++) c[d] += dx_later[n * D + d];
                memcpy(dx + n * D, c, (size_t)D * 4);
                if (dbranch) write_row(dbranch, n * D, c, D, (int)bf16);
            }
    }
    memset(dweight, 0, (size_t)D * 4);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t d = 0; d < D; d++) dweight[d] += partial[block * width + d];
    free(all_threads);
    free(partial);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU (model.FeedForward): out = silu(gate) * up. gate and up are the halves of a row: (N, 2 D); out: (N, D)

int swiglu_forward(const void *gate_up, void *out, int64_t N, int64_t D, int64_t bf16) {
    float *all_threads = scratch(2, D);
    if (!all_threads) return -1;
#pragma omp parallel
    {
        float *gate = mine(all_threads, 2, D), *up = gate + padded(D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            read_row(gate, gate_up, n * 2 * D, D, (int)bf16);
            read_row(up, gate_up, n * 2 * D + D, D, (int)bf16);
            for (int64_t d = 0; d < D; d += LANES) *at(gate, d) *= sigmoid(*at(gate, d)) * *at(up, d);
            write_row(out, n * D, gate, D, (int)bf16);
        }
    }
    free(all_threads);
    return 0;
}

int swiglu_backward(const void *gate_up, const void *dout, void *dgate_up, int64_t N, int64_t D, int64_t bf16) {
    float *all_threads = scratch(3, D);
    if (!all_threads) return -1;
#pragma omp parallel
    {
        float *gate = mine(all_threads, 3, D), *up = gate + padded(D), *g = up + padded(D);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            read_row(gate, gate_up, n * 2 * D, D, (int)bf16);
            read_row(up, gate_up, n * 2 * D + D, D, (int)bf16);
            read_row(g, dout, n * D, D, (int)bf16);
            for (int64_t d = 0; d < D; d += LANES) {
                Floats x = *at(gate, d), s = sigmoid(x);
                *at(gate, d) = *at(g, d) * *at(up, d) * s * (1.0f + x * (1.0f - s));
                *at(up, d) = *at(g, d) * x * s;
            }
            write_row(dgate_up, n * 2 * D, gate, D, (int)bf16);
            write_row(dgate_up, n * 2 * D + D, up, D, (int)bf16);
        }
    }
    free(all_threads);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The losses of one head (losses.py), row by row of its logits

// x becomes exp(x - max) over its first V numbers; what follows up to whole registers must be LOWEST, and ends as next to
// nothing. Returns the sum; the largest of x is *max.
static float exponentials(float *x, int64_t V, float *max) {
    Floats high = *at(x, 0), sum = all(0.0f);
    for (int64_t i = LANES; i < V; i += LANES) high = larger(*at(x, i), high);
    *max = largest_of(high);
    for (int64_t i = 0; i < V; i += LANES) sum += *at(x, i) = exp2_of((*at(x, i) - *max) * LOG2E);
    return sum_of(sum);
}

// logits, teacher: (N, V) activations; classes, scales: (N, K); taught: (N,) bool, or NULL for nowhere; results: (N, K) and (N,)
//
//     entropy[k] = -log softmax(logits)[classes[k]]             divergence = KL(softmax(teacher) || softmax(logits))
//     gradient = sum of scales[k] * that of entropy[k] + teacher_scale * that of divergence, by the logits
//     log_sum = log(sum(exp(logits))), which is what teacher_log_sum is of the teacher
//     best = where the logits are largest, the first of equals
//
// divergence is 0 where not taught, and gradient where nothing has a scale. gradient may be the logits themselves, or NULL
// if nobody wants it, and so may best. Returns -2 if a class is not in 0..V-1.
int head_losses(const void *logits, const int64_t *classes, const float *scales, const uint8_t *taught, void *gradient,
                const void *teacher, const float *teacher_log_sum, float teacher_scale, float *entropy, float *divergence,
                float *log_sum, float *best, int64_t N, int64_t V, int64_t K, int64_t bf16) {
    float *all_threads = scratch(3, V);
    int outside = 0;
    if (!all_threads) return -1;
#pragma omp parallel
    {
        float *a = mine(all_threads, 3, V), *q = a + padded(V), *z = q + padded(V), max;
        for (int64_t i = V; i < padded(V); i++) a[i] = z[i] = LOWEST;  // stays; as probable as nothing, for both
#pragma omp for schedule(static) reduction(| : outside)
        for (int64_t n = 0; n < N; n++) {
            const int is_taught = taught && taught[n];
            float scale = 0.0f;
            read_row(a, logits, n * V, V, (int)bf16);
            memcpy(q, a, (size_t)padded(V) * 4);
            const float sum = exponentials(q, V, &max);
            log_sum[n] = max + logf(sum);
            for (int64_t k = 0; k < K; k++) {
                const int64_t class = classes[n * K + k];
                const int inside = class >= 0 && class < V;
                outside |= !inside;
                entropy[n * K + k] = inside ? max - a[class] + logf(sum) : 0.0f;
                scale += scales[n * K + k];
            }
            if (best) {
                int64_t first = 0;
                while (first < V - 1 && a[first] != max) first++;  // NaN has no largest
                best[n] = (float)first;
            }
            if (is_taught) scale += teacher_scale;
            if (gradient && scale == 0.0f) {
                memset(q, 0, (size_t)V * 4);  // not a product, or what is infinite or NaN would come through
            } else if (gradient) {
                for (int64_t i = 0; i < V; i += LANES) *at(q, i) *= scale / sum;
                for (int64_t k = 0; k < K && !outside; k++) q[classes[n * K + k]] -= scales[n * K + k];
            }
            divergence[n] = 0.0f;
            if (is_taught) {
                read_row(z, teacher, n * V, V, (int)bf16);
                Floats apart = all(0.0f);
                for (int64_t i = 0; i < V; i += LANES) {
                    Floats log_p = *at(z, i) - teacher_log_sum[n], p = exp2_of(log_p * LOG2E);
                    apart += p * (log_p - (*at(a, i) - log_sum[n]));
                    *at(q, i) -= p * teacher_scale;
                }
                divergence[n] = sum_of(apart);
            }
            if (gradient) write_row(gradient, n * V, q, V, (int)bf16);
        }
    }
    free(all_threads);
    return outside ? -2 : 0;
}
