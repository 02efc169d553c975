"""Helpers to reach the local tensor inside DTensor and FP8 wrappers.

FSDP2 makes each parameter a DTensor over a part of its rows, and FP8 all-gather wraps that part again. Code that fills,
updates, saves or loads weights works on the plain tensor inside of both.
"""

import itertools

import numpy
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def local_shard(p):
    """This rank's rows of parameter `p` as FSDP2 stores them: possibly in an FP8 wrapper; no copy."""
    return p._local_tensor if isinstance(p, DTensor) else p


def plain_local(p):
    """This rank's rows of parameter `p` as a plain tensor, without DTensor and FP8 wrappers; no copy."""
    shard = local_shard(p)
    return getattr(shard, "_tensor", shard).detach()


def like(p, local):
    """Wrap a local tensor, with a row for each of this rank's rows of `p`, as a DTensor sharded like `p`."""
    if not isinstance(p, DTensor):
        return local
    shape = torch.Size([len(p), *local.shape[1:]])
    # not DTensor.from_local, which would copy a tensor in host memory (optim.offload) to the mesh's device
    meta = TensorMeta(shape, local.stride(), local.dtype)
    return DTensor(local, DTensorSpec(p.device_mesh, p.placements, meta), requires_grad=False)


def shard_rows(full, p):
    """The rows of `full` that belong to this rank's shard of parameter `p`; all of them if p is not sharded."""
    if not isinstance(p, DTensor):
        return full
    mesh, last = p.device_mesh, p.device_mesh.ndim - 1  # FSDP2 shards over the last dimension, replicas are the other
    pieces = full.chunk(mesh.size(last))  # as FSDP2 does: equal pieces, the last ones shorter or empty
    rank = mesh.get_local_rank(last)
    return pieces[rank] if rank < len(pieces) else full[:0]


def reshard(model):
    """Free what FSDP2 gathered last and keeps for backward: to call after forward passes without one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class HostCopy:
    """A copy of tensors, DTensors too, in one block of host memory, pinned if a GPU has to write to it.

    tensors: {name: copy}, DTensors where the originals are. stream: on which update() copies from a GPU, else None.
    """

    def __init__(self, originals):
        sizes = [-(-local_shard(t).nbytes // 64) * 64 for t in originals.values()]  # aligned for any dtype
        self.memory = numpy.empty(sum(sizes), numpy.uint8)
        self.stream, self.tensors = None, {}
        if any(local_shard(t).is_cuda for t in originals.values()):
            self.stream = torch.cuda.Stream()
            # not pin_memory=True, which would round the size up to a power of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.memory.ctypes.data, len(self.memory), 0))
        starts = itertools.accumulate(sizes, initial=0)
        for (name, t), start in zip(originals.items(), starts, strict=False):
            local = local_shard(t)
            # from numpy: each has a storage of its own. Of a part of a storage, torch.save would write all of it.
            copy = torch.from_numpy(self.memory[start : start + local.nbytes]).view(local.dtype).view(local.shape)
            self.tensors[name] = like(t, copy)

    @torch.no_grad()
    def update(self, originals):
        """Copy the tensors, in any thread, when all is done that `stream` waits for; returns when they are here."""
        if self.stream:
            self.stream.synchronize()  # originals in host memory may still be written by a GPU
        with torch.cuda.stream(self.stream):
            for name, t in originals.items():
                local_shard(self.tensors[name]).copy_(local_shard(t), non_blocking=True)
        if self.stream:
            self.stream.synchronize()

    def free(self):
        """Unpin the memory."""
        if self.stream:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.memory.ctypes.data))
