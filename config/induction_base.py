"""Stories with made-up names, next-token prediction alone: TODO"""
out_dir = "out/induction_base"
# data
dataset = "induction"  # python synthetic.py induction
vocab_size = 512
max_seq_len = 128  # the beginning of a story
batch_size = 32  # 4,096 tokens a step
# model
dim = 64
n_layers = 3
n_heads = 4
n_kv_heads = 4
# objective
n_future_heads = 0
nitp_weight = 0.0
# optimisation
learning_rate = 4e-3
max_iters = 2000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 250
log_interval = 100
