"""Kill runs of train.py at random moments, start them again, and compare the losses with an uninterrupted run's.

    python bench/chaos.py [--kills=40] [--ranks=2,3] [--seed=1] [--out=FILE.json] [--key=value ...]

Small models on the CPU (gloo), in bf16 and in emulated FP8 with FP8 all-gather, with and without asynchronous saves.
SIGKILL goes to one rank, to all, or to the launcher: in the middle of a step, or while a checkpoint is written or
renamed, or an old one removed. Each time the run must go on from the newest complete checkpoint. On the same number of
ranks all losses must be those of the uninterrupted run, bit for bit; where the number changes, within 2%. Exit status 1
if not.
"""

import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing import entry, logs
from plumbing.errors import RunStopped, UserError

REPO = Path(__file__).resolve().parents[1]
STEPS = 24
SIZES = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=192, head_dim=48, ffn_dim=384, block_size=32)
KEYS = [*(f"--model.{k}={v}" for k, v in SIZES.items()), "--device=cpu", "--dtype=bfloat16", "--global_batch_size=6",
        "--micro_batch_size=1", "--log_interval=1", "--eval_interval=0", "--checkpoint_interval=3", "--keep=1",
        f"--max_steps={STEPS}", "--optim.warmup_steps=2", '--data.train=["fp8.py"]']
PRECISIONS = {"bf16": [], "fp8": ["--fp8.enabled=True", "--fp8.emulate=True", '--fp8.filter_fqns=["lm_head"]',
                                  "--fp8.enable_fsdp_float8_all_gather=True",
                                  "--fp8.precompute_float8_dynamic_scale_for_fsdp=True"]}
AIMS = ("write", "step", "rename", "clean-up")
VICTIMS = ("rank", "all", "launcher")
ALLOWED = 0.02  # relative difference of losses where the number of ranks changes, and with it the order of sums
PATIENCE_S = 120  # for a start, and for the end of all processes after a kill


