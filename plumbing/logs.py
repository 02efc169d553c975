"""What a run writes beside checkpoints: log lines, metrics.jsonl, trackers' files, loss.png, its provenance."""

import contextlib
import fcntl
import importlib.util
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from plumbing.errors import UserError


def provenance():
    """The command, package versions and git commit of this process, for run.json."""
    packages = [p for p in ("torch", "torchao", "tiktoken", "numpy") if importlib.util.find_spec(p)]
    return {"command": sys.argv, "versions": {p: version(p) for p in packages}, "git_commit": git_commit()}


def git_commit():
    """The commit of this code, "+changes" if files differ from it; None without git, or if it does not track this."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=Path(__file__).parents[1], capture_output=True, text=True)

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", __file__).returncode:
        return None
    changes = git("status", "--porcelain", ".").stdout.strip()
    return git("rev-parse", "HEAD").stdout.strip() + ("+changes" if changes else "")


# ----------------------------------------------------------------------------------------------------------------
# log lines


def number(value):
    """A float for JSON, which has no inf and nan: None stands for both. value: a float or a 0-d tensor."""
    return float(value) if math.isfinite(value) else None


def peak_memory(device):
    """The most GiB that this process has held so far: GPU memory, or on a CPU main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    in_gib = 2**20 if sys.platform == "linux" else 2**30  # Linux reports KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / in_gib


def table(rows, columns):
    """Rows as aligned text. columns: {key: format}; the first names the row, and is aligned to the left."""
    lines = [list(columns)]
    for row in rows:
        if "error" not in row:
            lines.append(["n/a" if row.get(key) is None else format(row[key], columns[key]) for key in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines]
    return "\n".join(text + [f"{row['variant']} failed: {row['error']}" for row in rows if "error" in row])


class StepTimer:
    """Training time and speed, without evaluations and checkpoints (`paused`).

    step, seconds: done by earlier runs. tokens: of a step, over all ranks. flops: of a token. peak_flops: may be None.
    """

    def __init__(self, ranks, step, seconds, *, max_steps, tokens, flops, peak_flops):
        self.ranks, self.step, self.seconds, self.max_steps = ranks, step, seconds, max_steps
        self.tokens, self.flops, self.peak_flops = tokens, flops, peak_flops
        self.started, self.last_mark = ranks.now(), None
        self.first_timed, self.timed = step + 3, []  # the first two steps compile; (begin, end) since the last row

    @contextlib.contextmanager
    def paused(self):
        """A block whose time is not training time; yields the seconds of training before it, with earlier runs."""
        begin = self.ranks.now()
        yield self.seconds + begin - self.started
        self.started += self.ranks.now() - begin
        self.last_mark = self.mark()

    def mark(self):
        """This point of the device's work, without waiting for it."""
        if self.ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end_step(self, step):
        """Note the end of a step."""
        begin, self.last_mark = self.last_mark, self.mark()
        if step >= self.first_timed:
            self.timed.append((begin, self.last_mark))

    def log_row(self, step, loss, lr, grad_norm):
        """(metrics row, line for the screen) of a step; speed is the mean since the last row.

        loss, grad_norm: 0-d tensors. tokens_per_s is per rank. slowest_ms: the longest step since the last row.
        """
        elapsed, n_steps = self.ranks.now() - self.started, step - self.step
        on_gpu = self.ranks.device.type == "cuda"
        self.seconds += elapsed
        rate = self.tokens * n_steps / elapsed / self.ranks.world_size
        mfu = rate * self.flops / self.peak_flops if self.peak_flops else None
        row = {"step": step, "loss": number(loss), "lr": lr, "grad_norm": number(grad_norm),
               "tokens": step * self.tokens, "tokens_per_s": rate, "mfu": mfu, "time_s": self.seconds,
               "peak_gib": peak_memory(self.ranks.device)}
        if self.timed:
            row["slowest_ms"] = max(a.elapsed_time(b) if on_gpu else 1000 * (b - a) for a, b in self.timed)
        line = (f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.3f}"
                f" | {rate:,.0f} tok/s per {'GPU' if on_gpu else 'rank'}"
                f" | MFU {f'{mfu:.1%} of bf16 peak' if mfu else 'n/a'} | {row['peak_gib']:.2f} GiB")
        if step >= self.first_timed:
            line += f" | {(self.max_steps - step) * elapsed / n_steps / 60:.1f} min left"
        self.started, self.step, self.last_mark, self.timed = self.ranks.now(), step, self.mark(), []
        return row, line


