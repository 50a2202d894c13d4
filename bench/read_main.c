// How fast does this machine read memory? read_main MB THREADS prints GB/s, the median of 9 passes over that many
// megabytes, added up in the way of run.c's products and on its threads: the most that decoding could reach.
#define RUN_NO_MAIN
#include "../run.c"

enum { CHUNK = 1 << 16 };  // bytes

static void read_chunk(void *memory, int i, int thread) {
    static float sink[MAX_THREADS][16];  // a cache line each
    const float *x = (const float *)memory + (size_t)i * (CHUNK / sizeof(float));
    Floats sum[4] = {{0}};
    for (size_t j = 0; j < CHUNK / sizeof(float); j += 4 * WIDTH)
        for (int k = 0; k < 4; k++) sum[k] += load(x + j + k * WIDTH);
    sink[thread][0] += sum_lanes(sum[0] + sum[1] + sum[2] + sum[3]);
}

static int ascending(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    int chunks = (int)(atof(argv[1]) * 1e6 / CHUNK) + 1;
    start_threads(atoi(argv[2]));
    float *memory = buffer(chunks, CHUNK, "the memory to read");
    for (size_t i = 0; i < (size_t)chunks * (CHUNK / sizeof(float)); i++) memory[i] = (float)i;
    double speed[9];
    for (int i = 0; i < 9; i++) {
        int passes = 0;
        double start = seconds();
        while (passes++, parallel(read_chunk, memory, chunks, 1e9), seconds() - start < 0.05) continue;
        speed[i] = (double)passes * chunks * CHUNK / (seconds() - start) / 1e9;
    }
    qsort(speed, 9, sizeof *speed, ascending);
    printf("%.1f\n", speed[4]);
    return 0;
}
