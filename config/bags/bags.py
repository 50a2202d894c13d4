"""Superposition as its authors train it (arXiv 2605.06546): bags of two tokens in the first 10% of the run.

python ablate.py config/bags/bags.py --vary superposition=2,4 --vary superposition_end=0.1,0.2 --out=out/bags
"""
out_dir = "out/bags/bags"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 256
batch_size = 32  # 8,192 tokens a step, more in bags
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
tie_embeddings = False  # as the authors of superposition have it
# objective
superposition = 2
superposition_end = 0.1
# optimisation
learning_rate = 3e-3
lr_schedule = "wsd"
max_iters = 6000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 250
log_interval = 10
