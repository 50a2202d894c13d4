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
// What this leaves out on purpose: matrix products, dropout of embeddings, devices that are not CPUs.

#define _DEFAULT_SOURCE  // madvise
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#include <sys/mman.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
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
enum { SLACK = 8 };        // how far scores may lie above the maximum that it subtracts, in units of log2
enum { STRIP = 64 };       // keys whose scores are in the first-level cache together, of tiles
enum { ROW_BLOCK = 256 };  // rows that share a partial sum of a weight's gradient
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint64_t Two;  // words that stay together
typedef Two Twos __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

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
#elif defined(__AVX__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return either(a > b, a, b);
#endif
}

static inline int any_larger(Floats a, Floats b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
    const Ints larger = a > b;
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= larger[i];
    return found;
#endif
}

static inline Floats *at(float *x, int64_t i) { return (Floats *)(void *)(x + i); }

static inline float sum_of(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

static inline float largest_of(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float max = x[0];
    for (int i = 1; i < LANES; i++) max = x[i] > max ? x[i] : max;
    return max;
#endif
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

// 2^x within 8e-5 of itself, for what is rounded to bfloat16 next; below x = -126, 0 or 2^-126.
static inline Floats exp2_roughly(Floats x) {
#ifdef __AVX512DQ__
    const Floats f = (Floats)_mm512_reduce_ps((__m512)x, 1);  // x less the whole number below it
#else
    const Floats magic = all(12582912.0f);  // as in exp2_of
    x = larger(all(-126.0f), x);
    const Floats shifted = (x - 0.5f) + magic, f = x - (shifted - magic);
#endif
    Floats p = all(7.802452004e-2f);  // minimax polynomial of 2^f, f in [0, 1]
    p = p * f + 2.260671591e-1f;
    p = p * f + 6.958335392e-1f;
    p = p * f + 9.999252186e-1f;
#ifdef __AVX512DQ__
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return (Floats)((Ints)p + (((Ints)shifted - (Ints)magic) << 23));
#endif
}

INLINE Floats power_of(Floats x, int bf16) { return bf16 ? exp2_roughly(x) : exp2_of(x); }

// log2 of x >= 1, within 3e-7, by two of Newton's steps from the line between powers of 2, raised to the middle of its error
static inline Floats log2_of(Floats x) {
    Floats log = __builtin_convertvector((Ints)x - 0x3f800000, Floats) * 0x1p-23f + 0.043f;
    for (int i = 0; i < 2; i++) log += (x * exp2_of(-log) - 1.0f) * LOG2E;
    return log;
}

INLINE Floats sigmoid(Floats x, int bf16) {
    const Floats above = 1.0f + power_of(larger(x, all(-87.0f)) * -LOG2E, bf16);
#ifdef __AVX512F__
    if (bf16) return (Floats)_mm512_rcp14_ps((__m512)above);
#endif
    return 1.0f / above;
}

INLINE Floats widened(Halves x) {
#ifdef __AVX512F__
    return (Floats)((Bits)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#else
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
#endif
}

// To the nearest bfloat16, ties to even, a NaN to a NaN.
INLINE Halves narrowed(Floats x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const Bits bits = (Bits)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Bits is_nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Halves);
#endif
}

// The activations from index i on, as float32: LANES of them, or n and zeros.
INLINE Floats load(const void *x, int64_t i, int64_t n, int bf16) {
    const char *from = (const char *)x + i * (bf16 ? 2 : 4);
    if (n >= LANES) return bf16 ? widened(*(const Halves *)(const void *)from) : *(const Floats *)(const void *)from;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 first = (__mmask16)((1 << n) - 1);
    return bf16 ? widened((Halves)_mm256_maskz_loadu_epi16(first, from)) : (Floats)_mm512_maskz_loadu_ps(first, from);
#else
    Halves halves = {0};
    Floats floats = all(0.0f);
    memcpy(bf16 ? (void *)&halves : (void *)&floats, from, (size_t)n * (bf16 ? 2 : 4));
    return bf16 ? widened(halves) : floats;
#endif
}

// And back.
INLINE void store(void *x, int64_t i, Floats floats, int64_t n, int bf16) {
    void *to = (char *)x + i * (bf16 ? 2 : 4);
    if (n >= LANES && bf16) {
        *(Halves *)to = narrowed(floats);
    } else if (n >= LANES) {
        *(Floats *)to = floats;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    } else if (bf16) {
        _mm256_mask_storeu_epi16(to, (__mmask16)((1 << n) - 1), (__m256i)narrowed(floats));
    } else {
        _mm512_mask_storeu_ps(to, (__mmask16)((1 << n) - 1), (__m512)floats);
    }
#else
    } else if (bf16) {
        const Halves part = narrowed(floats);
        memcpy(to, &part, (size_t)n * 2);
    } else {
        const Floats part = floats;
        memcpy(to, &part, (size_t)n * 4);
    }
#endif
}

// Rows of n activations, from index i on.
static inline void read_row(float *to, const void *from, int64_t i, int64_t n, int bf16) {
    for (int64_t j = 0; j < n; j += LANES) store(to, j, load(from, i + j, n - j, bf16), n - j, 0);
}

static inline void write_row(void *to, int64_t i, const float *from, int64_t n, int bf16) {
    for (int64_t j = 0; j < n; j += LANES) store(to, i + j, load(from, j, n - j, 0), n - j, bf16);
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
// page cleared anew takes a tenth of a step. Only glibc gives it back so eagerly. And has the next half GB of the heap
// made of pages of 2 MB once it is used: products that read columns of large matrices look up fewer pages.
void keep_freed_memory(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
    mallopt(M_TOP_PAD, 1 << 26);
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21;
    const size_t bytes = 1 << 29;
    void *heap = malloc(bytes);
    if (heap) madvise((void *)(((uintptr_t)heap + page - 1) / page * page), bytes - page, MADV_HUGEPAGE);
    free(heap);  // to the top of the heap, where the next large pieces come from
#endif
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Dropout: a share of numbers, in [0, 1), is set to 0, and the others grow by 1 / (1 - share). Which ones, a hash of `seed`
// and their row and column says: so no mask is kept, and backward finds the same.

typedef struct {
    uint64_t seed;
    uint32_t dropped;  // hashes below it are: share * 2^32
    float kept;        // 1 / (1 - share)
} Dropout;

static Dropout dropout_by(double share, int64_t seed) {
    return (Dropout){(uint64_t)seed, (uint32_t)(share * 0x1p32), (float)(1.0 / (1.0 - share))};
}

// Bits that look random for any x: lowbias32 (Wellons, "Prospecting for hash functions").
static inline Bits hashed(Bits x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

static inline Bits hash_of_rows(const Dropout *of, Bits rows) {
    return hashed(rows + (uint32_t)of->seed) ^ (uint32_t)(of->seed >> 32);
}

static inline uint32_t column_hash(int64_t column) { return (uint32_t)column * 0x9e3779b9u; }  // odd: no two are one

// What the numbers in places row hash ^ column hash are multiplied by.
static inline Floats dropout_of(const Dropout *of, Bits places) {
    return either((Ints)(hashed(places) >= of->dropped), all(of->kept), all(0.0f));
}

// x: (N, D) activations -> out, which may be x. The gradient of out's is x's by the same call.
int drop(const void *x, void *out, int64_t N, int64_t D, int64_t bf16, int64_t seed, double share) {
    const Dropout dropout = dropout_by(share, seed);
    Bits lanes = {0};
    for (int i = 0; i < LANES; i++) lanes[i] = column_hash(i);  // those of d + i are the sum of d's and these
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const Bits row = hash_of_rows(&dropout, (Bits){0} + (uint32_t)n);
        for (int64_t d = 0; d < D; d += LANES) {
            const Floats factor = dropout_of(&dropout, row ^ (lanes + column_hash(d)));
            store(out, n * D + d, load(x, n * D + d, D - d, (int)bf16) * factor, D - d, (int)bf16);
        }
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Causal attention with rotary embedding and grouped heads (model.Attention), never holding a T x T matrix
// (FlashAttention, arXiv 2205.14135 and 2307.08691)
//
// qkv: (B, T, (H + 2 G) hd), the rows of q, k and v before rotation; y: (B, T, H hd); log_sum: (B, H, T), of 2^score;
// cos, sin: (T, hd / 2). Scores are in units of log2, so that their exponential is 2^x.
//
// A register holds one word (32 bits) of LANES queries; keys and values come one word at a time, for all queries at once.
// So a head of 8 numbers fills the registers as well as one of 64. A word is a float32, or with `bf16` two bfloat16, whose
// products the processor adds to a float32 sum in one instruction. What a sum is over decides which two: neighbours in a
// row for scores, in columns of keys for y and dq, in columns of queries for dk and dv. What is multiplied is rounded to
// bfloat16 then, probabilities among it, as in PyTorch's own attention; exponentials and sums are float32.
//
//     rows      (positions, words)      word w of a row: number w; of bfloat16 numbers 2 w and 2 w + 1
//     columns   (words, LANES queries)  rows, transposed: a register is word w of all queries
//     pairs     (positions, width)      number d of row t; of bfloat16 (positions / 2, width), of rows 2 t and 2 t + 1
//
// Dropout is of probabilities.

typedef uint32_t Word __attribute__((may_alias));

typedef struct {
    const Word *qkv;
    float *cos, *sin;  // transposed: (hd / 2, padded(T))
    int64_t T, H, G;
    Dropout dropout;
    float scale;  // of scores, to units of log2
} Attention;

// What the compiler makes a version of the loops below for: the type, and how long a row is.
typedef struct {
    int bf16;
    int64_t used, words, width, half;  // words of a row; with zeros up to whole registers; numbers of those; hd / 2
} Head;

INLINE Head head_of(int bf16, int64_t hd) {
    const int64_t width = (hd + 7) / 8 * 8;
    return (Head){bf16, bf16 ? hd / 2 : hd, bf16 ? width / 2 : width, width, hd / 2};
}

static int64_t keys_of(int64_t T) { return padded(T + LANES); }  // rows of zeros follow

// The first of the H queries' heads', then G keys' and G values' words at position t.
INLINE int64_t word_of(const Attention *a, int64_t b, int64_t t, int64_t head, Head is) {
    return ((b * a->T + t) * (a->H + 2 * a->G) + head) * is.used;
}

INLINE Bits same(Word x) { return (Bits){0} + x; }

INLINE Floats first_of(Bits words) { return (Floats)(words << 16); }
INLINE Floats second_of(Bits words) { return (Floats)(words & 0xffff0000u); }

// To the nearest bfloat16; without an instruction for it with halves away from 0, and a NaN of arithmetic stays one.
INLINE Bits two_of(Floats first, Floats second) {
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Bits)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    return ((Bits)first + 0x8000u) >> 16 | (((Bits)second + 0x8000u) & 0xffff0000u);
#endif
}

INLINE Floats add_products(Floats sum, Bits a, Bits b, Head is) {
    if (!is.bf16) return sum + (Floats)a * (Floats)b;
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + first_of(a) * first_of(b) + second_of(a) * second_of(b);
#endif
}

// rows[r][:] = from[r * stride ..], for LANES rows; zeros from row n on.
INLINE void read_rows(Word *rows, const Word *from, int64_t stride, int n, Head is) {
    for (int r = 0; r < n; r++) {
        __builtin_prefetch(from + (r + LANES) * stride);  // the next LANES rows', too far apart for the processor to guess
        memcpy(rows + r * is.words, from + r * stride, (size_t)is.used * 4);
    }
    memset(rows + n * is.words, 0, (size_t)((LANES - n) * is.words) * 4);
}

#ifdef __AVX512F__
// Four words from each of four places.
INLINE __m512i fours(const Word *a, const Word *b, const Word *c, const Word *d) {
    const __m512i first = _mm512_castsi128_si512(_mm_loadu_si128((const void *)a));
    const __m512i two = _mm512_inserti32x4(first, _mm_loadu_si128((const void *)b), 1);
    const __m512i three = _mm512_inserti32x4(two, _mm_loadu_si128((const void *)c), 2);
    return _mm512_inserti32x4(three, _mm_loadu_si128((const void *)d), 3);
}

// 16 rows of 4 words, four in a register, become 4 columns of 16. This moves each word's place, six bits, two bits round:
// so it is its own inverse when done twice.
INLINE void transpose(__m512i t[4]) {
    const __m512i low = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);  // words 0 and 1
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));                               // words 2 and 3
    const __m512i a = _mm512_permutex2var_epi32(t[0], low, t[1]), b = _mm512_permutex2var_epi32(t[2], low, t[3]);
    const __m512i c = _mm512_permutex2var_epi32(t[0], high, t[1]), d = _mm512_permutex2var_epi32(t[2], high, t[3]);
    t[0] = _mm512_shuffle_i64x2(a, b, 0x44), t[1] = _mm512_shuffle_i64x2(a, b, 0xee);
    t[2] = _mm512_shuffle_i64x2(c, d, 0x44), t[3] = _mm512_shuffle_i64x2(c, d, 0xee);
}
#elif defined(__AVX__)
// Four words from each of two places.
INLINE __m256 fours(const Word *a, const Word *b) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float *)a)), _mm_loadu_ps((const float *)b), 1);
}