class Run:
    """A run of train.py under torchrun."""

    def __init__(self, ranks, keys):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.launcher = subprocess.Popen(
            [*launcher, "train.py", *keys], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.step, self.lines, self.children = 0, [], set()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.launcher.stdout:
            self.lines.append(line)
            if found := re.match(r"step (\d+)/", line):
                self.step = int(found[1])

    @property
    def output(self):
        return "".join(self.lines)

    def ranks(self):
        """Process ids of the living ranks, which are children of the launcher, or were when it lived."""
        living = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, rest = stat.read_text().split(" (", 1)
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                continue
            state, parent = rest.rpartition(") ")[2].split()[:2]
            if state != "Z" and (int(parent) == self.launcher.pid or int(pid) in self.children):
                living.add(int(pid))
        self.children = living
        return sorted(living)

    def kill(self, victim, rng):
        """SIGKILL to a victim of VICTIMS."""
        ranks = self.ranks()
        victims = {"rank": [rng.choice(ranks)], "launcher": [self.launcher.pid], "all": [self.launcher.pid, *ranks]}
        for pid in victims[victim]:
            os.kill(pid, signal.SIGKILL)

    def wait(self, seconds):
        """Wait until no process of it is left. Returns whether that was so."""
        deadline = time.monotonic() + seconds
        while self.launcher.poll() is None or self.ranks():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        self.reader.join()
        return True


def complete(folder):
    """Names of the complete checkpoints in an out_dir, oldest first."""
    return sorted(p.name for p in folder.glob("checkpoints/step_*") if re.fullmatch(r"step_\d{8}", p.name))


def wait_for(aim, run, folder, rng):
    """Wait for a moment of AIMS. Returns False if the run ends before."""
    skip = rng.randrange(3)  # checkpoints to let pass
    target_step = run.step + rng.randint(1, 9)
    begun, seen, known = 0, set(), complete(folder)
    deadline = time.monotonic() + PATIENCE_S
    while run.launcher.poll() is None:
        if time.monotonic() > deadline:
            raise RunStopped(f"nothing happened for {PATIENCE_S} s:\n{run.output}")
        now = complete(folder)
        temporary = {p.name for p in folder.glob("checkpoints/step_*.tmp")}
        begun += bool(temporary - seen)
        seen |= temporary
        renamed = bool(set(now) - set(known)) and begun > skip
        if aim == "step" and run.step >= target_step and run.step:
            time.sleep(rng.uniform(0, 0.1))
            return True
        if aim == "write" and temporary and begun > skip:
            time.sleep(rng.uniform(0, 0.05))
            return True
        if aim == "rename" and renamed:
            return True
        if aim == "clean-up" and renamed:
            time.sleep(rng.uniform(0, 0.005))
            return True
        if not renamed:
            known = now
        time.sleep(0.0005)
    return False


def losses(folder):
    """{step: loss} of a run."""
    return {row["step"]: row["loss"] for row in logs.read_metrics(folder) if "loss" in row}


def finish(run):
    """Wait for the end of a run that nothing disturbs."""
    if not run.wait(10 * PATIENCE_S) or run.launcher.returncode:
        raise RunStopped(f"a run that nobody disturbed failed:\n{run.output}")


def trial(folder, keys, ranks_of, reference, kills, rng, label):
    """A run from start to end in an out_dir, with up to `kills` kills on the way: (rows of kills, row of the trial).

    ranks_of: the number of ranks of each start. reference: {step: loss} without kills.
    """
    rows, problems, resumed_at = [], [], 0
    for start in itertools.count():
        newest, last_kill = (complete(folder) or [None])[-1], rows[-1] if rows else None
        run = Run(ranks_of(start), keys)
        if len(rows) >= kills:
            finish(run)
            killed = False
        else:
            aim, victim = AIMS[(len(rows) + label["trial"]) % len(AIMS)], rng.choice(VICTIMS)
            killed = wait_for(aim, run, folder, rng)
        if killed:
            step, at = run.step, time.monotonic()
            run.kill(victim, rng)
            if not run.wait(PATIENCE_S):
                raise RunStopped(f"{PATIENCE_S} s after a kill of {victim} at step {step} there are processes left:\n"
                                 + run.output)
            rows.append({**label, "ranks": ranks_of(start), "aim": aim, "victim": victim, "step": step,
                         "seconds_to_end": round(time.monotonic() - at, 1)})
        elif run.wait(10 * PATIENCE_S) and run.launcher.returncode:
            raise RunStopped(f"a run failed before its kill:\n{run.output}")
        resumed = re.search(r"resuming from \S*/(step_\d+)", run.output)
        if resumed and resumed[1] != newest or newest and not resumed and run.step:
            problems.append(f"went on from {resumed and resumed[1]}, the newest checkpoint was {newest}")
        if last_kill:
            last_kill["resumed_from"] = resumed and resumed[1]
        if resumed:
            if int(resumed[1][5:]) < resumed_at:
                problems.append(f"went back to {resumed[1]} after step {resumed_at}")
            resumed_at = int(resumed[1][5:])
        if not killed:
            break
    found = losses(folder)
    gaps = [abs(found.get(step, float("inf")) / loss - 1) for step, loss in reference.items()]
    same_ranks = len({ranks_of(i) for i in range(start + 1)}) == 1
    equal = found == reference
    if not (equal if same_ranks else max(gaps) < ALLOWED):
        problems.append(f"losses differ by up to {max(gaps):.2e}")
    return rows, {**label, "ranks": sorted({ranks_of(i) for i in range(start + 1)}), "kills": len(rows),
                  "losses_equal": equal, "largest_gap": max(gaps), "problems": problems}


def report(kills, trials, began, path):
    """The summary of what has been done since `began`; with all rows it is written to `path`, unless that is None."""
    waits = [row["seconds_to_end"] for row in kills if row["victim"] != "all"]
    summary = {
        "command": sys.argv, "hardware": f"{os.cpu_count()} CPU cores", "versions": logs.provenance()["versions"],
        "minutes": (time.monotonic() - began) / 60, "kills": len(kills), "runs": len(trials),
        "failed_runs": sum(bool(row["problems"]) for row in trials)}
    if waits:
        summary["seconds_until_the_others_ended"] = {"median": statistics.median(waits), "largest": max(waits)}
    if path:
        path.write_text(json.dumps({**summary, "trials": trials, "rows": kills}, indent=1))
    return summary


def main():
    parser = entry.Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="kills in all (40)")
    parser.add_argument("--kills_per_run", type=int, default=4, help="kills on the way of one run (4)")
    parser.add_argument("--ranks", default="2,3", help="numbers of ranks (2,3)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, more = parser.parse_known_args()
    counts, rng = [int(n) for n in args.ranks.split(",")], random.Random(args.seed)
    if any(6 % n for n in counts):
        raise UserError(f"--ranks={args.ranks}: each must divide the batch of 6 rows")
    began, references, kills, trials = time.monotonic(), {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        keys = [*KEYS, f"--data.cache_dir={folder}/cache", *more]
        cases = itertools.cycle((p, a, n) for n in counts for a in (True, False) for p in PRECISIONS)
        for number in itertools.count():
            if len(kills) >= args.kills:
                break
            precision, asynchronous, n = next(cases)
            if (precision, n) not in references:
                out_dir = Path(folder, f"reference_{precision}_{n}")
                finish(Run(n, [*keys, *PRECISIONS[precision], f"--out_dir={out_dir}"]))
                references[precision, n] = losses(out_dir)
            changes = len(counts) > 1 and number % 5 == 4  # every fifth run changes its number of ranks at each start
            others = [n, *(other for other in counts if other != n)]
            out_dir = Path(folder, f"trial_{number}")
            rows, row = trial(
                out_dir, [*keys, *PRECISIONS[precision], f"--async_checkpoint={asynchronous}", f"--out_dir={out_dir}"],
                lambda start: others[start % len(others)] if changes else n,  # noqa: B023
                references[precision, n], min(args.kills_per_run, args.kills - len(kills)), rng,
                {"trial": number, "precision": precision, "async_checkpoint": asynchronous})
            kills += rows
            trials.append(row)
            report(kills, trials, began, args.out)
            print(f"run {number}: {precision}, {'asynchronous' if asynchronous else 'synchronous'} saves, ranks "
                  f"{row['ranks']}, {len(rows)} kills: " + ("; ".join(row["problems"]) or "as without"), flush=True)
    print(json.dumps(report(kills, trials, began, args.out)))
    sys.exit(any(row["problems"] for row in trials))


if __name__ == "__main__":
    entry.run(main)
