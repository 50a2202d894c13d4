"""260K parameters on TinyStories. Soft targets, weight 0.1, spread evenly: label smoothing of 0.1 / 1.1."""
out_dir = "out/objectives/label_smoothing"
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
soft_weight = 0.1
soft_neighbours = 512  # all
soft_temperature = 1e6  # evenly
# optimisation
learning_rate = 2e-3
max_iters = 800
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 200
log_interval = 10
