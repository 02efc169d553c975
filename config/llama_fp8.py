"""The place to start: trains in FP8 on the hardware it finds, without any download.

A large FP8 GPU trains the shape of Llama-3.1-8B, any other machine a small model with emulated FP8 (same numerics, no
speedup). Both train on the sources of Python's standard library, byte by byte. A serious 8B run needs real text
(data.train) and a real tokenizer (data.tokenizer); its steps take the same time.

Every key that is faster at no measurable cost in loss is on (docs/performance.md has each one's number). Not used:
lm_head in FP8 (fp8.filter_fqns=[]) is 2% faster but costs loss; cuda_graph is 0.7% faster but leaves no memory for
anything beside the captured pass. FlashAttention 4 is used where it is installed.
"""

import os
import sys

import torch

import model
from configurator import CompileConfig, Config, FP8Config, OptimConfig

gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else 0
ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # set by torchrun

even = 1024 % ranks == 0  # all-gather in FP8 needs equally many rows of each matrix on every rank
fp8 = FP8Config(enabled=True, recipe_name="tensorwise", enable_fsdp_float8_all_gather=even,
                precompute_float8_dynamic_scale_for_fsdp=even, filter_fqns=["lm_head"], emulate=not gpu)

if gib > 75:
    # 8.03e9 parameters, 8192 tokens x ranks. GiB on one 80 GB card: bf16 weights 15, FP8 moments 15, activations saved
    # for backward 26, FP8 copies of them 13, logits of 8192 tokens and their gradient 4: 73 in all. Backward allocates
    # gradients while it frees activations, which accumulation on one card would not let it do: that takes
    # fp8.keep_casts=False. With float32 masters and moments: 16 bytes per parameter, 120 GiB over all ranks, plus about
    # 20 on each for activations and gathered weights: 4 cards of 80 GB, or 2 of 140.
    master = 120 + 20 * ranks < 0.95 * gib * ranks
    choice = f"{ranks} x {gib:.0f} GiB with FP8: Llama-3.1-8B shape, {'float32' if master else 'bf16'} master weights"
    fp8.keep_casts = fp8.grad_fast_accum = True
    config = Config(
        model=model.llama3_1_8b(), fp8=fp8, compile=CompileConfig(enabled=True),
        optim=OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=100, fp8_moments=True,
                          weights="fp32_master" if master else "stochastic_rounding"),
        global_batch_size=ranks, micro_batch_size=1,
        reduce_dtype="bfloat16", reshard_after_forward=False,  # several GPUs: half the bytes to reduce, one gather
        out_dir="out/llama_8b_fp8", max_steps=1000, eval_interval=250, eval_sequences=16, log_interval=5,
        checkpoint_interval=500)
else:
    # 8 sequences x 256 bytes = 2,048 bytes per step; 450 steps see 0.9 MB and end near 1.7 nats per byte.
    # If the number of ranks does not divide 8, the batch is its largest multiple below 8.
    choice = "no 80 GB GPU with FP8 here: a small model" + ("" if gpu else ", FP8 emulated, about 2 minutes")
    config = Config(
        model=model.llama_tiny(), fp8=fp8, compile=CompileConfig(enabled=True), dtype="float32",
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20, weights="plain"),
        global_batch_size=max(ranks, 8 // ranks * ranks), micro_batch_size=max(1, 8 // ranks),
        out_dir="out/llama_tiny_fp8", max_steps=450,
        eval_interval=150, eval_sequences=128, checkpoint_interval=150)

if rank == 0:
    print(f"config/llama_fp8.py: {choice}{'' if even else ', weights gathered in bf16'}", file=sys.stderr)