// 8 rows of 4 words, rows i and i + 4 in register i, become 4 columns of 8, and the other way round.
INLINE void transpose(__m256 t[4]) {
    const __m256 a = _mm256_unpacklo_ps(t[0], t[2]), b = _mm256_unpackhi_ps(t[0], t[2]);
    const __m256 c = _mm256_unpacklo_ps(t[1], t[3]), d = _mm256_unpackhi_ps(t[1], t[3]);
    t[0] = _mm256_unpacklo_ps(a, c), t[1] = _mm256_unpackhi_ps(a, c);
    t[2] = _mm256_unpacklo_ps(b, d), t[3] = _mm256_unpackhi_ps(b, d);
}
#endif

// Of LANES rows, `stride` words apart, the first `words`, a multiple of 4.
INLINE void to_columns(Bits *columns, const Word *rows, int64_t stride, int64_t words) {
#ifdef __AVX512F__
    for (int64_t w = 0; w < words; w += 4) {
        __m512i t[4];
        for (int i = 0; i < 4; i++) {
            const Word *from = rows + 4 * i * stride + w;
            t[i] = fours(from, from + stride, from + 2 * stride, from + 3 * stride);
        }
        transpose(t);
        for (int i = 0; i < 4; i++) columns[w + i] = (Bits)t[i];
    }
#elif defined(__AVX__)
    for (int64_t w = 0; w < words; w += 4) {
        __m256 t[4];
        for (int i = 0; i < 4; i++) t[i] = fours(rows + i * stride + w, rows + (i + 4) * stride + w);
        transpose(t);
        for (int i = 0; i < 4; i++) columns[w + i] = (Bits)t[i];
    }
#else
    for (int64_t w = 0; w < words; w++)
        for (int r = 0; r < LANES; r++) ((Word *)(columns + w))[r] = rows[r * stride + w];
#endif
}

