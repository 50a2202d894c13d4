"""Polynomials over F7[X]/(X^5), next-token prediction only: it learns negation, and seldom more; 2.5 minutes."""
out_dir = "out/polynomial_base"
# data
dataset = "polynomial"  # python synthetic.py polynomial
vocab_size = 15
max_seq_len = 24  # an expression and its value
batch_size = 64  # 1,536 tokens a step
# model
dim = 64
n_layers = 3
n_heads = 4
n_kv_heads = 4
# objective
n_future_heads = 0
nitp_weight = 0.0
# optimisation
learning_rate = 2e-3
max_iters = 3000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 500
log_interval = 100
