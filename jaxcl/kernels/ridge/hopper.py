"""Down-dates of symmetric matrices on Hopper GPUs (sm_90a) in Pallas Mosaic GPU: compiled, never run, to be asked for.

Tensor cores multiply bfloat16. A float32 number is the sum of three of them, and six of the nine products of two such
sums are as good as one in float32 (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 artificial intelligence
datatype for higher-precision computations"): 8 times the operations at 15 times the speed of float32.

A program is one block on or below the diagonal: it sums the products over all rows, reads the block, adds them, writes
the block, and writes it once more, transposed. So the matrix is read half and written once, in place, without atomics.

The other two updates have no kernel here. Grams are summed in float64, for which Hopper has tensor cores too (67
TFLOP/s). Of `stream` each of the two products takes longer than to read the matrix once more, and a block adds to two
strips of the second one, which would have to be atomic or twice the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcl.kernels.attention.gpu import ACC, WGMMA, load
from jaxcl.kernels.ridge import pair

MULTIPLE = SIDE = 128  # of a block; d must be a multiple of it
DEPTH = 64  # rows at a time: a swizzle of bfloat16
STAGES = 2  # blocks of rows in flight
PRODUCTS = (
    (0, 0),
    (0, 1),
    (1, 0),
    (1, 1),
    (0, 2),
    (2, 0),
)  # of thirds: the other three have 2^-24 and less of the first
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def thirds(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three bfloat16 arrays whose sum is the float32 array x."""
    parts = []
    for _ in range(3):
        near = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may drop a cast there and back
        parts.append(near.astype(jnp.bfloat16))
        x = x - near
    return parts[0], parts[1], parts[2]


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0, *, interpret: Any = None) -> jax.Array:
    """Returns r + sign * v^T v; see `jaxcl.kernels.ridge.downdate`.

    Args:
      r: float32 [d, d].
      v: float32 [b, d].
      sign: -1 or 1.
      interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU (JAX 0.11 and later).

    Raises:
      ValueError: d is not a multiple of 128.
    """
    if r.shape[0] % MULTIPLE:
        raise ValueError(f"the GPU kernel takes matrices of a multiple of {MULTIPLE}, not of {r.shape[0]}")
    pieces = thirds(jnp.pad(v, ((0, -v.shape[0] % DEPTH), (0, 0))))
    plan = np.stack(np.tril_indices(r.shape[0] // SIDE)).astype(np.int32)
    ref = jax.new_ref(r, memory_space=plgpu.GMEM)
    float32s = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

    def body(plan: Any, *operands: Any) -> None:
        n = lax.axis_index("block")
        i, j = plan[0, n], plan[1, n]
        # What the sum needs of shared memory is free again when the block takes its own.
        found = _sum(operands[:3], i, j)
        add = functools.partial(_add, operands[3], sign * found, i, j)
        pl.run_scoped(add, plgpu.SMEM((SIDE, SIDE), jnp.float32, transforms=float32s), plgpu.Barrier())

    run: Any = pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(grid=(plan.shape[1],), grid_names=("block",)),
        # As for attention: Lane on both JAX lines.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="ridge_downdate",
        **({} if interpret is None else {"interpret": interpret}),
    )
    run(jnp.asarray(plan), *pieces, ref)
    return jax.freeze(ref)


def stream(r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that): an update and then a product; see `jaxcl.kernels.ridge.stream`."""
    new = downdate(r, v, sign)
    return new, pair.contract(x, new, 1, 1)


def _sum(thirds: Sequence[Any], i: jax.Array, j: jax.Array) -> Any:
    """Returns columns i of v times columns j of it over all rows, in the registers of the warpgroup."""
    bfloat16s = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    specs = [
        plgpu.BlockSpec((DEPTH, SIDE), lambda k, block=block: (k, block), transforms=bfloat16s)
        for block in (i, j)
        for _ in thirds
    ]

    def run(acc: Any) -> Any:
        def step(_: Any, *rows: Any) -> None:
            left, right = rows[:3], rows[3:]
            for a, b in PRODUCTS:
                plgpu.wgmma(acc, left[a].transpose((1, 0)), right[b])
            plgpu.wgmma_wait(0)

        grid = (thirds[0].shape[0] // DEPTH,)
        plgpu.emit_pipeline(step, grid=grid, in_specs=specs, max_concurrent_steps=STAGES)(*thirds, *thirds)
        return acc[...]

    return pl.run_scoped(run, ACC((SIDE, SIDE), jnp.float32))


def _add(matrix: Any, found: Any, i: jax.Array, j: jax.Array, tile: Any, barrier: Any) -> None:
    """Adds to block (i, j) of the matrix in global memory and writes the transpose to (j, i); `tile` is shared."""
    lower, upper = ((pl.ds(a * SIDE, SIDE), pl.ds(b * SIDE, SIDE)) for a, b in ((i, j), (j, i)))
    plgpu.copy_gmem_to_smem(matrix.at[lower], tile, barrier)
    plgpu.barrier_wait(barrier)
    new = load(tile, WGMMA) + found
    tile[...] = new
    pl.when(i == j)(functools.partial(_mirror, tile))
    _store(tile, matrix.at[lower])

    @pl.when(i != j)
    def _() -> None:
        _transpose(tile, new)
        _store(tile, matrix.at[upper])


def _transpose(tile: Any, new: Any) -> None:
    """Writes the transpose of a block in registers to shared memory."""
    tile.transpose((1, 0))[...] = plgpu.layout_cast(new, _TRANSPOSED)


def _mirror(tile: Any) -> None:
    """Writes the transpose of the lower triangle of a block to its upper one."""
    new = load(tile, WGMMA)
    other = plgpu.layout_cast(load(tile.transpose((1, 0)), _TRANSPOSED), WGMMA)
    row, column = (plgpu.broadcasted_iota(jnp.int32, new.shape, axis, layout=WGMMA) for axis in (0, 1))
    tile[...] = jnp.where(row >= column, new, other)


def _store(tile: Any, target: Any) -> None:
    """Writes a block in shared memory to global memory, and waits until it may change."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
    plgpu.wait_smem_to_gmem(0)
