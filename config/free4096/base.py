"""The fair recipe with 4,096 tokens, next-token prediction only."""
out_dir = "out/free4096/base"
# data
dataset = "tinystories"
vocab_size = 4096
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
