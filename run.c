/*
run.c: runs a small Llama in plain C. One file, one program; needs libc, libm and threads; gcc 9 or clang 10 and later.

It reads a model file (llama2.c's versions 0 and 1, float32, or 2, int8) and a tokenizer file, then works in one mode:
  generate   continues a prompt: feeds BOS and the prompt, prints tokens until BOS or the step limit (default)
  chat       holds a conversation in Llama-2's chat template
  score      prints the mean negative log-likelihood, in nats per token, of the text on standard input
With -d it drafts tokens ahead and prints the same text sooner.

Build:  cc -O3 -march=native -pthread -o run run.c -lm
Run:    ./run model.bin -z tokenizer.bin -t 0 -n 200 -i "Once upon a time"
Flags:  ./run --help

The story goes to standard output, everything else to standard error. An error is one message and exit code 1.
Left out on purpose: training, several conversations at once, GPUs, big-endian machines.

Contents. Start with 3 and 4, which are the Llama. Sections 10 to 14 make it fast.
   1 Platform         what differs between systems, compilers and processors
   2 Basics           errors, memory, texts, files
   3 Model            sizes, weights, activations
   4 Forward pass     tokens -> logits
   5 Model file       file -> header, tensors, weights in memory
   6 Tokenizer file   file -> vocabulary
   7 Encoding         text -> tokens
   8 Sampling         logits -> next token
   9 Printing         tokens -> text
  10 Products         out = W x, float32 and int8
  11 Attention        one query over the cache, and the functions that need exp
  12 Threads
  13 Screen           optional: the best token of a large vocabulary without most of the classifier's float32 weights
  14 Drafting         optional: several tokens per forward pass
  15 Modes            generate, chat, score
  16 Command line

Letters in shapes:
  D dim   H hidden_dim   L n_layers   V vocab_size   S seq_len (the context)   N tokens in one pass, at most BATCH
  hd = D / n_heads, the size of a head   K = n_kv_heads * hd, the size of all keys of one position
  [n] is n rounded up to a multiple of PANEL: products write whole panels, so their outputs have room for that
*/
#if defined __clang__  // -ffast-math may not reorder sums, or a token's logits would depend on its batch
#pragma clang fp reassociate(off)
#elif defined __GNUC__
#pragma GCC optimize("no-associative-math")
#endif
#define _GNU_SOURCE  // mmap, madvise, clock_gettime, sched_getaffinity under -std=c11
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _WIN32
#include <io.h>
#else
#include <sys/mman.h>
#endif
#ifdef __APPLE__
#include <sys/resource.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

#ifndef O_BINARY
#define O_BINARY 0  // only Windows has it
#endif
#ifndef O_NONBLOCK
#define O_NONBLOCK 0
#endif
#ifndef SCREEN_FROM
#define SCREEN_FROM 1e6  // weights of the smallest classifier that gets a screen (section 13)
#endif
#ifdef SEPARATE_BUFFERS
enum { SHARED_PAGES = 0 };  // each buffer is an allocation, so that sanitizers see where it ends
#else
enum { SHARED_PAGES = 1 };
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 1 Platform. Every #ifdef is here or above; only main has one more.

// The n bytes of an open file, read-only; NULL and errno if that fails.
static const char *map_bytes(int fd, size_t n) {
#ifdef _WIN32
    char *at = malloc(n);
    for (size_t done = 0; at && done < n;) {
        int got = read(fd, at + done, n - done < 1 << 30 ? (unsigned)(n - done) : 1 << 30);
        if (got == 0) errno = EIO;  // the file has become shorter
        if (got <= 0) return NULL;
        done += (size_t)got;
    }
    return at;
#else
    void *at = mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0);
    return at == MAP_FAILED ? NULL : at;
#endif
}

// Asks for huge pages: fewer misses of the TLB.
static void use_huge_pages(void *at, size_t n) {
#ifdef MADV_HUGEPAGE
    madvise(at, n, MADV_HUGEPAGE);
#else
    (void)at, (void)n;
#endif
}

// Takes the pages of mapped bytes out of memory. Reading them again brings them back from the file.
static void release_pages(const char *at, size_t n) {
#ifdef __linux__
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = (uintptr_t)at / page * page, to = ((uintptr_t)at + n) / page * page;
    if (to > from) madvise((void *)from, to - from, MADV_DONTNEED);
#else
    (void)at, (void)n;
#endif
}

