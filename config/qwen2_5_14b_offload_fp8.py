"""Qwen 2.5 14B, every weight trained, on one 80 GB card: weights and the optimizer's state are in host memory.

    python train.py config/qwen2_5_14b_offload_fp8.py                    # random weights, to measure the speed
    hf download Qwen/Qwen2.5-14B --local-dir Qwen2.5-14B
    python train.py config/qwen2_5_14b_offload_fp8.py --init_from=Qwen2.5-14B --data.train='["mine.jsonl"]'
"""

import model
from configurator import CompileConfig, Config, FP8Config, OptimConfig

# 14.77e9 parameters. GiB on the card: weights of the FP8 layers 12 (one cast for all passes of a step), embedding and
# lm_head 3, gradients in bf16 27.5, activations of 4096 tokens saved for backward 21, FP8 copies of them 5, logits and
# their gradient 2.3: 71 in all. In host memory: bf16 weights of the FP8 layers 24.6, FP8 moments 28.4. Each update
# streams them through the GPU, which takes about 1.2 s at 50 GB/s; 64 passes of 4096 tokens take about 25 s.
config = Config(
    model=model.qwen2_5_7b(n_layer=48, n_embd=5120, n_head=40, n_kv_head=8, ffn_dim=13824, block_size=1024),
    fp8=FP8Config(enabled=True, recipe_name="tensorwise", filter_fqns=["lm_head"], grad_fast_accum=True,
                  keep_casts=True, offload_weights=True),
    compile=CompileConfig(enabled=True),
    optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=10, betas=(0.9, 0.95), weight_decay=0.01,
                      weights="stochastic_rounding", fp8_moments=True, offload=1.0),
    global_batch_size=256, micro_batch_size=4, max_steps=100,
    log_interval=1, eval_interval=50, eval_sequences=32, checkpoint_interval=100, keep=1,
    out_dir="out/qwen2_5_14b_offload_fp8",
)
