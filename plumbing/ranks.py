"""The processes of a run: torchrun's ranks, one device each."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from plumbing.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the `world_size` processes of the run, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, tensor):
        """Sum a tensor over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def main_first(self):
        """Rank 0 runs the block before the others, which then find on disk what it has downloaded or tokenized."""
        if not self.is_main:
            barrier()
        yield
        if self.is_main:
            barrier()

    def say(self, text):
        """Print a line on rank 0, above a progress bar if there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def now(self):
        """time.perf_counter() when the device has finished all work it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def process_rank():
    """This process's rank, 0 without torchrun: for what runs before, or without, a Ranks."""
    return int(os.environ.get("RANK", 0))


def find_ranks(device="auto"):
    """The Ranks of this process, by torchrun's environment variables; makes a GPU the current device.

    device: "auto" (cuda if there is a GPU), "cuda" or "cpu". Raises UserError if the rank has no GPU.
    """
    rank, world_size = process_rank(), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU: set device=auto or device=cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return Ranks(rank, world_size, torch.device("cpu"))
    gpu, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpu >= n_gpus:
        raise UserError(f"a rank for GPU {gpu}, but there are {n_gpus}: start no more ranks than there are GPUs "
                        "(torchrun --nproc-per-node)")
    torch.cuda.set_device(gpu)
    return Ranks(rank, world_size, torch.device("cuda", gpu))


def join_process_group(ranks):
    """Start torch.distributed among the ranks of torchrun, or with this process alone. A running group is kept."""
    if not dist.is_initialized():
        address = "env://" if "RANK" in os.environ else "tcp://localhost:0"  # port 0: any that is free
        dist.init_process_group("cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo", address,
                                rank=ranks.rank, world_size=ranks.world_size,
                                timeout=timedelta(hours=6))  # ranks wait while rank 0 tokenizes


def device_mesh(ranks, replicas=1):
    """The DeviceMesh for fully_shard: ("shard",), or with replicas > 1 ("replicate", "shard")."""
    shape, names = (ranks.world_size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, ranks.world_size // replicas), ("replicate", "shard")
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)


def barrier():
    """Wait for all ranks; nothing to wait for without a process group."""
    if dist.is_initialized():
        dist.barrier()


def gather(value):
    """[the value of each rank], on every rank; [value] without a process group."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
