"""What a run leaves in its out_dir beside checkpoints: metrics.jsonl, trackers' files, loss.png, where it came from."""

import fcntl
import importlib.util
import itertools
import json
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

import checkpoint
from plumbing.errors import UserError


def provenance():
    """The command, the versions and the git commit that make a run, for run.json."""
    packages = [p for p in ("torch", "torchao", "tiktoken", "numpy") if importlib.util.find_spec(p)]
    return {"command": sys.argv, "versions": {p: version(p) for p in packages}, "git_commit": git_commit()}


def git_commit():
    """The commit this code is at, with "+changes" if files differ from it, or None outside of a git checkout."""
    run = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **run)
    if commit.returncode:
        return None
    changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()
    return commit.stdout.strip() + ("+changes" if changed else "")


def changed_code(run):
    """", by code of commit X instead of Y" if that of a run.json is another; "" if it is not, or not known."""
    before, now = run.get("git_commit"), git_commit()
    return f", by code of commit {now} instead of {before}" if before and now and before != now else ""


def number(tensor):
    """The value of a 0-d tensor, or None for inf and nan, which JSON lacks."""
    return tensor.item() if tensor.isfinite() else None


def scalars(rows):
    """Rows of one step as one row of numbers, for the trackers: {"step": 3, "fp8/lm_head/input/sqnr_db": 31.5, ...}."""
    flat = {}
    for row in rows:
        for key, value in row.items():
            inner = value if isinstance(value, dict) else {}
            flat |= {f"fp8/{row['fp8_layer']}/{key}/{k}": v for k, v in inner.items()} or {key: value}
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def peak_memory(use_cuda):
    """The largest GiB that this process has held so far: on the GPU, or without one in the machine's memory."""
    if use_cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "linux" else 30)  # KiB, B


def read_metrics(out_dir):
    """The rows of out_dir/metrics.jsonl, a dict for each, without one that a killed run wrote half of."""
    path, rows = Path(out_dir, "metrics.jsonl"), []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON ({error}): delete that line") from error
    return rows


def replace_text(path, text):
    """Write a file as a whole: a run that is killed meanwhile leaves the one before."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    aside.replace(path)


def lock(file, how):
    """Hold an open file until it is closed. Raises UserError if another run holds it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {Path(file.name).parent}: wait for its end, or give another "
                         "out_dir") from None


def check_alone(out_dir):
    """UserError if a run is writing to out_dir."""
    if (path := out_dir / "metrics.jsonl").exists():
        with path.open() as file:
            lock(file, fcntl.LOCK_SH)  # shared: every rank may look at once


def open_metrics(out_dir, start, newest):
    """(out_dir/metrics.jsonl for appending, where an earlier run's files went: None if there were none).

    While it is open it keeps other runs out. start: steps done. At 0 what an earlier run has left is moved to a folder
    earlier_N in out_dir; else rows after it go, of a run that was interrupted. newest: checkpoint.latest(out_dir) from
    when the run decided on start. Raises UserError if it is another by now, or if a run is in there.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    file, earlier = (out_dir / "metrics.jsonl").open("a"), None
    lock(file, fcntl.LOCK_EX)
    if checkpoint.latest(out_dir) != newest:
        raise UserError(f"another run has saved in {out_dir} since this one started: start again")
    rows = read_metrics(out_dir)
    if start == 0 and (rows or newest):
        earlier = next(f for n in itertools.count(1) if not (f := out_dir / f"earlier_{n}").exists())
        earlier.mkdir()
        shutil.copy(out_dir / "metrics.jsonl", earlier)  # the file itself is what keeps other runs out
        for path in (out_dir / name for name in ("checkpoints", "config.py", "run.json", "loss.png", "fp8_health.png")):
            if path.exists():
                path.rename(earlier / path.name)
    with (out_dir / "metrics.jsonl").open("rb") as lines:
        kept = sum(len(line) for line, row in zip(lines, rows, strict=False) if row["step"] <= start)
    file.truncate(kept)  # cut, not written anew, so that a kill here loses no row
    return file, earlier


def unplotted(out_dir):
    """Whether metrics.jsonl has what loss.png has not: a run was killed between its last save and its plots."""
    metrics, plot = out_dir / "metrics.jsonl", out_dir / "loss.png"
    return metrics.exists() and not (plot.exists() and plot.stat().st_mtime >= metrics.stat().st_mtime)


def check_trackers(config):
    """UserError if the config asks for a tracker that is not installed."""
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb_project)):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"the config asks for {package}, which is not installed: pip install {package}")


def open_trackers(config):
    """Functions that take a metrics row: TensorBoard and Weights & Biases, where the config asks for them."""
    trackers = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(config.out_dir, "tensorboard"))
        trackers.append(lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()])
    if config.wandb_project:
        import wandb

        run = wandb.init(project=config.wandb_project, config=asdict(config))
        trackers.append(lambda row: run.log(row, step=row["step"]))
    return trackers


def plot_losses(out_dir):
    """out_dir/loss.png from out_dir/metrics.jsonl: training and validation loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(out_dir)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style in (("loss", {"lw": 1, "label": "train"}), ("val_loss", {"marker": "o", "label": "validation"})):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=out_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=150)
    plt.close(figure)
