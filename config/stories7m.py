"""llama2.c's stories15M in shape, with V 4,096: 7.2M parameters for a few megabytes of stories, many epochs, dropout.

python train.py config/stories7m.py          # then its heads: config/stories7m_heads.py

On 3.6 million tokens of TinyStories (11 epochs) 77 minutes of one core with AMX; doc/results.md.
"""
out_dir = "out/stories7m"
# data
dataset = "tinystories"
vocab_size = 4096
max_seq_len = 256
batch_size = 32  # 8,192 tokens a step
# model
dim = 288
n_layers = 6
n_heads = 6
n_kv_heads = 6
multiple_of = 32
dropout = 0.1
# optimisation
learning_rate = 2e-3
max_iters = 5000
warmup_iters = 200
beta2 = 0.99
weight_decay = 0.3
eval_interval = 250
log_interval = 50
