"""FP8 health of every layer: what each cast loses, inside of a training pass.

A cast loses in three ways, and `health` counts each, for every FP8 layer and every operand of its three matmuls:

    rounding     sqnr_db, signal to quantization noise: 10 log10(|x|^2 / |x - cast(x)|^2). 3 mantissa bits (e4m3) keep
                 about 32 dB of anything well scaled, 2 bits (e5m2) about 26: `ALLOWED`
    underflow    the share of values that become zero: too far below the largest value for its scale
    saturated    the share that is cut off at the format's largest value: the scale is of other values

While it measures, each Float8Linear is a subclass of itself whose backward also reports what its casts lose. That is
compiled, recomputed and sharded as the layer always is, on the same weights, batch and scales. Afterwards the layers
are what they were: the training is the same bit for bit with and without, and a run that never asks never sees this.
"""

import functools
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fp8
from plumbing import logs

# The casts of a layer: operand, the tensor, torchao's setting for it, the dimension that shares a scale in a row-wise
# recipe. The last three are the second matmul that reads the tensor; tensorwise they are the same cast again.
CASTS = (("input", "x", "cast_config_input", -1),
         ("weight", "w_t", "cast_config_weight", 0),
         ("grad_output", "g", "cast_config_grad_output", -1),
         ("input_for_grad_weight", "x", "cast_config_input_for_grad_weight", 0),
         ("weight_for_grad_input", "w_t", "cast_config_weight_for_grad_input", -1),
         ("grad_output_for_grad_weight", "g", "cast_config_grad_output_for_grad_weight", 0))
SUMS, PEAKS = ("signal", "noise", "underflow", "saturated", "values"), ("amax", "minus_scale")
# dB of a format with m mantissa bits: a value x in [1, 2) is off by at most 2^-(m+1), uniformly, so noise is 4^-m / 12
# against a mean x^2 of 7/3: 28 * 4^m. Normal data has 1 dB less, what underflows costs more.
ALLOWED = {"e4m3": 32.5, "e5m2": 26.5}


def cast_stats(x, data, scale):
    """float64 SUMS and PEAKS of a cast from x to `data` = FP8 of x * scale.

    Sums add up over calls and ranks, of peaks the larger counts: the amax (inf where any value is inf or nan), and
    minus the scale of the row that has it. Squares are taken in units of that scale, where float32 cannot overflow.
    """
    scaled, cast, unit = x.float() * scale, data.float(), scale.min().double()
    # Up to half a step above the largest value, which is 1.75 * 2^n, a step there being eps * 2^n, it is the nearest
    # one and nothing is cut off: a fused kernel takes the amax of x before x is rounded to bf16, up to 0.4% too small.
    limit = torch.finfo(data.dtype).max * (1 + torch.finfo(data.dtype).eps / 3.5)
    in_units = (unit / scale).float()
    squares = [(scaled * in_units).square().sum(), ((scaled - cast) * in_units).square().sum()]
    counts = [((x != 0) & (cast == 0)).sum(), (scaled.abs() > limit).sum()]
    amax = x.abs().max().double().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.stack([s.double() / unit.square() for s in squares] + [c.double() for c in counts]
                       + [unit.new_full((), x.numel()), amax, -unit])


# An operator of its own, so that the graph of a training pass stays what it is. On a GPU one compiled kernel or two for
# all operands; eager, it would pass over each of them a dozen times.
compiled_cast_stats = torch.compile(cast_stats, dynamic=True)
library = torch.library.Library("nanofp8", "DEF")
library.define("cast_stats(Tensor x, Tensor data, Tensor scale) -> Tensor")
library.impl("cast_stats", lambda x, *cast: (compiled_cast_stats if x.is_cuda else cast_stats)(x.detach(), *cast),
             "CompositeExplicitAutograd")
torch.library.register_fake("nanofp8::cast_stats", lib=library)(
    lambda x, *_: x.new_empty(len(SUMS) + len(PEAKS), dtype=torch.float64))


def add_up(seen, new):
    """Stats of both: sums added, peaks the larger."""
    n = len(SUMS)
    return torch.cat([seen[:n] + new[:n], torch.maximum(seen[n:], new[n:])])


