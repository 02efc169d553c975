"""Parity on a CPU, emulated: three bf16 seeds and every recipe in about ten minutes on two cores.

    python parity.py config/parity_tiny.py
"""

import model
from configurator import Config, FP8Config, OptimConfig

config = Config(
    # 0.5M parameters
    model=model.llama_tiny(n_layer=2, n_embd=128, n_head=4, n_kv_head=4, ffn_dim=384, block_size=128),
    fp8=FP8Config(filter_fqns=["lm_head"], emulate=True), device="cpu",
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=50),
    # 8 sequences x 128 bytes = 1,024 bytes a step; 300 steps see 0.3 of the 12 MB of the embedded corpus
    global_batch_size=8, micro_batch_size=8, max_steps=300, log_interval=2, eval_interval=20, eval_sequences=256,
    checkpoint_interval=100, keep=1, out_dir="out/parity_tiny",
)
