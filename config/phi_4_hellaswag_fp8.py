"""Phi-4 (14B) fine-tuned on HellaSwag in FP8.

    hf download microsoft/phi-4 --local-dir phi-4
    torchrun --nproc-per-node=8 train.py config/phi_4_hellaswag_fp8.py [--init_from=FOLDER]
"""

from dataclasses import replace

import model
from config.llama3_1_8b_hellaswag_fp8 import config, ranks
from configurator import DataConfig, OptimConfig

# 14.7e9 parameters: 47 GiB on each of 8 GPUs with float32 masters, 62 on each of 2 without. One GPU takes 60, and
# 55 of host memory.
few = ranks < 8

config = replace(
    config, model=model.phi_4(block_size=4096), init_from="phi-4",
    data=DataConfig(format="hellaswag", packed_sequence_size=4096),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.01,
                      weights="stochastic_rounding" if few else "fp32_master", offload=1.0 if ranks == 1 else 0.0),
    activation_checkpoint="full" if few else "selective",
    global_batch_size=8,  # 1 row of 4096 tokens x 8 GPUs, 33k tokens a step
    out_dir="out/phi_4_hellaswag_fp8",
)
