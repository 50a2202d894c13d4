/*
run.c: run a small Llama in plain C. One file, one program, libc and libm.

It reads a model file (llama2.c's version 0: seven ints, then float32 weights) and a tokenizer file, and then
  generate   continues a prompt: BOS and the prompt go in, tokens come out until BOS or the step limit (default)
  chat       holds a conversation in Llama-2's chat template
  score      prints the mean negative log-likelihood, in nats per token, of the text on standard input

Build:  cc -O3 -march=native -o run run.c -lm       (for large models on several cores: -fopenmp)
Run:    ./run model.bin -z tokenizer.bin -t 0 -n 200 -i "Once upon a time"
Flags:  ./run --help

The story goes to standard output, all else to standard error; anything wrong ends in a message and exit code 1.
Left out on purpose: training, several conversations at once, GPUs, big-endian machines, Windows.

The file follows the data: text -> tokens -> model file -> logits -> next token -> text.
Letters in shapes:
  D dim   H hidden_dim   L n_layers   V vocab_size   S seq_len (the context)
  hd = D / n_heads, the size of a head   K = n_kv_heads * hd, the size of all keys of one position
*/
#define _POSIX_C_SOURCE 200809L  // getline, mmap, clock_gettime under -std=c11
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BOS = 1, EOS = 2, FIRST_BYTE = 3, FIRST_PIECE = FIRST_BYTE + 256 };  // ids; 0 is <unk>, byte b is FIRST_BYTE + b

// ---------------------------------------------------------------------------------------------------------------------
// Errors, memory, files

