"""Steps whose loss or gradient norm is inf or nan: kept away from the weights, and reported with evidence.

The check disables the optimizer's update on the device, so that no step waits for the GPU. train.py asks for its result
when it logs, evaluates or saves.
"""

import copy
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from checks import telemetry


class NonFinite(NamedTuple):
    """The first non-finite step since the last report."""

    step: int
    loss: float
    grad_norm: float
    skipped: int  # updates since the last report
    in_a_row: int  # updates skipped up to now, without one between


class Guard:
    """Finds non-finite steps. policy: "stop" freezes the weights from the first one on, "skip" leaves it out."""

    def __init__(self, policy, device):
        self.policy = policy
        self.found = torch.zeros(3, device=device)  # step, loss, gradient norm; step 0: none
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped since the last report, in a row

    def check(self, step, loss, grad_norm):
        """Whether to update the weights, as a 0-d bool tensor for AdamW.step. loss, grad_norm: 0-d tensors."""
        finite = (loss + grad_norm).isfinite()
        if self.policy == "stop":
            finite &= self.found[0] == 0  # frozen, so that the weights saved are those that the bad step met
        values = torch.stack([loss.new_full((), step), loss, grad_norm])
        self.found = torch.where(finite | (self.found[0] > 0), self.found, values)
        self.counts = torch.stack([self.counts[0] + ~finite, (self.counts[1] + 1) * ~finite])
        return finite

    def take(self):
        """The NonFinite since the last call, or None. Waits for the device."""
        step, loss, grad_norm = self.found.tolist()
        if step == 0:
            return None
        skipped, in_a_row = self.counts.tolist()
        self.found, self.counts[0] = torch.zeros_like(self.found), 0
        return NonFinite(int(step), loss, grad_norm, skipped, in_a_row)


def save_evidence(config, bad, loader, model, rerun):
    """(folder, message) about a NonFinite step; rank 0 writes folder/replay.pt: the batch of all ranks, FP8 health.

    config, loader: of the run. rerun: forward and backward passes over that step's batch. Every rank must call it.
    """
    health = telemetry.health(model, rerun, bad.step) if config.fp8.enabled else []
    folder, broken = Path(config.out_dir, f"nonfinite_step_{bad.step:08d}"), telemetry.broken(health)
    if loader.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir(parents=True)
        whole, n_samples = copy.copy(loader), loader.global_batch_size
        whole.rank, whole.world_size = 0, 1
        torch.save({**bad._asdict(), "batch": whole.batch(bad.step - 1), "fp8_health": health, "broken": broken,
                    "samples": list(range((bad.step - 1) * n_samples, bad.step * n_samples))}, folder / "replay.pt")
    where = "no fp8 operand held inf or nan" if health else "fp8 is off"
    if broken:
        where = f"fp8 operands with inf or nan, in order: {', '.join(broken[:3])}"
    return folder, (f"step {bad.step}: loss {bad.loss:.4g}, gradient norm {bad.grad_norm:.4g}; {bad.skipped} updates "
                    f"skipped, {bad.in_a_row} in a row, so the weights are clean ({where}). Lower optim.lr, or look at "
                    f"the batch of that step, in {folder / 'replay.pt'} with every layer's fp8 health (torch.load).")
