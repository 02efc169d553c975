"""The Triton kernel of plumbing/blockwise.py. A module of its own: Triton comes with torch's CUDA builds only."""

import triton
import triton.language as tl


@triton.jit
def scales(amax):
    """(scale, its inverse) of a block, from its largest absolute value: the arithmetic of blockwise.operand()."""
    scale = tl.maximum(amax, 1e-12) * (1 / 448)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def cast_tile(x, q, scale, q_t, scale_t, rows, columns, TILES: tl.constexpr, PLAIN: tl.constexpr,
              TRANSPOSED: tl.constexpr):
    """Read 128 x 128 values of x once and write the casts in both layouts: the results of blockwise.cast(), or None.

    No maximum here propagates NaN: with one that does, Triton may store garbage instead of FP8 values
    (https://github.com/triton-lang/triton/issues/11111). A NaN stays in the value that is cast.
    """
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column = i * 128 + tl.arange(0, 128), j * 128 + tl.arange(0, 128)
    inside = row < rows  # columns come in whole blocks
    plain, transposed = row[:, None] * columns + column[None, :], column[:, None] * rows + row[None, :]
    tile = tl.load(x + plain, mask=inside[:, None], other=0.0).to(tl.float32)
    if TILES:
        one, inverse = scales(tl.max(tl.max(tl.abs(tile), axis=1), axis=0))
        cast = (tile * inverse).to(tl.float8e4nv)
        if PLAIN:
            tl.store(scale + i * tl.num_programs(1) + j, one)
            tl.store(q + plain, cast)
        if TRANSPOSED:
            tl.store(scale_t + j * tl.num_programs(0) + i, one)
            tl.store(q_t + transposed, tl.trans(cast))
    else:
        if PLAIN:
            each, inverse = scales(tl.max(tl.abs(tile), axis=1))
            tl.store(scale + j * rows + row, each, mask=inside)
            tl.store(q + plain, (tile * inverse[:, None]).to(tl.float8e4nv), mask=inside[:, None])
        if TRANSPOSED:
            each, inverse = scales(tl.max(tl.abs(tile), axis=0))
            tl.store(scale_t + i * columns + column, each)
            tl.store(q_t + transposed, tl.trans((tile * inverse[None, :]).to(tl.float8e4nv)))
