"""260K parameters on TinyStories. The same in lower case; "upper" asks for the same under other names."""
out_dir = "out/objectives/spelling_lower"
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
spelling_letters = 4
spelling_weight = 0.1
spelling_case = "lower"
# optimisation
learning_rate = 2e-3
max_iters = 800
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 200
log_interval = 10
