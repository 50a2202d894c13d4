// Runs every function of kernels.c on odd sizes, each buffer an allocation of its own, for the sanitizers to watch.

#include "../../step/kernels.c"
#include <stdio.h>

static uint64_t state = 1;

static float next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) / (float)(1 << 23) - 1.0f;
}

// n activations of 2 or 4 bytes, in no more memory than that.
static void *activations(int64_t n, int bf16) {
    void *x = malloc((size_t)n * (bf16 ? 2 : 4));
    for (int64_t i = 0; i < n; i++) {
        float value = next();
        write_row(x, i, &value, 1, bf16);
    }
    return x;
}

static int bad;

// Frees x after a look at whether all of it is finite.
static void check(void *x, int64_t n, int bf16) {
    for (int64_t i = 0; i < n; i++) {
        float value;
        read_row(&value, x, i, 1, bf16);
        if (!(fabsf(value) < 1e6f)) bad = 1;
    }
    free(x);
}

static void attention(int64_t B, int64_t T, int64_t H, int64_t G, int64_t hd, int bf16, double dropout) {
    int64_t N = B * T, width = (H + 2 * G) * hd;
    void *qkv = activations(N * width, bf16), *y = activations(N * H * hd, bf16), *dy = activations(N * H * hd, bf16);
    void *dqkv = activations(N * width, bf16), *log_sum = activations(N * H, 0);
    void *cos = activations(T * hd / 2, 0), *sin = activations(T * hd / 2, 0);
    bad |= attention_forward(qkv, cos, sin, y, log_sum, B, T, H, G, hd, bf16, 7, dropout);
    bad |= attention_backward(qkv, cos, sin, y, log_sum, dy, dqkv, B, T, H, G, hd, bf16, 7, dropout);
    check(qkv, N * width, bf16), check(y, N * H * hd, bf16), check(dy, N * H * hd, bf16), check(dqkv, N * width, bf16);
    check(log_sum, N * H, 0), check(cos, T * hd / 2, 0), check(sin, T * hd / 2, 0);
}

static void rows(int64_t N, int64_t D, int bf16) {
    void *h = activations(N * D, 0), *branch = activations(N * D, bf16), *weight = activations(D, 0);
    void *x = activations(N * D, 0), *out = activations(N * D, bf16), *dx = activations(N * D, 0);
    void *dbranch = activations(N * D, bf16), *dweight = activations(D, 0);
    bad |= norm_forward(h, NULL, weight, NULL, out, N, D, 1e-5f, bf16);
    bad |= norm_forward(h, branch, weight, x, out, N, D, 1e-5f, bf16);
    bad |= norm_forward(h, branch, NULL, x, NULL, N, D, 1e-5f, bf16);
    bad |= norm_backward(x, weight, out, NULL, dx, NULL, dweight, N, D, 1e-5f, bf16);
    bad |= norm_backward(x, weight, out, h, dx, dbranch, dweight, N, D, 1e-5f, bf16);
    check(h, N * D, 0), check(branch, N * D, bf16), check(weight, D, 0), check(x, N * D, 0), check(out, N * D, bf16);
    check(dx, N * D, 0), check(dbranch, N * D, bf16), check(dweight, D, 0);

    void *gate_up = activations(2 * N * D, bf16), *y = activations(N * D, bf16), *d = activations(2 * N * D, bf16);
    bad |= swiglu_forward(gate_up, y, N, D, bf16);
    bad |= swiglu_backward(gate_up, y, d, N, D, bf16);
    check(gate_up, 2 * N * D, bf16), check(y, N * D, bf16), check(d, 2 * N * D, bf16);

    void *teacher = activations(N * D, bf16), *logits = activations(N * D, bf16), *gradient = activations(N * D, bf16);
    const int64_t K = N % 3;  // classes a row, none among it
    float *results = malloc((size_t)(N * (4 + K)) * sizeof *results), *scales = malloc((size_t)(N * K) * sizeof *scales);
    float *none = NULL;
    int64_t *classes = malloc((size_t)(N * K) * 8);
    uint8_t *taught = malloc((size_t)N);
    for (int64_t n = 0; n < N; n++) {
        taught[n] = n % 5 != 4;
        for (int64_t k = 0; k < K; k++) {
            classes[n * K + k] = (n + k) % D;
            scales[n * K + k] = n % 7 ? 0.5f : 0.0f;
        }
    }
    float *kl = results, *sums = kl + N, *teacher_sums = sums + N, *best = teacher_sums + N, *ce = best + N;
    bad |= head_losses(teacher, classes, scales, NULL, NULL, NULL, none, 0.0f, ce, kl, teacher_sums, best, N, D, K, bf16);
    bad |= head_losses(logits, classes, scales, taught, gradient, teacher, teacher_sums, 0.5f, ce, kl, sums, NULL, N, D, K, bf16);
    bad |= head_losses(logits, classes, scales, NULL, logits, NULL, none, 0.0f, ce, kl, sums, best, N, D, K, bf16);
    check(teacher, N * D, bf16), check(logits, N * D, bf16), check(gradient, N * D, bf16), check(results, (4 + K) * N, 0);
    free(classes), free(scales), free(taught);
}

static void update(int64_t n) {
    float *x[2], *g[2], *m[2], *v[2], *steps[2];
    const int64_t sizes[2] = {n, 1};
    for (int i = 0; i < 2; i++) {
        x[i] = activations(sizes[i], 0), g[i] = activations(sizes[i], 0), m[i] = calloc((size_t)sizes[i], 4);
        v[i] = calloc((size_t)sizes[i], 4), steps[i] = calloc(1, 4);
    }
    bad |= adamw(x, (const float *const *)g, m, v, steps, sizes, 2, 0.01, 0.9, 0.95, 1e-8, 0.1);
    for (int i = 0; i < 2; i++) {
        check(x[i], sizes[i], 0), check(g[i], sizes[i], 0), check(m[i], sizes[i], 0), check(v[i], sizes[i], 0);
        check(steps[i], 1, 0);
    }
}

int main(void) {
    keep_freed_memory();
    const int64_t shapes[][5] = {{1, 1, 1, 1, 2}, {2, 7, 2, 1, 6}, {1, 8, 4, 4, 8}, {1, 17, 3, 3, 10}, {1, 33, 4, 2, 48}};
    for (int bf16 = 0; bf16 < 2; bf16++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
            attention(shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3], shapes[i][4], bf16, i % 2 ? 0.3 : 0.0);
        for (int64_t D = 1; D < 40; D++) rows(D % 7 + 1, D, bf16);
        rows(2 * ROW_BLOCK + 1, 16, bf16);
    }
    for (int64_t n = 1; n < 40; n++) update(n);
    puts(bad ? "a result is not finite, or a function failed" : "ok");
    return bad;
}
