"""Measure a peer: transformers' Llama with torchao's FP8, as its users run it and at its best.

    python bench/peers/transformers_llama.py [--layers=8] [--variants=bf16,tensorwise,bf16:best,tensorwise:best]

Needs `pip install transformers`. A variant is bf16 or a torchao recipe, with options after colons:

    (nothing)   the whole model compiled, FSDP2 also on one rank, flash attention, lm_head in bf16
    best        no FSDP2, cuDNN attention: everything that is free to turn on, and no other change
    all         lm_head in FP8 too
    gather      FP8 all-gather and precomputed scales, torchao's own

With 16 layers or more, every block is recomputed (gradient_checkpointing_enable): otherwise 8B does not fit in 80 GB.
Every variant runs in its own process, on nanofp8's embedded corpus, with fused AdamW on bf16 weights. Run `bench.py` on
the same GPU within the hour. Writes OUT/bench.json with bench.py's columns.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bench
import data
import model as models
from checks import estimate
from formats import families
from plumbing import logs
from plumbing.ranks import device_mesh, find_ranks, join_process_group

WORDS = {"best", "all", "gather"}


def sizes_of(args):
    """The ModelConfig of nanofp8's model with these sizes."""
    return models.llama3_1_8b(n_layer=args.layers, block_size=args.tokens, vocab_size=args.vocab, n_embd=args.width,
                              ffn_dim=args.width * 7 // 2, n_head=args.width // 128,
                              n_kv_head=max(1, args.width // 512))


def build(args, sizes, words, recipe, ranks):
    """A transformers Llama with random weights, converted, sharded and compiled as the variant says."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{key: getattr(sizes, field) for key, field in families.FIELDS.items() if key not in families.OPTIONAL},
        max_position_embeddings=args.tokens, use_cache=False, attn_implementation="sdpa")
    with torch.device(ranks.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if args.layers >= 16:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe != "bf16":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        fp8 = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=ranks.device.type == "cpu",
                                  enable_fsdp_float8_all_gather="gather" in words)
        torch._inductor.config.emulate_precision_casts = recipe == "rowwise"
        convert_to_float8_training(model, config=fp8, module_filter_fn=lambda _, name: (
            "all" in words or name != "lm_head"))
    if "best" in words:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch._functorch.config.enable_autograd_cache = False  # it would reuse a graph with flash attention
    else:
        join_process_group(ranks)
        mesh = device_mesh(ranks)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.train()
    return torch.compile(model)


def measure(variant, args):
    """Train one variant in this process: its row, with bench.py's columns."""
    recipe, *words = variant.split(":")
    ranks = find_ranks()
    device, clock = ranks.device, ranks.now()
    sizes = sizes_of(args)
    model = build(args, sizes, words, recipe, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows, _, _ = data.prepare(data.DataConfig(cache_dir=args.cache_dir, tokenizer="bytes"), args.tokens, seed=0)
    loader = data.Loader(rows, global_batch_size=1, micro_batch_size=1, seed=1337)

    ms = []
    for step in range(args.warmup + args.steps):
        if step % bench.WINDOW == 0:
            if step > args.warmup:
                ms.append(1000 * (ranks.now() - clock) / bench.WINDOW)
            elif step == args.warmup and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            clock = ranks.now()
        x = loader.batch(step)[0][0].to(device)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if "gather" in words and "best" not in words:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(model)
        if step == 0:
            compile_s = ranks.now() - clock
    ms.append(1000 * (ranks.now() - clock) / bench.WINDOW)
    median = statistics.median(ms)
    peak = estimate.bf16_peak(torch.cuda.get_device_name()) if device.type == "cuda" else None
    with torch.device("meta"):
        flops = sum(estimate.matmul_flops_per_token(models.Transformer(sizes))) * args.tokens
    return {"variant": variant, "ms_per_step": median, "spread_ms": max(ms) - min(ms), "speedup": None,
            "tokens_per_s": 1000 * args.tokens / median, "mfu": flops / median * 1000 / peak if peak else None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan"),
            "compile_s": compile_s, "loss": loss.item(), "ms": ms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--variants", default="bf16,tensorwise,bf16:best,tensorwise:best")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--width", type=int, default=4096, help="n_embd; other sizes in the proportions of Llama-8B")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=8192, help="sequence length, batch 1")
    parser.add_argument("--cache_dir", default="data_cache")
    parser.add_argument("--out", default="out/peers")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # set for the process that measures one variant
    args = parser.parse_args()
    if args.row:
        Path(args.row).write_text(json.dumps(measure(args.variants, args)))
        return
    unknown = [v for v in args.variants.split(",") if v.split(":")[0] not in ("bf16", *bench.RECIPES)
               or not WORDS.issuperset(v.split(":")[1:])]
    if unknown or args.steps % bench.WINDOW or args.warmup % bench.WINDOW or not args.warmup:
        parser.error(f"unknown variants {unknown}: see --help" if unknown else
                     f"--steps and --warmup must be multiples of {bench.WINDOW}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"hardware": hardware, "versions": {p: version(p) for p in ("torch", "torchao", "transformers")},
              "date": time.strftime("%Y-%m-%d"), "command": sys.argv, "rows": []}
    for variant in args.variants.split(","):
        row, log = out / "row.json", out / f"{variant.replace(':', '_')}.txt"
        keys = [f"--{k}={v}" for k, v in vars(args).items() if k not in ("row", "variants")]
        with log.open("w") as output:
            failed = subprocess.run([sys.executable, __file__, *keys, f"--variants={variant}", f"--row={row}"],
                                    stdout=output, stderr=subprocess.STDOUT).returncode
        lines = log.read_text().strip().splitlines()
        report["rows"].append({"variant": variant, "error": lines[-1]} if failed else json.loads(row.read_text()))
        base, last = report["rows"][0], report["rows"][-1]
        if "error" not in base and "error" not in last:
            last["speedup"] = last["tokens_per_s"] / base["tokens_per_s"]
        (out / "bench.json").write_text(json.dumps(report, indent=1))
    print(logs.table(report["rows"], bench.COLUMNS), f"written: {out / 'bench.json'}", sep="\n")
    sys.exit(any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    main()
