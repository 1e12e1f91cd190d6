"""Updates of symmetric matrices on TPUs in Pallas: lower blocks are computed, upper ones are their transposes.

The grid is a list of steps. A step below the diagonal reads one block of the matrix, updates it and keeps the result
in VMEM; the step after it only writes the transpose to the mirrored place. So the matrix is read half, written once,
and aliased: no block is read after it was written. The products of the next rows with the new matrix are summed while
its blocks are in VMEM: of block and transpose in those two steps, in an order that is always the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcl.kernels.ridge import cpu, pair

_VMEM = 48 * 2**20  # bytes a kernel may use: v5p has the least, 64 MiB


def default_side(rows: int, size: int, operands: int, matrices: int, ahead: int = 0) -> int:
    """Returns the largest side of a block with which everything fits: a multiple of 128, or the whole matrix.

    Args:
      rows: of the operands.
      size: of the matrices.
      operands, matrices: how many of them there are.
      ahead: rows of the next batch, see `stream`.
    """
    side = 512
    while used(rows, size, operands, matrices, ahead, side) > _VMEM and side > 128:
        side //= 2
    return min(side, size)


def used(rows: int, size: int, operands: int, matrices: int, ahead: int, side: int) -> int:
    """Returns the bytes of VMEM that a kernel takes with blocks of `side`; see `default_side`."""
    # Operands twice (i and j) and matrices twice (in and out), all in two buffers; joined operands; accumulators; the
    # next rows twice, also in two buffers, and all of their products.
    own = rows * operands * 2 * 3 + side * (matrices * 5 + 4)
    return 4 * (side * (own + ahead * 2 * 2) + 2 * ahead * pl.cdiv(size, side) * side)


def fits(rows: int, size: int, ahead: int) -> bool:
    """Returns whether VMEM holds what `stream` needs for `rows` rows and `ahead` of the next batch."""
    return used(rows, size, 1, 1, ahead, min(128, size)) <= _VMEM


def steps(count: int) -> np.ndarray:
    """Returns int32 [4, N]: for every step the row and column of the block it computes and of the one it writes."""
    made = []
    for i in range(count):
        for j in range(i + 1):
            made.append((i, j, i, j))
            if i != j:
                made.append((i, j, j, i))
    return np.asarray(made, np.int32).T


def _kernel(
    products: cpu.Products, sums: cpu.Sums, number: int, operands: int, ahead: int, ragged: int
) -> Callable[..., None]:
    """Returns the program of one block.

    Args:
      products, sums: of blocks.
      number: of matrices.
      operands: how many there are.
      ahead: 1 if the next rows are multiplied with the new (only) matrix, else 0.
      ragged: size of the matrix if blocks reach beyond it, else 0.
    """
    lengths = (number, operands, operands, ahead, ahead, number, ahead, number)

    def kernel(plan: Any, *refs: Any) -> None:
        starts = np.cumsum((0, *lengths))
        old, left, right, at_i, at_j, new, seen, kept = (
            refs[start : start + length] for start, length in zip(starts[:-1], lengths, strict=True)
        )
        n = pl.program_id(0)
        i, j = plan[0, n], plan[1, n]
        own = (plan[2, n] == i) & (plan[3, n] == j)

        if ahead:

            @pl.when(n == 0)
            def _() -> None:
                seen[0][...] = jnp.zeros_like(seen[0])

        @pl.when(own)
        def _() -> None:
            found = products([x[...] for x in left], [x[...] for x in right])
            for out, keep, x in zip(new, kept, sums([x[...] for x in old], found), strict=True):
                tile = jnp.where(i == j, cpu.mirrored(x), x)
                keep[...] = _inside(tile, i, ragged) if ragged and ahead else tile
                out[...] = keep[...]
            for rows, total, keep in zip(at_i, seen, kept, strict=False):
                total[j] += pair.contract(rows[...], keep[...], 1, 0)

        @pl.when(jnp.logical_not(own))
        def _() -> None:
            for out, keep in zip(new, kept, strict=True):
                out[...] = keep[...].T
            for rows, total, keep in zip(at_j, seen, kept, strict=False):
                total[i] += pair.contract(rows[...], keep[...], 1, 1)

    return kernel


def _inside(tile: jax.Array, i: Any, size: int) -> jax.Array:
    """Returns a block without its rows beyond the matrix, which may be anything and would be summed over."""
    row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
    return jnp.where(row + i * tile.shape[0] < size, tile, 0.0)


def _launch(
    products: cpu.Products,
    sums: cpu.Sums,
    name: str,
    matrices: Sequence[jax.Array],
    operands: Sequence[jax.Array],
    flops: int,
    side: int | None,
    interpret: Any,
    ahead: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Updates `matrices` [d, d] by sums(old blocks, products(operands at i, at j)); operands are [b, d].

    With one array `ahead` [n, d] its product with the new matrix, [blocks, n, side], is returned last.
    """
    (rows, size), number, more = operands[0].shape, len(matrices), len(ahead)
    side = min(side or default_side(rows, size, len(operands), number, sum(x.shape[0] for x in ahead)), size)
    count, spare = pl.cdiv(size, side), -size % side
    plan = steps(count)
    ahead = [jnp.pad(x, ((0, 0), (0, spare))) if spare else x for x in ahead]
    whole = [(count, x.shape[0], side) for x in ahead]
    operand_blocks = [(x.shape[0], side) for x in (*operands, *ahead)]
    at_i = [pl.BlockSpec(block, lambda n, p: (0, p[0, n])) for block in operand_blocks]
    at_j = [pl.BlockSpec(block, lambda n, p: (0, p[1, n])) for block in operand_blocks]
    taken = len(operands)
    return pl.pallas_call(
        _kernel(products, sums, number, taken, more, size if spare else 0),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.shape[1],),
            in_specs=[pl.BlockSpec((side, side), lambda n, p: (p[0, n], p[1, n]))] * number
            + [*at_i[:taken], *at_j[:taken], *at_i[taken:], *at_j[taken:]],
            out_specs=[pl.BlockSpec((side, side), lambda n, p: (p[2, n], p[3, n]))] * number
            + [pl.BlockSpec(shape, lambda n, p: (0, 0, 0)) for shape in whole],
            scratch_shapes=[pltpu.VMEM((side, side), jnp.float32)] * number,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(size, size)] * number + whole],
        input_output_aliases={1 + n: n for n in range(number)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM + 8 * 2**20),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=number * 6 * size * size + 4 * rows * size, transcendentals=0
        ),
        interpret=interpret,
        name=name,
    )(jnp.asarray(plan), *matrices, *operands, *operands, *ahead, *ahead)


