"""Four heads on a pretrained trunk: copies of its last block, trained for 200 steps while the trunk is frozen.

`--init_from=` takes any checkpoint, ours or llama2.c's, and its trunk's shape. After the 200 steps the trunk gets a
tenth of the heads' gradient. `--freeze_trunk_iters=-1` never trains it: heads for a finished model.
"""
out_dir = "out/frozen_heads"
init_from = "out/stories260k_base/ckpt.pt"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 512
batch_size = 4
gradient_accumulation_steps = 4  # 8,192 tokens a step
# objective
n_future_heads = 4
head = "block"
head_init = "last_block"
nitp_weight = 1.0
aux_grad_scale = 0.1
freeze_trunk_iters = 200
# optimisation
learning_rate = 5e-4
max_iters = 1000
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.01
eval_interval = 100
log_interval = 10