@functools.cache
def watched_linear():
    """Float8Linear whose backward adds what its casts lose to self.seen (built on first use)."""
    from torchao.float8.config import ScalingGranularity, ScalingType
    from torchao.float8.distributed_utils import tensor_already_casted_to_fp8
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
    from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic

    @torch._dynamo.allow_in_graph
    class WatchedMatmuls(matmul_with_hp_or_float8_args):
        @staticmethod
        def forward(ctx, x, w_t, mm_config, config, seen):
            ctx.seen = seen
            return matmul_with_hp_or_float8_args.forward(ctx, x, w_t, mm_config, config)

        @staticmethod
        def backward(ctx, g):
            x, w_t = ctx.saved_tensors  # recompute hands them out once
            config, mm_config = ctx.config, ctx.linear_mm_config
            theirs = SimpleNamespace(saved_tensors=(x, w_t), config=config, linear_mm_config=mm_config)
            grads = matmul_with_hp_or_float8_args.backward(theirs, g)
            # reshaped as torchao does, or the compiler sees two casts instead of one
            tensors, done = {"x": x.reshape(-1, x.shape[-1]), "w_t": w_t, "g": g.reshape(-1, g.shape[-1])}, set()
            for i, (_, name, setting, dim) in enumerate(CASTS):
                t, cast = tensors[name], getattr(config, setting)
                granularity = cast.scaling_granularity
                if (cast.scaling_type is ScalingType.DISABLED or tensor_already_casted_to_fp8(t)
                        or granularity is ScalingGranularity.TENSORWISE and (name, granularity) in done):
                    continue
                done.add((name, granularity))
                q = hp_tensor_to_float8_dynamic(  # compiled, it is one with the cast that the matmul reads
                    t, cast.target_dtype, mm_config, scaling_granularity=granularity,
                    axiswise_dim=get_maybe_axiswise_dim(dim, granularity),
                    round_scales_to_power_of_2=config.round_scales_to_power_of_2)
                parts = t, q._data, q._scale
                if name == "w_t":
                    parts = [part.t() for part in parts]  # as they lie in memory
                ctx.seen[i].copy_(add_up(ctx.seen[i], torch.ops.nanofp8.cast_stats(*parts)))
            return *grads, None

    class WatchedLinear(Float8Linear):
        def forward(self, x):
            y = WatchedMatmuls.apply(x, self.weight.t(), self.linear_mm_config, self.config, self.seen)
            return y if self.bias is None else y + self.bias

    return WatchedLinear


def health(model, run, step):
    """What every FP8 cast loses in `run`, a forward and backward pass: a row of metrics.jsonl for each FP8 layer.

    Called on every rank; the rows are of all ranks together. {"step", "fp8_layer": name, operand: {"format",
    "sqnr_db", "underflow", "saturated", "amax", "scale"}, ...}; None stands for what is not a finite number. Row-wise,
    `scale` is that of the row with the amax.
    """
    linears, device = fp8.float8_linears(model), next(model.parameters()).device
    nothing = torch.tensor([0.0] * len(SUMS) + [-math.inf] * len(PEAKS), dtype=torch.float64, device=device)
    before = {m: type(m) for m in linears.values()}
    for m in before:
        m.seen, m.__class__ = nothing.repeat(len(CASTS), 1), watched_linear()
    try:
        run()
        for m in before:
            if isinstance(m.weight, DTensor) and isinstance(m.weight._local_tensor, fp8.gather_in_fp8()):
                # cast before the all-gather: each rank measures its own rows of what it sends
                shard, mesh = m.weight._local_tensor, m.weight.device_mesh
                (data,), (scale,) = shard.fsdp_pre_all_gather(mesh[mesh.mesh_dim_names[-1]])
                m.seen[1] = torch.ops.nanofp8.cast_stats(shard._tensor, data, scale)
        seen = torch.stack([m.seen for m in before])
    finally:
        for m, kind in before.items():
            m.__class__ = kind
            del m.seen
    if dist.is_initialized():
        sums, peaks = (part.contiguous() for part in seen.split((len(SUMS), len(PEAKS)), dim=-1))
        dist.all_reduce(sums)
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        seen = torch.cat((sums, peaks), -1)
    rows = []
    for (fqn, m), layer in zip(linears.items(), seen.tolist(), strict=True):
        rows.append({"step": step, "fp8_layer": fqn})
        for (operand, _, setting, _), numbers in zip(CASTS, layer, strict=True):
            s = dict(zip(SUMS + PEAKS, numbers, strict=True))
            if s["values"] > 0:
                shown = {"sqnr_db": decibels(s["signal"], s["noise"]), "underflow": s["underflow"] / s["values"],
                         "saturated": s["saturated"] / s["values"], "amax": s["amax"], "scale": -s["minus_scale"]}
                rows[-1][operand] = {"format": str(getattr(m.config, setting).target_dtype)[13:17],
                                     **{k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in shown.items()}}
    return rows


