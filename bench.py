"""Measure the speed of FP8 on this machine: bf16 and every recipe, each trained by train.py in processes of its own.

    [torchrun ...] bench.py [CONFIG.py] [--key=value ...] [--variants=bf16,tensorwise,rowwise,rowwise_with_gw_hp]
    python bench.py [CONFIG.py] [--key=value ...] --gemms

A variant is bf16 or a recipe, with more keys after colons: `tensorwise:fp8.filter_fqns=[]:loss_chunks=8`. Everything
else comes from the config (default: config/llama_fp8.py). Writes out_dir/bench.json and bench.png; out_dir/VARIANT/
has each variant's metrics and log. ms_per_step is a median; slowest_ms is the longest of all steps after the second, so
that a stall cannot hide. Exit status 1 if a variant failed.

--gemms times every kind of linear layer alone, in bf16 and with the recipes of --variants, casts included (in a model
they fuse and cost less), and predicts the time of a step with each recipe and with the fastest for each layer.
"""

import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import configurator
from checks import gemms
from formats import files
from fp8 import RECIPES
from plumbing import entry, logs
from plumbing.disk import replace_text
from plumbing.errors import RunStopped, UserError
from plumbing.ranks import from_launcher, process_rank

REPO = Path(__file__).parent
TRAIN = REPO / "train.py"
FIXED = {"max_steps", "log_interval", "eval_interval", "checkpoint_interval", "resume"}  # set by this script
NOT_PER_VARIANT = FIXED | {"seed", "out_dir"}
WINDOW = 5  # steps per timing: to synchronize with the GPU after every step would slow each of them
COLUMNS = {"variant": "", "ms_per_step": ".1f", "spread_ms": ".1f", "slowest_ms": ".1f", "tokens_per_s": ",.0f",
           "speedup": ".2f", "mfu": ".1%", "peak_gib": ".2f", "compile_s": ".1f"}


@dataclass(kw_only=True)
class BenchConfig:
    """Keys of bench.py."""

    variants: str = "bf16,tensorwise,rowwise,rowwise_with_gw_hp"  # what to compare; speedup is relative to the first
    steps: int = 40  # timed steps of each variant
    warmup: int = 10  # steps before they are timed
    gemms: bool = False  # time the linear layers one by one instead: which of them does FP8 make faster

    def problems(self):
        """Yield a message for each value that cannot be used."""
        yield from variant_problems(self.variants)
        if self.steps < 2 * WINDOW or self.steps % WINDOW or self.warmup % WINDOW or self.warmup < 0:
            yield f"--steps={self.steps} and --warmup={self.warmup} must be multiples of {WINDOW}, steps at least twice"


def split(text, separator=","):
    """The parts of text, such as the variants of a list; separators inside of brackets and braces do not count."""
    return re.split(separator + r"(?![^\[{]*[\]}])", text)


def variant_problems(variants):
    """Yield a message for each variant that cannot be used."""
    for variant, n in Counter(split(variants)).items():
        base, *keys = split(variant, ":")
        if n > 1:
            yield f"--variants: {variant!r} is there {n} times"
        if base not in ("bf16", *RECIPES):
            yield f"--variants: {variant!r} does not start with one of bf16, {', '.join(RECIPES)}"
        if fixed := sorted(NOT_PER_VARIANT.intersection(key.partition("=")[0] for key in keys)):
            yield f"--variants: {variant!r} sets {', '.join(fixed)}, which must be the same for all variants"


def on_cpu(config):
    return config.device == "cpu" or not torch.cuda.is_available()


def arguments(default):
    """The command line's arguments, with config/`default` if they name no config file."""
    named = any(not arg.startswith("-") for arg in sys.argv[1:])
    return sys.argv[1:] if named else [str(REPO / "config" / default), *sys.argv[1:]]


