"""The definitions, with whole logits: what the blockwise forms are tested against, and fastest where V is small."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.kernels.vocabulary import chunked


def select(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target and the logsumexp of its logits [..., V], both [...]."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.sum(jnp.where(chunked.hits(targets, 0, logits.shape[-1]), logits, 0.0), axis=-1)
    return target - lse, lse


@jax.custom_vjp
def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what `jaxcl.kernels.vocabulary.cross_entropy` does; the logits are kept for the backward pass."""
    return select(chunked.project(hidden, head), targets)


def _cross_entropy_fwd(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    logits = chunked.project(hidden, head)
    logp, lse = select(logits, targets)
    # The logits are kept: forming them again costs a matrix product, an exponential costs next to nothing.
    return (logp, lse), (hidden, head, targets, logits, lse)


def _cross_entropy_bwd(saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    hidden, head, targets, logits, lse = saved
    d_logits = chunked.pull_logits(logits, lse, chunked.hits(targets, 0, logits.shape[-1]), *cotangents)
    d_hidden, d_head = chunked.pull_product(hidden, head, d_logits)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def mixture(
    hidden: jax.Array, head: jax.Array, embedding: jax.Array, *, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Returns what `jaxcl.kernels.vocabulary.mixture` does."""
    scores = chunked.exact(hidden, head) / temperature
    return chunked.exact(jax.nn.softmax(scores, axis=-1), embedding), jax.nn.logsumexp(scores, axis=-1)


def log_density(x: jax.Array, mean: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns log N(x; mean, scale^2 I) in nats, float32 [...]: that of a mixture with Gaussian noise.

    Butt et al. 2025, "Soft Tokens, Hard Truths", equation 10, with its constant. The gradient reaches `mean` alone: x
    is the input that was fed, as it was stored (after any cast), and `scale` is a constant of the run. Were x
    mean + scale * noise in the eyes of the derivative, the score would be zero.

    Args:
      x: [..., E].
      mean: [..., E].
      scale: standard deviation of every coordinate, > 0.
    """
    x, scale = jax.lax.stop_gradient((x.astype(jnp.float32), jnp.asarray(scale, jnp.float32)))
    gap = (x - mean.astype(jnp.float32)) / scale
    return -0.5 * jnp.sum(gap**2, axis=-1) - x.shape[-1] * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))
