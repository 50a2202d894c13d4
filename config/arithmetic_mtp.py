"""Arithmetic progressions modulo 31, three future heads that soon predict four numbers as well as one; a minute."""
out_dir = "out/arithmetic_mtp"
# data
dataset = "arithmetic"  # python synthetic.py arithmetic
vocab_size = 34
max_seq_len = 16  # a progression
batch_size = 64  # 1,024 tokens a step
# model
dim = 64
n_layers = 2
n_heads = 4
n_kv_heads = 4
# objective
n_future_heads = 3
nitp_weight = 0.3
# optimisation
learning_rate = 3e-3
max_iters = 2000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.3
eval_interval = 100
log_interval = 100
