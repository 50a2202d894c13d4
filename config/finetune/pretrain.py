"""Stories, next-token prediction only: what base.py and mtp.py start from."""
out_dir = "out/finetune/pretrain"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 128
batch_size = 64  # 8,192 tokens a step
# model
dim = 64
n_layers = 3
n_heads = 4
n_kv_heads = 4
# objective
n_future_heads = 0
nitp_weight = 0.0
# optimisation
learning_rate = 3e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 100
log_interval = 50
