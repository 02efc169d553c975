"""Parity on one H100: three bf16 seeds and every recipe, a 177M model, 2,000 steps of 2048-byte sequences.

    python parity.py config/parity_150m.py          # if interrupted, repeat the command to continue
"""

import importlib.util
from pathlib import Path

import model
from configurator import CompileConfig, Config, DataConfig, FP8Config, OptimConfig

# Real text that every installation of torch has: the Python sources of torch and its dependencies, about 85 MB, byte by
# byte. A run reads 16 MB of it, no window twice.
packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "sympy", "numpy", "networkx")]

config = Config(
    # 8 layers x (1408 x 2560 + 1536 x 1408 + 3 x 1408 x 3840) + 2 x 272 x 1408 = 176.7M parameters. Few wide layers,
    # because the time to reach a loss is compared too, and FP8 only pays for large matmuls
    model=model.llama_100m(n_layer=8, n_embd=1408, n_head=12, n_kv_head=4, head_dim=128, ffn_dim=3840, block_size=2048,
                           vocab_size=272),
    data=DataConfig(train=[f"{folder}/**/*.py" for folder in packages]),
    fp8=FP8Config(filter_fqns=["lm_head"]), compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=100),
    # 4 sequences x 2048 bytes = 8,192 a step, in one pass; 7 runs see 115M bytes
    global_batch_size=4, micro_batch_size=4, max_steps=2000, log_interval=10, eval_interval=100, eval_sequences=120,
    checkpoint_interval=1000, keep=1, out_dir="out/parity_150m",
)
