"""nonfinite.py: which steps update the weights, and what is reported about those that do not."""

import math
from types import SimpleNamespace

import pytest
import torch

from checks import telemetry
from checks.nonfinite import Guard, NonFinite, save_evidence
from configurator import Config, FP8Config

OK, INF, NAN = 1.0, math.inf, math.nan


def feed(guard, steps):
    """[whether the weights are updated] for {step: (loss, gradient norm)}."""
    return [guard.check(step, *map(torch.tensor, values)).item() for step, values in steps.items()]


def test_the_first_non_finite_step_freezes_the_weights_and_is_the_one_that_is_reported():
    guard = Guard(torch.device("cpu"))
    assert feed(guard, {4: (OK, OK)}) == [True] and guard.take() is None
    assert feed(guard, {5: (2.0, INF), 6: (OK, OK), 7: (NAN, OK)}) == [False, False, False]
    assert guard.take() == NonFinite(step=5, loss=2.0, grad_norm=INF)


@pytest.mark.parametrize("loss, grad_norm", [(NAN, OK), (OK, NAN), (INF, OK), (OK, -INF), (INF, -INF)])
def test_each_number_that_is_not_finite_is_found(loss, grad_norm):
    assert feed(Guard(torch.device("cpu")), {1: (loss, grad_norm)}) == [False]


@pytest.mark.parametrize("broken, where", [
    ([], "(no fp8 operand held inf or nan)"), (["a input"], "(fp8 operands with inf or nan, in order: a input)"),
    (["a input", "a weight", "b input", "c input"], "in order: a input, a weight, b input)")])
def test_the_message_names_the_first_operands_that_broke(tmp_path, monkeypatch, broken, where):
    config = Config(out_dir=str(tmp_path), fp8=FP8Config(enabled=True))
    monkeypatch.setattr(telemetry, "health", lambda *_: [{"fp8_layer": "a"}])
    monkeypatch.setattr(telemetry, "broken", lambda rows: broken)
    assert where in save_evidence(config, NonFinite(5, 2.5, INF), SimpleNamespace(rank=1), None, None)[1]


def test_the_message_has_the_numbers_of_the_step(tmp_path):
    config, loader = Config(out_dir=str(tmp_path)), SimpleNamespace(rank=1)  # which writes nothing
    folder, message = save_evidence(config, NonFinite(5, 2.5, INF), loader, None, None)
    assert folder == tmp_path / "nonfinite_step_00000005" and not folder.exists()
    assert message.startswith("step 5: loss 2.5, gradient norm inf; no update since, so the weights are clean (fp8 is "
                              "off). Lower optim.lr") and f"in {folder / 'replay.pt'} with" in message
