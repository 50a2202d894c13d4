"""260K parameters on TinyStories. One head with its own unembedding predicts the token after next."""
out_dir = "out/seeds4/nitp"
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
n_future_heads = 1
nitp_weight = 0.1
# optimisation
learning_rate = 2e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 100
log_interval = 10
