"""The shape of llama2.c's stories15M with a 4,096-token vocabulary: 7.2M parameters; for a GPU, or a patient CPU."""
out_dir = "out/stories15m"
# data
dataset = "tinystories"
vocab_size = 4096
max_seq_len = 256
batch_size = 32
gradient_accumulation_steps = 4  # 32,768 tokens a step
# model
dim = 288
n_layers = 6
n_heads = 6
n_kv_heads = 6
multiple_of = 32
# objective
n_future_heads = 1
nitp_weight = 0.1
consistency_weight = 0.01
# optimisation
learning_rate = 5e-4
max_iters = 20_000
warmup_iters = 500
weight_decay = 0.1
beta2 = 0.95
compile = True  # on a GPU; a CPU uses kernels.c instead
eval_interval = 500
log_interval = 10
