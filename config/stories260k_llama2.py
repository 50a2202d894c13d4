"""260K parameters' trunk with Llama 2's vocabulary, llama2.c's default: 2.3M parameters, 2.0M of them embeddings.

Data: python tinystories.py download --from=tokenizer.model   (Llama 2's; or train_vocab, where the text is there)
"""
out_dir = "out/stories260k_llama2"
# data
dataset = "tinystories"
vocab_size = 32_000
max_seq_len = 512
batch_size = 16  # 8,192 tokens a step
# model
dim = 64
n_layers = 5
n_heads = 8
n_kv_heads = 4
# objective
n_future_heads = 0
nitp_weight = 0.0
consistency_weight = 0.0
# optimisation
learning_rate = 2e-3
max_iters = 5000
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.01
eval_interval = 250
