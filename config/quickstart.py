"""The demo: 260K parameters on generated stories, one future head with both losses; about 3 minutes on two cores."""
out_dir = "out/quickstart"
# data
dataset = "toy"
vocab_size = 512
max_seq_len = 256
batch_size = 16  # 4,096 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 1
nitp_weight = 0.1
consistency_weight = 0.01
mask_document_ends = True
# optimisation
learning_rate = 4e-3
max_iters = 500
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.01
eval_interval = 100
eval_iters = 4
log_interval = 5
