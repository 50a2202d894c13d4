"""The first study's control: next-token prediction."""
out_dir = "out/first_study/base"
# data
dataset = "tinystories"  # python tinystories.py train_vocab --from=tokenizer.model (Llama 2's), then pretokenize
vocab_size = 32000
max_seq_len = 512
batch_size = 128
gradient_accumulation_steps = 4  # 262,144 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
multiple_of = 32
# objective
n_future_heads = 0
# optimisation
learning_rate = 5e-4
max_iters = 100_000
warmup_iters = 1000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
eval_interval = 200
log_interval = 10