INLINE void to_rows(Word *rows, const Bits *columns, int64_t stride, int n, Head is) {
#ifdef __AVX512F__
    for (int64_t w = 0; w < is.used; w += 4) {
        __m512i t[4];
        for (int i = 0; i < 4; i++) t[i] = (__m512i)columns[w + i];
        transpose(t);
        transpose(t);
        const size_t bytes = is.used - w < 4 ? (size_t)(is.used - w) * 4 : 16;
        for (int r = 0; r < n; r++) memcpy(rows + r * stride + w, (Word *)t + 4 * r, bytes);
    }
#elif defined(__AVX__)
    for (int64_t w = 0; w < is.used; w += 4) {
        __m256 t[4];
        for (int i = 0; i < 4; i++) t[i] = (__m256)columns[w + i];
        transpose(t);
        const size_t bytes = is.used - w < 4 ? (size_t)(is.used - w) * 4 : 16;
        for (int r = 0; r < n; r++) memcpy(rows + r * stride + w, (Word *)t + r % 4 * 8 + r / 4 * 4, bytes);
    }
#else
    for (int r = 0; r < n; r++)
        for (int64_t w = 0; w < is.used; w++) rows[r * stride + w] = ((const Word *)(columns + w))[r];
#endif
}

// Numbers 2 i and 2 i + 1 of columns.
INLINE void put(Bits *columns, int64_t i, Floats even, Floats odd, Head is) {
    if (is.bf16) {
        columns[i] = two_of(even, odd);
    } else {
        columns[2 * i] = (Bits)even;
        columns[2 * i + 1] = (Bits)odd;
    }
}

// The same, of x and y turned by their angles at positions t0 on; direction -1 turns back.
INLINE void turn(const Attention *a, Bits *columns, int64_t i, Floats x, Floats y, int64_t t0, float direction, Head is) {
    const Floats cos = *at(a->cos, i * padded(a->T) + t0), sin = *at(a->sin, i * padded(a->T) + t0) * direction;
    put(columns, i, x * cos - y * sin, x * sin + y * cos, is);
}

// LANES rows of a head from t0 on, times `scale` and turned, as columns; `rows` are what they are read to.
INLINE void read_turned(const Attention *a, Word *rows, Bits *columns, int64_t b, int64_t t0, int64_t head, float scale,
                        Head is) {
    const int64_t n = a->T - t0 < LANES ? a->T - t0 : LANES;
    read_rows(rows, a->qkv + word_of(a, b, t0, head, is), (a->H + 2 * a->G) * is.used, (int)n, is);
    to_columns(columns, rows, is.words, is.words);
    for (int64_t i = 0; i < is.half; i++) {
        const Floats even = is.bf16 ? first_of(columns[i]) : (Floats)columns[2 * i];
        const Floats odd = is.bf16 ? second_of(columns[i]) : (Floats)columns[2 * i + 1];
        turn(a, columns, i, even * scale, odd * scale, t0, 1.0f, is);
    }
}

// Keys, turned, and values of head g, as rows.
static void read_keys(const Attention *a, Word *K, Word *V, Bits *columns, int64_t b, int64_t g, Head is) {
    for (int64_t t = 0; t < a->T; t += LANES) {
        const int64_t n = a->T - t < LANES ? a->T - t : LANES;
        read_turned(a, K + t * is.words, columns, b, t, a->H + g, 1.0f, is);
        to_rows(K + t * is.words, columns, is.words, (int)n, is);
        read_rows(V + t * is.words, a->qkv + word_of(a, b, t, a->H + a->G + g, is), (a->H + 2 * a->G) * is.used, (int)n, is);
    }
}

// Rows of all keys as pairs; of float32 they are it already.
static const Word *pairs_of(Word *pairs, const Word *rows, int64_t T, Head is) {
    if (!is.bf16) return rows;
    for (int64_t t = 0; t < T; t += 2, pairs += is.width)
        for (int64_t w = 0; w < is.words; w++) {
            const Word one = rows[t * is.words + w], two = rows[(t + 1) * is.words + w];
            pairs[2 * w] = (one & 0xffff) | two << 16;
            pairs[2 * w + 1] = one >> 16 | (two & 0xffff0000u);
        }
    return pairs - (T + 1) / 2 * is.width;
}

// out[j] += the product of LANES queries' rows with row j.
INLINE void products(Floats out[KEYS], const Bits *columns, const Word *rows, Head is) {
    for (int64_t w = 0; w < is.words; w++)
        for (int j = 0; j < KEYS; j++) out[j] = add_products(out[j], columns[w], same(rows[j * is.words + w]), is);
}

// In pairs, since in a row each would wait for the one before.
INLINE Floats largest_key(const Floats p[KEYS]) {
    Floats most[KEYS / 2];
    for (int j = 0; j < KEYS / 2; j++) most[j] = larger(p[j], p[j + KEYS / 2]);
    for (int n = KEYS / 4; n; n /= 2)
        for (int j = 0; j < n; j++) most[j] = larger(most[j], most[j + n]);
    return most[0];
}

INLINE Floats sum_of_keys(const Floats p[KEYS]) {
    Floats sum[KEYS / 2];
    for (int j = 0; j < KEYS / 2; j++) sum[j] = p[j] + p[j + KEYS / 2];
    for (int n = KEYS / 4; n; n /= 2)
        for (int j = 0; j < n; j++) sum[j] += sum[j + n];
    return sum[0];
}

// out[d] += the sum over keys j of weight[j] times number d of row j.
INLINE void add_weighted(Floats *out, const Floats weight[KEYS], const Word *pairs, Head is) {
    const int n = is.bf16 ? KEYS / 2 : KEYS;
    Bits weights[KEYS];
    for (int j = 0; j < n; j++) weights[j] = is.bf16 ? two_of(weight[2 * j], weight[2 * j + 1]) : (Bits)weight[j];
    for (int64_t d = 0; d < is.width; d += 8) {
        Floats sum[8];
        for (int i = 0; i < 8; i++) sum[i] = out[d + i];
        for (int j = 0; j < n; j++)
            for (int i = 0; i < 8; i++) sum[i] = add_products(sum[i], weights[j], same(pairs[j * is.width + d + i]), is);
        for (int i = 0; i < 8; i++) out[d + i] = sum[i];
    }
}

// to[j] = the words (p[j][0], ds[j][0], p[j][1], ds[j][1], ..); of bfloat16 queries 0 and 1, 2 and 3, .. share one.
INLINE void side_by_side(Word *to, Floats p, Floats ds, Head is) {
    if (!is.bf16) {
#ifdef __AVX512F__
        const __m512i even = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i next = _mm512_add_epi32(even, _mm512_set1_epi32(8));
        _mm512_storeu_ps(to, _mm512_permutex2var_ps((__m512)p, even, (__m512)ds));
        _mm512_storeu_ps(to + LANES, _mm512_permutex2var_ps((__m512)p, next, (__m512)ds));
#elif defined(__AVX__)
        const __m256 low = _mm256_unpacklo_ps((__m256)p, (__m256)ds), high = _mm256_unpackhi_ps((__m256)p, (__m256)ds);
        _mm256_storeu_ps((float *)to, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps((float *)to + 8, _mm256_permute2f128_ps(low, high, 0x31));
#else
        for (int r = 0; r < LANES; r++) {
            to[2 * r] = ((Bits)p)[r];
            to[2 * r + 1] = ((Bits)ds)[r];
        }
#endif
        return;
    }
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)ds, (__m512)p)));
#else
    const Bits a = (Bits)p + 0x8000u, b = (Bits)ds + 0x8000u;  // as in two_of
    for (int r = 0; r < LANES; r += 2) {
        to[r] = a[r] >> 16 | (a[r + 1] & 0xffff0000u);
        to[r + 1] = b[r] >> 16 | (b[r + 1] & 0xffff0000u);
    }
