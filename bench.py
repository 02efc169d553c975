"""How fast is FP8 on this machine: bf16 against every recipe, each trained by train.py in a process of its own.

    [torchrun ...] bench.py [CONFIG.py] [--key=value ...] [--variants=bf16,tensorwise,rowwise,rowwise_with_gw_hp]
    python bench.py [CONFIG.py] [--key=value ...] --gemms

A variant is bf16 or a recipe, with keys of its own behind colons: `tensorwise:fp8.filter_fqns=[]:loss_chunks=8`.
Everything else comes from the config: config/llama_fp8.py if none is given. Writes out_dir/bench.json and bench.png;
out_dir/VARIANT/ has each variant's metrics and log. Exit status 1 if a variant failed.

--gemms times every kind of linear layer alone, in bf16 and in FP8 with its casts, and from one bf16 run predicts the
step with all of them in FP8 and with those that pay. In the model the casts fuse with their neighbours and cost less.
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
from plumbing import entry, logs
from plumbing.errors import RunStopped, UserError

REPO = Path(__file__).parent
TRAIN = (REPO / "train.py",)  # what a variant runs
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
FIXED = {"max_steps", "log_interval", "eval_interval", "checkpoint_interval", "resume"}  # set here for every variant
OWN = FIXED | {"seed", "out_dir"}  # what makes the runs comparable, or finds what they leave
WINDOW = 5  # steps per timing: waiting for the GPU after every one would cost a little of each
COLUMNS = {"variant": "", "ms_per_step": ".1f", "spread_ms": ".1f", "tokens_per_s": ",.0f", "speedup": ".2f",
           "mfu": ".1%", "peak_gib": ".2f", "compile_s": ".1f"}


@dataclass(kw_only=True)
class BenchConfig:
    """What bench.py does."""

    variants: str = "bf16,tensorwise,rowwise,rowwise_with_gw_hp"  # what to compare, the first is what speedup refers to
    steps: int = 40  # timed steps of each
    warmup: int = 10  # steps before them
    gemms: bool = False  # time the linear layers one by one instead: which of them does FP8 pay for

    def problems(self):
        """Yield ({keys involved}, message) for each value that cannot be used."""
        for message in mistakes(self.variants):
            yield {"variants"}, message
        if self.steps < 2 * WINDOW or self.steps % WINDOW or self.warmup % WINDOW or self.warmup < 0:
            yield {"steps", "warmup"}, (
                f"--steps={self.steps} and --warmup={self.warmup} must be multiples of {WINDOW}, steps at least twice")


def split(variants):
    """The variants one by one; a comma inside of brackets ends none."""
    return re.split(r",(?![^\[]*\])", variants)


def mistakes(variants):
    """What is wrong with --variants, one sentence each."""
    for variant in split(variants):
        base, *keys = variant.split(":")
        if base not in ("bf16", *RECIPES):
            yield f"--variants: {variant!r} does not start with one of bf16, {', '.join(RECIPES)}"
        if mine := sorted(OWN.intersection(key.partition("=")[0] for key in keys)):
            yield f"--variants: {variant!r} sets {', '.join(mine)}, which this script sets for all of them"


def on_cpu(config):
    return config.device == "cpu" or not torch.cuda.is_available()


def arguments(default):
    """The command line, with config/`default` where it names no config file."""
    argv = sys.argv[1:]
    return [str(REPO / "config" / default), *argv] if all(arg.startswith("-") for arg in argv) else argv


def prepare(own, default):
    """(config, file that holds it) of the command line, `default` where it names none; None on all ranks but 0.

    own: the calling script's flags, as for configurator.load. Without a GPU FP8 is emulated.
    """
    config = configurator.load(arguments(default), own)
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise UserError("this script works on one machine: start torchrun without --nnodes")
    if int(os.environ.get("RANK", 0)) > 0:
        return None  # rank 0 starts the processes of every variant
    files.find_files([*config.data.train, *config.data.val], set(files.KINDS.values()))  # report a wrong path once
    config.fp8.emulate |= on_cpu(config)
    base = Path(config.out_dir, "base_config.py")
    base.parent.mkdir(parents=True, exist_ok=True)
    base.write_text(configurator.to_python(config))
    return config, base


def tell_idle(keys):
    """Print which keys of the command line the calling script sets itself, so that typing them has no effect."""
    idle = [arg for arg in sys.argv[1:] if arg.partition("=")[0].removeprefix("--") in keys]
    if idle:
        print(f"{' '.join(idle)}: no effect here, this script sets that itself", flush=True)


def slug(variant):
    """A folder's name for a variant."""
    return re.sub(r"[^\w.=-]+", "_", variant)


