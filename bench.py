"""Measure the speed of FP8 on this machine: bf16 and every recipe, each trained by train.py in processes of its own.

    [torchrun ...] bench.py [CONFIG.py] [--key=value ...] [--variants=bf16,tensorwise,rowwise,rowwise_with_gw_hp]
    python bench.py [CONFIG.py] [--key=value ...] --gemms

A variant is bf16 or a recipe, with more keys after colons: `tensorwise:fp8.filter_fqns=[]:loss_chunks=8`. Everything
else comes from the config (default: config/llama_fp8.py). Writes out_dir/bench.json and bench.png; out_dir/VARIANT/
has each variant's metrics and log. Exit status 1 if a variant failed.

--gemms times every kind of linear layer alone, in bf16 and in FP8 with its casts. With the time of a bf16 step it
predicts the step with all of them in FP8, and with those that get faster. In a model casts fuse and cost less.
"""

import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import configurator
from checks import gemms
from formats import files
from fp8 import RECIPES
from plumbing import entry, logs
from plumbing.errors import RunStopped, UserError
from plumbing.ranks import process_rank

REPO = Path(__file__).parent
TRAIN = (REPO / "train.py",)  # the program that trains a variant
FIXED = {"max_steps", "log_interval", "eval_interval", "checkpoint_interval", "resume"}  # set by this script
NOT_PER_VARIANT = FIXED | {"seed", "out_dir"}
WINDOW = 5  # steps per timing: to synchronize with the GPU after every step would slow each of them
COLUMNS = {"variant": "", "ms_per_step": ".1f", "spread_ms": ".1f", "tokens_per_s": ",.0f", "speedup": ".2f",
           "mfu": ".1%", "peak_gib": ".2f", "compile_s": ".1f"}


@dataclass(kw_only=True)
class BenchConfig:
    """Keys of bench.py."""

    variants: str = ",".join(["bf16", *RECIPES])  # what to compare; speedup is relative to the first
    steps: int = 40  # timed steps of each variant
    warmup: int = 10  # steps before they are timed
    gemms: bool = False  # time the linear layers one by one instead: which of them does FP8 make faster

    def problems(self):
        """Yield ({keys involved}, message) for each value that cannot be used."""
        for message in mistakes(self.variants):
            yield {"variants"}, message
        if self.steps < 2 * WINDOW or self.steps % WINDOW or self.warmup % WINDOW or self.warmup < 0:
            yield {"steps", "warmup"}, (
                f"--steps={self.steps} and --warmup={self.warmup} must be multiples of {WINDOW}, steps at least twice")


def split(variants):
    """The list of variants; commas inside brackets do not separate."""
    return re.split(r",(?![^\[]*\])", variants)


def mistakes(variants):
    """Yield a message for each variant that cannot be used."""
    for variant in split(variants):
        base, *keys = variant.split(":")
        if base not in ("bf16", *RECIPES):
            yield f"--variants: {variant!r} does not start with one of bf16, {', '.join(RECIPES)}"
        not_allowed = sorted(NOT_PER_VARIANT.intersection(key.partition("=")[0] for key in keys))
        if not_allowed:
            yield f"--variants: {variant!r} sets {', '.join(not_allowed)}, which must be the same for all variants"


def on_cpu(config):
    return config.device == "cpu" or not torch.cuda.is_available()


def arguments(default):
    """The command line's arguments, with config/`default` if they name no config file."""
    argv = sys.argv[1:]
    if all(arg.startswith("-") for arg in argv):
        argv = [str(REPO / "config" / default), *argv]
    return argv


def prepare(own, default):
    """(config, path of a config file with it) from the command line; None on all ranks but 0.

    own: the calling script's own keys, as for configurator.load. default: the file in config/ if the command line names
    none. Without a GPU, FP8 is emulated.
    """
    config = configurator.load(arguments(default), own)
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise UserError("this script works on one machine: start torchrun without --nnodes")
    if process_rank() > 0:
        return None  # rank 0 starts the processes of every variant
    files.find_files([*config.data.train, *config.data.val], set(files.KINDS.values()))  # report a wrong path once
    config.fp8.emulate |= on_cpu(config)
    base = Path(config.out_dir, "base_config.py")
    base.parent.mkdir(parents=True, exist_ok=True)
    base.write_text(configurator.to_python(config))
    return config, base


