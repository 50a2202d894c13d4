// The tokenizer of run.c alone: encode_main TOKENIZER.bin VOCAB_SIZE < records
// A record is a uint32 length and that many bytes; each gives one line with the text's token ids, BOS first.
#define RUN_NO_MAIN
#include "../../run.c"

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    Tokenizer t = load_tokenizer(argv[1], atoi(argv[2]));
    Text in = read_all(stdin);
    for (size_t at = 0; at < in.n;) {
        uint32_t n;
        memcpy(&n, in.at + at, sizeof n);
        Tokens tokens = encode(&t, in.at + at + sizeof n, n);
        for (int i = 0; i < tokens.n; i++) printf(i ? " %d" : "%d", tokens.id[i]);
        putchar('\n');
        free(tokens.id);
        at += sizeof n + n;
    }
    free(in.at);
    return 0;
}
