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


@pytest.mark.parametrize("policy, updates", [("stop", [True, False, False, False]),
                                             ("skip", [True, False, True, False])])
def test_stop_freezes_the_weights_and_skip_leaves_single_updates_out(policy, updates):
    guard = Guard(policy, torch.device("cpu"))
    assert feed(guard, {4: (OK, OK), 5: (2.0, INF), 6: (OK, OK), 7: (NAN, OK)}) == updates
    n_skipped = updates.count(False)
    assert guard.take() == NonFinite(step=5, loss=2.0, grad_norm=INF, skipped=n_skipped,
                                     in_a_row=1 if policy == "skip" else 3)


def test_skipped_updates_are_counted_once_and_those_in_a_row_across_reports():
    guard = Guard("skip", torch.device("cpu"))
    assert guard.take() is None
    feed(guard, {1: (INF, OK), 2: (INF, OK)})
    assert guard.take()[2:] == (OK, 2, 2)
    assert guard.take() is None
    feed(guard, {3: (INF, OK)})
    found = guard.take()
    assert (found.step, found.skipped, found.in_a_row) == (3, 1, 3)
    feed(guard, {4: (OK, OK), 5: (OK, -INF)})
    assert guard.take()[3:] == (1, 1)


@pytest.mark.parametrize("broken, where", [
    ([], "(no fp8 operand held inf or nan)"), (["a input"], "(fp8 operands with inf or nan, in order: a input)"),
    (["a input", "a weight", "b input", "c input"], "in order: a input, a weight, b input)")])
def test_the_message_names_the_first_operands_that_broke(tmp_path, monkeypatch, broken, where):
    config = Config(out_dir=str(tmp_path), fp8=FP8Config(enabled=True))
    monkeypatch.setattr(telemetry, "health", lambda *_: [{"fp8_layer": "a"}])
    monkeypatch.setattr(telemetry, "broken", lambda rows: broken)
    assert where in save_evidence(config, NonFinite(5, 2.5, INF, 1, 1), SimpleNamespace(rank=1), None, None)[1]


def test_the_message_has_the_numbers_of_the_step(tmp_path):
    config, loader = Config(out_dir=str(tmp_path)), SimpleNamespace(rank=1)  # which writes nothing
    folder, message = save_evidence(config, NonFinite(5, 2.5, INF, 3, 2), loader, None, None)
    assert folder == tmp_path / "nonfinite_step_00000005" and not folder.exists()
    assert message.startswith("step 5: loss 2.5, gradient norm inf; 3 updates skipped, 2 in a row, so the weights are "
                              "clean (fp8 is off). Lower optim.lr") and f"in {folder / 'replay.pt'} with" in message
