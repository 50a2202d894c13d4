"""Early, then gone: the order of 16 tokens weighs 0.1 at first, 0 from a quarter of the run on; base: fair/base.

python ablate.py config/early/order.py --vary order_weight=0.1,0.3,1 --out=out/early
"""
out_dir = "out/early/order"
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
order_window = 16
order_weight = 0.1
aux_schedule = "linear"
aux_end = 0.25
# optimisation
learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 100
log_interval = 10
