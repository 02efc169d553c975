"""Block-wise FP8: a linear layer as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), with casts of our own.

Every operand is e4m3. Activations and gradients have a scale for each 1 x 128 values along the contraction, weights for
each 128 x 128:

    y = x @ w.T         x: 1 x 128 along features     w: 128 x 128
    grad_x = g @ w      g: 1 x 128 along outputs      w: 128 x 128, the same values
    grad_w = g.T @ x    g, x: 1 x 128 along tokens

The matmuls are cuBLASLt's (Hopper only), which multiplies each 128-wide piece of a sum by its two scales in float32. It
wants the contraction contiguous in both operands, so all of x, g and w are needed in two layouts: the casts decide how
fast the recipe is. block_kernel.py makes both layouts in one pass over the tensor. Emulated, the same values come from
PyTorch's operators, and the matmul is one of float32.

An operand is a pair (values, scales): values (outer, contraction), row-major; scales, which the values are to be
multiplied by, (contraction / 128, outer) for 1 x 128 and (outer / 128, contraction / 128) for 128 x 128.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

E4M3, E4M3_MAX, SMALLEST_AMAX = torch.float8_e4m3fn, 448.0, 1e-12  # the last as in torchao
CAPABILITY = 9  # of the GPUs that cuBLASLt has block-wise matmuls for: Hopper

library = torch.library.Library("nanofp8", "FRAGMENT")
library.define("cast_blocks(Tensor x, bool tiles, bool plain, bool transposed) -> Tensor[]")
library.define("transpose_blocks(Tensor values) -> Tensor")
library.define("block_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType dtype, bool emulate) -> Tensor")


def cast(x, *, tiles=False, plain=True, transposed=False):
    """FP8 operands of x (rows, columns): [values, scales] of x if `plain`, then those of x.T if `transposed`.

    tiles: one scale for 128 x 128 values instead of 1 x 128. Columns must be a multiple of 128, rows too for tiles and
    for x.T.
    """
    return torch.ops.nanofp8.cast_blocks(x, tiles, plain, transposed)


def has_fp8(x):
    """Whether Triton can compile FP8 casts for the device of x."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


