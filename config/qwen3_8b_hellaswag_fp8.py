"""Qwen3 8B fine-tuned on HellaSwag in FP8.

    hf download Qwen/Qwen3-8B-Base --local-dir Qwen3-8B-Base
    torchrun --nproc-per-node=8 train.py config/qwen3_8b_hellaswag_fp8.py [--init_from=FOLDER]

FOLDER may also be Qwen3-8B, or Qwen3-8B-FP8, whose weights are dequantized as they are loaded.
"""

from dataclasses import replace

import model
from config.llama3_1_8b_hellaswag_fp8 import config, few
from configurator import DataConfig, OptimConfig

# 8.19e9 parameters: 43 GiB on each of 8 GPUs, 67 on one (8 passes of accumulation, every block recomputed).
config = replace(
    config, model=model.qwen3_8b(), init_from="Qwen3-8B-Base",
    data=DataConfig(format="hellaswag", packed_sequence_size=8192),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.01,
                      weights="stochastic_rounding" if few else "fp32_master"),
    global_batch_size=8,  # 1 row of 8192 tokens x 8 GPUs, 65k tokens a step
    out_dir="out/qwen3_8b_hellaswag_fp8",
)
