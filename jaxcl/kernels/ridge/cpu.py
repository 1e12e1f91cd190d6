"""Updates of symmetric matrices for XLA: the lower blocks are computed and written in place, then mirrored.

That is half of the operations of a whole product, temporaries of a few blocks, and a result that is symmetric to the
last bit. A loop over blocks keeps what is alive small: as statements, all products would be computed before the first
sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.kernels.ridge import pair

Products = Callable[[Sequence[Any], Sequence[Any]], Sequence[jax.Array]]
Sums = Callable[[Sequence[Any], Sequence[Any]], Sequence[jax.Array]]

SIDE = 128  # of a block: with 64 and with 256 an update at d = 1,024 to 5,000 takes 10 to 20 % longer on a CPU


def mirrored(tile: jax.Array) -> jax.Array:
    """Returns a square tile whose upper triangle is that of its lower one."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) for axis in (0, 1))
    return jnp.where(row >= column, tile, tile.T)


def _place(matrices: Sequence[jax.Array], tiles: Sequence[jax.Array], i: Any, j: Any) -> list[jax.Array]:
    """Returns the matrices with tiles written at (i, j).

    What is read from them afterwards is read back: otherwise XLA would compute a tile anew where it is used, from an
    old matrix that is kept for that.
    """
    new = [jax.lax.dynamic_update_slice(m, tile, (i, j)) for m, tile in zip(matrices, tiles, strict=True)]
    return jax.lax.optimization_barrier(new)


def _apart(sums: Sums, old: Sequence[jax.Array], found: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Returns sums(old, found), of several matrices in a loop over a few rows.

    Otherwise XLA would compute them anew where each of them is written, from an old matrix that is kept for that.
    """
    if len(old) == 1:
        return sums(old, found)
    rows, columns = old[0].shape
    groups = 2 if rows % 2 == 0 else rows
    cut = [[x.reshape(groups, rows // groups, columns) for x in part] for part in (old, found)]
    return [x.reshape(rows, columns) for x in jax.lax.map(lambda part: tuple(sums(*part)), tuple(cut))]


def _blocks(
    products: Products, sums: Sums, matrices: Sequence[jax.Array], operands: Sequence[jax.Array], side: int
) -> list[jax.Array]:
    """Updates `matrices` [d, d] by sums(old blocks, products(operands at rows, at columns)); operands are [b, d]."""
    size = matrices[0].shape[0]
    whole, tail = size // side, size % side
    plan = np.asarray([(i * side, j * side) for i in range(whole) for j in range(i + 1)], np.int32).reshape(-1, 2)

    def lines(start: Any) -> list[jax.Array]:
        return [jax.lax.dynamic_slice_in_dim(x, start, side, 1) for x in operands]

    def tiles(old: Sequence[jax.Array], i: Any, j: Any) -> list[jax.Array]:
        return [jax.lax.dynamic_slice(m, (i, j), (side, side)) for m in old]

    def update(old: Sequence[jax.Array], at: jax.Array) -> tuple[list[jax.Array], None]:
        i, j = at
        return _place(old, _apart(sums, tiles(old, i, j), products(lines(i), lines(j))), i, j), None

    def mirror(old: Sequence[jax.Array], at: jax.Array) -> tuple[list[jax.Array], None]:
        i, j = at
        return _place(old, [jnp.where(i == j, mirrored(x), x.T) for x in tiles(old, i, j)], j, i), None

    new = list(matrices)
    if tail:  # a strip below the blocks, and its image
        start = size - tail
        found = products([x[:, start:] for x in operands], operands)
        new = _place(new, _apart(sums, [m[start:] for m in new], found), start, 0)
        new = _place(new, [mirrored(m[start:, start:]) for m in new], start, start)
        if start:
            new = _place(new, [m[start:, :start].T for m in new], 0, start)
    for body in (update, mirror) if whole else ():
        new, _ = jax.lax.scan(body, new, jnp.asarray(plan))
    return new


def strip(
    products: Products,
    sums: Sums,
    matrices: Sequence[jax.Array],
    left: Sequence[jax.Array],
    right: Sequence[jax.Array],
    side: int = SIDE,
) -> list[jax.Array]:
    """Updates some rows of matrices, as a device of a mesh holds them, a panel of columns at a time.

    There is no half to save, and symmetric the whole is up to rounding: what lies above the diagonal is computed by
    another device than what lies below it.

    Args:
      products, sums: new rows = sums(old ones, products(left, right)).
      matrices: [m, d] each.
      left: [b, m] each, the columns of the operands that belong to these rows.
      right: [b, d] each, all of their columns.
      side: columns of a panel.
    """
    whole, tail = divmod(matrices[0].shape[1], side)

    def panel(rows: Sequence[jax.Array], start: Any, width: int) -> list[jax.Array]:
        old, lines = ([jax.lax.dynamic_slice_in_dim(x, start, width, 1) for x in group] for group in (rows, right))
        return _place(rows, _apart(sums, old, products(left, lines)), 0, start)

    new = list(matrices)
    if whole:
        new, _ = jax.lax.scan(lambda rows, at: (panel(rows, at, side), None), new, side * jnp.arange(whole))
    return panel(new, whole * side, tail) if tail else new


def gram_products(left: Sequence[Any], right: Sequence[Any]) -> tuple[jax.Array, ...]:
    """Returns the parts of a product of pieces."""
    return pair.parts(pair.Pieces(*left), pair.Pieces(*right), 0, 0)


def gram_sums(sign: float, old: Sequence[Any], found: Sequence[Any]) -> pair.Pair:
    """Returns the pair `old` with the parts of a product added."""
    return pair.absorb(pair.Pair(*old), tuple(found), sign)


def products(left: Sequence[Any], right: Sequence[Any]) -> list[jax.Array]:
    """Returns one product in a list."""
    return [pair.contract(left[0], right[0], 0, 0)]


def sums(sign: float, old: Sequence[Any], found: Sequence[Any]) -> list[jax.Array]:
    """Returns one sum in a list."""
    return [old[0] + sign * found[0]]


def wide_products(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the product of two pairs in float64, which is there whether or not JAX is told to use it."""
    with jax.enable_x64(True):
        a, b = (pair.wide(pair.Pair(*part)) for part in (left, right))
        full = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float64}
        return [jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), **full)]