def decibels(signal, noise):
    """10 log10(signal / noise), 200 at the most (all values are exact); nan where there is no signal or a nan."""
    if not 0 < signal < math.inf or not noise < math.inf:
        return math.nan
    return 10 * math.log10(signal / max(noise, 1e-20 * signal))


def operands(rows):
    """Yield (layer, operand, stats) of rows from health()."""
    for row in rows:
        yield from ((row["fp8_layer"], name, stats) for name, stats in row.items() if isinstance(stats, dict))


def shortfall(stats):
    """dB that an operand's SQNR lies below what its format allows; an operand of zeros lacks nothing."""
    return 0.0 if stats["sqnr_db"] is None else ALLOWED[stats["format"]] - stats["sqnr_db"]


def worst(rows, n=3):
    """One line that names the n operands which lose most, for the screen: 1% of underflow counts as much as 1 dB."""
    lost = sorted(operands(rows), key=lambda row: -max(0, shortfall(row[2])) - 100 * row[2]["underflow"])[:n]
    return f"fp8 health, worst of {len(rows)} layers: " + "; ".join(
        f"{layer} {operand} {s['sqnr_db'] or 0:.1f} of {ALLOWED[s['format']]} dB in {s['format']}, "
        f"{s['underflow']:.1%} underflow" for layer, operand, s in lost)


def broken(rows):
    """The operands that hold inf or nan, in the order in which a pass computes them: the first is where to look."""
    found = [(layer, name) for layer, name, stats in operands(rows) if stats["amax"] is None]
    forward = [f"{layer} {name}" for layer, name in found if name in ("input", "weight")]
    return forward + [f"{layer} {name}" for layer, name in found[::-1] if name == "grad_output"]


def plot_health(out_dir):
    """out_dir/fp8_health.png from out_dir/metrics.jsonl: what rounding and underflow cost, layers against steps.

    Row-wise, the worse of the two casts of a tensor. Returns the path, or None where no row tells of FP8.
    """
    plt = logs.pyplot()
    rows = [row for row in logs.read_metrics(out_dir) if "fp8_layer" in row]
    if not rows:
        return None
    layers, steps = list(dict.fromkeys(r["fp8_layer"] for r in rows)), sorted({r["step"] for r in rows})
    figure, axes = plt.subplots(2, 3, figsize=(11, min(20, 2.5 + 0.24 * len(layers))), sharex=True, sharey=True,
                                layout="constrained")
    for column, operand in enumerate(("input", "weight", "grad_output")):
        for line, (title, of, style) in enumerate((
                ("dB below the format's best", shortfall, {"cmap": "Reds", "vmin": 0, "vmax": 12}),
                ("% that underflows", lambda s: 100 * s["underflow"], {"cmap": "Blues", "vmin": 0, "vmax": 10}))):
            values = [[math.nan] * len(steps) for _ in layers]
            for row in rows:
                casts = [s for name, s in row.items() if name.startswith(operand)]
                if casts:
                    values[layers.index(row["fp8_layer"])][steps.index(row["step"])] = max(map(of, casts))
            ax = axes[line, column]
            image = ax.imshow(values, aspect="auto", interpolation="nearest", **style)
            if line == 0:
                ax.set_title(operand)
            if column == 2:
                figure.colorbar(image, ax=axes[line], label=title, extend="max")
    every = -(-len(layers) // 40)
    for ax in axes[:, 0]:
        ax.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
    shown = range(0, len(steps), -(-len(steps) // 5))
    for ax in axes[1]:
        ax.set_xticks(shown, [steps[i] for i in shown])
        ax.set_xlabel("step")
    figure.savefig(out_dir / "fp8_health.png", dpi=150)
    plt.close(figure)
    return out_dir / "fp8_health.png"
