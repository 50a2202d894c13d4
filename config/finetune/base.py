"""Pretrained and fine-tuned without heads: what the other three of this 2x2 are compared with.

Fine-tuning is on stories with made-up names (python synthetic.py induction). ablate.py finetune trains pretrain.py and
pretrain_mtp.py first, with the same seeds.
"""
out_dir = "out/finetune/base"
init_from = "out/finetune/pretrain/last.pt"
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