#endif
}

// Queries' q and dy so that a sum over them fills registers: (dy[0], q[0], dy[1], q[1], ..) of each, or of each two.
static void interleave(Word *to, const Word *q, const Word *dy, Head is) {
#ifdef __AVX512BF16__
    const __m512i order = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4,
                                           27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    for (int r = 0; r < LANES && is.bf16; r += 2)
        for (int64_t w = 0; w < is.words; w += 4, to += 16) {
            const int64_t i = r * is.words + w, next = i + is.words;
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, fours(dy + i, dy + next, q + i, q + next)));
        }
    if (is.bf16) return;
#endif
    for (int r = 0; r < LANES; r += is.bf16 ? 2 : 1)
        for (int64_t w = 0; w < is.words; w++, to += is.bf16 ? 4 : 2) {
            const Word one = dy[r * is.words + w], three = q[r * is.words + w];
            if (is.bf16) {
                const Word two = dy[(r + 1) * is.words + w], four = q[(r + 1) * is.words + w];
                to[0] = (one & 0xffff) | two << 16;
                to[1] = (three & 0xffff) | four << 16;
                to[2] = one >> 16 | (two & 0xffff0000u);
                to[3] = three >> 16 | (four & 0xffff0000u);
            } else {
                to[0] = one;
                to[1] = three;
            }
        }
}

// dVK[j], (dv[0], dk[0], dv[1], dk[1], ..), += the sum over queries of p and ds (side_by_side) times dy and q (interleave).
INLINE void add_over_queries(Floats *dVK, const Word *weights, const Bits *queries, Head is) {
    const int64_t registers = 2 * is.width / LANES;
    const int n = is.bf16 ? LANES / 2 : LANES;
    for (int64_t c = 0; c < registers; c++) {
        Floats sum[KEYS];
        for (int j = 0; j < KEYS; j++) sum[j] = dVK[j * registers + c];
        for (int r = 0; r < n; r++)
            for (int j = 0; j < KEYS; j++) {
                Two two;
                memcpy(&two, weights + (j * n + r) * 2, 8);
                sum[j] = add_products(sum[j], (Bits)((Twos){0} + two), queries[r * registers + c], is);
            }
        for (int j = 0; j < KEYS; j++) dVK[j * registers + c] = sum[j];
    }
}

// Whether query t0 + r may see `key`, for all r.
static inline Ints sees(int64_t t0, int64_t key) {
    Ints first;
    for (int r = 0; r < LANES; r++) first[r] = r;
    return first >= (int32_t)(key - t0);
}

// The hashes of queries t0 + r of head h, for all r.
static inline Bits hash_of_queries(const Attention *a, int64_t b, int64_t h, int64_t t0) {
    Bits row = {0};
    if (!a->dropout.dropped) return row;  // nobody asks
    for (int r = 0; r < LANES; r++) row[r] = (uint32_t)((b * a->H + h) * a->T + t0 + r);
    return hash_of_rows(&a->dropout, row);
}

// Scratch of one thread, forward:
//
//     K, V      (keys, words)   rows of the keys' head                  Vp  (keys, words)  V as pairs
//     rows      (LANES, words)  queries, then y, of one head
//     Q         columns of the queries, turned                          Y   (width, LANES) sums of p v
static int64_t forward_words(int64_t T, int64_t width) { return (3 * keys_of(T) + 3 * LANES) * width; }

INLINE void forward_task(const Attention *a, Word *scratch_, Word *y, float *log_sum, int64_t b, int64_t g, Head is) {
    const int64_t T = a->T, H = a->H, size = keys_of(T) * is.words;
    Word *K = scratch_, *V = K + size, *rows = V + 2 * size;
    Bits *Q = (Bits *)(rows + LANES * is.width);
    Floats in_registers[8], *Y = is.width == 8 ? in_registers : (Floats *)(Q + is.width);
    read_keys(a, K, V, Q, b, g, is);
    const Word *Vp = pairs_of(V + size, V, T, is);
    for (int64_t h = g * (H / a->G); h < (g + 1) * (H / a->G); h++)
        for (int64_t t0 = 0; t0 < T; t0 += LANES) {
            const int n = T - t0 < LANES ? (int)(T - t0) : LANES;
            read_turned(a, rows, Q, b, t0, h, a->scale, is);
            Floats max = all(0.0f), sum = all(0.0f);
            for (int64_t d = 0; d < is.width; d++) Y[d] = sum;
            const Bits queries = hash_of_queries(a, b, h, t0);
            for (int64_t k = 0; k < t0 + n; k += KEYS) {
                Floats p[KEYS];
                for (int j = 0; j < KEYS; j++) p[j] = -max;
                products(p, Q, K + k * is.words, is);
                if (k + KEYS > t0 + 1)
                    for (int j = 0; j < KEYS; j++) p[j] = either(sees(t0, k + j), p[j], all(LOWEST));
                const Floats most = largest_key(p);
                if (k == 0 || any_larger(most, all(SLACK))) {  // seldom: powers up to 2^SLACK are as good as up to 1
                    const Floats rise = k == 0 ? most : larger(most, all(0.0f));
                    const Floats shrink = exp2_of(k == 0 ? all(0.0f) : -rise);  // what was summed, under the new maximum
                    max += rise;
                    sum *= shrink;
                    for (int64_t d = 0; d < is.width; d++) Y[d] *= shrink;
                    for (int j = 0; j < KEYS; j++) p[j] -= rise;
                }
                for (int j = 0; j < KEYS; j++) p[j] = power_of(p[j], is.bf16);
                if (k + KEYS > t0 + 1)  // nothing, where 2^LOWEST is next to nothing
                    for (int j = 0; j < KEYS; j++) p[j] = either(sees(t0, k + j), p[j], all(0.0f));
                sum += sum_of_keys(p);
                if (a->dropout.dropped)  // after the sum: what is left of the probabilities need not add up to 1
                    for (int j = 0; j < KEYS; j++) p[j] *= dropout_of(&a->dropout, queries ^ column_hash(k + j));
                add_weighted(Y, p, Vp + k * is.words, is);
            }
            const Floats share = 1.0f / sum, log = max + log2_of(sum);
            for (int64_t i = 0; i < is.half; i++) put(Q, i, Y[2 * i] * share, Y[2 * i + 1] * share, is);
            to_rows(y + ((b * T + t0) * H + h) * is.used, Q, H * is.used, n, is);
            memcpy(log_sum + (b * H + h) * T + t0, &log, (size_t)n * 4);
        }
}

