"""Block-wise FP8: a linear layer as in DeepSeek-V3 (arXiv 2412.19437, section 3.3), with casts of our own.

Every operand is e4m3, with a float32 scale for 1 x 128 values along the contraction, or for 128 x 128 of a weight. The
matmuls are cuBLASLt's (Hopper only), which multiplies the sum over 128 products by both scales, in float32. It wants
the contraction contiguous in both operands, so x, g and w (as fp8.py names them) are needed in two layouts, which
block_kernel.py makes in one pass over a tensor. Elsewhere PyTorch's operators make the same values.

An operand is a pair (values, scales) with values of shape (outer, contraction). To be multiplied by: scales of shape
(contraction / 128, outer) for 1 x 128 and (outer / 128, contraction / 128) for 128 x 128.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

CAPABILITY = 9  # of the GPUs that cuBLASLt has block-wise matmuls for: Hopper
E4M3, E4M3_MAX, SMALLEST_AMAX = torch.float8_e4m3fn, 448.0, 1e-12  # the last as in torchao

library = torch.library.Library("nanofp8", "FRAGMENT")
library.define("cast_blocks(Tensor x, bool tiles, bool plain, bool transposed) -> Tensor[]")
library.define("block_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType dtype, bool emulate) -> Tensor")


def cast(x, *, tiles=False, plain=True, transposed=False):
    """FP8 operands of x (rows, columns): [values, scales] of x if `plain`, then those of x.T if `transposed`.

    tiles: 128 x 128 values to a scale, not 1 x 128. Columns are a multiple of 128, and so are rows for tiles and x.T.
    """
    return torch.ops.nanofp8.cast_blocks(x, tiles, plain, transposed)


def cast_blocks(x, tiles, plain, transposed):
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9):  # Triton has no FP8 for these
        return [*(operand(x, tiles) if plain else []), *(operand(x.t(), tiles) if transposed else [])]
    from plumbing.block_kernel import cast_tile

    if tiles and plain and transposed and x.dtype == torch.float32:  # at once, Triton 3.6 writes wrong values for x.T
        return [*cast_blocks(x, tiles, True, False), *cast_blocks(x, tiles, False, True)]
    casts = empty_casts(x, tiles, plain, transposed)
    pointers = [*(casts[:2] if plain else [None, None]), *(casts[-2:] if transposed else [None, None])]
    grid = -(-x.shape[0] // 128), x.shape[1] // 128
    cast_tile[grid](x.contiguous(), *pointers, *x.shape, tiles, plain, transposed, num_warps=4)
    return casts


def empty_casts(x, tiles, plain, transposed):
    sizes = [x.shape] * plain + [x.shape[::-1]] * transposed
    return [t for outer, inner in sizes for t in (
        x.new_empty(outer, inner, dtype=E4M3),
        x.new_empty((outer // 128, inner // 128) if tiles else (inner // 128, outer), dtype=torch.float32))]


def operand(x, tiles):
    """The FP8 operand of x (outer, contraction) by the definition."""
    blocks = x.float().unflatten(1, (-1, 128))
    if tiles:
        blocks = blocks.unflatten(0, (-1, 128))
    amax = blocks.abs().amax((1, 3) if tiles else 2, keepdim=True).clamp(min=SMALLEST_AMAX)
    scales = amax * (1 / E4M3_MAX)  # neither a division by a number nor one of a number, which CUDA rounds otherwise
    values = (blocks * scales.reciprocal()).to(E4M3)
    return values.reshape(x.shape).contiguous(), scales.squeeze((1, 3)) if tiles else scales.squeeze(2).t().contiguous()


def in_blocks(x, scales):
    """(x in blocks, scales to broadcast over them): views of x (outer, contraction) and of an operand's scales."""
    blocks = x.unflatten(1, (-1, 128))
    if scales.shape == (x.shape[1] // 128, x.shape[0]):
        return blocks, scales.t().unsqueeze(2)
    return blocks.unflatten(0, (-1, 128)), scales[:, None, :, None]


def dequantized(values, scales):
    blocks, scales = in_blocks(values.float(), scales)
    return (blocks * scales).reshape(values.shape)


def matmul(a, b, dtype, emulate):
    """a @ b.T of two operands: a 1 x 128, b of either kind."""
    return torch.ops.nanofp8.block_mm(a[0], b[0].t(), a[1], b[1], dtype, emulate)


def block_mm(a, b, scale_a, scale_b, dtype, emulate):
    # An operator of its own: Inductor's lowering of aten._scaled_mm_v2 forgets the kinds of scales (torch 2.13).
    if emulate:
        return (dequantized(a, scale_a) @ dequantized(b.t(), scale_b).t()).to(dtype)
    kind = F.ScalingType.BlockWise1x128
    if scale_b.shape != (b.shape[0] // 128, b.shape[1]):
        kind = F.ScalingType.BlockWise128x128
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4))
    return F.scaled_mm(a, b, scale_a.t(), F.ScalingType.BlockWise1x128, scale_b.t(), kind, output_dtype=dtype)


