"""Does FP8 learn as well as bf16? Same weights, same batches, bf16 against every recipe, over several seeds.

    [torchrun ...] parity.py [CONFIG.py] [--key=value ...] [--variants=A,B,...] [--seeds=N] [--tolerance=PERCENT]

Every run is train.py in processes of its own. A seed gives the initial weights and the order of the data; each variant
(written as for bench.py) trains with each seed and is compared with the bf16 run of that seed. A run's final loss is
the mean of its last validation losses. The gap of a variant is the mean over seeds of (its loss - bf16's) in percent of
bf16's loss, with a 95% confidence interval (Student's t). The verdict compares the interval with the tolerance:

    equal within    all of it is inside of the tolerance, above and below
    worse           all of it is above the tolerance, or a run failed (exit status 1)
    better          all of it is below
    cannot tell     otherwise, and with one seed

Noise widens the interval, so a noisier experiment never passes more easily. Much of it comes early, when two runs part
by chance: --branch_at=N lets the variants of a seed share bf16's first N steps, in which FP8 is not tested then.

Writes out_dir/parity.json and parity.png; out_dir/VARIANT_seedN/ is each run's out_dir. Finished runs are kept and an
interrupted one continues: machines can share the work by --seed=N --seeds=1, a last call puts their runs together.
"""

import functools
import json
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import bench
import configurator
from plumbing import entry, logs
from plumbing.disk import replace_text
from plumbing.errors import RunStopped, UserError
from plumbing.schema import Natural, PositiveFloat, PositiveInt

COLUMNS = {"variant": "", "seed": "d", "final_val_loss": ".4f", "gap": "+.4f", "gap_percent": "+.3f", "time_s": ".1f",
           "time_to_bf16_loss_s": ".1f"}
# safe for color blindness; bf16 is the first
COLORS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MOST_SEEDS = 100  # beyond this, more seeds are no advice


@dataclass(kw_only=True)
class ParityConfig:
    """Keys of parity.py."""

    variants: str = "bf16,tensorwise,tensorwise:fp8.filter_fqns=[],rowwise,rowwise_with_gw_hp"  # bf16 first
    seeds: PositiveInt = 3  # runs of each variant, with seeds from config.seed on
    tolerance: PositiveFloat = 0.25  # a gap of this many percent of the loss counts as none
    last_evals: PositiveInt = 5  # a run's final loss is the mean of this many last evaluations
    branch_at: Natural = 0  # variants start from bf16's checkpoint of this step, for less noise; 0: initial weights

    def problems(self):
        """Yield a message for each value that cannot be used."""
        yield from bench.variant_problems(self.variants)
        baseline, *others = bench.split(self.variants)
        distinct = set(map(bench.slug, others)) - {"bf16"}  # a folder each: one named twice would count as more seeds
        if baseline != "bf16" or not others or len(distinct) < len(others):
            yield f"--variants={self.variants} must be bf16, then the variants to compare with it, each once"


# ----------------------------------------------------------------------------------------------------------------
# runs


def plan(own, config, base):
    """[(variant, seed, folder, config)] of all runs, seed by seed.

    Raises UserError if a variant's keys are wrong, or if a folder holds a run with another config.
    """
    runs = []
    for seed in range(config.seed, config.seed + own.seeds):
        for variant in bench.split(own.variants):
            folder = base.parent / f"{bench.slug(variant)}_seed{seed}"
            keys = ["--resume=auto", f"--seed={seed}", f"--out_dir={folder}", *bench.flags(variant)]
            if own.branch_at and variant == "bf16":
                keys += [f"--checkpoint_interval={own.branch_at}", "--keep=0"]
            wanted = configurator.load([str(base), *keys])
            if changes := configurator.changed(folder / "wanted.py", wanted):
                raise UserError(f"{folder} holds a run of another config{changes}: set another out_dir")
            runs.append((variant, seed, folder, wanted))
    return runs


def read(folder):
    """The evaluations of a run so far, as lists: step, val_loss, and time_s, seconds of training."""
    rows = logs.read_metrics(folder)
    times = {0: 0.0} | {row["step"]: row["time_s"] for row in rows if "loss" in row}
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    return {"step": [*losses], "val_loss": [math.nan if loss is None else loss for loss in losses.values()],
            # an evaluation has no time of its own: it is interpolated between training rows
            "time_s": np.interp([*losses], [*times], [*times.values()]).tolist()}


