"""FP8 health of every layer: what each cast loses, measured inside a training pass.

A cast loses in three ways, and `health` measures each for every FP8 layer and every operand of its three matmuls:

    rounding     sqnr_db, signal to quantization noise: 10 log10(|x|^2 / |x - cast(x)|^2). 3 mantissa bits (e4m3) keep
                 about 32 dB of any well-scaled tensor, 2 bits (e5m2) about 26: `ALLOWED`
    underflow    the share of values that become zero: too small for the scale that the largest value sets
    saturated    the share that is clipped to the format's largest value: the scale does not fit the tensor

While `health` runs, `__class__` of each FP8 layer is swapped for a subclass whose backward also reports what its
casts lose, compiled, recomputed and sharded as the layer always is, on the same weights, batch and scales. Training is
bit for bit the same with and without it, and a run that never calls it has none of its code in its graphs.
"""

import functools
import math

import torch

import fp8
from plumbing import blockwise, logs
from plumbing.ranks import gather
from plumbing.sharding import local_shard

# The casts of a layer: name of the operand, its tensor in backward, where the recipe has it (matmul, operand), and the
# dimension along which a row-wise cast shares a scale (of w_t, the transposed weight, for weights).
CASTS = (("input", "x", "output", 0, -1),
         ("weight", "w_t", "output", 1, 0),
         ("grad_output", "g", "grad_input", 0, -1),
         ("input_for_grad_weight", "x", "grad_weight", 1, 0),
         ("weight_for_grad_input", "w_t", "grad_input", 1, -1),
         ("grad_output_for_grad_weight", "g", "grad_weight", 0, 0))
SUMS, PEAKS = ("signal", "noise", "underflow", "saturated", "values"), ("amax", "minus_scale")
FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
# Best SQNR in dB of a format with m mantissa bits: a value x in [1, 2) is off by at most 2^-(m+1), uniformly, so noise
# is 4^-m / 12 against a mean x^2 of 7/3: 28 * 4^m. Normal data has 1 dB less; underflow costs more.
ALLOWED = {"e4m3": 32.5, "e5m2": 26.5}


def cast_stats(x, data, scale):
    """float64 SUMS and PEAKS of a cast from x to `data` = FP8 of x * scale; over calls and ranks, PEAKS are maxima.

    amax is inf if any value is inf or nan; the smallest scale is that of the row with the amax.
    """
    x, cast = x.float(), data.float()
    # Saturated is what lies more than half a step above the largest value (1.75 * 2^n with steps of eps * 2^n): below
    # that it rounds to the largest value. A fused kernel takes the amax before x is rounded to bf16, up to 0.4% lower.
    limit = torch.finfo(data.dtype).max * (1 + torch.finfo(data.dtype).eps / 3.5)
    amax = x.abs().max().double().nan_to_num(nan=math.inf, posinf=math.inf)
    stats = [x.double().square().sum(), (x - cast / scale).double().square().sum(),  # float32 would overflow
             ((x != 0) & (cast == 0)).sum(), ((x * scale).abs() > limit).sum(), amax.new_full((), x.numel()),
             amax, -scale.min()]
    return torch.stack([s.double() for s in stats])


def merge(a, b):
    """The stats of two calls or ranks as one."""
    n = len(SUMS)
    return torch.cat([a[..., :n] + b[..., :n], a[..., n:].maximum(b[..., n:])], -1)


# An operator, so that the graph of a training pass does not change; compiled on a GPU, as eager takes a dozen passes.
compiled_cast_stats = torch.compile(cast_stats, dynamic=True)
library = torch.library.Library("nanofp8", "DEF")
library.define("cast_stats(Tensor x, Tensor data, Tensor scale) -> Tensor")
library.impl("cast_stats", lambda x, *cast: (compiled_cast_stats if x.is_cuda else cast_stats)(x.detach(), *cast),
             "CompositeExplicitAutograd")
torch.library.register_fake("nanofp8::cast_stats", lib=library)(
    lambda x, *_: x.new_empty(len(SUMS) + len(PEAKS), dtype=torch.float64))


def block_parts(x, values, scales):
    """The arguments of cast_stats for a block-wise cast of x."""
    (blocks, scales), (values, _) = blockwise.in_blocks(x, scales), blockwise.in_blocks(values, scales)
    return blocks, values, 1 / scales


