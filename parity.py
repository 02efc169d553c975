"""Compare how FP8 and bf16 learn: the same weights and data, trained in bf16 and with every recipe.

    [torchrun ...] parity.py [CONFIG.py] [--key=value ...] [--variants=bf16,tensorwise,...] [--seeds=3]

Every run is train.py in processes of its own. bf16 is trained with several seeds, each with its own initial weights and
order of the data; the standard deviation of their final validation losses is the noise. Every FP8 variant (written as
for bench.py) uses the first seed and is compared with the bf16 run of that seed, its twin. It is outside the band if it
ends above its twin by more than 2 sqrt(2) noise, two standard deviations of the difference between two runs. The exit
status is 1 if a variant is outside, or if a run failed. The noise of three seeds is itself uncertain by half.
--seeds=1 shows curves and gaps without a verdict, where more bf16 runs cost too much.

Writes out_dir/parity.json and parity.png; out_dir/VARIANT_seedN/ is each run's out_dir. The same command again keeps
the runs that are finished and continues the one that was interrupted.
"""

import json
import math
import statistics
import sys
from dataclasses import dataclass

import numpy as np
import torch

import bench
import configurator
from plumbing import entry, logs
from plumbing.disk import replace_text
from plumbing.errors import RunStopped, UserError

COLUMNS = {"variant": "", "seed": "d", "final_val_loss": ".4f", "gap": "+.4f", "gap_percent": "+.3f",
           "smoothed_gap": "+.4f", "time_s": ".1f", "time_to_bf16_loss_s": ".1f", "inside": ""}
SMOOTH = 0.1  # the smoothed gap between training losses is a running mean over this share of a run
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")  # safe for color blindness


@dataclass(kw_only=True)
class ParityConfig:
    """Keys of parity.py."""

    variants: str = "bf16,tensorwise,tensorwise:fp8.filter_fqns=[],rowwise,rowwise_with_gw_hp"  # bf16 first
    seeds: int = 3  # bf16 runs, with seeds from config.seed on; 1: no noise is known, so no band and no verdict

    def problems(self):
        """Yield ({keys involved}, message) for each value that cannot be used."""
        yield from bench.variant_problems(self.variants)
        baseline, *others = bench.split(self.variants)
        if baseline != "bf16" or not others or "bf16" in others:
            yield {"variants"}, f"--variants={self.variants} must be bf16, then the variants to compare with it"
        if self.seeds < 1:
            yield {"seeds"}, f"--seeds={self.seeds} must be at least 1"


def plan(own, config, base):
    """[(variant, seed, folder)] of all runs; writes the config of each to folder/wanted.py.

    Raises UserError if a variant's keys are wrong, or if a folder holds a run with another config.
    """
    runs = []
    for variant in bench.split(own.variants):
        for seed in range(config.seed, config.seed + (own.seeds if variant == "bf16" else 1)):
            folder = base.parent / f"{bench.slug(variant)}_seed{seed}"
            keys = ["--resume=auto", f"--seed={seed}", f"--out_dir={folder}", *bench.flags(variant)]
            runs.append((variant, seed, folder, configurator.to_python(configurator.load([str(base), *keys]))))
    for *_, folder, text in runs:  # all variants have been checked
        wanted = folder / "wanted.py"
        if config.resume != "never" and wanted.exists() and wanted.read_text() != text:
            raise UserError(f"{wanted} is another config than this command gives: set another out_dir, or "
                            "resume=never to start over")
        replace_text(wanted, text)
    return [(variant, seed, folder) for variant, seed, folder, _ in runs]


def read(folder):
    """The curves of a run so far, as lists: step, loss, time_s, and val_step, val_loss, val_time_s of evaluations."""
    rows = logs.read_metrics(folder)
    train, val = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
    curves = {key: [row[key] for row in train] for key in ("step", "loss", "time_s")}
    curves |= {"val_step": [row["step"] for row in val],
               "val_loss": [math.nan if row["val_loss"] is None else row["val_loss"] for row in val]}
    # an evaluation has no time of its own: it is interpolated between training rows
    times = np.interp(curves["val_step"], [0, *curves["step"]], [0.0, *curves["time_s"]])
    return {**curves, "val_time_s": times.tolist()}