def flags(variant):
    """The keys of train.py that make a variant."""
    base, *more = variant.split(":")
    keys = ["--fp8.enabled=False"] if base == "bf16" else ["--fp8.enabled=True", f"--fp8.recipe_name={base}"]
    if base.startswith("rowwise"):  # what these cannot do, and would stop at
        keys += [f"--fp8.{key}=False" for key in ("enable_fsdp_float8_all_gather", "keep_casts",
                                                  "precompute_float8_dynamic_scale_for_fsdp")]
    return keys + [f"--{key}" for key in more]


def train(args, log, program=TRAIN):
    """Run train.py with `args` in fresh processes, as many as torchrun started of this one: None, or why it failed.

    log: the file for their output. program: what to run in place of train.py, a script and its own arguments. Call it
    on rank 0 alone; the other ranks have nothing to do and may end.
    """
    command = [*program, *args]
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):  # set by torchrun: a torchrun for each variant ends all its ranks
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    with log.open("w") as output:
        status = subprocess.run([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT).returncode
    if status == 0:
        return None
    reason = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|\.py): ")
    lines = [line for line in log.read_text().splitlines() if reason.match(line) and "ChildFailedError" not in line]
    return lines[-1] if lines else f"exit status {status}, see {log}"


def measure(variant, base, folder, own, program):
    """Train a variant and read what it left: (its row of the table, its run.json), or (a row with `error`, {})."""
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
    middle = statistics.median(ms)
    mfu = run["flops_per_token"] * per_rank / middle * 1000 / run["peak_flops"] if run["peak_flops"] else None
    return {"variant": variant, "ms_per_step": middle, "spread_ms": max(ms) - min(ms),
            "tokens_per_s": 1000 * per_rank / middle, "speedup": None, "mfu": mfu,
            "peak_gib": timed[-1]["peak_gib"], "compile_s": run["compile_s"], "loss": timed[-1]["loss"],
            "fp8_flops": run["fp8_flops"], "auto_filtered": run["auto_filtered"], "ms": ms}, run


def compare(runs, base, own, path):
    """Train [(name, variant, program)] one after the other: (the report with a row for each, the last run.json).

    path: the report's file, or None. It is written after every run: who interrupts a bench keeps what it has measured.
    """
    tell_idle(FIXED)
    for _, variant, _ in runs:  # the mistakes of all, before anything slow
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
    """The rows as aligned text. columns: {key: format}, the first is the row's name."""
    cells = [list(columns)]
    for row in rows:
        values = ["n/a" if row.get(c) is None else format(row[c], columns[c]) for c in columns]
        cells.append([values[0], f"failed: {row['error']}"] if "error" in row else values)
    widths = [max(len(line[i]) for line in cells if len(line) == len(columns)) for i in range(len(columns))]
    widths[0] = max(len(line[0]) for line in cells)
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in
                               enumerate(zip(line, widths, strict=False))) for line in cells)


def plot(rows, title, path):
    """Bars of tokens per second, labelled with the speed-up, and of peak memory."""
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


def warn_of_emulation(config):
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
        ran = configurator.read_file(out_dir / "bf16" / "config.py")  # init_from's model, rows as long as the data's
        ran = replace(ran, model=replace(ran.model, block_size=run["block_size"]), fp8=config.fp8)
        report["gemms"] = gemms.time_linears(ran, device, passes)
        (out_dir / "gemms.json").write_text(json.dumps(report, indent=1))
        print("", gemms.table(report["gemms"], rows[0]["ms_per_step"]), "", sep="\n")
        warn_of_emulation(config)
        print(f"written: {out_dir / 'gemms.json'}")
        return
    title = f"{report['hardware']}, {config.model.n_layer} layers x {config.model.n_embd}"
    plot(rows, title, out_dir / "bench.png")
    print("", f"{report['hardware']}, median of {own.steps // WINDOW} x {WINDOW} steps; speedup is against "
          f"{rows[0]['variant']}, mfu against the bf16 peak", table(rows, COLUMNS), "", sep="\n")
    warn_of_emulation(config)
    print(f"written: {out_dir / 'bench.json'}, {out_dir / 'bench.png'}")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    entry.run(main)