def cast_as_recipe(t, cast, dim, recipe):
    """(tensor, values, scale) of a tensor's cast, in a compiled graph the very cast that the layer's matmul reads."""
    if cast.scaling in ("block", "tile"):
        x = t.t() if dim == 0 else t
        return block_parts(x, *blockwise.cast(x, tiles=cast.scaling == "tile"))
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    granularity = {"tensor": ScalingGranularity.TENSORWISE, "row": ScalingGranularity.AXISWISE}[cast.scaling]
    q = hp_tensor_to_float8_dynamic(t, cast.dtype, LinearMMConfig(), scaling_granularity=granularity,
                                    axiswise_dim=get_maybe_axiswise_dim(dim, granularity),
                                    round_scales_to_power_of_2="row" in recipe.scalings)
    parts = t, q._data, q._scale
    return [part.t() for part in parts] if t.stride(-1) != 1 else parts  # cast_stats wants them contiguous


@torch._dynamo.allow_in_graph
class ReportCasts(torch.autograd.Function):
    """Returns y, the output of an FP8 layer for x; its backward adds what the layer's casts lose to `seen`.

    recipe: its name. A graph cannot hold a Recipe that brings a layer of its own.
    """

    @staticmethod
    def forward(ctx, y, x, weight, recipe, seen):
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.seen = fp8.RECIPES[recipe], seen
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        from torchao.float8.distributed_utils import tensor_already_casted_to_fp8

        x, weight = ctx.saved_tensors  # selective recompute allows to read them once
        gathered = isinstance(weight, blockwise.GatheredBlocks) or tensor_already_casted_to_fp8(weight)
        elsewhere = weight.stride(0) == 0  # in host memory (AdamW.offload_weights): health() measures it
        # reshaped as torchao does, or the compiler sees two casts instead of one
        tensors, done = {"x": x.reshape(-1, x.shape[-1]), "g": g.reshape(-1, g.shape[-1])}, set()
        tensors["w_t"] = None if gathered or elsewhere else weight.t()
        for i, (_, name, matmul, operand, dim) in enumerate(CASTS):
            t, casts = tensors[name], getattr(ctx.recipe, matmul)
            if casts is None or t is None or (name, casts[operand]) in done:
                continue
            if casts[operand].scaling in ("tensor", "tile"):  # a second matmul reads the same cast
                done.add((name, casts[operand]))
            stats = torch.ops.nanofp8.cast_stats(*cast_as_recipe(t, casts[operand], dim, ctx.recipe))
            ctx.seen[i].copy_(merge(ctx.seen[i], stats))
        return g, None, None, None, None


@functools.cache
def watched(kind):
    """The class of an FP8 layer, with a backward that reports to self.seen."""

    class Watched(kind):
        def forward(self, x):
            y = super().forward(x)
            return ReportCasts.apply(y, x, self.weight, self.recipe, self.seen)

    return Watched


def health(model, run, step):
    """What every FP8 cast loses in `run`, a forward and backward pass: one row of metrics.jsonl per FP8 layer.

    Call it on every rank; rows cover all ranks. {"step", "fp8_layer": name, operand: {"format", "sqnr_db", "underflow",
    "saturated", "amax", "scale"}, ...}, to 6 digits; None stands for inf and nan, scale is the smallest.
    """
    linears, device = fp8.float8_linears(model), next(model.parameters()).device
    nothing = torch.tensor([0.0] * len(SUMS) + [-math.inf] * len(PEAKS), dtype=torch.float64, device=device)
    classes = {m: type(m) for m in linears.values()}
    for m in classes:
        m.seen, m.__class__ = nothing.repeat(len(CASTS), 1), watched(type(m))
    try:
        run()
        for m in classes:
            shard = local_shard(m.weight)
            if hasattr(shard, "fsdp_pre_all_gather"):  # cast before the all-gather: each rank measures its own rows
                mesh = m.weight.device_mesh
                casts, scale = shard.fsdp_pre_all_gather(mesh[mesh.mesh_dim_names[-1]])
                parts = (shard._tensor, *casts, *scale) if scale else block_parts(shard._tensor, *casts)
                m.seen[1] = torch.ops.nanofp8.cast_stats(*parts)
            elif hasattr(shard, "on_host"):
                m.seen[1] = torch.ops.nanofp8.cast_stats(shard.on_host.to(device), m.cast, m.scale)
        seen = torch.stack([m.seen for m in classes])
    finally:
        for m, kind in classes.items():
            m.__class__ = kind
            del m.seen
    seen, rows = functools.reduce(merge, gather(seen.cpu())), []
    for (fqn, m), layer in zip(linears.items(), seen.tolist(), strict=True):
        row = {"step": step, "fp8_layer": fqn}
        for (name, _, matmul, operand, _), numbers in zip(CASTS, layer, strict=True):
            signal, noise, underflow, saturated, values, amax, minus_scale = numbers
            if values > 0:
                cast = getattr(fp8.RECIPES[m.recipe], matmul)[operand]
                stats = {"sqnr_db": decibels(signal, noise), "underflow": underflow / values,
                         "saturated": saturated / values, "amax": amax, "scale": -minus_scale}
                row[name] = {"format": FORMATS[cast.dtype]}
                row[name] |= {key: logs.number(float(f"{x:.6g}")) for key, x in stats.items()}
        rows.append(row)
    return rows