// What backward needs of LANES queries: rows of q, turned, then of dy; then of y, which nobody asks for again; all as columns,
// too. Returns the products of dy with y, which softmax takes off each score's gradient.
INLINE Floats read_queries(const Attention *a, Word *rows, Bits *Q, const Word *dy, Bits *O, const Word *y, Bits *Y, int64_t b,
                           int64_t t0, int64_t h, Head is) {
    const int n = a->T - t0 < LANES ? (int)(a->T - t0) : LANES;
    const int64_t first = ((b * a->T + t0) * a->H + h) * is.used, block = LANES * is.words;
    Floats delta = all(0.0f);
    read_turned(a, rows, Q, b, t0, h, a->scale, is);
    to_rows(rows, Q, is.words, n, is);
    read_rows(rows + block, dy + first, a->H * is.used, n, is);
    read_rows(rows + 2 * block, y + first, a->H * is.used, n, is);
    to_columns(O, rows + block, is.words, is.words);
    to_columns(Y, rows + 2 * block, is.words, is.words);
    for (int64_t w = 0; w < is.words; w++) delta = add_products(delta, O[w], Y[w], is);
    return delta;
}

// Scratch of one thread, backward:
//
//     K, V         (keys, words)          rows of the keys' head        Kp  (keys, words)        K as pairs
//     dVK          (keys, 2 width)        dv and dk: dv[0], dk[0], dv[1], dk[1], .. (add_over_queries)
//     q, dy, y     (LANES, words)         rows of one head
//     Q, O         columns of q and dy; Y: of y, and of dVK             QO  (LANES, 2 words)     dy and q (interleave)
//     dQ           (width, LANES)         sums of ds k                  W   (KEYS, 2 LANES)      p and ds (side_by_side)
static int64_t backward_words(int64_t T, int64_t width) {
    return (5 * keys_of(T) + 10 * LANES) * width + 2 * KEYS * LANES;
}

INLINE void backward_task(const Attention *a, Word *scratch_, const Word *y, const float *log_sum, const Word *dy, Word *dqkv,
                          int64_t b, int64_t g, Head is) {
    const int64_t T = a->T, H = a->H, size = keys_of(T) * is.words, block = LANES * is.words;
    Floats *dVK = (Floats *)scratch_;
    Word *K = scratch_ + 2 * keys_of(T) * is.width, *V = K + size, *q_rows = V + 2 * size;
    Word *QO = q_rows + 3 * block, *W = QO + 2 * block;
    Bits *Q = (Bits *)(W + 2 * KEYS * LANES), *O = Q + is.width, *Y = O + is.width;
    Floats in_registers[8], *dQ = is.width == 8 ? in_registers : (Floats *)(Y + 2 * is.width);
    const int64_t registers = 2 * is.width / LANES;
    const float scale = a->scale / LOG2E;
    memset(dVK, 0, (size_t)(2 * keys_of(T) * is.width) * 4);
    read_keys(a, K, V, Q, b, g, is);
    const Word *Kp = pairs_of(V + size, K, T, is);
    for (int64_t h = g * (H / a->G); h < (g + 1) * (H / a->G); h++)
        for (int64_t t0 = 0; t0 < T; t0 += LANES) {
            const int n = T - t0 < LANES ? (int)(T - t0) : LANES;
            const Floats delta = read_queries(a, q_rows, Q, dy, O, y, Y, b, t0, h, is);
            interleave(QO, q_rows, q_rows + block, is);
            Floats lse = all(0.0f);
            memcpy(&lse, log_sum + (b * H + h) * T + t0, (size_t)n * 4);
            for (int64_t d = 0; d < is.width; d++) dQ[d] = all(0.0f);
            const Bits queries = hash_of_queries(a, b, h, t0);
            for (int64_t k = 0; k < t0 + n; k += KEYS) {
                Floats p[KEYS], ds[KEYS];
                for (int j = 0; j < KEYS; j++) p[j] = -lse, ds[j] = a->dropout.dropped ? all(0.0f) : -delta;
                products(p, Q, K + k * is.words, is);
                products(ds, O, V + k * is.words, is);
                for (int j = 0; j < KEYS; j++) p[j] = power_of(p[j], is.bf16);
                if (k + KEYS > t0 + 1)
                    for (int j = 0; j < KEYS; j++) p[j] = either(sees(t0, k + j), p[j], all(0.0f));
                for (int j = 0; j < KEYS && !a->dropout.dropped; j++) ds[j] *= p[j];
                for (int j = 0; j < KEYS && a->dropout.dropped; j++) {
                    const Floats factor = dropout_of(&a->dropout, queries ^ column_hash(k + j));
                    ds[j] = p[j] * (ds[j] * factor - delta);
                    p[j] *= factor;
                }
                for (int j = 0; j < KEYS; j++) side_by_side(W + j * (is.bf16 ? LANES : 2 * LANES), p[j], ds[j], is);
                add_weighted(dQ, ds, Kp + k * is.words, is);
                __asm__ volatile("" : : : "memory");  // or compilers take W's words out of registers, which is slower
                add_over_queries(dVK + k * registers, W, (Bits *)QO, is);
            }
            for (int64_t i = 0; i < is.half; i++) turn(a, Q, i, dQ[2 * i] * scale, dQ[2 * i + 1] * scale, t0, -1.0f, is);
            to_rows(dqkv + word_of(a, b, t0, h, is), Q, (H + 2 * a->G) * is.used, n, is);
        }
    for (int64_t t0 = 0; t0 < T; t0 += LANES) {
        const int n = T - t0 < LANES ? (int)(T - t0) : LANES;
        to_columns(Y, (const Word *)(dVK + t0 * registers), 2 * is.width, 2 * is.width);
        for (int64_t i = 0; i < is.half; i++) {
            const Floats *part = (const Floats *)Y + 4 * i;  // numbers 2 i and 2 i + 1 of dv and dk
            put(O, i, part[0], part[2], is);
            turn(a, Q, i, part[1] / LOG2E, part[3] / LOG2E, t0, -1.0f, is);
        }
        to_rows(dqkv + word_of(a, b, t0, H + g, is), Q, (H + 2 * a->G) * is.used, n, is);
        to_rows(dqkv + word_of(a, b, t0, H + a->G + g, is), O, (H + 2 * a->G) * is.used, n, is);
    }
}

#ifdef TILES
// ---------------------------------------------------------------------------------------------------------------------
// The same by tiles (Intel's AMX), of bfloat16: a tile is up to 16 rows of 16 words, and one instruction multiplies two of
// them, as many products as 256 of those above.
//
// 16 queries at a time, in passes over the keys that they see: products, then exponentials, then products again. So none
// waits for another; forward, a row's maximum is known before its first exponential; backward, which needs no maximum, a
// pass is over STRIP keys. Compilers know of tiles as instructions only: between passes all must be in memory (`passed`).
//
//     tile   rows x words        of
//     0      16 x 16             keys x queries: scores; keys x numbers: 8 of dv and 8 of dk
//     1, 2   16 x w, w x 16      keys' or values' rows; columns of queries or of dy
//     3      d x 16              numbers x queries: y or dq
//     4, 5   d x 8, 8 x 16       numbers x pairs of keys: values or keys; pairs of keys x queries: probabilities or ds
//     6, 7   16 x 16, 16 x 16    keys x (p of pairs of queries, ds of them); rows (dy, 0) and (0, q) of pairs of queries
//
// w is all of a row's words, or 16 at a time; d all of its numbers, or 16 at a time.

INLINE Head tiled_head_of(int64_t hd) {
    const int64_t width = hd <= 8 ? 8 : hd <= 16 ? 16 : (hd + 31) / 32 * 32;
    return (Head){1, hd / 2, width / 2, width, hd / 2};
}

static int64_t tiled_keys_of(int64_t T) { return (T + 31) / 32 * 32; }

// Linux lends the registers to processes that ask (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static int tiles_are_lent(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

