"""Three linear heads on config/stories7m.py's trunk, which stays as it is: for drafting."""
out_dir = "out/stories7m_heads"
init_from = "out/stories7m/ckpt.pt"
# data
dataset = "tinystories"
vocab_size = 4096
max_seq_len = 256
batch_size = 32  # 8,192 tokens a step
# objective
n_future_heads = 3
nitp_weight = 1.0
freeze_trunk_iters = -1
# optimisation
learning_rate = 2e-3
max_iters = 600
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.1
eval_interval = 100
log_interval = 50
