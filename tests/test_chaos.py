"""The short form of bench/chaos.py; docs/reliability.md has the figures of the long one."""

import json

from conftest import run


def test_a_killed_run_goes_on_from_a_complete_checkpoint_and_ends_with_the_same_losses(tmp_path):
    report = tmp_path / "chaos.json"
    done = run("bench/chaos.py", "--kills=2", "--kills_per_run=2", "--ranks=2", f"--out={report}", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report.read_text())
    assert report["kills"] == 2 and [row["losses_equal"] for row in report["trials"]] == [True]
