"""Four residual heads with both losses, which learn on all positions: 4.7 times base's step."""
out_dir = "out/large_vocabulary/heads4"
# data
dataset = "tinystories"
vocab_size = 32_000
max_seq_len = 256
batch_size = 16  # 4,096 tokens a step
eval_iters = 8
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 4
head = "residual"
nitp_weight = 0.1
consistency_weight = 0.1
# optimisation
learning_rate = 2e-3
max_iters = 300
warmup_iters = 30
beta2 = 0.99
weight_decay = 0.01
eval_interval = 100
log_interval = 10
