"""260K parameters on TinyStories for a GPU: next-token prediction, four times the batch of config/stories260k_base.py.

Not run on a GPU yet (doc/gpu.md); its learning rate is that of the small batch. Heads: --n_future_heads=1
--nitp_weight=0.1.
"""
out_dir = "out/gpu/stories260k"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 512
batch_size = 64  # 32,768 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# optimisation
learning_rate = 8e-3
max_iters = 10_000
warmup_iters = 300
beta2 = 0.99
weight_decay = 0.1
# computing; dtype=auto is bfloat16 on cards that multiply it
compile = True
eval_interval = 500
log_interval = 100  # a step takes milliseconds, and each line waits for the card
