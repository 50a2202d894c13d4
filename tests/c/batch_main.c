// Do tokens that go through run.c's layers together get the same logits, bit for bit, as one at a time?
// batch_main MODEL.bin [bf16]: exit code 0 if so, for every batch size from 2 to BATCH and every position.
#define RUN_NO_MAIN
#include "../../run.c"

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    bool bf16 = argc > 2;
    Model one = load_model(argv[1], false, bf16, 1), many = load_model(argv[1], false, bf16, 1);
    int S = one.config.seq_len, V = one.config.vocab_size;
    int *token = allocate(S, sizeof *token, "the tokens");
    float *expected = allocate((uint64_t)S * V, sizeof *expected, "the logits");
    for (int pos = 0; pos < S; pos++) {
        token[pos] = (pos * 7919 + 1) % V;
        memcpy(expected + (size_t)pos * V, feed(&one, &token[pos], 1, pos), V * sizeof(float));
    }
    for (int batch = 2; batch <= BATCH; batch++)
        for (int pos = 0, N; pos < S; pos += N) {
            N = S - pos < batch ? S - pos : batch;
            const float *logits = forward(&many, token + pos, N, pos, 0);
            for (int i = 0; i < N; i++)
                if (memcmp(logits + i * padded(V), expected + (size_t)(pos + i) * V, V * sizeof(float)))
                    die("%d tokens together differ at position %d", batch, pos + i);
            if (pos + N == S && memcmp(feed(&many, token, S, 0), expected + (size_t)(S - 1) * V, V * sizeof(float)))
                die("the whole text differs");
        }
    return 0;
}
