"""Which linear layers FP8 pays for: each kind timed alone, in bf16 and with FP8 recipes, casts included.

`bench.py --gemms` prints these timings; `fp8.auto_filter` leaves layers that do not pay in bf16. In the whole model the
casts fuse with their neighbours and cost somewhat less. Launching kernels is not timed: where the GPU waits for Python
(small models without cuda_graph), FP8 costs more than here, because it launches more of them.
"""

import itertools
import statistics
import time
from collections import Counter
from dataclasses import replace

import torch
import torch.nn as nn

import fp8
import model as models
from plumbing import logs
from plumbing.ranks import gather, process_rank


def time_linears(config, device, passes, recipes):
    """Time every kind of linear layer of a configurator.Config's model alone on `device`: a list of dicts.

    passes: forward and backward passes per step. recipes: names in fp8.RECIPES to compare with bf16. `layer` is the
    kind, an entry for fp8.recipes, and `calls` how often it runs in a step. `ms` has the medians of (forward, backward)
    in ms, by "bf16" (config.dtype, more precisely) and recipe: None if the recipe cannot take the shape.
    """
    linears = fp8.linear_layers(models.on_meta(config.model))
    kinds = Counter((models.layer_kind(fqn), m.out_features, m.in_features, m.bias is not None)
                    for fqn, m in linears.items())
    rows, dtype = [], getattr(torch, config.dtype)
    for (name, n_out, n_in, bias), count in kinds.items():
        pieces = models.calls_per_pass(name, config.loss_chunks)
        tokens = config.micro_batch_size * config.model.block_size // pieces
        row = {"layer": name, "shape": [n_out, n_in], "tokens": tokens, "calls": count * pieces * passes, "ms": {}}
        x = torch.randn(tokens, n_in, device=device, dtype=dtype, requires_grad=True)
        g = torch.randn(tokens, n_out, device=device, dtype=dtype)
        for recipe in (None, *recipes):
            if recipe and any(n % fp8.RECIPES[recipe].multiple for n in (n_out, n_in, tokens)):
                row["ms"][recipe] = None
                continue
            holder = nn.ModuleDict({"linear": nn.Linear(n_in, n_out, bias=bias, device=device, dtype=dtype)})
            cfg = replace(config.fp8, enabled=True, filter_fqns=[], recipes={"linear": recipe})
            fp8.convert(holder, cfg, shards=0)
            torch._dynamo.reset()  # otherwise shapes of the other kinds count against the recompile limit
            linear = torch.compile(holder["linear"]) if config.compile.enabled else holder["linear"]
            inputs = x, *linear.parameters()
            forward = milliseconds(device, linear, x)
            both = milliseconds(device, lambda f, i, g: torch.autograd.grad(f(i[0]), i, g), linear, inputs, g)
            row["ms"][recipe or "bf16"] = forward, max(0.0, both - forward)
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


def gain(row, recipe):
    """ms per step that a recipe saves on the layers of a row (negative: costs); 0 if it cannot take their shape."""
    return row["calls"] * (sum(row["ms"]["bf16"]) - sum(row["ms"][recipe])) if row["ms"].get(recipe) else 0.0


def best(row):
    """The recipe with which the layers of a row are fastest; None for bf16."""
    recipe = max(row["ms"], key=lambda name: gain(row, name))  # bf16 gains 0
    return recipe if gain(row, recipe) > 0 else None


def choose(config, device, passes):
    """fp8.auto_filter: the modules to leave out since their recipes make them no faster, the same on every rank.

    Timed by rank 0. A kind, such as mlp.down, stands for all of its layers, unless some of them pay with their recipes.
    """
    chosen = None
    if process_rank() == 0:
        linears = fp8.linear_layers(models.on_meta(config.model))
        recipes = {fqn: name for fqn in linears if (name := fp8.recipe_of(fqn, config.fp8))}
        kinds = {fqn: models.layer_kind(fqn) for fqn in recipes}
        rows = {row["layer"]: row for row in time_linears(config, device, passes, dict.fromkeys(recipes.values()))}
        slow = [fqn for fqn, name in recipes.items() if gain(rows[kinds[fqn]], name) <= 0]
        mixed = {kinds[fqn] for fqn in recipes if fqn not in slow}
        chosen = list(dict.fromkeys(fqn if kinds[fqn] in mixed else kinds[fqn] for fqn in slow))
    return gather(chosen)[0]


def table(rows, step_ms):
    """The rows of time_linears as text, with the step times that they predict from a bf16 step of step_ms."""
    names = list(rows[0]["ms"])
    shown = [{"layer": row["layer"], "shape": str(tuple(row["shape"])), "calls": row["calls"],
              **{name: ms and "{:.3f} + {:7.3f}".format(*ms) for name, ms in row["ms"].items()}} for row in rows]
    fastest = {row["layer"]: best(row) for row in rows}
    saved = {f"{name} wherever it can": sum(gain(row, name) for row in rows) for name in names[1:]}
    saved["the fastest for each layer"] = sum(gain(row, fastest[row["layer"]]) for row in rows)
    keys = f'--fp8.recipes="{fastest}"'
    if not any(fastest.values()):
        keys = "FP8 pays for none of them here: --fp8.enabled=False"
    text = logs.table(shown, {"layer": "", "shape": "", "calls": "d", **dict.fromkeys(names, "")})
    return "\n".join([
        "ms of forward + backward", text, "", f"bf16 step, measured: {step_ms:.1f} ms. Predicted with",
        *(f"  {how}: {step_ms - ms:.1f} ms ({step_ms / (step_ms - ms):.2f}x)" for how, ms in saved.items()), keys])
