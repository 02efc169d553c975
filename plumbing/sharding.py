"""A parameter, and the rows of it that this rank holds.

FSDP2 makes each parameter a DTensor over a part of its rows, and FP8 all-gather wraps that part once more. What fills,
updates, saves or loads weights goes around both: it works on the plain tensor that is stored.
"""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def plain_local(p):
    """The plain tensor that parameter `p` is stored in on this rank, without DTensor and FP8 wrappers; no copy."""
    t = p._local_tensor if isinstance(p, DTensor) else p
    return getattr(t, "_tensor", t).detach()


def like(p, local):
    """`local`, which holds something of each of this rank's rows of parameter `p`, as a tensor over all ranks."""
    if not isinstance(p, DTensor):
        return local
    shape = torch.Size([len(p), *local.shape[1:]])
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=shape, stride=local.stride())


def shard_rows(full, p):
    """The rows of `full` that this rank's shard of parameter `p` holds (all of them where p is not sharded)."""
    if not isinstance(p, DTensor):
        return full
    for dim, placement in enumerate(p.placements):
        if placement.is_shard():
            # chunk() cuts as FSDP2 does: equal pieces, the last ones shorter or empty
            pieces = full.chunk(p.device_mesh.size(dim), dim=placement.dim)
            rank = p.device_mesh.get_local_rank(dim)
            full = pieces[rank] if rank < len(pieces) else full[:0]
    return full


def reshard(model):
    """After forward passes alone: FSDP2 keeps what it gathered last for a backward pass, which does not come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
