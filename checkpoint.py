"""Save and resume. A checkpoint is complete or it is not there.

`out_dir/checkpoints/step_00000200/` holds a torch.distributed.checkpoint of plain tensors (weights, moments, master
weights) without any FP8 wrapper, so that FP8 and bf16 runs read each other's, on any number of ranks; and `run.json`
with the step and what the run was. It is written under another name and renamed when every rank is done.

The rest of a run's state needs no saving, because it is a function of the step: the data position, the learning rate,
the noise of stochastic rounding; FP8 scales are functions of the weights.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from fp8 import plain_local

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what no_dist asks for


def latest(out_dir):
    """The newest complete checkpoint folder below out_dir, or None."""
    found = sorted(p for p in Path(out_dir, "checkpoints").glob("step_*") if not p.name.endswith(".tmp"))
    return found[-1] if found else None


def tensors(model, optimizer=None):
    """{name: tensor} of all that a checkpoint holds: live storage, DTensors where sharded."""
    state = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = like(p, plain_local(p))
        for kind, of in (optimizer.state if optimizer else {}).items():
            state[f"optim.{kind}.{name}"] = like(p, of[name])
    return state


def like(p, local):
    """`local` as a tensor laid out over the ranks as parameter p is."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def save(out_dir, step, model, optimizer, run, *, keep):
    """Write checkpoint `step`, then remove all but the newest `keep` (0: remove none). Called on every rank.

    run: what the run was, a JSON-able dict; comes back from load.
    """
    folder = Path(out_dir, "checkpoints", f"step_{step:08d}")
    aside = folder.with_name(folder.name + ".tmp")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        for incomplete in folder.parent.glob("step_*.tmp"):  # of a run that was killed while it saved
            shutil.rmtree(incomplete)
    barrier()
    dcp.save(tensors(model, optimizer), checkpoint_id=aside, no_dist=not dist.is_initialized())
    barrier()
    if first:
        aside.joinpath("run.json").write_text(json.dumps({"step": step, **run}, indent=1))
        for path in (*aside.iterdir(), aside):  # on disk before it is called complete
            flush(path)
        aside.rename(folder)
        flush(folder.parent)
        complete = sorted(p for p in folder.parent.glob("step_*") if not p.name.endswith(".tmp"))
        for old in complete[:-keep] if keep else []:
            shutil.rmtree(old)
    barrier()


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def set_aside(out_dir):
    """Rename the checkpoints of an earlier run in out_dir to checkpoints_before, in place of any older such folder."""
    folder, before = Path(out_dir, "checkpoints"), Path(out_dir, "checkpoints_before")
    if folder.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)


def read_run(folder):
    """The `run` of a checkpoint folder: step and what the run was. Raises ValueError if the folder is none."""
    path = Path(folder, "run.json")
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint of nanofp8: it has no run.json")
    return json.loads(path.read_text())


def load(folder, model, optimizer=None):
    """Fill model, and optimizer where given, from a checkpoint folder, in place. Called on every rank.

    Dtypes convert. Master weights that the checkpoint lacks are made from its weights; ones that it has and the
    optimizer lacks are left. Raises ValueError where the checkpoint is of another model.
    """
    state = tensors(model, optimizer)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name in [n for n in state if n.startswith("optim.master.") and n not in saved]:
        weight = name.replace("optim.master.", "model.")
        del state[name]
        assert weight in saved, name
    differ = [f"{n}: {tuple(saved[n].size) if n in saved else 'missing'} for {tuple(t.shape)}"
              for n, t in state.items() if n not in saved or saved[n].size != t.shape]
    if differ:
        raise ValueError(f"{folder} is a checkpoint of another model: " + ", ".join(differ[:5])
                         + (f" and {len(differ) - 5} more" if len(differ) > 5 else ""))
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    if optimizer is not None:
        optimizer.step_count = read_run(folder)["step"]
        for name, master in optimizer.state.get("master", {}).items():
            if f"optim.master.{name}" not in saved:
                master.copy_(optimizer.weights[name])


def barrier():
    if dist.is_initialized():
        dist.barrier()