def time_to(loss, curves):
    """Seconds until a run's validation loss reached `loss`, interpolated between evaluations; None if it did not."""
    times, losses = curves["val_time_s"], curves["val_loss"]
    for i, value in enumerate(losses):
        if value <= loss:
            return float(np.interp(loss, [value, losses[i - 1]], [times[i], times[i - 1]])) if i else times[0]
    return None


def paired_gap(curves, twin):
    """(steps, training loss minus the twin's on the same batches), as running means over SMOOTH of a run."""
    twin_loss = dict(zip(twin["step"], twin["loss"], strict=True))  # by step, as a resumed run has one more row
    points = [(step, loss - twin_loss[step]) for step, loss in zip(curves["step"], curves["loss"], strict=True)
              if loss is not None and twin_loss.get(step) is not None]  # a skipped step has no loss
    mean = np.ones(max(1, round(SMOOTH * len(points))))
    return [np.convolve(column, mean / len(mean), "valid") for column in zip(*points, strict=True)]


def judge(results):
    """{"noise", "band", "target_loss", "rows", "verdict"} of [(variant, seed, curves or the reason of a failure)].

    Losses, noise and band are in nats. target_loss is the edge of the band, which every variant inside it reaches.
    With one bf16 run, noise, band and every `inside` are None, and the verdict too unless a variant failed.
    """
    twin, *others = [curves["val_loss"][-1] for variant, _, curves in results if variant == "bf16"]
    noise = statistics.stdev([twin, *others]) if others else None
    band = 2 * math.sqrt(2) * noise if others else None
    rows, target = [], twin + (band or 0.0)
    for variant, seed, curves in results:
        if isinstance(curves, str):
            rows.append({"variant": variant, "seed": seed, "error": curves, "inside": False})
            continue
        gap = curves["val_loss"][-1] - twin
        row = {"variant": variant, "seed": seed, "final_val_loss": curves["val_loss"][-1], "gap": gap,
               "gap_percent": 100 * gap / twin, "smoothed_gap": None, "time_s": curves["time_s"][-1],
               "time_to_bf16_loss_s": time_to(target, curves), "inside": None}
        if variant != "bf16":
            row["smoothed_gap"] = paired_gap(curves, results[0][2])[1][-1].item()
        if band is not None:
            row["inside"] = variant == "bf16" or gap <= band
        rows.append(row)
    verdict = "pass" if others else None
    if any(row["inside"] is False for row in rows):
        verdict = "fail"
    return {"noise": noise, "band": band, "target_loss": target, "rows": rows, "verdict": verdict}