INLINE void shape_tiles(Head is) {
    const int w = is.words < 16 ? (int)is.words : 16, d = is.width < 16 ? (int)is.width : 16;
    struct {
        uint8_t palette, start, zeros[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1,
               .rows = {16, 16, (uint8_t)w, (uint8_t)d, (uint8_t)d, 8, 16, 16},
               .bytes = {64, (uint16_t)(w * 4), 64, 64, 32, 64, 64, 64}};
    _tile_loadconfig(&shape);
}

INLINE void passed(void) { __asm__ volatile("" : : : "memory"); }

// to = 16 keys' rows times the columns of 16 queries.
INLINE void tile_of_scores(Floats *to, const Word *rows, const Bits *columns, Head is) {
    _tile_zero(0);
    for (int64_t w = 0; w < is.words; w += 16) {
        _tile_loadd(1, rows + w, is.words * 4);
        _tile_loadd(2, columns + w, 64);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, to, 64);
}

// sum[d] = the sum over n keys of weight[k], in pairs, times number d of key k; with `more` added to what is there.
INLINE void sums_over_keys(Floats *sum, const Bits *weights, const Bits *keys, int64_t n, int more, Head is) {
    for (int64_t d = 0; d < is.half * 2; d += 16) {
        if (more) _tile_loadd(3, sum + d, 64);
        else _tile_zero(3);
        for (int64_t k = 0; k < n; k += 16) {
            _tile_loadd(4, (const Word *)(keys + k / 32 * is.width + d) + k % 32 / 2, 64);
            _tile_loadd(5, weights + k / 2, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(3, sum + d, 64);
    }
}

// Keys' rows, number by number: (keys / 32, width, 16), words of two keys. pairs: scratch, zeros where there is no key.
static void number_by_number(Bits *to, Word *pairs, const Word *rows, int64_t T, Head is) {
    pairs_of(pairs, rows, T, is);
    for (int64_t k = 0; k < T; k += 32) to_columns(to + k / 32 * is.width, pairs + k / 2 * is.width, is.width, is.width);
}

// Rows (dy, 0) and (0, q) of the pairs of 16 queries, 8 numbers of each: (width / 8, 16, 16). The zeros are there already.
static void apart(Word *to, const Word *q, const Word *dy, Head is) {
    const __m512i order = _mm512_set_epi16(31, 23, 30, 22, 29, 21, 28, 20, 27, 19, 26, 18, 25, 17, 24, 16,
                                           15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    for (int64_t w = 0; w < is.used; w += 4, to += 256)
        for (int r = 0; r < 8; r++) {
            const int64_t i = 2 * r * is.words + w, next = i + is.words;
            const __m512i both = _mm512_permutexvar_epi16(order, fours(dy + i, dy + next, q + i, q + next));
            _mm512_mask_storeu_epi32(to + r * 16, 0x00ff, both);
            _mm512_mask_storeu_epi32(to + (8 + r) * 16, 0xff00, both);
        }
}

static int64_t tiled_forward_words(int64_t T, int64_t width) {
    return (2 * tiled_keys_of(T) + 32) * width + 24 * tiled_keys_of(T);
}

INLINE void tiled_forward_task(const Attention *a, Word *scratch_, Word *y, float *log_sum, int64_t b, int64_t g, Head is) {
    const int64_t T = a->T, H = a->H, keys = tiled_keys_of(T), size = keys * is.words;
    Word *K = scratch_, *V = K + size, *pairs = V + size, *rows = pairs + size;
    Bits *Q = (Bits *)(rows + 16 * is.words), *Vn = Q + is.words, *P = Vn + size / 16;
    Floats *S = (Floats *)(P + keys / 2), *Y = S + keys;
    shape_tiles(is);
    read_keys(a, K, V, Q, b, g, is);
    number_by_number(Vn, pairs, V, T, is);
    for (int64_t h = g * (H / a->G); h < (g + 1) * (H / a->G); h++)
        for (int64_t t0 = 0; t0 < T; t0 += 16) {
            const int n = T - t0 < 16 ? (int)(T - t0) : 16;
            read_turned(a, rows, Q, b, t0, h, a->scale, is);
            passed();
            for (int64_t k = 0; k <= t0; k += 16) tile_of_scores(S + k, K + k * is.words, Q, is);
            passed();
            for (int j = 0; j < 16; j++) S[t0 + j] = either(sees(0, j), S[t0 + j], all(LOWEST));  // 2^LOWEST is 0
            Floats max = largest_key(S), sum = all(0.0f);
            for (int64_t k = KEYS; k < t0 + 16; k += KEYS) max = larger(max, largest_key(S + k));
            const Bits queries = hash_of_queries(a, b, h, t0);
            for (int64_t k = 0; k < t0 + 16; k += KEYS) {
                Floats p[KEYS];
                for (int j = 0; j < KEYS; j++) p[j] = exp2_roughly(S[k + j] - max);
                sum += sum_of_keys(p);
                if (a->dropout.dropped)  // after the sum, as above
                    for (int j = 0; j < KEYS; j++) p[j] *= dropout_of(&a->dropout, queries ^ column_hash(k + j));
                for (int j = 0; j < KEYS; j += 2) P[(k + j) / 2] = two_of(p[j], p[j + 1]);
            }
            passed();
            sums_over_keys(Y, P, Vn, t0 + 16, 0, is);
            passed();
            const Floats share = 1.0f / sum, log = max + log2_of(sum);
            for (int64_t i = 0; i < is.half; i++) put(Q, i, Y[2 * i] * share, Y[2 * i + 1] * share, is);
            to_rows(y + ((b * T + t0) * H + h) * is.used, Q, H * is.used, n, is);
            memcpy(log_sum + (b * H + h) * T + t0, &log, (size_t)n * 4);
        }
    _tile_release();
}

static int64_t tiled_backward_words(int64_t T, int64_t width) {
    return (4 * tiled_keys_of(T) + 128) * width + 56 * tiled_keys_of(T) + 256;
}

INLINE void tiled_backward_task(const Attention *a, Word *scratch_, const Word *y, const float *log_sum, const Word *dy,
                                Word *dqkv, int64_t b, int64_t g, Head is) {
    const int64_t T = a->T, H = a->H, keys = tiled_keys_of(T), size = keys * is.words, block = 16 * is.words;
    Word *K = scratch_, *V = K + size, *pairs = V + size, *q_rows = pairs + size, *QO = q_rows + 3 * block;
    Word *PD = QO + 32 * is.width;
    Floats *dVK = (Floats *)(PD + 16 * keys), *S = dVK + keys * is.width / 8, *D = S + keys, *dQ = D + keys;
    Bits *Kn = (Bits *)(dQ + is.width), *W = Kn + size / 16, *Q = W + keys / 2, *O = Q + is.words, *Y = O + is.words;
    const int64_t parts = (is.used + 3) / 4;  // of 8 numbers
    const float scale = a->scale / LOG2E;
    shape_tiles(is);
    memset(dVK, 0, (size_t)(2 * keys * is.width) * 4);
    read_keys(a, K, V, Q, b, g, is);
    number_by_number(Kn, pairs, K, T, is);
    for (int64_t h = g * (H / a->G); h < (g + 1) * (H / a->G); h++)
        for (int64_t t0 = 0; t0 < T; t0 += 16) {
            const int n = T - t0 < 16 ? (int)(T - t0) : 16;
            const Floats delta = read_queries(a, q_rows, Q, dy, O, y, Y, b, t0, h, is);
            apart(QO, q_rows, q_rows + block, is);
            Floats lse = all(0.0f);
            memcpy(&lse, log_sum + (b * H + h) * T + t0, (size_t)n * 4);
            const Bits queries = hash_of_queries(a, b, h, t0);
            for (int64_t start = 0, end; start <= t0; start = end) {
                end = start + STRIP < t0 + 16 ? start + STRIP : t0 + 16;
                passed();
                for (int64_t k = start; k < end; k += 16) {
                    tile_of_scores(S + k - start, K + k * is.words, Q, is);
                    tile_of_scores(D + k - start, V + k * is.words, O, is);
                }
                passed();
                if (end > t0)
                    for (int j = 0; j < 16; j++) S[t0 - start + j] = either(sees(0, j), S[t0 - start + j], all(LOWEST));
                for (int64_t k = 0; k < end - start; k += 2) {
                    Floats ds[2];
                    for (int j = 0; j < 2; j++) {
                        Floats p = exp2_roughly(S[k + j] - lse), factor = all(1.0f);
                        if (a->dropout.dropped) factor = dropout_of(&a->dropout, queries ^ column_hash(start + k + j));
                        ds[j] = p * (D[k + j] * factor - delta);
                        p *= factor;
                        _mm512_storeu_si512(PD + (k + j) * 16, (__m512i)_mm512_cvtne2ps_pbh((__m512)ds[j], (__m512)p));
                    }
                    W[k / 2] = two_of(ds[0], ds[1]);
                }
                passed();
                sums_over_keys(dQ, W, Kn + start / 32 * is.width, end - start, start > 0, is);
                for (int64_t c = 0; c < parts; c++) {
                    _tile_loadd(7, QO + c * 256, 64);
                    for (int64_t k = start; k < end; k += 16) {
                        Floats *sum = dVK + (k / 16 * is.width / 8 + c) * 16;
                        _tile_loadd(6, PD + (k - start) * 16, 64);
                        _tile_loadd(0, sum, 64);
                        _tile_dpbf16ps(0, 6, 7);
                        _tile_stored(0, sum, 64);
                    }
                }
            }
            passed();
            for (int64_t i = 0; i < is.half; i++) turn(a, Q, i, dQ[2 * i] * scale, dQ[2 * i + 1] * scale, t0, -1.0f, is);
            to_rows(dqkv + word_of(a, b, t0, h, is), Q, (H + 2 * a->G) * is.used, n, is);
        }
    for (int64_t t0 = 0; t0 < T; t0 += 16) {
        const int n = T - t0 < 16 ? (int)(T - t0) : 16;
        for (int64_t c = 0; c < parts; c++) {
            const Floats *part = (const Floats *)Y;
            to_columns(Y, (const Word *)(dVK + (t0 / 16 * is.width / 8 + c) * 16), 16, 16);
            for (int i = 0; i < 4 && 4 * c + i < is.half; i++) {
                put(O, 4 * c + i, part[2 * i], part[2 * i + 1], is);
                turn(a, Q, 4 * c + i, part[8 + 2 * i] / LOG2E, part[9 + 2 * i] / LOG2E, t0, -1.0f, is);
            }
        }
        to_rows(dqkv + word_of(a, b, t0, H + g, is), Q, (H + 2 * a->G) * is.used, n, is);
        to_rows(dqkv + word_of(a, b, t0, H + a->G + g, is), O, (H + 2 * a->G) * is.used, n, is);
    }
    _tile_release();
}
#else
static int tiles_are_lent(void) { return 0; }
#define tiled_head_of(hd) head_of(1, hd)
#define tiled_forward_words forward_words
#define tiled_backward_words backward_words
#define tiled_forward_task forward_task
#define tiled_backward_task backward_task
#endif

// Of each way a version of `task` for heads of 8, whose loops the compiler unrolls, and one for all others.
#define FOR_HEAD(task, ...)                                                                             \
    if (tiled && hd == 8) tiled_##task(__VA_ARGS__, tiled_head_of(8));                                  \
    else if (tiled) tiled_##task(__VA_ARGS__, tiled_head_of(hd));                                       \
    else if (bf16 && hd == 8) task(__VA_ARGS__, head_of(1, 8));                                         \
    else if (bf16) task(__VA_ARGS__, head_of(1, hd));                                                   \
    else if (hd == 8) task(__VA_ARGS__, head_of(0, 8));                                                 \
    else task(__VA_ARGS__, head_of(0, hd))

static Attention attention_of(const void *qkv, const float *cos, const float *sin, float *tables, int64_t T, int64_t H,
                              int64_t G, int64_t hd, int64_t seed, double dropout) {
    const int64_t half = hd / 2;
    Attention a = {qkv, tables, tables + half * padded(T), T, H, G, dropout_by(dropout, seed),
                   LOG2E / sqrtf((float)hd)};
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < half; i++) {
            a.cos[i * padded(T) + t] = cos[t * half + i];
            a.sin[i * padded(T) + t] = sin[t * half + i];
        }
    return a;
}

int attention_forward(const void *qkv, const float *cos, const float *sin, void *y, float *log_sum, int64_t B, int64_t T,
                      int64_t H, int64_t G, int64_t hd, int64_t bf16, int64_t seed, double dropout) {
    const int tiled = bf16 && tiles_are_lent();
    const int64_t size = tiled ? tiled_forward_words(T, tiled_head_of(hd).width) : forward_words(T, head_of(0, hd).width);
    float *tables = calloc((size_t)(padded(T) * hd), 4), *all_threads = scratch(1, size);
    if (tables && all_threads) {
        const Attention a = attention_of(qkv, cos, sin, tables, T, H, G, hd, seed, dropout);
#pragma omp parallel for schedule(dynamic)
        for (int64_t task = 0; task < B * G; task++) {
            Word *own = (Word *)mine(all_threads, 1, size);
            FOR_HEAD(forward_task, &a, own, y, log_sum, task / G, task % G);
        }
    }
    const int failed = !tables || !all_threads;
    free(tables);
    free(all_threads);
    return -failed;
}

// dqkv from dy; the probabilities are computed again from log_sum.
int attention_backward(const void *qkv, const float *cos, const float *sin, const void *y, const float *log_sum,
                       const void *dy, void *dqkv, int64_t B, int64_t T, int64_t H, int64_t G, int64_t hd, int64_t bf16,
                       int64_t seed, double dropout) {
    const int tiled = bf16 && tiles_are_lent();
    const int64_t size = tiled ? tiled_backward_words(T, tiled_head_of(hd).width) : backward_words(T, head_of(0, hd).width);
    float *tables = calloc((size_t)(padded(T) * hd), 4), *all_threads = scratch(1, size);
    if (tables && all_threads) {
        const Attention a = attention_of(qkv, cos, sin, tables, T, H, G, hd, seed, dropout);
#pragma omp parallel for schedule(dynamic)
        for (int64_t task = 0; task < B * G; task++) {
            Word *own = (Word *)mine(all_threads, 1, size);
            FOR_HEAD(backward_task, &a, own, y, log_sum, dy, dqkv, task / G, task % G);
        }
    }
    const int failed = !tables || !all_threads;
    free(tables);
    free(all_threads);
    return -failed;
}

// ---------------------------------------------------------------------------------------------------------------------
// A residual sum and its RMSNorm (model.RMSNorm): x = h + branch, out = x / rms(x) * weight
//
// h, x: (N, D) float32; branch, out: (N, D) activations. Without a branch (NULL) x is h, and is not written; without out
// (NULL) there is only the sum.

static float inverse_rms(Floats squares, int64_t D, float eps) { return 1.0f / sqrtf(sum_of(squares) / (float)D + eps); }

int norm_forward(const float *h, const void *branch, const float *weight, float *x, void *out,
                 int64_t N, int64_t D, float eps, int64_t bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *sum = branch ? x + n * D : h + n * D;
        Floats squares = all(0.0f);
        for (int64_t d = 0; d < D; d += LANES) {
            Floats a = load(h, n * D + d, D - d, 0);
            if (branch) store(x, n * D + d, a += load(branch, n * D + d, D - d, (int)bf16), D - d, 0);
            squares += a * a;
        }
        if (!out) continue;
        const float r = inverse_rms(squares, D, eps);
        for (int64_t d = 0; d < D; d += LANES)
            store(out, n * D + d, load(sum, d, D - d, 0) * r * load(weight, d, D - d, 0), D - d, (int)bf16);
    }
    return 0;
}

// dx, and the same rounded as dbranch (or NULL), from dout and what comes from later layers, dx_later (or NULL).
int norm_backward(const float *x, const float *weight, const void *dout, const float *dx_later, float *dx, void *dbranch,
                  float *dweight, int64_t N, int64_t D, float eps, int64_t bf16) {
    const int64_t width = padded(D), blocks = (N + ROW_BLOCK - 1) / ROW_BLOCK;
    float *partial = calloc((size_t)(blocks * width), 4);  // of dweight
    if (!partial) return -1;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t n = block * ROW_BLOCK; n < N && n < (block + 1) * ROW_BLOCK; n++) {
            Floats squares = all(0.0f), along = all(0.0f);
            for (int64_t d = 0; d < D; d += LANES) {
                const Floats a = load(x, n * D + d, D - d, 0), g = load(dout, n * D + d, D - d, (int)bf16);
                squares += a * a;
                along += g * load(weight, d, D - d, 0) * a;
            }
            const float r = inverse_rms(squares, D, eps), off = sum_of(along) * r * r * r / (float)D;
            for (int64_t d = 0; d < D; d += LANES) {
                const Floats a = load(x, n * D + d, D - d, 0), g = load(dout, n * D + d, D - d, (int)bf16);
                *at(partial, block * width + d) += g * a * r;
                Floats c = g * load(weight, d, D - d, 0) * r - a * off;
                if (dx_later) c += load(dx_later, n * D + d, D - d, 0);
                store(dx, n * D + d, c, D - d, 0);
                if (dbranch) store(dbranch, n * D + d, c, D - d, (int)bf16);
            }
        }
    memset(dweight, 0, (size_t)D * 4);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t d = 0; d < D; d++) dweight[d] += partial[block * width + d];
    free(partial);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// SwiGLU (model.FeedForward): out = silu(gate) * up. gate and up are the halves of a row: (N, 2 D); out: (N, D)

INLINE void swiglu_rows(const void *gate_up, void *out, int64_t N, int64_t D, int bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t d = 0; d < D; d += LANES) {
            const Floats x = load(gate_up, n * 2 * D + d, D - d, bf16), up = load(gate_up, n * 2 * D + D + d, D - d, bf16);
            store(out, n * D + d, x * sigmoid(x, bf16) * up, D - d, bf16);
        }
}

