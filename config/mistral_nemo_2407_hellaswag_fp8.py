"""Mistral Nemo 2407 (12B) fine-tuned on HellaSwag in FP8.

    hf download mistralai/Mistral-Nemo-Base-2407 --local-dir Mistral-Nemo-Base-2407
    torchrun --nproc-per-node=8 train.py config/mistral_nemo_2407_hellaswag_fp8.py [--init_from=FOLDER]
"""

from dataclasses import replace

import model
from config.llama3_1_8b_hellaswag_fp8 import config, ranks
from configurator import DataConfig, OptimConfig

# 12.2e9 parameters: 56 GiB on each of 8 GPUs with float32 masters, 56 on each of 2 without. One GPU takes 53, and
# 46 of host memory.
few = ranks < 8

config = replace(
    config, model=model.mistral_nemo(), init_from="Mistral-Nemo-Base-2407",
    data=DataConfig(format="hellaswag", packed_sequence_size=8192),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.01,
                      weights="stochastic_rounding" if few else "fp32_master", offload=1.0 if ranks == 1 else 0.0),
    activation_checkpoint="full" if few else "selective",
    global_batch_size=8,  # 1 row of 8192 tokens x 8 GPUs, 65k tokens a step
    out_dir="out/mistral_nemo_2407_hellaswag_fp8",
)