static void binary_streams(void) {
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// In units of 10^6 bytes, mapped pages included; 0 where the system does not report it.
static double peak_memory(void) {
#ifdef __APPLE__
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_maxrss * 1e-6;
#else
    FILE *file = fopen("/proc/self/status", "r");  // Linux's getrusage counts what the parent used before exec
    char line[256];
    double kib = 0.0;
    while (file && fgets(line, sizeof line, file)) sscanf(line, "VmHWM: %lf", &kib);
    if (file) fclose(file);
    return kib * 1024e-6;
#endif
}

static int processors(void) {
#ifdef _WIN32
    const char *n = getenv("NUMBER_OF_PROCESSORS");
    return n && atoi(n) > 0 ? atoi(n) : 1;
#else
#ifdef __linux__
    cpu_set_t set;  // those that this process may use
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
}

// Tells the processor that this thread is spinning.
static inline void relax(void) {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#endif
}

#if defined SCALAR
enum { WIDTH = 1, REGISTERS = 8 };  // one number at a time: the baseline of make bench-c
#elif defined __AVX512F__
enum { WIDTH = 16, REGISTERS = 16 };  // floats per register; registers for sums: half of all
#elif defined __AVX__
enum { WIDTH = 8, REGISTERS = 8 };
#else
enum { WIDTH = 4, REGISTERS = 8 };
#endif
typedef float Floats __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int16_t Shorts __attribute__((vector_size(WIDTH * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))  // for functions whose loop bounds are literals

// An int8 weight is kept as a byte, weight + ZERO_POINT: x86 multiplies unsigned with signed bytes, ARM signed ones.
#if defined __ARM_FEATURE_DOTPROD && !defined SCALAR
enum { ZERO_POINT = 0 };
#else
enum { ZERO_POINT = 128 };
#endif

// In each lane the sum of two products of 16-bit numbers.
#if defined __AVX512BW__
#define MULTIPLY_PAIRS(a, b) (Ints)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#elif defined __AVX2__ && !defined __AVX512F__
#define MULTIPLY_PAIRS(a, b) (Ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#elif defined __SSE2__ && !defined __AVX__
#define MULTIPLY_PAIRS(a, b) (Ints)_mm_madd_epi16((__m128i)(a), (__m128i)(b))
#endif

// sum plus, in each lane, the products of the four weights in w with the four signed bytes in x.
INLINE Ints dot4(Ints sum, Ints w, int32_t x) {
#if defined __AVX512VNNI__ && defined __AVX512F__ && !defined SCALAR
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined __AVXVNNI__ && !defined __AVX512F__ && !defined SCALAR
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
#elif defined __ARM_FEATURE_DOTPROD && !defined SCALAR
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#elif defined MULTIPLY_PAIRS && !defined SCALAR
    // Even and odd bytes, widened to 16 bits; x is the same in all lanes, so the compiler moves its half out of the loop.
    Shorts bytes = (Shorts)((Ints){0} + x);
    sum += MULTIPLY_PAIRS(w & 0x00ff00ff, bytes << 8 >> 8);
    return sum + MULTIPLY_PAIRS(w >> 8 & 0x00ff00ff, bytes >> 8);
#else
    return sum + (w & 255) * (int8_t)x + (w >> 8 & 255) * (int8_t)(x >> 8) + (w >> 16 & 255) * (int8_t)(x >> 16) +
           (w >> 24 & 255) * (int8_t)(x >> 24);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 2 Basics: errors, memory, texts, files

static _Noreturn void die(const char *format, ...) {
    fflush(stdout);  // the text so far comes before the reason it stops
    va_list args;
    va_start(args, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(EXIT_FAILURE);
}

// Zeroed memory for n elements, or for one if n is 0: NULL always means failure.
static void *allocate(uint64_t n, size_t element, const char *what) {
    if (n == 0) n = 1;
    void *p = n > SIZE_MAX / element ? NULL : calloc((size_t)n, element);
    if (!p) die("out of memory: %s takes %llu elements of %zu bytes", what, (unsigned long long)n, element);
    return p;
}

// Zeroed memory that lives as long as the program, aligned to a cache line. Small buffers share huge pages: with all of
// a small model in one, the TLB and the caches miss less.
static void *buffer(uint64_t n, size_t element, const char *what) {
    if (!SHARED_PAGES) return allocate(n, element, what);
    enum { LINE = 64, PAGE = 1 << 21 };
    static char *free_at, *end;
    uint64_t bytes = n < SIZE_MAX / 2 / element ? n * element : SIZE_MAX / 2, lines = (bytes + LINE - 1) / LINE * LINE;
    if (lines > (uint64_t)(end - free_at)) {
        uint64_t size = lines / PAGE * PAGE + 2 * PAGE;  // up to one page is lost in front
        char *p = allocate(size, 1, what);
        free_at = p + (-(uintptr_t)p & (PAGE - 1));
        end = p + size;
        use_huge_pages(free_at, (size_t)(end - free_at) / PAGE * PAGE);
    }
    char *p = free_at;
    free_at += lines;
    return p;
}

typedef struct {
    char *at;   // not a C string: may hold NULs, need not end in one
    size_t n;   // bytes in use
    size_t cap; // bytes allocated
} Text;

static void reserve(Text *t, size_t more) {
    if (t->cap - t->n >= more) return;
    if (more > SIZE_MAX / 2 - t->n) die("out of memory: a text of more than half the address space");
    size_t cap = 2 * (t->n + more);
    char *at = realloc(t->at, cap);
    if (!at) die("out of memory: a text of %zu bytes", cap);
    t->at = at;
    t->cap = cap;
}

static void append(Text *t, const char *bytes, size_t n) {
    reserve(t, n);
    if (n) memcpy(t->at + t->n, bytes, n);
    t->n += n;
}

static void append_string(Text *t, const char *s) { append(t, s, strlen(s)); }

typedef struct {
    const char *path;
    const char *at;
    size_t n;
} Map;

// Maps a whole file read-only.
static Map map_file(const char *path, const char *what) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_BINARY | O_NONBLOCK);  // O_NONBLOCK: opening a pipe must not wait
    if (fd < 0 || fstat(fd, &st) < 0) die("%s: cannot open the %s: %s", path, what, strerror(errno));
    if (S_ISDIR(st.st_mode)) die("%s: is a folder; expected a %s", path, what);
    if (!S_ISREG(st.st_mode)) die("%s: is not a regular file; expected a %s", path, what);
    if (st.st_size == 0) die("%s: is empty; expected a %s", path, what);
    if ((uint64_t)st.st_size > SIZE_MAX) die("%s: %lld bytes do not fit into memory", path, (long long)st.st_size);
    Map m = {path, map_bytes(fd, (size_t)st.st_size), (size_t)st.st_size};
    if (!m.at) die("%s: cannot map the %s into memory: %s", path, what, strerror(errno));
    close(fd);
    return m;
}

// Bits instead of isfinite(): -ffast-math lets the compiler assume that isfinite() is always true.
static bool all_finite(const float *x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bad |= (bits & 0x7f800000u) == 0x7f800000u;  // exponent all ones: infinity or NaN
    }
    return !bad;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3 Model: sizes, weights, activations

typedef struct {
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
    bool shared_classifier;  // the classifier is the token embedding
    int version, group;      // group: as in Matrix
    int head_size, kv_dim;   // derived
    int sharing;             // query heads for each key head
} Config;

// Weights W, (rows, n), in the order of section 10.
typedef struct {
    char *at;
    int rows, n;
    int group;  // int8: columns that share a scale, a multiple of 4; else FLOAT32 or BFLOAT16
} Matrix;

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { PANEL = 64, MAX_GROUP = 1 << 15 };  // rows of a panel; columns of a group at most, so that int8 sums fit 32 bits

static uint64_t panels(uint64_t rows) { return (rows + PANEL - 1) / PANEL; }

static uint64_t padded(uint64_t rows) { return panels(rows) * PANEL; }

typedef struct {
    Matrix qkv;  // (D + 2K, D)  wq, wk, wv on top of each other
    Matrix wo;   // (D, D)
    Matrix w13;  // (2H, D)  w1 on top of w3
    Matrix w2;   // (D, H)
} Layer;

// A tensor as it lies in the file: `count` matrices of (rows, n), one after the other.
typedef struct {
    const char *at;
    uint64_t count;       // 0: the file does not have this tensor
    int rows, n, group;   // group 0: float32; else each matrix is int8 (rows, n), then float32 scales (rows, n / group)
} Tensor;

enum { TOK, ATT_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W2, W3, NORM, ROPE, CLS, TENSORS };

// How many tokens of a prompt, a scored text or a draft go through the layers together.
enum { BATCH = 32 };

typedef struct {
    float *x;                    // (N, D) the residual stream
    float *xb;                   // (N, D) normed input of a product; in the end, that of the classifier
    float *delta;                // (N, [D]) what a residual branch adds
    float *qkv;                  // (N, [D + 2K])
    float *hb;                   // (N, [2H]) hidden activations, gate and up side by side
    float *att;                  // (threads, sharing, [S]) attention weights of the queries that share a key head
    float *key;                  // (L, n_kv_heads) matrices ([S], hd): the cache of keys, its positions in panels
    float *value;                // (L, n_kv_heads, [S], hd) the cache of values; with heads of LANE_HEAD as keys are
    float *frequency;            // (hd / 2,) of RoPE
    float *rope_cos, *rope_sin;  // (S, hd / 2), of which the first rope_rows are filled
    int rope_rows;
    float *logits;               // (N, [V])
    int8_t *q;                   // (N, max(D, H)) rounded input of an int8 product
    float *scale;                // (N, groups) its scales
    int32_t *offset;             // (N, groups) its offsets, see quantise
} State;

// Section 13.
typedef struct {
    Matrix rough;         // (V, D) the classifier in int8, one scale per row; .at is NULL where there is no screen
    float *norm, *error;  // (V,) upper bounds of |w| and of |w - rounded w|
    bool first_token_done, filled;
} Screen;

typedef struct {
    Map file;
    Config config;
    Tensor tensor[TENSORS];  // as in the file; norms and token embeddings are read from there
    Layer *layer;            // (L,)
    Matrix classifier;       // (V, D)
    Screen screen;
    bool greedy;             // only the best logit has to be exact, so the screen may be used
    bool bf16;               // float32 matrices are rounded to bfloat16
    State s;
} Model;

// ---------------------------------------------------------------------------------------------------------------------
// 4 Forward pass: tokens -> logits

// out = W x for each of N inputs; x: (N, x_stride), out: (N, [rows]). Section 10.
static void matmul(const State *s, float *out, const float *x, size_t x_stride, int N, const Matrix *W);
// s.xb = softmax(q k / sqrt(hd)) v for N tokens from pos on; q in s.qkv, k and v in the cache. Section 11.
static void attend(Model *m, int layer, int N, int pos);
// gate = silu(gate) * up, n numbers each; gate and up are neighbours. Section 11.
static void swiglu(float *gate, const float *up, int n);
static float sum_of_squares(const float *x, int n);
// Stores the key and the value of position pos in the cache; k, v: (K,). Section 11.
static void store_kv(Model *m, int layer, int pos, const float *k, const float *v);
// s.logits for N inputs; exact, or through the screen of section 13.
static void classify(Model *m, const float *x, int N);
// Row `row` of matrix `which` of a tensor; *scale: its scales, if it is int8. Section 5.
static const char *tensor_row(const Tensor *t, uint64_t which, int row, const char **scale);

static const float *norm_weights(const Model *m, int which, int layer) {
    return (const float *)(const void *)m->tensor[which].at + (size_t)layer * m->config.dim;
}

static void embed(const Model *m, int token, float *x) {
    const Tensor *t = &m->tensor[TOK];
    const char *scales = NULL, *row = tensor_row(t, 0, token, &scales);
    const float *scale = (const float *)(const void *)scales;
    if (!t->group) memcpy(x, row, t->n * sizeof(float));
    else
        for (int j = 0; j < t->n; j++) x[j] = (float)(int8_t)row[j] * scale[j / t->group];
}

static void rmsnorm(float *out, const float *x, const float *weight, int n) {
    float scale = 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + 1e-5f);
    for (int i = 0; i < n; i++) out[i] = weight[i] * (scale * x[i]);
}

static void add(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}


// Turns each pair (x[2i], x[2i+1]) of each head by its angle. Neighbours are a pair, as in llama2.c; Hugging Face's
// Llama pairs the two halves of a head instead. cos_row, sin_row: (hd / 2,)
static void rope(float *x, int n, int head_size, const float *cos_row, const float *sin_row) {
    for (int head = 0; head < n; head += head_size)
        for (int i = 0; i < head_size / 2; i++) {
            float *pair = x + head + 2 * i, a = pair[0], b = pair[1];
            pair[0] = a * cos_row[i] - b * sin_row[i];
            pair[1] = a * sin_row[i] + b * cos_row[i];
        }
}

// The angles of the first `rows` positions. They are filled as positions come: a long context costs nothing until it is
// used.
static void fill_rope(State *s, int rows, int half) {
    for (; s->rope_rows < rows; s->rope_rows++)
        for (int i = 0; i < half; i++) {
            float angle = (float)s->rope_rows * s->frequency[i];
            s->rope_cos[(size_t)s->rope_rows * half + i] = cosf(angle);
            s->rope_sin[(size_t)s->rope_rows * half + i] = sinf(angle);
        }
}

// x += wo(attend(wqkv(rmsnorm(x)))) for N tokens from pos on.
static void attention(Model *m, int layer, int N, int pos) {
    const Config *c = &m->config;
    State *s = &m->s;
    int hd = c->head_size;
    size_t D = c->dim, width = padded(D + 2 * (size_t)c->kv_dim);
    for (int i = 0; i < N; i++) rmsnorm(s->xb + i * D, s->x + i * D, norm_weights(m, ATT_NORM, layer), c->dim);
    matmul(s, s->qkv, s->xb, D, N, &m->layer[layer].qkv);
    for (int i = 0; i < N; i++) {
        float *q = s->qkv + i * width, *k = q + c->dim, *v = k + c->kv_dim;
        size_t angle = (size_t)(pos + i) * (hd / 2);
        rope(q, c->dim + c->kv_dim, hd, s->rope_cos + angle, s->rope_sin + angle);  // q and k
        store_kv(m, layer, pos + i, k, v);
    }
    attend(m, layer, N, pos);
    matmul(s, s->delta, s->xb, D, N, &m->layer[layer].wo);
    for (int i = 0; i < N; i++) add(s->x + i * D, s->delta + i * padded(D), c->dim);
}

// x += w2(silu(w1 x') * w3 x'), x' = rmsnorm(x), for N tokens.
static void feed_forward(Model *m, int layer, int N) {
    const Config *c = &m->config;
    State *s = &m->s;
    int H = c->hidden_dim;
    size_t D = c->dim, width = padded(2 * (size_t)H);
    for (int i = 0; i < N; i++) rmsnorm(s->xb + i * D, s->x + i * D, norm_weights(m, FFN_NORM, layer), c->dim);
    matmul(s, s->hb, s->xb, D, N, &m->layer[layer].w13);
    for (int i = 0; i < N; i++) swiglu(s->hb + i * width, s->hb + i * width + H, H);
    matmul(s, s->delta, s->hb, width, N, &m->layer[layer].w2);
    for (int i = 0; i < N; i++) add(s->x + i * D, s->delta + i * padded(D), c->dim);
}

// Feeds N <= BATCH tokens at positions pos, pos + 1, ...; 0..pos-1 have been fed. Returns the logits after each of them
// from `first` on, (N - first, [V]). Nothing has looked at them yet: see checked.
static const float *forward(Model *m, const int *token, int N, int pos, int first) {
    const Config *c = &m->config;
    State *s = &m->s;
    size_t D = c->dim;
    fill_rope(s, pos + N, c->head_size / 2);
    for (int i = 0; i < N; i++) embed(m, token[i], s->x + i * D);
    for (int layer = 0; layer < c->n_layers; layer++) {
        attention(m, layer, N, pos);
        feed_forward(m, layer, N);
    }
    for (int i = first; i < N; i++) rmsnorm(s->xb + i * D, s->x + i * D, norm_weights(m, NORM, 0), c->dim);
    classify(m, s->xb + first * D, N - first);
    return s->logits;
}

// The logits after the token at pos: row `row` of what forward returned. Only logits that are used are checked: a draft
// that is not accepted must not end a story.
static const float *checked(const Model *m, int row, int pos) {
    const float *logits = m->s.logits + row * padded(m->config.vocab_size);
    if (!all_finite(logits, (size_t)m->config.vocab_size))
        die("%s: the logits at position %d are not finite: the weights are damaged", m->file.path, pos);
    return logits;
}

// Feeds any number of tokens, BATCH at a time. Returns the logits (V,) after the last.
static const float *feed(Model *m, const int *token, int n, int pos) {
    for (; n > BATCH; n -= BATCH, token += BATCH, pos += BATCH) forward(m, token, BATCH, pos, BATCH);
    forward(m, token, n, pos, n - 1);
    return checked(m, 0, pos + n - 1);
}

// The first of the largest. Most blocks of PANEL hold no larger number, which one branch-free pass shows.
static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 0, end; i < n; i = end) {
        int any = 0;
        end = n - i < PANEL ? n : i + PANEL;
        for (int j = i; j < end; j++) any |= x[j] > x[best];
        for (int j = i; any && j < end; j++)
            if (x[j] > x[best]) best = j;
    }
    return best;
}

// ---------------------------------------------------------------------------------------------------------------------
// 5 Model file: a header, then the tensors

enum { FIELDS = 7, MAGIC = 0x616b3432, HEADER_V1 = 256 };
enum { HEADS_MAGIC = 0x64616568, ZIP_MAGIC = 0x04034b50 };  // "head", "PK\3\4"

static uint32_t swap_bytes(uint32_t v) { return v >> 24 | (v >> 8 & 0xff00) | (v << 8 & 0xff0000) | v << 24; }

// The upper bounds are far beyond any model this program is for. They also bound every product below, so that 64-bit
// arithmetic cannot overflow. In versions 1 and 2 a context costs no bytes of the file, so MOST_ROPE and MOST_CACHE bound
// the tables that it asks for, in floats: 1 and 8 GiB.
static const uint64_t MOST_ROPE = 1ull << 28, MOST_CACHE = 1ull << 31;
static const struct { const char *name; int32_t min, max; } FIELD[FIELDS] = {
    {"dim", 2, 1 << 16},
    {"hidden_dim", 1, 1 << 20},
    {"n_layers", 1, 1 << 10},
    {"n_heads", 1, 1 << 16},
    {"n_kv_heads", 1, 1 << 16},
    {"vocab_size", 3, 1 << 24},  // <unk>, BOS and EOS at least
    {"seq_len", 1, 1 << 24},
};
static Config read_config(const Map *file) {
    const char *path = file->path;
    int32_t h[FIELDS], first[2] = {0}, group = 0;
    size_t size = sizeof h;
    if (file->n >= sizeof first) memcpy(first, file->at, sizeof first);
    bool versioned = first[0] == MAGIC;
    if (first[0] == ZIP_MAGIC)
        die("%s: is a zip archive, as PyTorch checkpoints are; export it first: python export.py %s model.bin", path, path);
    if (first[0] == HEADS_MAGIC) die("%s: is a file of future heads; they go with -d", path);
    if (versioned && first[1] != 1 && first[1] != 2)
        die("%s: is a version %d model file; this program reads versions 0, 1 and 2", path, (int)first[1]);
    if (versioned) size = HEADER_V1;
    if (file->n < size) die("%s: %zu bytes are too few for a model file's header (%zu)", path, file->n, size);
    memcpy(h, file->at + (versioned ? sizeof first : 0), sizeof h);

    bool shared = h[5] > 0;  // in version 0 a negative vocabulary size means an unshared classifier
    if (versioned) shared = file->at[sizeof first + sizeof h] != 0;
    else if (h[5] < 0 && h[5] != INT32_MIN) h[5] = -h[5];
    for (int i = 0; i < FIELDS; i++) {
        if (h[i] >= FIELD[i].min && h[i] <= FIELD[i].max) continue;
        uint32_t swapped = swap_bytes((uint32_t)h[0]);
        const char *hint = h[0] > FIELD[0].max && swapped <= (uint32_t)FIELD[0].max ? " (a big-endian file?)" : "";
        die("%s: %s is %d; expected %d to %d%s", path, FIELD[i].name, (int)h[i], (int)FIELD[i].min,
            (int)FIELD[i].max, hint);
    }
    if (versioned && first[1] == 2) {
        memcpy(&group, file->at + sizeof first + sizeof h + 1, sizeof group);
        if (group < 4 || group % 4 || group > MAX_GROUP || h[0] % group || h[1] % group)
            die("%s: the group size is %d; expected a multiple of 4 that divides dim %d and hidden_dim %d", path,
                (int)group, (int)h[0], (int)h[1]);
    }
    Config c = {h[0], h[1], h[2], h[3], h[4], h[5], h[6], shared, versioned ? first[1] : 0, group, 0, 0, 0};
    if (c.dim % c.n_heads) die("%s: dim %d is not a multiple of n_heads %d", path, c.dim, c.n_heads);
    c.head_size = c.dim / c.n_heads;
    if (c.head_size % 2) die("%s: dim / n_heads is %d; RoPE rotates pairs and needs an even number", path, c.head_size);
    if (c.n_heads % c.n_kv_heads)
        die("%s: n_heads %d is not a multiple of n_kv_heads %d", path, c.n_heads, c.n_kv_heads);
    c.kv_dim = c.n_kv_heads * c.head_size;
    uint64_t cache = 2 * (uint64_t)c.n_layers * c.kv_dim, longest = MOST_CACHE / cache;  // floats per position
    if (longest > MOST_ROPE / c.head_size) longest = MOST_ROPE / c.head_size;
    if ((uint64_t)c.seq_len > longest)
        die("%s: seq_len is %d; expected at most %llu with %d layers and %d heads of %d for keys", path, c.seq_len,
            (unsigned long long)longest, c.n_layers, c.n_kv_heads, c.head_size);
    c.sharing = c.n_heads / c.n_kv_heads;
    return c;
}

