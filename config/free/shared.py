"""No head: the token after next weighs 0.1, 0 from a third of the run, over the sum of weights; base: fair/base.

python ablate.py config/free/shared.py --vary nitp_weight=0.05,0.1,0.2 --out=out/free/vocab_size=512
"""
out_dir = "out/free/shared"
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
head = "shared"
nitp_weight = 0.1
normalize_weights = True
aux_schedule = "linear"
aux_end = 1 / 3
# optimisation
learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 100
log_interval = 10