library.impl("cast_blocks", cast_blocks, "CompositeExplicitAutograd")
library.impl("block_mm", block_mm, "CompositeExplicitAutograd")
torch.library.register_fake("nanofp8::cast_blocks", empty_casts, lib=library)
torch.library.register_fake("nanofp8::block_mm", lambda a, b, scale_a, scale_b, dtype, emulate: a.new_empty(
    a.shape[0], b.shape[1], dtype=dtype), lib=library)
CAST, MATMUL = torch.ops.nanofp8.cast_blocks.default, torch.ops.nanofp8.block_mm.default


class GatheredBlocks(torch.Tensor):
    """A weight that FSDP2 has gathered as an FP8 operand. It stands where the weight in high precision would."""

    @staticmethod
    def __new__(cls, values, scales, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)

    def __init__(self, values, scales, dtype):
        self.values, self.scales = values, scales

    def __tensor_flatten__(self):
        return ["values", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner, dtype, size, stride):
        return cls(inner["values"], inner["scales"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):  # FSDP2 and autograd ask for the same weight again
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.as_strided.default, torch.ops.aten.alias.default)
        return cls(args[0].values, args[0].scales, args[0].dtype)


@torch._dynamo.allow_in_graph
class BlockwiseMatmuls(torch.autograd.Function):
    """x (tokens, in) @ weight.T, all three matmuls in block-wise FP8. weight: (out, in), maybe as GatheredBlocks."""

    @staticmethod
    def forward(ctx, x, weight, keep_casts, emulate):
        ctx.keep_casts, ctx.emulate = keep_casts, emulate
        inputs = cast(x, transposed=keep_casts)
        if isinstance(weight, GatheredBlocks):
            weights = [weight.values, weight.scales]
        else:
            weights = cast(weight, tiles=True, transposed=keep_casts)
        ctx.save_for_backward(*(inputs[2:] or [x]), *(weights[2:] or [weight]))
        return matmul(inputs[:2], weights[:2], x.dtype, emulate)

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors  # selective recompute allows one read
        inputs, weights = (saved[:2], saved[2:]) if ctx.keep_casts else (saved[:1], saved[1:])
        if not ctx.keep_casts:
            inputs = cast(*inputs, plain=False, transposed=True)
        if isinstance(weights[0], GatheredBlocks):
            weights = [t.t().contiguous() for t in (weights[0].values, weights[0].scales)]
        elif not ctx.keep_casts:
            weights = cast(*weights, tiles=True, plain=False, transposed=True)
        gradients = cast(g, transposed=True)
        return (matmul(gradients[:2], weights, g.dtype, ctx.emulate),
                matmul(gradients[2:], inputs, g.dtype, ctx.emulate), None, None)


class BlockwiseLinear(nn.Linear):
    """nn.Linear in block-wise FP8; fp8.convert makes it of an nn.Linear, in place."""

    def forward(self, x):
        keep_casts = self.keep_casts and torch.is_grad_enabled()
        y = BlockwiseMatmuls.apply(x.flatten(0, -2), self.weight, keep_casts, self.emulate)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])
