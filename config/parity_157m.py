"""Parity with a real vocabulary: 157M parameters beside the embedding, 62M tokens of Python and prose, none seen twice.

    python bench/parity_corpus.py ...               # once: makes the corpus, see there
    python parity.py config/parity_157m.py --seeds=4 --variants=bf16,tensorwise,rowwise,rowwise_with_gw_hp
"""

import model
from configurator import CompileConfig, Config, DataConfig, FP8Config, OptimConfig

corpus = "data_cache/parity_corpus"

config = Config(
    # 6 layers x (2560 x 1280 + 1280 x 1280 + 3 x 1280 x 3712) = 115M, lm_head 32768 x 1280 = 42M, embedding the same.
    # All sizes are multiples of 128, as block-wise scaling needs them.
    model=model.llama_100m(n_layer=6, n_embd=1280, n_head=10, n_kv_head=5, head_dim=128, ffn_dim=3712, block_size=1024,
                           vocab_size=32768),
    data=DataConfig(format="tokens", train=[f"{corpus}/train.bin"], val=[f"{corpus}/val.bin"], tokenizer=corpus),
    fp8=FP8Config(filter_fqns=["lm_head"]), compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=100),
    # 32 rows x 1024 = 32,768 tokens a step, in one pass; 1,900 steps see 62.3M, evaluations 524k. No checkpoints: a
    # run takes minutes
    global_batch_size=32, micro_batch_size=32, max_steps=1900, log_interval=25, eval_interval=100, eval_sequences=512,
    checkpoint_interval=0, out_dir="out/parity_157m",
)
