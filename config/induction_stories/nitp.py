"""Induction in untouched stories: one linear head weighs 0.3 at first, 0 from 60% of the run on."""
out_dir = "out/induction_stories/nitp"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 512
batch_size = 16  # 8,192 tokens a step
eval_induction = True
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 1
nitp_weight = 0.3
aux_schedule = "linear"
aux_end = 0.6
# optimisation
learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 50
log_interval = 10