def report_ignored(keys):
    """Print the arguments of the command line that have no effect, as the calling script sets these keys itself."""
    ignored = [arg for arg in sys.argv[1:] if arg.partition("=")[0].removeprefix("--") in keys]
    if ignored:
        print(f"{' '.join(ignored)}: no effect here, this script sets that itself", flush=True)


def slug(variant):
    """A variant as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "_", variant)


def flags(variant):
    """The arguments of train.py for a variant."""
    base, *more = variant.split(":")
    keys = ["--fp8.enabled=False"] if base == "bf16" else ["--fp8.enabled=True", f"--fp8.recipe_name={base}"]
    recipe = RECIPES.get(base)
    if recipe and not recipe.all_gather:
        keys += ["--fp8.enable_fsdp_float8_all_gather=False", "--fp8.precompute_float8_dynamic_scale_for_fsdp=False"]
    if recipe and not recipe.keep_casts:
        keys += ["--fp8.keep_casts=False"]
    return keys + [f"--{key}" for key in more]


def train(args, log, program=TRAIN):
    """Train in new processes, as many as torchrun started of this one. Returns None, or the reason of a failure.

    log: the file for their output. program: a script and its first arguments. Call it on rank 0 only.
    """
    command = [*program, *args]
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):  # a torchrun per variant, which ends all its ranks
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    with log.open("w") as output:
        status = subprocess.run([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT).returncode
    if status == 0:
        return None
    reason = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|\.py): ")
    lines = [line for line in log.read_text().splitlines() if reason.match(line) and "ChildFailedError" not in line]
    return lines[-1] if lines else f"exit status {status}, see {log}"


def measure(variant, base, folder, own, program):
    """Train a variant: (its row of the table, its run.json), or (a row with `error`, {}) if that failed."""
    error = train([base, f"--out_dir={folder}", "--resume=never", "--eval_interval=0", "--checkpoint_interval=0",
                   f"--log_interval={WINDOW}", f"--max_steps={own.warmup + own.steps}", *flags(variant)],
                  folder / "log.txt", program)
    if error:
        return {"variant": variant, "error": error}, {}
    run = json.loads((folder / "run.json").read_text())
    rows = logs.read_metrics(folder)
    timed = [row for row in rows if "loss" in row and row["step"] > own.warmup and row["step"] % WINDOW == 0]
    per_rank = timed[0]["tokens"] / timed[0]["step"] / run["ranks"]
    ms = [1000 * per_rank / row["tokens_per_s"] for row in timed]
    median = statistics.median(ms)
    tokens_per_s = 1000 * per_rank / median
    mfu = run["flops_per_token"] * tokens_per_s / run["peak_flops"] if run["peak_flops"] else None
    return {"variant": variant, "ms_per_step": median, "spread_ms": max(ms) - min(ms),
            "tokens_per_s": tokens_per_s, "speedup": None, "mfu": mfu,
            "peak_gib": timed[-1]["peak_gib"], "compile_s": run["compile_s"], "loss": timed[-1]["loss"],
            "fp8_flops": run["fp8_flops"], "auto_filtered": run["auto_filtered"], "ms": ms}, run


def compare(runs, base, own, path):
    """Train [(name, variant, program)] one after the other: (the report, with a row for each; the last run.json).

    path: the report's file, or None. It is written after every run, so that an interrupted bench keeps its results.
    """
    report_ignored(FIXED)
    for _, variant, _ in runs:  # fail early: check all of them before the first runs
        configurator.load([str(base), *flags(variant)])
    report = {"hardware": None, "versions": None, "git_commit": None, "date": datetime.date.today().isoformat(),
              "command": sys.argv, "tokens_per_step": None, "rows": []}
    rows = report["rows"]
    for name, variant, program in runs:
        print(f"{name}: {own.warmup} + {own.steps} steps", end=" ... ", flush=True)
        folder = base.parent / slug(name)
        folder.mkdir(parents=True, exist_ok=True)
        row, run = measure(variant, base, folder, own, program)
        rows.append({**row, "variant": name})
        report |= {key: run[key] for key in ("hardware", "versions", "git_commit", "tokens_per_step") if key in run}
        if "error" not in row and "error" not in rows[0]:
            rows[-1]["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        print("failed" if "error" in row else f"{row['ms_per_step']:.1f} ms", flush=True)
        if path:
            path.write_text(json.dumps(report, indent=1))
    return report, run


def table(rows, columns):
    """Rows as aligned text. columns: {key: format}; the first names the row, and is aligned to the left."""
    lines = [list(columns)]
    for row in rows:
        cells = ["n/a" if row.get(key) is None else format(row[key], columns[key]) for key in columns]
        lines.append([cells[0], f"failed: {row['error']}"] if "error" in row else cells)
    widths = [max(len(line[i]) for line in lines if len(line) == len(columns)) for i in range(len(columns))]
    widths[0] = max(len(line[0]) for line in lines)
    text = []
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        text.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(text)


def plot(rows, title, path):
    """Draw bars of tokens per second, labelled with the speedup, and of peak memory."""
    plt = logs.pyplot()
    rows = [row for row in rows if "error" not in row][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1 + 0.5 * len(rows)), sharey=True, layout="constrained")
    names = [row["variant"] for row in rows]
    speed = axes[0].barh(names, [row["tokens_per_s"] for row in rows], color="tab:blue")
    labels = [f"{row['tokens_per_s']:,.0f} ({row['speedup'] or float('nan'):.2f}x)" for row in rows]
    axes[0].bar_label(speed, labels, padding=3)
    axes[0].set(xlabel="tokens per second and GPU")
    memory = axes[1].barh(names, [row["peak_gib"] for row in rows], color="tab:gray")
    axes[1].bar_label(memory, fmt="%.1f", padding=3)
    axes[1].set(xlabel="peak memory, GiB")
    for ax in axes:
        ax.margins(x=0.5)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def warn_if_emulated(config):
    if on_cpu(config):
        print("On a CPU FP8 is emulated: these speeds say nothing about FP8.")


def main():
    own = BenchConfig()
    prepared = prepare(own, "llama_fp8.py")
    if prepared is None:
        return
    config, base = prepared
    out_dir = Path(config.out_dir)
    if own.gemms:
        own.variants = "bf16"
    report, run = compare([(variant, variant, TRAIN) for variant in split(own.variants)], base, own,
                          None if own.gemms else out_dir / "bench.json")
    rows = report["rows"]
    if all("error" in row for row in rows):
        raise RunStopped(f"nothing ran: {rows[0]['error']}")
    if own.gemms:
        device = torch.device("cpu" if on_cpu(config) else "cuda")
        passes = config.global_batch_size // (config.micro_batch_size * run["ranks"])
        bf16_config = configurator.read_file(out_dir / "bf16" / "config.py")  # has init_from's model
        model = replace(bf16_config.model, block_size=run["block_size"])  # the length of the data's rows
        report["gemms"] = gemms.time_linears(replace(bf16_config, model=model, fp8=config.fp8), device, passes)
        (out_dir / "gemms.json").write_text(json.dumps(report, indent=1))
        print("", gemms.table(report["gemms"], rows[0]["ms_per_step"]), "", sep="\n")
        warn_if_emulated(config)
        print(f"written: {out_dir / 'gemms.json'}")
        return
    title = f"{report['hardware']}, {config.model.n_layer} layers x {config.model.n_embd}"
    plot(rows, title, out_dir / "bench.png")
    print("", f"{report['hardware']}, median of {own.steps // WINDOW} x {WINDOW} steps; speedup is relative to "
          f"{rows[0]['variant']}, mfu to the bf16 peak", table(rows, COLUMNS), "", sep="\n")
    warn_if_emulated(config)
    print(f"written: {out_dir / 'bench.json'}, {out_dir / 'bench.png'}")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    entry.run(main)
