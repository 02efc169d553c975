"""Transposed FP8 copies at the speed of memory: the one kernel here that torch.compile does not write by itself.

A Hopper tensor core reads both FP8 operands along their inner dimension, so that backward needs x, w and g transposed
as well (fp8.py). torch.compile fuses each transpose into whatever computes the values, and then stores single bytes,
far apart, at half the speed of memory. `Apart` takes these copies out of its graphs: they become a kernel of their
own, which puts four rows' bytes into one word and transposes words.
"""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with torch where there is a GPU; nowhere else is a kernel launched
    triton = None

aten, prims = torch.ops.aten, torch.ops.prims
ROWS, COLUMNS = 128, 64  # of a tile

if triton:

    @triton.jit
    def kernel(x, scale, out, n_rows, n_columns, scale_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               LIMIT: tl.constexpr, FORMAT: tl.constexpr):
        words_at = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (words_at * 4 < n_rows)[:, None] & (columns < n_columns)[None, :]  # n_rows: a multiple of 4
        words = tl.zeros((ROWS // 4, COLUMNS), tl.int32)
        for i in tl.static_range(4):
            rows = words_at * 4 + i
            values = tl.load(x + rows[:, None].to(tl.int64) * n_columns + columns[None, :], inside, 0)
            if LIMIT > 0:
                scales = tl.load(scale + columns * scale_stride, columns < n_columns, 0)
                values = tl.clamp(values.to(tl.float32) * scales[None, :], -LIMIT, LIMIT,
                                  propagate_nan=tl.PropagateNan.ALL)
                values = values.to(FORMAT).to(tl.uint8, bitcast=True)
            words |= values.to(tl.int32) << (8 * i)
        tl.store(out + columns[:, None].to(tl.int64) * (n_rows // 4) + words_at[None, :], tl.trans(words),
                 tl.trans(inside))


def launch(x, scale, dtype):
    """FP8 (n, m) of x (m, n), contiguous both: x is FP8, or else multiplied by `scale`, () or one a column, and cast.

    m must be a multiple of 4. Source of the cast: torchao, as fp8.cast_to_fp8.
    """
    (m, n), limit, form = x.shape, 0.0, None
    assert x.is_contiguous() and m % 4 == 0, (x.shape, x.stride())
    out = x.new_empty(n, m, dtype=dtype)
    if scale is None:
        x = x.view(torch.uint8)
    else:
        limit = torch.finfo(dtype).max
        form = tl.float8e4nv if dtype is torch.float8_e4m3fn else tl.float8e5
    kernel[triton.cdiv(n, COLUMNS), triton.cdiv(m, ROWS)](
        x, scale, out.view(torch.int32), m, n, int(scale is not None and scale.numel() > 1), ROWS, COLUMNS, limit, form)
    return out


def reference(x, scale, dtype):
    """What `launch` computes, in eager."""
    if scale is not None:
        limit = torch.finfo(dtype).max
        x = (x.float() * scale.flatten()).clamp(-limit, limit).to(dtype)
    return x.t().contiguous()


library = torch.library.Library("nanofp8", "FRAGMENT")
library.define("transposed(Tensor x, Tensor? scale, ScalarType dtype) -> Tensor")
library.impl("transposed", launch, "CUDA")
library.impl("transposed", reference, "CPU")
torch.library.register_fake("nanofp8::transposed", lambda x, scale, dtype: x.new_empty(x.shape[::-1], dtype=dtype),
                            lib=library)


class Apart(CustomGraphPass):
    """Replaces transposing copies of FP8 matrices in the graphs of torch.compile by nanofp8::transposed."""

    def __call__(self, graph):
        for node in graph.find_nodes(op="call_function", target=aten.clone.default):
            fp8 = node.args[0].meta["val"]  # a fake tensor
            if (fp8.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or fp8.dim() != 2
                    or not all(isinstance(n, int) for n in fp8.shape) or fp8.stride() != (1, fp8.shape[0])
                    or fp8.shape[1] % 4):
                continue
            with graph.inserting_before(node):
                x, scale = before_cast(node.args[0])
                if x is None:
                    x = graph.call_function(aten.permute.default, (node.args[0], [1, 0]))
                    x.meta["val"] = fp8.t()
                elif x.meta["val"].dim() > 2:
                    wide = x
                    x = graph.call_function(aten.reshape.default, (wide, list(fp8.shape[::-1])))
                    x.meta["val"] = wide.meta["val"].reshape(fp8.shape[::-1])
                new = graph.call_function(torch.ops.nanofp8.transposed.default, (x, scale, fp8.dtype))
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def uuid(self):
        return get_hash_for_files((__file__,))


def before_cast(node):
    """(x, scale) of an FP8 matrix x.t() that nothing else reads, cast from an x that lies in memory: read that.

    Else (None, None): what is computed on the way fuses with its cast, and a cast that others read as well is there.
    """
    turned = node.target is aten.permute.default
    node = node.args[0] if turned else node
    for step in (prims.convert_element_type.default, aten.clamp_max.default, aten.clamp_min.default):
        if node.target is not step or len(node.users) > 1:
            return None, None
        node = node.args[0]
    if node.target is not aten.mul.Tensor:
        return None, None
    (n, k), (x, scale) = node.meta["val"].shape, node.args
    x = unviewed(x)
    if x.target is prims.convert_element_type.default:
        x = unviewed(x.args[0])
    if not turned and x.target is aten.permute.default:
        x, turned, one_a_column = unviewed(x.args[0]), True, (n, 1)
    else:
        one_a_column = (1, k)
    in_memory = x.op == "placeholder" or x.target in (aten.mm.default, aten._scaled_mm.default)
    if turned and in_memory and x.meta["val"].is_contiguous() and scale.meta["val"].shape in ((), one_a_column):
        return x, scale
    return None, None


def unviewed(node):
    while node.target in (aten.view.default, aten.reshape.default):
        node = node.args[0]
    return node