static _Noreturn void die(const char *format, ...) {
    fflush(stdout);  // what was told so far comes before the reason why it stops
    va_list args;
    va_start(args, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(EXIT_FAILURE);
}

// Zeroed memory for n elements. Asks for one at least, so that NULL always means failure.
static void *allocate(uint64_t n, size_t element, const char *what) {
    if (n == 0) n = 1;
    void *p = n > SIZE_MAX / element ? NULL : calloc((size_t)n, element);
    if (!p) die("out of memory: %s takes %llu elements of %zu bytes", what, (unsigned long long)n, element);
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

// Maps a whole file read-only, so that a model larger than memory loads at once and pages in as it is used.
static Map map_file(const char *path, const char *what) {
    struct stat st;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &st) < 0) die("%s: cannot open the %s: %s", path, what, strerror(errno));
    if (S_ISDIR(st.st_mode)) die("%s: is a folder; expected a %s", path, what);
    if (!S_ISREG(st.st_mode)) die("%s: is not a regular file; expected a %s", path, what);
    if (st.st_size == 0) die("%s: is empty; expected a %s", path, what);
    if ((uint64_t)st.st_size > SIZE_MAX) die("%s: %lld bytes do not fit into memory", path, (long long)st.st_size);
    Map m = {path, NULL, (size_t)st.st_size};
    void *at = mmap(NULL, m.n, PROT_READ, MAP_PRIVATE, fd, 0);
    if (at == MAP_FAILED) die("%s: cannot map the %s into memory: %s", path, what, strerror(errno));
    close(fd);
    m.at = at;
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
// Tokenizer file: int32 longest token in bytes; then for each id: float32 score, int32 length, bytes

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

static bool has_byte_tokens(const Tokenizer *t) {
    if (t->vocab_size < FIRST_PIECE) return false;
    for (int b = 0; b < 256; b++) {
        char name[8];
        int n = snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
        const Piece *p = &t->piece[FIRST_BYTE + b];
        // A vocabulary of bytes alone writes the space as itself, so that the space before a text finds it.
        if (compare_bytes(p->at, p->n, name, n) != 0 && !(b == ' ' && is_space_piece(p))) return false;
    }
    return true;
}

// Neither <unk>, BOS and EOS nor the names of byte tokens can be typed: the text "<0x41>" is six characters.
static bool can_match(const Tokenizer *t, int id) {
    if (id < FIRST_BYTE || t->piece[id].n == 0) return false;
    return !t->byte_fallback || id >= FIRST_PIECE || is_space_piece(&t->piece[id]);
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
    for (int b = 0; b < 256; b++) t.byte[b] = (char)(unsigned char)b;
    t.sorted = allocate((uint64_t)vocab_size, sizeof *t.sorted, "the vocabulary's order");
    for (int id = 0; id < vocab_size; id++)
        if (can_match(&t, id)) t.sorted[t.n_sorted++] = id;
    sort_pieces = t.piece;
    qsort(t.sorted, (size_t)t.n_sorted, sizeof *t.sorted, compare_ids);
    return t;
}

static void free_tokenizer(Tokenizer *t) {
    free(t->piece);
    free(t->sorted);
    munmap((void *)(uintptr_t)t->file.at, t->file.n);
}

// ---------------------------------------------------------------------------------------------------------------------
// Text -> tokens: byte pair encoding as SentencePiece does it (identity normalisation, dummy prefix, byte fallback).
// The text is cut into characters; then the neighbours whose union has the best score merge, again and again.

typedef struct {
    int start, n;    // bytes of the text; n == 0: merged into the symbol on its left
    int prev, next;  // neighbours, -1 at the ends
} Symbol;

typedef struct {
    float score;
    int left, right; // symbols
    int n;           // bytes of both; when that is no longer so, one of them has merged and this candidate is stale
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

// SentencePiece writes a space as U+2581 inside, so for it the two are one; tokenizer files have plain spaces.
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

// A candidate needs no token on either side, only for their union: that is SentencePiece's rule.
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

// BOS and the tokens of a text. Time n log n, so that a whole book may come in as one text.
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
// Model file (llama2.c version 0): seven int32, then the float32 tensors in the order of load_model

typedef struct {
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
    int head_size, kv_dim;   // derived
    bool shared_classifier;  // the output layer is the token embedding
} Config;

typedef struct {
    const float *tok_emb;                  // (V, D)
    const float *rms_att, *rms_ffn;        // (L, D)
    const float *wq, *wo;                  // (L, D, D)
    const float *wk, *wv;                  // (L, K, D)
    const float *w1, *w3;                  // (L, H, D)
    const float *w2;                       // (L, D, H)
    const float *rms_final;                // (D,)
    const float *wcls;                     // (V, D)
} Weights;

// A matrix (rows, n) in panels of PANEL rows, interleaved by column: the element of row p * PANEL + r and column j is
// at[(p * n + j) * PANEL + r]. One column of a panel is a few vector registers of rows, so a product needs no
// horizontal sums, vectorises in plain C, and reads the weights in one stream. Rows beyond the last are zero.
enum { PANEL = 64 };
enum { PARALLEL_FROM = 1 << 16 };  // multiply-adds; for fewer, waking a second thread costs more than it saves

typedef struct {
    float *at;  // (panels(rows), n, PANEL)
    int rows, n;
} Matrix;

typedef struct {
    Matrix qkv;  // (D + 2K, D)  wq, wk, wv on top of each other
    Matrix wo;   // (D, D)
    Matrix w13;  // (2H, D)  w1 on top of w3
    Matrix w2;   // (D, H)
} Layer;

// How many tokens of a prompt or a scored text go through the layers together: each weight is read once for all.
enum { BATCH = 32 };

// Products write whole panels, so their outputs have room for a multiple of PANEL; [n] stands for n rounded up so.
// N is the number of tokens in hand, at most BATCH.
typedef struct {
    float *x;                    // (N, D) the residual stream
    float *xb;                   // (N, D) normed, then after attention
    float *delta;                // (N, [D]) what a residual branch adds
    float *qkv;                  // (N, [D + 2K])
    float *hb;                   // (N, [2H]) hidden activations, gate and up side by side
    float *att;                  // (n_heads, [S]) attention weights of one token
    float *key, *value;          // (L, n_kv_heads) matrices of ([S], hd): the KV cache, its positions in panels
    float *rope_cos, *rope_sin;  // (S, hd / 2)
    float *logits;               // (N, [V])
} State;

typedef struct {
    Map file;
    Config config;
    Weights w;         // as in the file
    Layer *layer;      // (L,) repacked
    Matrix classifier; // (V, D) repacked
    float *packed;     // what the matrices point into
    State s;
} Model;

enum { HEADER_INTS = 7, MAGIC_V1 = 0x616b3432 };

static uint32_t swap_bytes(uint32_t v) { return v >> 24 | (v >> 8 & 0xff00) | (v << 8 & 0xff0000) | v << 24; }

// The upper bounds are far beyond any model this program is for. They also bound every product below: the largest, the
// KV cache's L * S * K, has at most 2^(10+24+16) floats, so 64-bit arithmetic cannot overflow.
static const struct { const char *name; int32_t min, max; } FIELD[HEADER_INTS] = {
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
    int32_t h[HEADER_INTS];
    if (file->n >= 8) {
        memcpy(h, file->at, 8);
        if (h[0] == MAGIC_V1) die("%s: is a version %d model file; this program reads version 0", path, (int)h[1]);
    }
    if (file->n < sizeof h) die("%s: %zu bytes are too few for a model file's header (%zu)", path, file->n, sizeof h);
    memcpy(h, file->at, sizeof h);

    bool shared = h[5] > 0;                // a negative vocabulary size says: the classifier has weights of its own
    if (!shared && h[5] != INT32_MIN) h[5] = -h[5];
    for (int i = 0; i < HEADER_INTS; i++) {
        if (h[i] >= FIELD[i].min && h[i] <= FIELD[i].max) continue;
        uint32_t swapped = swap_bytes((uint32_t)h[0]);
        const char *hint = h[0] > FIELD[0].max && swapped <= (uint32_t)FIELD[0].max ? " (a big-endian file?)" : "";
        die("%s: %s is %d; expected %d to %d%s", path, FIELD[i].name, (int)h[i], (int)FIELD[i].min,
            (int)FIELD[i].max, hint);
    }
    Config c = {h[0], h[1], h[2], h[3], h[4], h[5], h[6], 0, 0, shared};
    if (c.dim % c.n_heads) die("%s: dim %d is not a multiple of n_heads %d", path, c.dim, c.n_heads);
    c.head_size = c.dim / c.n_heads;
    if (c.head_size % 2) die("%s: dim / n_heads is %d; RoPE rotates pairs and needs an even number", path, c.head_size);
    if (c.n_heads % c.n_kv_heads)
        die("%s: n_heads %d is not a multiple of n_kv_heads %d", path, c.n_heads, c.n_kv_heads);
    c.kv_dim = c.n_kv_heads * c.head_size;
    return c;
}

static void map_weights(const Map *file, const Config *c, Weights *w) {
    uint64_t D = c->dim, H = c->hidden_dim, L = c->n_layers, V = c->vocab_size, S = c->seq_len, K = c->kv_dim;
    const float *unused;  // RoPE tables of the exporter; we compute our own
    struct { const float **at; uint64_t n; } tensor[] = {
        {&w->tok_emb, V * D},
        {&w->rms_att, L * D},
        {&w->wq, L * D * D},
        {&w->wk, L * K * D},
        {&w->wv, L * K * D},
        {&w->wo, L * D * D},
        {&w->rms_ffn, L * D},
        {&w->w1, L * H * D},
        {&w->w2, L * D * H},
        {&w->w3, L * H * D},
        {&w->rms_final, D},
        {&unused, S * (uint64_t)c->head_size},  // cos and sin, (S, hd / 2) each
        {&w->wcls, c->shared_classifier ? 0 : V * D},
    };
    size_t count = sizeof tensor / sizeof tensor[0];
    uint64_t bytes = HEADER_INTS * sizeof(int32_t);
    for (size_t i = 0; i < count; i++) bytes += tensor[i].n * sizeof(float);
    if (bytes != file->n)
        die("%s: the file has %zu bytes; its header (dim %d, hidden_dim %d, n_layers %d, n_heads %d, n_kv_heads %d, "
            "vocab_size %d, seq_len %d) asks for %llu", file->path, file->n, c->dim, c->hidden_dim, c->n_layers,
            c->n_heads, c->n_kv_heads, c->vocab_size, c->seq_len, (unsigned long long)bytes);

    const float *at = (const float *)(const void *)(file->at + HEADER_INTS * sizeof(int32_t));
    for (size_t i = 0; i < count; at += tensor[i++].n) *tensor[i].at = at;
    if (c->shared_classifier) w->wcls = w->tok_emb;
}

static void fill_rope(const Config *c, State *s) {
    int half = c->head_size / 2;
    for (int i = 0; i < half; i++) {
        // In double: the powf of -ffast-math is off by enough to shift late positions' logits by 1e-4.
        float frequency = (float)(1.0 / pow(10000.0, (double)(2 * i) / c->head_size));
        for (int pos = 0; pos < c->seq_len; pos++) {
            float angle = (float)pos * frequency;
            s->rope_cos[(size_t)pos * half + i] = cosf(angle);
            s->rope_sin[(size_t)pos * half + i] = sinf(angle);
        }
    }
}

static uint64_t panels(uint64_t rows) { return (rows + PANEL - 1) / PANEL; }

static uint64_t padded(uint64_t rows) { return panels(rows) * PANEL; }

static State new_state(const Config *c) {
    uint64_t cache = (uint64_t)c->n_layers * padded(c->seq_len) * c->kv_dim;
    uint64_t rope = (uint64_t)c->seq_len * (c->head_size / 2);
    const char *what = "the activations";
    size_t f = sizeof(float);
    State s = {
        .key = allocate(cache, f, "the cache of keys"),
        .value = allocate(cache, f, "the cache of values"),
        .att = allocate(c->n_heads * padded(c->seq_len), f, "the attention weights"),
        .rope_cos = allocate(rope, f, "the RoPE table"),
        .rope_sin = allocate(rope, f, "the RoPE table"),
        .x = allocate(BATCH * (uint64_t)c->dim, f, what),
        .xb = allocate(BATCH * (uint64_t)c->dim, f, what),
        .delta = allocate(BATCH * padded(c->dim), f, what),
        .qkv = allocate(BATCH * padded((uint64_t)c->dim + 2 * c->kv_dim), f, what),
        .hb = allocate(BATCH * padded(2 * (uint64_t)c->hidden_dim), f, what),
        .logits = allocate(BATCH * padded(c->vocab_size), f, "the logits"),
    };
    fill_rope(c, &s);
    return s;
}

// Takes room for a matrix from *at and moves *at past it.
static Matrix carve(float **at, int rows, int n) {
    Matrix m = {*at, rows, n};
    *at += padded(rows) * (uint64_t)n;
    return m;
}

static void write_row(const Matrix *m, int row, const float *values) {
    float *at = m->at + (size_t)(row / PANEL) * m->n * PANEL + row % PANEL;
    for (int j = 0; j < m->n; j++) at[(size_t)j * PANEL] = values[j];
}

// Writes W, (rows, n) row by row, into the matrix from row `first` on.
static void pack(const Matrix *m, int first, const float *W, int rows) {
    for (int i = 0; i < rows; i++) write_row(m, first + i, W + (size_t)i * m->n);
}

static void pack_weights(Model *m) {
    const Config *c = &m->config;
    const Weights *w = &m->w;
    size_t D = c->dim, H = c->hidden_dim, K = c->kv_dim;
    uint64_t one = padded(D + 2 * K) * D + padded(D) * D + padded(2 * H) * D + padded(D) * H;
    m->packed = allocate(c->n_layers * one + padded(c->vocab_size) * D, sizeof(float), "the repacked weights");
    m->layer = allocate(c->n_layers, sizeof *m->layer, "the layers");
    float *at = m->packed;
    for (int l = 0; l < c->n_layers; l++) {
        Layer *layer = &m->layer[l];
        *layer = (Layer){carve(&at, c->dim + 2 * c->kv_dim, c->dim), carve(&at, c->dim, c->dim),
                         carve(&at, 2 * c->hidden_dim, c->dim), carve(&at, c->dim, c->hidden_dim)};
        pack(&layer->qkv, 0, w->wq + l * D * D, c->dim);
        pack(&layer->qkv, c->dim, w->wk + l * K * D, c->kv_dim);
        pack(&layer->qkv, c->dim + c->kv_dim, w->wv + l * K * D, c->kv_dim);
        pack(&layer->wo, 0, w->wo + l * D * D, c->dim);
        pack(&layer->w13, 0, w->w1 + l * H * D, c->hidden_dim);
        pack(&layer->w13, c->hidden_dim, w->w3 + l * H * D, c->hidden_dim);
        pack(&layer->w2, 0, w->w2 + l * D * H, c->dim);
    }
    m->classifier = carve(&at, c->vocab_size, c->dim);
    pack(&m->classifier, 0, w->wcls, c->vocab_size);
}

static Model load_model(const char *path) {
    Model m = {.file = map_file(path, "model file")};
    m.config = read_config(&m.file);
    map_weights(&m.file, &m.config, &m.w);
    pack_weights(&m);
    m.s = new_state(&m.config);
    return m;
}

static void free_model(Model *m) {
    State *s = &m->s;
    float *buffer[] = {s->x, s->xb, s->delta, s->qkv, s->hb, s->att, s->key, s->value, s->rope_cos, s->rope_sin,
                       s->logits, m->packed};
    for (size_t i = 0; i < sizeof buffer / sizeof buffer[0]; i++) free(buffer[i]);
    free(m->layer);
    munmap((void *)(uintptr_t)m->file.at, m->file.n);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward pass: tokens in, the logits of what follows each out

enum { LANES = 16, COLUMNS = 4 };

// C forbids reordering one float sum, so loops that must vectorise keep LANES partial sums; this adds them up.
static float sum_lanes(float *lane) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int r = 0; r < half; r++) lane[r] += lane[r + half];
    return lane[0];
}

// out[r] = sum over j of w[j][r] * x[j]; w: (n, PANEL). Nearly all the time goes here.
static void multiply_panel(float *restrict out, const float *restrict w, const float *restrict x, int n) {
    float lane[PANEL] = {0};
    for (int j = 0; j < n; j++)
        for (int r = 0; r < PANEL; r++) lane[r] += w[(size_t)j * PANEL + r] * x[j];
    memcpy(out, lane, sizeof lane);
}

// The same for COLUMNS inputs, x_stride apart, to outputs out_stride apart. Each sum has the same terms in the same
// order as above, so a token's numbers do not depend on how many go together. 16 x 4 sums fit the registers.
static void multiply_panel_columns(float *restrict out, size_t out_stride, const float *restrict w,
                                   const float *restrict x, size_t x_stride, int n) {
    const float *x0 = x, *x1 = x0 + x_stride, *x2 = x1 + x_stride, *x3 = x2 + x_stride;
    for (int part = 0; part < PANEL; part += LANES) {
        float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, d[LANES] = {0};
        for (int j = 0; j < n; j++) {
            const float *row = w + (size_t)j * PANEL + part;
            float e = x0[j], f = x1[j], g = x2[j], h = x3[j];
            for (int r = 0; r < LANES; r++) {
                a[r] += row[r] * e;
                b[r] += row[r] * f;
                c[r] += row[r] * g;
                d[r] += row[r] * h;
            }
        }
        memcpy(out + part, a, sizeof a);
        memcpy(out + out_stride + part, b, sizeof b);
        memcpy(out + 2 * out_stride + part, c, sizeof c);
        memcpy(out + 3 * out_stride + part, d, sizeof d);
    }
}

// Panel p of out = W x, for each of N inputs: it stays in the cache while all of them meet it.
static void matmul_panel(float *out, const float *x, size_t x_stride, int N, const Matrix *W, int p) {
    size_t out_stride = padded(W->rows);
    const float *w = W->at + (size_t)p * W->n * PANEL;
    out += (size_t)p * PANEL;
    int i = 0;
    for (; i + COLUMNS <= N; i += COLUMNS)
        multiply_panel_columns(out + i * out_stride, out_stride, w, x + i * x_stride, x_stride, W->n);
    for (; i < N; i++) multiply_panel(out + i * out_stride, w, x + i * x_stride, W->n);
}

// out = W x for each of N inputs; x: (N, x_stride), out: (N, [rows])
static void matmul(float *out, const float *x, size_t x_stride, int N, const Matrix *W) {
    int count = (int)panels(W->rows);
#ifdef _OPENMP  // an `if` clause instead would still cost a call into the runtime, every time
    if ((double)count * PANEL * W->n * N > PARALLEL_FROM) {
        #pragma omp parallel for
        for (int p = 0; p < count; p++) matmul_panel(out, x, x_stride, N, W, p);
        return;
    }
#endif
    for (int p = 0; p < count; p++) matmul_panel(out, x, x_stride, N, W, p);
}

// out = transposed W times y; y: ([rows],), zero beyond the last row, out: (n,)
static void matmul_transposed(float *restrict out, const float *restrict y, const Matrix *W) {
    int count = (int)panels(W->rows);
    for (int j = 0; j < W->n; j++) {
        float lane[LANES] = {0};
        for (int p = 0; p < count; p++) {
            const float *w = W->at + ((size_t)p * W->n + j) * PANEL, *part = y + (size_t)p * PANEL;
            for (int r = 0; r < PANEL; r += LANES)
                for (int i = 0; i < LANES; i++) lane[i] += w[r + i] * part[r + i];
        }
        out[j] = sum_lanes(lane);
    }
}

static float sum_of_squares(const float *x, int n) {
    float lane[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < LANES; r++) lane[r] += x[i + r] * x[i + r];
    for (; i < n; i++) lane[i % LANES] += x[i] * x[i];
    return sum_lanes(lane);
}

static void rmsnorm(float *out, const float *x, const float *weight, int n) {
    float scale = 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + 1e-5f);
    for (int i = 0; i < n; i++) out[i] = weight[i] * (scale * x[i]);
}

