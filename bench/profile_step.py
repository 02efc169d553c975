"""Profile a training step: train.py as configured, with torch.profiler in its last steps.

    python bench/profile_step.py [CONFIG.py] [--key=value ...] [--steps=3] [--warmup=7] [--show=30]      # or torchrun

The default is config/llama_fp8.py. Prints the kernels of rank 0 that take most time per step (on a CPU: operators), and
writes all of them to out_dir/profile/profile.json. The profiler slows the steps a little.
"""

import collections
import datetime
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import configurator
import optim
import train
from plumbing import entry, logs
from plumbing.ranks import process_rank
from plumbing.schema import PositiveInt


@dataclass(kw_only=True)
class ProfileConfig:
    """Keys of bench/profile_step.py."""

    steps: PositiveInt = 3  # profiled steps
    warmup: PositiveInt = 7  # steps before those
    show: PositiveInt = 30  # lines of the table


def profiled(step, own, profile):
    """AdamW.step, the last thing of a step, which starts `profile` after the warm-up and stops it at the end."""

    def wrapped(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        if optimizer.step_count in (own.warmup, own.warmup + own.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            (profile.start if optimizer.step_count == own.warmup else profile.stop)()

    return wrapped


def kernels(profile, steps, on_gpu):
    """[{name, calls, ms}] per step, the longest first."""
    calls, ms = collections.Counter(), collections.Counter()
    for event in profile.events():
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            calls[event.name] += 1
            ms[event.name] += (event.device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    return [{"name": name, "calls": calls[name] / steps, "ms": total / steps} for name, total in ms.most_common()]


def main():
    own, argv = ProfileConfig(), bench.arguments("llama_fp8.py")
    config = configurator.load(argv, own)
    on_gpu, out_dir = not bench.on_cpu(config), Path(config.out_dir, "profile")
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    profile = torch.profiler.profile(activities=[activity], acc_events=True)  # without, it warns at each stop
    if process_rank() == 0:
        bench.report_ignored(bench.FIXED - {"log_interval"})
    keys = [arg for arg in argv if arg.partition("=")[0] not in {f"--{field.name}" for field in fields(own)}]
    keys += [f"--out_dir={out_dir}", f"--max_steps={own.warmup + own.steps}", "--eval_interval=0",
             "--checkpoint_interval=0", "--resume=never"]
    own_argv, sys.argv = sys.argv, ["train.py", *keys]
    step, optim.AdamW.step = optim.AdamW.step, profiled(optim.AdamW.step, own, profile)
    try:
        train.main()
    finally:
        sys.argv, optim.AdamW.step = own_argv, step
    if process_rank() > 0:
        return
    rows = kernels(profile, own.steps, on_gpu)
    report = {**logs.provenance(), "hardware": torch.cuda.get_device_name() if on_gpu else "CPU",
              "date": datetime.date.today().isoformat(), "steps": own.steps, "busy_ms": sum(r["ms"] for r in rows),
              "kernels": rows}
    path = out_dir / "profile.json"
    path.write_text(json.dumps(report, indent=1))
    short = [{**row, "name": row["name"][:90]} for row in rows[:own.show]]
    print("", logs.table(short, {"name": "", "calls": ".1f", "ms": ".3f"}), "", sep="\n")
    print(f"busy {report['busy_ms']:.1f} ms a step; written: {path}")


if __name__ == "__main__":
    entry.run(main)
