"""SmolLM2 135M fine-tuned on HellaSwag: the recipe for any machine (emulated FP8 without a GPU that has it).

    hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M
    python eval.py --from=SmolLM2-135M
    python train.py config/smollm2_hellaswag_fp8.py [--init_from=FOLDER] [--fp8.enabled=False]
    python eval.py --from=out/smollm2_hellaswag_fp8
"""

from dataclasses import replace

import torch

import model
from config.llama3_1_8b_hellaswag_fp8 import config, ranks
from configurator import DataConfig, OptimConfig

gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

# 0.13e9 parameters: 16 bytes each are 2 GiB. lm_head is the embedding (tied) and stays in bf16.
config = replace(
    config, model=model.smollm2_135m(), init_from="SmolLM2-135M",
    data=DataConfig(format="hellaswag", packed_sequence_size=2048),
    fp8=replace(config.fp8, emulate=not gpu),
    optim=OptimConfig(lr=1e-4, min_lr=1e-5, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.01),
    # 16 rows x 2048 tokens, 33k: an epoch is 94 steps. 8 rows per pass take 10 GiB; with 2 an H100 waits for Python
    global_batch_size=16, micro_batch_size=min(8, 16 // ranks) if gpu else 2, max_steps=94,
    activation_checkpoint="none", loss_chunks=1, eval_interval=30, eval_sequences=64, eval_hellaswag_items=500,
    out_dir="out/smollm2_hellaswag_fp8",
)
