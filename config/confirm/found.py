"""260K parameters, 500 steps: the best of the search of heads with both losses, rounded."""
out_dir = "out/confirm/found"
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
n_future_heads = 1
nitp_weight = 0.3
consistency_weight = 0.06
aux_schedule = "cosine"
aux_end = 0.6
# optimisation
learning_rate = 3.8e-3
max_iters = 500
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.01
eval_interval = 50
log_interval = 10
