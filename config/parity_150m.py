"""Parity on one H100: three bf16 seeds and every recipe, a 158M model, 2,000 steps of 2048-byte sequences.

    python parity.py config/parity_150m.py          # killed or out of time? the same command goes on

7 runs x 2,000 steps x 24,576 tokens = 344M tokens: 14 to 18 minutes at 400k to 320k tok/s, and half a minute each for
start, compilation and evaluations: 18 to 22 minutes.
"""

import importlib.util
from pathlib import Path

import model
from configurator import CompileConfig, Config, DataConfig, FP8Config, OptimConfig

# Real text that is wherever torch is: the Python sources of torch and of what comes with it, about 85 MB, byte by byte,
# of which a run reads 49 MB: no window twice.
packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "sympy", "numpy", "networkx")]

config = Config(
    # 14 layers x (1024 x (24 heads x 64 + 1024) + 3 x 1024 x 2816) + 2 x 272 x 1024 = 158.4M parameters
    model=model.llama_100m(n_layer=14, n_embd=1024, n_head=16, n_kv_head=4, ffn_dim=2816, block_size=2048,
                           vocab_size=272),
    data=DataConfig(train=[f"{folder}/**/*.py" for folder in packages]),
    fp8=FP8Config(filter_fqns=["lm_head"]), compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=100),
    # 12 sequences x 2048 bytes = 24,576 a step, in one pass
    global_batch_size=12, micro_batch_size=12, max_steps=2000, log_interval=10, eval_interval=100, eval_sequences=120,
    checkpoint_interval=500, keep=1, out_dir="out/parity_150m",
)
