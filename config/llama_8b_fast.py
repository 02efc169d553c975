"""Llama-3.1-8B's shape, as fast as it goes: llama_fp8.py, and every key that buys speed for no loss that we could see.

    pip install --pre flash-attn-4 'nvidia-cutlass-dsl[cu13]'     # or --flash4=False
    torchrun [--nproc-per-node=N] train.py config/llama_8b_fast.py

Without a large FP8 GPU this is llama_fp8.py's small model. Left out: lm_head in FP8 (fp8.filter_fqns=[]) is 2%
faster and does cost loss; cuda_graph is 0.7% faster and leaves no memory for anything beside the recorded pass.
"""

from dataclasses import replace

from config.llama_fp8 import config, gib

config = replace(config, out_dir="out/llama_8b_fast")
if gib > 75:
    # One card of 80 GB, in GiB: bf16 weights 15, moments in FP8 15, what backward wants 26, FP8 copies for it 13, the
    # logits of all 8192 tokens and their gradient 4: 73. The weights' gradients come as the rest goes.
    config = replace(
        config, optim=replace(config.optim, fp8_moments=True),  # frees 15 GiB, which the next three keys spend
        fp8=replace(config.fp8, keep_casts=True, grad_fast_accum=True), activation_checkpoint="none", loss_chunks=1,
        flash4=True,
        reduce_dtype="bfloat16", reshard_after_forward=False)  # several GPUs: half the bytes to add up, gathered once
