"""The time of every step of runs of train.py, so that a stall cannot hide in a median.

    python train.py CONFIG.py --log_interval=1 --out_dir=OUT_DIR ...
    python bench/step_times.py OUT_DIR [OUT_DIR ...] [--skip=10] [--out=FILE.json]

The first `skip` steps, which compile and warm up, do not count. Exit status 1 if a later step takes more than 1.1 times
the median: something compiled again, or waited.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing import entry, logs
from plumbing.errors import UserError

ALLOWED = 1.1  # of the median


def step_times(out_dir, skip):
    """Hardware, versions, command and step times of a run, with its speed over the steps that count.

    Milliseconds from one log line to the next; a step with an evaluation or a checkpoint does not include their time.
    Raises UserError if the run did not log every step.
    """
    run = json.loads((out_dir / "run.json").read_text())
    rows = [row for row in logs.read_metrics(out_dir) if "loss" in row]
    steps = [row["step"] for row in rows]
    if steps != list(range(steps[0], steps[0] + len(steps))) or len(steps) < skip + 2:
        raise UserError(f"{out_dir} needs a row of each of more than {skip + 1} steps: train with --log_interval=1")
    ends = [row["time_s"] for row in rows]
    times = [1000 * (end - start) for start, end in zip(ends[:-1], ends[1:], strict=True)]  # of all but the first step
    counted = times[skip - 1 :] if skip else times
    slowest = max(counted)
    tokens = run["tokens_per_step"] / run["ranks"]
    return {
        "out_dir": out_dir.name, "command": run["command"], "hardware": run["hardware"], "versions": run["versions"],
        "git_commit": run["git_commit"], "steps": len(counted), "median_ms": statistics.median(counted),
        "slowest_ms": slowest, "slowest_step": steps[len(times) - len(counted) + 1 :][counted.index(slowest)],
        "tokens_per_s": 1000 * tokens * len(counted) / sum(counted), "peak_gib": max(row["peak_gib"] for row in rows),
        "losses": [row["loss"] for row in rows], "ms": times}


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("out_dirs", nargs="+", type=Path, help="out_dir of a run of train.py with --log_interval=1")
    parser.add_argument("--skip", type=int, default=10, help="first steps that do not count (10)")
    parser.add_argument("--out", type=argparse.FileType("w"), help="JSON file to write")
    args = parser.parse_args()
    reports = [step_times(out_dir, args.skip) for out_dir in args.out_dirs]
    for report in reports:
        print(f"{report['out_dir']}: {report['tokens_per_s']:,.0f} tok/s per GPU, median {report['median_ms']:.1f} ms, "
              f"slowest {report['slowest_ms']:.1f} ms (step {report['slowest_step']}, "
              f"{report['slowest_ms'] / report['median_ms']:.3f}x), {report['peak_gib']:.2f} GiB")
    if args.out:
        json.dump(reports, args.out, indent=1)
    sys.exit(any(report["slowest_ms"] > ALLOWED * report["median_ms"] for report in reports))


if __name__ == "__main__":
    entry.run(main)