def cast_blocks(x, tiles, plain, transposed):
    if not has_fp8(x):
        return [*(operand(x, tiles) if plain else []), *(operand(x.t(), tiles) if transposed else [])]
    from plumbing.block_kernel import cast_tile

    casts, x = empty_casts(x, tiles, plain, transposed), x.contiguous()
    pointers = [*(casts[:2] if plain else [None, None]), *(casts[-2:] if transposed else [None, None])]
    grid = -(-x.shape[0] // 128), x.shape[1] // 128
    cast_tile[grid](x, *pointers, *x.shape, tiles, plain, transposed, num_warps=8)
    return casts


def empty_casts(x, tiles, plain, transposed):
    """The results of cast_blocks, not filled."""
    sizes = [x.shape] * plain + [x.shape[::-1]] * transposed
    return [t for outer, inner in sizes for t in (
        x.new_empty(outer, inner, dtype=E4M3),
        x.new_empty((outer // 128, inner // 128) if tiles else (inner // 128, outer), dtype=torch.float32))]


def operand(x, tiles):
    """The FP8 operand (values, scales) of x (outer, contraction) by the definition."""
    blocks = x.float().unflatten(1, (-1, 128))
    if tiles:
        blocks = blocks.unflatten(0, (-1, 128))  # (outer / 128, 128, contraction / 128, 128)
    amax = blocks.abs().amax((1, 3) if tiles else 2, keepdim=True).clamp(min=SMALLEST_AMAX)
    values = (blocks * (E4M3_MAX / amax)).to(E4M3).reshape(x.shape).contiguous()
    scales = amax / E4M3_MAX
    return values, scales.squeeze((1, 3)) if tiles else scales.squeeze(2).t().contiguous()


def each(scales, values):
    """The scales of an operand, one for each value."""
    outer, inner = values.shape
    if scales.shape == (inner // 128, outer):
        return scales.t().repeat_interleave(128, 1)
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def transpose_blocks(values):
    if not has_fp8(values):
        return values.t().contiguous()
    from plumbing.block_kernel import transpose_tile

    values_t = values.new_empty(values.shape[::-1])
    transpose_tile[values.shape[0] // 128, values.shape[1] // 128](values, values_t, *values.shape, num_warps=8)
    return values_t


def matmul(a, b, dtype, emulate):
    """a @ b.T of two operands: a 1 x 128, b of either kind."""
    return torch.ops.nanofp8.block_mm(a[0], b[0].t(), a[1], b[1], dtype, emulate)


def block_mm(a, b, scale_a, scale_b, dtype, emulate):
    # An operator of its own: Inductor's lowering of aten._scaled_mm_v2 forgets the kinds of scales (torch 2.13).
    if emulate:
        b = b.t()
        return ((a.float() * each(scale_a, a)) @ (b.float() * each(scale_b, b)).t()).to(dtype)
    kind = F.ScalingType.BlockWise1x128
    if scale_b.shape != (b.shape[0] // 128, b.shape[1]):
        kind = F.ScalingType.BlockWise128x128
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4))  # no copy where there is nothing to pad
    return F.scaled_mm(a, b, scale_a.t(), F.ScalingType.BlockWise1x128, scale_b.t(), kind, output_dtype=dtype)


for name, run, shape in (("cast_blocks", cast_blocks, empty_casts),
                         ("transpose_blocks", transpose_blocks, lambda x: x.new_empty(x.shape[::-1])),
                         ("block_mm", block_mm, lambda a, b, scale_a, scale_b, dtype, emulate: a.new_empty(
                             a.shape[0], b.shape[1], dtype=dtype))):
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nanofp8::{name}", shape, lib=library)
CAST, MATMUL = torch.ops.nanofp8.cast_blocks.default, torch.ops.nanofp8.block_mm.default


class GatheredBlocks(torch.Tensor):
    """A weight of which FSDP2 has gathered the FP8 values and scales, in place of high precision."""

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
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.as_strided.default, torch.ops.aten.alias.default)
        return cls(args[0].values, args[0].scales, args[0].dtype)  # FSDP2 and autograd take it as it is


@torch._dynamo.allow_in_graph
class BlockwiseMatmuls(torch.autograd.Function):
    """x (tokens, in) @ weight.T, all three matmuls in block-wise FP8. weight: (out, in), maybe as GatheredBlocks."""

    @staticmethod
    def forward(ctx, x, weight, keep_casts, emulate):
        gathered = isinstance(weight, GatheredBlocks)
        ctx.keep_casts, ctx.emulate = keep_casts, emulate
        inputs = cast(x, transposed=keep_casts)
        if gathered:
            weights = [weight.values, weight.scales]
        else:
            weights = cast(weight, tiles=True, transposed=keep_casts)
        ctx.save_for_backward(*(inputs[2:] if keep_casts else [x]),
                              *(weights[2:] if keep_casts and not gathered else [weight]))
        return matmul(inputs[:2], weights[:2], x.dtype, emulate)

    @staticmethod
    def backward(ctx, g):
        emulate, saved = ctx.emulate, ctx.saved_tensors
        inputs, weights = (saved[:2], saved[2:]) if ctx.keep_casts else (saved[:1], saved[1:])
        if not ctx.keep_casts:
            inputs = cast(inputs[0], plain=False, transposed=True)
        if isinstance(weights[0], GatheredBlocks):
            values, scales = weights[0].values, weights[0].scales
            weights = torch.ops.nanofp8.transpose_blocks(values), scales.t().contiguous()
        elif not ctx.keep_casts:
            weights = cast(weights[0], tiles=True, plain=False, transposed=True)
        gradients = cast(g, transposed=True)
        return (matmul(gradients[:2], weights, g.dtype, emulate), matmul(gradients[2:], inputs, g.dtype, emulate),
                None, None)


class BlockwiseLinear(nn.Linear):
    """nn.Linear in block-wise FP8. fp8.convert makes it of an nn.Linear, in place."""

    keep_casts = emulate = False

    def forward(self, x):
        keep = self.keep_casts and torch.is_grad_enabled()
        y = BlockwiseMatmuls.apply(x.flatten(0, -2), self.weight, keep, self.emulate).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias
