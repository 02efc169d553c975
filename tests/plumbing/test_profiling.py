"""profiling.py: what a recorded step's files hold."""

import gzip
import json
import pickle

import pytest
from conftest import train_here

from configurator import Config
from plumbing.errors import UserError


def test_the_trace_of_a_step_has_its_matmuls_and_no_other_steps(tiny_run, tmp_path, capsys):
    train_here(*tiny_run, "--max_steps=3", "--profile_step=2", "--eval_interval=0", "--checkpoint_interval=0",
               f"--out_dir={tmp_path / 'out'}")
    trace = tmp_path / "out/trace_step2.json.gz"
    assert f"trace of step 2: {trace}" in capsys.readouterr().out
    names = [event.get("name") for event in json.loads(gzip.open(trace).read())["traceEvents"]]
    # two layers of four linear layers and lm_head, three matmuls each, two passes
    assert names.count("aten::mm") == 2 * 3 * (2 * 4 + 1)


def test_memory_without_a_gpu_and_steps_that_never_come_are_errors(tiny_run, tmp_path, capsys):
    with pytest.raises(UserError, match="memory_step records the memory of a GPU"):
        train_here(*tiny_run, "--memory_step=1", f"--out_dir={tmp_path}")
    assert "data:" not in capsys.readouterr().out and not list(tmp_path.iterdir())  # nothing slow, nothing set aside
    for key in ("profile_step", "memory_step"):
        assert list(Config(max_steps=5, **{key: 6}).problems()) == [
            f"{key}=6 must be a step: 1 to max_steps=5, 0: none"]


@pytest.mark.gpu
def test_the_memory_of_a_step_is_recorded(tiny_run, tmp_path):
    keys = [key for key in tiny_run if not key.startswith("--device")]
    train_here(*keys, "--device=cuda", "--max_steps=2", "--memory_step=2", "--eval_interval=0",
               "--checkpoint_interval=0", f"--out_dir={tmp_path / 'out'}")
    snapshot = pickle.loads((tmp_path / "out/memory_step2.pickle").read_bytes())
    assert any(snapshot["device_traces"])
