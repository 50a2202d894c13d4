"""The fair baseline, 20,000 steps."""
out_dir = "out/long/base"
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
max_iters = 20_000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 500
log_interval = 10
