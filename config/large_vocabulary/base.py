"""260K's trunk with Llama 2's vocabulary, next-token prediction only: what four heads are compared with.

Data: python tinystories.py local TinyStories-train.txt --val=TinyStories-valid.txt --dataset=tinystories
      --from=tokenizer.model
(Llama 2's)
"""
out_dir = "out/large_vocabulary/base"
# data
dataset = "tinystories"
vocab_size = 32_000
max_seq_len = 256
batch_size = 16  # 4,096 tokens a step
eval_iters = 8
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# optimisation
learning_rate = 2e-3
max_iters = 300
warmup_iters = 30
beta2 = 0.99
weight_decay = 0.01
eval_interval = 100
log_interval = 10
