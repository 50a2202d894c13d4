"""Induction in untouched stories, next-token prediction only: tokens that the row gives away, and names."""
out_dir = "out/induction_stories/base"
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
# optimisation
learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 50
log_interval = 10
