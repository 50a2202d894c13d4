// Does run.c's drafting give the logits of plain decoding, bit for bit, whatever the lengths of the drafts?
// And does each head draft from the state at the position before? draft_main MODEL.bin (HEADS.bin | ngram): exit code 0
// if so; prints how many drafted tokens were accepted, by distance.
#define RUN_NO_MAIN
#include "../../run.c"

static int differing, drafted;

// Compares the drafts of d's last pass with the best of each head's float32 logits, straight from the file.
static void check_drafts(const Drafter *d, const Map *file, const float *state) {
    int D = d->m->config.dim, V = d->m->config.vocab_size;
    for (int i = 1; i < d->fed && d->at == 0; i++) {
        const float *head = (const float *)(const void *)(file->at + 28) + (size_t)(i - 1) * V * D;
        int best = 0;
        double most = -1e30;
        for (int v = 0; v < V; v++) {
            double sum = 0.0;
            for (int j = 0; j < D; j++) sum += (double)head[v * D + j] * state[j];
            if (sum > most) most = sum, best = v;
        }
        differing += best != d->token[i];
        drafted++;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    Model one = load_model(argv[1], false, false, 1), many = load_model(argv[1], false, false, 1);
    Drafter plain = new_drafter(&one, NULL), d = new_drafter(&many, argv[2]);
    int V = one.config.vocab_size, S = one.config.seq_len, prompt[40] = {BOS};
    Sampler s = {V, 1.0f, 0.9f, 7, allocate(padded(V), sizeof(float), "p"), allocate(V, sizeof(Candidate), "c")};
    uint64_t lengths = 99;
    Map file = d.head ? map_file(argv[2], "heads file") : (Map){0};
    float *state = allocate(one.config.dim, sizeof *state, "s");
    for (int given = 1; given <= 40; given += 13) {  // one token, and prompts of one batch and more
        for (int i = 1; i < given; i++) prompt[i] = 3 + i % 5;
        const float *a = begin(&plain, prompt, given, 0), *b = begin(&d, prompt, given, 0);
        for (int pos = given;; pos++) {
            if (memcmp(a, b, V * sizeof(float))) die("other logits at position %d after a prompt of %d", pos, given);
            if (pos == S) break;
            s.temperature = given == 1 ? 0.0f : 1.0f;
            int token = sample(&s, a);
            d.rounds = (int)(random_f32(&lengths) * (float)(d.longest + 1));  // length: most - rounds
            memcpy(state, one.s.xb + plain.row * one.config.dim, one.config.dim * sizeof *state);
            a = advance(&plain, token, pos);
            b = advance(&d, token, pos);
            int before = differing;
            if (d.head) check_drafts(&d, &file, state);
            if (pos == given && differing > before) die("the first drafts after a prompt of %d differ", given);
        }
    }
    if (differing * 20 > drafted) die("%d of %d drafted tokens are not the heads'", differing, drafted);  // heads are rounded
    if (plain.passes != plain.tokens || d.passes >= d.tokens) die("%d passes", (int)d.passes);
    for (int i = 1; i <= d.longest; i++) printf("%d ", (int)d.accepted[i]);
    return 0;
}
