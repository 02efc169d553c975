"""Mistral 7B v0.1 fine-tuned on HellaSwag in FP8.

    hf download mistralai/Mistral-7B-v0.1 --local-dir Mistral-7B-v0.1
    torchrun --nproc-per-node=8 train.py config/mistral_7b_hellaswag_fp8.py [--init_from=FOLDER]
"""

from dataclasses import replace

import model
from config.llama3_1_8b_hellaswag_fp8 import config, few
from configurator import DataConfig, OptimConfig

# 7.24e9 parameters: 37 GiB on each of 8 GPUs, 57 on one (8 passes of accumulation, every block recomputed). The
# tokenizer needs `pip install tokenizers`.
config = replace(
    config, model=model.mistral_7b(), init_from="Mistral-7B-v0.1",
    data=DataConfig(format="hellaswag", packed_sequence_size=8192),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.01,
                      weights="stochastic_rounding" if few else "fp32_master"),
    global_batch_size=8,  # 1 row of 8192 tokens x 8 GPUs, 65k tokens a step
    out_dir="out/mistral_7b_hellaswag_fp8",
)
