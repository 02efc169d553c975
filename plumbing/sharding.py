"""From a parameter to the plain tensor inside: FSDP2 makes it a DTensor, and FP8 all-gather wraps this rank's rows."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def local_shard(p):
    """This rank's rows of parameter `p` as FSDP2 stores them: possibly in an FP8 wrapper; no copy."""
    return p._local_tensor if isinstance(p, DTensor) else p


def plain_local(p):
    """This rank's rows of parameter `p` as a plain tensor, without DTensor and FP8 wrappers; no copy.

    In host memory if they are there (AdamW.offload_weights).
    """
    shard = getattr(p, "on_host", local_shard(p))
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
