"""docs/forks.md: each diff applies to a copy of the repository, and the fork trains in FP8 and passes its proof."""

import json
import math
import re
import shutil
import subprocess

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import REPO, build, metrics, run, train_here

import checkpoint
from configurator import Config
from plumbing.storage import Reader

PAGE = (REPO / "docs/forks.md").read_text()
FORKS = dict(zip(("relu", "muon", "recipe"), re.findall(r"^```diff\n(.*?)^```$", PAGE, re.M | re.S), strict=True))
FP8 = ["--fp8.enabled=True", "--fp8.emulate=True", "--optim.min_lr=0.003"]  # a constant rate, whatever max_steps is


def copy_with(fork, folder):
    """A copy of what train.py needs in `folder`, with a diff of the page applied."""
    for path in (*REPO.glob("*.py"), REPO / "tests/train_many.py"):
        (folder / path.relative_to(REPO)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(REPO))
    for name in ("checks", "formats", "plumbing"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["git", "apply", "-p0", "-"]
    applied = subprocess.run(command, input=FORKS[fork], cwd=folder, capture_output=True, text=True)
    assert applied.returncode == 0, f"the {fork} fork no longer applies: {applied.stderr}"
    return folder


def losses(run):
    found = [run.train[step]["loss"] for step in sorted(run.train)]
    assert all(map(math.isfinite, found)) and found[-1] < found[0]
    return found


@pytest.fixture(scope="module")
def unforked(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unforked")
    train_here(*tiny_run, *FP8, "--max_steps=4", f"--out_dir={folder}")
    return losses(metrics(folder))


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_is_a_diff_of_5_to_40_lines(fork):
    assert 5 <= len(re.findall(r"^[+-](?![+-]{2} )", FORKS[fork], re.M)) <= 40


def test_another_activation_is_converted_and_trained_in_fp8(tiny_run, unforked, tmp_path):
    fork = copy_with("relu", tmp_path / "fork")
    done = run(fork / "train.py", *tiny_run, *FP8, "--max_steps=4", f"--out_dir={tmp_path / 'run'}")
    assert re.search(r"layers\.\*\.mlp\.up +\(128, 64\) +x2 +fp8 tensorwise", done.stdout)
    assert "gate_up" not in done.stdout and "fp8: verified, 27 emulated fp8 matmuls" in done.stdout
    found = losses(metrics(tmp_path / "run"))
    assert all(a != b for a, b in zip(found, unforked, strict=True))


def test_muon_moves_sharded_matrices_as_torch_moves_whole_ones_and_resumes_bit_for_bit(tiny_run, unforked, tmp_path):
    fork = copy_with("muon", tmp_path / "fork")
    args = [*tiny_run, *FP8, "--micro_batch_size=2", "--checkpoint_interval=1", "--keep=0"]
    runs = [[*args, "--max_steps=4", f"--out_dir={tmp_path / 'through'}"],
            *([*args, f"--max_steps={steps}", f"--out_dir={tmp_path / 'resumed'}"] for steps in (2, 4))]
    listed = tmp_path / "runs.json"
    listed.write_text(json.dumps([[argv, False] for argv in runs]))
    text = run(fork / "tests/train_many.py", listed, ranks=2).stdout
    assert text.count("fp8: verified, 27 emulated fp8 matmuls") == 3 and "2 steps done" in text
    found = losses(metrics(tmp_path / "through"))
    assert found == losses(metrics(tmp_path / "resumed"))
    assert found[0] == pytest.approx(unforked[0], rel=1e-3)  # FP8 scales of two ranks' tokens are others than of one's
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(found[1:], unforked[1:], strict=True))

    expected, w = build(seed=Config().seed), build()
    matrices = {name: p for name, p in expected.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    reference = torch.optim.Muon(matrices.values(), weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    momentum = {f"optim.momentum.{name}": torch.zeros_like(p) for name, p in matrices.items()}
    for step in (1, 2):
        folder = tmp_path / f"through/checkpoints/step_{step:08}"
        earlier = {name: m.clone() for name, m in momentum.items()}
        dcp.load(momentum, storage_reader=Reader(folder), no_dist=True)
        for name, p in matrices.items():  # the gradient by which the momentum has changed
            key = f"optim.momentum.{name}"
            p.grad = (momentum[key] - 0.95 * earlier[key]) / 0.05
        before = {name: p.detach().clone() for name, p in matrices.items()}
        reference.param_groups[0]["lr"] = metrics(tmp_path / "through").train[step]["lr"]
        reference.step()
        checkpoint.load(folder, w)
        for name, p in matrices.items():
            # 0.3% seen, of bf16 in Newton-Schulz; 57% and more where each rank orthogonalizes its own rows
            error = (w.get_parameter(name) - p).norm() / (p - before[name]).norm()
            assert error < 0.02, (step, name, error)


def test_a_recipe_of_ones_own_is_reported_proved_and_measured(tiny_run, unforked, tmp_path):
    fork = copy_with("recipe", tmp_path / "fork")
    done = run(fork / "train.py", *tiny_run, *FP8, "--max_steps=4", f"--out_dir={tmp_path / 'run'}",
               "--fp8.recipe_name=tensorwise_e4m3", "--fp8.self_check=True", "--fp8.stats_interval=4")
    assert re.search(r"lm_head +\(272, 64\) +x1 +fp8 tensorwise_e4m3", done.stdout)
    assert "fp8 self-check: loss" in done.stdout and "fp8: verified, 27 emulated fp8 matmuls" in done.stdout
    found = losses(metrics(tmp_path / "run"))
    assert found[0] == unforked[0]  # forward is the same
    assert all(a != b for a, b in zip(found[1:], unforked[1:], strict=True))
    health = [row["grad_output"] for row in metrics(tmp_path / "run").rows if "fp8_layer" in row]
    # a third mantissa bit: 32 dB, where two have 26
    assert health and all(layer["format"] == "e4m3" and layer["sqnr_db"] > 29 for layer in health)
