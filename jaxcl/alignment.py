"""Gradient alignment: do two batches, or the batches of several tasks, pull the parameters the same way?"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcl import grad, tree
from jaxcl.compose import Setting
from jaxcl.types import Batch, Metrics, Params


def gradient(setting: Setting) -> Callable[[Params, Batch], Params]:
    """Returns the function from (params, rows) to the gradient of the mean training loss."""

    def losses(params: Params, rows: Batch) -> grad.Losses:
        return {"loss": setting.loss(setting.model.apply(params, rows), rows)}

    return lambda params, rows: grad.value_and_grad(losses, params, rows, setting.microbatches)[1]


def alignment(setting: Setting) -> Callable[[Params, Batch, Batch], Metrics]:
    """Returns a function of (params, rows a, rows b) that measures how their gradients align.

    The inner product is the term that replay with Reptile raises (Riemer et al., 1810.11910, eq. 6): positive means
    transfer, negative interference. Returned are `alignment/dot`, `alignment/cosine` (0 if a gradient is 0),
    `alignment/norm_a` and `alignment/norm_b`, float32 []. Memory: two gradients.
    """
    of = gradient(setting)

    def measure(params: Params, a: Batch, b: Batch) -> Metrics:
        first, second = of(params, a), of(params, b)
        dot, norm_a, norm_b = tree.dot(first, second), tree.norm(first), tree.norm(second)
        cosine = grad.mean(dot, norm_a * norm_b)
        values = {"dot": dot, "cosine": cosine, "norm_a": norm_a, "norm_b": norm_b}
        return {f"alignment/{name}": value for name, value in values.items()}

    return measure


def gram(setting: Setting) -> Callable[[Params, Batch], jax.Array]:
    """Returns a function of (params, T batches stacked [T, B, ...]) to their gradients' inner products, [T, T].

    Memory: T gradients, cut over the devices like the parameters. Row and column t belong to batch t; see `cosines`.
    """
    of = gradient(setting)

    def measure(params: Params, batches: Batch) -> jax.Array:
        grads = jax.lax.map(lambda rows: of(params, rows), batches)  # leaves [T, ...]
        return jnp.sum(jnp.stack([_products(g.astype(jnp.float32)) for g in jax.tree.leaves(grads)]), axis=0)

    return measure


def cosines(products: jax.Array) -> jax.Array:
    """Returns the cosines [T, T] that belong to inner products [T, T]; 0 where a gradient is 0."""
    norms = jnp.sqrt(jnp.diagonal(products))
    return grad.mean(products, norms[:, None] * norms[None, :])


def _products(g: jax.Array) -> jax.Array:
    """Returns the inner products [T, T] of T arrays stacked [T, ...].

    Contracted dimension by dimension: flattening would gather a gradient that is cut over devices.
    """
    axes = tuple(range(1, g.ndim))
    return jax.lax.dot_general(g, g, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST)
