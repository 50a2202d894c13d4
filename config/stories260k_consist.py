"""260K parameters on TinyStories, one future head taught by the next-token head (consistency)."""
out_dir = "out/stories260k_consist"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 512
batch_size = 16  # 8,192 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 1
nitp_weight = 0.0
consistency_weight = 0.01
# optimisation
learning_rate = 8e-3
max_iters = 5000
warmup_iters = 300
beta2 = 0.99
weight_decay = 0.1
eval_interval = 250
log_interval = 10
