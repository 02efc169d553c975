"""Llama-3.1-8B's shape at full speed: llama_fp8.py with every key that is faster at no measurable cost in loss.

    pip install --pre flash-attn-4 'nvidia-cutlass-dsl[cu13]'     # or --flash4=False
    torchrun [--nproc-per-node=N] train.py config/llama_8b_fast.py

Without a large FP8 GPU this is the small model of llama_fp8.py. Not used: lm_head in FP8 (fp8.filter_fqns=[]) is 2%
faster but costs loss; cuda_graph is 0.7% faster but leaves no memory for anything beside the captured pass.
"""

from dataclasses import replace

from config.llama_fp8 import config, gib

config = replace(config, out_dir="out/llama_8b_fast")
if gib > 75:
    # GiB on one 80 GB card: bf16 weights 15, FP8 moments 15, activations saved for backward 26, FP8 copies of them 13,
    # logits of 8192 tokens and their gradient 4: 73 in all. Backward allocates gradients while it frees activations.
    config = replace(
        config, optim=replace(config.optim, fp8_moments=True),  # frees 15 GiB, which the next three keys use
        fp8=replace(config.fp8, keep_casts=True, grad_fast_accum=True), activation_checkpoint="none", loss_chunks=1,
        flash4=True,
        reduce_dtype="bfloat16", reshard_after_forward=False)  # several GPUs: half the bytes to reduce, one gather
