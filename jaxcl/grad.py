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
    With one microbatch `losses` is traced once; with more, twice, but its forward pass is computed once.

    Args:
      losses: maps (params, rows) to named (sum, weight) pairs. Weights must not depend on `params`.
      params: tree of arrays.
      batch: leaves [B, ...].
      microbatches: number of passes; divides B.
    """

    def objective(p: Params, rows: Batch, weights: dict[str, jax.Array] | None) -> tuple[jax.Array, Losses]:
        values = losses(p, rows)
        divisors = {name: weight for name, (_, weight) in values.items()} if weights is None else weights
        means = [mean(total, jax.lax.stop_gradient(divisors[name])) for name, (total, _) in values.items()]
        return sum(means[1:], means[0]), values

    gradient = jax.grad(objective, has_aux=True)
    if microbatches == 1:
        grads, values = gradient(params, batch, None)
        return values, grads

    pieces = split(batch, microbatches)
    weights = _weights(losses, jax.lax.stop_gradient(params), pieces)

    def accumulate(carry: PyTree, piece: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, carry, gradient(params, piece, weights)), None

    (grads, values), _ = jax.lax.scan(accumulate, _zeros(gradient, params, _first(pieces), weights), pieces)
    return values, grads


def squares(
    loss: Callable[[Params, Batch], tuple[jax.Array, jax.Array]], params: Params, batch: Batch, chunk: int
) -> Params:
    """Returns the mean over rows of the squared gradient of each row's own loss sum.

    This is the diagonal of the empirical Fisher matrix if `loss` is a negative log-likelihood and a row is an
    example. The gradient of a batch, squared, is another quantity: it shrinks with the batch size.
    Rows without weight do not count.

    Args:
      loss: maps (params, rows) to (sum, weight); called on one row at a time, leaves [1, ...].
      params: tree of arrays.
      batch: leaves [B, ...].
      chunk: rows whose gradients are held at a time; divides B. Costs `chunk` copies of `params`.
    """

    def of_row(row: Batch) -> tuple[Params, jax.Array]:
        rows = jax.tree.map(lambda x: x[None], row)
        grads, weight = jax.grad(lambda p: loss(p, rows), has_aux=True)(params)
        return jax.tree.map(jnp.square, grads), (weight > 0).astype(jnp.float32)

    def of_chunk(carry: PyTree, rows: Batch) -> tuple[PyTree, None]:
        found = jax.tree.map(lambda x: jnp.sum(x, 0), jax.vmap(of_row)(rows))
        return jax.tree.map(jnp.add, carry, found), None

    pieces = split(batch, jax.tree.leaves(batch)[0].shape[0] // chunk)
    (total, count), _ = jax.lax.scan(of_chunk, _zeros(of_row, jax.tree.map(lambda x: x[0], _first(pieces))), pieces)
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1.0), total)


def _weights(losses: Callable[[Params, Batch], Losses], params: Params, pieces: Batch) -> dict[str, jax.Array]:
    """Returns the total weight of each loss over all microbatches.

    Weights do not depend on the forward pass, so the compiler drops it here as dead code.
    """

    def add(carry: dict[str, jax.Array], piece: Batch) -> tuple[dict[str, jax.Array], None]:
        return {name: carry[name] + weight for name, (_, weight) in losses(params, piece).items()}, None

    def of_piece(piece: Batch) -> dict[str, jax.Array]:
        return {name: weight for name, (_, weight) in losses(params, piece).items()}

    total, _ = jax.lax.scan(add, _zeros(of_piece, _first(pieces)), pieces)
    return jax.lax.stop_gradient(total)


def _first(pieces: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], pieces)


def _zeros(function: Callable[..., Any], *args: Any) -> PyTree:
    """Returns zeros shaped like what `function(*args)` would return."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))
