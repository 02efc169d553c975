"""Parity at the size of Llama-3.2-1B with the front door's keys, on the corpus of config/parity_157m.py.

    python bench/parity_corpus.py ...               # once: makes the corpus, see there
    python parity.py config/parity_1b.py --branch_at=400 --seeds=2 --variants=bf16,tensorwise
"""

import model
from configurator import CompileConfig, Config, DataConfig, FP8Config, OptimConfig

corpus = "data_cache/parity_corpus"

config = Config(
    # 16 layers x (3072 x 2048 + 2048 x 2048 + 3 x 2048 x 8192) = 973M, and 32768 x 2048 = 67M for both embedding and
    # lm_head: the corpus has 32,768 ids, where Llama-3.2-1B has 128,256
    model=model.ModelConfig(n_layer=16, n_embd=2048, n_head=32, n_kv_head=8, head_dim=64, ffn_dim=8192, block_size=4096,
                            vocab_size=32768, rope_theta=500000.0, tie_embeddings=True),
    data=DataConfig(format="tokens", train=[f"{corpus}/train.bin"], val=[f"{corpus}/val.bin"], tokenizer=corpus),
    fp8=FP8Config(filter_fqns=["lm_head"], keep_casts=True, grad_fast_accum=True), compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=100, fp8_moments=True, weights="stochastic_rounding"),
    # 4 rows x 4096 = 16,384 tokens a step in one pass; 1,000 steps see 16.4M, evaluations 524k
    global_batch_size=4, micro_batch_size=4, max_steps=1000, log_interval=25, eval_interval=50, eval_sequences=128,
    checkpoint_interval=0, out_dir="out/parity_1b",
)
