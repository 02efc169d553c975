"""Llama 3.1 8B fine-tuned on HellaSwag in FP8. Also the base of the other HellaSwag recipes.

    hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B
    torchrun --nproc-per-node=8 train.py config/llama3_1_8b_hellaswag_fp8.py [--init_from=FOLDER]
    python eval.py --from=out/llama3_1_8b_hellaswag_fp8

To measure speed without weights: --init_from=scratch --data.tokenizer=FOLDER_OR_FILE.
"""

import os

import model
from configurator import CompileConfig, Config, DataConfig, FP8Config, OptimConfig

# 8.03e9 parameters. On 8 GPUs of 80 GB: 16 bytes per parameter, sharded, are 15 GiB; activations and gathered weights
# take 30. On 1 or 2 only 8 bytes per parameter fit (bf16 weights and moments, stochastic rounding), and beside the
# gradients that accumulation keeps every block must be recomputed: 65 GiB on 1.
ranks = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
few = ranks < 4

config = Config(
    model=model.llama3_1_8b(),  # block_size 8192
    init_from="Llama-3.1-8B",
    data=DataConfig(format="hellaswag", packed_sequence_size=8192),  # downloads the questions on first use
    fp8=FP8Config(enabled=True, recipe_name="tensorwise", enable_fsdp_float8_all_gather=True,
                  precompute_float8_dynamic_scale_for_fsdp=True, filter_fqns=["lm_head"]),
    compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.999), weight_decay=0.0,
                      weights="stochastic_rounding" if few else "fp32_master"),
    # 1 row of 8192 tokens x 8 GPUs x 4 accumulation = 32 rows, 262k tokens: an epoch is about 15 steps
    global_batch_size=32, micro_batch_size=1, max_steps=100,
    activation_checkpoint="full" if few else "selective", loss_chunks=4,
    log_interval=5, eval_interval=50, eval_sequences=32, checkpoint_interval=100,
    out_dir="out/llama3_1_8b_hellaswag_fp8",
)
