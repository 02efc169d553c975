"""Fine-tune a model folder on conversations or instructions in FP8: two keys to set, 1 to 8 GPUs.

    python data.py config/chat_fp8.py --init_from=FOLDER '--data.train=["chats.jsonl"]' --show=3
    torchrun --nproc-per-node=8 train.py config/chat_fp8.py --init_from=FOLDER '--data.train=["chats.jsonl"]'
    python checkpoint.py export out/chat_fp8 FOLDER-chat

FOLDER is a Hugging Face model folder whose tokenizer has a chat template (else: --data.chat_template=FILE). Rows have
`messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`.
"""

import os

import torch

from configurator import CompileConfig, Config, DataConfig, FP8Config, ModelConfig, OptimConfig

ranks = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

# Memory for 8e9 parameters on GPUs of 80 GB: 8 bytes per parameter (bf16 weights and moments, stochastic rounding) are
# 60 GiB on 1 GPU, with every block recomputed. From 4 GPUs on 16 bytes per parameter, sharded, leave room for float32
# masters and for activations. A model of 1e9 fits with masters on 1: --optim.weights=fp32_master.
few = ranks < 4

config = Config(
    init_from="MODEL_FOLDER",  # sets the model's sizes, its tokenizer and its chat template
    # 4096: as long as most conversations; longer ones lose their end. A model with fewer positions needs both lower
    model=ModelConfig(block_size=4096),
    data=DataConfig(format="chat", train=["chats.jsonl"], packed_sequence_size=4096),  # 1 of 20 rows is for validation
    fp8=FP8Config(enabled=True, recipe_name="tensorwise", enable_fsdp_float8_all_gather=True,
                  precompute_float8_dynamic_scale_for_fsdp=True, filter_fqns=["lm_head"], emulate=not gpu),
    compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.0,
                      weights="stochastic_rounding" if few else "fp32_master"),
    # 32 rows (the nearest multiple of ranks) x 4096 tokens, 131k a step. Conversations of 500 tokens: 260 a step, so
    # that 200 steps are two epochs of 26,000
    global_batch_size=32 // ranks * ranks, micro_batch_size=1, max_steps=200,
    activation_checkpoint="full" if few else "selective", loss_chunks=4,
    log_interval=5, eval_interval=50, eval_sequences=32, checkpoint_interval=100,
    out_dir="out/chat_fp8",
)