def gram_update(
    a: pair.Pair, x: pair.Pair, sign: float = 1.0, *, side: int | None = None, interpret: Any = False
) -> pair.Pair:
    """Returns a + sign * x^T x in pairs; see `jaxcl.kernels.ridge.gram_update`.

    Args:
      a: float32 pair [d, d].
      x: float32 pair [b, d].
      sign: 1 or -1.
      side: of a block; None = `default_side`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    (rows, size), sums = x.high.shape, functools.partial(cpu.gram_sums, sign)
    flops = 6 * rows * size * size
    found = _launch(cpu.gram_products, sums, "ridge_gram_update", a, pair.pieces(x, 0), flops, side, interpret)
    return pair.Pair(*found)


def downdate(
    r: jax.Array, v: jax.Array, sign: float = -1.0, *, side: int | None = None, interpret: Any = False
) -> jax.Array:
    """Returns r + sign * v^T v; see `jaxcl.kernels.ridge.downdate`.

    Args:
      r: float32 [d, d].
      v: float32 [b, d].
      sign: -1 or 1.
      side: of a block; None = `default_side`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    (rows, size), sums = v.shape, functools.partial(cpu.sums, sign)
    return _launch(cpu.products, sums, "ridge_downdate", [r], [v], rows * size * size, side, interpret)[0]


def stream(
    r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0, *, side: int | None = None, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that); see `jaxcl.kernels.ridge.stream`.

    Args:
      r: float32 [d, d].
      v: float32 [b, d].
      x: float32 [n, d].
      sign: -1 or 1.
      side: of a block; None = `default_side`.
      interpret: as for `pl.pallas_call`: runs without a TPU.
    """
    (rows, size), sums = v.shape, functools.partial(cpu.sums, sign)
    flops = (rows + 2 * x.shape[0]) * size * size
    new, seen = _launch(cpu.products, sums, "ridge_stream", [r], [v], flops, side, interpret, [x])
    return new, seen.transpose(1, 0, 2).reshape(x.shape[0], -1)[:, :size]
