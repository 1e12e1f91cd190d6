"""Updates of symmetric matrices for Hopper GPUs (sm_90a) in Pallas Mosaic GPU: compiled, never run; asked for by name.

Tensor cores multiply bfloat16. A float32 number is the sum of three of them, and six of the nine products of two such
sums are as good as one in float32 (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 artificial intelligence
datatype for higher-precision computations"). The slices that `pair` cuts are whole multiples of a unit, at most 256 of
them, so that bfloat16 holds them exactly; where the accumulator keeps 24 bits of a sum, as `pair` supposes of every
float32 sum, their products are summed exactly as well.

A program is one block on or below the diagonal: it reads the block, sums the products over all rows, adds them, writes
the block, and writes it once more, transposed. So the matrix is read half and written once, in place, without atomics.
There is no kernel for `stream` here: each of its two products takes longer than to read the matrix, and a block adds to
two strips of the second one, which would have to be atomic or twice the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcl.kernels.attention.gpu import ACC, WGMMA, load
from jaxcl.kernels.ridge import pair

Groups = Sequence[Sequence[tuple[int, int]]]  # of pieces (left, right) whose products are summed before they are added

MULTIPLE = 128  # d must be one of it
DEPTH = 64  # rows at a time: a swizzle of bfloat16
STAGES = 2  # blocks of rows in flight
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
_UPDATE: Groups = (((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)),)
# Pieces of a gram: 0 and 1 are the slices, 2 to 4 what is left of the rest; the last group is `pair.parts`' third.
_REST = ((0, 2), (2, 0), (0, 3), (3, 0), (0, 4), (4, 0), (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2))
_GRAM: Groups = (((0, 0),), ((0, 1), (1, 0)), _REST)


def thirds(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three bfloat16 arrays whose sum is the float32 array x."""
    parts = []
    for _ in range(3):
        # Without the barrier XLA may drop the rounding that all of this is about.
        parts.append(lax.optimization_barrier(x.astype(jnp.bfloat16)))
        x = x - parts[-1].astype(jnp.float32)
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

    def add(old: Sequence[Any], found: Any) -> list[Any]:
        return [old[0] + sign * found]

    return _launch("ridge_downdate", [r], thirds(v), _UPDATE, add, tile=128, interpret=interpret)[0]


def gram_update(a: pair.Pair, x: pair.Pair, sign: float = 1.0, *, interpret: Any = None) -> pair.Pair:
    """Returns a + sign * x^T x in pairs; see `jaxcl.kernels.ridge.gram_update`, and `downdate`.

    Raises:
      ValueError: d is not a multiple of 128.
    """
    spare = max(DEPTH - x.high.shape[0], 0)  # of fewer rows the slices would have more bits than bfloat16
    cut = pair.pieces(pair.Pair(*(jnp.pad(part, ((0, spare), (0, 0))) for part in x)), 0)
    pieces = (cut.first.astype(jnp.bfloat16), cut.second.astype(jnp.bfloat16), *thirds(cut.rest))

    def add(old: Sequence[Any], found: Any) -> list[Any]:
        return list(pair.plus(pair.Pair(*old), sign * found))

    return pair.Pair(*_launch("ridge_gram_update", list(a), pieces, _GRAM, add, tile=64, interpret=interpret))


