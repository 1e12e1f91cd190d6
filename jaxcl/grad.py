"""Gradients of (sum, weight) losses, exact over microbatches of unequal weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.types import Batch, Params, PyTree

# name -> (sum, weight), both float32 []; the objective is the sum over names of sum / weight
Losses = dict[str, tuple[jax.Array, jax.Array]]


def split(batch: PyTree, count: int) -> PyTree:
    """Returns `batch` with every leaf [B, ...] turned into [count, B / count, ...].

    Microbatch i takes the rows i, i + count, ...: rows that are sharded over devices stay where they are.

    Raises:
      ValueError: B is not a multiple of `count`.
    """

    def leaf(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(f"microbatches={count} does not divide the batch of {x.shape[0]} rows")
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(leaf, batch)


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `total / weight`, or 0 where nothing has weight."""
    return total / jnp.where(weight > 0, weight, 1.0)


def value_and_grad(
    losses: Callable[[Params, Batch], Losses], params: Params, batch: Batch, microbatches: int = 1
) -> tuple[Losses, Params]:
    """Returns every loss as (sum, weight) over the whole batch, and the gradient of the sum of their means.

    Means are taken over the batch, not over the microbatches, so the result does not depend on how
    padding and short rows fall into them. Peak memory is that of one microbatch plus one gradient.

    Args:
      losses: maps (params, rows) to named (sum, weight) pairs. Weights must not depend on `params`.
      params: tree of arrays.
      batch: leaves [B, ...].
      microbatches: number of passes; divides B.
    """
    pieces = split(batch, microbatches)
    rows = [jax.tree.map(lambda x, i=i: x[i], pieces) for i in range(microbatches)]
    # Only the weights are used here: the forward passes behind the unused sums are dead code to the compiler.
    weights = _weights(losses, params, rows)

    def objective(p: Params, piece: Batch) -> tuple[jax.Array, Losses]:
        values = losses(p, piece)
        return sum(mean(s, weights[name]) for name, (s, _) in values.items()), values  # type: ignore[return-value]

    gradient = jax.grad(objective, has_aux=True)
    if microbatches == 1:
        grads, values = gradient(params, rows[0])
        return values, grads

    def accumulate(carry: tuple[Params, Any], piece: Batch) -> tuple[tuple[Params, Any], None]:
        return jax.tree.map(jnp.add, carry, gradient(params, piece)), None

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, rows[0]))
    (grads, values), _ = jax.lax.scan(accumulate, empty, pieces)
    return values, grads


def _weights(losses: Callable[[Params, Batch], Losses], params: Params, rows: list[Batch]) -> dict[str, jax.Array]:
    """Returns the total weight of each loss over all microbatches."""
    fixed = jax.lax.stop_gradient(params)
    parts = [{name: weight for name, (_, weight) in losses(fixed, piece).items()} for piece in rows]
    return jax.lax.stop_gradient(jax.tree.map(lambda *w: sum(w[1:], w[0]), *parts))
