"""Normalisation whose bounds are tight: mean and variance see the same values as the numerator."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames=("axis", "epsilon"))
def standardise(x: jax.Array, axis: int = -1, epsilon: float = 1e-6) -> jax.Array:
    """Returns (x - mean) / sqrt(variance + epsilon) over `axis`, like `x`: LayerNorm without scale and offset.

    Written with other primitives it has sound bounds too, but loose ones: the ends of x, of the mean and of the
    variance are then taken independently. This function is recognised in a traced function and bounded as a whole.
    """
    centred = x - jnp.mean(x, axis=axis, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axis, keepdims=True) + epsilon)


def standardised_upper(lower: Any, upper: Any, axis: int, epsilon: float) -> Any:
    """Returns an upper bound of `standardise` over all x between two arrays.

    With n elements, d_i = x_i - mean and S_i = sum over j != i of d_j^2,

        y_i = d_i / sqrt((d_i^2 + S_i) / n + epsilon),   S_i >= d_i^2 / (n - 1)   because the d_j sum to zero,

    which grows with d_i, and with S_i falls if d_i > 0 and grows if not. So the upper bound stands at the largest d_i,
    with the least S_i or the largest. It never exceeds sqrt(n - 1). The lower bound is that of -x, negated.
    """
    n = upper.shape[axis]
    if n == 1:
        return jnp.zeros_like(upper)
    sum_lower = jnp.sum(lower, axis=axis, keepdims=True)
    sum_upper = jnp.sum(upper, axis=axis, keepdims=True)
    high = ((n - 1) * upper - (sum_lower - lower)) / n
    low = ((n - 1) * lower - (sum_upper - upper)) / n
    near = jnp.square(jnp.maximum(jnp.maximum(low, -high), 0))
    far = jnp.square(jnp.maximum(-low, high))
    others = high * high / (n - 1)
    least = jnp.maximum(jnp.sum(near, axis=axis, keepdims=True) - near, others)
    largest = jnp.maximum(jnp.sum(far, axis=axis, keepdims=True) - far, others)
    rest = jnp.where(high > 0, least, largest)
    return high / jnp.sqrt((high * high + rest) / n + epsilon)
