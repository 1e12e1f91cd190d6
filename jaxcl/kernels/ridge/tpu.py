"""Updates of symmetric matrices on TPUs in Pallas: lower blocks are computed, upper ones are their transposes.

The grid is a list of steps. A step below the diagonal reads one block of the matrix, updates it and keeps the result
in VMEM; the step after it only writes the transpose to the mirrored place. So the matrix is read half, written once,
and aliased: no block is read after it was written.
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


def default_side(rows: int, size: int, operands: int, matrices: int) -> int:
    """Returns the largest side of a block with which everything fits: a multiple of 128, or the whole matrix."""
    side = 512

    def used() -> int:
        # Operands twice (i and j) and matrices twice (in and out), all in two buffers; joined operands; accumulators.
        return 4 * side * (rows * operands * 2 * 3 + side * (matrices * 5 + 4))

    while used() > _VMEM and side > 128:
        side //= 2
    return min(side, size)


def steps(count: int) -> np.ndarray:
    """Returns int32 [4, N]: for every step the row and column of the block it computes and of the one it writes."""
    made = []
    for i in range(count):
        for j in range(i + 1):
            made.append((i, j, i, j))
            if i != j:
                made.append((i, j, j, i))
    return np.asarray(made, np.int32).T


def _kernel(products: cpu.Products, sums: cpu.Sums, number: int, operands: int) -> Callable[..., None]:
    """Returns the program of one block of `number` matrices, from blocks of `operands` operands."""

    def kernel(plan: Any, *refs: Any) -> None:
        old, left, right, new, kept = (
            refs[start : start + length]
            for start, length in zip(
                np.cumsum([0, number, operands, operands, number]),
                (number, operands, operands, number, number),
                strict=True,
            )
        )
        n = pl.program_id(0)
        i, j = plan[0, n], plan[1, n]
        own = (plan[2, n] == i) & (plan[3, n] == j)

        @pl.when(own)
        def _() -> None:
            found = products([x[...] for x in left], [x[...] for x in right])
            for out, keep, x in zip(new, kept, sums([x[...] for x in old], found), strict=True):
                keep[...] = jnp.where(i == j, cpu.mirrored(x), x)
                out[...] = keep[...]

        @pl.when(jnp.logical_not(own))
        def _() -> None:
            for out, keep in zip(new, kept, strict=True):
                out[...] = keep[...].T

    return kernel


def _launch(
    products: cpu.Products,
    sums: cpu.Sums,
    name: str,
    matrices: Sequence[jax.Array],
    operands: Sequence[jax.Array],
    flops: int,
    side: int | None,
    interpret: Any,
) -> list[jax.Array]:
    """Updates `matrices` [d, d] by sums(old blocks, products(operands at i, at j)); operands are [b, d]."""
    (rows, size), number = operands[0].shape, len(matrices)
    side = min(side or default_side(rows, size, len(operands), number), size)
    plan = steps(pl.cdiv(size, side))

    kernel = _kernel(products, sums, number, len(operands))
    block = (side, side)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.shape[1],),
            in_specs=[pl.BlockSpec(block, lambda n, p: (p[0, n], p[1, n]))] * number
            + [pl.BlockSpec((rows, side), lambda n, p: (0, p[0, n]))] * len(operands)
            + [pl.BlockSpec((rows, side), lambda n, p: (0, p[1, n]))] * len(operands),
            out_specs=[pl.BlockSpec(block, lambda n, p: (p[2, n], p[3, n]))] * number,
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)] * number,
        ),
        out_shape=[jax.ShapeDtypeStruct((size, size), jnp.float32)] * number,
        input_output_aliases={1 + n: n for n in range(number)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM + 8 * 2**20),
        cost_estimate=pl.CostEstimate(
            flops=flops, bytes_accessed=number * 6 * size * size + 4 * rows * size, transcendentals=0
        ),
        interpret=interpret,
        name=name,
    )(jnp.asarray(plan), *matrices, *operands, *operands)


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
