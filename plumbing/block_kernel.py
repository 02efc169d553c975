"""The Triton kernel of plumbing/blockwise.py: a tensor is read once, and both layouts that matmuls want are written.

A module of its own, since Triton comes with torch's CUDA builds only.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(amax):
    """The scales of blocks, from their largest absolute values: the arithmetic of blockwise.operand()."""
    return tl.maximum(amax, 1e-12) * (1 / 448)


@triton.jit
def load_rows(x, row, column, rows, columns):
    return tl.load(x + row[:, None] * columns + column, mask=(row < rows)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(tile, q, scale, block, row, column, rows, columns, tile_scale, TILES: tl.constexpr):
    """Store rows of 128 values in FP8, with tile_scale, or with scales of their own, which are stored too."""
    each = tile_scale
    if not TILES:
        each = scale_of(tl.max(tl.abs(tile), axis=1))
        tl.store(scale + block * rows + row, each, mask=row < rows)
        each = each[:, None]
    tl.store(q + row[:, None] * columns + column, fp8(tile, each), mask=(row < rows)[:, None])


@triton.jit
def fp8(tile, scale):
    return (tile * tl.div_rn(1.0, scale)).to(tl.float8e4nv)


@triton.jit
def bits(tile, scale):
    return fp8(tile, scale).to(tl.uint8, bitcast=True).to(tl.uint32)


@triton.jit
def cast_tile(x, q, scale, words_t, scale_t, rows, columns, TILES: tl.constexpr, PLAIN: tl.constexpr,
              TRANSPOSED: tl.constexpr):
    """Cast 128 x 128 values of x. Pointers are to blockwise.cast()'s results, words_t to the values of x.T as uint32.

    Every fourth row is in a tile of its own: four values of a column are then one word, and words are transposed faster
    than bytes. No maximum here propagates NaN: with one that does, Triton may store garbage instead of FP8 values
    (https://github.com/triton-lang/triton/issues/11111). A NaN stays in the value that is cast.
    """
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, column = i * 128 + 4 * tl.arange(0, 32), j * 128 + tl.arange(0, 128)
    a, b = load_rows(x, row, column, rows, columns), load_rows(x, row + 1, column, rows, columns)
    c, d = load_rows(x, row + 2, column, rows, columns), load_rows(x, row + 3, column, rows, columns)
    amax, one = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d))), 1.0
    if TILES:
        one = scale_of(tl.max(tl.max(amax, axis=1), axis=0))
        if PLAIN:
            tl.store(scale + i * tl.num_programs(1) + j, one)
        if TRANSPOSED:
            tl.store(scale_t + j * tl.num_programs(0) + i, one)
    if PLAIN:
        store_rows(a, q, scale, j, row, column, rows, columns, one, TILES)
        store_rows(b, q, scale, j, row + 1, column, rows, columns, one, TILES)
        store_rows(c, q, scale, j, row + 2, column, rows, columns, one, TILES)
        store_rows(d, q, scale, j, row + 3, column, rows, columns, one, TILES)
    if TRANSPOSED:
        each = one
        if not TILES:
            each = scale_of(tl.max(amax, axis=0))
            tl.store(scale_t + i * columns + column, each)
        words = bits(a, each) | bits(b, each) << 8 | bits(c, each) << 16 | bits(d, each) << 24
        tl.store(words_t + column[:, None] * (rows // 4) + i * 32 + tl.arange(0, 32), tl.trans(words))