def wide_sums(sign: float, old: Sequence[jax.Array], found: Sequence[jax.Array]) -> pair.Pair:
    """Returns the pair `old` with a float64 product added."""
    with jax.enable_x64(True):
        return pair.narrow(pair.wide(pair.Pair(*old)) + sign * found[0])


def gram_update(a: pair.Pair, x: pair.Pair, sign: float = 1.0, *, side: int = SIDE) -> pair.Pair:
    """Returns a + sign * x^T x in pairs, by way of float64; see `jaxcl.kernels.ridge.gram_update`."""

    @jax.custom_batching.sequential_vmap  # a batch of float64 products has no lowering where JAX is not told to use it
    def update(a: pair.Pair, x: pair.Pair) -> pair.Pair:
        return pair.Pair(*_blocks(wide_products, functools.partial(wide_sums, sign), a, x, side))

    return update(a, x)


def gram_update_sliced(a: pair.Pair, x: pair.Pair, sign: float = 1.0, *, side: int = SIDE) -> pair.Pair:
    """Returns the same without float64: three products of float32, of at most 128 rows for an error of 2^-40."""
    return pair.Pair(*_blocks(gram_products, functools.partial(gram_sums, sign), a, pair.pieces(x, 0), side))


def downdate(r: jax.Array, v: jax.Array, sign: float = -1.0, *, side: int = SIDE) -> jax.Array:
    """Returns r + sign * v^T v; see `jaxcl.kernels.ridge.downdate`."""
    return _blocks(products, functools.partial(sums, sign), [r], [v], side)[0]


def stream(
    r: jax.Array, v: jax.Array, x: jax.Array, sign: float = -1.0, *, side: int = SIDE
) -> tuple[jax.Array, jax.Array]:
    """Returns (r + sign * v^T v, x times that); see `jaxcl.kernels.ridge.stream`.

    One after the other: of 100 rows the products take some ten times as long as to read the matrix once more.
    """
    new = downdate(r, v, sign, side=side)
    return new, pair.contract(x, new, 1, 1)  # symmetric; along its rows, which a mesh may have cut