def decibels(signal, noise):
    """10 log10(signal / noise), at most 200 (all values exact); -inf without signal, or with inf or nan in it."""
    if not 0 < signal < math.inf or not noise < math.inf:
        return -math.inf
    return 10 * math.log10(signal / max(noise, 1e-20 * signal))


def operands(rows):
    """Yield (layer, operand, stats) of rows from health()."""
    for row in rows:
        yield from ((row["fp8_layer"], name, stats) for name, stats in row.items() if isinstance(stats, dict))


def shortfall(stats):
    """dB by which an operand's SQNR is below what its format allows; 0 for an operand of zeros."""
    return 0.0 if stats["sqnr_db"] is None else ALLOWED[stats["format"]] - stats["sqnr_db"]


def worst(rows):
    """One line for the screen with the three operands that lose most; 1% of underflow counts as much as 1 dB."""
    lost = sorted(operands(rows), key=lambda row: -max(0, shortfall(row[2])) - 100 * row[2]["underflow"])[:3]
    return f"fp8 health, worst of {len(rows)} layers: " + "; ".join(
        f"{layer} {operand} {s['sqnr_db'] or 0:.1f} of {ALLOWED[s['format']]} dB in {s['format']}, "
        f"{s['underflow']:.1%} underflow" for layer, operand, s in lost)


def broken(rows):
    """The operands with inf or nan, in the order in which a pass computes them: the first one is where to look."""
    found = [(layer, name) for layer, name, stats in operands(rows) if stats["amax"] is None]
    forward = [f"{layer} {name}" for layer, name in found if name in ("input", "weight")]
    return forward + [f"{layer} {name}" for layer, name in found[::-1] if name == "grad_output"]


def plot_health(out_dir):
    """Write out_dir/fp8_health.png from out_dir/metrics.jsonl: SQNR lost and underflow, layers against steps.

    Row-wise, the worse of the two casts of a tensor. Returns the path, or None if there are no rows of FP8 health.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    rows = [row for row in logs.read_metrics(out_dir) if "fp8_layer" in row]
    if not rows:
        return None
    layers, steps = list(dict.fromkeys(r["fp8_layer"] for r in rows)), sorted({r["step"] for r in rows})
    figure = Figure(figsize=(11, min(20, 3.5 + 0.24 * len(layers))), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for line, title, measure, style in (
            (axes[0], "dB below the format's best", shortfall, {"cmap": "Reds", "vmin": 0, "vmax": 12}),
            (axes[1], "% that underflows", lambda s: 100 * s["underflow"],
             {"cmap": "Blues", "norm": PowerNorm(0.4, 0, 100)})):  # a few percent can be seen beside 60
        for ax, tensor in zip(line, ("input", "weight", "grad_output"), strict=True):
            values = [[math.nan] * len(steps) for _ in layers]
            for row in rows:
                casts = [measure(stats) for name, stats in row.items() if name.startswith(tensor)]
                values[layers.index(row["fp8_layer"])][steps.index(row["step"])] = max(casts, default=math.nan)
            image = ax.imshow(values, aspect="auto", interpolation="nearest", **style)
            ax.set_title(tensor)
        figure.colorbar(image, ax=line, label=title, extend="max" if "vmax" in style else "neither")
        every = -(-len(layers) // 40)
        line[0].set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
    shown = slice(None, None, -(-len(steps) // 5))
    for ax in axes[1]:
        ax.set(xlabel="step", xticks=range(len(steps))[shown], xticklabels=steps[shown])
    figure.savefig(out_dir / "fp8_health.png", dpi=150)
    return out_dir / "fp8_health.png"
