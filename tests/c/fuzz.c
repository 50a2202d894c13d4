// Fuzzes run.c's readers: make fuzz (clang with libFuzzer, address and undefined-behaviour sanitizers).
// The first byte of an input chooses what the rest is: a model file, a tokenizer file, a prompt, or a heads file. What
// loads is used, so that a size that passes the checks and should not have is found by the sanitizers.
#define _GNU_SOURCE  // as run.c, which is included after these
#define SEPARATE_BUFFERS
#define SCREEN_FROM 1
#include <fcntl.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static int file = -1;  // open now
static _Noreturn void leave(int code);
static void *track(void *p);
static void *mmap_tracked(size_t n, int fd);
static void untrack(void *p);

// run.c ends the process when something is wrong; here it ends the input, and what it held is released.
#define exit leave
#define calloc(n, size) track((calloc)(n, size))
#define realloc(p, size) (untrack(p), track((realloc)(p, size)))
#define free(p) (untrack(p), (free)(p))
#define mmap(at, n, prot, flags, fd, offset) mmap_tracked(n, fd)
#define madvise(at, n, advice) 0  // a mapping is memory of the heap here
#define open(path, flags) (file = (open)(path, flags))
#define close(fd) (file = -1, (close)(fd))
#define RUN_NO_MAIN
#include "../../run.c"
#undef exit
#undef calloc
#undef realloc
#undef free
#undef mmap
#undef madvise
#undef open
#undef close

enum { MOST = 100000, VOCAB = 300 };
static jmp_buf out;
static void *held[MOST];
static int n_held;

static void leave(int code) { longjmp(out, code + 1); }

static void *track(void *p) {
    if (n_held == MOST) abort();
    if (p) held[n_held++] = p;
    return p;
}

static void untrack(void *p) {
    for (int i = 0; p && i < n_held; i++)
        if (held[i] == p) {
            held[i] = held[--n_held];
            return;
        }
}

// A copy on the heap, of the file's length to the byte: reads past the end of a mapping would go unnoticed in its page.
static void *mmap_tracked(size_t n, int fd) {
    void *at = track(malloc(n));
    return at && pread(fd, at, n, 0) == (ssize_t)n ? at : MAP_FAILED;
}

static void release(void) {
    while (n_held > 0) free(held[--n_held]);
    if (file >= 0) close(file);
    file = -1;
}

static const char *write_file(const char *name, const void *data, size_t n) {
    FILE *f = fopen(name, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) abort();
    return name;
}

static void use_model(const char *path, bool greedy, bool bf16) {
    Model m = load_model(path, greedy, bf16, 1);
    int token[3] = {1, m.config.vocab_size - 1, 0}, n = m.config.seq_len < 3 ? m.config.seq_len : 3;
    for (int i = 0; i < 2; i++) feed(&m, token, n, 0);  // the second time through the screen
}

static void use_tokenizer(const char *path, int vocab_size, const char *prompt, size_t n) {
    Tokenizer t = load_tokenizer(path, vocab_size);
    Tokens tokens = encode(&t, prompt, n);
    for (int i = 1; i < tokens.n; i++) print_token(&t, tokens.id[i - 1], tokens.id[i]);
}

static void use_heads(const char *model, const char *path) {
    Model m = load_model(model, true, false, 1);
    Drafter d = new_drafter(&m, path);
    int token = BOS;
    begin(&d, &token, 1, 0);
    for (int pos = 1; pos < m.config.seq_len; pos++) advance(&d, pos % 3, pos);
}

// A version 0 file: dim 4, hidden_dim 4, one layer of one head, 5 tokens, a context of 8. All weights are 0.5.
static size_t good_model(char *to) {
    int32_t header[FIELDS] = {4, 4, 1, 1, 1, 5, 8};
    float weights[5 * 4 + 3 * 4 + 4 * 16 + 3 * 16 + 8 * 4];
    for (size_t i = 0; i < sizeof weights / sizeof weights[0]; i++) weights[i] = 0.5f;
    memcpy(to, header, sizeof header);
    memcpy(to + sizeof header, weights, sizeof weights);
    return sizeof header + sizeof weights;
}

// A vocabulary of the bytes and a few pieces that merge.
static size_t good_tokenizer(char *to) {
    int32_t longest = 8;
    size_t at = sizeof longest;
    memcpy(to, &longest, sizeof longest);
    for (int id = 0; id < VOCAB; id++) {
        char text[16];
        int32_t n;
        if (id < FIRST_BYTE) n = snprintf(text, sizeof text, "<%d>", id);
        else if (id < FIRST_PIECE) n = snprintf(text, sizeof text, "<0x%02X>", (unsigned)(id - FIRST_BYTE));
        else n = snprintf(text, sizeof text, "%.*s", 1 + id % 3, &" the dog sat"[id % 10]);
        float score = (float)-id;
        memcpy(to + at, &score, 4);
        memcpy(to + at + 4, &n, 4);
        memcpy(to + at + 8, text, (size_t)n);
        at += 8 + (size_t)n;
    }
    return at;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static char model[64], tokenizer[64], heads[64], good[64], trunk[64];
    if (!good[0]) {
        static char bytes[VOCAB * 24];
        const char *folder = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
        snprintf(model, sizeof model, "%s/fuzz_%d_model", folder, (int)getpid());
        snprintf(tokenizer, sizeof tokenizer, "%s/fuzz_%d_tokenizer", folder, (int)getpid());
        snprintf(good, sizeof good, "%s/fuzz_%d_good", folder, (int)getpid());
        snprintf(heads, sizeof heads, "%s/fuzz_%d_heads", folder, (int)getpid());
        snprintf(trunk, sizeof trunk, "%s/fuzz_%d_trunk", folder, (int)getpid());
        write_file(good, bytes, good_tokenizer(bytes));
        write_file(trunk, bytes, good_model(bytes));
    }
    if (n == 0) return 0;
    const char *rest = (const char *)data + 1;
    if (setjmp(out) == 0) {
        switch (data[0] % 4) {
            case 0: use_model(write_file(model, rest, n - 1), data[0] & 4, data[0] & 8); break;
            case 1: {  // the next byte is the vocabulary's size; with a small one the last entry is soon reached
                if (n < 2) break;
                int vocab_size = data[1] ? data[1] : VOCAB;
                write_file(tokenizer, rest + 1, n - 2);
                use_tokenizer(tokenizer, vocab_size, "the dog <0x41> \xe2\x96\x81 \xff", 18);
                break;
            }
            case 2: use_tokenizer(good, VOCAB, rest, n - 1); break;
            case 3: use_heads(trunk, write_file(heads, rest, n - 1)); break;
        }
    }
    release();
    return 0;
}
