"""The table of docs/scaling.md: step times on up to 1,024 GPUs, as checks/estimate.py predicts them (no GPU needed).

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


def flops(config):
    with torch.device("meta"):
        return sum(estimate.matmul_flops_per_token(models.Transformer(config.model)))


def configs(name):
    """{column: (Config, ms on one GPU)} of a model."""
    m = models.llama3_1_8b() if name == "8B" else LLAMA_70B
    more = {"activation_checkpoint": "full"} if name == "70B" else {}
    whole, gathers = FP8, GATHER
    if name == "70B":  # recomputing drops kept casts
        whole, gathers = replace(FP8, keep_casts=False), replace(GATHER, keep_casts=False)
    scale = RECOMPUTED * flops(Config(model=m)) / flops(Config(model=models.llama3_1_8b())) if name == "70B" else 1
    columns = {}
    for column, key, fp8, reshards in (
            ("bf16", "bf16", FP8Config(), True), ("FP8, gathered in bf16", "fp8", whole, True),
            ("FP8, gathered in FP8", "fp8", gathers, name == "70B")):
        columns[column] = (Config(model=m, fp8=fp8, reshard_after_forward=reshards, **FAST, **more),
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
                        parts = estimate.step_ms(config, one_gpu_ms, n // replicas, replicas,
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
