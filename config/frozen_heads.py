"""Four heads on a pretrained trunk: copies of its last block that read what it reads.

Each head starts at the NTP head's own distribution. For 200 steps only the heads learn, then the trunk joins and gets a
tenth of their gradient. The embedding, which all heads share, never changes. `--init_from=` takes any model, ours,
llama2.c's or a Hugging Face folder, and its trunk's shape. `--freeze_trunk_iters=-1` never trains the trunk: heads for
a finished model.
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
head_input = "before_last"
nitp_weight = 1.0
aux_grad_scale = 0.1
freeze_trunk_iters = 200
freeze_embeddings = True
# optimisation
learning_rate = 1e-4
max_epochs = 3  # --max_epochs=0 --max_iters=N sets a length in iterations
warmup_iters = 50
beta2 = 0.99
weight_decay = 0.01
eval_interval = 100
log_interval = 10
