"""bench/step_times.py: a stall shows, and steps that warm up do not count."""

import json

import pytest
from conftest import run


def write_run(folder, seconds):
    """A run whose steps took these seconds, every one logged."""
    folder.mkdir()
    ends = [sum(seconds[: i + 1]) for i in range(len(seconds))]
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": i, "loss": 1.0, "time_s": end, "peak_gib": 2.0}) + "\n" for i, end in enumerate(ends, 1)))
    (folder / "run.json").write_text(json.dumps(
        {"command": [], "hardware": "2 x x", "versions": {}, "git_commit": None, "tokens_per_step": 800, "ranks": 2}))
    return folder


@pytest.mark.parametrize("slow, status", [(0.108, 0), (0.112, 1)])
def test_a_slow_step_after_the_first_ones_is_found_and_sets_the_exit_status(tmp_path, slow, status):
    folder = write_run(tmp_path / "run", [9.0, 0.5, 0.1, 0.1, slow, 0.1, 0.1])
    done = run("bench/step_times.py", folder, "--skip=2", f"--out={tmp_path / 'times.json'}", check=False)
    (report,) = json.loads((tmp_path / "times.json").read_text())
    assert done.returncode == status, done.stderr
    assert (report["steps"], report["slowest_step"]) == (5, 5)
    assert (report["median_ms"], report["slowest_ms"]) == pytest.approx((100, 1000 * slow))
    assert report["tokens_per_s"] == pytest.approx(400 * 5 / (0.4 + slow))


def test_a_run_that_did_not_log_every_step_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", [1.0, 1.0, 1.0, 1.0])
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(rows[:1] + rows[2:]))
    done = run("bench/step_times.py", folder, "--skip=0", check=False)
    assert done.returncode == 2 and "train with --log_interval=1" in done.stderr
