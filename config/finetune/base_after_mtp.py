"""Pretrained with one future head, fine-tuned without."""
out_dir = "out/finetune/base_after_mtp"
init_from = "out/finetune/pretrain_mtp/last.pt"
# data
dataset = "induction"  # python synthetic.py induction
vocab_size = 512
max_seq_len = 128
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
learning_rate = 1e-3
max_iters = 3000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
eval_interval = 250
log_interval = 50
