"""260K parameters, 500 steps: next-token prediction at the best learning rate of its search."""
out_dir = "out/confirm/base"
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
# optimisation
learning_rate = 3.8e-3
max_iters = 500
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.01
eval_interval = 50
log_interval = 10
