"""100M parameters on one GPU, for experiments: 200 steps in FP8, or in bf16 with --fp8.enabled=False.

At this size FP8 is no faster (the matmuls are too small to pay for the casts): use it to compare losses.
"""

import os

import torch

import model
from configurator import CompileConfig, Config, FP8Config, OptimConfig

gpu, ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))

config = Config(
    model=model.llama_100m(),
    fp8=FP8Config(enabled=True, recipe_name="tensorwise", filter_fqns=["lm_head"],
                  emulate=not gpu),
    compile=CompileConfig(enabled=True), cuda_graph=gpu and ranks == 1,  # 33 instead of 56 ms per step on an H100
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=20, weights="fp32_master"),
    # 16 sequences x 1024 bytes = 16,384 bytes per step; 200 steps see 3.3 of the 10 MB of the embedded corpus
    global_batch_size=16, micro_batch_size=16, max_steps=200, eval_interval=50, eval_sequences=128,
    checkpoint_interval=0, out_dir="out/llama_100m",
)