def stream(r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that): an update and then a product; see `jaxcl.kernels.ridge.stream`."""
    new = downdate(r, v, sign)
    return new, pair.contract(x, new, 1, 1)


def _launch(
    name: str,
    matrices: Sequence[jax.Array],
    pieces: Sequence[jax.Array],
    groups: Groups,
    add: Callable[[Sequence[Any], Any], list[Any]],
    *,
    tile: int,
    interpret: Any,
) -> list[jax.Array]:
    """Returns `matrices` [d, d] after add(old block, sum of a group's products) for one group after the other.

    Args:
      name: of the kernel.
      matrices: float32, updated in place.
      pieces: bfloat16 [b, d].
      groups: which products of pieces are summed.
      add: new blocks from old ones.
      tile: side of a block.
      interpret: see `downdate`.
    """
    size = matrices[0].shape[0]
    if size % MULTIPLE:
        raise ValueError(f"the GPU kernel takes matrices of a multiple of {MULTIPLE}, not of {size}")
    pieces = [jnp.pad(x, ((0, -x.shape[0] % DEPTH), (0, 0))) for x in pieces]
    plan = np.stack(np.tril_indices(size // tile)).astype(np.int32)
    refs = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in matrices]
    float32s = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    scratch = [plgpu.SMEM((tile, tile), jnp.float32, transforms=float32s) for _ in matrices]
    scratch.append(plgpu.Barrier(num_arrivals=len(matrices)))

    def body(plan: Any, *operands: Any) -> None:
        n = lax.axis_index("block")
        place = plan[0, n], plan[1, n]
        taken, targets = operands[: len(pieces)], operands[len(pieces) :]
        # What the first sum needs of shared memory is free again when the blocks of the matrices take theirs.
        found = _sum(taken, groups[0], place, tile)
        pl.run_scoped(functools.partial(_block, place, taken, targets, groups[1:], add, found), *scratch)

    pl.kernel(
        body,
        out_type=(),
        mesh=plgpu.Mesh(grid=(plan.shape[1],), grid_names=("block",)),
        # As for attention: Lane on both JAX lines.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name=name,
        **({} if interpret is None else {"interpret": interpret}),
    )(jnp.asarray(plan), *pieces, *refs)
    return [jax.freeze(ref) for ref in refs]


def _block(
    place: tuple[jax.Array, jax.Array],
    pieces: Sequence[Any],
    matrices: Sequence[Any],
    groups: Groups,
    add: Callable[[Sequence[Any], Any], list[Any]],
    found: Any,
    *scratch: Any,
) -> None:
    """Adds to one block; arrays are references into global memory, `scratch` are blocks and a barrier.

    Args:
      place: row and column of the block.
      pieces, matrices, add: see `_launch`.
      groups: those that remain.
      found: sum of the first one.
      scratch: a block of shared memory for every matrix, and a barrier.
    """
    *tiles, barrier = scratch
    side = tiles[0].shape[0]
    i, j = place
    lower, upper = ((pl.ds(a * side, side), pl.ds(b * side, side)) for a, b in ((i, j), (j, i)))
    for matrix, tile in zip(matrices, tiles, strict=True):
        plgpu.copy_gmem_to_smem(matrix.at[lower], tile, barrier)
    plgpu.barrier_wait(barrier)
    for group in (None, *groups):
        total = found if group is None else _sum(pieces, group, place, side)
        for tile, x in zip(tiles, add([load(tile, WGMMA) for tile in tiles], total), strict=True):
            tile[...] = x
    for matrix, tile in zip(matrices, tiles, strict=True):
        new = load(tile, WGMMA)
        pl.when(i == j)(functools.partial(_mirror, tile))
        _store(tile, matrix.at[lower])

        @pl.when(i != j)
        def _(tile: Any = tile, new: Any = new, matrix: Any = matrix) -> None:
            _transpose(tile, new)
            _store(tile, matrix.at[upper])


def _sum(pieces: Sequence[Any], group: Sequence[tuple[int, int]], place: tuple[jax.Array, jax.Array], side: int) -> Any:
    """Returns the sum of the products of a group over all rows, in the registers of the warpgroup."""
    used = sorted({n for pairs in group for n in pairs})
    order = {n: at for at, n in enumerate(used)}
    bfloat16s = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    specs = [
        plgpu.BlockSpec((DEPTH, side), lambda k, block=block: (k, block), transforms=bfloat16s)
        for block in place
        for _ in used
    ]

    def run(acc: Any) -> Any:
        def step(_: Any, *rows: Any) -> None:
            left, right = rows[: len(used)], rows[len(used) :]
            for a, b in group:
                plgpu.wgmma(acc, left[order[a]].transpose((1, 0)), right[order[b]])
            plgpu.wgmma_wait(0)

        grid = (pieces[0].shape[0] // DEPTH,)
        sources = [pieces[n] for n in used] * 2
        plgpu.emit_pipeline(step, grid=grid, in_specs=specs, max_concurrent_steps=STAGES)(*sources)
        return acc[...]

    return pl.run_scoped(run, ACC((side, side), jnp.float32))


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
