"""260K parameters on TinyStories, next-token prediction: the baseline of the fair comparison (doc/experiments.md)."""
out_dir = "out/fair/base"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 256
batch_size = 32  # 8,192 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# optimisation
learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 100
log_interval = 10