def train_all(runs, own):
    """Train what is not finished: a row of each run, {variant, seed, out_dir, curves as of read()}.

    A failed run has `error`, its reason, instead of curves. Raises RunStopped if it is a bf16 run.
    """
    rows, runs, started = [], list(runs), time.monotonic()
    for variant, seed, folder, config in runs:
        left = bench.time_left(started, len(rows), len(runs))
        print(f"{variant}, seed {seed}: {config.max_steps} steps{left}", end=" ... ", flush=True)
        row = {"variant": variant, "seed": seed, "out_dir": str(folder)}
        try:
            if read(folder)["step"][-1:] != [config.max_steps]:
                if own.branch_at and variant != "bf16" and not (folder / "checkpoints").exists():
                    start = f"checkpoints/step_{own.branch_at:08}"
                    shutil.copytree(folder.with_name(f"bf16_seed{seed}") / start, folder / start,
                                    copy_function=os.link)  # no second copy on disk: none is written to
                replace_text(folder / "wanted.py", configurator.to_python(config))
                bench.train([bench.TRAIN, folder / "wanted.py"], folder / "log.txt")
            curves = read(folder)
            if not math.isfinite(sum(curves["val_loss"][-own.last_evals :])):
                raise RunStopped("its validation loss ends as inf or nan")
            row["curves"] = curves
            print(f"validation loss {curves['val_loss'][-1]:.4f}", flush=True)
        except RunStopped as error:
            if variant == "bf16":
                raise RunStopped(f"a bf16 run failed, so there is nothing to compare with: {error}") from error
            row["error"] = str(error)
            print(error, flush=True)
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------------------
# the verdict


@functools.cache
def student_t(degrees):
    """The bound that a Student t variable of so many degrees of freedom stays within, with a probability of 95%."""
    # t = sqrt(degrees) tan(angle), and the density of the angle is cos(angle)^(degrees - 1)
    angles = (np.arange(100_000) + 0.5) / 100_000 * math.pi / 2
    mass = np.cumsum(np.cos(angles) ** (degrees - 1))
    return math.sqrt(degrees) * math.tan(np.interp(0.95 * mass[-1], mass, angles))


def interval(gaps, tolerance):
    """{gap_percent, low, high, verdict, seeds_needed} of the gaps of all seeds, in percent; None where there is none.

    seeds_needed: for a verdict, if gap and noise stay as they are; None for more than MOST_SEEDS too.
    """
    mean, low, high, verdict, needed = statistics.fmean(gaps), None, None, "cannot tell", None
    if len(gaps) > 1:
        noise = statistics.stdev(gaps)

        def half_width(n):
            return student_t(n - 1) * noise / math.sqrt(n)

        low, high = mean - half_width(len(gaps)), mean + half_width(len(gaps))
        if -tolerance <= low and high <= tolerance:
            verdict = "equal within"
        elif low > tolerance:
            verdict = "worse"
        elif high < -tolerance:
            verdict = "better"
        else:
            margin = abs(abs(mean) - tolerance)
            needed = next((n for n in range(len(gaps) + 1, MOST_SEEDS + 1) if half_width(n) <= margin), None)
    return {"gap_percent": mean, "low": low, "high": high, "verdict": verdict, "seeds_needed": needed}


def judge(rows, own):
    """The report on the rows of train_all, which get final losses and gaps to bf16 with the same seed, in nats.

    intervals: one a variant. noise: the standard deviation of bf16's final losses over seeds; None for one seed.
    verdict: "worse" if a variant is, else "cannot tell" if that holds for one.
    """
    twins = {}  # final losses of bf16 by seed
    for row in (row for row in rows if "error" not in row):
        loss = statistics.fmean(row["curves"]["val_loss"][-own.last_evals :])
        twin = twins.setdefault(row["seed"], loss)  # the first run of a seed is that of bf16
        row |= {"final_val_loss": loss, "time_s": row["curves"]["time_s"][-1], "gap": loss - twin,
                "gap_percent": 100 * (loss - twin) / twin, "time_to_bf16_loss_s": time_to(twin, row["curves"])}
    intervals = []
    for variant in dict.fromkeys(row["variant"] for row in rows if row["variant"] != "bf16"):
        of_variant = [row for row in rows if row["variant"] == variant]
        gaps = [row["gap_percent"] for row in of_variant if "gap" in row]
        failed = any("error" in row for row in of_variant)
        result = {"verdict": "worse"} if failed else interval(gaps, own.tolerance)
        intervals.append({"variant": variant, "seeds": len(gaps), **result})
    found = {result["verdict"] for result in intervals}
    return {"rows": rows, "intervals": intervals, "tolerance": own.tolerance, "last_evals": own.last_evals,
            "noise": statistics.stdev(twins.values()) if len(twins) > 1 else None,
            "verdict": next((v for v in ("worse", "cannot tell", "equal within", "better") if v in found), None)}


