"""260K parameters, 500 steps: the best of the search of `shared` heads, which have no parameters, rounded."""
out_dir = "out/confirm/shared"
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
# objective
head = "shared"
n_future_heads = 1
nitp_weight = 0.22
aux_schedule = "linear"
aux_end = 0.95
# optimisation
learning_rate = 4.3e-3
max_iters = 500
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.01
eval_interval = 50
log_interval = 10
