"""Weights that are cast to FP8 outside of the compiled blocks: before each all-gather, or once per optimizer step.

torchao's classes with changes of ours. Imported where FP8 is on only: bf16 runs need no torchao.
"""

import math

import torch
from torch.utils._pytree import tree_map_only
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole
from torchao.float8.float8_utils import amax_to_scale
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from plumbing import blockwise


def cast_to_fp8(x, scale, dtype):
    """x * scale in FP8, saturated at the format's maximum; computed in float32, as torchao does."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


compiled_cast = torch.compile(cast_to_fp8, dynamic=True)


def one_pass_cast(x, scale, dtype):
    """cast_to_fp8; compiled on a GPU, where the eager one's four passes over x cost 12% of an H100's step."""
    return (compiled_cast if x.is_cuda else cast_to_fp8)(x, scale, dtype)


class GatherInFP8(WeightWithDynamicFloat8CastTensor):
    """A weight shard that FSDP2 casts to FP8 just before each all-gather, with one scale for the whole tensor.

    Changed: a compiled cast, an amax in one pass instead of two, a precomputed scale that __tensor_unflatten__ keeps.
    """

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(WeightWithDynamicFloat8CastTensor,
                             lambda t: cls(t._tensor, t._linear_mm_config, t._dtype, t._precomputed_scale), out)

    def __tensor_flatten__(self):
        names = ["_tensor"] if self._precomputed_scale is None else ["_tensor", "_precomputed_scale"]
        return names, (self._linear_mm_config, self._dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["_tensor"], *meta, inner.get("_precomputed_scale"))

    def fsdp_pre_all_gather(self, mesh):
        scale = self._precomputed_scale
        if scale is None:
            amax = torch.linalg.vector_norm(self._tensor, math.inf)
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
            scale = amax_to_scale(amax, self._dtype)
        return (one_pass_cast(self._tensor, scale, self._dtype),), (scale,)


class GatherInBlocks(GatherInFP8):
    """A weight shard that FSDP2 gathers as an operand of block-wise matmuls. Whole blocks need no all-reduce."""

    def fsdp_pre_all_gather(self, mesh):
        return tuple(blockwise.cast(self._tensor, tiles=True)), None

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        if out is None:  # else it is the result of the first gather, whose memory FSDP2 has filled again
            return blockwise.GatheredBlocks(*outputs, param_dtype), outputs


@torch._dynamo.allow_in_graph
class AsCast(torch.autograd.Function):
    """The FP8 tensor of a weight's cast and scale. Its gradient is the weight's."""

    @staticmethod
    def forward(ctx, weight, cast, scale, mm_config):
        return Float8TrainingTensor(cast, scale, weight.dtype, mm_config, GemmInputRole.WEIGHT)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


class CastOnce(Float8Linear):
    """A tensorwise layer whose weight is cast once, by cast_weight, for all passes of a step."""

    cast = scale = None  # of the weight, in FP8 and 0-d float32

    def forward(self, x):
        weight = AsCast.apply(self.weight, self.cast, self.scale, self.linear_mm_config)
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.linear_mm_config, self.config)
        return y if self.bias is None else y + self.bias

    def cast_weight(self, weight):
        """Cast the weight, with the values of `weight`: whenever they change."""
        dtype = self.config.cast_config_weight.target_dtype
        if self.cast is None:  # cuda_graph wants the same memory in every step
            self.cast, self.scale = torch.empty_like(weight, dtype=dtype), weight.new_empty(()).float()
        self.scale.copy_(amax_to_scale(torch.linalg.vector_norm(weight, math.inf), dtype))
        self.cast.copy_(one_pass_cast(weight, self.scale, dtype))