def plot(results, report, path):
    """Plot validation loss against steps, tokens and time, and the gap to bf16 with the band."""
    from matplotlib.figure import Figure

    runs = [run for run in results if not isinstance(run[2], str)]
    twin, band, final = runs[0][2], report["band"], report["rows"][0]["final_val_loss"]
    scale, late_gaps, colors = report["tokens_per_step"] / 1e6, [band or 0.0], iter(COLORS * 3)
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    for variant, seed, curves in runs:
        if variant == "bf16":
            style = {"color": "black", "lw": 2.2} if curves is twin else {"color": "0.6", "lw": 1}
            label = f"bf16, seed {seed}"
        else:
            style = {"color": next(colors), "lw": 1.3}
            label = variant.replace(":fp8.", ", ").replace(":", ", ").replace("=True", "")
            gaps = np.subtract(curves["val_loss"], twin["val_loss"])
            late_gaps += abs(gaps[len(gaps) // 2:]).tolist()
            axes[2].plot(*paired_gap(curves, twin), **style)
            axes[2].plot(curves["val_step"], gaps, "o", ms=3, color=style["color"])
        axes[0].plot(curves["val_step"], curves["val_loss"], label=label, **style)
        axes[1].plot(curves["val_time_s"], curves["val_loss"], **style)
    late = [loss for *_, curves in runs for loss in curves["val_loss"][len(curves["val_loss"]) // 5:]]
    margin = 0.05 * (max(late) - min(late))
    limits = min(late) - margin, max(late) + margin
    axes[0].set(xlabel="step", ylabel="validation loss, nats per token", ylim=limits)
    axes[0].secondary_xaxis("top", functions=(lambda s: s * scale, lambda t: t / scale)).set_xlabel("million tokens")
    axes[1].axhline(report["target_loss"], color="0.3", ls=":", lw=1,
                    label="bf16's final loss" + (" + band" if band else ""))
    axes[1].set(xlabel=f"seconds of training, {report['hardware']}", ylim=limits)
    if band:
        axes[2].axhspan(-band, band, color="0.88", label=f"band, 2.8 standard deviations of bf16 seeds: ±{band:.4f}")
    axes[2].axhline(0, color="black", lw=1)
    axes[2].set(xlabel="step", ylabel="nats", title="gap to bf16: training (line), validation (dots)")
    widest = 1.3 * (max(late_gaps) or 1e-3)
    axes[2].set_ylim(-widest, widest)
    percent = lambda g: 100 * g / final, lambda p: p * final / 100
    axes[2].secondary_yaxis("right", functions=percent).set_ylabel("% of the final loss")
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=200)


def main():
    own = ParityConfig()
    config, base = bench.prepare(own, "parity_150m.py" if torch.cuda.is_available() else "parity_tiny.py")
    if not config.eval_interval:
        raise UserError("eval_interval=0: parity.py compares validation losses, set it to about max_steps / 20")
    out_dir, results = base.parent, []
    start_over = ["--resume=never"] if config.resume == "never" else []
    for variant, seed, folder in plan(own, config, base):
        print(f"{variant}, seed {seed}: {config.max_steps} steps", end=" ... ", flush=True)
        try:
            if start_over or read(folder)["val_step"][-1:] != [config.max_steps]:
                bench.train([folder / "wanted.py", *start_over], folder / "log.txt")
            result = read(folder)
            if not math.isfinite(result["val_loss"][-1]):
                raise RunStopped("its validation loss ends as inf or nan")
            print(f"validation loss {result['val_loss'][-1]:.4f}", flush=True)
        except RunStopped as error:
            result = str(error)
            print(result, flush=True)
            if variant == "bf16":
                raise RunStopped(f"a bf16 run failed, so there is nothing to compare with: {error}") from error
        results.append((variant, seed, result))
    run = json.loads((out_dir / f"bf16_seed{config.seed}" / "run.json").read_text())
    report = {**bench.header(run), "max_steps": config.max_steps, **judge(results),
              "curves": {f"{variant} seed {seed}": curves for variant, seed, curves in results}}
    (out_dir / "parity.json").write_text(json.dumps(report, indent=1))
    plot(results, report, out_dir / "parity.png")
    print("", bench.table(report["rows"], COLUMNS), "", sep="\n")
    noise, band, target = report["noise"], report["band"], report["target_loss"]
    print(f"time_to_bf16_loss_s: until a validation loss of {target:.4f}")
    outside = ", ".join(row["variant"] for row in report["rows"] if row["inside"] is False)
    if band is None:
        print("no band, as one bf16 run shows no noise" + (f"; failed: {outside}" if outside else ""))
    else:
        print(f"noise of bf16 seeds {noise:.4f} nats, band {band:.4f} ({band / target:.2%})")
        print(f"outside the band: {outside}" if outside else "every variant ends inside the band")
    bench.finish(config, out_dir / "parity.json", out_dir / "parity.png")
    sys.exit(report["verdict"] == "fail")


if __name__ == "__main__":
    entry.run(main)
