"""Where the time of block-wise FP8 goes: the casts and matmuls of each linear layer alone, beside bf16 and tensorwise.

    python bench/blockwise.py [CONFIG.py] [--key=value ...]

Shapes and tokens are the config's (default: config/llama_fp8.py), values random. Casts are those of a step with
fp8.keep_casts: both layouts of the input, the weight and the gradient. Without a Hopper GPU the emulated casts and
matmuls are timed, which says nothing. Writes out_dir/blockwise.json.
"""

import datetime
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import model as models
from checks.gemms import milliseconds
from plumbing import blockwise, entry, logs

COLUMNS = {"layer": "", "what": "", "bf16_ms": ".3f", "tensorwise_ms": ".3f", "blockwise_ms": ".3f", "rate": ",.2f",
           "unit": ""}


def time_matmul(layer, what, m, k, n, *, tiles, device, emulate):
    """The row of a matmul (m, k) @ (k, n) by its three ways; the rate is the block-wise one's."""
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    casts, one = (blockwise.cast(a), blockwise.cast(b, tiles=tiles)), torch.ones((), device=device)
    bf16 = milliseconds(device, torch.mm, a, b.t())
    tensorwise = milliseconds(device, lambda a, b: torch._scaled_mm(
        a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=not emulate), casts[0][0], casts[1][0].t())
    ms = milliseconds(device, blockwise.matmul, *casts, torch.bfloat16, emulate)
    return {"layer": layer, "what": what, "bf16_ms": bf16, "tensorwise_ms": tensorwise, "blockwise_ms": ms,
            "rate": 2e-12 * m * k * n / (1e-3 * ms), "unit": "TFLOP/s"}


def time_cast(layer, what, rows, columns, *, tiles, device):
    """The row of a cast into both layouts: 2 bytes read and 2 written for each value."""
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    ms = milliseconds(device, lambda: blockwise.cast(x, tiles=tiles, transposed=True))
    return {"layer": layer, "what": what, "bf16_ms": None, "tensorwise_ms": None, "blockwise_ms": ms,
            "rate": 4e-12 * x.numel() / (1e-3 * ms), "unit": "TB/s"}


def main():
    config, base = bench.prepare(None, "llama_fp8.py")
    device = torch.device("cpu" if bench.on_cpu(config) else "cuda")
    emulate = device.type == "cpu" or torch.cuda.get_device_capability()[0] != blockwise.CAPABILITY
    model = models.on_meta(config.model)
    layers = Counter((models.layer_kind(fqn), m.out_features, m.in_features) for fqn, m in model.named_modules()
                     if isinstance(m, nn.Linear) and fqn != "lm_head")
    tokens, rows, total = config.micro_batch_size * config.model.block_size, [], Counter()
    for (layer, n_out, n_in), count in layers.items():
        new = [time_cast(layer, "cast input", tokens, n_in, tiles=False, device=device),
               time_cast(layer, "cast weight", n_out, n_in, tiles=True, device=device),
               time_cast(layer, "cast grad_output", tokens, n_out, tiles=False, device=device)]
        for what, m, k, n in (("output", tokens, n_in, n_out), ("grad_input", tokens, n_out, n_in),
                              ("grad_weight", n_out, tokens, n_in)):
            new.append(time_matmul(layer, what, m, k, n, tiles=what != "grad_weight", device=device, emulate=emulate))
        for row in new:
            for key in ("bf16_ms", "tensorwise_ms", "blockwise_ms"):
                total[row["what"].split()[0], key] += count * (row[key] or 0)
        rows += new
    casts = total["cast", "blockwise_ms"]
    sums = {name: sum(total[what, f"{name}_ms"] for what in ("output", "grad_input", "grad_weight"))
            for name in ("bf16", "tensorwise", "blockwise")}
    report = {**logs.provenance(), "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
              "date": datetime.date.today().isoformat(), "command": sys.argv, "tokens": tokens, "rows": rows,
              "all_layers_ms": {"casts": casts, "matmuls": sums}}
    path = base.parent / "blockwise.json"
    path.write_text(json.dumps(report, indent=1))
    print("", logs.table(rows, COLUMNS), "", sep="\n")
    print(f"all blocks, ms per pass: matmuls bf16 {sums['bf16']:.1f}, tensorwise without casts "
          f"{sums['tensorwise']:.1f}, block-wise {sums['blockwise']:.1f} and casts {casts:.1f}; written: {path}")


if __name__ == "__main__":
    entry.run(main)
