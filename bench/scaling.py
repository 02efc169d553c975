"""The table of docs/scaling.md: a prediction of step times on up to 1,024 GPUs (no GPU needed).

    python bench/scaling.py [--gpus_per_node=8] [--out=FILE.json]

One GPU's time is measured for 8B (H200, docs/results/bench_h200_llama_8b_fast.json) and scaled to 70B by FLOPs, with
every block recomputed. One row of 8192 tokens per GPU and step. GiB: checks/estimate.py, per GPU.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import fp8
import model as models
from checks import estimate
from configurator import CompileConfig, Config, FP8Config, OptimConfig
from plumbing import entry

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MEASURED_MS = {"bf16": 725.0, "fp8": 540.9}
RECOMPUTED = 1.13  # activation_checkpoint="full" costs 13% (docs/performance.md)
FAST = dict(micro_batch_size=1, global_batch_size=1, reduce_dtype="bfloat16", compile=CompileConfig(enabled=True),
            optim=OptimConfig(weights="stochastic_rounding", fp8_moments=True))
FP8 = FP8Config(enabled=True, filter_fqns=["lm_head"], keep_casts=True)
GATHER = replace(FP8, enable_fsdp_float8_all_gather=True, precompute_float8_dynamic_scale_for_fsdp=True)
LLAMA_70B = models.llama3_1_8b(n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, ffn_dim=28672)

# Measured in profiles of docs/results/bench_2_gpus.json, two H100s with NVLink (NVLS off): bytes per second of FSDP2's
# copies, and of a collective beside matmuls; and the part of a hidden collective's time by which it slows these down.
COPY_RATE, LINK_RATE, CONTENTION = 2.3e12, 160e9, 0.1
# Assumed: bytes per second of each GPU's network card (400 Gb/s at 80%), and seconds for each hop of a ring.
NETWORK_RATE, HOP_S = 40e9, 5e-6


def step_ms(config, one_gpu_ms, shards, replicas=1, accumulation=1, gpus_per_node=8):
    """{part: milliseconds} of a step with FSDP2 over `shards` GPUs, times `replicas` (HSDP).

    one_gpu_ms: measured on one GPU without FSDP2, with the same optimizer and the same micro-batches per GPU. Parts:
    "compute" (on one GPU, less what other ranks' optimizers do), "copies" in and out of FSDP2's buffers, "slowed"
    (compute beside collectives), "exposed" (collectives that nothing hides). A block's weights are gathered while the
    block before it computes, its gradients reduced while the next one's backward runs; embedding, last norm and lm_head
    are one group, which nothing hides. Within 5% of what was measured on 2 and 4 GPUs in bf16 and FP8 (tests).
    """
    model, n_layer, reshards = models.on_meta(config.model), config.model.n_layer, config.reshard_after_forward
    size, reduced_size = (getattr(torch, dtype).itemsize for dtype in (config.dtype, config.reduce_dtype))
    n_all, n_blocks = (sum(p.numel() for p in part.parameters()) for part in (model, model.layers))
    n_root = n_all - n_blocks
    in_fp8 = sum(layer.weight.numel() for fqn, layer in fp8.linear_layers(model).items()
                 if fqn != "lm_head" and fp8.gathers(fp8.recipe_of(fqn, config.fp8), config.fp8, shards))
    block_bytes, root_bytes = (size * n_blocks - (size - 1) * in_fp8) / n_layer, size * n_root
    part = (shards - 1) / shards

    def collective_s(n_bytes):
        """A ring over the shards: each GPU receives what it lacks, in shards - 1 hops, over all cards of a node."""
        rate = LINK_RATE if shards <= gpus_per_node else min(LINK_RATE, gpus_per_node * NETWORK_RATE)
        return n_bytes * part / rate + (shards - 1) * HOP_S

    def all_reduce_s(n_bytes):
        return 2 * n_bytes * (replicas - 1) / replicas / NETWORK_RATE + 2 * (replicas - 1) * HOP_S

    state = sum(estimate.optimizer_bytes(config, model, shards=1))
    update_s = (2 * state + 3 * size * n_all) / COPY_RATE  # AdamW reads and writes state and weights, reads gradients
    compute_s = one_gpu_ms / 1000 - part * update_s

    # FSDP2 frees a block's weights after forward and gathers them again, or keeps them for all passes of a step
    forward_gathers = accumulation if reshards else 1
    gathered = forward_gathers * (1 + reshards) * (n_layer * block_bytes + root_bytes)
    copied = 2 * gathered * (1 + 1 / shards)  # shards into the buffer, weights out of it: read and written
    copied += accumulation * n_all * (size + reduced_size) * (1 + 1 / shards)  # gradients, to reduce_dtype and back

    gather_s, block_gradients = collective_s(block_bytes), reduced_size * n_blocks / n_layer
    # gathers and reductions one after the other, on the same links; between replicas on others
    in_backward_s = max(collective_s(block_gradients) + gather_s * reshards, all_reduce_s(block_gradients / shards))
    pass_s, hidden_s, exposed_s = compute_s / accumulation / n_layer, 0.0, 0.0
    for times, collectives_s, computing_s in ((forward_gathers, gather_s, pass_s / 3),
                                              (accumulation, in_backward_s, 2 * pass_s / 3)):
        hidden_s += n_layer * times * min(collectives_s, computing_s)
        exposed_s += n_layer * times * max(0, collectives_s - computing_s)
    root_gradients = reduced_size * n_root
    exposed_s += forward_gathers * collective_s(root_bytes)
    exposed_s += accumulation * (collective_s(root_gradients) + all_reduce_s(root_gradients / shards))
    parts = {"compute": compute_s, "copies": copied / COPY_RATE, "slowed": CONTENTION * hidden_s, "exposed": exposed_s}
    return {name: 1000 * seconds for name, seconds in parts.items()}


def flops(config):
    return sum(estimate.matmul_flops_per_token(models.on_meta(config.model)))


def configs(name):
    """{column: (Config, ms on one GPU)} of a model."""
    m = models.llama3_1_8b() if name == "8B" else LLAMA_70B
    more = {"activation_checkpoint": "full"} if name == "70B" else {}
    whole, gathers = FP8, GATHER
    if name == "70B":  # recomputing drops kept casts
        whole, gathers = replace(FP8, keep_casts=False), replace(GATHER, keep_casts=False)
    scale = RECOMPUTED * flops(Config(model=m)) / flops(Config(model=models.llama3_1_8b())) if name == "70B" else 1
    columns = {}
    for column, key, fp8_config, reshards in (
            ("bf16", "bf16", FP8Config(), True), ("FP8, gathered in bf16", "fp8", whole, True),
            ("FP8, gathered in FP8", "fp8", gathers, name == "70B")):
        columns[column] = (Config(model=m, fp8=fp8_config, reshard_after_forward=reshards, **FAST, **more),
                           scale * MEASURED_MS[key])
    return columns


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = []
    for name in ("8B", "70B"):
        for layout in ("FSDP", "HSDP"):
            for n in GPUS:
                replicas = max(1, n // args.gpus_per_node) if layout == "HSDP" else 1
                if layout == "HSDP" and replicas == 1:
                    continue  # within a node the two are the same
                for column, (config, one_gpu_ms) in configs(name).items():
                    parts = {"compute": one_gpu_ms}
                    if n > 1:
                        parts = step_ms(config, one_gpu_ms, n // replicas, replicas,
                                        gpus_per_node=args.gpus_per_node)
                    ms = sum(parts.values())
                    rows.append({"model": name, "layout": layout, "gpus": n, "variant": column, "ms": ms,
                                 "tokens_per_s_per_gpu": 8192e3 / ms, "of_one_gpu": one_gpu_ms / ms, "parts_ms": parts,
                                 "gib": estimate.memory(config, n // replicas if n > 1 else 0, 1)})
    for name, layout in (("8B", "FSDP"), ("8B", "HSDP"), ("70B", "FSDP"), ("70B", "HSDP")):
        chosen = [row for row in rows if (row["model"], row["layout"]) == (name, layout)]
        columns = list(dict.fromkeys(row["variant"] for row in chosen))
        print(f"\n{name}, {layout}\n\n| GPUs | " + " | ".join(columns) + " |\n" + "| --- " * (1 + len(columns)) + "|")
        for n in dict.fromkeys(row["gpus"] for row in chosen):
            cells = [f"{row['tokens_per_s_per_gpu']:,.0f} ({row['of_one_gpu']:.0%}), {row['gib']:.0f} GiB"
                     for row in chosen if row["gpus"] == n]
            print(f"| {n:,} | " + " | ".join(cells) + " |")
    if args.out:
        args.out.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))


if __name__ == "__main__":
    entry.run(main)