def prepare(own, default):
    """(config, path of a config file with it) from the command line; FP8 is emulated where there is no GPU.

    own, default: as for configurator.load and arguments(). Ends all ranks but 0, which starts the processes.
    """
    config = configurator.load(arguments(default), own)
    if from_launcher("GROUP_WORLD_SIZE", 1) > 1:
        raise UserError("this script works on one machine: start torchrun without --nnodes")
    if process_rank() > 0:
        sys.exit(0)
    files.find_files([*config.data.train, *config.data.val])  # report a wrong path once
    config.fp8.emulate |= on_cpu(config)
    base = Path(config.out_dir, "base_config.py")
    replace_text(base, configurator.to_python(config))
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
    base, *more = split(variant, ":")
    if base == "bf16":
        keys = ["--fp8.enabled=False"]
    else:
        keys = ["--fp8.enabled=True", f"--fp8.recipe_name={base}"]
        if not RECIPES[base].gather_rows:
            keys += ["--fp8.enable_fsdp_float8_all_gather=False",
                     "--fp8.precompute_float8_dynamic_scale_for_fsdp=False"]
        if not RECIPES[base].keep_casts:
            keys += ["--fp8.keep_casts=False"]
    return keys + [f"--{key}" for key in more]


def train(command, log):
    """Run a script and its arguments in as many processes as torchrun started of this one, their output in file `log`.

    Raises RunStopped with the reason of a failure.
    """
    launcher = [sys.executable]
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):  # a torchrun per variant, which ends all its ranks
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with log.open("w") as output:
        status = subprocess.run([*launcher, *command], stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        reason = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|\.py): ")
        lines = [line for line in log.read_text().splitlines() if reason.match(line) and "ChildFailedError" not in line]
        raise RunStopped(lines[-1] if lines else f"exit status {status}, see {log}")


def measure(command, folder, own):
    """Train by a command: (what the table says of it, its run.json). Raises RunStopped if that fails."""
    train([*command, f"--out_dir={folder}", "--resume=never", "--eval_interval=0", "--checkpoint_interval=0",
           f"--log_interval={WINDOW}", f"--max_steps={own.warmup + own.steps}"], folder / "log.txt")
    run = json.loads((folder / "run.json").read_text())
    rows = [row for row in logs.read_metrics(folder) if "loss" in row]
    timed = [row for row in rows if row["step"] > own.warmup and row["step"] % WINDOW == 0]
    per_rank = timed[0]["tokens"] / timed[0]["step"] / run["ranks"]
    ms = [1000 * per_rank / row["tokens_per_s"] for row in timed]
    tokens_per_s = 1000 * per_rank / statistics.median(ms)
    mfu = run["flops_per_token"] * tokens_per_s / run["peak_flops"] if run["peak_flops"] else None
    return {"ms_per_step": statistics.median(ms), "spread_ms": max(ms) - min(ms),
            "slowest_ms": max(row["slowest_ms"] for row in rows if "slowest_ms" in row), "tokens_per_s": tokens_per_s,
            "mfu": mfu, "peak_gib": timed[-1]["peak_gib"], "loss": timed[-1]["loss"], "ms": ms,
            **{key: run[key] for key in ("compile_s", "fp8_flops", "auto_filtered")}}, run


def compare(runs, own, path):
    """Train by each command of {name: command}: the report, which is also written to `path`. RunStopped if all fail."""
    report_ignored(FIXED)
    rows, run, started = [], {}, time.monotonic()
    for name, command in runs.items():
        left = time_left(started, len(rows), len(runs))
        print(f"{name}: {own.warmup} + {own.steps} steps{left}", end=" ... ", flush=True)
        folder = path.parent / slug(name)
        folder.mkdir(exist_ok=True)
        row = {"variant": name}
        rows.append(row)
        try:
            measured, run = measure(command, folder, own)
            row |= measured
            if "error" not in rows[0]:
                row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
            print(f"{row['ms_per_step']:.1f} ms", flush=True)
        except RunStopped as error:
            row["error"] = str(error)
            print("failed", flush=True)
        report = {**header(run), "rows": rows}
        path.write_text(json.dumps(report, indent=1))  # after every run: an interrupted bench keeps its results
    if all("error" in row for row in rows):
        raise RunStopped(f"nothing ran: {rows[0]['error']}")
    return report


