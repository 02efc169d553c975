"""Whether a long run grows: memory, open files and time a step of train.py over thousands of small steps (Linux, CPU).

    python bench/long_run.py [--steps=20000] [--out=FILE.json] [--key=value ...]

Trains a small model in compiled emulated FP8, with evaluations, checkpoints and FP8 health, and looks at the process
twice a second. Compares the second tenth of the steps with the last. Exit status 1 if anything has grown.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing import entry, logs
from plumbing.errors import RunStopped, UserError

REPO = Path(__file__).resolve().parents[1]
SIZES = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, ffn_dim=128, block_size=64)
KEYS = ["--device=cpu", "--dtype=float32", "--global_batch_size=4", "--micro_batch_size=2", "--log_interval=10",
        "--eval_interval=500", "--eval_sequences=16", "--checkpoint_interval=500", "--fp8.enabled=True",
        "--fp8.emulate=True", "--fp8.stats_interval=1000", "--compile.enabled=True"]
# Of the earlier value: the allocator still settles, and another process may take the caches of the CPU.
ALLOWED = {"memory_mib": 1.03, "open_files": 1.0, "cpu_ms_per_step": 1.1}


def look(process):
    """(resident memory in MiB, open files, CPU seconds so far) of a running process, from /proc."""
    folder = Path("/proc", str(process.pid))
    pages = int((folder / "statm").read_text().split()[1])
    ticks = sum(map(int, (folder / "stat").read_text().rpartition(") ")[2].split()[11:13]))
    return (pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(folder / "fd")),
            ticks / os.sysconf("SC_CLK_TCK"))


def last_step(metrics):
    """The newest step in a metrics.jsonl, 0 if there is none."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def watch(process, metrics, steps):
    """[(step, memory, open files, CPU seconds)] of a process of train.py until its last step or its end."""
    samples, step = [], 0
    while process.poll() is None and step < steps:
        step = last_step(metrics)
        samples.append((step, *look(process)))
        time.sleep(0.5)
    process.wait()
    return samples


def summary(samples, first, last):
    """What the samples of the steps from `first` to `last` say: {memory_mib, open_files, cpu_ms_per_step}."""
    chosen = [sample for sample in samples if first <= sample[0] <= last]
    (begin, *_, cpu_begin), (end, *_, cpu_end) = chosen[0], chosen[-1]
    # the fewest files: while a checkpoint is written, there are more
    return {"memory_mib": statistics.median(sample[1] for sample in chosen),
            "open_files": min(sample[2] for sample in chosen),
            "cpu_ms_per_step": 1000 * (cpu_end - cpu_begin) / (end - begin)}


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, keys = parser.parse_known_args()
    if args.steps < 2000:
        raise UserError(f"--steps={args.steps}: a tenth of it is over before there is anything to compare, take 2000")
    with tempfile.TemporaryDirectory() as folder:
        command = ["train.py", *(f"--model.{k}={v}" for k, v in SIZES.items()), *KEYS, '--data.train=["*.py"]',
                   f"--max_steps={args.steps}", *keys]
        places = [f"--out_dir={folder}", f"--data.cache_dir={folder}/cache"]
        process = subprocess.Popen([sys.executable, *command, *places], cwd=REPO,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        samples = watch(process, Path(folder, "metrics.jsonl"), args.steps)
        if process.returncode:
            raise RunStopped(f"train.py ended with status {process.returncode}")
        rows = logs.read_metrics(folder)
        run = json.loads(Path(folder, "run.json").read_text())
    early, late = (summary(samples, args.steps * a // 10, args.steps * b // 10) for a, b in ((1, 2), (9, 10)))
    grown = [key for key, factor in ALLOWED.items() if late[key] > factor * early[key]]
    report = {"command": command, "hardware": run["hardware"], "versions": run["versions"],
              "git_commit": run["git_commit"], "date": time.strftime("%Y-%m-%d"), "metrics_rows": len(rows),
              "second_tenth": early, "last_tenth": late, "grown": grown,
              "samples": samples[:: max(1, len(samples) // 100)]}
    for key in ALLOWED:
        print(f"{key}: {early[key]:.2f} in the second tenth, {late[key]:.2f} in the last")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    sys.exit(bool(grown))


if __name__ == "__main__":
    entry.run(main)
