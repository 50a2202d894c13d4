"""Stories with made-up names, next-token prediction only: is the second half of a name copied from its mention?"""
out_dir = "out/induction_base"
# data
dataset = "induction"  # python synthetic.py induction --from_dataset=toy
vocab_size = 512
max_seq_len = 128  # the beginning of a story
batch_size = 8  # 1,024 tokens a step
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
max_iters = 6000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 500
log_interval = 100