static const unsigned char ORDER[2][TENSORS] = {
    {TOK, ATT_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W2, W3, NORM, ROPE, CLS},  // version 0
    {ATT_NORM, FFN_NORM, NORM, TOK, WQ, WK, WV, WO, W1, W2, W3, CLS, ROPE},  // versions 1 and 2
};

// Bytes of that many weights, in a file as in a panel: floats, or int8 and a float32 scale for each group.
static uint64_t weight_bytes(uint64_t weights, int group) {
    if (group == FLOAT32) return weights * sizeof(float);
    if (group == BFLOAT16) return weights * sizeof(uint16_t);
    return weights + weights / group * sizeof(float);
}

static uint64_t matrix_bytes(const Tensor *t) { return weight_bytes((uint64_t)t->rows * t->n, t->group); }

static void map_tensors(const Map *file, const Config *c, Tensor *tensor) {
    int D = c->dim, H = c->hidden_dim, K = c->kv_dim, V = c->vocab_size, g = c->group;
    uint64_t L = c->n_layers;
    const Tensor shape[TENSORS] = {
        [TOK] = {NULL, 1, V, D, g},
        [ATT_NORM] = {NULL, L, 1, D, 0},
        [WQ] = {NULL, L, D, D, g},
        [WK] = {NULL, L, K, D, g},
        [WV] = {NULL, L, K, D, g},
        [WO] = {NULL, L, D, D, g},
        [FFN_NORM] = {NULL, L, 1, D, 0},
        [W1] = {NULL, L, H, D, g},
        [W2] = {NULL, L, D, H, g},
        [W3] = {NULL, L, H, D, g},
        [NORM] = {NULL, 1, 1, D, 0},
        [ROPE] = {NULL, c->version == 0, c->seq_len, c->head_size, 0},  // the exporter's tables; not read, see fill_rope
        [CLS] = {NULL, !c->shared_classifier, V, D, g},
    };
    memcpy(tensor, shape, sizeof shape);
    uint64_t bytes = c->version ? HEADER_V1 : FIELDS * sizeof(int32_t);
    for (int i = 0; i < TENSORS; i++) {
        Tensor *t = &tensor[ORDER[c->version > 0][i]];
        t->at = file->at + (bytes < file->n ? bytes : file->n);
        bytes += t->count * matrix_bytes(t);
    }
    if (bytes != file->n)
        die("%s: the file has %zu bytes; its header (version %d, dim %d, hidden_dim %d, n_layers %d, n_heads %d, "
            "n_kv_heads %d, vocab_size %d, seq_len %d) asks for %llu", file->path, file->n, c->version, D, H,
            c->n_layers, c->n_heads, c->n_kv_heads, V, c->seq_len, (unsigned long long)bytes);
}

static const char *tensor_row(const Tensor *t, uint64_t which, int row, const char **scale) {
    const char *matrix = t->at + which * matrix_bytes(t);
    if (!t->group) return matrix + (size_t)row * t->n * sizeof(float);
    *scale = matrix + (size_t)t->rows * t->n + (size_t)row * (t->n / t->group) * sizeof(float);
    return matrix + (size_t)row * t->n;
}

// What a matrix in memory is made of: matrix `which` of up to three tensors, one below the other.
typedef struct {
    Matrix *to;
    uint64_t which;
    const Tensor *part[3];
} Packing;

// Section 10.
static Matrix new_matrix(int rows, int n, int group);
static void interleave(const Matrix *m, int p, const char *const *row, const char *const *scale, int count);
static void quantise(const float *x, int n, int group, int8_t *q, float *scale, int32_t *offset);
// Section 12.
enum { MAX_THREADS = 64 };
typedef void Work(void *context, int piece, int thread);
static void parallel(Work *work, void *context, int pieces, double cost);
static void start_threads(int threads);
static int n_threads(void);

// Float32 tensors may become bfloat16, or int8 with a scale per row, as heads do (load_heads). The file's pages are released
// as they are packed, so that memory never holds the weights twice.
static void pack_panel(void *packing, int p, int thread) {
    const Packing *a = packing;
    const Matrix *m = a->to;
    (void)thread;
    const char *row[PANEL], *scale[PANEL];
    int count = m->rows - p * PANEL < PANEL ? m->rows - p * PANEL : PANEL;
    for (int r = 0; r < count; r++) {
        int index = p * PANEL + r, part = 0;
        while (index >= a->part[part]->rows) index -= a->part[part++]->rows;
        row[r] = tensor_row(a->part[part], a->which, index, &scale[r]);
    }
    const char *first = row[0], *end = row[count - 1] + (size_t)m->n * (a->part[0]->group ? 1 : sizeof(float));
    if (m->group == a->part[0]->group || m->group == BFLOAT16) {
        interleave(m, p, row, scale, count);
        if (end > first) release_pages(first, (size_t)(end - first));
        return;
    }
    int8_t *q = allocate((uint64_t)PANEL * m->n, 1, "rounded weights");
    float rounded[PANEL];
    for (int r = 0; r < count; r++) {
        int8_t *to = q + (size_t)r * m->n;
        int32_t unused;
        quantise((const float *)(const void *)row[r], m->n, m->n, to, &rounded[r], &unused);
        row[r] = (const char *)to;
        scale[r] = (const char *)&rounded[r];
    }
    interleave(m, p, row, scale, count);
    free(q);
    if (end > first) release_pages(first, (size_t)(end - first));
}

static int whole_row(int n) { return n % 4 || n > MAX_GROUP ? 0 : n; }  // as a group, if it can be one

static Matrix pack(Packing a, int group) {
    int rows = 0;
    for (int i = 0; i < 3 && a.part[i]; i++) rows += a.part[i]->rows;
    Matrix m = new_matrix(rows, a.part[0]->n, group);
    a.to = &m;
    parallel(pack_panel, &a, (int)panels(rows), (double)rows * m.n);
    return m;
}

static void pack_weights(Model *m) {
    const Tensor *t = m->tensor, *cls = &t[m->config.shared_classifier ? TOK : CLS];
    int g = m->bf16 ? BFLOAT16 : m->config.group, h = m->bf16 && m->config.hidden_dim % 2 ? FLOAT32 : g;  // bf16: pairs
    m->layer = allocate(m->config.n_layers, sizeof *m->layer, "the layers");
    for (int l = 0; l < m->config.n_layers; l++)
        m->layer[l] = (Layer){pack((Packing){.which = l, .part = {&t[WQ], &t[WK], &t[WV]}}, g),
                              pack((Packing){.which = l, .part = {&t[WO]}}, g),
                              pack((Packing){.which = l, .part = {&t[W1], &t[W3]}}, g),
                              pack((Packing){.which = l, .part = {&t[W2]}}, h)};
    m->classifier = pack((Packing){.part = {cls}}, g);
}

static State new_state(const Config *c) {
    uint64_t D = c->dim, H = c->hidden_dim, K = c->kv_dim, L = c->n_layers, widest = D > H ? D : H, S = c->seq_len;
    uint64_t half = c->head_size / 2;
    size_t f = sizeof(float);
    const char *what = "the activations";
    State s = {
        .key = buffer(L * padded(S) * K, f, "the cache of keys"),
        .value = buffer(L * padded(S) * K, f, "the cache of values"),
        .frequency = buffer(half, f, "the RoPE table"),
        .rope_cos = buffer(S * half, f, "the RoPE table"),
        .rope_sin = buffer(S * half, f, "the RoPE table"),
        .att = buffer(n_threads() * c->sharing * padded(S), f, "the attention weights"),
        .x = buffer(BATCH * D, f, what),
        .xb = buffer(BATCH * D, f, what),
        .delta = buffer(BATCH * padded(D), f, what),
        .qkv = buffer(BATCH * padded(D + 2 * K), f, what),
        .hb = buffer(BATCH * padded(2 * H), f, what),
        .logits = buffer(BATCH * padded(c->vocab_size), f, "the logits"),
        .q = buffer(BATCH * widest, 1, what),
        .scale = buffer(BATCH * widest, f, what),
        .offset = buffer(BATCH * widest, sizeof(int32_t), what),
    };
    // In double: the powf of -ffast-math is off by enough to shift late positions' logits by 1e-4.
    for (uint64_t i = 0; i < half; i++) s.frequency[i] = (float)(1.0 / pow(10000.0, (double)(2 * i) / c->head_size));
    return s;
}
static void new_screen(Model *m);  // section 13
enum { BYTES_PER_THREAD = 4 << 20 };

