"""Cholesky factors and what they solve, for matrices that a mesh cuts by rows: no array of their size ever travels.

    for a panel of columns p:   L_pp = chol(A_pp);  L_ip = A_ip L_pp^-T (own rows i);  A_ij <- A_ij - L_ip L_jp^T

The right-looking form (Golub & Van Loan 2013, section 4.2). The owner of the diagonal block sends it to all devices,
every device makes its rows of the panel, the panel, [d, n], is gathered, and every device updates its own rows; n is
at most 256, or all rows of a device if these have no such divisor but small ones: choose d accordingly.
A solve goes through the panels forwards and backwards, with [n, K] sent at each.

Cost on N devices: about d^3 / N operations for the factor, as all of them work to the end, against d^3 / 3 of one that
has the matrix alone: it takes less time from four devices on, and d^2 / N of memory. 4 d^2 K / N for a solve.
Without a mesh, or where it does not cut the matrix, these are the functions of the library.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.sharding import PartitionSpec

from jaxcl.kernels import sharded
from jaxcl.kernels.ridge import pair

WIDTH = 256  # columns of a panel, at most, where it divides well; see `width`
PARTS = 4  # of the loop over panels, each for a static range of the columns that are left


def factor(a: jax.Array) -> jax.Array:
    """Returns the lower Cholesky factor of a, float32 [d, d], cut by rows as a is; NaN where a is not positive.

    Args:
      a: float32 [d, d], of which the lower triangle is read.
    """
    shared = sharded.strips(a.shape[0])
    if shared is None or not shared.axes:
        return jnp.linalg.cholesky(a, symmetrize_input=False)
    rows = PartitionSpec(shared.axes)
    own = partial(_factor, shared.axes, width(a.shape[0], shared.parts))
    return jax.shard_map(own, mesh=shared.mesh, in_specs=rows, out_specs=rows, check_vma=False)(a)


def solve(lower: jax.Array, right: jax.Array) -> jax.Array:
    """Returns (L L^T)^-1 right, float32 [d, K].

    Args:
      lower: what `factor` returned.
      right: float32 [d, K].
    """
    shared = sharded.strips(lower.shape[0])
    if shared is None or not shared.axes:
        return solve_triangular(lower, solve_triangular(lower, right, lower=True), lower=True, trans=1)
    rows = PartitionSpec(shared.axes)
    own = partial(_solve, shared.axes, width(lower.shape[0], shared.parts))
    return jax.shard_map(own, mesh=shared.mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)(lower, right)


def width(size: int, parts: int) -> int:
    """Returns the columns of a panel: a divisor of the rows of a device, the largest up to `WIDTH` or all of them."""
    own = size // parts
    found = max(n for n in range(1, min(own, WIDTH) + 1) if own % n == 0)
    return found if found * 8 >= min(own, WIDTH) else own  # a prime number of rows is one panel


def _place(axes: tuple[str, ...], own: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where row `start` is among the own rows, and whether it is one of them; else a place that exists."""
    offset = start - jax.lax.axis_index(axes) * own
    mine = (offset >= 0) & (offset < own)
    return jnp.where(mine, offset, 0), mine


def _numbers(axes: tuple[str, ...], own: int) -> jax.Array:
    """Returns the numbers of the own rows, int32 [d / N, 1]."""
    return (jax.lax.axis_index(axes) * own + jnp.arange(own))[:, None]


def _factor(axes: tuple[str, ...], step: int, a: jax.Array) -> jax.Array:
    """Returns the own rows of L from those of A, [d / N, d]."""
    own, size = a.shape
    row = _numbers(axes, own)

    def panel(first: int, number: jax.Array, a: jax.Array) -> jax.Array:
        start = number * step  # columns before `first` are those of L already
        at, mine = _place(axes, own, start)
        column = jax.lax.dynamic_slice(a, (0, start - first), (own, step))
        block = jax.lax.dynamic_slice(column, (at, 0), (step, step))
        block = jax.lax.psum(jnp.where(mine, block, 0.0), axes)
        lower = jnp.linalg.cholesky(block, symmetrize_input=False)
        found = solve_triangular(lower, column.T, lower=True).T
        found = jnp.where(row >= start + step, found, 0.0)
        inside = jax.lax.dynamic_update_slice(found, lower, (at, 0))
        found = jnp.where(mine, inside, found)
        everyone = jax.lax.all_gather(found, axes, axis=0, tiled=True)[first:]
        after = jnp.arange(first, size)[None] >= start + step
        a = a - jnp.where(after, pair.contract(found, everyone, 1, 1), 0.0)
        return jax.lax.dynamic_update_slice(a, found, (0, start - first))

    count = size // step
    cuts = [count * n // min(PARTS, count) for n in range(min(PARTS, count) + 1)]
    for one, end in itertools.pairwise(cuts):
        first = one * step
        rest = jax.lax.fori_loop(one, end, partial(panel, first), a[:, first:])
        a = jnp.concatenate([a[:, :first], rest], axis=1)
    return a


def _solve(axes: tuple[str, ...], step: int, lower: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the own rows of (L L^T)^-1 x from those of L and of x [d / N, K]."""
    own, size = lower.shape
    row, count = _numbers(axes, own), size // step

    def parts(number: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        start = number * step
        at, mine = _place(axes, own, start)
        column = jax.lax.dynamic_slice(lower, (0, start), (own, step))
        block = jax.lax.dynamic_slice(column, (at, 0), (step, step))
        block = jnp.where(mine, block, jnp.eye(step))
        below = jnp.where(row >= start + step, column, 0.0)
        return at, mine, block, below, jax.lax.dynamic_slice(x, (at, 0), (step, x.shape[1]))

    def written(x: jax.Array, found: jax.Array, at: jax.Array, mine: jax.Array) -> jax.Array:
        return jnp.where(mine, jax.lax.dynamic_update_slice(x, found, (at, 0)), x)

    def forwards(number: jax.Array, x: jax.Array) -> jax.Array:
        at, mine, block, below, part = parts(number, x)
        found = jnp.where(mine, solve_triangular(block, part, lower=True), 0.0)
        x = written(x, found, at, mine)
        return x - pair.contract(below, jax.lax.psum(found, axes), 1, 0)

    def backwards(turn: jax.Array, x: jax.Array) -> jax.Array:
        at, mine, block, below, part = parts(count - 1 - turn, x)
        later = jax.lax.psum(pair.contract(below, x, 0, 0), axes)
        return written(x, solve_triangular(block, part - later, lower=True, trans=1), at, mine)

    return jax.lax.fori_loop(0, count, backwards, jax.lax.fori_loop(0, count, forwards, x))