def time_left(started, n_done, n):
    """", about 3 min left", if each of the n runs takes as long as those that are done; "" before that is known."""
    minutes = (time.monotonic() - started) * (n - n_done) / max(1, n_done) / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ""


def header(run):
    """What a report begins with. run: the run.json of one of its runs, {} before the first."""
    return {**{key: run.get(key) for key in ("hardware", "versions", "git_commit", "tokens_per_step")},
            "date": datetime.date.today().isoformat(), "command": sys.argv}


def plot(rows, title, path):
    """Draw bars of tokens per second, labelled with the speedup, and of peak memory."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" not in row][::-1]
    figure = Figure(figsize=(10, 1 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [row["variant"] for row in rows]
    speed = axes[0].barh(names, [row["tokens_per_s"] for row in rows], color="tab:blue")
    labels = [f"{row['tokens_per_s']:,.0f} ({row.get('speedup', float('nan')):.2f}x)" for row in rows]
    axes[0].bar_label(speed, labels, padding=3)
    axes[0].set(xlabel="tokens per second and GPU")
    memory = axes[1].barh(names, [row["peak_gib"] for row in rows], color="tab:gray")
    axes[1].bar_label(memory, fmt="%.1f", padding=3)
    axes[1].set(xlabel="peak memory, GiB")
    for ax in axes:
        ax.margins(x=0.5)
    figure.suptitle(title, parse_math=False)  # "$" is a character
    figure.savefig(path, dpi=150)


def finish(config, *written):
    """Print the last lines: what emulated FP8 does not show, and the files that were written."""
    if on_cpu(config):
        print("On a CPU FP8 is emulated: the numerics are those of FP8, the times are not.")
    print(f"written: {', '.join(map(str, written))}")


def main():
    own = BenchConfig()
    config, base = prepare(own, "llama_fp8.py")
    out_dir, variants = base.parent, ["bf16"] if own.gemms else split(own.variants)
    for variant in variants:  # fail early: check all of them before the first one trains
        configurator.load([str(base), *flags(variant)])
    written = [out_dir / ("gemms.json" if own.gemms else "bench.json")]
    report = compare({variant: [TRAIN, base, *flags(variant)] for variant in variants}, own, written[0])
    rows = report["rows"]
    if own.gemms:
        device = torch.device("cpu" if on_cpu(config) else "cuda")
        run = json.loads((out_dir / "bf16" / "run.json").read_text())
        passes = config.global_batch_size // (config.micro_batch_size * run["ranks"])
        bf16_config = configurator.read_file(out_dir / "bf16" / "config.py")  # has init_from's model
        model = replace(bf16_config.model, block_size=run["block_size"])  # the length of the data's rows
        recipes = dict.fromkeys(split(v, ":")[0] for v in split(own.variants) if not v.startswith("bf16"))
        report["gemms"] = gemms.time_linears(replace(bf16_config, model=model, fp8=config.fp8), device, passes, recipes)
        written[0].write_text(json.dumps(report, indent=1))
        text = gemms.table(report["gemms"], rows[0]["ms_per_step"])
    else:
        written.append(out_dir / "bench.png")
        plot(rows, f"{out_dir.name}, {report['hardware']}", written[1])
        text = (f"{report['hardware']}, median of {own.steps // WINDOW} x {WINDOW} steps; speedup is relative to "
                f"{rows[0]['variant']}, mfu to the bf16 peak\n{logs.table(rows, COLUMNS)}")
    print("", text, "", sep="\n")
    finish(config, *written)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    entry.run(main)