# ----------------------------------------------------------------------------------------------------------------
# metrics.jsonl


def read_metrics(out_dir):
    """The rows of out_dir/metrics.jsonl as dicts, [] without such a file. Skips the half line of a killed run."""
    path, rows = Path(out_dir, "metrics.jsonl"), []
    content = path.read_bytes() if path.exists() else b""
    for line_number, line in enumerate(content.splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                rows.append(json.loads(line))
            except ValueError as error:  # a machine that lost its power may leave zeros
                raise UserError(f"{path}, line {line_number} is not JSON ({error}): delete that line") from error
    return rows


def open_metrics(out_dir, lock=fcntl.LOCK_EX):
    """out_dir/metrics.jsonl for appending, locked until it is closed. Raises UserError if a run holds the lock."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = (out_dir / "metrics.jsonl").open("a")
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {out_dir}: wait until it ends, or set another out_dir") from None
    except OSError as error:  # no locks on some network file systems
        if lock == fcntl.LOCK_EX:  # rank 0 alone takes it
            print(f"{out_dir} cannot be locked ({error.strerror}): start no second run in it", flush=True)
    return file


def check_unused(out_dir):
    """Raise UserError if a run is writing to out_dir."""
    if (out_dir / "metrics.jsonl").exists():
        open_metrics(out_dir, fcntl.LOCK_SH).close()  # shared: all ranks may check at the same time


def continue_metrics(file, start):
    """Prepare open metrics for the rows after step `start`: drop later rows, which an interrupted run wrote.

    If start is 0, what an earlier run left in out_dir moves to a new folder in it, which is returned.
    """
    out_dir, earlier = Path(file.name).parent, None
    rows = read_metrics(out_dir)
    if start == 0 and (rows or (out_dir / "checkpoints").exists()):
        earlier = next(f for n in itertools.count(1) if not (f := out_dir / f"earlier_{n}").exists())
        earlier.mkdir()
        shutil.copy(out_dir / "metrics.jsonl", earlier)  # not moved: the file holds the lock
        for name in ("checkpoints", "config.py", "run.json", "loss.png", "fp8_health.png", "tensorboard", "wandb",
                     "trace_step*", "memory_step*", "nonfinite_step_*"):
            for path in out_dir.glob(name):
                path.rename(earlier / path.name)
    with (out_dir / "metrics.jsonl").open("rb") as lines:
        n_bytes = sum(len(line) for line, row in zip(lines, rows, strict=False) if row["step"] <= start)
    file.truncate(n_bytes)  # not written again, so that a kill here loses no row
    return earlier


def write(rows, metrics, trackers):
    """Append the rows of a step to open metrics at once, and send their numbers to the trackers."""
    metrics.write("".join(json.dumps(row) + "\n" for row in rows))
    metrics.flush()
    for tracker in trackers:
        tracker(scalars(rows))


# ----------------------------------------------------------------------------------------------------------------
# trackers and plots


def scalars(rows):
    """The numbers in the rows of one step, as one dict: {"step": 3, "fp8/lm_head/input/sqnr_db": 31.5, ...}."""
    flat = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict):
                flat |= {f"fp8/{row['fp8_layer']}/{key}/{name}": x for name, x in value.items()}
            else:
                flat[key] = value
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def check_trackers(config):
    """Raise UserError if the config asks for a tracker that is not installed."""
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb_project)):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"the config asks for {package}, which is not installed: pip install {package}")


def open_trackers(config, start):
    """The trackers that the config asks for, as functions that take a dict of numbers with "step", above `start`."""
    trackers = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(config.out_dir, "tensorboard"), purge_step=start + 1)  # as continue_metrics
        trackers.append(lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()])
    if config.wandb_project:
        import wandb

        run = wandb.init(project=config.wandb_project, config=asdict(config), dir=config.out_dir)
        trackers.append(lambda row: run.log(row, step=row["step"]))
    return trackers


def plot_losses(out_dir):
    """Draw out_dir/loss.png from out_dir/metrics.jsonl: training and validation loss against steps."""
    from matplotlib.figure import Figure  # takes a second to import

    rows, figure = read_metrics(out_dir), Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", {"lw": 1, "label": "train"}), ("val_loss", {"marker": "o", "label": "validation"})):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title(out_dir.name, parse_math=False)  # "$" is a character
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=150)
