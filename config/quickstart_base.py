"""The demo's baseline: next-token prediction alone, else as quickstart.py."""
out_dir = "out/quickstart_base"
# data
dataset = "toy"
vocab_size = 512
max_seq_len = 384  # most of the stories fit
batch_size = 4  # 1,536 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 0
nitp_weight = 0.0
consistency_weight = 0.0
# optimisation
learning_rate = 4e-3
max_iters = 3000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 500
eval_iters = 2
log_interval = 25
