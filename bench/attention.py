"""Time attention alone, forward and backward: PyTorch's kernels and FlashAttention 4, on rows and on documents.

    python bench/attention.py [CONFIG.py] [--key=value ...] [--documents=1024] [--window=256]

One layer's attention, with the shapes and dtype of the config (default: config/llama_fp8.py): whole rows, rows of
documents with so many tokens each, and the same with a sliding window. flash4 is left out where it cannot run. Writes
out_dir/attention.json.
"""

import datetime
import functools
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
from attention import attend, document_bounds, document_mask
from checks import gemms
from plumbing import entry, flash4, logs
from plumbing.schema import PositiveInt

COLUMNS = {"case": "", "kernel": "", "forward_ms": ".3f", "backward_ms": ".3f", "difference": ".1e"}


@dataclass(kw_only=True)
class AttentionBench:
    """Keys of bench/attention.py."""

    documents: PositiveInt = 1024  # tokens of each document, in the second and third case
    window: PositiveInt = 256  # tokens that a query attends to, in the third case


def measure(run, q, k, v, grad, device):
    """(ms forward, ms backward, [output and gradients]) of run(q, k, v)."""
    y = run(q, k, v)
    grad = grad.view_as(y)  # documents have no batch
    backward = functools.partial(torch.autograd.grad, y, (q, k, v), grad, retain_graph=True)
    results = [y.detach(), *backward()]
    return gemms.milliseconds(device, run, q, k, v), gemms.milliseconds(device, backward), results


def main():
    own = AttentionBench()
    config, base = bench.prepare(own, "llama_fp8.py")
    m, device = config.model, torch.device("cpu" if bench.on_cpu(config) else "cuda")
    shape = config.micro_batch_size, m.block_size
    positions = (torch.arange(m.block_size) % own.documents).expand(shape)
    torch.manual_seed(config.seed)
    q, k, v, grad = (torch.randn(*shape, heads, m.head_dim, device=device, dtype=getattr(torch, config.dtype))
                     for heads in (m.n_head, m.n_kv_head, m.n_kv_head, m.n_head))
    for t in (q, k, v):
        t.requires_grad_()
    kernels = {"PyTorch's": attend}
    if flash4.usable(config, device):
        kernels["flash4"] = flash4.attend
    else:
        print("flash4 cannot run here: it needs a Hopper or Blackwell GPU, bfloat16 and an installation")
    rows = []
    for case, window in (("rows", None), ("documents", None), ("documents, window", own.window)):
        mask, reference = None, None
        if case != "rows" and device.type == "cuda":
            cu_seqlens, max_seqlen = document_bounds(positions)
            mask = cu_seqlens.cuda(), max_seqlen
        elif case != "rows":
            mask = document_mask(positions, m.block_size, window, device)
        for kernel, attend_with in kernels.items():
            run = functools.partial(attend_with, mask=mask, window=window and window - 1)
            forward, backward, results = measure(run, q, k, v, grad, device)
            row = {"case": case, "kernel": kernel, "forward_ms": forward, "backward_ms": backward, "difference": None}
            if reference:
                row["difference"] = max(((a - b).float().norm() / b.float().norm()).item()
                                        for a, b in zip(results, reference, strict=True))
            reference = reference or results
            rows.append(row)
    report = {**logs.provenance(), "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
              "date": datetime.date.today().isoformat(), "q": list(q.shape), "k": list(k.shape), "dtype": config.dtype,
              "documents": own.documents, "window": own.window, "rows": rows}
    if "flash4" in kernels:
        report["versions"]["flash-attn-4"] = version("flash-attn-4")
    (base.parent / "attention.json").write_text(json.dumps(report, indent=1))
    print("", logs.table(rows, COLUMNS), "", sep="\n")
    print(f"written: {base.parent / 'attention.json'}")


if __name__ == "__main__":
    entry.run(main)
