"""When does the first study's effect appear? The baseline; eight micro-batches a step.

Its rate, betas and decay at 260K. The rate is held, so each evaluation is the end of a shorter run. Equal steps:
appear and appear8 at step 400; equal tokens: appear at step 1,500, appear8 at 187.
"""
out_dir = "out/appear8/base"
# data
dataset = "tinystories"
vocab_size = 512
max_seq_len = 256
batch_size = 32
gradient_accumulation_steps = 8  # 65,536 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# optimisation
learning_rate = 5e-4
lr_schedule = "constant"
max_iters = 400
warmup_iters = 100
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
eval_interval = 50
log_interval = 10
