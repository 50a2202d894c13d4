"""Bytes instead of tokens, and eight heads for the bytes after the next; compare by val/bits_per_byte.

Data: python tinystories.py pretokenize --vocab_size=259. Without heads: --n_future_heads=0 --nitp_weight=0.
"""
out_dir = "out/bytes_mtp8"
# data
dataset = "tinystories"
vocab_size = 259
max_seq_len = 512
batch_size = 16  # 8,192 bytes a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 8
head = "linear"
nitp_weight = 0.1
head_decay = 0.8
# optimisation
learning_rate = 2e-3
max_iters = 5000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 250
log_interval = 10