static void add(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

// exp(-|x|) to a few units in the last place; from |x| = 87 on it stays at exp(-87), next to 0. Unlike expf it
// vectorises: 2^t = 2^k * 2^f, k an integer for the exponent bits, f in [-0.5, 0.5] for a polynomial (Cephes' exp2f).
static inline float exp_minus_abs(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0x7fffffffu;
    bits = bits < 0x42ae0000u ? bits : 0x42ae0000u;  // 87.0f; as integers, because a float's branch would not vectorise
    float t;
    memcpy(&t, &bits, sizeof t);
    t *= -1.44269504f;
    int32_t k = (int32_t)(t - 0.5f);
    float f = t - (float)k;
    float p = 1.535336188e-4f;
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    bits = (uint32_t)(k + 127) << 23;
    memcpy(&t, &bits, sizeof t);
    return p * t;
}

static float maximum(const float *x, int n) {
    float lane[LANES], max = x[0];
    for (int r = 0; r < LANES; r++) lane[r] = max;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < LANES; r++) lane[r] = x[i + r] > lane[r] ? x[i + r] : lane[r];
    for (; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int r = 0; r < LANES; r++) max = lane[r] > max ? lane[r] : max;
    return max;
}

// In place over x[0..n). x has room for [n]; what lies beyond n is set to 0, for matmul_transposed.
static void softmax(float *x, int n) {
    int end = (int)padded(n);
    if (!all_finite(x, (size_t)n)) {  // numbers so large that they overflowed: NaNs, which forward finds in the logits
        memset(x, 0xff, (size_t)end * sizeof *x);
        return;
    }
    float max = maximum(x, n), lane[LANES] = {0};
    for (int i = n; i < end; i++) x[i] = max - 1000.0f;  // exp of it adds nothing
    for (int i = 0; i < end; i += LANES)
        for (int r = 0; r < LANES; r++) {
            x[i + r] = exp_minus_abs(x[i + r] - max);
            lane[r] += x[i + r];
        }
    float scale = 1.0f / sum_lanes(lane);
    for (int i = 0; i < n; i++) x[i] *= scale;
    for (int i = n; i < end; i++) x[i] = 0.0f;
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

// The first n positions of a cache (S, hd) of one layer and key/value head.
static Matrix cached(float *cache, const Config *c, int layer, int kv_head, int n) {
    size_t head = padded(c->seq_len) * (size_t)c->head_size;
    return (Matrix){cache + ((size_t)layer * c->n_kv_heads + kv_head) * head, n, c->head_size};
}

// Query head h of the token at position pos, over everything up to it in the cache. q, out: (D,)
static void attend(Model *m, int layer, int pos, int h, float *q, float *out) {
    const Config *c = &m->config;
    int hd = c->head_size, kv_head = h / (c->n_heads / c->n_kv_heads);  // neighbours share a key head
    Matrix key = cached(m->s.key, c, layer, kv_head, pos + 1), value = cached(m->s.value, c, layer, kv_head, pos + 1);
    float *att = m->s.att + h * padded(c->seq_len), scale = 1.0f / sqrtf((float)hd);
    q += h * hd;
    for (int i = 0; i < hd; i++) q[i] *= scale;
    matmul(att, q, 0, 1, &key);
    softmax(att, pos + 1);
    matmul_transposed(out + h * hd, att, &value);
}

static void attend_all_heads(Model *m, int layer, int pos, float *q, float *out) {
    int n_heads = m->config.n_heads;
#ifdef _OPENMP
    if ((double)pos * m->config.dim > PARALLEL_FROM) {
        #pragma omp parallel for
        for (int h = 0; h < n_heads; h++) attend(m, layer, pos, h, q, out);
        return;
    }
#endif
    for (int h = 0; h < n_heads; h++) attend(m, layer, pos, h, q, out);
}

static void attention(Model *m, int layer, int N, int pos) {
    const Config *c = &m->config;
    State *s = &m->s;
    int hd = c->head_size;
    size_t D = c->dim, width = padded(D + 2 * (size_t)c->kv_dim);
    for (int i = 0; i < N; i++) rmsnorm(s->xb + i * D, s->x + i * D, m->w.rms_att + layer * D, c->dim);
    matmul(s->qkv, s->xb, D, N, &m->layer[layer].qkv);
    for (int i = 0; i < N; i++) {
        float *q = s->qkv + i * width, *k = q + c->dim, *v = k + c->kv_dim;  // (D,), (K,), (K,)
        size_t angle = (size_t)(pos + i) * (hd / 2);
        rope(q, c->dim + c->kv_dim, hd, s->rope_cos + angle, s->rope_sin + angle);  // q and k
        for (int h = 0; h < c->n_kv_heads; h++) {
            Matrix key = cached(s->key, c, layer, h, pos + i + 1), value = cached(s->value, c, layer, h, pos + i + 1);
            write_row(&key, pos + i, k + h * hd);
            write_row(&value, pos + i, v + h * hd);
        }
        attend_all_heads(m, layer, pos + i, q, s->xb + i * D);
    }
    matmul(s->delta, s->xb, D, N, &m->layer[layer].wo);
    for (int i = 0; i < N; i++) add(s->x + i * D, s->delta + i * padded(D), c->dim);
}

// SwiGLU: W2 (silu(W1 x) * W3 x), silu(a) = a / (1 + exp(-a))
static void feed_forward(Model *m, int layer, int N) {
    const Config *c = &m->config;
    State *s = &m->s;
    int H = c->hidden_dim;
    size_t D = c->dim, width = padded(2 * (size_t)H);
    for (int i = 0; i < N; i++) rmsnorm(s->xb + i * D, s->x + i * D, m->w.rms_ffn + layer * D, c->dim);
    matmul(s->hb, s->xb, D, N, &m->layer[layer].w13);
    for (int i = 0; i < N; i++) {
        float *gate = s->hb + i * width, *up = gate + H;
        for (int j = 0; j < H; j++) {
            // exp(-|a|) never overflows; exp(-a) does below -88, and 1 / infinity is not 0 under -ffast-math.
            float a = gate[j], e = exp_minus_abs(a);
            gate[j] = a * (a < 0 ? e : 1.0f) / (1.0f + e) * up[j];
        }
    }
    matmul(s->delta, s->hb, width, N, &m->layer[layer].w2);
    for (int i = 0; i < N; i++) add(s->x + i * D, s->delta + i * padded(D), c->dim);
}

// Feeds N <= BATCH tokens at positions pos, pos + 1, ..., after 0..pos-1 have been fed. Returns the logits after each
// of them from `first` on, (N - first, [V]), all of them finite.
static const float *forward(Model *m, const int *token, int N, int pos, int first) {
    const Config *c = &m->config;
    State *s = &m->s;
    size_t D = c->dim, V = padded(c->vocab_size);
    for (int i = 0; i < N; i++) memcpy(s->x + i * D, m->w.tok_emb + token[i] * D, D * sizeof(float));
    for (int layer = 0; layer < c->n_layers; layer++) {
        attention(m, layer, N, pos);
        feed_forward(m, layer, N);
    }
    for (int i = first; i < N; i++) rmsnorm(s->xb + i * D, s->x + i * D, m->w.rms_final, c->dim);
    matmul(s->logits, s->xb + first * D, D, N - first, &m->classifier);
    for (int i = first; i < N; i++)
        if (!all_finite(s->logits + (i - first) * V, (size_t)c->vocab_size))
            die("%s: the logits at position %d are not finite: the weights are damaged", m->file.path, pos + i);
    return s->logits;
}

// Feeds any number of tokens, BATCH at a time. Returns the logits (V,) after the last.
static const float *feed(Model *m, const int *token, int n, int pos) {
    for (; n > BATCH; n -= BATCH, token += BATCH, pos += BATCH) forward(m, token, BATCH, pos, BATCH);
    return forward(m, token, n, pos, n - 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Logits -> next token. The order of operations is llama2.c's: the same seed tells the same story.

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

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
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
    // A token below this cannot be among the kept ones: the others together would fall short of the rest, 1 - p.
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
    if (!all_finite(s->probability, (size_t)V)) return argmax(logits, V);  // a temperature so near 0 that it overflows
    softmax(s->probability, V);
    return s->top_p <= 0.0f || s->top_p >= 1.0f ? sample_all(s->probability, V, coin) : sample_top_p(s, coin);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokens -> text

static void flush_output(void) {
    if (fflush(stdout) != 0 || ferror(stdout)) die("cannot write to standard output: %s", strerror(errno));
}

// Prints token `id`, which follows `previous`.
static void print_token(const Tokenizer *t, int previous, int id) {
    Piece p = t->piece[id];
    if (previous == BOS && p.n > 0 && p.at[0] == ' ') {  // the space that encode put in front
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
// Modes

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void generate(Model *m, const Tokenizer *t, Sampler *s, const char *prompt, int steps) {
    Tokens tokens = encode(t, prompt, strlen(prompt));
    if (tokens.n > m->config.seq_len)
        die("-i: the prompt is %d tokens with BOS; the model's context is %d tokens", tokens.n, m->config.seq_len);
    int given = tokens.n < steps ? tokens.n : steps;
    double start = seconds();
    const float *logits = feed(m, tokens.id, given, 0);
    double begun = seconds();  // BOS alone also pages the weights in; it does not count as decoding
    for (int i = 1; i < given; i++) print_token(t, tokens.id[i - 1], tokens.id[i]);

    int token = tokens.id[given - 1], pos = given;
    for (;;) {
        int next = pos < tokens.n ? tokens.id[pos] : sample(s, logits);  // the former where -n cuts the prompt
        if (next == BOS) break;  // the next document would begin here
        print_token(t, token, next);
        if (pos == steps) break;
        logits = feed(m, &next, 1, pos++);
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
    errno = 0;
    ssize_t n = getline(&line->at, &line->cap, stdin);
    if (n < 0 && !feof(stdin)) die("cannot read standard input: %s", strerror(errno));
    if (n < 0) return false;
    line->n = (size_t)n - (line->at[n - 1] == '\n');
    return true;
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
static int answer(Model *m, const Tokenizer *t, Sampler *s, Tokens turn, int pos, int steps) {
    if (turn.n > steps - pos) die("this turn is %d tokens; %d of %d steps are left", turn.n, steps - pos, steps);
    const float *logits = feed(m, turn.id, turn.n, pos);
    pos += turn.n;
    for (int token = turn.id[turn.n - 1];;) {
        int next = sample(s, logits);
        if (next == BOS) return pos;  // the next turn brings its own
        if (next != EOS) print_token(t, token, next);
        if (pos == steps) return pos;
        logits = feed(m, &next, 1, pos++);
        if (next == EOS) return pos;
        token = next;
    }
}

// Talks until the input ends or the steps are used up. system, user: NULL asks for them.
static void chat(Model *m, const Tokenizer *t, Sampler *s, const char *system, const char *user, int steps) {
    Text system_text = {0}, user_text = {0};
    bool open = true;
    if (system) append_string(&system_text, system);
    else open = read_line("Enter system prompt (optional): ", &system_text);
    for (int pos = 0; open && pos < steps;) {
        if (pos == 0 && user) append_string(&user_text, user);
        else if (!(open = read_line("User: ", &user_text))) break;
        Tokens turn = encode_turn(t, &system_text, &user_text);
        system_text.n = 0;
        fputs("Assistant: ", stdout);
        pos = answer(m, t, s, turn, pos, steps);
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
        const float *logits = forward(m, tokens.id + i, N, i % S, 0);
        for (int k = 0; k < N; k++) nats += surprise(logits + k * padded(V), V, tokens.id[i + k + 1]);
    }
    printf("%.6f\n", nats / n);
    flush_output();
    fprintf(stderr, "%d tokens, perplexity %.4f, %.4f bits per byte\n", n, exp(nats / n),
            nats / log(2.0) / (double)text.n);
    free(tokens.id);
    free(text.at);
}

// ---------------------------------------------------------------------------------------------------------------------
// Command line

typedef struct {
    const char *model, *tokenizer, *mode, *prompt, *system;  // NULL where a flag was not given
    float temperature, top_p;
    uint64_t seed, steps;
    bool steps_given;
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
    Options o = {.mode = "generate", .temperature = 1.0f, .top_p = 0.9f};
    for (int i = 1; i < argc; i += i == 1 ? 1 : 2)  // in a flag's place only: "-i -h" is a prompt
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help")) {
            fputs(USAGE, stdout);
            flush_output();
            exit(EXIT_SUCCESS);
        }
    if (argc < 2) usage_error("no model file given", "");
    if (argv[1][0] == '-') usage_error("the model file comes before the flags; found ", argv[1]);
    o.model = argv[1];
    for (int i = 2; i < argc; i += 2) {
        const char *flag = argv[i], *value = argv[i + 1];  // argv[argc] is NULL
        if (flag[0] != '-' || !flag[1] || flag[2] || !strchr("tpsnizmy", flag[1])) usage_error("unknown flag ", flag);
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
        }
    }
    if (o.prompt && !strcmp(o.mode, "score")) die("-i: -m score reads its text from standard input");
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
    Options o = parse_options(argc, argv);
    Model m = load_model(o.model);
    int V = m.config.vocab_size, steps = steps_within(&o, m.config.seq_len);
    Tokenizer t = find_tokenizer(&o, V);
    Sampler s = {V, o.temperature, o.top_p, o.seed, allocate(padded(V), sizeof(float), "the probabilities"),
                 allocate(V, sizeof(Candidate), "the sampling candidates")};

    if (!strcmp(o.mode, "generate")) generate(&m, &t, &s, o.prompt ? o.prompt : "", steps);
    else if (!strcmp(o.mode, "chat")) chat(&m, &t, &s, o.system, o.prompt, steps);
    else score(&m, &t);

    flush_output();
    free(s.probability);
    free(s.candidate);
    free_tokenizer(&t);
    free_model(&m);
    return EXIT_SUCCESS;
}
#endif