def time_to(loss, curves):
    """Seconds until a run's validation loss reached `loss`, interpolated between evaluations; None if it did not."""
    times, losses = curves["time_s"], curves["val_loss"]
    for i, value in enumerate(losses):
        if value <= loss:
            return float(np.interp(loss, [value, losses[i - 1]], [times[i], times[i - 1]])) if i else times[0]
    return None


def sentence(result, tolerance):
    """An interval as a line of text, with what a verdict would take where there is none."""
    if "gap_percent" not in result:
        return f"{result['variant']}: worse, a run failed"
    n, needed = result["seeds"], result["seeds_needed"]
    found = f"{result['variant']}: {result['gap_percent']:+.3f}% of bf16's loss"
    if result["low"] is None:
        return f"{found}, one seed: cannot tell, an interval needs --seeds=2 or more"
    found += f", 95% interval {result['low']:+.3f} to {result['high']:+.3f}, {n} seeds: {result['verdict']}"
    if result["verdict"] != "cannot tell":
        return f"{found} {tolerance}%"
    seeds = f"about {needed}" if needed else f"more than {MOST_SEEDS}"
    return f"{found} at {tolerance}%; it would take {seeds} seeds, or quieter runs: more steps, larger batches"


def plot(report, path):
    """Plot validation loss against seconds, and the interval of every variant with the tolerance."""
    from matplotlib.figure import Figure

    runs = [row for row in report["rows"] if "curves" in row]
    colors = {variant: COLORS[i % len(COLORS)] for i, variant in enumerate(dict.fromkeys(r["variant"] for r in runs))}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    loss_axes, gap_axes = figure.subplots(1, 2)
    late = []  # losses behind the first fall, which set the scale
    for row in runs:
        times, losses = row["curves"]["time_s"], row["curves"]["val_loss"]
        loss_axes.plot(times, losses, color=colors[row["variant"]], lw=1.2)
        late += losses[len(losses) // 5 :]
    loss_axes.set(xlabel=f"seconds of training, {report['hardware']}", ylabel="validation loss, nats per token",
                  ylim=(0.99 * min(late), 1.01 * max(late)),
                  title=f"{report['max_steps']:,} steps of {report['tokens_per_step']:,} tokens; bf16 in black")
    tolerance, shown = report["tolerance"], [result for result in report["intervals"] if "gap_percent" in result]
    gap_axes.axvspan(-tolerance, tolerance, color="0.9")
    gap_axes.axvline(0, color=colors["bf16"])
    names = ["\n".join([*bench.split(result["variant"], ":"), result["verdict"]]) for result in shown]
    gap_axes.set_yticks(range(len(shown)), names, fontsize=8)
    for y, result in enumerate(shown):
        color = colors[result["variant"]]
        seeds = [row["gap_percent"] for row in runs if row["variant"] == result["variant"] and "gap" in row]
        gap_axes.plot([result["low"], result["high"]], [y, y], color=color, lw=3, solid_capstyle="butt")
        gap_axes.plot(seeds, [y] * len(seeds), "o", ms=4, mfc="white", color=color)
        gap_axes.get_yticklabels()[y].set_color(color)
    gap_axes.set(xlabel=f"gap to bf16 in % of its loss, tolerance ±{tolerance}% shaded",
                 title="95% interval (bar) and seeds (dots)", ylim=(max(len(shown), 1) - 0.5, -0.5))
    for ax in (loss_axes, gap_axes):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    own = ParityConfig()
    config, base = bench.prepare(own, "parity_150m.py" if torch.cuda.is_available() else "parity_tiny.py")
    every = config.eval_interval
    n_evals = math.ceil(config.max_steps / every) - own.branch_at // every if every else 0
    if n_evals < own.last_evals:
        raise UserError(f"a final loss is the mean of last_evals={own.last_evals} evaluations, these runs have "
                        f"{n_evals}: set eval_interval to about max_steps / 20, or --last_evals")
    bench.report_ignored({"resume"})
    out_dir = base.parent
    rows = train_all(plan(own, config, base), own)
    run = json.loads(Path(rows[0]["out_dir"], "run.json").read_text())
    report = {**bench.header(run), "max_steps": config.max_steps, **judge(rows, own)}
    (out_dir / "parity.json").write_text(json.dumps(report, indent=1))
    plot(report, out_dir / "parity.png")
    print("", logs.table(report["rows"], COLUMNS), "", sep="\n")
    for result in report["intervals"]:
        print(sentence(result, own.tolerance))
    bench.finish(config, out_dir / "parity.json", out_dir / "parity.png")
    return int(report["verdict"] == "worse")


if __name__ == "__main__":
    entry.run(main)
