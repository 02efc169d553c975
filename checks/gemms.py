"""Which linear layers FP8 pays for: each kind timed alone, in bf16 and in FP8 with its casts.

FP8 halves the time of a matmul and adds casts, whose cost grows with the operands and not with the matmul: small layers
lose. `bench.py --gemms` prints these timings; `fp8.auto_filter` leaves layers that do not pay in bf16. In the whole
model the casts fuse with their neighbours and cost somewhat less. Launching kernels is not timed: where the GPU waits
for Python (small models without cuda_graph), FP8 costs more than here, because it launches more of them.
"""

import itertools
import json
import statistics
import time
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn as nn

import fp8
import model as models


def time_linears(config, device, passes):
    """Time every kind of linear layer of a configurator.Config's model alone on `device`: a list of dicts.

    passes: forward and backward passes per step. `layer` is an entry for fp8.filter_fqns, `calls` how often it runs in
    a step; `bf16` (config.dtype, more precisely) and `fp8` are medians of (forward, backward) in ms. `fp8` is None if
    FP8 cannot take the shape.
    """
    with torch.device("meta"):
        model = models.Transformer(config.model)
    kinds = Counter((models.layer_kind(fqn), m.out_features, m.in_features, m.bias is not None)
                    for fqn, m in model.named_modules() if isinstance(m, nn.Linear))
    rows, dtype = [], getattr(torch, config.dtype)
    unfiltered = replace(config.fp8, enabled=True, filter_fqns=[])
    for (name, n_out, n_in, bias), count in kinds.items():
        pieces = models.calls_per_pass(name, config.loss_chunks)
        tokens = config.micro_batch_size * config.model.block_size // pieces
        row = {"layer": name, "shape": [n_out, n_in], "tokens": tokens, "calls": count * pieces * passes, "fp8": None}
        x = torch.randn(tokens, n_in, device=device, dtype=dtype, requires_grad=True)
        g = torch.randn(tokens, n_out, device=device, dtype=dtype)
        for precision in ("bf16", "fp8"):
            holder = nn.ModuleDict({"linear": nn.Linear(n_in, n_out, bias=bias, device=device, dtype=dtype)})
            if precision == "fp8":
                multiple = fp8.RECIPES[fp8.recipe_of(name, unfiltered)].multiple
                if any(n % multiple for n in (n_out, n_in, tokens)):
                    continue
                fp8.convert(holder, unfiltered, shards=0)
            torch._dynamo.reset()  # otherwise shapes of the other kinds count against the recompile limit
            linear = torch.compile(holder["linear"]) if config.compile.enabled else holder["linear"]
            inputs = x, *linear.parameters()
            forward = milliseconds(device, linear, x)
            both = milliseconds(device, lambda f, i, g: torch.autograd.grad(f(i[0]), i, g), linear, inputs, g)
            row[precision] = forward, max(0.0, both - forward)
        rows.append(row)
    return rows


def milliseconds(device, run, *args, calls=20):
    """Median time of run(*args) in ms, after 5 calls that compile and warm up. On a GPU, the GPU's time alone."""
    seconds = []
    for _ in range(5 + calls):
        clock = time.perf_counter()
        run(*args)
        seconds.append(time.perf_counter() - clock)
    if device.type != "cuda":
        return 1000 * statistics.median(seconds[5:])
    torch.cuda.synchronize()
    # Idle cycles, at up to 2 GHz, for twice the time that Python took: no timed call then waits for Python.
    torch.cuda._sleep(int(2e9 * 2 * sum(seconds[5:])))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        run(*args)
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(events))


def gain(row):
    """ms per step that FP8 saves on the layers of a row (negative: costs); 0 if it cannot take their shape."""
    return row["calls"] * (sum(row["bf16"]) - sum(row["fp8"])) if row["fp8"] else 0.0


def not_paying(rows):
    """The layers that FP8 does not speed up, as entries for fp8.filter_fqns."""
    return [row["layer"] for row in rows if gain(row) <= 0]


def choose(config, device, passes):
    """fp8.auto_filter: the layers to leave out beside filter_fqns, timed by rank 0 and the same on every rank."""
    chosen = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        chosen = [not_paying(time_linears(config, device, passes))]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    return [name for name in chosen[0] if name not in config.fp8.filter_fqns]


def table(rows, step_ms):
    """The rows of time_linears as text, with the FP8 step time that they predict from a bf16 step of step_ms."""
    lines = [f"{'layer':<14} {'shape':<16} {'calls':>5}  {'bf16: fwd + bwd ms':>18} {'fp8: fwd + bwd ms':>18}  "
             "saves per step"]
    slow, gains = not_paying(rows), [gain(row) for row in rows]
    for row in rows:
        bf16, fp8_ms = ("{:7.3f} + {:7.3f}".format(*row[p]) if row[p] else "not possible" for p in ("bf16", "fp8"))
        lines.append(f"{row['layer']:<14} {str(tuple(row['shape'])):<16} {row['calls']:>5}  {bf16:>18} {fp8_ms:>18}  "
                     f"{gain(row):+8.2f} ms  {'no' if row['layer'] in slow else 'pays'}")
    every, best = step_ms - sum(gains), step_ms - sum(g for g in gains if g > 0)
    keys = f"--fp8.filter_fqns='{json.dumps(slow)}'"
    if len(slow) == len(rows):
        keys = "FP8 pays for none of them here: --fp8.enabled=False"
    return "\n".join([
        *lines, "", f"bf16 step, measured: {step_ms:.1f} ms. Predicted with FP8 wherever it can: {every:.1f} ms "
        f"({step_ms / every:.2f}x), where it pays: {best:.1f} ms ({step_ms / best:.2f}x)", keys])