// threads: 0 chooses by the size of the file, which is about what is read for each token.
static Model load_model(const char *path, bool greedy, bool bf16, int threads) {
    Model m = {.file = map_file(path, "model file"), .greedy = greedy, .bf16 = bf16};
    m.config = read_config(&m.file);
    if (bf16 && m.config.group) die("--bf16: %s is int8; bfloat16 is made of float32", path);
    map_tensors(&m.file, &m.config, m.tensor);
    if (threads == 0) {
        uint64_t worth = m.file.n / BYTES_PER_THREAD + 1, most = processors();
        if (most > MAX_THREADS) most = MAX_THREADS;
        threads = (int)(worth < most ? worth : most);
    }
    start_threads(threads);
    pack_weights(&m);
    if (m.greedy) new_screen(&m);
    m.s = new_state(&m.config);
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6 Tokenizer file: int32 longest token in bytes; then for each id: float32 score, int32 length, bytes

enum { BOS = 1, EOS = 2, FIRST_BYTE = 3, FIRST_PIECE = FIRST_BYTE + 256 };  // ids; 0 is <unk>, byte b is FIRST_BYTE + b

typedef struct {
    const char *at;  // points into the mapped file; may hold any bytes, NUL too
    int n;
    float score;     // of the merge that makes this token: higher merges earlier
} Piece;

typedef struct {
    Map file;
    int vocab_size;
    Piece *piece;       // (V,)
    int *sorted;        // (n_sorted,) ids of the tokens that text can match, ordered by length, bytes, id
    int n_sorted;
    bool byte_fallback; // ids 3..258 are the 256 bytes
    bool own_space;     // there is a piece " " besides the byte
    char byte[256];     // byte[b] == b: what byte tokens decode to
} Tokenizer;

static int compare_bytes(const char *a, int n_a, const char *b, int n_b) {
    if (n_a != n_b) return n_a < n_b ? -1 : 1;  // shorter first: most lookups end on this line
    return memcmp(a, b, (size_t)n_a);
}

static const Piece *sort_pieces;  // qsort passes no context; set just before it is called

static int compare_ids(const void *pa, const void *pb) {
    int a = *(const int *)pa, b = *(const int *)pb;
    int c = compare_bytes(sort_pieces[a].at, sort_pieces[a].n, sort_pieces[b].at, sort_pieces[b].n);
    return c ? c : (a > b) - (a < b);
}

// The lowest id whose bytes are these, or -1.
static int lookup(const Tokenizer *t, const char *at, int n) {
    int low = 0, high = t->n_sorted;
    while (low < high) {
        int middle = low + (high - low) / 2;
        const Piece *p = &t->piece[t->sorted[middle]];
        if (compare_bytes(p->at, p->n, at, n) < 0) low = middle + 1;
        else high = middle;
    }
    if (low == t->n_sorted) return -1;
    const Piece *p = &t->piece[t->sorted[low]];
    return compare_bytes(p->at, p->n, at, n) == 0 ? t->sorted[low] : -1;
}

static bool is_space_piece(const Piece *p) { return p->n == 1 && p->at[0] == ' '; }

static bool spelled(const Piece *p, const char *text, int n) { return compare_bytes(p->at, p->n, text, n) == 0; }

// Are ids 3..258 the bytes? They are spelled "<0x41>", or, in llama2.c's first tokenizer.bin, as the UTF-8 of character b.
static bool has_byte_tokens(const Tokenizer *t) {
    if (t->vocab_size < FIRST_PIECE) return false;
    bool names = true, characters = true;
    for (int b = 0; b < 256; b++) {
        const Piece *p = &t->piece[FIRST_BYTE + b];
        char name[8], utf8[2] = {(char)(0xc0 | b >> 6), (char)(0x80 | (b & 63))}, ascii = (char)b;
        int n = snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
        // A byte-level vocabulary writes the space as itself, so that the space before a text finds it.
        names &= spelled(p, name, n) || (b == ' ' && is_space_piece(p));
        characters &= b < 128 ? spelled(p, &ascii, 1) : spelled(p, utf8, 2);
    }
    return names || characters;
}

// Neither <unk>, BOS and EOS nor byte tokens can be typed: the text "<0x41>" is six characters, and "A" is the piece, not
// the byte. Only the space may be a byte, in a byte-level vocabulary.
static bool can_match(const Tokenizer *t, int id) {
    if (id < FIRST_BYTE || t->piece[id].n == 0) return false;
    return !t->byte_fallback || id >= FIRST_PIECE || (is_space_piece(&t->piece[id]) && !t->own_space);
}

// Reads the entry at *offset and moves *offset past it.
static Piece read_piece(const Map *file, size_t *offset, int id, int32_t longest) {
    struct { float score; int32_t n; } head;
    size_t left = file->n - *offset;
    if (left < sizeof head) die("%s: the file ends inside entry %d", file->path, id);
    memcpy(&head, file->at + *offset, sizeof head);
    left -= sizeof head;
    if (!all_finite(&head.score, 1)) die("%s: entry %d has a score that is not a number", file->path, id);
    if (head.n < 0 || (size_t)head.n > left)
        die("%s: entry %d says it has %d bytes; %zu are left in the file", file->path, id, (int)head.n, left);
    if (head.n > longest)
        die("%s: entry %d has %d bytes; the file states a maximum %d", file->path, id, (int)head.n, (int)longest);
    Piece p = {file->at + *offset + sizeof head, (int)head.n, head.score};
    *offset += sizeof head + (size_t)head.n;
    return p;
}

static Tokenizer load_tokenizer(const char *path, int vocab_size) {
    Tokenizer t = {.file = map_file(path, "tokenizer file"), .vocab_size = vocab_size};
    int32_t longest;
    size_t offset = sizeof longest;
    if (t.file.n < sizeof longest) die("%s: %zu bytes are too few for a tokenizer file", path, t.file.n);
    memcpy(&longest, t.file.at, sizeof longest);

    t.piece = allocate((uint64_t)vocab_size, sizeof *t.piece, "the vocabulary");
    int n = 0;
    for (; offset < t.file.n; n++) {  // to the end of the file, so that the message can say how many there are
        Piece p = read_piece(&t.file, &offset, n, longest);
        if (n < vocab_size) t.piece[n] = p;
    }
    if (n != vocab_size) die("%s: the tokenizer has %d entries, the model has %d", path, n, vocab_size);

    t.byte_fallback = has_byte_tokens(&t);
    for (int id = FIRST_PIECE; id < vocab_size; id++) t.own_space |= is_space_piece(&t.piece[id]);
    for (int b = 0; b < 256; b++) t.byte[b] = (char)(unsigned char)b;
    t.sorted = allocate((uint64_t)vocab_size, sizeof *t.sorted, "the vocabulary's order");
    for (int id = 0; id < vocab_size; id++)
        if (can_match(&t, id)) t.sorted[t.n_sorted++] = id;
    sort_pieces = t.piece;
    qsort(t.sorted, (size_t)t.n_sorted, sizeof *t.sorted, compare_ids);
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7 Encoding: text -> tokens. Byte pair encoding as SentencePiece does it (identity normalisation, dummy prefix, byte
// fallback). The text is cut into characters; then the neighbours whose union has the best score merge, again and again.

typedef struct {
    int start, n;    // bytes of the text; n == 0: merged into the symbol on its left
    int prev, next;  // neighbours, -1 at the ends
} Symbol;

typedef struct {
    float score;
    int left, right; // symbols
    int n;           // bytes of both; if they no longer add up to it, one of them has merged since: skip this one
} Merge;

typedef struct {
    Merge *at;       // (n,) binary heap: at[0] is the best, children of i are 2i+1 and 2i+2
    int n;
} Heap;

static bool merges_before(const Merge *a, const Merge *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void push(Heap *h, Merge m) {
    int i = h->n++;
    for (int parent; i > 0 && merges_before(&m, &h->at[parent = (i - 1) / 2]); i = parent) h->at[i] = h->at[parent];
    h->at[i] = m;
}

static Merge pop(Heap *h) {
    Merge best = h->at[0], last = h->at[--h->n];
    int i = 0;
    for (int child; (child = 2 * i + 1) < h->n; i = child) {
        if (child + 1 < h->n && merges_before(&h->at[child + 1], &h->at[child])) child++;
        if (!merges_before(&h->at[child], &last)) break;
        h->at[i] = h->at[child];
    }
    h->at[i] = last;
    return best;
}

// Bytes of the UTF-8 character at p, or 1 if it is malformed: a stray byte stands alone and becomes its byte token.
// Overlong forms and surrogates may pass as characters: they are in no vocabulary, so they end as the same byte tokens.
static int character_length(const unsigned char *p, size_t left) {
    int n = p[0] < 0xc0 ? 1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    if ((size_t)n > left) return 1;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80) return 1;
    return n;
}

// Inside SentencePiece a space is U+2581, so it treats both alike; tokenizer files have plain spaces.
// A space goes in front of every text, so that a word at the start is the same token as in the middle.
static Text normalise(const Tokenizer *t, const char *text, size_t n) {
    Text out = {0};
    reserve(&out, n + 1);
    if (n > 0 && lookup(t, " ", 1) >= 0) out.at[out.n++] = ' ';
    for (size_t i = 0; i < n; i++) {
        bool meta = n - i >= 3 && memcmp(text + i, "\xe2\x96\x81", 3) == 0;
        out.at[out.n++] = meta ? ' ' : text[i];
        if (meta) i += 2;
    }
    return out;
}

// SentencePiece's rule: only the union has to be a token, neither side does.
static void propose(const Tokenizer *t, const char *text, const Symbol *symbol, int left, int right, Heap *heap) {
    if (left < 0 || right < 0) return;
    int n = symbol[left].n + symbol[right].n;
    int id = lookup(t, text + symbol[left].start, n);
    if (id >= 0) push(heap, (Merge){t->piece[id].score, left, right, n});
}

static int split_characters(const Text *text, Symbol *symbol) {
    int count = 0;
    for (size_t i = 0; i < text->n;) {
        int n = character_length((const unsigned char *)text->at + i, text->n - i);
        symbol[count] = (Symbol){(int)i, n, count - 1, count + 1};
        count++;
        i += (size_t)n;
    }
    if (count) symbol[count - 1].next = -1;
    return count;
}

static void merge_symbols(const Tokenizer *t, const char *text, Symbol *symbol, int count) {
    // Each of the at most count - 1 merges proposes two more: 3 * count is never exceeded.
    Heap heap = {allocate(3 * (uint64_t)count, sizeof *heap.at, "the merges of a text"), 0};
    for (int i = 1; i < count; i++) propose(t, text, symbol, i - 1, i, &heap);
    while (heap.n > 0) {
        Merge m = pop(&heap);
        Symbol *left = &symbol[m.left], *right = &symbol[m.right];
        if (left->n == 0 || right->n == 0 || left->n + right->n != m.n) continue;
        left->n = m.n;
        right->n = 0;
        left->next = right->next;
        if (left->next >= 0) symbol[left->next].prev = m.left;
        propose(t, text, symbol, left->prev, m.left, &heap);
        propose(t, text, symbol, m.left, left->next, &heap);
    }
    free(heap.at);
}

typedef struct {
    int *id;  // (n,) starts with BOS
    int n;
} Tokens;

// BOS and the tokens of a text. Takes n log n time, so a whole book may come in as one text.
static Tokens encode(const Tokenizer *t, const char *bytes, size_t n_bytes) {
    // 8: the heap holds up to 3 candidates for each byte, and the children of i are at 2i + 2
    if (n_bytes > INT_MAX / 8) die("a text of %zu bytes is too long: at most %d", n_bytes, INT_MAX / 8);
    Text text = normalise(t, bytes, n_bytes);
    Symbol *symbol = allocate(text.n, sizeof *symbol, "the characters of a text");
    int count = split_characters(&text, symbol);
    merge_symbols(t, text.at, symbol, count);

    Tokens out = {allocate(text.n + 1, sizeof *out.id, "the tokens of a text"), 0};
    out.id[out.n++] = BOS;
    for (int i = count ? 0 : -1; i >= 0; i = symbol[i].next) {
        const char *at = text.at + symbol[i].start;
        int id = lookup(t, at, symbol[i].n);
        if (id >= 0) {
            out.id[out.n++] = id;
            continue;
        }
        if (!t->byte_fallback)
            die("%s: no token for the character \"%.*s\" at byte %d of the text, and the vocabulary has no byte tokens",
                t->file.path, symbol[i].n, at, symbol[i].start);
        for (int j = 0; j < symbol[i].n; j++) out.id[out.n++] = FIRST_BYTE + (unsigned char)at[j];
    }
    free(symbol);
    free(text.at);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// 8 Sampling: logits -> next token. The order of operations is llama2.c's: the same seed gives the same story.

static void softmax(float *x, int n);

typedef struct {
    float probability;
    int id;
} Candidate;

typedef struct {
    int vocab_size;
    float temperature;     // 0: always the best token
    float top_p;           // keep the best tokens whose probabilities add up to this; 0 or 1: keep all
    uint64_t state;        // of the random numbers; never 0
    float *probability;    // ([V],)
    Candidate *candidate;  // (V,)
} Sampler;

// xorshift64*, 24 bits of it: uniform in [0, 1)
static float random_f32(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    uint32_t bits = (uint32_t)((*state * 0x2545F4914F6CDD1Dull) >> 32);
    return (float)(bits >> 8) / 16777216.0f;
}

static int sample_all(const float *probability, int n, float coin) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) {
        sum += probability[i];
        if (coin < sum) return i;
    }
    return n - 1;  // the sum fell short of 1 by rounding
}

static int best_first(const void *pa, const void *pb) {
    const Candidate *a = pa, *b = pb;
    if (a->probability != b->probability) return a->probability > b->probability ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

static int sample_top_p(const Sampler *s, float coin) {
    // A token below this cannot be kept: all that are, V - 1 at most, would not fill the tail of 1 - p.
    float cutoff = (1.0f - s->top_p) / (float)(s->vocab_size - 1);
    Candidate *candidate = s->candidate;
    int n = 0;
    for (int i = 0; i < s->vocab_size; i++)
        if (s->probability[i] >= cutoff) candidate[n++] = (Candidate){s->probability[i], i};
    if (n == 0) return argmax(s->probability, s->vocab_size);  // a flat distribution and a p below 1/V
    qsort(candidate, (size_t)n, sizeof *candidate, best_first);

    float kept = 0.0f;
    int last = 0;
    for (; last < n; last++)
        if ((kept += candidate[last].probability) > s->top_p) break;
    if (last == n) last = n - 1;

    float r = coin * kept, sum = 0.0f;
    for (int i = 0; i < last; i++)
        if (r < (sum += candidate[i].probability)) return candidate[i].id;
    return candidate[last].id;
}

static int sample(Sampler *s, const float *logits) {
    int V = s->vocab_size;
    if (s->temperature == 0.0f) return argmax(logits, V);
    for (int i = 0; i < V; i++) s->probability[i] = logits[i] / s->temperature;
    float coin = random_f32(&s->state);
    if (!all_finite(s->probability, (size_t)V)) return argmax(logits, V);  // logits / temperature overflowed
    softmax(s->probability, V);
    return s->top_p <= 0.0f || s->top_p >= 1.0f ? sample_all(s->probability, V, coin) : sample_top_p(s, coin);
}

// ---------------------------------------------------------------------------------------------------------------------
// 9 Printing: tokens -> text

static void flush_output(void) {
    if (fflush(stdout) != 0 || ferror(stdout)) die("cannot write to standard output: %s", strerror(errno));
}

// Prints token `id`, which follows `previous`.
static void print_token(const Tokenizer *t, int previous, int id) {
    Piece p = t->piece[id];
    if (previous == BOS && p.n > 0 && p.at[0] == ' ') {  // encode put that space in front
        p.at++;
        p.n--;
    } else if (t->byte_fallback && id >= FIRST_BYTE && id < FIRST_PIECE) {
        p.at = &t->byte[id - FIRST_BYTE];
        p.n = 1;
    }
    unsigned char first = p.n > 0 ? (unsigned char)p.at[0] : 0;
    // A control code could upset the terminal. Bytes from 0x80 on are parts of UTF-8 characters.
    if (p.n == 1 && first < 0x80 && !isprint(first) && !isspace(first)) return;
    fwrite(p.at, 1, (size_t)p.n, stdout);
    flush_output();
}

// ---------------------------------------------------------------------------------------------------------------------
// 10 Products. W, (rows, n), is kept in panels of PANEL rows that are interleaved by column, so that a register holds
// many rows' weights for one input: a product needs no horizontal sums and reads the weights as one stream.
//   float32  each column of a panel is 64 floats, one per row
//   bf16     columns go by twos, 64 words of 4 bytes: the even column's upper 16 bits, then, in the upper half, the odd's
//   int8     columns go by fours, 64 rows of 4 bytes, each a weight + ZERO_POINT. The 64 rows' scales, floats, follow
//            the columns of each group. A weight is (byte - ZERO_POINT) * scale; inputs are rounded in the same groups.
// Rows beyond the last are zero.

enum { COLUMNS = 4 };  // inputs that meet a panel together

static size_t panel_bytes(const Matrix *m) { return (size_t)weight_bytes((uint64_t)m->n * PANEL, m->group); }

static Matrix new_matrix(int rows, int n, int group) {
    Matrix m = {NULL, rows, n, group};
    m.at = buffer(panels(rows) * panel_bytes(&m), 1, "the repacked weights");
    return m;
}

// The bits of a float32, rounded to the 16 of a bfloat16. A NaN stays one.
static uint32_t upper_half(uint32_t bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Writes panel p from `count` rows; the last panel may have fewer than PANEL. row[r]: n float32 or n int8; scale[r]: the
// latter's n / group scales. Floats are rounded to bfloat16 here, to nearest, ties to even.
static void interleave(const Matrix *m, int p, const char *const *row, const char *const *scale, int count) {
    char *to = m->at + p * panel_bytes(m);
    size_t unit = 4;  // bytes that stay together: one float, two bfloat16 or four int8
    if (m->group == BFLOAT16) {
        for (int j = 0; j < m->n; j += 2, to += PANEL * unit)
            for (int r = 0; r < count; r++) {
                uint32_t pair[2];
                memcpy(pair, row[r] + j * sizeof(float), sizeof pair);
                uint32_t word = upper_half(pair[0]) | upper_half(pair[1]) << 16;
                memcpy(to + r * unit, &word, sizeof word);
            }
        return;
    }
    int units = m->group ? m->n / 4 : m->n, units_of_group = m->group ? m->group / 4 : m->n;
    for (int j = 0; j < units; j++, to += PANEL * unit) {
        for (int r = 0; r < count; r++) {
            uint32_t bits;
            memcpy(&bits, row[r] + j * unit, sizeof bits);
            if (m->group) bits ^= ZERO_POINT * 0x01010101u;  // adds it to each byte
            memcpy(to + r * unit, &bits, sizeof bits);
        }
        if (!m->group || (j + 1) % units_of_group) continue;
        to += PANEL * unit;
        for (int r = 0; r < count; r++) memcpy(to + r * unit, scale[r] + j / units_of_group * unit, sizeof(float));
    }
}

// Rounds x, (n,), to q * scale with q in -127..127 and one scale for each group. offset undoes what
// the ZERO_POINT in every weight byte adds to a group's sum of products. A scale of NaN means that a number was not finite.
static void quantise(const float *restrict x, int n, int group, int8_t *restrict q, float *restrict scale,
                     int32_t *restrict offset) {
    for (int g = 0; g < n / group; g++, x += group, q += group) {
        uint32_t max_bits = 0;  // of |x|: ordered as the floats are, NaN above all
        for (int i = 0; i < group; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, sizeof bits);
            bits &= 0x7fffffffu;
            max_bits = bits > max_bits ? bits : max_bits;
        }
        if (max_bits >= 0x7f800000u) max_bits = 0x7fc00000u;
        float max;
        memcpy(&max, &max_bits, sizeof max);
        bool tiny = max_bits < 0x0a000000u, finite = max_bits < 0x7f800000u;  // 6e-33: its inverse is finite
        float inverse = tiny || !finite ? 0.0f : 127.0f / max;
        scale[g] = tiny ? 0.0f : max / 127.0f;
        int32_t sum = 0;
        for (int i = 0; i < group; i++) {
            int v = finite ? (int)(x[i] * inverse + 128.5f) - 128 : 0;  // positive before truncation, so it rounds down
            q[i] = (int8_t)v;
            sum += v;
        }
        offset[g] = -ZERO_POINT * sum;
    }
}

typedef struct {
    float *out;        // (N, [rows])
    const float *x;    // (N, x_stride)
    size_t x_stride;
    int N;
    const Matrix *W;
    int8_t *q;         // for int8: x rounded, (N, n), its scales and offsets, (N, n / group) each
    float *scale;
    int32_t *offset;
} Product;

// out = R registers of rows, from row `first` of the panel on, times C inputs. Each sum has the same terms in the same
// order whatever C is, so a token's numbers do not depend on its batch.
INLINE void multiply_floats(const Product *a, const char *panel, int first, float *out, int input, int R, int C) {
    Floats sum[8][COLUMNS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = (Floats){0};
    const float *x = a->x + input * a->x_stride;
    const char *w = panel + first * sizeof(float);
    for (int j = 0; j < a->W->n; j++, w += PANEL * sizeof(float))
        for (int r = 0; r < R; r++) {
            Floats row = *(const Floats *)(const void *)(w + r * sizeof row);
            for (int c = 0; c < C; c++) sum[r][c] += row * x[c * a->x_stride + j];
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            *(Floats *)(void *)(out + c * padded(a->W->rows) + first + r * WIDTH) = sum[r][c];
}

// A bfloat16 is the upper half of a float32: shifting and masking widen it, and inputs and sums stay float32.
INLINE void multiply_bfloat16(const Product *a, const char *panel, int first, float *out, int input, int R, int C) {
    Floats sum[8][COLUMNS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = (Floats){0};
    const float *x = a->x + input * a->x_stride;
    const char *w = panel + first * sizeof(float);
    for (int j = 0; j < a->W->n; j += 2, w += PANEL * sizeof(float))
        for (int r = 0; r < R; r++) {
            Ints pair = *(const Ints *)(const void *)(w + r * sizeof pair);
            Floats even = (Floats)(pair << 16), odd = (Floats)(pair & ~0xffff);
            for (int c = 0; c < C; c++) {
                sum[r][c] += even * x[c * a->x_stride + j];
                sum[r][c] += odd * x[c * a->x_stride + j + 1];
            }
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            *(Floats *)(void *)(out + c * padded(a->W->rows) + first + r * WIDTH) = sum[r][c];
}

INLINE void multiply_int8(const Product *a, const char *panel, int first, float *out, int input, int R, int C) {
    int n = a->W->n, group = a->W->group, groups = n / group;
    Floats sum[8][COLUMNS];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = (Floats){0};
    for (int g = 0; g < groups; g++) {
        Ints dot[8][COLUMNS];
        for (int c = 0; c < C; c++)
            for (int r = 0; r < R; r++) dot[r][c] = a->offset[(input + c) * groups + g] + (Ints){0};
        const int8_t *q = a->q + (size_t)input * n + (size_t)g * group;
        for (int j = 0; j < group; j += 4, panel += PANEL * 4)
            for (int c = 0; c < C; c++) {
                int32_t x;
                memcpy(&x, q + (size_t)c * n + j, sizeof x);
                for (int r = 0; r < R; r++)
                    dot[r][c] = dot4(dot[r][c], *(const Ints *)(const void *)(panel + (first + r * WIDTH) * 4), x);
            }
        for (int r = 0; r < R; r++) {
            Floats scale = *(const Floats *)(const void *)(panel + (first + r * WIDTH) * 4);
            for (int c = 0; c < C; c++)
                sum[r][c] += __builtin_convertvector(dot[r][c], Floats) * (scale * a->scale[(input + c) * groups + g]);
        }
        panel += PANEL * sizeof(float);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            *(Floats *)(void *)(out + c * padded(a->W->rows) + first + r * WIDTH) = sum[r][c];
}

INLINE int fitting(int registers, int C) {  // how many registers of rows fit for C inputs
    int R = registers / (C == 3 ? 4 : C);
    return R < 1 ? 1 : R > PANEL / WIDTH ? PANEL / WIDTH : R;
}

INLINE void multiply_columns(const Product *a, int p, int input, int C) {
    const char *panel = a->W->at + p * panel_bytes(a->W);
    float *out = a->out + input * padded(a->W->rows) + (size_t)p * PANEL;
    const int R = fitting(REGISTERS, C);  // int8: for the sums of ints; those of floats, touched once a group, may spill
    for (int first = 0; first < PANEL; first += R * WIDTH)
        switch (a->W->group) {
            case FLOAT32: multiply_floats(a, panel, first, out, input, R, C); break;
            case BFLOAT16: multiply_bfloat16(a, panel, first, out, input, R, C); break;
            default: multiply_int8(a, panel, first, out, input, R, C); break;
        }
}

// Panel p of out = W x for each of N inputs. It stays in the cache for all of them.
static void multiply_panel(void *product, int p, int thread) {
    const Product *a = product;
    (void)thread;
    for (int i = 0; i < a->N; i += COLUMNS)
        switch (a->N - i) {
            case 1: multiply_columns(a, p, i, 1); break;
            case 2: multiply_columns(a, p, i, 2); break;
            case 3: multiply_columns(a, p, i, 3); break;
            default: multiply_columns(a, p, i, COLUMNS); break;
        }
}

static void matmul(const State *s, float *out, const float *x, size_t x_stride, int N, const Matrix *W) {
    Product a = {out, x, x_stride, N, W, s->q, s->scale, s->offset};
    if (W->group > BFLOAT16)
        for (int i = 0, groups = W->n / W->group; i < N; i++)
            quantise(x + i * x_stride, W->n, W->group, s->q + (size_t)i * W->n, s->scale + i * groups,
                     s->offset + i * groups);
    parallel(multiply_panel, &a, (int)panels(W->rows), (double)padded(W->rows) * W->n * N);
}

// ---------------------------------------------------------------------------------------------------------------------
// 11 Attention over the cache, and the functions that need exp

// The sum over a register.
static inline float sum_lanes(Floats v) {
    typedef float Four __attribute__((vector_size(16)));
    Four part[WIDTH < 4 ? 1 : WIDTH / 4] = {{0}}, sum;
    memcpy(part, &v, sizeof v);
    sum = part[0];
    for (int i = 1; i < WIDTH / 4; i++) sum += part[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Not by memcpy: with AVX2, GCC 12 copies in two halves, through memory, and a 260K token took five times as long.
static inline Floats load(const float *x) { return *(const Floats *)x; }

static inline void store(float *x, Floats v) { *(Floats *)x = v; }

// a where the lane of mask is all ones, b where it is 0
static inline Floats choose(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }

static inline float max_lanes(Floats v) {
    float max = v[0];
    for (int i = 1; i < WIDTH; i++) max = v[i] > max ? v[i] : max;
    return max;
}

static float sum_of_squares(const float *x, int n) {
    Floats sum = {0};
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) sum += load(x + i) * load(x + i);
    float rest = 0.0f;
    for (; i < n; i++) rest += x[i] * x[i];
    return sum_lanes(sum) + rest;
}

// exp(-|x|) to a few units in the last place; from |x| = 87 on it stays at exp(-87), next to 0. Unlike expf it
// vectorises: 2^t = 2^k * 2^f, k an integer for the exponent bits, f in [-0.5, 0.5] for a polynomial (Cephes' exp2f).
static inline Floats exp_minus_abs(Floats x) {
    Ints bits = (Ints)x & 0x7fffffff, over = bits > 0x42ae0000;  // 87.0f; positive floats are ordered as their bits
    bits = (bits & ~over) | (0x42ae0000 & over);
    Floats t = (Floats)bits * -1.44269504f;
    Ints k = __builtin_convertvector(t - 0.5f, Ints);
    Floats f = t - __builtin_convertvector(k, Floats);
    Floats p = f * 1.535336188e-4f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    return p * (Floats)((k + 127) << 23);
}

// x[0..n) becomes exp(x - max); returns one over its sum. x has room for [n].
static float exponentials(float *x, int n) {
    int end = (n + WIDTH - 1) / WIDTH * WIDTH;
    if (!all_finite(x, (size_t)n)) {  // the scores overflowed: NaNs, which `checked` finds
        memset(x, 0xff, (size_t)end * sizeof *x);
        return x[0];
    }
    for (int i = n; i < end; i++) x[i] = x[0];
    Floats high = load(x), sum = {0};
    for (int i = 0; i < end; i += WIDTH) high = choose(load(x + i) > high, load(x + i), high);
    float max = max_lanes(high);
    for (int i = n; i < end; i++) x[i] = max > 0.0f ? -3e38f : 3e38f;  // far from max: adds nothing
    for (int i = 0; i < end; i += WIDTH) {
        Floats e = exp_minus_abs(load(x + i) - max);
        store(x + i, e);
        sum += e;
    }
    return 1.0f / sum_lanes(sum);
}

static void softmax(float *x, int n) {
    float scale = exponentials(x, n);
    for (int i = 0; i < n; i++) x[i] *= scale;
}

static void swiglu(float *gate, const float *up, int n) {
    // The last round spoils the start of up, which is done with by then, and reads past 2n, but not past [2n].
    for (int j = 0; j < n; j += WIDTH) {
        // exp(-|a|) never overflows; exp(-a) does below -88, and 1 / infinity is not 0 under -ffast-math.
        Floats a = load(gate + j), e = exp_minus_abs(a);
        Floats top = choose(a < 0.0f, e, (Floats){0} + 1.0f);
        store(gate + j, a * top / (1.0f + e) * load(up + j));
    }
}

// out[i] = scale * sum over t < n of weight[t] * value[t][i] for W of the hd numbers at each position; value: (n, hd)
INLINE void weigh(float *out, const float *weight, const float *value, int n, int hd, float scale, const int W) {
    const int chains = W > 16 ? 1 : 4;  // independent sums
    float sum[4][64] = {{0}};
    int t = 0;
    for (; t + chains <= n; t += chains)
        for (int k = 0; k < chains; k++)
            for (int i = 0; i < W; i++) sum[k][i] += weight[t + k] * value[(size_t)(t + k) * hd + i];
    for (; t < n; t++)
        for (int i = 0; i < W; i++) sum[0][i] += weight[t] * value[(size_t)t * hd + i];
    for (int k = 1; k < chains; k++)
        for (int i = 0; i < W; i++) sum[0][i] += sum[k][i];
    for (int i = 0; i < W; i++) out[i] = scale * sum[0][i];
}

enum { LANE_HEAD = 8 };  // head size for which a register's lanes are positions, in values as in keys

// Attention for C heads of LANE_HEAD numbers that share a key head: out = softmax(q k) v over n positions. With a head
// that small, the sums over positions stay in registers, and all C heads use each key and value that is loaded.
// q, out: (C, LANE_HEAD); key, value: matrices ([n], LANE_HEAD) in panels; att: (C, [n]) room for the scores
INLINE void attend_lanes(const float *q, const float *key, const float *value, float *att, float *out, int n, const int C) {
    size_t stride = padded(n);
    Floats high[2], sum[2] = {{0}}, weighted[2][LANE_HEAD] = {{{0}}};
    Ints lane, not_finite = {0};
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    for (int c = 0; c < C; c++) high[c] = (Floats){0} - FLT_MAX;
    for (int t = 0; t < n; t += WIDTH) {
        const float *k = key + (size_t)(t / PANEL) * PANEL * LANE_HEAD + t % PANEL;
        Ints inside = lane < n - t;
        for (int c = 0; c < C; c++) {
            Floats score = {0};
            for (int j = 0; j < LANE_HEAD; j++) score += load(k + j * PANEL) * q[c * LANE_HEAD + j];
            score = choose(inside, score, (Floats){0} - FLT_MAX);
            not_finite |= ((Ints)score & 0x7f800000) == 0x7f800000;
            high[c] = choose(score > high[c], score, high[c]);
            store(att + c * stride + t, score);
        }
    }
    float most[2];
    for (int c = 0; c < C; c++) most[c] = max_lanes(high[c]);
    for (int t = 0; t < n; t += WIDTH) {
        const float *v = value + (size_t)(t / PANEL) * PANEL * LANE_HEAD + t % PANEL;
        Floats e[2];
        for (int c = 0; c < C; c++) {
            e[c] = exp_minus_abs(load(att + c * stride + t) - most[c]);
            sum[c] += e[c];
        }
        for (int j = 0; j < LANE_HEAD; j++) {
            Floats row = load(v + j * PANEL);
            for (int c = 0; c < C; c++) weighted[c][j] += e[c] * row;
        }
    }
    bool overflow = false;  // of a score; then NaNs, which `checked` finds
    for (int i = 0; i < WIDTH; i++) overflow |= not_finite[i] != 0;
    for (int c = 0; c < C; c++) {
        float scale = overflow ? NAN : 1.0f / sum_lanes(sum[c]);
        for (int j = 0; j < LANE_HEAD; j++) out[c * LANE_HEAD + j] = scale * sum_lanes(weighted[c][j]);
    }
}

typedef struct {
    Model *m;
    int layer, pos;  // of the first token
} Attention;

// Keys or values of one layer and key/value head: ([S], hd).
static float *cached(float *cache, const Config *c, int layer, int kv_head) {
    return cache + ((size_t)layer * c->n_kv_heads + kv_head) * padded(c->seq_len) * c->head_size;
}

// Row `row` of a float32 matrix in panels.
static void put_in_panel(float *matrix, const float *x, int row, int n) {
    float *to = matrix + (size_t)(row / PANEL) * PANEL * n + row % PANEL;
    for (int j = 0; j < n; j++) to[j * PANEL] = x[j];
}

static void store_kv(Model *m, int layer, int pos, const float *k, const float *v) {
    const Config *c = &m->config;
    int hd = c->head_size;
    for (int h = 0; h < c->n_kv_heads; h++, k += hd, v += hd) {
        put_in_panel(cached(m->s.key, c, layer, h), k, pos, hd);
        float *value = cached(m->s.value, c, layer, h);
        if (hd == LANE_HEAD) put_in_panel(value, v, pos, hd);
        else memcpy(value + (size_t)pos * hd, v, hd * sizeof(float));
    }
}

// The query heads of one token that share a key head, over every position up to the token's: piece i * n_kv_heads + h is
// key head h for token i.
static void attend_heads(void *attention, int piece, int thread) {
    const Attention *a = attention;
    const Config *c = &a->m->config;
    const State *s = &a->m->s;
    int i = piece / c->n_kv_heads, h = piece % c->n_kv_heads, hd = c->head_size, n = a->pos + i + 1;
    float *q = s->qkv + i * padded(c->dim + 2 * (uint64_t)c->kv_dim) + (size_t)h * c->sharing * hd;
    float scale_q = 1.0f / sqrtf((float)hd);
    for (int j = 0; j < c->sharing * hd; j++) q[j] *= scale_q;
    const float *key = cached(s->key, c, a->layer, h), *value = cached(s->value, c, a->layer, h);
    float *att = s->att + thread * c->sharing * padded(c->seq_len);
    float *out = s->xb + (size_t)i * c->dim + (size_t)h * c->sharing * hd;
    if (hd == LANE_HEAD) {
        int k = 0;
        for (; k + 2 <= c->sharing; k += 2) attend_lanes(q + k * hd, key, value, att, out + k * hd, n, 2);
        if (k < c->sharing) attend_lanes(q + k * hd, key, value, att, out + k * hd, n, 1);
        return;
    }
    Matrix keys = {(char *)key, n, hd, 0};
    Product scores = {att, q, hd, c->sharing, &keys, NULL, NULL, NULL};
    for (int p = 0; p < (int)panels(n); p++) multiply_panel(&scores, p, thread);
    for (int k = 0; k < c->sharing; k++, att += padded(n), out += hd) {
        float scale = exponentials(att, n);
        int j = 0;
        for (; j + 64 <= hd; j += 64) weigh(out + j, att, value + j, n, hd, scale, 64);
        for (; j + 48 <= hd; j += 48) weigh(out + j, att, value + j, n, hd, scale, 48);
        for (; j + 16 <= hd; j += 16) weigh(out + j, att, value + j, n, hd, scale, 16);
        for (; j + 8 <= hd; j += 8) weigh(out + j, att, value + j, n, hd, scale, 8);
        for (; j < hd; j += 2) weigh(out + j, att, value + j, n, hd, scale, 2);
    }
}

static void attend(Model *m, int layer, int N, int pos) {
    Attention a = {m, layer, pos};
    parallel(attend_heads, &a, N * m->config.n_kv_heads, 2.0 * N * (pos + N) * m->config.dim);
}

// ---------------------------------------------------------------------------------------------------------------------
// 12 Threads. A product of a small model ends sooner than a sleeping thread wakes, so workers spin for the next one.

enum { SPINS = 4000, YIELDS = 1000 };
enum { PARALLEL_FROM = 1 << 15 };  // multiply-adds; below, waking the threads costs more than it saves

static struct {
    int threads;                  // the caller among them
    Work *work;                   // of the current round
    void *context;
    atomic_uint_fast64_t ticket;  // round << 32 | pieces not taken
    atomic_int left;              // pieces not done
} pool = {.threads = 1};

static int n_threads(void) { return pool.threads; }

// Takes a share of the pieces that are left and does them; false if there are none. Pieces that a thread does not get
// to, because another program has its processor, are done by the others. An old round's ticket cannot be taken.
static bool take_share(int thread) {
    uint_fast64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    int left, n;
    do {
        left = (int)(ticket & 0xffffffffu);
        n = (left + 2 * pool.threads - 1) / (2 * pool.threads);
        if (left == 0) return false;
    } while (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket - (unsigned)n, memory_order_acq_rel,
                                                    memory_order_acquire));
    for (int i = left - n; i < left; i++) pool.work(pool.context, i, thread);
    atomic_fetch_sub_explicit(&pool.left, n, memory_order_release);
    return true;
}


// Waits a moment: first for a few cycles, then yields to other programs, and sleeps once nothing has come for so long
// that someone must be typing.
static void wait_a_moment(int tries) {
    if (tries >= SPINS + YIELDS) nanosleep(&(struct timespec){0, 200000}, NULL);
    else if (tries >= SPINS) sched_yield();
    else relax();
}

static void *worker(void *thread) {
    for (int tries = 0;; tries += tries < INT_MAX) {
        if (take_share((int)(intptr_t)thread)) tries = 0;
        else wait_a_moment(tries);
    }
    return NULL;
}

static void start_threads(int threads) {
    pool.threads = threads;
    for (int i = 1; i < threads; i++) {
        pthread_t id;
        if (pthread_create(&id, NULL, worker, (void *)(intptr_t)i)) die("cannot start %d threads; try -j 1", threads);
    }
}

static void parallel(Work *work, void *context, int pieces, double cost) {
    if (pool.threads == 1 || pieces == 1 || cost < PARALLEL_FROM) {
        for (int i = 0; i < pieces; i++) work(context, i, 0);
        return;
    }
    pool.work = work;
    pool.context = context;
    atomic_store_explicit(&pool.left, pieces, memory_order_relaxed);
    uint_fast64_t round = atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 32;
    atomic_store_explicit(&pool.ticket, (round + 1) << 32 | (unsigned)pieces, memory_order_release);
    while (take_share(0)) continue;
    for (int tries = 0; atomic_load_explicit(&pool.left, memory_order_acquire); tries++) wait_a_moment(tries);
}

// ---------------------------------------------------------------------------------------------------------------------
// 13 Screen (optional). Greedy decoding needs only the largest logit. The screen is the classifier rounded to int8, a
// quarter of the bytes: rough logits from it rule out most rows, and the panels of the others are computed in float32.
//
// Its bound. With a row w, an input x and their rounded forms w' and x':
//     w x - w' x' = (w - w') x + w' (x - x'),  so  |w x - w' x'| <= |w - w'| |x| + |w'| |x - x'|   (Cauchy-Schwarz)
// plus the rounding errors of both sums. `error` holds |w - w'| and `norm` more than |w'|, for each row; |x| and |x - x'|
// are computed once per token. A row may hold the best logit if rough + bound reaches the best rough - bound.
// Exact panels come from the same kernel as a full product, so the best token is the same to the last bit.

// Makes room for a screen where one pays: a large classifier that is not int8. classify fills it after the first token.
static void new_screen(Model *m) {
    int V = m->config.vocab_size, D = m->config.dim;
    if (m->config.group || !whole_row(D) || (double)V * D < SCREEN_FROM) return;
    m->screen.norm = buffer(padded(V), sizeof(float), "the classifier's bounds");
    m->screen.error = buffer(padded(V), sizeof(float), "the classifier's bounds");
    m->screen.rough = new_matrix(V, D, D);
}

// The weights of column j for a register of rows of a float32 or bfloat16 panel.
INLINE Floats column(const char *panel, int group, int j, int first) {
    if (group == FLOAT32) return load((const float *)(const void *)panel + j * PANEL + first);
    Ints pair;
    memcpy(&pair, panel + (j / 2 * PANEL + first) * sizeof(float), sizeof pair);
    if (j % 2) return (Floats)(pair & ~0xffff);
    return (Floats)(pair << 16);
}

// Rounds panel p of the classifier to int8 as quantise does, a register of rows at a time, and notes the bounds of each.
// In steps of the scale no square overflows or vanishes. The factors are more than the rounding of these sums.
static void fill_screen(void *model, int p, int thread) {
    const Model *m = model;
    const Screen *screen = &m->screen;
    (void)thread;
    int D = m->config.dim;
    const char *panel = m->classifier.at + p * panel_bytes(&m->classifier);
    char *to = screen->rough.at + p * panel_bytes(&screen->rough);
    for (int first = 0; first < PANEL; first += WIDTH) {
        Ints high = {0};  // bits of |w|: ordered as the floats are, NaN above all
        for (int j = 0; j < D; j++) {
            Ints bits = (Ints)column(panel, m->classifier.group, j, first) & 0x7fffffff, above = bits > high;
            high = (bits & above) | (high & ~above);
        }
        Ints normal = high >= 0x0a000000, finite = high < 0x7f800000;  // 6e-33: its inverse is finite
        Floats scale = (Floats)((Ints)((Floats)high / 127.0f) & normal), inverse = 127.0f / (Floats)high;
        inverse = (Floats)((Ints)inverse & normal & finite);
        Floats distance = {0}, length = {0};  // squares, in steps
        for (int j = 0; j < D; j += 4) {
            Ints four = {0};
            for (int k = 0; k < 4; k++) {
                Floats w = column(panel, m->classifier.group, j + k, first), x = (Floats)((Ints)(w * inverse) & finite);
                Ints q = __builtin_convertvector(x + 128.5f, Ints) - 128;
                Floats rounded = __builtin_convertvector(q, Floats), off = x - rounded;
                distance += off * off;
                length += rounded * rounded;
                four |= ((q + ZERO_POINT) & 255) << 8 * k;
            }
            memcpy(to + j * PANEL + first * 4, &four, sizeof four);
        }
        memcpy(to + D * PANEL + first * 4, &scale, sizeof scale);
        float root = sqrtf((float)D);
        for (int i = 0, row = p * PANEL + first; i < WIDTH; i++, row++) {
            screen->error[row] = scale[i] * (1.002f * sqrtf(distance[i]) + 1e-4f * root) + 1e-32f * root;
            screen->norm[row] = scale[i] * 1.002f * sqrtf(length[i]) + screen->error[row];
        }
    }
}

static double distance(const float *x, const int8_t *q, float scale, int n) {  // |x - q * scale|
    double sum = 0.0;
    for (int j = 0; j < n; j++) sum += ((double)x[j] - (double)q[j] * scale) * ((double)x[j] - (double)q[j] * scale);
    return sqrt(sum);
}

static void make_best_exact(Model *m, float *z, const float *x, const int8_t *q, float scale) {
    const Screen *screen = &m->screen;
    int V = m->config.vocab_size, D = m->config.dim;
    float size = 1.001f * (float)distance(x, q, 0.0f, D);  // |x|
    float error = 1.001f * (float)distance(x, q, scale, D) + (float)(2 * D + 32) * 1.2e-7f * size;
    float tiny = (float)D * 2e-34f;  // of numbers too small to be normal, which a processor may take for 0
    float best = -FLT_MAX;
    bool overflow = !all_finite(z, (size_t)V);
    for (int i = 0; i < V; i++) {
        float bound = screen->error[i] * size + screen->norm[i] * error + tiny;
        best = z[i] - bound > best ? z[i] - bound : best;
    }
    Product exact = {z, x, 0, 1, &m->classifier, NULL, NULL, NULL};
    for (int p = 0; p < (int)panels(V); p++) {
        int may = overflow, last = (p + 1) * PANEL < V ? (p + 1) * PANEL : V;
        for (int i = p * PANEL; i < last; i++) {
            float bound = screen->error[i] * size + screen->norm[i] * error + tiny;
            may |= z[i] + bound >= best;
        }
        if (may) multiply_panel(&exact, p, 0);
    }
}

static void classify(Model *m, const float *x, int N) {
    Screen *screen = &m->screen;
    size_t D = m->config.dim;
    int V = m->config.vocab_size;
    bool screened = m->greedy && screen->rough.at && screen->first_token_done;
    if (screened && !screen->filled) {
        parallel(fill_screen, m, (int)panels(V), 4.0 * V * (double)D);
        screen->filled = true;
        // Weights so large that their norms overflow have no bound: every row is computed.
        if (!all_finite(screen->norm, V)) screened = m->greedy = false;
    }
    screen->first_token_done = true;
    matmul(&m->s, m->s.logits, x, D, N, screened ? &screen->rough : &m->classifier);
    for (int i = 0; screened && i < N; i++)
        make_best_exact(m, m->s.logits + i * padded(m->config.vocab_size), x + i * D, m->s.q + i * D, m->s.scale[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// 14 Drafting (optional). Drafted tokens go through the layers together with the token at hand. As long as the sampler
// picks what was drafted, the logits are there already (block-wise parallel decoding, Stern et al. 2018, for exactly the
// tokens of plain decoding). When it picks another token, the rest of the draft is dropped and overwritten in the cache.

enum { HEADS_FIELDS = 7, LINEAR = 1, NGRAM_DRAFT = 7 };

typedef struct {
    Model *m;
    int longest;            // draft; 0: plain decoding
    Matrix *head;           // (longest,) each (V, D), int8 where D allows it; NULL: n-grams
    float *logits;          // ([V],) of a head
    int *history;           // (S,) the token at each position
    int token[BATCH];       // of the last forward pass: the one at hand, then the draft
    int fed, at, row;       // tokens in that pass; the one whose logits are in use, of which State.xb has row `row + at`
    double seconds[BATCH];  // of a pass with that many drafted tokens, smoothed; 0: not tried yet
    double chance[BATCH];   // that drafted token i is accepted if i - 1 was, smoothed
    int rounds;             // lengths chosen so far
    uint64_t passes, tokens, drafted[BATCH], accepted[BATCH];  // for the report
} Drafter;

// CRC-32 (zlib's) of the norms' weights, which are float32 in every version of a trunk's file.
static uint32_t trunk_checksum(const Model *m) {
    static const int norms[] = {ATT_NORM, FFN_NORM, NORM};
    uint32_t crc = ~0u;
    for (int k = 0; k < 3; k++) {
        const Tensor *t = &m->tensor[norms[k]];
        for (uint64_t i = 0; i < t->count * matrix_bytes(t); i++) {
            crc ^= (unsigned char)t->at[i];
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}

// A heads file: seven uint32 (magic, version, type, number of heads, D, V, checksum of the trunk), then each head's
// float32 (V, D).
static void load_heads(Drafter *d, const char *path) {
    const Config *c = &d->m->config;
    Map file = map_file(path, "heads file");
    uint32_t h[HEADS_FIELDS];
    if (file.n < sizeof h) die("%s: %zu bytes are too few for a heads file's header (%zu)", path, file.n, sizeof h);
    memcpy(h, file.at, sizeof h);
    if (h[0] != HEADS_MAGIC) die("%s: is not a heads file: it begins with %08x; expected %08x", path, h[0], HEADS_MAGIC);
    if (h[1] != 1 || h[2] != LINEAR)
        die("%s: version %u, heads of type %u; this program reads version 1, type 1 (linear)", path, h[1], h[2]);
    if (h[3] < 1 || h[3] >= BATCH) die("%s: has %u heads; expected 1 to %d", path, h[3], BATCH - 1);
    if (h[4] != (uint32_t)c->dim || h[5] != (uint32_t)c->vocab_size)
        die("%s: heads of dim %u, vocab_size %u; the model has %d and %d", path, h[4], h[5], c->dim, c->vocab_size);
    uint32_t checksum = trunk_checksum(d->m);
    if (h[6] != checksum)
        die("%s: belongs to another trunk: checksum %08x; that of %s is %08x", path, h[6], d->m->file.path, checksum);
    uint64_t bytes = sizeof h + (uint64_t)h[3] * c->vocab_size * c->dim * sizeof(float);
    if (bytes != file.n)
        die("%s: the file has %zu bytes; its header asks for %llu", path, file.n, (unsigned long long)bytes);
    d->longest = (int)h[3];
    d->head = allocate(d->longest, sizeof *d->head, "the heads");
    d->logits = buffer(padded(c->vocab_size), sizeof(float), "a head's logits");
    Tensor t = {file.at + sizeof h, h[3], c->vocab_size, c->dim, 0};
    if (!all_finite((const float *)(const void *)t.at, (size_t)((bytes - sizeof h) / sizeof(float))))
        die("%s: holds numbers that are not finite", path);
    // A wrong draft costs only time, so heads are rounded.
    for (int i = 0; i < d->longest; i++)
        d->head[i] = pack((Packing){.which = i, .part = {&t}}, whole_row(c->dim));
}

static Drafter new_drafter(Model *m, const char *how) {
    Drafter d = {.m = m, .history = allocate(m->config.seq_len, sizeof *d.history, "the history")};
    if (how && !strcmp(how, "ngram")) d.longest = NGRAM_DRAFT;
    else if (how) load_heads(&d, how);
    for (int i = 0; i < BATCH; i++) d.chance[i] = 0.5;
    return d;
}

// Feeds a prompt or a turn of a chat. Returns the logits after its last token.
static const float *begin(Drafter *d, const int *token, int n, int pos) {
    memcpy(d->history + pos, token, n * sizeof *token);
    d->fed = 1;
    d->at = 0;
    d->row = (n - 1) % BATCH;
    return feed(d->m, token, n, pos);
}

// Drafts what followed the last two tokens, or else the last one, the time before. Returns how many tokens, at most k.
static int draft_ngram(const int *history, int n, int *to, int k) {
    for (int length = 2; length > 0; length--)
        for (int end = n - 1; end >= length; end--) {
            if (memcmp(history + end - length, history + n - length, length * sizeof *history)) continue;
            if (k > n - end) k = n - end;
            memcpy(to, history + end, k * sizeof *to);
            return k;
        }
    return 0;
}

// Drafts up to k tokens that follow the one at pos. Head i reads the state at the position before and predicts i + 1
// tokens ahead of the next one.
static int draft(Drafter *d, int pos, int *to, int k) {
    Model *m = d->m;
    if (!d->head) return k ? draft_ngram(d->history, pos + 1, to, k) : 0;
    const float *x = m->s.xb + (size_t)(d->row + d->at) * m->config.dim;
    for (int i = 0; i < k; i++) {
        matmul(&m->s, d->logits, x, 0, 1, &d->head[i]);
        to[i] = argmax(d->logits, m->config.vocab_size);
    }
    return k;
}

// Counts what was accepted of the last draft. Tokens after the first wrong one say nothing.
static void count_accepted(Drafter *d) {
    for (int i = 1; i < d->fed && i <= d->at + 1; i++) {
        bool accepted = i <= d->at;
        d->drafted[i]++;
        d->accepted[i] += accepted;
        d->chance[i] += 0.1 * (accepted - d->chance[i]);
    }
}

// How many tokens to draft, at most `room`. The strategy is to maximise tokens per second as measured on this text: a
// pass with k drafted tokens yields 1 + c1 + c1 c2 + ... + c1...ck tokens, ci = chance[i], and takes seconds[k]. The k
// with the best quotient wins; it is 0 where drafting does not pay. Every length is tried once at the beginning,
// longest first, and one pass in 64 tries one again, since texts change.
static int draft_length(Drafter *d, int room) {
    int best = 0;
    if (d->rounds <= d->longest) best = d->longest - d->rounds;
    else if (d->rounds % 64 == 0) best = d->rounds / 64 % (d->longest + 1);
    else {
        double tokens = 1.0, all_accepted = 1.0, fastest = 0.0;
        for (int k = 0; k <= d->longest; k++) {
            if (k) tokens += all_accepted *= d->chance[k];
            if (d->seconds[k] == 0.0) continue;  // no draft of that length came up yet
            if (tokens > fastest * d->seconds[k]) fastest = tokens / d->seconds[k], best = k;
        }
    }
    d->rounds++;
    return best < room ? best : room;
}

// Feeds the token at pos, unless it was drafted and fed already. Returns the logits after it.
static const float *advance(Drafter *d, int token, int pos) {
    Model *m = d->m;
    d->history[pos] = token;
    d->tokens++;
    if (d->at + 1 < d->fed && d->token[d->at + 1] == token) return checked(m, ++d->at, pos);
    count_accepted(d);
    int room = m->config.seq_len - 1 - pos, k = draft_length(d, room < BATCH - 1 ? room : BATCH - 1);
    double start = seconds();
    k = draft(d, pos, d->token + 1, k);
    d->token[0] = token;
    forward(m, d->token, 1 + k, pos, 0);
    double took = seconds() - start, *usual = &d->seconds[k];
    *usual += *usual == 0.0 ? took : 0.1 * ((took < 4 * *usual ? took : 4 * *usual) - *usual);
    d->fed = 1 + k;
    d->at = d->row = 0;
    d->passes++;
    return checked(m, 0, pos);
}

static void report_drafts(const Drafter *d) {
    if (d->longest == 0 || d->passes == 0) return;
    fprintf(stderr, "drafting: %.2f tokens per pass; accepted/drafted by distance:", (double)d->tokens / d->passes);
    for (int i = 1; i <= d->longest; i++)
        fprintf(stderr, " %llu/%llu", (unsigned long long)d->accepted[i], (unsigned long long)d->drafted[i]);
    fputc('\n', stderr);
}

// ---------------------------------------------------------------------------------------------------------------------
// 15 Modes

static void generate(Drafter *d, const Tokenizer *t, Sampler *s, const char *prompt, int steps) {
    Tokens tokens = encode(t, prompt, strlen(prompt));
    int context = d->m->config.seq_len;
    if (tokens.n > context)
        die("-i: the prompt is %d tokens with BOS; the model's context is %d tokens", tokens.n, context);
    int given = tokens.n < steps ? tokens.n : steps;
    double start = seconds();
    const float *logits = begin(d, tokens.id, given, 0);
    double begun = seconds();  // the first pass is not decoding: it also pages the weights in
    for (int i = 1; i < given; i++) print_token(t, tokens.id[i - 1], tokens.id[i]);

    int token = tokens.id[given - 1], pos = given;
    for (;;) {
        int next = pos < tokens.n ? tokens.id[pos] : sample(s, logits);  // still in the prompt if -n cut it
        if (next == BOS || next == EOS) break;  // the next document would begin here, or an answer is over
        print_token(t, token, next);
        if (pos == steps) break;
        logits = advance(d, next, pos++);
        token = next;
    }
    putchar('\n');
    flush_output();
    if (given > 1) fprintf(stderr, "prompt: %d tokens, tok/s: %.1f\n", given, given / (begun - start));
    if (pos > given) fprintf(stderr, "achieved tok/s: %.1f\n", (pos - given) / (seconds() - begun));
    free(tokens.id);
}

// Asks for one line; false at the end of the input.
static bool read_line(const char *question, Text *line) {
    fputs(question, stdout);
    flush_output();
    line->n = 0;
    int c;
    while ((c = getchar()) != EOF && c != '\n') append(line, &(char){(char)c}, 1);
    if (ferror(stdin)) die("cannot read standard input: %s", strerror(errno));
    return c != EOF || line->n > 0;
}

// One turn in Llama-2's template; only the first carries the system prompt.
static Tokens encode_turn(const Tokenizer *t, const Text *system, const Text *user) {
    Text turn = {0};
    append_string(&turn, "[INST] ");
    if (system->n > 0) {
        append_string(&turn, "<<SYS>>\n");
        append(&turn, system->at, system->n);
        append_string(&turn, "\n<</SYS>>\n\n");
    }
    append(&turn, user->at, user->n);
    append_string(&turn, " [/INST]");
    Tokens tokens = encode(t, turn.at, turn.n);
    free(turn.at);
    return tokens;
}

// Feeds a turn from position pos on and prints the answer, up to EOS, BOS or the limit. Returns the next free position.
static int answer(Drafter *d, const Tokenizer *t, Sampler *s, Tokens turn, int pos, int steps) {
    if (turn.n > steps - pos) die("this turn is %d tokens; %d of %d steps are left", turn.n, steps - pos, steps);
    const float *logits = begin(d, turn.id, turn.n, pos);
    pos += turn.n;
    for (int token = turn.id[turn.n - 1];;) {
        int next = sample(s, logits);
        if (next == BOS) return pos;  // the next turn brings its own
        if (next != EOS) print_token(t, token, next);
        if (pos == steps) return pos;
        logits = advance(d, next, pos++);
        if (next == EOS) return pos;
        token = next;
    }
}

// Talks until the input ends or the steps are used up. system, user: NULL asks for them.
static void chat(Drafter *d, const Tokenizer *t, Sampler *s, const char *system, const char *user, int steps) {
    Text system_text = {0}, user_text = {0};
    bool open = true;
    if (system) append_string(&system_text, system);
    else open = read_line("Enter system prompt (optional): ", &system_text) || user;
    for (int pos = 0; open && pos < steps;) {
        if (pos == 0 && user) append_string(&user_text, user);
        else if (!(open = read_line("User: ", &user_text))) break;
        Tokens turn = encode_turn(t, &system_text, &user_text);
        system_text.n = 0;
        fputs("Assistant: ", stdout);
        pos = answer(d, t, s, turn, pos, steps);
        free(turn.id);
        putchar('\n');
        flush_output();
        if (pos == steps) fprintf(stderr, "run: all %d steps are used up\n", steps);
    }
    if (!open) putchar('\n');
    free(system_text.at);
    free(user_text.at);
}

static Text read_all(FILE *file) {
    Text text = {0};
    do {
        reserve(&text, 1 << 16);
        text.n += fread(text.at + text.n, 1, text.cap - text.n, file);
    } while (!feof(file) && !ferror(file));
    if (ferror(file)) die("cannot read standard input: %s", strerror(errno));
    return text;
}

// -log softmax(logits)[id] in nats; in double, because a long text adds up many of them.
static double surprise(const float *logits, int n, int id) {
    double max = logits[argmax(logits, n)], sum = 0.0;
    for (int i = 0; i < n; i++) sum += exp(logits[i] - max);
    return log(sum) + max - logits[id];
}

// Windows of S tokens, as in training: each starts at position 0 without memory of the one before, and its last
// position predicts the first token of the next. So each token after BOS is predicted exactly once.
static void score(Model *m, const Tokenizer *t) {
    Text text = read_all(stdin);
    if (text.n == 0) die("-m score: standard input is empty; expected a text");
    Tokens tokens = encode(t, text.at, text.n);
    int n = tokens.n - 1;
    double nats = 0.0;
    int S = m->config.seq_len, V = m->config.vocab_size;
    for (int i = 0, N; i < n; i += N) {
        N = n - i < BATCH ? n - i : BATCH;
        if (N > S - i % S) N = S - i % S;  // up to the end of the window
        if (i % 1000 < BATCH && isatty(STDERR_FILENO)) fprintf(stderr, "\r%d / %d tokens\r", i, n);
        forward(m, tokens.id + i, N, i % S, 0);
        for (int k = 0; k < N; k++) nats += surprise(checked(m, k, i % S + k), V, tokens.id[i + k + 1]);
    }
    printf("%.6f\n", nats / n);
    flush_output();
    fprintf(stderr, "%d tokens, perplexity %.4f, %.4f bits per byte\n", n, exp(nats / n),
            nats / log(2.0) / (double)text.n);
    free(tokens.id);
    free(text.at);
}

// ---------------------------------------------------------------------------------------------------------------------
// 16 Command line

typedef struct {
    const char *model, *tokenizer, *mode, *prompt, *system, *draft;  // NULL where a flag was not given
    float temperature, top_p;
    uint64_t seed, steps, threads;
    bool steps_given, bf16;
} Options;

static const char USAGE[] =
    "usage: run MODEL.bin [flags]\n"
    "  -t FLOAT   temperature, >= 0; 0 always takes the best token (default 1.0)\n"
    "  -p FLOAT   top-p, 0 to 1; 0 or 1 sample from all tokens (default 0.9)\n"
    "  -s INT     random seed; 0 takes the time (default 0)\n"
    "  -n INT     steps; 0 takes the model's context (default 256, or the context if that is smaller)\n"
    "  -i TEXT    prompt; with -m chat the first question\n"
    "  -z FILE    tokenizer (default: tokenizer.bin beside the model, else in the working directory)\n"
    "  -m MODE    generate, chat or score (default generate); score reads its text from standard input\n"
    "  -y TEXT    system prompt of -m chat\n"
    "  -d DRAFT   draft tokens ahead: the same text, sooner; a heads file (export.py --heads) or ngram\n"
    "  --bf16     round the weights of a float32 model to 16 bits: half the memory, and faster where that is the limit\n"
    "  -j INT     threads; 0 chooses by the size of the model (default: OMP_NUM_THREADS, else 0)\n"
    "example: run stories15M.bin -n 256 -i \"Once upon a time\"\n";

static float parse_float(char flag, const char *s, float max) {
    char *end;
    float v = strtof(s, &end);
    // isspace: strtof would skip it; all_finite comes first because comparisons with NaN mean nothing under -ffast-math
    if (end == s || *end || isspace((unsigned char)*s) || !all_finite(&v, 1))
        die("-%c: \"%s\" is not a finite number", flag, s);
    if (signbit(v) || v > max) die("-%c: %s is out of range; expected 0 to %g", flag, s, max);
    return v;
}

static uint64_t parse_integer(char flag, const char *s) {
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    // isdigit: strtoull would take "-1" for 2^64 - 1
    if (!isdigit((unsigned char)*s) || *end || errno) die("-%c: \"%s\" is not an integer from 0 up", flag, s);
    return v;
}

static const char *parse_mode(const char *s) {
    if (strcmp(s, "generate") && strcmp(s, "chat") && strcmp(s, "score"))
        die("-m: \"%s\" is no mode; expected generate, chat or score", s);
    return s;
}

static _Noreturn void usage_error(const char *what, const char *arg) {
    fprintf(stderr, "run: %s%s\n%s", what, arg, USAGE);
    exit(EXIT_FAILURE);
}

static Options parse_options(int argc, char **argv) {
    const char *omp = getenv("OMP_NUM_THREADS");  // may be a list, of which the first number counts
    Options o = {.mode = "generate", .temperature = 1.0f, .top_p = 0.9f, .threads = 0};
    long wanted = omp ? strtol(omp, NULL, 10) : 0;
    if (wanted > 0) o.threads = wanted < MAX_THREADS ? (uint64_t)wanted : MAX_THREADS;
    // only where a flag stands: "-i -h" is a prompt
    for (int i = 1; i < argc; i += i == 1 || !strcmp(argv[i], "--bf16") ? 1 : 2)
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help")) {
            fputs(USAGE, stdout);
            flush_output();
            exit(EXIT_SUCCESS);
        }
    if (argc < 2) usage_error("no model file given", "");
    if (argv[1][0] == '-') usage_error("the model file comes before the flags; found ", argv[1]);
    o.model = argv[1];
    for (int i = 2; i < argc; i++) {
        const char *flag = argv[i];
        if (!strcmp(flag, "--bf16")) {
            o.bf16 = true;
            continue;
        }
        const char *value = argv[++i];  // argv[argc] is NULL
        if (flag[0] != '-' || !flag[1] || flag[2] || !strchr("tpsnizmydj", flag[1])) usage_error("unknown flag ", flag);
        if (!value) usage_error("a value is missing after ", flag);
        switch (flag[1]) {
            case 't': o.temperature = parse_float('t', value, 1e30f); break;
            case 'p': o.top_p = parse_float('p', value, 1.0f); break;
            case 's': o.seed = parse_integer('s', value); break;
            case 'n': o.steps = parse_integer('n', value); o.steps_given = true; break;
            case 'i': o.prompt = value; break;
            case 'z': o.tokenizer = value; break;
            case 'm': o.mode = parse_mode(value); break;
            case 'y': o.system = value; break;
            case 'd': o.draft = value; break;
            case 'j': o.threads = parse_integer('j', value); break;
        }
    }
    if (o.threads > MAX_THREADS)
        die("-j %llu: expected at most %d threads", (unsigned long long)o.threads, MAX_THREADS);
    if (o.prompt && !strcmp(o.mode, "score")) die("-i: -m score reads its text from standard input");
    if (o.draft && !strcmp(o.mode, "score")) die("-d: -m score generates nothing to draft");
    if (o.seed == 0) o.seed = (uint64_t)time(NULL);
    return o;
}

static int steps_within(const Options *o, int seq_len) {
    if (!o->steps_given) return seq_len < 256 ? seq_len : 256;
    if (o->steps > (uint64_t)seq_len)
        die("-n %llu: the model's context is %d tokens; -n 0 uses all of it", (unsigned long long)o->steps, seq_len);
    return o->steps ? (int)o->steps : seq_len;
}

// The tokenizer that -z names, else the one beside the model, else the one in the working directory.
static Tokenizer find_tokenizer(const Options *o, int vocab_size) {
    if (o->tokenizer) return load_tokenizer(o->tokenizer, vocab_size);
    static const char name[] = "tokenizer.bin";
    const char *slash = strrchr(o->model, '/');
    static Text path;  // static: the tokenizer's messages go on naming it
    append(&path, o->model, slash ? (size_t)(slash + 1 - o->model) : 0);
    append(&path, name, sizeof name);  // with the final NUL
    if (access(path.at, F_OK) == 0) return load_tokenizer(path.at, vocab_size);
    if (access(name, F_OK) != 0) die("found no tokenizer, neither %s nor ./%s; name one with -z", path.at, name);
    return load_tokenizer(name, vocab_size);
}

#ifndef RUN_NO_MAIN  // tests include this file to reach single functions
int main(int argc, char **argv) {
    binary_streams();
    Options o = parse_options(argc, argv);
    double start = seconds();
    bool scoring = !strcmp(o.mode, "score");
    static Model m;  // static: what it holds is still in use when the program ends, and no leak
    m = load_model(o.model, !scoring && o.temperature == 0.0f, o.bf16, (int)o.threads);
    int V = m.config.vocab_size, steps = steps_within(&o, m.config.seq_len);
    static Tokenizer t;
    t = find_tokenizer(&o, V);
    static Sampler s;
    s = (Sampler){V, o.temperature, o.top_p, o.seed, buffer(padded(V), sizeof(float), "the probabilities"),
                  allocate(V, sizeof(Candidate), "the sampling candidates")};
    static Drafter d;
    d = new_drafter(&m, o.draft);
    double loaded = seconds();

    if (scoring) score(&m, &t);
    else if (!strcmp(o.mode, "chat")) chat(&d, &t, &s, o.system, o.prompt, steps);
    else generate(&d, &t, &s, o.prompt ? o.prompt : "", steps);
    report_drafts(&d);
    fprintf(stderr, "load: %.3f s, weights: %s, threads: %d, peak memory: %.1f MB\n", loaded - start,
            o.bf16 ? "bfloat16" : m.config.group ? "int8" : "float32", pool.threads, peak_memory());
    return EXIT_SUCCESS;
}
#endif
