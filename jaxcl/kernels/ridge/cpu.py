"""Updates of symmetric matrices for XLA: the lower blocks are computed, mirrored and written in place.

That is half of the operations of a whole product, temporaries of one row of blocks, and a result that is symmetric
to the last bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.kernels.ridge import pair

_BLOCK = 256  # the least side of a block; below it a product is too small for the CPU to be fast
_BLOCKS = 16  # blocks per side at most: each is a statement of the program


def rows_of(size: int) -> list[tuple[int, int]]:
    """Returns the first and last row (exclusive) of every row of blocks."""
    side = max(_BLOCK, -(-size // (_BLOCKS * 128)) * 128)
    return [(start, min(start + side, size)) for start in range(0, size, side)]


def mirrored(tile: jax.Array) -> jax.Array:
    """Returns a square tile whose upper triangle is that of its lower one."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) for axis in (0, 1))
    return jnp.where(row >= column, tile, tile.T)


def _write(matrix: jax.Array, strip: jax.Array, start: int, end: int) -> jax.Array:
    """Writes rows start..end, columns 0..end, and their mirror image."""
    matrix = matrix.at[start:end, start:end].set(mirrored(strip[:, start:]))
    if start:
        matrix = matrix.at[start:end, :start].set(strip[:, :start])
        matrix = matrix.at[:start, start:end].set(strip[:, :start].T)
    return matrix


def gram_update(a: pair.Pair, x: pair.Pair, sign: float = 1.0) -> pair.Pair:
    """Returns a + sign * x^T x in pairs; see `jaxcl.kernels.ridge.gram_update`."""
    cut = pair.pieces(x, 0)
    for start, end in rows_of(a.high.shape[0]):
        left, right = (pair.Pieces(*(part[:, at] for part in cut)) for at in (slice(start, end), slice(0, end)))
        old = pair.Pair(*(part[start:end, :end] for part in a))
        new = pair.absorb(old, pair.parts(left, right, 0, 0), sign)
        a = pair.Pair(*(_write(part, strip, start, end) for part, strip in zip(a, new, strict=True)))
    return a


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0) -> jax.Array:
    """Returns r + sign * v^T v; see `jaxcl.kernels.ridge.downdate`."""
    for start, end in rows_of(r.shape[0]):
        strip = r[start:end, :end] + sign * pair.contract(v[:, start:end], v[:, :end], 0, 0)
        r = _write(r, strip, start, end)
    return r
