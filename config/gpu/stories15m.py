"""The run of config/stories15m.py in micro-batches for a GPU: all 32,768 tokens of a step at once.

Not run on a GPU yet (doc/gpu.md). Out of memory: --batch_size=64 --gradient_accumulation_steps=2, the same steps.
"""
out_dir = "out/gpu/stories15m"
# data
dataset = "tinystories"
vocab_size = 4096
max_seq_len = 256
batch_size = 128  # 32,768 tokens a step
# model
dim = 288
n_layers = 6
n_heads = 6
n_kv_heads = 6
multiple_of = 32
# objective
n_future_heads = 1
nitp_weight = 0.1
consistency_weight = 0.01
# optimisation
learning_rate = 5e-4
max_iters = 20_000
warmup_iters = 500
weight_decay = 0.1
beta2 = 0.95
# computing; dtype=auto is bfloat16 on cards that multiply it
compile = True
eval_interval = 500
log_interval = 50  # each line waits for the card