INLINE void swiglu_gradients(const void *gate_up, const void *dout, void *dgate_up, int64_t N, int64_t D, int bf16) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++)
        for (int64_t d = 0; d < D; d += LANES) {
            const Floats x = load(gate_up, n * 2 * D + d, D - d, bf16), up = load(gate_up, n * 2 * D + D + d, D - d, bf16);
            const Floats g = load(dout, n * D + d, D - d, bf16), s = sigmoid(x, bf16), silu = x * s;
            store(dgate_up, n * 2 * D + d, g * up * (s + silu * (1.0f - s)), D - d, bf16);
            store(dgate_up, n * 2 * D + D + d, g * silu, D - d, bf16);
        }
}

int swiglu_forward(const void *gate_up, void *out, int64_t N, int64_t D, int64_t bf16) {
    if (bf16) swiglu_rows(gate_up, out, N, D, 1);
    else swiglu_rows(gate_up, out, N, D, 0);
    return 0;
}

int swiglu_backward(const void *gate_up, const void *dout, void *dgate_up, int64_t N, int64_t D, int64_t bf16) {
    if (bf16) swiglu_gradients(gate_up, dout, dgate_up, N, D, 1);
    else swiglu_gradients(gate_up, dout, dgate_up, N, D, 0);
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

// logits, teacher: (N, V) activations; classes, scales: (N, K); taught: (N,) bool, or NULL for nowhere.
// Results: (N, K) and (N,)
//
//     entropy[k] = -log softmax(logits)[classes[k]]             divergence = KL(softmax(teacher) || softmax(logits))
//     gradient = sum of scales[k] * that of entropy[k] + teacher_scale * that of divergence, by the logits
//     log_sum = log(sum(exp(logits))), which is what teacher_log_sum is of the teacher
//     best = where the logits are largest, the first of equals
//
// divergence is 0 where not taught, and gradient where nothing has a scale. gradient may be the logits themselves, or NULL
// if it is not needed, and so may best. Returns -2 if a class is not in 0..V-1.
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

// ---------------------------------------------------------------------------------------------------------------------
// Clipping (torch.nn.utils.clip_grad_norm_), of `count` gradients of n numbers each: *norm is that of all together, and
// becomes at most `most`

int clip(float *const *gradient, const int64_t *n, int64_t count, double most, float *norm) {
    const int64_t block = 4096;  // numbers whose squares are summed in float32
    double squares = 0.0, *of_each = calloc((size_t)count + 1, sizeof(double));
    if (!of_each) return -1;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++)
        for (int64_t start = 0; start < n[i]; start += block) {
            Floats sum = all(0.0f);
            for (int64_t j = start; j < n[i] && j < start + block; j += LANES) {
                const Floats g = load(gradient[i], j, n[i] - j, 0);
                sum += g * g;
            }
            of_each[i] += sum_of(sum);
        }
    for (int64_t i = 0; i < count; i++) squares += of_each[i];
    free(of_each);
    *norm = (float)sqrt(squares);
    const float factor = (float)(most / (sqrt(squares) + 1e-6));
    if (factor >= 1.0f) return 0;  // a NaN is not, and comes through
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < n[i]; j++) gradient[i][j] *= factor;
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// AdamW (torch.optim.AdamW), of all tensors in one call
//
// Of each of `count` tensors: n numbers x, their gradient, both moments, and the steps so far, which are counted here.

int adamw(float *const *x, const float *const *gradient, float *const *mean, float *const *square, float *const *steps,
          const int64_t *n, int64_t count, double rate, double beta1, double beta2, double eps, double decay) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        const double step = *steps[i] += 1.0f;
        const float b1 = (float)beta1, b2 = (float)beta2, rest1 = (float)(1.0 - beta1), rest2 = (float)(1.0 - beta2);
        const float kept = (float)(1.0 - rate * decay), size = (float)(rate / (1.0 - pow(beta1, step)));
        const float root = (float)(1.0 / sqrt(1.0 - pow(beta2, step))), least = (float)eps;
        float *restrict w = x[i], *restrict m = mean[i], *restrict v = square[i];
        const float *restrict g = gradient[i];
        for (int64_t j = 0; j < n[i]; j++) {
            m[j] = m[j] * b1 + g[j] * rest1;
            v[j] = v[j] * b2 + g[j] * g[j] * rest2;
            w[j] = w[j] * kept - size * m[j] / (sqrtf(v[j]) * root + least);
        }
    }
    return 0;
}
