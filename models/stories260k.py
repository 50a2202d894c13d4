"""The model in models/: 260K parameters, and two linear heads that learn from the trunk without changing it.

python train.py models/stories260k.py
"""
out_dir = "out/stories260k"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 512
batch_size = 32  # 16,384 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 2
nitp_weight = 0.1
aux_grad_scale = 0.0  # the trunk learns next-token prediction only
# optimisation
learning_rate = 8e-3
max_iters = 10_000
warmup_iters = 300
beta2 = 0.99
weight_decay = 0.1
eval_interval = 250
log_interval = 50
