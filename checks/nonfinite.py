"""The first step whose loss or gradient norm is inf or nan: kept away from the weights, and reported with evidence.

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
    """The first step that was not finite."""

    step: int
    loss: float
    grad_norm: float


class Guard:
    """Finds the first non-finite step, and freezes the weights from it on: those are saved that the bad step met."""

    def __init__(self, device):
        self.found = torch.zeros(3, device=device)  # step, loss, gradient norm; step 0: none

    def check(self, step, loss, grad_norm):
        """Whether to update the weights, as a 0-d bool tensor for AdamW.step. loss, grad_norm: 0-d tensors."""
        values = torch.stack([loss.new_full((), step), loss, grad_norm])
        is_first = ~(loss + grad_norm).isfinite() & (self.found[0] == 0)
        self.found = torch.where(is_first, values, self.found)
        return self.found[0] == 0

    def take(self):
        """The NonFinite, or None. Waits for the device."""
        step, loss, grad_norm = self.found.tolist()
        return NonFinite(int(step), loss, grad_norm) if step else None


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
    return folder, (f"step {bad.step}: loss {bad.loss:.4g}, gradient norm {bad.grad_norm:.4g}; no update "
                    f"since, so the weights are clean ({where}). Lower optim.lr, or look at the batch of that step, in "
                    f"{folder / 'replay.pt'} with every layer's fp8 health (torch.load).")
