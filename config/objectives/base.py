"""260K parameters on TinyStories. Next-token prediction only: the baseline of the other objectives."""
out_dir = "out/objectives/base"
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
learning_rate = 2e-3
max_iters = 800
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 200
log_interval = 10
