"""The processes of a run: torchrun's ranks, one device each."""

import contextlib
import functools
import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from plumbing.errors import RunStopped, UserError
from plumbing.stopping import STARTUP, Watchdog

MEETING = 300  # seconds in which all ranks have to start
PREPARATION = 6 * 3600  # seconds that ranks wait while others tokenize or download


@dataclass(frozen=True)
class Ranks:
    """This process among the `world_size` processes of the run, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0  # among those of its node
    n_nodes: int = 1
    watchdog: Watchdog = field(default_factory=Watchdog, compare=False)

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
    def node_first(self):
        """One rank of each node runs the block before the others, which find what it has made on the node's disk."""
        self.watchdog.grace = PREPARATION
        if self.local_rank > 0:
            gather(None)  # waits for all
        yield
        if self.local_rank == 0:
            gather(None)
        self.watchdog.grace = STARTUP

    def watch(self, timeout_minutes):
        """Start the watchdog, if there is a launcher: other ranks and its store."""
        if "RANK" in os.environ:
            self.watchdog.start(shared_store(), self.rank, self.world_size, 60 * timeout_minutes)

    def note_start(self):
        """Note that training has begun: what is in out_dir from now on is of this run."""
        if "RANK" in os.environ:
            launcher_store().set("began", "yes")

    def replace_others(self):
        """Whether torchrun has started these ranks in place of others, which had begun to train; on all the same."""
        return "RANK" in os.environ and launcher_store().check(["began"])

    def say(self, text):
        """Print a line on rank 0, above a progress bar if there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def now(self):
        """time.perf_counter() when the device has finished all work it was given."""
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()


def from_launcher(name, default):
    """A number that torchrun has put into the environment."""
    return int(os.environ.get(name, default))


def progress_bar(items, what, unit, total=None):
    """`items` with a bar that shows the time left, on the terminal of rank 0. items: None for one that is updated."""
    return tqdm(items, desc=what, unit=unit, total=total, leave=False, disable=None if process_rank() == 0 else True)


def process_rank():
    """This process's rank, 0 without torchrun: for what runs before, or without, a Ranks."""
    return from_launcher("RANK", 0)


def find_ranks(device="auto"):
    """The Ranks of this process, by torchrun's environment variables; makes its GPU the current device.

    device: "auto" (cuda if there is a GPU), "cuda" or "cpu". Raises UserError if there is no such GPU, or no variables.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        raise UserError(f"the environment has RANK or WORLD_SIZE, but no {', '.join(missing)}: start with torchrun, "
                        "which sets them all, or unset RANK and WORLD_SIZE for a run of one rank")
    rank, world_size, local_rank = process_rank(), from_launcher("WORLD_SIZE", 1), from_launcher("LOCAL_RANK", 0)
    n_nodes = world_size // from_launcher("LOCAL_WORLD_SIZE", world_size)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no GPU: set device=auto or device=cpu")
    place = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        if local_rank >= (n_gpus := torch.cuda.device_count()):
            raise UserError(f"a rank for GPU {local_rank}, but there are {n_gpus}: start no more ranks than there are "
                            "GPUs (torchrun --nproc-per-node)")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    return Ranks(rank, world_size, place, local_rank, n_nodes)


@functools.cache
def launcher_store():
    """torchrun's key-value store. Raises UserError if it cannot be reached."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=MEETING)))
    except dist.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the ranks cannot meet at {place}: {error}. Name the address of node 0 and a free port of it "
                        "(torchrun --master-addr, --master-port)") from error
    return store


@functools.cache
def shared_store():
    """torchrun's store, under a prefix of its own for each start of the ranks. Every rank must call it."""
    store = launcher_store()
    return dist.PrefixStore(agree_on_start(store, process_rank(), from_launcher("WORLD_SIZE", 1)), store)


def agree_on_start(store, rank, world_size):
    """A new name for this start of the ranks, which rank 0 gives to all. Raises RunStopped if not all come.

    When torchrun restarts the ranks, its store still has what those before them wrote, addresses too. The number of
    the restart would not do: each node has its own count. Rank 0 answers every greeting, old ones too.
    """
    if rank > 0:
        greeting = secrets.token_hex(8)
        store.set(f"greeting_{rank}", greeting)
        name = store.get(greeting).decode()
        store.add(f"heard_{name}", 1)
        return name
    name, deadline = secrets.token_hex(8), time.monotonic() + MEETING
    while (n_heard := store.add(f"heard_{name}", 0)) < world_size - 1:
        for key in (f"greeting_{i}" for i in range(1, world_size)):
            if store.check([key]):
                store.set(store.get(key).decode(), name)
        if time.monotonic() > deadline:
            raise RunStopped(f"{n_heard + 1} of {world_size} ranks have started within {MEETING} s")
        time.sleep(0.05)
    return name


def fails_first():
    """Whether no other rank has failed before this one, as far as they can tell each other."""
    if dist.is_initialized() and "RANK" in os.environ:
        return shared_store().add("failed", 1) == 1
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    return launcher_store().add(f"failed_{from_launcher('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1


def join_process_group(ranks):
    """Start torch.distributed among the ranks of torchrun, or with this process alone. A running group is kept."""
    if not dist.is_initialized():
        store = shared_store() if "RANK" in os.environ else dist.HashStore()
        timeout = timedelta(seconds=PREPARATION)  # the watchdog's is shorter, and it says more
        dist.init_process_group("cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo", store=store,
                                rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def device_mesh(ranks, replicas=1):
    """The DeviceMesh for fully_shard: ("shard",), or with replicas > 1 ("replicate", "shard")."""
    shape, names = (ranks.world_size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, ranks.world_size // replicas), ("replicate", "shard")
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)


def gather(value):
    """[the value of each rank], on every rank; [value] without a process group."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same(values):
    """Raise UserError on every rank if one of `values`, {name: value}, is not the same on all ranks."""
    first, *others = gather(values)
    if differ := [f"{name}: {first[name]!r} on rank 0, {other[name]!r} on rank {rank}"
                  for rank, other in enumerate(others, 1) for name in first if other[name] != first[name]]:
        raise UserError(f"all ranks need the same config and data, of which each takes its part: {'; '.join(differ)}")
